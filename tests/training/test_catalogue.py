"""The list of names: every entry is there, with numbers of its own model."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from losses import LOSSES
from main import Config
from model import build_model, count_parameters
from networks.encoders import ENCODERS
from networks.fusion import FUSIONS
from runtime.errors import UserError
from training import catalogue
from training.catalogue import COSTS, check_options, check_words, measure


def test_everything_is_listed() -> None:
    lines = catalogue.catalogue().splitlines()
    for name in (*ENCODERS, *FUSIONS):
        (numbers,) = (line.split()[1:] for line in lines if line.split()[:1] == [name])
        assert "?" not in numbers, f"{name}: python -m training.catalogue, then add it to COSTS"
    assert all(name in lines[-3] for name in LOSSES)


def test_names_are_those_of_the_tables_though_none_is_imported() -> None:
    assert catalogue.backbones() == tuple(ENCODERS)
    assert catalogue.fusions() == tuple(FUSIONS)
    assert catalogue.losses() == tuple(LOSSES)


@pytest.mark.parametrize(
    ("backbone", "fusion"),
    [
        *(pytest.param(name, "concat", marks=pytest.mark.slow) for name in ENCODERS),
        *(("resnet50", name) for name in FUSIONS),
    ],
)
def test_kept_costs_are_those_of_the_model(backbone: str, fusion: str) -> None:
    rounded = tuple(round(value, 1) for value in measure(backbone, fusion))
    assert rounded == COSTS["--fusion"][fusion] or fusion == "concat"
    assert rounded == COSTS["--backbone"][backbone] or fusion != "concat"


def test_costs_are_those_of_a_real_forward_pass() -> None:
    import torch

    parameters, operations = measure("resnet18", "diff")
    model = build_model(backbone="resnet18", fusion="diff", freeze_backbone=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
    assert operations == counter.get_total_flops() / 1e9
    assert parameters == count_parameters(model)[1] / 1e6


@pytest.mark.fault("R16")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backbone": "resnet5"}, "--backbone resnet5: choose one of resnet18, "),
        ({"backbone": "timm:../x"}, "--backbone timm:../x: choose one of"),
        ({"fusion": "sum"}, "--fusion sum: choose one of concat, diff"),
        ({"loss": "ce+bce"}, "--loss ce.bce: 'bce' is none"),
        ({"loss": "dice", "class_weights": "balanced"}, "--loss dice has none; try ce.dice"),
    ],
)
def test_wrong_words_are_named_with_the_right_ones(given: dict[str, str], says: str) -> None:
    right = {
        "backbone": "timm:x", "fusion": "diff", "loss": "ce+dice", "class_weights": "balanced",
        "task": "change",
    }  # fmt: skip
    check_words(**right)
    with pytest.raises(UserError, match=says):
        check_words(**right | given)


def test_a_start_is_a_run_and_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "best.pt").touch()
    with pytest.raises(UserError, match="--init nowhere: no such run or checkpoint"):
        check_options(Config(init="nowhere"))
    with pytest.raises(UserError, match="give one of them"):
        check_options(Config(init=str(tmp_path), weights=str(tmp_path / "best.pt")))


@pytest.mark.parametrize("name", ["bce_weight", "iou_weight", "iou_smooth"])
def test_what_a_loss_does_not_have_is_refused(name: str) -> None:
    given: dict[str, Any] = {name: 2.0}
    check_options(Config(loss="focal+bce_iou", **given))
    with pytest.raises(UserError, match=r"^--\w+-\w+ 2\.0: only bce_iou has it.*--loss is focal$"):
        check_options(Config(loss="focal", **given))
