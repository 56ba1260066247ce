"""Figures of matrices: every count stands where it belongs."""

import io
import warnings

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from visualize import plot_confusion, plot_transitions

NAMES = ("no change", "road", "building")


def texts(figure: Figure, axis: int = 0) -> dict[tuple[int, int], str]:
    """Return the numbers by (row, column)."""
    found = figure.axes[axis].texts
    return {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in found}


def test_rows_are_shares_of_the_truth() -> None:
    figure = plot_confusion(torch.tensor([[75, 25, 0], [0, 0, 0], [500, 0, 1500]]), NAMES)
    assert texts(figure) == {
        (0, 0): "75.0%\n75", (0, 1): "25.0%\n25", (2, 0): "25.0%\n500", (2, 2): "75.0%\n1.5k",
    }  # fmt: skip
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == list(NAMES)


def test_transitions_leave_the_unchanged_out() -> None:
    tables = torch.zeros(3, 3, 3, dtype=torch.int64)
    tables[0, 0, 0], tables[0, 1, 2], tables[0, 2, 1] = 1000, 30, 10
    tables[1, 1, 2] = 2_000_000
    figure = plot_transitions(tables, NAMES)
    assert texts(figure, 0) == {(0, 1): "75.0%\n30", (1, 0): "25.0%\n10"}
    assert texts(figure, 1) == {(0, 1): "100.0%\n2.0M"}


def test_empty_and_large_ones_can_be_saved() -> None:
    for size in (2, 16):
        names = [f"class {k}" for k in range(size)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for figure in (
                plot_confusion(torch.zeros(size, size, dtype=torch.int64), names),
                plot_transitions(torch.zeros(3, size, size, dtype=torch.int64), names),
            ):
                figure.savefig(content := io.BytesIO(), format="png")
                assert np.asarray(Image.open(content)).std() > 0
