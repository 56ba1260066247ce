"""Prediction over a scene of any size: overlapping windows, blended without seams.

    scene       (3, H, W), two dates         read in strips of rows, as wide as the scene
    windows     (B, 3, h, w)                 of one strip, h = min(window, H), w = min(window, W);
                                             processes may share them
    logits      (B, C, h, w)                 times the window's weights, added up
    bands       (C, n, W) float32            rows that no later window touches, top to bottom

Memory is that of two strips, their sums and one batch, so it grows with the scene's width alone.
The weights are products of one Hann profile per axis, divided by their sum over all windows: they
add up to 1 at every pixel, also at the scene's edges, and each window counts least where it has
seen least around a pixel. Logits are blended, not probabilities, so every function of `metrics`
takes the result; nnU-Net (doi:10.1038/s41592-020-01008-z) and MONAI's sliding window blend the
same way with a Gaussian.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from networks.fused import prediction_copy
from runtime.devices import Precision, pick_precision
from runtime.distributed import agree, all_reduce_, share

WINDOW = 512
OVERLAP = 128
BATCH_SIZE = 4

# (top, bottom) -> the rows of both dates, (3, bottom - top, W), uint8 or float in [0, 1]
ReadRows = Callable[[int, int], tuple[Tensor, Tensor]]
Image = Tensor | NDArray[np.uint8] | NDArray[np.float32]


def predict_logits(
    model: nn.Module,
    before: Image,
    after: Image,
    **options: Any,
) -> Tensor:
    """Return the blended logits (C, H, W) of a scene in memory, float32 on the CPU.

    `logits[None]` is what the functions of `metrics` take: `predict_classes`, a confusion's
    `update`.

    Args:
        model: `(before, after) -> logits`; it computes where it is, in eval mode, and is left in
            the mode that it was in.
        before: (H, W, 3) or (3, H, W), uint8 or float32 in [0, 1].
        after: the same shape and dtype.
        options: window, overlap, batch_size, flips and amp of `predict_bands`.

    Raises:
        ValueError: the dates do not match, or the overlap is not smaller than the window.
    """
    before, after = channels_first(before), channels_first(after)
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(
            f"before is {tuple(before.shape)} {before.dtype}, after {tuple(after.shape)} "
            f"{after.dtype}; give both alike"
        )
    bands = predict_bands(
        model,
        lambda top, bottom: (before[:, top:bottom], after[:, top:bottom]),
        *before.shape[1:],
        **options,
    )
    return torch.cat([logits.cpu() for _, logits in bands], dim=1)


def predict_bands(
    model: nn.Module,
    read_rows: ReadRows,
    height: int,
    width: int,
    *,
    window: int = WINDOW,
    overlap: int = OVERLAP,
    batch_size: int = BATCH_SIZE,
    flips: bool = False,
    amp: str = "auto",
    after_batch: Callable[[float], None] = lambda _: None,
    shared: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Predict a scene that need not fit in memory, band by band from top to bottom.

    Args:
        model: `(before, after) -> logits`; in eval mode until the last band is taken, or the
            generator is closed.
        read_rows: gives rows of both dates; called from top to bottom, with rows that overlap.
        height: H of the scene.
        width: W of the scene.
        window: side of a window, in pixels.
        overlap: of neighbouring windows, in pixels.
        batch_size: windows at once.
        flips: average over each window and its three mirror images, at four times the cost.
        amp: precision: auto, off, bf16 or fp16.
        after_batch: is told which share of this process's windows the batch was.
        shared: processes that torchrun started share the windows of each strip. All have to ask
            for the same scene, and to take as many bands; each gets them whole.

    Yields:
        The band's first row, and its logits (C, n, W), float32 on the model's device; together
        the bands hold every row once.

    Raises:
        ValueError: an empty scene, or an overlap that is not smaller than the window.
    """
    if height < 1 or width < 1:
        raise ValueError(f"the scene is {height} x {width} pixels; give at least 1 x 1")
    if not 0 <= overlap < window:
        raise ValueError(f"overlap {overlap}: give 0 to {window - 1}, less than the window")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    precision = Precision.named(pick_precision(amp, device), device)
    tops, lefts = starts(height, window, overlap), starts(width, window, overlap)
    rows, columns = min(window, height), min(window, width)
    own = share(range(len(lefts))) if shared else range(len(lefts))
    row_weights = blending_weights(height, tops, rows).to(device)
    column_weights = blending_weights(width, lefts, columns).to(device)
    was_training = model.training
    model.eval()
    try:
        sums = torch.empty(0)  # (C, rows, W) from `top` on, of this process's windows
        for i, top in enumerate(tops):
            strips = [strip.to(device) for strip in read_rows(top, top + rows)]
            for first in range(0, len(own), batch_size):
                batch = own[first : first + batch_size]
                places = [slice(lefts[j], lefts[j] + columns) for j in batch]
                before, after = (torch.stack([s[..., place] for place in places]) for s in strips)
                logits = _forward(model, before, after, flips, precision)
                if not len(sums):
                    sums = logits.new_zeros(logits.shape[1], rows, width)
                for j, place, of_window in zip(batch, places, logits, strict=True):
                    weights = row_weights[i, :, None] * column_weights[j]
                    sums[..., place] += of_window * weights
                after_batch(len(batch) / (len(tops) * len(own)))
            if shared and i == 0:  # a process without a window in a narrow scene learns C
                (num_channels,) = agree(len(sums))
                sums = sums if len(sums) else torch.zeros(num_channels, rows, width, device=device)
            num_done = (tops[i + 1] if i + 1 < len(tops) else height) - top
            band = sums[:, :num_done].clone()
            if shared:
                all_reduce_(band)
            yield top, band
            # what is left moves up, and the rows that come into reach start at 0
            sums = torch.cat([sums[:, num_done:], torch.zeros_like(sums[:, :num_done])], dim=1)
    finally:
        model.train(was_training)


