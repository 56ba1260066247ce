import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.page import image_uri, write_page

CHROMIUM = shutil.which("chromium")
WIDTH, HEIGHT = 300, 200


def picture(value: int, channels: int = 3) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, channels), value, np.uint8)


def page_of(**more: Any) -> dict[str, Any]:
    view = {
        "name": "scene 1",
        "note": "12 px wrong",
        "width": WIDTH,
        "height": HEIGHT,
        "before": image_uri(picture(40)),
        "after": image_uri(picture(200)),
        "overlay": image_uri(picture(0, 4)),
        "legend": [["false positive", "rgb(230, 40, 40)"]],
        "items": [{"label": "house", "box": [10, 20, 40, 50]}],
        **more,
    }
    table = {"head": ["", "patches"], "rows": [["IoU", "0.5"]]}
    return {
        "title": "run a",
        "about": ["3 pairs"],
        "sections": [
            {"title": "Scores", "lines": ["a line"], "table": table},
            {"title": "Worst", "views": [view, {**view, "name": "scene 2"}]},
            {"title": "Curves", "figures": [{"title": "P-R", "src": image_uri(picture(9, 4))}]},
        ],
    }


def in_browser(path: Path, script: str = "") -> str:
    """Open a page with a script at its end, and return the document that comes out of it."""
    if not CHROMIUM:
        pytest.skip("no chromium here")
    tried = path.with_name("tried.html")
    text = path.read_text("utf-8").replace("</html>", f"<script>{script}</script></html>")
    tried.write_text(text, "utf-8")
    profile = path.with_name("profile")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={profile}", "--dump-dom", tried.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<html" in done.stdout, done.stderr[-500:]
    return done.stdout


def test_a_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", page_of())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|<link|@import|src=\"[^\"]", text)
    assert "default-src 'none'" in text and "<title>run a</title>" in text


@pytest.mark.fault("D24", "D25")
def test_foreign_text_stays_text(tmp_path: Path) -> None:
    odd = "</script><b>{{page}}$x$\x1b[31m\ud800\u202e\n\u5efa"
    page = page_of(name=odd)
    write_page(tmp_path / "report.html", {**page, "title": odd})
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "\x1b" not in text and "<b>" not in text and "\u202e" not in text
    found = re.search(r'id="page">(.*?)</script>', text, re.DOTALL)
    assert found
    name = json.loads(found[1])["sections"][1]["views"][0]["name"]
    assert name == "</script><b>{{page}}$x$\\x1b[31m\\ud800\\u202e\n\u5efa"


def test_it_swipes_zooms_and_goes_to_places(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", page_of())
    script = """
      const said = [], one = (what) => document.querySelector(what);
      const clip = one(".clip"), stage = one(".stage"), layer = one(".layer"), swipe = one("input");
      const state = () => clip.style.clipPath + ": " + layer.style.transform;
      const say = (what) => said.push(what + ": " + state());
      const all = (what) => document.querySelectorAll(what);
      const button = (list, number) => all(list)[number].querySelector("button");
      say("start");
      swipe.value = 10; swipe.dispatchEvent(new Event("input")); say("swiped");
      button(".controls", 0).click(); say("zoomed");
      stage.dispatchEvent(new WheelEvent("wheel", {deltaY: -1, clientX: 300, clientY: 300}));
      say("wheeled");
      button(".lists ol", 1).click(); say("went");
      button(".lists li", 1).click(); say("second");
      document.title = JSON.stringify({said, width: stage.clientWidth,
        images: [...document.images].map(i => i.naturalWidth)});
    """
    document = in_browser(tmp_path / "report.html", script)
    found = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert found
    state = json.loads(html.unescape(found[1]))
    assert len(state["said"]) == len({s.split(": ", 1)[1] for s in state["said"][:-1]}) + 1
    assert f"{0.1 * state['width']:g}px" in state["said"][1]
    assert "0.5" in document and "run a" in document and "false positive" in document


def test_tiles_come_from_the_folder_as_they_are_needed(tmp_path: Path) -> None:
    side = 128
    for z, x, y in ((0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 0)):
        path = tmp_path / "tiles" / str(z) / f"{x}_{y}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (10 * x, 20 * y, 100 * z)).save(path)
    tiles = {"tiles": "tiles/{z}/{x}_{y}.jpg", "size": side, "levels": 2}
    write_page(tmp_path / "report.html", page_of(before=tiles, overlay=None))
    script = """
      const images = document.querySelector(".layer").children;
      const tiles = () => [...images].map(image => image.dataset.source);
      const first = tiles();
      for (let i = 0; i < 9; i++) document.querySelectorAll(".controls button")[1].click();
      document.title = first.join() + " " + tiles().join();
    """
    document = in_browser(tmp_path / "report.html", script)
    found = re.search(r"<title>(.*?)</title>", document)
    assert found
    near, far = found[1].split()
    assert sorted(near.split(",")) == sorted(
        f"tiles/0/{x}_{y}.jpg" for x in range(3) for y in (0, 1)
    )
    assert far == "tiles/1/0_0.jpg,tiles/1/1_0.jpg"
