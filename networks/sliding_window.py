"""Prediction over a scene of any size: overlapping windows, blended without seams.

    scene       (3, H, W), two dates         read in strips of rows, as wide as the scene
    windows     (B, 3, h, w)                 of one strip, h = min(window, H), w = min(window, W);
                                             processes may share them; without data, none
    logits      (B, C, h, w)                 times the window's weights, added up
    bands       (C, n, W) float32            rows that no later window touches, top to bottom

Memory is that of two strips, their sums and one batch, so it grows with the scene's width alone.
The weights are products of one Hann profile per axis, divided by their sum over all windows: they
add up to 1 at every pixel, also at the scene's edges, and each window counts least where it has
seen least around a pixel. Logits are blended, not probabilities, so every function of `metrics`
takes the result; nnU-Net (doi:10.1038/s41592-020-01008-z) and MONAI's sliding window blend the
same way with a Gaussian.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from networks.fused import prediction_copy
from networks.mirrors import Pairs, mean_over_views
from runtime.devices import Precision, pick_precision
from runtime.distributed import agree, all_reduce_, share
from runtime.memory import return_freed_memory

WINDOW = 512
OVERLAP = 128
BATCH_SIZE = 4

# (top, bottom) -> the rows of both dates, (3, bottom - top, W), uint8 or float in [0, 1]
ReadRows = Callable[[int, int], tuple[Tensor, Tensor]]
Image = Tensor | NDArray[np.uint8] | NDArray[np.float32]
StripT = TypeVar("StripT", bound="Strip")


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


@dataclass(frozen=True)
class Windows:
    """Where the windows of a scene lie.

    Raises:
        ValueError: an empty scene, or an overlap that is not smaller than the window.
    """

    height: int
    width: int
    window: int = WINDOW
    overlap: int = OVERLAP

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            size = f"{self.height} x {self.width}"
            raise ValueError(f"the scene is {size} pixels; give at least 1 x 1")
        if not 0 <= self.overlap < self.window:
            raise ValueError(
                f"overlap {self.overlap}: give 0 to {self.window - 1}, less than the window"
            )

    @cached_property
    def tops(self) -> list[int]:
        """First row of each strip."""
        return starts(self.height, self.window, self.overlap)

    @cached_property
    def lefts(self) -> list[int]:
        """First column of each window of a strip."""
        return starts(self.width, self.window, self.overlap)

    @property
    def rows(self) -> int:
        """Height of a strip."""
        return min(self.window, self.height)

    @property
    def columns(self) -> int:
        """Width of a window."""
        return min(self.window, self.width)

    def band(self, number: int) -> tuple[int, int]:
        """Return first row and end of what no strip after this one touches."""
        is_last = number + 1 == len(self.tops)
        return self.tops[number], self.height if is_last else self.tops[number + 1]

    def strips_of(self, bands: range) -> range:
        """Return the strips that bands need: their own, and those above that reach into them."""
        first = self.tops[bands.start]
        reaching = (i for i, top in enumerate(self.tops) if top + self.rows > first)
        return range(min(next(reaching), bands.start), bands.stop)


@dataclass(frozen=True)
class Strip:
    """Rows of a scene, as wide as it is and as high as a window.

    Attributes:
        number: of the strip, from the top.
        pairs: both dates (3, rows, W) of one pair or several, uint8 or float in [0, 1]. Where a
            date is the second of one pair and the first of the next, it is encoded once.
        has_data: (rows, W), of any pair; windows without data are not predicted.
    """

    number: int
    pairs: Sequence[tuple[Tensor, Tensor]]
    has_data: NDArray[np.bool_] | None = None


def predict_bands(
    model: nn.Module,
    read_rows: ReadRows,
    height: int,
    width: int,
    *,
    window: int = WINDOW,
    overlap: int = OVERLAP,
    **options: Any,
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
        options: batch_size, flips, amp, after_batch and shared of `predict_strips`.

    Yields:
        The band's first row, and its logits (C, n, W), float32 on the model's device; together
        the bands hold every row once.

    Raises:
        ValueError: an empty scene, or an overlap that is not smaller than the window.
    """
    windows = Windows(height, width, window, overlap)
    strips = (
        Strip(number, [read_rows(top, top + windows.rows)])
        for number, top in enumerate(windows.tops)
    )
    for strip, (logits,) in predict_strips(model, strips, windows, **options):
        yield windows.tops[strip.number], logits.clone()


