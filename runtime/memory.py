"""How much memory is free, and arrays that give theirs back.

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


def return_freed_memory() -> None:
    """Give what the heap has free back to the system (`malloc_trim(3)`), where there is glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
