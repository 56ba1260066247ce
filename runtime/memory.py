"""How much memory is free, told without torch: files are checked before it is imported."""

import os
from contextlib import suppress
from pathlib import Path


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
