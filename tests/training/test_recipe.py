"""What the sample run takes, above all where ImageNet weights cannot be had."""

from pathlib import Path
from typing import Any

import pytest

from networks import weights
from networks.encoders import LITE
from networks.weights import WeightsUnavailableError
from training.recipe import FROM_PIP, FROM_SCRATCH, SMALL_SET, sample_recipe


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(backbone: str) -> Any:
        raise WeightsUnavailableError("no network")

    monkeypatch.setattr(weights, "library_weights", fail)


def test_the_package_s_weights_are_taken_and_stay_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(weights, "package_folder", lambda: tmp_path)
    recipe = sample_recipe("resnet50", {"lr"})
    assert recipe == {name: value for name, value in FROM_PIP.items() if name != "lr"}
    assert not {"weights", "freeze_backbone"} & set(FROM_PIP)  # ImageNet's, hence frozen
    said = capsys.readouterr().out
    assert "NO IMAGENET WEIGHTS OF resnet50: no network" in said
    assert LITE in said and "FROM SCRATCH" not in said


@pytest.mark.parametrize("given", [{"backbone"}, set()])
def test_without_the_package_or_with_a_chosen_encoder_it_goes_from_scratch(
    given: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path if given else None
    monkeypatch.setattr(weights, "package_folder", lambda: folder)
    recipe = sample_recipe("resnet50", given)
    assert recipe == {name: value for name, value in FROM_SCRATCH.items() if name not in given}


def test_no_line_of_the_notice_ends_within_an_option_or_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = "/a-long-folder" * 9

    def fail(backbone: str) -> Any:
        raise WeightsUnavailableError(f"no such file: {path}")

    monkeypatch.setattr(weights, "library_weights", fail)
    monkeypatch.setattr(weights, "package_folder", lambda: None)
    for backbone in ("r" * length for length in range(1, 40)):
        recipe = sample_recipe(backbone, {"crop_size"})
        words = capsys.readouterr().out.replace(",", " ").replace(":", " ").split()
        flags = {f"--{name.replace('_', '-')}" for name in recipe} - {"--freeze-backbone"}
        assert {path, "--no-freeze-backbone", *flags} <= set(words)


def test_with_weights_the_small_set_still_gets_small_crops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(weights, "library_weights", lambda backbone: ({}, "ImageNet"))
    recipe = sample_recipe("resnet50", {"batch_size"})
    assert recipe == {name: value for name, value in SMALL_SET.items() if name != "batch_size"}
    assert "--crop-size 128" in capsys.readouterr().out
    assert sample_recipe("resnet50", set(SMALL_SET)) == {}
