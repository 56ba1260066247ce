"""A result on real pairs grows by variants: what took hours is not run again for the next row."""

import argparse
import json
import runpy
import sys
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
    state = {"progress": {"epoch": 30}, "config": {"crop_size": 128, "lr": 1e-3}}
    monkeypatch.setitem(real["train"].__globals__, "read_checkpoint", lambda _: state)
    arguments = argparse.Namespace(runs=tmp_path, epochs=30)
    same = ["--crop-size", "128", "--lr", "1e-3"]
    assert real["train"](arguments, "recipe", same, 0) == tmp_path / "recipe"
    with pytest.raises(SystemExit, match="--lr: 0.001, now 0.002"):
        real["train"](arguments, "recipe", ["--lr", "2e-3"], 0)


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
