import csv
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import mask_of, save_tree
from PIL import Image
from tiny import TINY, send_to

import evaluate
import main
from evaluate import caution_of, score
from main import train
from pairs.synthetic import sample_set as sample_data
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.errors import UserError
from scoring import report as score_report
from scoring.corruptions import CORRUPTIONS
from scoring.report import as_json, summarize, text

SCRIPT = Path(evaluate.__file__)
FAST: dict[str, Any] = {"device": "cpu", "workers": 0, "mlflow": False, "amp": "off"}
TRAINING: dict[str, Any] = {
    **FAST, "backbone": TINY, "weights": "none", "crop_size": 32, "batch_size": 2, "epochs": 1
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is written beside the scripts inside the test's folder; patches of 32."""
    send_to(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a run on it, to copy from."""
    home = tmp_path_factory.mktemp("first")
    tree = save_tree(home / "levir", size=(70, 45), train=4, val=3, test=2)
    with pytest.MonkeyPatch.context() as patch:
        send_to(home, patch)
        train({**TRAINING, "data_dir": str(tree), "name": "a"})
    return home


@pytest.fixture
def tree(first_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_run / "levir", tmp_path / "levir"))


@pytest.fixture
def trained(first_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_run / "runs" / "a", tmp_path / "runs" / "a"))


def evaluated(*checkpoints: Path, **more: Any) -> dict[str, Any]:
    return evaluate.evaluate({"checkpoints": tuple(map(str, checkpoints)), **FAST, **more})


def test_patches_on_val_are_the_scores_of_training(trained: Path) -> None:
    best = read_checkpoint(trained / "best.pt")["best"]
    report = evaluated(trained / "best.pt", split="val")
    scores = report["runs"][0]["protocols"]["patches"]["points"]["default"]["scores"]
    for name in ("change_iou", "change_dice", "change_precision", "accuracy", "mean_dice"):
        assert scores[name] == best[name]
    assert report["runs"][0]["epoch"] == best["epoch"]


def test_an_evaluation_leaves_everything_it_promises(
    trained: Path, tree: Path, capsys: pytest.CaptureFixture
) -> None:
    report = evaluated(trained, robustness=True)
    folder = trained / "evaluation" / "test"
    assert {p.name for p in folder.iterdir() if "tfevents" not in p.name} == {
        "report.html", "scores.json", "scores.txt", "images.csv", "robustness.csv",
        "precision_recall.png",
        "calibration.png", "worst_pairs.png", "confusion_default.png", "confusion_val.png",
        "robustness.png",
    }  # fmt: skip
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 200
    assert [p.name for p in folder.parent.iterdir()] == ["test"]  # nothing half-written
    assert json.loads((folder / "scores.json").read_text()) == json.loads(as_json(report))
    assert (folder / "scores.txt").read_text() == text(report) + "\n"
    assert text(report) in capsys.readouterr().out

    with (folder / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert len(images) == 2 * 3 * 2  # images, protocols, operating points
    of_patches = [r for r in images if (r["protocol"], r["point"]) == ("patches", "default")]
    assert [row["pair"] for row in of_patches] == ["test_0", "test_1"]
    tp, fp, fn = (
        sum(int(row[f"{kind}_pixels"]) for row in of_patches) for kind in ("tp", "fp", "fn")
    )
    scores = report["runs"][0]["protocols"]["patches"]["points"]["default"]["scores"]
    assert scores["change_iou"] == pytest.approx(tp / (tp + fp + fn))
    with (folder / "robustness.csv").open(newline="") as file:
        levels = list(csv.DictReader(file))
    assert len(levels) == sum(len(found.levels) for found in CORRUPTIONS.values())
    assert float(levels[0]["change_iou"]) == scores["change_iou"]


def test_json_is_all_of_stdout_and_holds_every_number_of_the_table(
    trained: Path, capsys: pytest.CaptureFixture
) -> None:
    score({"checkpoints": (str(trained),), **FAST, "json": True})
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "levir (split folders)" in said.err
    assert_numbers_are_in(text(report), report)


def assert_numbers_are_in(table: str, report: dict[str, Any], at_least: int = 100) -> None:
    numbers = (
        {f"{n:.5f}" for n in numbers_of(report)}
        | {f"{n:.4f}" for n in numbers_of(report)}
        | {f"{n:.2f}" for n in numbers_of(report)}
    )
    numbers |= {f"{n:.0f}" for n in numbers_of(report) if n == int(n)}
    lines = table.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("threshold"))
    end = lines.index("", begin)
    shown = [cell for line in lines[begin:end] for cell in line[42:].replace("-", " ").split()]
    assert len(shown) >= at_least
    for cell in shown:
        assert cell.strip("*") in numbers | {"0.5", "argmax"}, cell


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [n for part in value for n in numbers_of(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.slow
def test_what_is_there_stays(trained: Path, tmp_path: Path) -> None:
    for _ in range(2):
        evaluated(trained, protocols="whole")
    assert {p.name for p in (trained / "evaluation").iterdir()} == {"test", "test-2"}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "scores.json").write_text("mine")
    evaluated(trained, protocols="whole", output_dir=str(mine))
    assert [p.name for p in mine.iterdir()] == ["scores.json"]
    assert (tmp_path / "mine-2" / "scores.json").is_file()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "measure", None)
    with pytest.raises(UserError, match="file/x: cannot be written"):
        evaluated(trained, output_dir=str(tmp_path / "file" / "x"))


@pytest.mark.slow
def test_seeds_give_mean_and_deviation(trained: Path, tree: Path, tmp_path: Path) -> None:
    train({**TRAINING, "data_dir": str(tree), "name": "b", "seed": 1})
    report = evaluated(trained, tmp_path / "runs" / "b" / "best.pt", protocols="sliding")
    assert (tmp_path / "runs" / "evaluation" / "test" / "scores.json").is_file()
    for part in ("1-a", "2-b"):
        assert (tmp_path / "runs" / "evaluation" / "test" / part / "images.csv").is_file()
    of_runs = [
        run["protocols"]["sliding"]["points"]["val"]["scores"]["change_iou"]
        for run in report["runs"]
    ]
    mean, std = (
        report[how]["sliding"]["points"]["val"]["scores"]["change_iou"] for how in ("mean", "std")
    )
    assert mean == pytest.approx(np.mean(of_runs)) and std == pytest.approx(np.std(of_runs, ddof=1))
    assert f"{mean:.3f}±{std:.3f}" in text(report)
    single = evaluated(trained, protocols="sliding")["runs"][0]
    assert report["runs"][0] == single


def test_two_models_are_compared_on_the_same_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = torch.load(trained / "best.pt", weights_only=True)
    other = tmp_path / "runs" / "silent" / "best.pt"
    other.parent.mkdir()
    weights = dict(state["model"])
    weights["head.bias"] = weights["head.bias"] - 50  # never predicts change
    elsewhere = {**state["data"], "fingerprint": "another"}
    save_checkpoint(other, {**state, "model": weights, "data": elsewhere})
    report = evaluated(trained, other, compare=True, protocols="patches")
    (pair,) = report["comparison"]
    found = pair["protocols"]["patches"]["default"]
    scores = [
        run["protocols"]["patches"]["points"]["default"]["scores"]["change_iou"]
        for run in report["runs"]
    ]
    assert found["value"] == pytest.approx(scores[1] - scores[0])
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert "silent/best.pt was trained on other data" in capsys.readouterr().out
    said = text(report)
    assert f"{found['value']:+.4f}" in said and "±" not in said
    page = (tmp_path / "runs" / "evaluation" / "test" / "report.html").read_text("utf-8")
    assert "difference in change IoU" in page and "Pairs with the most wrong pixels of a" in page
    with pytest.raises(UserError, match="--compare: give two models"):
        evaluated(trained, compare=True)


def test_flips_are_said_and_kept_apart(trained: Path, capsys: pytest.CaptureFixture) -> None:
    plain = evaluated(trained, protocols="patches")
    mean = evaluated(trained, protocols="patches", flips=True)
    assert not plain["flips"] and mean["flips"]
    assert "mirror images" not in text(plain)
    assert "--flips: the mean over four mirror images" in text(mean)
    assert {p.name for p in (trained / "evaluation").iterdir()} == {"test", "test-flips"}
    folder = trained / "evaluation" / "test-flips"  # also where MLflow's names begin
    assert json.loads((folder / "scores.json").read_text())["flips"] is True
    assert "mean over four mirror images" in (folder / "report.html").read_text("utf-8")
    runs = [report["runs"][0] for report in (plain, mean)]
    found, of_mean = (run["protocols"]["patches"] for run in runs)
    for name in ("average_precision", "calibration_error"):
        assert found[name] != of_mean[name]
    assert found["points"]["val"]["threshold"] != of_mean["points"]["val"]["threshold"]


@pytest.mark.slow
def test_robustness_has_the_flips_too(trained: Path) -> None:
    (run,) = evaluated(trained, protocols="patches", flips=True, robustness=True)["runs"]
    clean = run["robustness"]["rows"][0]["change_iou"]
    assert clean == run["protocols"]["patches"]["points"]["default"]["scores"]["change_iou"]


def test_three_classes(tmp_path: Path) -> None:
    tree = save_tree(tmp_path / "mci", size=(40, 40), train=3, val=2, test=2)
    for number, path in enumerate(sorted(tree.rglob("label/*.png"))):
        Image.fromarray(mask_of(40, 40, value=(128, 255)[number % 2])).save(path)
    best = train({**TRAINING, "data_dir": str(tree), "name": "c", "num_classes": 3, "epochs": 1})
    report = evaluated(tmp_path / "runs" / "c", split="val", protocols="patches")
    assert report["rule"] == "argmax" and "argmax" in text(report)
    scores = report["runs"][0]["protocols"]["patches"]["points"]["default"]["scores"]
    assert scores["mean_iou_of_change"] == best["mean_iou_of_change"]
    assert scores["iou/road"] == best["iou/road"]
    assert "IoU of road" in text(report) and "Dice of building" in text(report)
    confusion = report["runs"][0]["protocols"]["patches"]["points"]["val"]["confusion"]
    assert np.array(confusion).shape == (3, 3) and np.sum(confusion) == 2 * 40 * 40
    assert_numbers_are_in(text(report), report, at_least=40)


@pytest.mark.slow
def test_semantic_change(tmp_path: Path) -> None:
    sample_data.make_sample_set(
        tmp_path / "sem", kind="semantic", num_pairs={"train": 4, "val": 2, "test": 2}, size=64
    )
    best = train({**TRAINING, "data_dir": str(tmp_path / "sem"), "name": "s", "task": "semantic",
                  "epochs": 1, "crop_size": 64})  # fmt: skip
    report = evaluated(tmp_path / "runs" / "s", split="val", protocols="patches")
    points = report["runs"][0]["protocols"]["patches"]["points"]
    for name in ("scd_score", "sek", "f_scd", "change_iou"):
        assert points["default"]["scores"][name] == best[name]
        assert name in points["val"]["intervals"]
    assert (tmp_path / "runs" / "s" / "evaluation" / "val" / "transitions_val.png").is_file()


def test_other_data_is_told_apart(trained: Path, tmp_path: Path) -> None:
    other = save_tree(tmp_path / "elsewhere", train=1, val=2, test=1)
    report = evaluated(trained, data_dir=str(other), split="val", protocols="whole")
    assert not report["runs"][0]["trained_on_this_data"]
    assert (trained / "evaluation" / "elsewhere-val" / "scores.json").is_file()
    assert "OPTIMISTIC: the thresholds with * were chosen on these pairs" in text(report)


@pytest.mark.slow
def test_protocols_that_are_the_same_are_computed_once(trained: Path, tmp_path: Path) -> None:
    single = save_tree(tmp_path / "single", train=1, val=2, test=1)
    report = evaluated(trained, data_dir=str(single))
    assert list(report["runs"][0]["protocols"]) == ["patches"]
    assert "all images are 32 x 32: whole and sliding would be the same" in text(report)
    report = evaluated(trained, data_dir=str(single), window=16, overlap=4)
    assert len(report["runs"][0]["protocols"]) == 3


def test_who_chose_on_a_split_says_so() -> None:
    assert caution_of("test", True) is caution_of("test", False) is None
    assert caution_of("train", False) is None
    assert caution_of("train", True) == "the model learned from these pairs"
    assert "the checkpoint" in str(caution_of("val", True))
    assert "the checkpoint" not in str(caution_of("val", False))


def test_numbers_that_do_not_exist_are_null_and_a_dash(tree: Path, trained: Path) -> None:
    for path in (tree / "test" / "label").iterdir():
        Image.fromarray(np.zeros((70, 45), np.uint8)).save(path)
    report = evaluated(trained, protocols="whole", data_dir=str(tree))
    assert "nothing changed in this split" in text(report)
    scores = json.loads(as_json(report))["runs"][0]["protocols"]["whole"]["points"]["val"]["scores"]
    assert scores["dice_per_image_changed"] is None
    line = next(x for x in text(report).splitlines() if "of images with change" in x)
    assert line.split()[-2:] == ["-", "-"]


def test_means_of_runs_leave_words_out() -> None:
    runs = [{"protocols": {"p": {"description": "d", "x": {"a": n, "b": [1, 2]}}}} for n in (1, 3)]
    assert summarize(runs) == {"mean": {"p": {"x": {"a": 2}}}, "std": {"p": {"x": {"a": 2**0.5}}}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"protocols": "patches,tiles"}, "--protocols patches,tiles: give some of"),
        ({"protocols": "whole,whole"}, "--protocols whole,whole"),
        ({"overlap": 512}, "--overlap 512: give less than --window 512"),
        ({"checkpoints": ("/nowhere.pt",)}, "/nowhere.pt: no such run or checkpoint"),
        ({"data_dir": "/nowhere"}, "no such folder"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], says: str, trained: Path) -> None:
    with pytest.raises(UserError, match=says):
        evaluate.evaluate({"checkpoints": (str(trained),), **FAST, **given})
    assert not (trained / "evaluation").exists()


def test_a_split_that_is_missing_and_runs_that_do_not_match(
    trained: Path, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is given twice"):
        evaluated(trained, trained / "best.pt")
    state = torch.load(trained / "best.pt", weights_only=True)
    other = tmp_path / "other.pt"
    save_checkpoint(other, {**state, "model_kwargs": {**state["model_kwargs"], "num_classes": 3}})
    with pytest.raises(UserError, match="its classes are not those of"):
        evaluated(trained, other)
    small = save_tree(tmp_path / "small", train=1, val=1)
    with pytest.raises(UserError, match="has no test split, only train, val; --split val"):
        evaluated(trained, data_dir=str(small))


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    tree = save_tree(tmp_path / "levir", size=(70, 45), train=4, val=3, test=2)
    given = {**TRAINING, "backbone": "resnet18", "data_dir": tree, "output_dir": tmp_path / "runs"}
    del given["mlflow"]  # a network as it is, in a process of its own
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    training = [sys.executable, str(Path(main.__file__)), *words, "--no-mlflow", "--name=a"]
    subprocess.run(training, check=True, capture_output=True)
    words = [
        str(tmp_path / "runs" / "a"),
        "--json",
        "--no-mlflow",
        "-j",
        "0",
        "--protocols",
        "whole",
    ]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.load(io.StringIO(done.stdout))["pairs"] == 2
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "checkpoints" in done.stderr
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--robustness" in done.stdout


def test_classes_that_changed_places_are_refused(tmp_path: Path) -> None:
    tree = save_tree(tmp_path / "mci", size=(40, 40), train=2, val=2, test=2)
    train({**TRAINING, "data_dir": str(tree), "name": "c", "num_classes": 3, "epochs": 1})
    (tree / "classes.json").write_text('{"no change": 0, "building": 255, "road": 128}')
    with pytest.raises(UserError, match="has learned .* road, building, but .* building, road;"):
        evaluated(tmp_path / "runs" / "c", split="val", protocols="patches")


@pytest.mark.slow
def test_runs_of_other_data_are_told_apart_one_by_one(trained: Path, tmp_path: Path) -> None:
    other = save_tree(tmp_path / "other", size=(40, 40), train=3, val=2, test=2)
    train({**TRAINING, "data_dir": str(other), "name": "o", "epochs": 1})
    report = evaluated(trained, tmp_path / "runs" / "o", split="val", protocols="patches")
    assert [run["trained_on_this_data"] for run in report["runs"]] == [True, False]


def test_a_score_without_a_value_does_not_end_a_comparison() -> None:
    nan = float("nan")
    combined = score_report._combined([{"a": nan, "b": 1.0}, {"a": nan, "b": 3.0}], stdev)
    assert math.isnan(combined["a"]) and combined["b"] == pytest.approx(2**0.5)
