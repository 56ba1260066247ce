from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import save_pair, save_tree
from tiny import TINY, install_tiny
from torch import Tensor

from dataset import open_dataset
from metrics import ScoreHistogram
from model import SiameseUNet, build_model
from pairs.sources import Source
from scoring import protocols
from scoring.corruptions import CORRUPTIONS
from scoring.counts import STEPS, add_to_histogram
from scoring.evaluation import BY_VAL, DEFAULT, evaluate_protocol, measure_robustness
from scoring.figures import draw_all
from scoring.protocols import Predictor
from scoring.report import protocols_report, score_rows


class Darkness(SiameseUNet):
    """Predicts change where the later date is dark; knows no training."""

    calls = 0

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        Darkness.calls += len(before)
        return (100 - after.float().mean(1, keepdim=True)) / 20


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setattr(protocols, "PATCH_SIZE", 32)
    install_tiny(monkeypatch)
    model = build_model(backbone=TINY).eval()
    model.__class__ = Darkness
    return Predictor(model, window=48, overlap=16)


@pytest.fixture
def splits(tmp_path: Path) -> dict[str, Source]:
    tree = save_tree(tmp_path / "set", train=1, val=3, test=12)
    return {split: open_dataset(tree, split).source for split in ("val", "test")}


def test_the_threshold_comes_from_val_alone(
    predictor: Predictor, splits: dict[str, Source], tmp_path: Path
) -> None:
    result = evaluate_protocol(predictor, "patches", splits["test"], splits["val"])
    of_val = ScoreHistogram(num_bins=STEPS)
    for predicted in predictor.predict(splits["val"], "patches"):
        add_to_histogram(of_val, *predicted)
    assert result.points == {DEFAULT: None, BY_VAL: of_val.best_threshold()}
    save_pair(tmp_path / "set" / "test", "another", 99)
    more = open_dataset(tmp_path / "set", "test").source
    again = evaluate_protocol(predictor, "patches", more, splits["val"])
    assert again.points == result.points
    assert len(again.counts.images) == 13


def test_without_val_no_threshold_is_chosen(
    predictor: Predictor, splits: dict[str, Source]
) -> None:
    Darkness.calls = 0
    results = {
        name: evaluate_protocol(predictor, name, splits["test"], None)
        for name in ("whole", "patches")
    }
    assert Darkness.calls == 2 * 12
    assert all(result.points == {DEFAULT: None} for result in results.values())
    rows = score_rows([{"protocols": protocols_report(results, seed=0)}], "0.5")
    assert rows[0][1:] == ["whole", "patches"]
    assert rows[1] == ["threshold (no val to choose one on)", "0.5", "0.5"]
    assert set(draw_all(results, [], splits["test"], title="", rule="0.5"))


@pytest.mark.parametrize(("split", "images"), [("test", 3 + 12), ("val", 3)])
def test_every_image_is_predicted_once(
    split: str, images: int, predictor: Predictor, splits: dict[str, Source]
) -> None:
    Darkness.calls = 0
    evaluate_protocol(predictor, "whole", splits[split], splits["val"])
    assert Darkness.calls == images


def test_on_val_the_chosen_threshold_is_the_best(
    predictor: Predictor, splits: dict[str, Source]
) -> None:
    result = evaluate_protocol(predictor, "sliding", splits["val"], splits["val"])
    scores = [result.counts.scores(point)["change_iou"] for point in (DEFAULT, BY_VAL)]
    assert scores[1] >= scores[0]


def test_the_worst_come_first(predictor: Predictor, splits: dict[str, Source]) -> None:
    result = evaluate_protocol(predictor, "whole", splits["test"], splits["val"])
    wrong = [image.pixels(DEFAULT).wrong for image in result.counts.images]
    assert [wrong[number] for number, _ in result.worst] == sorted(wrong, reverse=True)[:10]


@pytest.fixture
def rows(predictor: Predictor, splits: dict[str, Source]) -> Iterator[list[dict[str, Any]]]:
    yield measure_robustness(predictor, splits["test"], max_pairs=5)


def test_every_curve_holds_the_uncorrupted_pairs(
    rows: list[dict[str, Any]], predictor: Predictor, splits: dict[str, Source]
) -> None:
    assert [(row["corruption"], row["level"]) for row in rows] == [
        (name, level) for name, found in CORRUPTIONS.items() for level in found.levels
    ]
    clean = [row for row in rows if row["level"] == CORRUPTIONS[row["corruption"]].neutral]
    assert len(clean) == len(CORRUPTIONS)
    assert len({row["change_iou"] for row in clean}) == 1
    everything = measure_robustness(predictor, splits["test"], max_pairs=0)
    result = evaluate_protocol(predictor, "patches", splits["test"], splits["val"])
    assert everything[0]["change_iou"] == result.counts.scores(DEFAULT)["change_iou"]
    assert everything[0]["pairs"] == 12 and rows[0]["pairs"] == 5


def test_pixels_from_outside_the_frame_are_not_counted(rows: list[dict[str, Any]]) -> None:
    counted = {(row["corruption"], row["level"]): row["pixels"] for row in rows}
    for pixels in (0, 1, 2, 4, 8):
        assert counted["shift", pixels] == 5 * 32 * (32 - pixels)
    assert counted["rotation", 4] <= counted["rotation", 1] < counted["rotation", 0]
    assert counted["jpeg", 10] == counted["blur", 4] == 5 * 32 * 32


def test_a_model_that_looks_at_brightness_loses_by_it(rows: list[dict[str, Any]]) -> None:
    by_level = {r["level"]: r["objects_predicted"] for r in rows if r["corruption"] == "brightness"}
    recall = {r["level"]: r["change_recall"] for r in rows if r["corruption"] == "brightness"}
    assert recall[0.6] > recall[1] > recall[1.6]
    assert set(by_level) == set(CORRUPTIONS["brightness"].levels)
    assert all(0 <= r["change_iou_low"] <= r["change_iou"] <= r["change_iou_high"] for r in rows)


def test_a_shift_of_the_later_date_moves_the_prediction_not_the_truth(
    predictor: Predictor, tmp_path: Path
) -> None:
    """A perfect model of one image: shifted by d of 32 columns it errs by known counts."""
    import numpy as np
    from PIL import Image

    tree = save_tree(tmp_path / "one", train=1, val=1)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 8:16] = 255
    for folder, image in (("label", mask), ("B", np.repeat(255 - mask[..., None], 3, 2))):
        Image.fromarray(image).save(tree / "val" / folder / "val_0.png")
    rows = measure_robustness(predictor, open_dataset(tree).source, max_pairs=0)
    iou = {row["level"]: row["change_iou"] for row in rows if row["corruption"] == "shift"}
    assert iou == {d: pytest.approx((8 - d) / (8 + d)) for d in (0, 1, 2, 4, 8)}
    assert torch.is_grad_enabled()
