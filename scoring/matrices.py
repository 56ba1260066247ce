"""Figures of confusion matrices, and of which class became which."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray
from torch import Tensor

from visualize import Picture


def plot_confusion(matrix: Tensor, names: Sequence[str]) -> Picture:
    """Draw a confusion matrix: shares of each row, that is of what the truth holds, and pixels.

    Args:
        matrix: (C, C) counts, rows = truth, columns = prediction.
        names: of the C classes.
    """
    figure, (axis,) = _figure(1, len(names))
    counts = matrix.numpy().astype(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    _draw(axis, shares, counts, names)
    axis.set_title("share of each true class, and pixels", fontsize=10)
    axis.set_ylabel("truth")
    axis.set_xlabel("prediction")
    return figure


def plot_transitions(transitions: Tensor, names: Sequence[str]) -> Picture:
    """Draw which class of land cover became which, in truth and as predicted.

    Args:
        transitions: (3, C, C) counts of `SemanticConfusion`; class 0, "unchanged", is left out.
        names: of the C classes.
    """
    figure, axes = _figure(2, len(names) - 1)
    for axis, title, table in zip(axes, ("truth", "prediction"), transitions, strict=False):
        counts = table.numpy()[1:, 1:].astype(float)
        _draw(axis, counts / max(counts.sum(), 1), counts, names[1:])
        axis.set_title(f"{title}: share of all changed pixels, and pixels", fontsize=10)
        axis.set_ylabel("before")
        axis.set_xlabel("after")
    return figure


def _figure(num_axes: int, num_classes: int) -> tuple[Picture, list[Axes]]:
    side = 1.8 + 0.75 * num_classes
    figure = Picture(figsize=(num_axes * side, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_axes, squeeze=False)[0])


def _draw(
    axis: Axes, shares: NDArray[np.floating], counts: NDArray[np.floating], names: Sequence[str]
) -> None:
    top = 1.0 if shares.max() > 0.5 else float(shares.max()) or 1.0
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=top)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) > 15:  # no room for numbers
        return
    for (row, column), share in np.ndenumerate(shares):
        if count := float(counts[row, column]):
            axis.text(
                column, row, f"{share:.1%}\n{_short(count)}", fontsize=7,
                ha="center", va="center", color="white" if share > top / 2 else "black",
            )  # fmt: skip


def _short(count: float) -> str:
    """1234567 -> 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"
