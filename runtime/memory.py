"""How much memory is free, what is done with freed memory, and arrays that give theirs back.

Told without torch: files are checked before it is imported.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGE = 2**22  # bytes of an array that gets pages of its own
_NO_GLIBC = suppress(OSError, AttributeError)  # macOS, Windows, musl


def available_memory() -> int:
    """Return the bytes that this process may still take: of the machine, and of its container."""
    found = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        found.append(1024 * int(kilobytes))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    if not found and hasattr(os, "sysconf"):  # macOS tells all of it: count on half
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(found, default=2**32))


def own_pages(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Return an array to be filled, whose memory goes back to the system when it is dropped.

    Large arrays of many sizes among a network's own leave gaps in the heap that nothing fits.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.empty(shape, dtype)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size >> 20} MB") from error
    return np.frombuffer(pages, dtype).reshape(shape)


def keep_freed_memory(*, one_arena: bool = False) -> None:
    """Ask glibc to keep large freed blocks for the next step instead of returning them.

    Without it each step's activations are mapped and zeroed anew, which costs some 15 % where a
    ResNet50 learns on two cores (benchmarks/README.md; `mallopt(3)`; a no-op on other C libraries).

    Args:
        one_arena: threads share what is kept; a scene then takes 0.1 to 0.2 GB less.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    with _NO_GLIBC:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        if one_arena:
            libc.mallopt(m_arena_max, 1)


def return_freed_memory() -> None:
    """Ask glibc to give back what it keeps, now: after a step that will not come again.

    It is `malloc_trim(3)`; a no-op on other C libraries.
    """
    with _NO_GLIBC:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
