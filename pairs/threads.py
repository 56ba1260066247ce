"""Files decoded in threads, as many at once as memory holds: Pillow decodes without the GIL."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pairs.images import BYTES_A_PIXEL, num_pixels
from runtime.errors import UserError
from runtime.memory import available_memory
from runtime.progress import Bar

MAX_THREADS = 16

Result = TypeVar("Result")


def in_threads(
    jobs: Sequence[tuple[Sequence[Path], Callable[[], Result]]], title: str, unit: str
) -> Iterator[Result]:
    """Run jobs that decode files; give their results in order, beside a bar.

    A file of 16 kB may decode to a gigabyte. So the pixels that are decoded at one time are
    limited to what half of the memory holds; a job that is larger runs alone.

    Args:
        jobs: the files that each decodes, and the job.
        title: of the bar.
        unit: of the bar, what a job is.
    """
    if not jobs:
        return
    gate = _Gate(available_memory() // 2 // BYTES_A_PIXEL)

    def run(job: tuple[Sequence[Path], Callable[[], Result]]) -> Result:
        with gate.passed(sum(map(_pixels, job[0]))):
            return job[1]()

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        done = pool.map(run, jobs)
        try:
            yield from Bar(done, title, total=len(jobs), unit=unit, delay=1)
        except BaseException:  # Ctrl-C: leave now, not after what is queued
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _pixels(path: Path) -> int:
    try:
        return num_pixels(path)
    except UserError:  # the job will say what is wrong
        return 0


class _Gate:
    """Lets jobs pass as long as their pixels together stay below a limit, and one job always."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.changed = threading.Condition()

    @contextmanager
    def passed(self, pixels: int) -> Iterator[None]:
        """Wait for room, and take it for the length of a `with`."""
        with self.changed:
            self.changed.wait_for(lambda: not self.held or self.held + pixels <= self.limit)
            self.held += pixels
        try:
            yield
        finally:
            with self.changed:
                self.held -= pixels
                self.changed.notify_all()
