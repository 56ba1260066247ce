"""Pictures of predictions: before, after, truth, prediction, and where they differ.

    TP (hit) white, FP (false alarm) red, FN (miss) blue, a wrong class of change yellow, no change
    in both black; told apart by every kind of colour vision, and named in the legend.

Names of classes and files are text of strangers: `plain_text` makes them safe to draw.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataset import ChangeDataset
from metrics import Confusion, predict_classes
from model import SiameseUNet
from networks.fusion import CrossAttention
from pairs.images import IGNORE
from pairs.labels import LabelEncoding
from runtime.figures import Picture, plain_text, plain_title, save_figure

log = logging.getLogger("visualize")

# no change, change (binary) or the classes of a multi-class run; Okabe and Ito's colours
PALETTE = np.array(
    [[0, 0, 0], [255, 255, 255], [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66],
     [213, 94, 0], [204, 121, 167], [0, 114, 178]], dtype=np.uint8
)  # fmt: skip
IGNORED = np.array([96, 96, 96], dtype=np.uint8)
TP, FP, FN = (255, 255, 255), (230, 40, 40), (60, 130, 255)
WRONG_CLASS = (240, 228, 66)
LEGEND = {"hit": TP, "false alarm": FP, "miss": FN, "no change, rightly": (0, 0, 0)}
COLUMNS = {
    "change": ("before", "after", "truth", "prediction", "errors"),
    "semantic": ("before", "after", "truth, before", "truth, after", "prediction, before",
                 "prediction, after", "errors"),
}  # fmt: skip


def plot_predictions(
    model: nn.Module,
    val_dataset: ChangeDataset,
    device: str | torch.device = "cuda",
    num_samples: int = 10,
    *,
    path: str | Path | None = "results.png",
    title: str | None = None,
) -> Figure:
    """Draw the model's predictions on patches of a split, and save them.

    Of semantic change, the classes of both dates are drawn.

    Four in five patches show change, as far as there are some among those looked at, which are
    spread evenly over the split; the rest have none, where false alarms show.

    Args:
        model: `(before, after) -> logits`; its mode and device are as before afterwards.
        val_dataset: yields (before, after, mask), uint8; knows its classes.
        device: where to predict; the CPU, with a word, where there is no CUDA.
        num_samples: rows of the picture; fewer if the split is smaller.
        path: where to save; None saves nothing.
        title: over the picture.

    Returns:
        The figure, which a notebook shows by itself.

    Raises:
        ValueError: `num_samples` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; give at least 1")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        log.warning("no CUDA here: predicting on the CPU")
        device = torch.device("cpu")
    samples = [val_dataset[i] for i in pick_samples(val_dataset, num_samples)]
    encoding = val_dataset.source.encoding
    figure = prediction_grid(
        samples, predict_samples(model, samples, device), encoding, title=title
    )
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def pick_samples(dataset: ChangeDataset, num_samples: int) -> list[int]:
    """Choose patches to show: four in five with change, spread evenly, in the split's order."""
    candidates = np.random.default_rng(0).permutation(len(dataset))
    num_changed = -(-num_samples * 4 // 5)
    changed: list[int] = []
    unchanged: list[int] = []
    for index in candidates[: 20 * num_samples]:  # a split without change must not be read whole
        mask = dataset[int(index)][2]
        has_change = bool(((mask > 0) & (mask != IGNORE)).any())
        (changed if has_change else unchanged).append(int(index))
        if len(changed) >= num_changed and len(changed) + len(unchanged) >= num_samples:
            break
    chosen = changed[: max(num_changed, num_samples - len(unchanged))]
    return sorted(chosen + unchanged[: num_samples - len(chosen)])


def prediction_grid(
    samples: Sequence[tuple[Tensor, Tensor, Tensor]],
    predictions: Sequence[Tensor],
    encoding: LabelEncoding,
    *,
    title: str | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Draw one row per sample.

    Args:
        samples: (before, after, mask): uint8 (3, H, W), (3, H, W), (H, W) with 255 = ignore, or
            (2, H, W) of semantic change.
        predictions: class indices, one per sample, in the shape of its mask.
        encoding: names and perhaps colours of the classes.
        title: over the picture.
        names: of the rows, at their left.
    """
    columns = COLUMNS["semantic" if samples[0][2].ndim == 3 else "change"]
    colors = palette(encoding)
    rows, side = len(samples), 2.1
    title = plain_title(title or "")
    height = rows * (side + 0.18) + 1.0 + 0.17 * title.count("\n")
    figure = Picture(figsize=(len(columns) * side + 0.4, height), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row, (sample, prediction) in enumerate(zip(samples, predictions, strict=True)):
        before, after, mask = sample
        truth, predicted = (x.reshape(-1, *x.shape[-2:]).cpu().numpy() for x in (mask, prediction))
        pictures = (
            before.cpu().numpy().transpose(1, 2, 0),
            after.cpu().numpy().transpose(1, 2, 0),
            *(color_classes(classes, colors) for classes in (*truth, *predicted)),
            color_errors(truth, predicted),
        )
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, -1].set_title(_row_score(truth, predicted), fontsize=9, pad=3)
    for axis, name in zip(axes[:, 0], names or (), strict=bool(names)):
        axis.set_ylabel(plain_title(name), fontsize=7)
    for axis, name in zip(axes[0, :-1], columns[:-1], strict=True):
        axis.set_title(name, fontsize=10, pad=3)
    num_legends = _draw_legends(figure, encoding, height)
    if title:
        figure.suptitle(title, fontsize=11, y=1 - 0.1 / height, va="top")
    figure.subplots_adjust(
        left=0.04 if names else 0.01,
        right=0.99,
        top=1 - (0.55 + 0.17 * title.count("\n")) / height,
        bottom=(0.2 + 0.25 * num_legends) / height,
        wspace=0.03,
        hspace=0.12,
    )
    return figure


def _draw_legends(figure: Figure, encoding: LabelEncoding, height: float) -> int:
    """Name the colours of errors and, if there are several, of classes; return how many lines."""
    is_multi_class = len(encoding.values) > 2
    legends = [list(LEGEND.items())]
    if is_multi_class:
        legends[0].append(("wrong class", WRONG_CLASS))
        names = [plain_text(name, 24) for name in encoding.names]
        legends.append(list(zip(names, map(tuple, palette(encoding).tolist()), strict=True)))
    for line, legend in enumerate(legends):
        handles = [
            Patch(facecolor=(r / 255, g / 255, b / 255), edgecolor="grey", label=name)
            for name, (r, g, b) in legend
        ]
        anchor = (0.5, 0.25 * line / height)
        options: dict[str, Any] = {"ncols": len(handles), "fontsize": 9, "frameon": False}
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=anchor, **options)
    return len(legends)


def palette(encoding: LabelEncoding) -> NDArray[np.uint8]:
    """Return a colour (C, 3) for each class: the label files' own, or `PALETTE` over again."""
    if encoding.colors is not None:
        return np.array(encoding.colors, dtype=np.uint8)
    numbers = np.arange(len(encoding.values))
    return PALETTE[np.where(numbers == 0, 0, 1 + (numbers - 1) % (len(PALETTE) - 1))]


def color_classes(
    classes: NDArray[np.integer], colors: NDArray[np.uint8] = PALETTE
) -> NDArray[np.uint8]:
    """Paint class indices (H, W) as (H, W, 3); ignored pixels are grey."""
    painted = colors[np.minimum(classes, len(colors) - 1)]
    painted[classes == IGNORE] = IGNORED
    return painted


def color_errors(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Paint TP, FP, FN and wrong classes of (L, H, W) as (H, W, 3).

    A class is right if it is so in all of the L label maps, of which semantic change has two.
    """
    is_change, is_predicted = truth[0] > 0, predicted[0] > 0
    is_right = (truth == predicted).all(axis=0)
    painted = np.zeros((*truth.shape[1:], 3), dtype=np.uint8)
    painted[is_change & is_right] = TP
    painted[is_change & is_predicted & ~is_right] = WRONG_CLASS
    painted[is_change & ~is_predicted] = FN
    painted[~is_change & is_predicted] = FP
    painted[truth[0] == IGNORE] = IGNORED
    return painted


def error_overlay(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Paint as `color_errors`, (H, W, 4): clear where both see no change, grey where ignored."""
    painted = color_errors(truth, predicted)
    alpha = np.where(painted.any(axis=-1), 255, 0)
    alpha[truth[0] == IGNORE] = 160
    return np.dstack([painted, alpha]).astype(np.uint8)


@torch.no_grad()
def predict_samples(
    model: nn.Module, samples: Sequence[tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> list[Tensor]:
    """Predict one sample at a time: they may differ in size, and few are drawn."""
    was_training, home = model.training, next(model.parameters()).device
    model.to(device).eval()
    try:
        logits = [model(b.to(device)[None], a.to(device)[None]) for b, a, _ in samples]
        task = getattr(model, "task", "change")
        return [predict_classes(x, task=task)[0].cpu() for x in logits]
    finally:
        model.to(home).train(was_training)


def _row_score(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> str:
    """Say how good one patch is: its change IoU, or the false alarms where nothing changed."""
    confusion = Confusion(1)
    is_change = np.where(truth[:1] == IGNORE, IGNORE, truth[:1] > 0)
    confusion.add(torch.from_numpy(predicted[:1] > 0), torch.from_numpy(is_change))
    if not (is_change == 1).any():
        return f"no change, {int(confusion.matrix[0, 1:].sum())} px predicted"
    return f"errors: IoU {confusion.scores()['change_iou']:.2f}"


def plot_confusion(matrix: Tensor, names: Sequence[str]) -> Picture:
    """Draw a confusion matrix: shares of each row, that is of what the truth holds, and pixels.

    Args:
        matrix: (C, C) counts, rows = truth, columns = prediction.
        names: of the C classes.
    """
    figure, (axis,) = _matrix_axes(1, len(names))
    counts = matrix.numpy().astype(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    _draw_matrix(axis, shares, counts, names)
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
    figure, axes = _matrix_axes(2, len(names) - 1)
    for axis, title, table in zip(axes, ("truth", "prediction"), transitions, strict=False):
        counts = table.numpy()[1:, 1:].astype(float)
        _draw_matrix(axis, counts / max(counts.sum(), 1), counts, names[1:])
        axis.set_title(f"{title}: share of all changed pixels, and pixels", fontsize=10)
        axis.set_ylabel("before")
        axis.set_xlabel("after")
    return figure


def _matrix_axes(num_axes: int, num_classes: int) -> tuple[Picture, list[Axes]]:
    side = 1.8 + 0.75 * num_classes
    figure = Picture(figsize=(num_axes * side, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_axes, squeeze=False)[0])


def _draw_matrix(
    axis: Axes, shares: NDArray[np.floating], counts: NDArray[np.floating], names: Sequence[str]
) -> None:
    top = 1.0 if shares.max() > 0.5 else float(shares.max()) or 1.0
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=top)
    names = [plain_text(name, 24) for name in names]
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


def plot_attention(
    model: SiameseUNet, before: Tensor, after: Tensor, row: int, column: int
) -> Picture:
    """Draw where a pixel of `before` looks in `after`, at each scale that attends.

    Args:
        model: with `cross_attention` as its fusion; its mode is as before afterwards.
        before: (3, H, W) uint8.
        after: the same.
        row: of the pixel, below H.
        column: of the pixel, below W.

    Raises:
        ValueError: the model does not attend.
    """
    seen = attention_maps(model, before, after, row, column)
    if not seen:
        raise ValueError("no scale of this model attends; train with --fusion cross_attention")
    figure = Picture(figsize=(3 * (1 + len(seen)), 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, 1 + len(seen))
    first.imshow(before.cpu().permute(1, 2, 0).numpy())
    first.set_title("before, and a place in it", fontsize=10)
    for axis, (stride, weights) in zip(others, seen.items(), strict=True):
        axis.imshow(after.cpu().permute(1, 2, 0).numpy())
        axis.imshow(weights.numpy(), cmap="inferno", alpha=0.6)
        axis.set_title(f"where it looks after, 1/{stride}", fontsize=10)
    for axis in (first, *others):
        axis.plot(column, row, "+", color="cyan", markersize=12, markeredgewidth=2)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


@torch.no_grad()
def attention_maps(
    model: SiameseUNet, before: Tensor, after: Tensor, row: int, column: int
) -> dict[int, Tensor]:
    """Return, by stride, the weights (H, W) float32 of what `plot_attention` draws.

    Every map is the mean over its heads, and its largest value is 1.
    """
    maps: dict[int, Tensor] = {}
    size = before.shape[-2:]

    def watch(stride: int) -> Any:
        def look(attention: CrossAttention, dates: tuple[Tensor, Tensor]) -> None:
            weights = attention.look(*dates, row // stride, column // stride)
            # a map may be a little larger than the image, whose sides were rounded up
            large = F.interpolate(weights[None], scale_factor=stride, mode="nearest")[0, 0]
            maps[stride] = (large / large.max())[: size[0], : size[1]].cpu()

        return look

    hooks = [
        module.register_forward_pre_hook(watch(stride // model.upsample))
        for fusion, stride in zip(model.fusions, model.encoder.strides, strict=True)
        for module in fusion.modules()
        if isinstance(module, CrossAttention)
    ]
    was_training, device = model.training, next(model.parameters()).device
    try:
        model.eval()(before[None].to(device), after[None].to(device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return maps
