"""A result on real pairs grows by variants: what took hours is not run again for the next row."""

import argparse
import json
import re
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))  # beside the script, as for those who start it
    return runpy.run_path(str(FOLDER / "real.py"))


def row(change_iou: float) -> dict[str, Any]:
    scores = dict.fromkeys(("change_iou", "change_dice", "mean_dice"), change_iou)
    spread = {name: {"mean": score, "std": 0.0, "n": 1} for name, score in scores.items()}
    return {"options": [], "runs": [{"epoch": 3, **scores, "last": scores}], **spread}


def test_a_variant_is_added_to_those_that_are_there(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "label").mkdir(parents=True)
    results = tmp_path / "results"
    arguments = argparse.Namespace(
        data_dir=tmp_path,
        runs=tmp_path / "runs",
        output=results / "real-cpu.json",
        device="cpu",
        epochs=30,
        note="scenes of a town",
    )
    monkeypatch.setattr(sys, "argv", ["real.py", "--data-dir", str(tmp_path)])
    real["add"]("frozen", row(0.5), arguments)
    arguments.epochs, arguments.note = 12, None
    real["add"]("recipe", row(0.75), arguments)
    result = json.loads(arguments.output.read_text())
    assert {name: found["epochs"] for name, found in result["variants"].items()} == {
        "frozen": 30,
        "recipe": 12,
    }
    assert str(tmp_path) not in arguments.output.read_text()
    page, _ = runpy.run_path(str(FOLDER / "report.py"))["report"](results)
    assert "scenes of a town" in page and "0.500" in page and "0.750" in page
    assert "0.750 +/-" not in page  # one seed has no spread


def test_a_finished_run_of_other_options_is_not_taken_for_these(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "last.pt").touch()
    config = {"crop_size": 128, "lr": 1e-3, "epochs": 30, "data_dir": str(tmp_path / "set")}
    state = {"progress": {"epoch": 30}, "config": config}
    monkeypatch.setitem(real["train"].__globals__, "read_checkpoint", lambda _: state)
    arguments = argparse.Namespace(runs=tmp_path, epochs=30, data_dir=tmp_path / "set")
    same = ["--crop-size", "128", "--lr", "1e-3"]
    assert real["train"](arguments, "recipe", same, 0) == tmp_path / "recipe"
    with pytest.raises(SystemExit, match="--lr: 0.001, now 0.002"):
        real["train"](arguments, "recipe", ["--lr", "2e-3"], 0)
    arguments.data_dir = tmp_path / "other"
    with pytest.raises(SystemExit, match="--data-dir: .*set, now .*other"):
        real["train"](arguments, "recipe", same, 0)
    arguments.data_dir, arguments.epochs = tmp_path / "set", 40
    with pytest.raises(SystemExit, match="--epochs: 30, now 40"):
        real["train"](arguments, "recipe", same, 0)


@pytest.fixture
def pairs(real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three pairs to train on, without the package of weights."""
    for split, number in (("train", 3), ("val", 1)):
        for part in ("A", "B", "label"):
            (tmp_path / "set" / split / part).mkdir(parents=True)
            for index in range(number):
                (tmp_path / "set" / split / part / f"{index}.png").touch()
    monkeypatch.setitem(real["main"].__globals__, "PACKAGE", "json")
    return tmp_path / "set"


def start(real: dict[str, Any], pairs: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    common = ["real.py", "--data-dir", str(pairs), "--runs", str(pairs.parent / "runs")]
    monkeypatch.setattr(sys, "argv", [*common, *words])
    real["main"]()


@pytest.mark.parametrize(("words", "says"), [
    ("--pairs 0", "argument --pairs: give at least 1, not 0"),
    ("--pairs 2 4", "--pairs 4: .*set has 3 to train on"),
    ("--jobs 0", "argument --jobs: give at least 1"),
    ("--seeds 0", "argument --seeds: give at least 1"),
    ("--epochs 0", "argument --epochs: give at least 1"),
    ("--train frozen --pairs 2", "--train takes all pairs"),
])  # fmt: skip
def test_wrong_numbers_are_answered_before_anything_is_trained(
    real: dict[str, Any], pairs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], words: str, says: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(real["main"].__globals__, "train", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        start(real, pairs, monkeypatch, *words.split())
    assert re.search(says, capsys.readouterr().err)


def test_a_folder_without_labels_is_said_before_anything_is_trained(
    real: dict[str, Any], pairs: Path
) -> None:
    assert real["why_not"](pairs) is None
    shutil.rmtree(pairs / "val" / "label")
    assert f"{pairs}: has no {Path('val', 'label')}" in real["why_not"](pairs)


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt()])
def test_after_a_fault_no_other_run_begins(
    real: dict[str, Any], pairs: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    begun = []

    def train(_: argparse.Namespace, name: str, __: list[str], seed: int) -> Path:
        begun.append((name, seed))
        if len(begun) > 1:
            time.sleep(0.2)  # for the first one's fault to be seen
        raise error

    monkeypatch.setitem(real["main"].__globals__, "train", train)
    with pytest.raises(type(error)):
        start(real, pairs, monkeypatch, "--variants", "frozen", "scratch")
    assert len(begun) < 6


def test_variants_share_the_pairs_that_a_seed_has_drawn(
    real: dict[str, Any], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None takes away the links that another is training on."""
    seen: dict[Path, list[int]] = {}

    def train(arguments: argparse.Namespace, _: str, __: list[str], ___: int) -> Path:
        links = sorted(arguments.data_dir.glob("train/*/*.png"))
        assert len(links) == 9 and len({link.resolve() for link in links}) == 6
        seen.setdefault(arguments.data_dir, []).extend(x.lstat().st_ino for x in links)
        return Path(arguments.data_dir)

    inside = real["main"].__globals__
    for name, stand_in in (("train", train), ("scores", lambda _: {}), ("spreads", lambda _: {})):
        monkeypatch.setitem(inside, name, stand_in)
    monkeypatch.setitem(inside, "add", lambda *_: None)
    words = ["--variants", "frozen", "scratch", "--pairs", "2", "2", "--seeds", "2", "--jobs", "2"]
    start(real, pairs, monkeypatch, *words)
    assert len(seen) == 2 and all(len(files) == 18 for files in seen.values())
    assert all(len(set(files)) == 9 for files in seen.values())


def test_the_recipe_and_its_start_see_images_at_twice_their_size(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(arguments: argparse.Namespace, name: str, options: list[str], seed: int) -> Path:
        trained.append((name, options, arguments.epochs))
        return Path(arguments.runs / name)

    inside = real["main"].__globals__
    monkeypatch.setitem(inside, "train", train)
    monkeypatch.setitem(inside, "why_not", lambda _: None)
    monkeypatch.setitem(inside, "make_sample_set", lambda folder: folder)
    common = ["real.py", "--data-dir", str(tmp_path), "--runs", str(tmp_path / "runs"), "--train"]
    for words in ([], ["real-alone", "--epochs", "30"], ["frozen"]):
        monkeypatch.setattr(sys, "argv", [*common, *words])
        real["main"]()
    recipe = real["RECIPE"]
    start = ["--init", str(tmp_path / "runs" / "synthetic-twice" / "best.pt")]
    assert recipe[-2:] == ["--upsample", "2"]
    assert trained == [
        ("synthetic-twice", ["--upsample", "2"], 30),
        ("recipe", [*recipe, *start], real["RECIPE_EPOCHS"]),
        ("real-alone", recipe, 30),
        ("frozen", [], 30),
    ]
