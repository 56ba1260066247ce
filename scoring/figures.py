"""Figures of an evaluation: precision and recall, calibration, confusion, worst pairs, robustness.

Every title names the split and how many pairs it has; every legend the protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from metrics import SemanticConfusion
from pairs.sources import Source
from runtime.figures import Picture, plain_title
from runtime.page import image_uri
from scoring.corruptions import CORRUPTIONS, LOSSLESS
from scoring.counts import CALIBRATION_BINS, STEPS
from scoring.evaluation import BY_VAL, DEFAULT, ROBUSTNESS_PROTOCOL, ProtocolResult
from visualize import (
    FN,
    FP,
    TP,
    WRONG_CLASS,
    error_overlay,
    plot_confusion,
    plot_transitions,
    prediction_grid,
)

# Okabe and Ito's, which every kind of colour vision tells apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("-", "--", ":")  # lines that lie on each other show through
LARGEST_VIEW = 1024  # pixels of a page's image; ten pairs are a few megabytes
GUIDE = {"color": "0.75", "linewidth": 0.8, "zorder": 0}


def draw_all(
    results: Mapping[str, ProtocolResult],
    robustness: Sequence[Mapping[str, Any]],
    source: Source,
    *,
    title: str,
    rule: str,
) -> dict[str, Figure]:
    """Draw every figure, by name; of one protocol where it takes one: the first.

    Args:
        results: by protocol.
        robustness: rows of `measure_robustness`, or none.
        source: the split.
        title: begins all titles.
        rule: of the model by itself, "0.5" or "argmax".
    """
    protocol, result = next(iter(results.items()))
    own = rule if rule == "argmax" else f"threshold {rule}"
    figures = {
        "precision_recall": plot_precision_recall(results, title),
        "calibration": plot_calibration(results, title),
        "worst_pairs": plot_worst(
            result, source, f"{title}\n{protocol}, {own}: the pairs with the most wrong pixels"
        ),
    }
    for point, threshold in result.points.items():
        how = own if threshold is None else f"threshold {threshold:.5f}, chosen on val"
        confusion = result.counts.confusion(point)
        of_point = {"confusion": plot_confusion(confusion.matrix, confusion.names)}
        if isinstance(confusion, SemanticConfusion):
            of_point["transitions"] = plot_transitions(confusion.transitions, confusion.names)
        for kind, figure in of_point.items():
            width, height = figure.get_size_inches()
            figure.set_size_inches(max(width, 5.2), height + 0.4)  # room for the title
            figure.suptitle(plain_title(f"{title}\n{protocol}, {how}"), fontsize=8)
            figures[f"{kind}_{point}"] = figure
    if robustness:
        num = robustness[0]["pairs"]
        how = f"later date corrupted; {ROBUSTNESS_PROTOCOL} of {num} pairs, {own}"
        figures["robustness"] = plot_robustness(robustness, f"{title}\n{how}")
    return figures


def plot_precision_recall(results: Mapping[str, ProtocolResult], title: str) -> Figure:
    """Draw precision over recall, and the change IoU at every threshold.

    A dot marks threshold 0.5, a diamond the threshold of val. Grey lines join points of equal Dice.
    """
    figure = _figure(11, 5, title)
    curve, sweep = figure.subplots(1, 2)
    recall = np.linspace(0.01, 1, 200)
    for dice in (0.2, 0.4, 0.6, 0.8, 0.9):
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = dice * recall / (2 * recall - dice)
        inside = (precision > 0) & (precision <= 1)
        curve.plot(recall[inside], precision[inside], **GUIDE)
        curve.annotate(
            f"Dice {dice}", (1, dice / (2 - dice)), xytext=(-3, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=7, color="0.4",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip
    thresholds = np.arange(STEPS) / STEPS
    has_val = False
    for k, (protocol, result) in enumerate(results.items()):
        look = {"color": COLORS[k], "linestyle": STYLES[k], "linewidth": 1.8}
        histogram = result.counts.histogram
        precision, recall = (x.numpy() for x in histogram.precision_recall())
        tp, fp, _ = histogram.at_thresholds()
        is_defined = (tp + fp > 0).numpy()  # somewhere change is predicted
        area = histogram.average_precision()
        curve.plot(recall[is_defined], precision[is_defined], **look,
                   label=f"{protocol}, average precision {area:.3f}")  # fmt: skip
        iou = histogram.change_iou().numpy()
        sweep.plot(thresholds, iou, **look)
        chosen = result.points.get(BY_VAL)
        has_val = has_val or chosen is not None
        for threshold, marker in ((0.5, "o"), (chosen, "D")):
            if threshold is None:
                continue
            i = round(threshold * STEPS)
            for axis, x, y in ((curve, recall[i], precision[i]), (sweep, threshold, iou[i])):
                axis.plot(x, y, marker, color=COLORS[k], markersize=6, markeredgecolor="white")
    for marker, name in (("o", "threshold 0.5"), ("D", "threshold chosen on val"))[: 1 + has_val]:
        curve.plot([], [], marker, color="0.4", markeredgecolor="white", label=name)
    curve.set(xlabel="recall of the change class", ylabel="precision of the change class",
              xlim=(0, 1.01), ylim=(0, 1.01), aspect="equal")  # fmt: skip
    sweep.set(xlabel="threshold on the probability of change", ylabel="IoU of the change class",
              xlim=(0, 1), ylim=(0, 1.01))  # fmt: skip
    sweep.grid(**GUIDE)
    _legend_below(figure, curve)
    return figure


def plot_calibration(results: Mapping[str, ProtocolResult], title: str) -> Figure:
    """Draw how often pixels of each predicted probability did change, and how many there are."""
    figure = _figure(6, 6.5, title)
    reliability, amounts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    reliability.plot([0, 1], [0, 1], **{**GUIDE, "color": "0.5"}, label="perfectly calibrated")
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    for k, (protocol, result) in enumerate(results.items()):
        found = result.counts.calibration()
        look = {"color": COLORS[k], "linestyle": STYLES[k]}
        reliability.plot(found.predicted, found.observed, marker="o", markersize=4, **look,
                         label=f"{protocol}, expected error {found.error:.4f}")  # fmt: skip
        amounts.stairs(found.pixels / found.pixels.sum(), edges, **look)
    reliability.set(ylabel="share of pixels that changed", xlim=(0, 1), ylim=(0, 1.01))
    reliability.grid(**GUIDE)
    amounts.set(xlabel="predicted probability of change", ylabel="share of all pixels",
                yscale="log")  # fmt: skip
    # whole decades, so that there is more than one label
    amounts.set_ylim(10 ** np.floor(np.log10(amounts.get_ylim()[0])), 1)
    amounts.yaxis.set_minor_formatter(NullFormatter())
    amounts.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    amounts.grid(**GUIDE)
    _legend_below(figure, reliability, columns=2)
    return figure


def plot_worst(result: ProtocolResult, source: Source, title: str) -> Figure:
    """Draw the pairs with the most wrong pixels, the worst first."""
    samples, predictions, names = [], [], []
    for number, prediction in result.worst:
        channels = source.channels(number)
        samples.append((channels[:3], channels[3:6], channels[6:].squeeze(0)))
        predictions.append(torch.from_numpy(prediction.classes))
        wrong = result.counts.images[number].pixels(DEFAULT).wrong
        names.append(f"{_end(source.pairs[number].name)}\n{_amount(wrong)} px wrong")
    return prediction_grid(samples, predictions, source.encoding, title=title, names=names)


def worst_views(result: ProtocolResult, source: Source) -> list[dict[str, Any]]:
    """Return the pairs with the most wrong pixels, the worst first, as `runtime.page` has views."""
    colors = {"TP": TP, "FP (false alarm)": FP, "FN (miss)": FN}
    if len(source.encoding.values) > 2:
        colors["wrong class"] = WRONG_CLASS
    legend = [[label, "rgb({}, {}, {})".format(*color)] for label, color in colors.items()]
    views = []
    for number, prediction in result.worst:
        channels = source.channels(number).numpy()
        pixels = result.counts.images[number].pixels(DEFAULT)
        height, width = channels.shape[1:]
        step = -(-max(height, width) // LARGEST_VIEW)
        images = {
            "before": channels[:3].transpose(1, 2, 0),
            "after": channels[3:6].transpose(1, 2, 0),
            "overlay": error_overlay(channels[6:], prediction.classes),
        }
        views.append(
            {
                "name": source.pairs[number].name,
                "note": f"{pixels.wrong} of {width} x {height} pixels wrong: {pixels.fp} FP, "
                f"{pixels.fn} FN, {pixels.wrong_class} of a wrong class; {pixels.tp} TP",
                "width": -(-width // step),
                "height": -(-height // step),
                "legend": legend,
                **{
                    name: image_uri(np.asarray(Image.fromarray(image).reduce(step)))
                    for name, image in images.items()
                },
            }
        )
    return views


def plot_robustness(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the scores over the level of each corruption; the band is the IoU's 95 % interval."""
    figure = _figure(11, 6.4, title)
    axes = figure.subplots(2, 3, sharey=True)
    lines = {"change_iou": "IoU", "change_precision": "precision", "change_recall": "recall"}
    for axis, (name, corruption) in zip(axes.flat, CORRUPTIONS.items(), strict=True):
        of_name = [row for row in rows if row["corruption"] == name]
        places = range(len(of_name))
        for k, (score, label) in enumerate(lines.items()):
            values = [row[score] for row in of_name]
            axis.plot(places, values, STYLES[k], marker="o", markersize=4, color=COLORS[k],
                      linewidth=1.8 if k == 0 else 1.2, label=label)  # fmt: skip
        low, high = ([row[f"change_iou_{end}"] for row in of_name] for end in ("low", "high"))
        axis.fill_between(places, low, high, color=COLORS[0], alpha=0.15, linewidth=0)
        axis.axvline(corruption.levels.index(corruption.neutral), **GUIDE)
        ticks = ["none" if row["level"] == LOSSLESS else f"{row['level']:g}" for row in of_name]
        axis.set_xticks(places, ticks)
        axis.set(xlabel=corruption.label, ylim=(0, 1.01))
        axis.grid(axis="y", **GUIDE)
    for axis in axes[:, 0]:
        axis.set_ylabel("score of the change class")
    axes[0, 0].fill_between([], [], color=COLORS[0], alpha=0.15, label="95 % interval of the IoU")
    _legend_below(figure, axes[0, 0])
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Picture(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain_title(title), fontsize=10)
    return figure


def _legend_below(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """Put the legend of one of the plots under all of them, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _amount(pixels: int) -> str:
    """Return a count in few characters: 950, 12.3 k, 4.56 M."""
    if pixels < 10_000:
        return str(pixels)
    return f"{pixels / 1e3:.1f} k" if pixels < 1_000_000 else f"{pixels / 1e6:.2f} M"


def _end(name: str, length: int = 26) -> str:
    """Return the end of a long name, which tells crops of a scene apart."""
    return name if len(name) <= length else f"...{name[3 - length :]}"
