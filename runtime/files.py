"""Files that are whole or not there, locks between processes, and torch files of strangers.

whole_file      one file: written beside, then moved into place
whole_folder    several files: they appear together when all of them are complete
new_folder      a folder under a free name, which appears with all that is in it
locked          what only one process may do at a time
"""

import itertools
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

PREFIX = ".unfinished-"
LOCK = ".lock"
ABANDONED = 24 * 3600  # seconds; a lock would tell at once, but there are drives without locks


@contextmanager
def whole_file(path: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Give a path beside `path`, whose file takes the place of `path` if the `with` ends well.

    It is on the disk before it is moved. After a failure `path` is as it was.

    Args:
        path: of the file to write.
        previous: where the file that was there goes; None replaces it.

    Raises:
        OSError: the disk is full or read-only.
    """
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            path.replace(previous)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def file_size_limit() -> int | None:
    """Return how many bytes a file of this process may have; None where there is no limit."""
    if sys.platform == "win32":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def is_there(path: Path) -> bool:
    """Whether a regular file is there; not where that cannot be told, as behind a closed folder."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_json(path: Path, max_bytes: int = 2**24) -> Any:
    """Return the content of a JSON file that anybody may have written, None where it cannot be had.

    Args:
        path: only a regular file is opened: a pipe would wait for a writer.
        max_bytes: a larger file is not read.
    """
    try:
        if is_there(path) and path.stat().st_size <= max_bytes:
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        pass
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one move.

    Raises:
        UserError: the disk is full or read-only; what was there stays.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        with whole_file(path) as beside:
            # of a name that is no text, \\udcff: JSON's own escape
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder whose files move into `folder` if the `with` ends well.

    What killed processes have left there is swept up.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    try:
        with locked(beside / LOCK):
            _sweep(folder)
            yield beside
            for path in sorted(beside.iterdir()):
                if path.name != LOCK:
                    path.replace(folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def new_folder(wanted: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder that appears whole, as `wanted` or wanted-2, wanted-3, ... if that is taken.

    Args:
        wanted: a folder that is there already stays as it is.
        fill: writes into the folder that it is given.

    Returns:
        The folder.

    Raises:
        OSError: nothing can be written there.
    """
    beside = wanted.with_name(f".{wanted.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir(parents=True)
        fill(beside)
        for number in itertools.count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            if os.path.lexists(folder):
                continue
            try:
                return beside.rename(folder)
            except OSError:
                if not os.path.lexists(folder):  # another process was no faster
                    raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    raise AssertionError("unreachable")


def _sweep(folder: Path) -> None:
    for abandoned in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # its process holds the lock, or it is gone meanwhile
            if time.time() - abandoned.stat().st_mtime > ABANDONED:
                with locked(abandoned / LOCK, patience=0):
                    shutil.rmtree(abandoned)


@contextmanager
def locked(path: Path, patience: float = 60) -> Iterator[bool]:
    """Hold a lock between processes; the system frees it when its holder dies.

    It gives whether the lock is real: some network drives have none, and then nobody waits.

    Raises:
        TimeoutError: another process has held it for `patience` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + patience
        while (is_real := _try_lock(file.fileno())) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} has been locked for {patience:.0f} s")
            time.sleep(0.05)
        try:
            yield is_real
        finally:
            if sys.platform == "win32":  # elsewhere closing is enough
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _try_lock(descriptor: int) -> bool | None:
    """Return True with a lock, False where the drive has none, None if another has it."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return None
    except OSError:
        return False
    return True


def read_torch_file(path: Path, *, checked: bool) -> Any:
    """Return what `torch.save` wrote, whoever did: no code runs, no memory beyond the file's size.

    Args:
        path: of a file that is there.
        checked: refuse files without check sums, as torch wrote before 1.6.

    Returns:
        The content; its tensors are on the CPU.

    Raises:
        ValueError: it cannot be read, with the reason in a line.
        MemoryError: this machine has no room for it; the file may be whole.
        PermissionError: it may not be read.
    """
    import torch  # takes seconds, and nothing else here needs it

    try:
        if checked or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch packs nothing, so whatever unpacks to more is a bomb
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise zipfile.BadZipFile("it holds more than its size")
                if damaged := archive.testzip():  # torch.load does not look at the check sums
                    raise zipfile.BadZipFile(f"{damaged} fails its check sum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except pickle.UnpicklingError:
        # torch's message tells how to load the file nevertheless, in bold: that runs its code
        raise ValueError("it is damaged, or holds more than tensors and plain values") from None
    except Exception as error:
        if "memory" in str(error) and isinstance(error, RuntimeError):  # of torch's allocator
            raise MemoryError(f"{path}: no memory to read it") from None
        # zipfile and torch.load raise a dozen types for hostile files; none may reach the user
        raise ValueError(
            (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        ) from None
