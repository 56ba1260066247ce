import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapping import report
from mapping.files import thinned
from mapping.grids import Grid
from mapping.report import Pyramid, Report


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (37, 90), (100, 33)])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_tiles_of_a_level_make_up_the_image(
    height: int, width: int, channels: tuple[int, ...]
) -> None:
    image = np.random.default_rng(0).integers(0, 9, (height, width, *channels), dtype=np.uint8)
    tiles: dict[tuple[int, int, int], np.ndarray] = {}

    def save(level: int, x: int, y: int, tile: np.ndarray) -> np.ndarray:
        tiles[level, x, y] = tile.copy()
        return thinned(tile, 2)

    pyramid = Pyramid(height, width, 16, save)
    top = 0
    while top < height:
        bottom = min(height, top + 7)
        pyramid.write(image[top:bottom])
        top = bottom
    pyramid.finish()
    whole = image
    for level in range(pyramid.levels):
        rows = 1 + max(y for z, _, y in tiles if z == level)
        columns = 1 + max(x for z, x, _ in tiles if z == level)
        of_rows = [[tiles[level, x, y] for x in range(columns)] for y in range(rows)]
        again = np.concatenate([np.concatenate(row, axis=1) for row in of_rows])
        assert np.array_equal(again, whole)
        whole = thinned(whole, 2)
    assert max(again.shape[:2]) <= 16  # the last one is a single tile


def content_of(path: Path) -> dict:
    found = re.search(r'id="page">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("is_large", [False, True])
def test_a_scene_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool) -> None:
    if is_large:
        monkeypatch.setattr(report, "INLINE", 32)
        monkeypatch.setattr(report, "TILE", 32)
    before, after = np.random.default_rng(0).integers(0, 256, (2, 3, 70, 90), dtype=np.uint8)
    classes = np.zeros((70, 90), dtype=np.uint8)
    classes[3, 4], classes[5, 6] = 1, 255
    page = Report(tmp_path, "a #1", Grid(70, 90), [[0, 0, 0], [255, 0, 170]])
    for top in range(0, 70, 20):
        rows = np.s_[top : top + 20]
        page.write(before[:, rows], after[:, rows], classes[rows])
    places = [(f"{i} m", (i, i, i + 2, i + 3)) for i in range(600)]
    page.finish(["<b>line</b>"], [("change", (255, 0, 170))], places, "600 polygons")
    (view,) = content_of(tmp_path / "a #1_report.html")["sections"][0]["views"]
    assert (view["width"], view["height"]) == (90, 70) and view["legend"] == [["change", "#ff00aa"]]
    assert len(view["items"]) == report.MAX_PLACES and view["items"][3]["box"] == [3, 3, 5, 6]
    if not is_large:
        assert view["before"].startswith("data:image/jpeg") and len(list(tmp_path.iterdir())) == 1
        return
    layer = view["overlay"]
    assert layer["size"] == 32 and layer["levels"] == 3
    assert layer["tiles"] == "a%20%231_report_files/overlay/{z}/{x}_{y}.png"
    files = tmp_path / "a #1_report_files"
    with Image.open(files / "overlay" / "0" / "0_0.png") as tile:
        shown = np.asarray(tile.convert("RGBA"))
    assert shown[3, 4].tolist() == [255, 0, 170, 166] and np.count_nonzero(shown[..., 3]) == 1
    assert not (files / "overlay" / "0" / "1_0.png").exists()  # nothing changed there
    with Image.open(files / "after" / "0" / "2_2.jpg") as tile:
        assert tile.size == (90 - 64, 70 - 64)
