"""A folder in which only whole files appear, at the end, one moved in after another."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import UserError
from runtime.file_lock import locked

PREFIX = ".unfinished-"
LOCK = ".lock"


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
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


def _sweep(folder: Path) -> None:
    for abandoned in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # its process holds the lock, or it is gone meanwhile
            # a day, as there are drives without locks
            if time.time() - abandoned.stat().st_mtime > 24 * 3600:
                with locked(abandoned / LOCK, patience=0):
                    shutil.rmtree(abandoned)