def channels_first(image: Image) -> Tensor:
    """Turn an image (H, W, 3) or (3, H, W), uint8 or float32, into a tensor (3, H, W)."""
    if isinstance(image, np.ndarray) and not image.flags.writeable:
        image = image.copy()  # such as Pillow's; PyTorch warns of sharing them
    tensor = torch.as_tensor(image)
    if tensor.ndim != 3 or 3 not in (tensor.shape[0], tensor.shape[-1]):
        raise ValueError(f"an image is {tuple(tensor.shape)}; give (H, W, 3) or (3, H, W)")
    if tensor.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"an image is {tensor.dtype}; give uint8, or float32 in [0, 1]")
    return tensor if tensor.shape[0] == 3 else tensor.movedim(-1, 0)


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Return where windows start along an axis: evenly, the last one flush with the end."""
    last = max(0, length - window)
    return [*range(0, last, window - overlap), last]


def blending_weights(length: int, window_starts: list[int], size: int) -> Tensor:
    """Return the weights of windows along an axis, (windows, size) float32.

    They are positive and add up to 1 at each of the `length` pixels.
    """
    hann = torch.sin(torch.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in window_starts:
        total[start : start + size] += hann
    return torch.stack([hann / total[start : start + size] for start in window_starts]).float()


@torch.no_grad()
def _forward(
    model: nn.Module, before: Tensor, after: Tensor, flips: bool, precision: Precision
) -> Tensor:
    """Return logits (B, C, h, w) float32, of a batch or as the mean over its mirror images."""
    views: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)] if flips else [()]
    total: Tensor | None = None
    for axes in views:
        with precision.autocast(before.device):
            dtype = precision.dtype or torch.float32
            fast = prediction_copy(model, dtype, before, after)
            logits = fast(before.flip(axes), after.flip(axes))
        logits = logits.float().flip(axes)
        total = logits if total is None else total + logits
    assert total is not None
    return total / len(views)
