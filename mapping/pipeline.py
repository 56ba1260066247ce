"""From files to maps, three steps at the same time: one reads, one predicts, one writes.

    strips    rows of all dates, as high as a window       read in a thread, one strip ahead
    bands     probability and classes, on the CPU          predicted in a thread, one band ahead
    writing   by who takes the bands, see maps.py and parts.py

Memory is that of a strip in each step. What a map says does not depend on who works when: a band of
a scene that is predicted in parts is the band of the whole.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mapping.rasters import Bools, Bytes, PairRows, Scene
from metrics import change_probability, check_logits, predict_classes
from networks.sliding_window import Strip, Windows, predict_strips
from pairs.images import IGNORE
from runtime.memory import own_pages

PROBABILITY_STEPS = 254  # of uint8; 255 is no data
_AT_ONCE = 2**17  # pixels whose logits become classes in one go

T = TypeVar("T")
_thread = threading.local()


@dataclass(frozen=True)
class SceneStrip(Strip):
    """A strip as it was read: of each pair both dates (3, rows, W) and where both have data."""

    read: Sequence[PairRows] = ()


@dataclass(frozen=True)
class Band:
    """What is known of some rows of one pair.

    Attributes:
        top: the first row.
        before, after: (3, n, W) uint8.
        probability: (n, W) as it is stored; 255 or NaN = no data.
        classes: (1, n, W), of semantic change (2, n, W) uint8; 255 = no data.
    """

    top: int
    before: Bytes
    after: Bytes
    probability: NDArray[Any]
    classes: Bytes


@dataclass(frozen=True)
class Decision:
    """How logits become what is stored.

    Attributes:
        task: of the model.
        threshold: of the change probability; None is the rule of the model itself.
        stored: dtype of the probability, "uint8" or "float32".
    """

    task: str
    threshold: float | None
    stored: str

    def __call__(self, logits: Tensor, valid: Bools) -> tuple[NDArray[Any], Bytes]:
        """Turn logits (C, n, W) into the probability (n, W) and the classes (1 or 2, n, W).

        Raises:
            UserError: the logits are not finite.
        """
        size = logits.shape[1:]
        probability = np.empty(size, dtype=self.stored)
        classes = np.empty((2 if self.task == "semantic" else 1, *size), dtype=np.uint8)
        # some rows at a time stay in the processor's cache, and what lies between takes no memory
        step = max(1, size[0] if logits.is_cuda else _AT_ONCE // size[1])
        for top in range(0, size[0], step):
            part = slice(top, top + step)
            rows = logits[None, :, part]
            check_logits(rows)
            chance = change_probability(rows, task=self.task)[0].cpu().numpy()
            probability[part] = code_probability(chance, valid[part], self.stored)
            found = predict_classes(rows, self.threshold, task=self.task)[0].to(torch.uint8)
            classes[:, part] = np.where(valid[part], found.cpu().numpy(), np.uint8(IGNORE))
        return probability, classes


def code_probability(probability: NDArray[np.float32], valid: Bools, dtype: str) -> NDArray[Any]:
    """Turn probabilities (n, W) into the values of a file."""
    if dtype == "float32":
        return np.where(valid, probability, np.float32(np.nan))
    steps = np.rint(PROBABILITY_STEPS * probability).astype(np.uint8)
    return np.where(valid, steps, np.uint8(IGNORE))


def read_strips(scene: Scene, windows: Windows, strips: range) -> Generator[SceneStrip, None, None]:
    """Read strips from top to bottom, each row once."""
    above: list[PairRows] = []  # of the strip before, the rows that the next one has too
    for number in strips:
        top = windows.tops[number]
        bottom = top + windows.rows
        overlap = above[0][2].shape[0] if above else 0
        strip = _strip_of(number, above, scene.read_pairs(top + overlap, bottom))
        if number + 1 < strips.stop:
            first = windows.tops[number + 1] - top  # strips without overlap leave no row
            above = _each(lambda rows, n=first: rows[..., n:, :].copy(), strip.read)
        yield strip
        del strip  # it is read no more: whoever took it says how long it is held


def _strip_of(number: int, above: Sequence[PairRows], rows: Sequence[PairRows]) -> SceneStrip:
    """Join the rows of a strip."""
    if above:
        rows = _each(_below, above, rows)
    has_data = np.any([valid for _, _, valid in rows], axis=0)
    tensors = {id(date): torch.from_numpy(date) for pair in rows for date in pair[:2]}
    pairs = [(tensors[id(before)], tensors[id(after)]) for before, after, _ in rows]
    return SceneStrip(number, pairs, has_data, rows)


def _below(upper: NDArray[Any], lower: NDArray[Any]) -> NDArray[Any]:
    """Return rows (..., n, W) and those that follow them as one array."""
    *other, height, width = lower.shape
    joined = own_pages((*other, height + upper.shape[-2], width), lower.dtype)
    return np.concatenate([upper, lower], axis=-2, out=joined)


def _each(change: Callable[..., Any], *lists: Sequence[PairRows]) -> list[PairRows]:
    """Change each array of each pair, or what is at one place in several lists, once."""
    changed: dict[tuple[int, ...], Any] = {}

    def one(*arrays: Any) -> Any:
        key = tuple(map(id, arrays))
        if key not in changed:
            changed[key] = change(*arrays)
        return changed[key]

    found = []
    for pairs in zip(*lists, strict=True):
        before, after, valid = map(one, *pairs)
        found.append((before, after, valid))
    return found


def predict_scene_bands(
    model: nn.Module,
    scene: Scene,
    windows: Windows,
    decide: Decision,
    *,
    bands: range,
    after_batch: Callable[[float], None],
    **options: Any,
) -> Generator[list[Band], None, None]:
    """Predict bands of a scene, of each pair one, while the next strip is read.

    Args:
        model: `(before, after) -> logits`, on its device.
        scene: its dates.
        windows: of it.
        decide: turns logits into what is stored.
        bands: which ones.
        after_batch: is told which share of the windows is done; may raise to end it.
        options: of `predict_strips`.
    """

    def or_leave(part: float) -> None:
        leave_if_unwanted()
        after_batch(part)

    with closing(ahead(read_strips(scene, windows, windows.strips_of(bands)))) as strips:
        for strip, logits in predict_strips(
            model, strips, windows, bands=bands, after_batch=or_leave, **options
        ):
            yield _bands_of(strip, logits, windows.band(strip.number), decide)
            del strip, logits  # memory of a strip, which the next one would not wait for


def _bands_of(
    strip: SceneStrip, logits: Sequence[Tensor], rows: tuple[int, int], decide: Decision
) -> list[Band]:
    """Return the band of each pair that begins with a strip."""
    top, end = rows
    found = []
    for of_pair, (before, after, valid) in zip(logits, strip.read, strict=True):
        decided = decide(of_pair, valid[: end - top])
        found.append(Band(top, before[:, : end - top], after[:, : end - top], *decided))
    return found


class _Unwanted(Exception):
    """Nobody takes what a thread makes any more."""


def ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Give the items of a generator that runs in a thread of its own, one item ahead.

    What it raises is raised here. When this is closed, the thread ends at its next item, or
    where it calls `leave_if_unwanted`, and is waited for.
    """
    done: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    room, stop = threading.Semaphore(1), threading.Event()

    def work() -> None:
        _thread.stop = stop
        try:
            with closing(items):
                while room.acquire() and not stop.is_set():
                    done.put((True, next(items)))
        except StopIteration:
            done.put((False, None))
        except BaseException as error:  # of the user's files, the disk, memory, a signal
            done.put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            try:
                is_item, value = done.get(timeout=1)
            except Empty:
                continue  # Python looks for signals in between; not all systems wake it
            if not is_item:
                if value is not None:
                    raise value
                return
            room.release()
            yield value
            del value  # it may be large, and the next one takes its time
    finally:
        stop.set()
        room.release()
        thread.join()


def leave_if_unwanted() -> None:
    """End a thread of `ahead` whose items nobody takes any more."""
    stop = getattr(_thread, "stop", None)
    if stop is not None and stop.is_set():
        raise _Unwanted
