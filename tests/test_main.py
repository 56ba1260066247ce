import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import mask_of, save_pair, save_tree
from PIL import Image
from tiny import TINY, install_tiny

import main
from dataset import open_dataset
from losses import LOSSES
from main import train
from model import load_model
from networks import weights as pretrained
from networks.encoders import ENCODERS
from networks.fusion import FUSIONS
from networks.weights import WeightsUnavailableError
from pairs.sources import FileSource
from pairs.synthetic import sample_set as sample_data
from pairs.synthetic.sample_set import choose_data
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.config import parse
from runtime.errors import DivergedError, Interrupted, UserError
from training import run_folder, splits
from training.recipe import FROM_SCRATCH

SCRIPT = Path(main.__file__)
SMALL = {
    "backbone": TINY,
    "weights": "none",
    "crop_size": 32,
    "batch_size": 2,
    "workers": 0,
    "device": "cpu",
    "mlflow": False,
    "amp": "off",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a run writes beside main.py (data/, runs/, images/) inside the test's folder."""
    monkeypatch.setattr(main, "ROOT", tmp_path)
    monkeypatch.setattr(splits, "PATCH_SIZE", 32)
    install_tiny(monkeypatch)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return save_tree(tmp_path / "levir", train=6, val=2)


def options(tree: Path, **more: Any) -> dict[str, Any]:
    return {**SMALL, "data_dir": str(tree), **more}


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        del row["pairs_per_second"], row["data_wait_share"]
    return table


def no_network(url: str) -> dict:
    raise WeightsUnavailableError(f"{url}: cannot be downloaded (test); {pretrained.REMEDIES}")


def test_a_run_leaves_everything_it_promises(tree: Path, tmp_path: Path) -> None:
    best = train(options(tree, epochs=2, name="a", draw_every=1))
    run = tmp_path / "runs" / "a"
    assert {p.name for p in run.iterdir() if "tfevents" not in p.name} == {
        "config.json", "metrics.csv", "best.pt", "last.pt", "last.previous.pt",
        "validation_predictions.png", ".lock",
    }  # fmt: skip
    assert list(run.glob("*tfevents*"))
    saved = json.loads((run / "config.json").read_text())
    assert saved["epochs"] == 2 and saved["versions"]["torch"] == torch.__version__
    table = rows(run)
    assert [row["step"] for row in table] == ["1", "2"]
    assert max(float(row["val/change_iou"]) for row in table) == pytest.approx(best["change_iou"])
    assert {"train/loss", "val/loss", "val/change_dice", "val/mean_dice", "lr"} <= set(table[0])
    with Image.open(tmp_path / "images" / "validation_predictions.png") as picture:
        assert picture.width > 500
    model = load_model(run / "best.pt")
    before, after, _ = open_dataset(tree, crop_size=32)[0]
    assert model(before[None], after[None]).shape == (1, 1, 32, 32)


class StopAfter:
    """A stop request that a signal makes at the n-th look."""

    looks = 0
    number = signal.SIGTERM

    def __init__(self, *, is_silent: bool) -> None:
        assert not is_silent  # of a single process

    def __enter__(self) -> "StopAfter":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def signal_number(self) -> int:
        StopAfter.looks -= 1
        return self.number if StopAfter.looks <= 0 else 0


def test_resumed_is_bit_for_bit_the_straight_run(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options(tree, epochs=3, name="straight"))
    straight = tmp_path / "runs" / "straight"
    # three updates and one look at the end make an epoch: after the first update, between two
    # epochs, and in the middle of the second and of the third
    for stop_at in (1, 4, 6, 10):
        name = f"stopped-{stop_at}"
        with monkeypatch.context() as patch:
            patch.setattr("training.run.StopRequest", StopAfter)
            StopAfter.looks = stop_at
            with pytest.raises(Interrupted, match="go on with: python main.py --resume") as stop:
                train(options(tree, epochs=3, name=name))
            assert stop.value.exit_code == 143
        train({"resume": "auto", "name": name})
        stopped = tmp_path / "runs" / name
        assert rows(straight) == rows(stopped)
        for file in ("last.pt", "best.pt"):
            first, second = read_checkpoint(straight / file), read_checkpoint(stopped / file)
            assert first["best"] == second["best"]
            assert_equal(first["model"], second["model"])
            if file == "last.pt":
                assert_equal(first["optimizer"], second["optimizer"])


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.mark.fault("R22")
def test_the_seed_decides(tree: Path, tmp_path: Path) -> None:
    for name, more in (("a", {}), ("b", {"workers": 1}), ("c", {"seed": 1})):
        train(options(tree, epochs=1, name=name, **more))
    a, b, c = (rows(tmp_path / "runs" / name) for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.fault("R11")
def test_more_epochs_after_the_end(tree: Path, tmp_path: Path) -> None:
    train(options(tree, epochs=1, name="a"))
    with pytest.raises(UserError, match="all 1 epochs are done; --epochs N adds more"):
        train({"resume": "auto"})
    train({"resume": str(tmp_path / "runs" / "a"), "epochs": 2})
    assert [row["step"] for row in rows(tmp_path / "runs" / "a")] == ["1", "2"]


@pytest.mark.fault("D13")
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_file_that_goes_costs_nothing_once_it_is_back(
    accumulate: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tree, epochs=2, accumulate=accumulate, cache="none", draw_every=1)
    train({**given, "name": "straight"})
    check, looks = FileSource.check_unchanged, 0

    def lose(self: FileSource, number: int) -> None:
        nonlocal looks
        looks -= 1
        if looks == 0:
            self.pairs[number].after.rename(tmp_path / "lost.png")
            lost.append(self.pairs[number].after)
        check(self, number)

    monkeypatch.setattr(FileSource, "check_unchanged", lose)
    # six looks are an epoch of training, two its validation, two its picture: in the second
    # epoch's second and third batch, in its validation, and where it is drawn
    for at in (10 + 3, 10 + 6, 10 + 7, 10 + 9):
        lost: list[Path] = []
        looks, run = at, tmp_path / "runs" / f"at-{at}"
        with pytest.raises(UserError) as error:
            train({**given, "name": run.name})
        assert re.fullmatch(
            rf"{lost[0]}: is gone .*; saved {run}/last.pt, go on with: .*--resume {run}",
            str(error.value),
        )
        (tmp_path / "lost.png").rename(lost[0])
        train({"resume": str(run)})
        assert rows(run) == rows(tmp_path / "runs" / "straight")
        for file in ("last.pt", "best.pt"):
            first = read_checkpoint(tmp_path / "runs" / "straight" / file)
            assert_equal(first["model"], read_checkpoint(run / file)["model"])
    assert read_checkpoint(run / "last.pt")["progress"]["epoch"] == 2


@pytest.mark.fault("R10")
def test_what_may_not_change_is_refused(tree: Path, tmp_path: Path) -> None:
    train(options(tree, epochs=1, name="a"))
    for option, value, says in (
        ("batch_size", 3, "--batch-size: 2, now 3"),
        ("num_classes", 3, "--num-classes: 1, now 3"),
        ("backbone", "resnet34", "--backbone: tiny, now resnet34"),
        ("mask_values", (0, 1), "--mask-values: None, now 0,1"),
    ):
        with pytest.raises(UserError, match=f"keeps its options; {says}"):
            train({"resume": "auto", "epochs": 2, option: value})
    other = save_tree(tmp_path / "other", train=7, val=2)
    with pytest.raises(UserError, match="was trained on other images"):
        train({"resume": "auto", "epochs": 2, "data_dir": str(other)})


@pytest.mark.fault("R23")
def test_a_moved_run_goes_on(tree: Path, tmp_path: Path) -> None:
    train(options(tree, epochs=1, name="a"))
    moved = tmp_path / "else where"
    (tmp_path / "runs" / "a").rename(moved)
    tree.rename(tmp_path / "data set")
    train({"resume": str(moved), "epochs": 2, "data_dir": str(tmp_path / "data set")})
    assert len(rows(moved)) == 2
    assert not (tmp_path / "runs" / "a").exists()


@pytest.mark.fault("R10")
def test_precision_may_change(tree: Path, tmp_path: Path) -> None:
    train(options(tree, epochs=1))
    train({"resume": "auto", "epochs": 2, "amp": "bf16"})
    train({"resume": "auto", "epochs": 3, "amp": "fp16"})
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    state = read_checkpoint(run / "last.pt")
    assert state["progress"]["epoch"] == 3 and state["config"]["amp"] == "fp16"


@pytest.mark.fault("C4")
def test_a_run_whose_best_is_missing_is_refused_at_once(tree: Path, tmp_path: Path) -> None:
    train(options(tree, epochs=1, name="a"))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "config.json").write_text("mine")
    lone = (tmp_path / "runs" / "a" / "last.pt").rename(tmp_path / "downloads" / "last.pt")
    with pytest.raises(UserError, match=r"best\.pt is not beside it"):
        train({"resume": str(lone), "epochs": 2})
    assert (tmp_path / "downloads" / "config.json").read_text() == "mine"


@pytest.mark.fault("C4")
@pytest.mark.parametrize(
    "change",
    [
        {"weights": None},
        {"best": {}},
        {"data": {}},
        {"progress": {"epoch": "x", "batch": 0}},
        {"progress": {"epoch": 1, "batch": -3}},
        {"config": {"epochs": None}},
    ],
)
def test_a_checkpoint_with_wrong_entries_is_refused(
    change: dict[str, Any], tree: Path, tmp_path: Path
) -> None:
    train(options(tree, epochs=1, name="a"))
    path = tmp_path / "runs" / "a" / "last.pt"
    state = torch.load(path, weights_only=True)
    for key, value in change.items():
        if isinstance(value, dict) and value:
            state[key].update(value)
        else:
            state[key] = value
    torch.save(state, path)
    with pytest.raises(UserError):
        train({"resume": str(path), "epochs": 2})


@pytest.mark.fault("R7")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_out_of_memory_says_what_to_try(
    error: Exception, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("training.engine.train_one_epoch", no_room)
    with pytest.raises(UserError, match="--batch-size 2 and --crop-size 32; try --batch-size 1"):
        train(options(tree))


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backbone": "resnet5"}, "--backbone resnet5: choose one of"),
        ({"weights": "/nowhere.pth"}, "--weights /nowhere.pth: no such file"),
        ({"name": "a/b"}, "--name a/b"),
        ({"batch_size": 1}, "BatchNorm needs more"),
    ],
)
def test_mistakes_are_found_before_any_work(
    given: dict[str, Any], says: str, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        train(options(tree, **given))
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("R9")
def test_a_run_is_never_overwritten(tree: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train(options(tree, epochs=1, name="a"))
    assert {p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()} == {"a", "a-2"}


@pytest.mark.fault("R15")
def test_without_weights_real_data_stops_before_anything_is_written(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "download", no_network)
    with pytest.raises(UserError, match=r"--weights PATH.*--weights none"):
        train({**options(tree), "backbone": "resnet18", "weights": "imagenet"})
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("D7")
def test_bad_data_stops_before_anything_is_written(tree: Path, tmp_path: Path) -> None:
    (tree / "val" / "B").rename(tree / "val" / "Z")
    with pytest.raises(UserError, match="has no folder for after"):
        train(options(tree))
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("D14")
def test_where_val_holds_no_change_the_loss_chooses(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in (tree / "val" / "label").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    best = train(options(tree, epochs=3, name="a"))
    losses = [float(row["val/loss"]) for row in rows(tmp_path / "runs" / "a")]
    assert best["loss"] == pytest.approx(min(losses))
    assert best["epoch"] == 1 + losses.index(min(losses))
    assert "val holds no change: this epoch has the lowest loss" in capsys.readouterr().out


@pytest.mark.fault("D10")
def test_mixed_sizes_train(tmp_path: Path) -> None:
    tree = save_tree(tmp_path / "mixed", size=(40, 70), train=2, val=1)
    save_pair(tree / "train", "small", 7, size=(17, 33))
    assert train(options(tree, epochs=1))["change_iou"] >= 0


def test_three_classes_train(tmp_path: Path) -> None:
    tree = save_tree(tmp_path / "mci", train=3, val=1)
    for number, path in enumerate(sorted((tree / "train" / "label").iterdir())):
        Image.fromarray(mask_of(value=(128, 255, 255)[number])).save(path)
    best = train(options(tree, epochs=1, num_classes=3, name="a"))
    assert 0 <= best["mean_iou"] <= 1
    state = read_checkpoint(tmp_path / "runs" / "a" / "best.pt")
    assert state["data"]["mask_values"] == [0, 128, 255]
    assert state["data"]["class_names"] == ["no change", "road", "building"]
    assert state["model"]["head.bias"].shape == (3 * 4,)
    assert best["mean_iou_of_change"] == max(
        float(row["val/mean_iou_of_change"]) for row in rows(tmp_path / "runs" / "a")
    )
    assert (tmp_path / "runs" / "a" / "confusion_matrix.png").is_file()


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_classes_are_those_of_the_file_beside_the_data(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = save_tree(tmp_path / "set", train=2, val=1)
    for path in tree.rglob("label/*.png"):
        Image.fromarray(mask_of(value=7)).save(path)
    (tree / "classes.json").write_text('{"none": 0, "road": 7, "fire": 9}')
    train(options(tree, epochs=1, name="a", class_weights=weights, loss="ce+dice"))
    state = read_checkpoint(tmp_path / "runs" / "a" / "best.pt")
    assert state["model_kwargs"]["num_classes"] == 3
    assert state["data"]["class_names"] == ["none", "road", "fire"]
    said = capsys.readouterr().out
    assert "IoU of fire" in said and "mean IoU of change" in said
    with pytest.raises(UserError, match="--num-classes 4: .*classes.json"):
        train(options(tree, num_classes=4))


def semantic_sample(folder: Path) -> Path:
    counts = {"train": 4, "val": 2}
    return sample_data.make_sample_set(folder, num_pairs=counts, size=64, kind="semantic")


def test_semantic_change_trains(tmp_path: Path) -> None:
    given = options(semantic_sample(tmp_path / "set"), task="semantic")
    best = train({**given, "epochs": 2, "name": "straight"})
    assert {"scd_score", "sek", "f_scd", "miou_change", "iou/building"} <= set(best)
    run = tmp_path / "runs" / "straight"
    assert {"confusion_matrix.png", "transitions.png"} <= {path.name for path in run.iterdir()}
    table = rows(run)
    assert best["scd_score"] == max(float(row["val/scd_score"]) for row in table)
    state = read_checkpoint(run / "best.pt")
    assert state["model_kwargs"]["task"] == "semantic"
    assert state["data"]["class_names"][1:3] == ["water", "ground"]
    model = load_model(run / "best.pt")
    before, after, masks = open_dataset(given["data_dir"], task="semantic", crop_size=32)[0]
    assert model(before[None], after[None]).shape == (1, 1 + 2 * 5, 32, 32)
    assert masks.shape == (2, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", sample_data.FOLDERS)
def test_every_fusion_trains_on_every_kind_of_set(fusion: str, kind: str, tmp_path: Path) -> None:
    counts = {"train": 2, "val": 1}
    root = sample_data.make_sample_set(tmp_path / "s", num_pairs=counts, size=64, kind=kind)
    more: dict[str, Any] = {"task": "semantic"} if kind == "semantic" else {}
    more |= {"num_classes": 3} if kind == "3-classes" else {}
    best = train(options(root, epochs=1, fusion=fusion, **more))
    assert best["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [*ENCODERS, "timm:mobilenetv3_small_100"])
def test_every_backbone_trains(backbone: str, tmp_path: Path) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    tree = save_tree(tmp_path / "levir", size=(64, 64), train=2, val=1)
    given = {"backbone": backbone, "epochs": 1, "crop_size": 64, "freeze_backbone": False}
    assert train(options(tree, **given))["epoch"] == 1


@pytest.mark.parametrize("loss", [*LOSSES, "dice+focal"])
def test_every_loss_trains(loss: str, tree: Path) -> None:
    assert train(options(tree, epochs=1, loss=loss))["epoch"] == 1


def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    made = functools.partial(
        sample_data.make_sample_set, num_pairs={"train": 4, "val": 2, "test": 1}, size=64
    )
    monkeypatch.setattr(sample_data, "make_sample_set", made)


def test_the_sample_run_goes_on_from_scratch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small_sample(monkeypatch)
    monkeypatch.setattr(pretrained, "download", no_network)
    monkeypatch.setattr(pretrained, "package_folder", lambda: None)
    given = {"epochs": 1, "name": "s", "workers": 0, "mlflow": False, "crop_size": 64}
    train(given)
    said = capsys.readouterr().out.replace("\n!! ", " ")  # the notice's lines
    assert "NO IMAGENET WEIGHTS" in said and "FROM SCRATCH" in said
    flags = said.partition(", with ")[2].partition(": its scores")[0]
    expected = {key: value for key, value in FROM_SCRATCH.items() if key != "crop_size"}
    assert parse(main.Config, flags.split()) == expected
    assert "mlflow ui" not in said
    assert "these are not LEVIR-CD results" in said
    state = read_checkpoint(tmp_path / "runs" / "s" / "last.pt")
    assert state["config"]["crop_size"] == 64  # what was asked for wins over the recipe
    assert state["config"]["backbone"] == FROM_SCRATCH["backbone"]
    assert not state["model_kwargs"]["freeze_backbone"]
    train({"resume": "auto", "epochs": 2})
    assert len(rows(tmp_path / "runs" / "s")) == 2


@pytest.mark.slow
def test_with_weights_the_encoder_is_frozen(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(5)
    state = resnet18().state_dict()
    monkeypatch.setattr(pretrained, "download", lambda url: state)
    run = {**options(tree, epochs=1), "backbone": "resnet18"}
    train({**run, "name": "a", "weights": "imagenet"})
    saved = read_checkpoint(tmp_path / "runs" / "a" / "best.pt")
    assert saved["model_kwargs"]["freeze_backbone"]
    for key, value in state.items():
        if not key.startswith("fc."):
            assert torch.equal(saved["model"][f"encoder.backbone.{key}"], value), key
    torch.save(state, tmp_path / "w.pth")
    train({**run, "name": "b", "weights": str(tmp_path / "w.pth")})
    assert rows(tmp_path / "runs" / "a") == rows(tmp_path / "runs" / "b")
    train({**run, "name": "c", "weights": str(tmp_path / "w.pth"), "freeze_backbone": False})
    assert rows(tmp_path / "runs" / "a") != rows(tmp_path / "runs" / "c")


def test_data_chosen_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_sample(monkeypatch)
    data = tmp_path / "data"
    folder = choose_data(data, num_classes=1)
    assert folder == data / "sample"
    assert choose_data(data, num_classes=3) == data / "sample-3-classes"
    (data / "cache").mkdir()
    (data / "README.md").write_text("")
    assert choose_data(data, num_classes=1) == folder
    save_tree(data, train=1, val=1)
    assert choose_data(data, num_classes=1) == data


@pytest.mark.parametrize("named", [True, False])
def test_a_run_downloads_then_trains_and_is_resumed_without(
    named: bool, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine" if named else tmp_path / "data" / "LEVIR-CD"
    asked = []

    def fetch(where: Path) -> Path:
        asked.append(where)
        where.parent.mkdir(exist_ok=True)
        return tree.rename(where)

    monkeypatch.setattr(main, "fetch_dataset", fetch)
    given = {**SMALL, "download": True, "epochs": 1, "name": "a"}
    train({**given, "data_dir": str(folder)} if named else given)
    assert asked == [folder]
    assert read_checkpoint(tmp_path / "runs" / "a" / "last.pt")["config"]["data_dir"] == str(folder)
    train({"resume": "auto", "epochs": 2})
    assert asked == [folder]


def test_sample_data_is_called_so_however_it_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small_sample(monkeypatch)
    choose_data(tmp_path / "data", num_classes=1)
    (tmp_path / "data" / "LEVIR-CD.zip").write_text("not unpacked yet")
    train({**SMALL, "epochs": 1, "crop_size": 64})
    assert "these are not LEVIR-CD results" in capsys.readouterr().out


@pytest.mark.fault("R15")
def test_weights_that_were_asked_for_are_not_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sample(monkeypatch)
    monkeypatch.setattr(pretrained, "download", no_network)
    with pytest.raises(UserError, match="cannot be downloaded"):
        train({"weights": "imagenet", "workers": 0, "mlflow": False})


@pytest.mark.fault("R5")
def test_diverging_keeps_the_last_good_checkpoint(tree: Path, tmp_path: Path) -> None:
    train(options(tree, epochs=1, name="a"))
    kept = (tmp_path / "runs" / "a" / "last.pt").read_bytes()
    with pytest.raises(DivergedError) as error:
        train(options(tree, epochs=3, name="b", lr=1e30, clip_grad=0.0, warmup_epochs=0.0))
    assert error.value.exit_code == 3
    best = tmp_path / "runs" / "b" / "best.pt"
    if best.exists():
        read_checkpoint(best)
    assert (tmp_path / "runs" / "a" / "last.pt").read_bytes() == kept


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--epochs 0", "--epochs 0: give a number above 0"),
        ("--batch-size -1", "--batch-size -1"),
        ("--crop-size 33", "--crop-size 33: give a multiple of 32"),
        ("--lr nan", "--lr nan"),
        ("--data-dir /nowhere/at/all", "no such folder; expected DIR/train/A"),
        ("--resume /nowhere/last.pt", "no such run or checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv: str, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv.split(), "--output-dir", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("D13")
@pytest.mark.slow
def test_a_file_that_disappears_ends_the_run_and_its_workers(tree: Path, tmp_path: Path) -> None:
    # a cached pair needs its file no more
    given = options(tree, backbone="resnet18", workers=1, cache="none")
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()
             if key != "mlflow"]  # fmt: skip
    command = [sys.executable, "-u", str(SCRIPT), *words, "--no-mlflow", "--epochs", "500",
               "--output-dir", str(tmp_path / "runs")]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("epoch   1"):
            (tree / "train" / "A" / "train_3.png").unlink()
            break
    _, errors = run.communicate(timeout=60)  # a process that waits for its workers hangs here
    assert run.returncode == 2
    assert errors.count("train_3.png: is gone") == 1 and "Traceback" not in errors
    assert "go on with: python main.py --resume" in errors
    state = read_checkpoint(next((tmp_path / "runs").glob("*/last.pt")))
    assert state["progress"]["epoch"] >= 1


@pytest.mark.fault("R3", "R27")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_real_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, tree: Path, tmp_path: Path
) -> None:
    given = options(tree, backbone="resnet18", workers=1)
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()
             if key != "mlflow"]  # fmt: skip
    command = [sys.executable, "-u", str(SCRIPT), *words, "--no-mlflow", "--epochs", "500",
               "--output-dir", str(tmp_path / "runs"), "--name", "a"]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("epoch   2"):
            os.killpg(run.pid, number)  # as a terminal does: the workers get it too
            break
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert "go on with: python main.py --resume" in errors and "Traceback" not in errors
    state = read_checkpoint(tmp_path / "runs" / "a" / "last.pt")
    assert state["progress"]["epoch"] >= 2
    assert np.isfinite(state["best"]["change_iou"])


@pytest.mark.fault("R10")
def test_classes_that_changed_places_are_refused(tmp_path: Path) -> None:
    tree = save_tree(tmp_path / "set", train=2, val=1)
    names = tree / "classes.json"
    names.write_text('{"none": 0, "road": 128, "building": 255}')
    train(options(tree, epochs=1, name="a"))
    for other in (
        '{"none": 0, "building": 255, "road": 128}',
        '{"none": 0, "building": 128, "road": 255}',
    ):
        names.write_text(other)
        with pytest.raises(UserError, match="its classes were none 0, road 128, building 255"):
            train({"resume": "auto", "epochs": 2})
    names.write_text('{"none": 0, "road": 128, "building": 255}')
    train({"resume": "auto", "epochs": 2})


def test_a_run_is_claimed_before_it_is_read(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options(tree, epochs=1, name="a"))
    run = tmp_path / "runs" / "a"
    read = []

    def read_alone(path: Path) -> dict[str, Any]:
        with pytest.raises(UserError, match="still running"), run_folder.claimed(run):
            pass
        read.append(path)
        return read_checkpoint(path)

    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    monkeypatch.setattr(run_folder, "read_checkpoint", read_alone)
    train({"resume": str(run), "epochs": 2})
    assert read == [run / "last.pt"]


def test_a_run_starts_from_the_whole_model_of_another(tree: Path, tmp_path: Path) -> None:
    first = tmp_path / "runs" / "first"
    main.train(options(tree, name="first", epochs=1))
    start = read_checkpoint(first / "best.pt")["model"]
    main.train(options(tree, name="second", epochs=1, init=str(first), lr=1e-12))
    second = read_checkpoint(tmp_path / "runs" / "second" / "last.pt")
    assert second["weights"] == f"the whole model of {first / 'best.pt'}"
    weights = {k for k in start if k.endswith("weight")}
    for name in weights:
        torch.testing.assert_close(second["model"][name], start[name])
    with pytest.raises(UserError, match="--init .*fusion is 'concat', this run's diff; change"):
        main.train(options(tree, name="third", init=str(first), fusion="diff"))
    with pytest.raises(UserError, match="nowhere: no such run"):
        main.train(options(tree, name="fourth", init="nowhere"))


def test_a_start_brings_its_architecture(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(options(tree, name="first", epochs=1, fusion="diff"))
    given = options(tree, name="second", epochs=1, init=str(tmp_path / "runs" / "first"))
    del given["backbone"]
    train(given)
    saved = json.loads((tmp_path / "runs" / "second" / "config.json").read_text())
    assert (saved["backbone"], saved["fusion"]) == (TINY, "diff")
    assert "3 updates in all, which are few" in capsys.readouterr().out


def test_a_run_sees_images_at_twice_their_size(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    train(options(tree, name="first", epochs=1, upsample=2))
    assert f"{TINY}, concat, images at 2 times their size: " in capsys.readouterr().out
    assert read_checkpoint(first / "last.pt")["model_kwargs"]["upsample"] == 2
    with pytest.raises(UserError, match="--upsample: 2, now 1"):
        train({"resume": str(first), "upsample": 1})
    train({"resume": str(first), "epochs": 2})
    train(options(tree, name="second", epochs=1, init=str(first)))
    assert read_checkpoint(second / "last.pt")["model_kwargs"]["upsample"] == 2
    with pytest.raises(UserError, match="its upsample is 2, this run's 1; change --upsample"):
        train(options(tree, name="third", init=str(first), upsample=1))


def test_a_run_without_upsample_goes_on_and_is_a_start(tree: Path, tmp_path: Path) -> None:
    first = tmp_path / "runs" / "first"
    train(options(tree, name="first", epochs=1))
    for path in (first / "last.pt", first / "best.pt"):  # as an earlier version left them
        state = read_checkpoint(path)
        del state["model_kwargs"]["upsample"], state["config"]["upsample"]
        save_checkpoint(path, state)
    train({"resume": str(first), "epochs": 2})
    assert read_checkpoint(first / "last.pt")["progress"]["epoch"] == 2
    state = read_checkpoint(first / "best.pt")
    state["model_kwargs"].pop("upsample", None)
    save_checkpoint(first / "best.pt", state)
    train(options(tree, name="second", epochs=1, init=str(first)))
    with pytest.raises(UserError, match="its upsample is 1, this run's 2; change --upsample"):
        train(options(tree, name="third", init=str(first), upsample=2))