def predict_strips(
    model: nn.Module,
    strips: Iterable[StripT],
    windows: Windows,
    *,
    bands: range | None = None,
    batch_size: int = BATCH_SIZE,
    flips: bool = False,
    amp: str = "auto",
    after_batch: Callable[[float], None] = lambda _: None,
    shared: bool = False,
) -> Iterator[tuple[StripT, list[Tensor]]]:
    """Predict pairs of dates of one scene, or some of its bands, from top to bottom.

    Args:
        model: `(before, after) -> logits`; in eval mode until the last band is taken, or the
            generator is closed.
        strips: `windows.strips_of(bands)`, in order.
        windows: of the scene.
        bands: which bands to give; None gives all. Each is what it is among all.
        batch_size: windows at once.
        flips: average over each window and its three mirror images, at four times the cost.
        amp: precision: auto, off, bf16 or fp16.
        after_batch: is told which share of this process's windows the batch was.
        shared: processes that torchrun started share the windows of each strip. All have to ask
            for the same scene, and to take as many bands; each gets them whole.

    Yields:
        The strip, and of each pair the logits (C, n, W) of the band that begins with it, float32
        on the model's device. They are overwritten when the next ones are asked for.
    """
    bands = range(len(windows.tops)) if bands is None else bands
    num_strips = len(windows.strips_of(bands))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    precision = Precision.named(pick_precision(amp, device), device)
    rows, lefts = windows.rows, windows.lefts
    row_weights = blending_weights(windows.height, windows.tops, rows).to(device)
    column_weights = blending_weights(windows.width, lefts, windows.columns).to(device)
    places = [slice(left, left + windows.columns) for left in lefts]
    was_training = model.training
    model.eval()
    try:
        _prepare(model, device, precision)
        # (C, rows, W) of each pair from `top` on, of this process's windows
        sums: list[Tensor] = []
        for strip in strips:
            # of the first strip one window at least, which tells C
            wanted = _with_data(strip, places) or ([] if sums else [0])
            own = share(wanted) if shared else wanted
            moved = _on(device, strip.pairs)
            for first in range(0, len(own), batch_size):
                batch = own[first : first + batch_size]
                logits = _predict_windows(
                    model, moved, [places[j] for j in batch], flips, precision
                )
                if not sums:
                    sums = [x.new_zeros(x.shape[1], rows, windows.width) for x in logits]
                for k, j in enumerate(batch):
                    weights = row_weights[strip.number, :, None] * column_weights[j]
                    for total, of_pair in zip(sums, logits, strict=True):
                        total[..., places[j]] += of_pair[k] * weights
                after_batch(len(batch) / (num_strips * len(own)))
            if not own:
                after_batch(1 / num_strips)
            if shared and strip.number == windows.strips_of(bands).start:
                (channels,) = agree(len(sums[0]) if sums else 0)  # who had no window learns C
                shape = channels, rows, windows.width
                sums = sums or [torch.zeros(shape, device=device) for _ in strip.pairs]
            top, end = windows.band(strip.number)
            if strip.number in bands:
                done = [total[:, : end - top] for total in sums]
                if shared:
                    done = [total.contiguous() for total in done]
                    all_reduce_(*done)
                yield strip, done
            for total in sums:  # what is left moves up; the rows that come into reach start at 0
                left = total[:, end - top :].clone()
                total[:, : left.shape[1]] = left
                total[:, left.shape[1] :] = 0
    finally:
        model.train(was_training)


@torch.no_grad()
def _prepare(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Let a model choose its fast copies on noise.

    They are compared with the model on the first images that it sees. A black window would tell
    nothing, and parts of a scene, which begin elsewhere, could choose otherwise than the whole.
    """
    if hasattr(model, "encode"):
        draw = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (2, 1, 3, 64, 64), generator=draw, dtype=torch.uint8)
        before, after = noise.to(device)
        with precision.autocast(device):
            fast = prediction_copy(model, precision.dtype or torch.float32, before, after)
            fast(before, after)
        return_freed_memory()  # copying and comparing took a hundred megabytes for a moment


def _with_data(strip: Strip, places: Sequence[slice]) -> list[int]:
    """Return the numbers of the windows that hold data; the others touch no pixel that has any."""
    if strip.has_data is None:
        return list(range(len(places)))
    has_data = strip.has_data
    return [number for number, place in enumerate(places) if has_data[:, place].any()]


def _on(device: torch.device, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """Move dates to a device, each once; what was one tensor stays one."""
    moved = {id(date): date.to(device) for pair in pairs for date in pair}
    return [tuple(moved[id(date)] for date in pair) for pair in pairs]


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
def _predict_windows(
    model: nn.Module,
    pairs: Sequence[tuple[Tensor, ...]],
    places: Sequence[slice],
    flips: bool,
    precision: Precision,
) -> list[Tensor]:
    """Return logits (B, C, h, w) float32 of windows of each pair, a mean over mirror images or not.

    A date that two pairs share is encoded once, where it has the same pixels in both.
    """
    batches = [[torch.stack([date[..., p] for p in places]) for date in pair] for pair in pairs]
    is_known = [False] + [
        pair[0] is last[1] or torch.equal(batch[0], last_batch[1])
        for pair, last, batch, last_batch in zip(
            pairs[1:], pairs, batches[1:], batches, strict=False
        )
    ]

    def ask(view: Pairs) -> list[Tensor]:
        with precision.autocast(batches[0][0].device):
            fast = prediction_copy(model, precision.dtype or torch.float32, *batches[0])
            return [logits.float() for logits in _compare_dates(fast, view, is_known)]

    return mean_over_views(ask, batches) if flips else ask(batches)


def _compare_dates(model: nn.Module, pairs: Pairs, is_known: Sequence[bool]) -> list[Tensor]:
    """Return the logits of each pair.

    Args:
        model: `(before, after) -> logits`; one with `encode` and `compare` shares features.
        pairs: before and after (B, 3, h, w).
        is_known: whether a pair's first date is the second of the pair before.
    """
    if len(pairs) == 1 or not hasattr(model, "encode"):
        return [model(*pair) for pair in pairs]
    found, features = [], None
    for (before, after), known in zip(pairs, is_known, strict=True):
        first = features if known else model.encode(before)  # type: ignore[operator]
        features = model.encode(after)  # type: ignore[operator]
        height, width = before.shape[-2:]
        found.append(model.compare(first, features)[..., :height, :width])  # type: ignore[operator]
    return found
