"""Where the pixels of a split come from: its files, or a cache that was decoded from them once.

    planes    (7, h, w) uint8: before R, G, B, after R, G, B, class (255 = ignore)
              (8, h, w) of semantic change: the classes before, the classes after

A PNG pair of 1024 x 1024 takes a core a tenth of a second to decode; a crop of it, out of the
cache, 0.1 ms. The cache is one file a split, with the planes of one pair after those of another,
mapped into memory: the system reads what is looked at, and shares it among processes.

    <files>-<state>.pixels    <files>: which files, read how; <state>: their sizes and times

So a cache is never stale: other files, other name. It is written beside and moved into place under
a lock, so processes that start together build it once. Only the newest <state> is kept, and the
caches that were used longest ago go when all together exceed `MAX_BYTES`.
"""

import contextlib
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pairs.images import IGNORE, read_image, read_size
from pairs.labels import MaskCoding
from pairs.layouts import Pair
from runtime.devices import available_memory
from runtime.errors import DataFault, UserError
from runtime.files import locked

MAX_BYTES = 100 * 10**9  # of all caches in a folder; LEVIR-CD takes 4
SPARE_BYTES = 2 * 10**9  # what a cache leaves free on the disk and in memory
PATIENCE = 24 * 3600  # seconds to wait for another process that builds

Stamp = tuple[tuple[int, int], ...]


class Source(ABC):
    """Windows of the pairs of a split.

    Attributes:
        pairs: the files.
        coding: of the labels.
        sizes: (height, width) of each pair.
        num_planes: of each pair.
    """

    pairs: tuple[Pair, ...]
    coding: MaskCoding
    sizes: list[tuple[int, int]]
    num_planes: int

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, number: int, top: int, left: int, side: int) -> Tensor:
        """Return the planes (P, h, w) of a window of a pair: a view, not to be written to.

        The window is cut where the image ends, so h and w may be less than `side`.

        Raises:
            DataFault: a file is gone, has changed, or cannot be decoded.
        """
        return self.planes(number)[:, top : top + side, left : left + side]

    @abstractmethod
    def planes(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W), not to be written to."""


class FileSource(Source):
    """Decodes the files, keeping the last decoded pairs in memory.

    Args:
        pairs: the files.
        coding: of the labels.
        keep_bytes: how much each process keeps; the last pair always stays, so that sixteen patches
            of one LEVIR-CD image decode it once as long as they come in order.
    """

    def __init__(
        self, pairs: Sequence[Pair], coding: MaskCoding, *, keep_bytes: int = 2**28
    ) -> None:
        self.pairs = tuple(pairs)
        self.coding = coding
        self.num_planes = 6 + len(self.pairs[0].labels)
        self.keep_bytes = keep_bytes
        self.stamps = [_stamp(pair) for pair in pairs]
        self.sizes = [read_size(pair.label) for pair in pairs]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}  # pixels do not travel to workers

    def planes(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W), decoded if it is not one of the last."""
        try:
            self.check_unchanged(number)
            planes = self._kept.pop(number, None)
            if planes is None:
                planes = self.decode(number)
                self._kept_bytes += planes.nbytes
        except UserError as error:
            raise DataFault(str(error)) from None
        self._kept[number] = planes
        while self._kept_bytes > self.keep_bytes and len(self._kept) > 1:
            self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return planes

    def decode(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W) and keep nothing.

        Where the labels of both dates disagree on whether anything changed, both are ignored.
        """
        pair, size = self.pairs[number], self.sizes[number]
        planes = np.empty((self.num_planes, *size), np.uint8)
        for path, plane in zip(pair.labels, planes[6:], strict=True):
            mask = self.coding.read(path)
            if mask.shape != size:
                raise UserError(f"{path}: {mask.shape} does not match {pair.label}'s {size}")
            plane[:] = mask
        for path, part in ((pair.before, planes[:3]), (pair.after, planes[3:6])):
            image = read_image(path)
            if image.shape[:2] != size:
                raise UserError(f"{path}: {image.shape[:2]} does not match its label's {size}")
            part[:] = image.transpose(2, 0, 1)
        if pair.label_after is not None:
            before, after = planes[6:]
            planes[6:, (before == 0) != (after == 0)] = IGNORE
        return torch.from_numpy(planes)

    def check_unchanged(self, number: int) -> None:
        """Raise UserError if a file of the pair is no longer what it was at the start."""
        pair = self.pairs[number]
        if _stamp(pair) != self.stamps[number]:
            raise UserError(
                f"{pair.name}: a file of this pair ({pair.label}) changed during the run"
            )

    def _forget(self) -> None:
        self._kept: dict[int, Tensor] = {}  # the one used last stands last
        self._kept_bytes = 0


class CachedSource(Source):
    """Pairs decoded before, from a file that is mapped into memory or from memory itself.

    Args:
        files: what was decoded.
        pixels: the file, or (bytes,) uint8.
    """

    def __init__(self, files: FileSource, pixels: Path | Tensor) -> None:
        self.pairs, self.coding, self.sizes = files.pairs, files.coding, files.sizes
        self.num_planes = files.num_planes
        self._offsets = _offsets(files)
        self._pixels = pixels
        self._mapped: Tensor | None = self._map()

    def __getstate__(self) -> dict[str, Any]:
        # a file is mapped anew by each process; torch passes memory on without copying it
        return {**self.__dict__, "_mapped": None}

    def planes(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W)."""
        self._mapped = mapped = self._map() if self._mapped is None else self._mapped
        start, end = self._offsets[number : number + 2]
        return mapped[start:end].view(self.num_planes, *self.sizes[number])

    def _map(self) -> Tensor:
        if isinstance(self._pixels, Tensor):
            return self._pixels
        try:
            return torch.from_file(
                str(self._pixels), shared=False, size=self._offsets[-1], dtype=torch.uint8
            )
        except RuntimeError as error:
            raise UserError(f"{self._pixels}: cannot be mapped ({error}); delete it") from None


