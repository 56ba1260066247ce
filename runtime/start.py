"""How a script starts: its output, its threads, Ctrl-C and its options, before torch is imported.

torch and what stands on it take seconds to import. So a script declares its `Config`, calls `start`
and only then imports the rest: `--help` and a wrong word are answered at once.
"""

import errno
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from runtime.config import parse
from runtime.errors import visible

CGROUP = Path("/sys/fs/cgroup")
# How OpenMP's threads wait for each other; each of its libraries reads a name of its own
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def start(
    config_class: type,
    *,
    description: str | None,
    answers: Mapping[str, tuple[str, Callable[[], str]]] | None = None,
    check: Callable[[Any], object] = lambda _: None,
) -> dict[str, Any]:
    """Prepare the process and read its command line, see `config.parse`; call it once.

    Returns:
        The options that were given.
    """
    keep_output()
    signal.signal(signal.SIGINT, _leave)  # until `run_script` begins
    choose_threads()
    return parse(config_class, description=description, answers=answers, check=check)


def usable_cores() -> int:
    """Return how many cores this process may keep busy: by affinity, and by its container."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limits = []
    with suppress(OSError):  # "200000 100000": two cores' worth; "max 100000": all
        limits.append((CGROUP / "cpu.max").read_text("ascii"))
    with suppress(OSError):  # the first version of control groups; -1: all
        files = [CGROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
        limits.append(" ".join(file.read_text("ascii") for file in files))
    for quota, period in (limit.split() for limit in limits):
        if quota.isdigit():
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def choose_threads() -> None:
    """Let OpenMP start a thread for each usable core, and let waiting threads sleep.

    A waiting thread that spins takes the core from the one it waits for, where other programs run
    too (benchmarks/threads.py). What the user has set stays. torchrun's processes share the cores
    in `distributed.run`.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    all_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if usable_cores() < all_cores and "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def keep_output() -> None:
    """Let the script live on when nobody can read what it prints, and let it print any name.

    Standard output and error may be closed, a pipe whose reader has gone, or a file on a full disk.
    A character that the locale does not have, or that a terminal obeys, is printed as its escape.
    """
    for number in (0, 1, 2):  # else the next file that is opened, a checkpoint, gets the number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _kept(sys.stdout, 1)
    sys.stderr = _kept(sys.stderr, 2)


def _kept(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return KeptStream(open(number, "wb", closefd=False), "utf-8", "backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # a test's or a notebook's own
    return KeptStream(
        stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
    )


class KeptStream(io.TextIOWrapper):
    """A text stream that goes on into nothing when it can no longer be written.

    Attributes:
        lost: why it cannot; None as long as all was written, or when its reader has left.
    """

    lost: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write, or note that it cannot be done."""
        if self is sys.stdout:  # bars on the other one move the cursor
            text = visible(text)
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or note that it cannot be done."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno == errno.EPIPE:
            return
        self.lost = error
        if self is sys.stdout:
            reason = f"standard output cannot be written ({error.strerror}); going on without it"
            print(reason, file=sys.stderr, flush=True)


def _leave(number: int, _frame: FrameType | None) -> None:
    """End at once: while modules are imported there is nothing to save."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"interrupted\n")
    os._exit(128 + number)
