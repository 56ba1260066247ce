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

PROBABILITY_STEPS = 254  # of uint8; 255 is no data

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
        check_logits(logits)
        chance = change_probability(logits[None], task=self.task)[0].cpu().numpy()
        found = predict_classes(logits[None], self.threshold, task=self.task)[0].to(torch.uint8)
        classes = np.where(valid, found.cpu().numpy(), np.uint8(IGNORE))
        return code_probability(chance, valid, self.stored), classes.reshape(-1, *valid.shape)


def code_probability(probability: NDArray[np.float32], valid: Bools, dtype: str) -> NDArray[Any]:
    """Turn probabilities (n, W) into the values of a file."""
    if dtype == "float32":
        return np.where(valid, probability, np.float32(np.nan))
    steps = np.rint(PROBABILITY_STEPS * probability).astype(np.uint8)
    return np.where(valid, steps, np.uint8(IGNORE))


def read_strips(scene: Scene, windows: Windows, strips: range) -> Generator[SceneStrip, None, None]:
    """Read strips from top to bottom, each row once."""
    held: list[PairRows] = []
    for number in strips:
        top = windows.tops[number]
        bottom = top + windows.rows
        overlap = windows.tops[number - 1] + windows.rows - top if held else 0
        rows = scene.read_pairs(top + overlap, bottom)
        if overlap:
            rows = [_below(*both, overlap) for both in zip(held, rows, strict=True)]
        held = rows
        has_data = np.any([valid for _, _, valid in rows], axis=0)
        tensors: dict[int, Tensor] = {}
        for date in (date for before, after, _ in rows for date in (before, after)):
            tensors.setdefault(id(date), torch.from_numpy(date))  # what is one array stays one
        pairs = [(tensors[id(before)], tensors[id(after)]) for before, after, _ in rows]
        yield SceneStrip(number, pairs, has_data, rows)


def _below(above: PairRows, rows: PairRows, overlap: int) -> PairRows:
    """Return the last rows of a strip, and those that follow it."""
    first, second, third = (
        np.concatenate([a[..., -overlap:, :], b], axis=-2) for a, b in zip(above, rows, strict=True)
    )
    return first, second, third


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
            top, end = windows.band(strip.number)
            found = []
            for of_pair, rows in zip(logits, strip.read, strict=True):
                before, after = (date[:, : end - top] for date in rows[:2])
                found.append(Band(top, before, after, *decide(of_pair, rows[2][: end - top])))
            yield found


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
    finally:
        stop.set()
        room.release()
        thread.join()


def leave_if_unwanted() -> None:
    """End a thread of `ahead` whose items nobody takes any more."""
    stop = getattr(_thread, "stop", None)
    if stop is not None and stop.is_set():
        raise _Unwanted
