import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import save_tree

from dataset import open_dataset
from metrics import Confusion, ScoreHistogram
from pairs.sources import Source
from runtime.figures import save_figure
from scoring.corruptions import CORRUPTIONS
from scoring.counts import STEPS, Prediction, SplitCounts, add_to_histogram, count_image
from scoring.evaluation import BY_VAL, DEFAULT, ProtocolResult
from scoring.figures import draw_all, plot_calibration, plot_precision_recall, plot_worst


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_dataset(save_tree(tmp_path / "set", train=1, val=3)).source


def result_of(source: Source, logits: torch.Tensor | None = None) -> ProtocolResult:
    """Of random logits (3, 1, 32, 32), or given ones."""
    if logits is None:
        logits = 3 * torch.randn(len(source), 1, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Prediction.of_logits(logits, "change")
    arrays = zip(batch.change, batch.change_classes, batch.classes, strict=True)
    predictions = [Prediction(*of_image) for of_image in arrays]
    points = {DEFAULT: None, BY_VAL: 0.25}
    empty, histogram, images = functools.partial(Confusion, 1), ScoreHistogram(num_bins=STEPS), []
    for i, prediction in enumerate(predictions):
        name, truth = f"a/very/long/name/of/a/scene_{i}", source.channels(i)[6:].numpy()
        add_to_histogram(histogram, prediction, truth)
        images.append(count_image(name, prediction, truth, points=points, empty=empty))
    counts = SplitCounts(images, histogram, empty)
    return ProtocolResult("in words", points, counts, True, list(enumerate(predictions)))


def test_all_figures_have_the_title_and_can_be_saved(source: Source, tmp_path: Path) -> None:
    result = result_of(source)
    rows = [
        {"corruption": name, "level": level, "pairs": 3, "change_iou": 0.5, "change_iou_low": 0.4,
         "change_iou_high": 0.6, "change_precision": 0.7, "change_recall": 0.6}
        for name, corruption in CORRUPTIONS.items()
        for level in corruption.levels
    ]  # fmt: skip
    figures = draw_all(
        {"patches": result, "whole": result}, rows, source, title="run on val", rule="0.5"
    )
    assert set(figures) == {
        "precision_recall", "calibration", "worst_pairs", "confusion_default", "confusion_val",
        "robustness",
    }  # fmt: skip
    for name, figure in figures.items():
        assert figure.get_suptitle().startswith("run on val")
        save_figure(figure, tmp_path / f"{name}.png")
    assert "threshold 0.25000, chosen on val" in figures["confusion_val"].get_suptitle()
    assert "patches of 3 pairs, threshold 0.5" in figures["robustness"].get_suptitle()
    without = draw_all({"whole": result}, [], source, title="t", rule="argmax")
    assert "robustness" not in without
    assert "whole, argmax" in without["confusion_default"].get_suptitle()


def test_the_marks_lie_on_the_curve(source: Source) -> None:
    result = result_of(source)
    curve, sweep = plot_precision_recall({"patches": result}, "t").axes
    precision, recall = (x.numpy() for x in result.counts.histogram.precision_recall())
    marks = {
        line.get_marker(): (*np.ravel(line.get_xdata()), *np.ravel(line.get_ydata()))
        for line in curve.lines
        if line.get_marker() in ("o", "D") and np.size(line.get_xdata())
    }
    assert marks["o"] == pytest.approx((recall[STEPS // 2], precision[STEPS // 2]))
    assert marks["D"] == pytest.approx((recall[STEPS // 4], precision[STEPS // 4]))
    iou = result.counts.scores(BY_VAL)["change_iou"]
    mark = next(line for line in sweep.lines if line.get_marker() == "D")
    assert (*np.ravel(mark.get_xdata()), *np.ravel(mark.get_ydata())) == pytest.approx((0.25, iou))


def test_predictions_of_one_value_are_drawn_too(source: Source, tmp_path: Path) -> None:
    for value in (-50.0, 0.0, 50.0):
        result = result_of(source, torch.full((len(source), 1, 32, 32), value))
        save_figure(plot_calibration({"whole": result}, "t"), tmp_path / "c.png")
        save_figure(plot_precision_recall({"whole": result}, "t"), tmp_path / "p.png")


def test_the_worst_pairs_carry_their_names(source: Source) -> None:
    figure = plot_worst(result_of(source), source, "t")
    assert len(figure.axes) == 3 * 5
    wrong = int(result_of(source).counts.images[0].pixels(DEFAULT).wrong)
    label = figure.axes[0].get_ylabel()
    assert source.pairs[0].name in label and f"{wrong} px wrong" in label