class Subset(Source):
    """Some pairs of a source.

    Args:
        source: all of them.
        numbers: of those to take, in this order.
    """

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        self.pairs = tuple(source.pairs[i] for i in numbers)
        self.sizes = [source.sizes[i] for i in numbers]
        self.coding, self.num_planes = source.coding, source.num_planes
        self.source, self.numbers = source, numbers

    def planes(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W)."""
        return self.source.planes(self.numbers[number])


def open_source(
    pairs: Sequence[Pair], coding: MaskCoding, *, cache: str = "none", folder: Path
) -> Source:
    """Open the pairs of a split, and decode them first if they are to be cached.

    Args:
        pairs: the files.
        coding: of the labels.
        cache: "disk": a file in `folder`. "ram": memory, anew at each start. "none": decode again
            and again. "auto": the first of these for which there is room.
        folder: of the caches.

    Raises:
        UserError: a file cannot be decoded, or there is no room for the cache that was asked for.
    """
    files = FileSource(pairs, coding)
    size = _offsets(files)[-1]
    if cache in ("auto", "disk"):
        try:
            return CachedSource(files, _cache_file(files, folder))
        except OSError as error:
            reason = f"no cache of {size / 1e9:.1f} GB in {folder} ({error.strerror or error})"
            if cache == "disk":
                raise UserError(f"--cache disk: {reason}; make room, or --cache none") from None
            print(f"{reason}: decoding ", end="")
    has_room = size + SPARE_BYTES < available_memory()
    if cache == "auto":
        print("into memory" if has_room else "each pair whenever it is needed")
    if cache == "ram" and not has_room:
        raise UserError(f"--cache ram: takes {size / 1e9:.1f} GB of memory; try --cache disk")
    if cache == "none" or not has_room:
        return files
    pixels = torch.empty(size, dtype=torch.uint8)
    offsets = _offsets(files)

    def keep(number: int, planes: Tensor) -> None:
        pixels[offsets[number] : offsets[number + 1]] = planes.flatten()

    _decode_all(files, keep)
    return CachedSource(files, pixels)


def _cache_file(files: FileSource, folder: Path) -> Path:
    """Return the file with the decoded pairs, built if need be.

    Raises:
        OSError: it cannot be written.
    """
    identity = [str(path.resolve()) for pair in files.pairs for path in pair.files]
    name = _hash((identity, files.coding.values, files.coding.colors, files.sizes))
    path = folder / f"{name}-{_hash((files.stamps, files.sizes))}.pixels"
    size = _offsets(files)[-1]
    if not _is_whole(path, size):
        with locked(folder / "lock", PATIENCE):
            if not _is_whole(path, size):  # another process may have built it meanwhile
                _make_room(folder, name, size)
                _build(files, path, size)
    with contextlib.suppress(OSError):
        os.utime(path)  # used now
    return path


def _build(files: FileSource, path: Path, size: int) -> None:
    beside = path.with_suffix(".unfinished")
    offsets = _offsets(files)

    def write(number: int, planes: Tensor) -> None:
        with beside.open("r+b") as file:
            file.seek(offsets[number])
            file.write(planes.numpy().data)

    try:
        with beside.open("wb") as empty:
            empty.truncate(size)
        _decode_all(files, write)
        with beside.open("r+b") as whole:
            os.fsync(whole.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def _decode_all(files: FileSource, keep: Callable[[int, Tensor], None]) -> None:
    """Decode every pair once, in threads: Pillow decodes without the GIL."""

    def decode(number: int) -> None:
        planes = files.decode(number)
        files.check_unchanged(number)
        keep(number, planes)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        done = pool.map(decode, range(len(files)))
        try:
            for _ in tqdm(done, "decoding", len(files), disable=None, leave=False, delay=1):
                pass
        except BaseException:  # Ctrl-C: leave now, not after the pairs that are queued
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _make_room(folder: Path, name: str, size: int) -> None:
    """Delete what is dead, superseded, or was used longest ago; raise OSError without room."""

    def caches() -> Iterator[Path]:
        return folder.glob("*.pixels")

    def delete(path: Path) -> None:
        with contextlib.suppress(OSError):  # Windows keeps files that are in use
            path.unlink()

    for path in (*folder.glob("*.unfinished"), *folder.glob(f"{name}-*.pixels")):
        delete(path)
    for path in sorted(caches(), key=lambda path: path.stat().st_mtime):
        if sum(other.stat().st_size for other in caches()) + size <= MAX_BYTES:
            break
        delete(path)
    if size > MAX_BYTES:
        raise OSError(f"more than {MAX_BYTES / 1e9:.0f} GB")
    free = shutil.disk_usage(folder).free
    if size + SPARE_BYTES > free:
        raise OSError(f"{free / 1e9:.1f} GB are free")


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _offsets(files: FileSource) -> list[int]:
    """Return where each pair begins in the cache, and behind the last its end."""
    lengths = [files.num_planes * h * w for h, w in files.sizes]
    return [0, *np.cumsum(lengths, dtype=np.int64).tolist()]


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _stamp(pair: Pair) -> Stamp:
    """Tell whether the files of a pair are still the same: (bytes, time of change) of each."""
    try:
        stats = [path.stat() for path in pair.files]
    except OSError as error:
        raise UserError(f"{error.filename}: is gone ({error.strerror})") from None
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
