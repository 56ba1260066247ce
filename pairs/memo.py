"""What reading a file showed, kept from one start to the next, and how a changed file is told.

    FOLDER/checked-<dataset>.json    a check sum, then {path: {kind: [stamp, what it showed]}}

A memo that is damaged, or cannot be read or written, is no loss: the files are read again.
"""

import errno
import hashlib
import json
import os
import stat
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from pairs.headers import MASK, NOTES
from runtime.errors import UserError
from runtime.files import whole_file

VERSION = 3  # another one: files are read again
MAX_KINDS = 4  # of results of one file
UNUSED = 180 * 24 * 3600  # seconds after which the memo of a dataset goes
# The times of files tick: two writes within one tick have the same time. Linux ticks every 10 ms
# at the most, so a file is left alone until it is older than that.
TICK = 20_000_000  # nanoseconds

# (bytes, time of writing, time of any change, inode), and the same of GDAL's mask and notes beside
# it, if there are any. A user may set the second, not the third: it also tells a file that was
# replaced by one of the same size and time.
Stamp = tuple[int, ...]

IRREGULAR = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def stamp_of(path: Path) -> Stamp:
    """Return what tells whether a file is still the same, without reading it.

    Raises:
        UserError: it is gone, or no regular file: reading that might never end.
    """
    stamp = _stamp_of(path)
    for end in (MASK, NOTES):
        if os.path.lexists(f"{path}{end}"):
            stamp += _stamp_of(Path(f"{path}{end}"))
    return stamp


def _stamp_of(path: Path) -> Stamp:
    while True:
        try:
            found = path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{path}: is a link that leads to itself; remove it") from None
            raise UserError(f"{path}: is gone ({error.strerror})") from None
        if not stat.S_ISREG(found.st_mode):
            kind = IRREGULAR.get(stat.S_IFMT(found.st_mode), "no regular file")
            raise UserError(f"{path}: is {kind}, not a file; remove it")
        age = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)
        if not 0 <= age < TICK:
            return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
        time.sleep((TICK - age) / 1e9)


def short_hash(content: object) -> str:
    """Return a word of a file's name that tells contents apart."""
    return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Memo:
    """Results of reading the files of one dataset.

    Args:
        folder: of the memos; None remembers nothing.
        root: of the dataset.
    """

    def __init__(self, folder: Path | None, root: Path) -> None:
        self.path: Path | None = None
        self.known: dict[str, dict[str, list]] = {}
        self.is_new = False
        if folder is not None:
            self.path = folder / f"checked-{short_hash(str(root.absolute()))}.json"
            self.known = _load(self.path)

    def get(self, path: Path, kind: str, stamp: Stamp) -> Any:
        """Return what reading a file showed, or None if it has changed or was never read."""
        found = self.known.get(str(path.absolute()), {}).get(kind)
        return found[1] if found and found[0] == list(stamp) else None

    def put(self, path: Path, kind: str, stamp: Stamp, result: Any) -> None:
        """Remember what JSON can hold."""
        kinds = self.known.setdefault(str(path.absolute()), {})
        kinds.pop(kind, None)
        kinds[kind] = [list(stamp), result]
        while len(kinds) > MAX_KINDS:
            del kinds[next(iter(kinds))]
        self.is_new = True

    def save(self) -> None:
        """Write what is new, without files that are gone, and delete memos that nobody uses."""
        if self.path is None:
            return
        with suppress(OSError):
            if not self.is_new:
                os.utime(self.path)  # used now
                return
            known = {path: kinds for path, kinds in self.known.items() if Path(path).exists()}
            text = json.dumps(known, separators=(",", ":"))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as beside:
                beside.write_text(f"{_sum(text)}\n{text}", "utf-8")
            self.is_new = False
            for path in self.path.parent.glob("checked*.json"):
                if time.time() - path.stat().st_mtime > UNUSED:
                    path.unlink()


def _load(path: Path) -> dict[str, dict[str, list]]:
    try:
        if not path.is_file():  # a pipe of that name would be waited for
            return {}
        found, _, text = path.read_text("utf-8").partition("\n")
        return json.loads(text) if found == _sum(text) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _sum(text: str) -> str:
    return f"{VERSION}-{zlib.crc32(text.encode()):08x}"
