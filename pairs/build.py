"""A cache of decoded pairs that is being filled; `cache.py` says where, and what is in it."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pairs.bands import holes_in
from pairs.images import Bytes
from pairs.labels import LabelEncoding
from pairs.memo import short_hash
from pairs.sources import (
    CachedSource,
    FileSource,
    encode_labels,
    offsets_of,
    stack_files,
    sum_of,
    sum_of_sums,
)
from pairs.splits import Pair
from runtime.errors import UserError
from runtime.files import whole_file


class Build:
    """A cache that is being filled, in a file or in memory.

    Pairs come in any order, from several threads, with labels as their files write them. These
    become classes at the end, when it is known what their values mean.

    Args:
        pairs: what it will hold.
        sizes: (height, width) of each pair.
        folder: of the caches; None fills memory.
        name: of the cache, without <classes>.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        sizes: Sequence[tuple[int, int]],
        folder: Path | None = None,
        name: str = "",
    ) -> None:
        self.pairs, self.sizes, self.name = tuple(pairs), list(sizes), name
        self.offsets = offsets_of(self.pairs, self.sizes)
        self.fault: OSError | None = None
        self._numbers = {pair: number for number, pair in enumerate(self.pairs)}
        self._sums = len(self.pairs) * [0]
        self._holes: dict[int, Bytes] = {}  # by number, eight pixels a byte
        self._lock = threading.Lock()
        self._memory = torch.empty(0 if folder else self.offsets[-1], dtype=torch.uint8)
        self._path: Path | None = None
        if folder:
            number, path = tempfile.mkstemp(suffix=".unfinished", dir=folder)
            self._file, self._path = os.fdopen(number, "w+b"), Path(path)

    def put(self, pair: Pair, arrays: Sequence[Bytes]) -> None:
        """Take the decoded files of a pair; a full disk is a `fault` that shows at the end."""
        number = self._numbers[pair]
        channels = stack_files(pair, arrays)
        if channels.shape[1:] != self.sizes[number]:
            raise UserError(f"{pair.label}: {channels.shape[1:]} is not {self.sizes[number]}")
        self._sums[number] = sum_of(channels[:6])
        if (holes := holes_in(arrays)) is not None:
            self._holes[number] = np.packbits(holes)
        try:
            self._write(self.offsets[number], channels)
        except OSError as error:
            self.fault = error

    def finish(self, files: FileSource) -> CachedSource:
        """Return the cache of all pairs.

        Raises:
            OSError: the disk is full.
        """
        if self.fault:
            raise self.fault
        for number, pair in enumerate(self.pairs):
            height, width = self.sizes[number]
            start, end = self.offsets[number] + 6 * height * width, self.offsets[number + 1]
            raw = self._read(start, end).reshape(-1, height, width)
            holes = None
            if number in self._holes:
                bits = np.unpackbits(self._holes[number], count=height * width)
                holes = bits.reshape(height, width).astype(bool)
            classes = encode_labels(pair, raw, files.encoding, holes)
            self._write(start, classes)
            self._sums[number] = sum_of(classes, self._sums[number])
        if self._path is None:
            return CachedSource(files, self._memory)
        sums = np.array(self._sums, "<u4")
        sums = np.append(sums, np.array([sum_of_sums(sums)], "<u4"))
        self._write(self.offsets[-1], sums)
        self._file.close()
        place = self._path.parent / f"{self.name}-{hash_classes(files.encoding)}.pixels"
        with whole_file(place) as beside:
            self._path.replace(beside)
        return CachedSource(files, place)

    def discard(self) -> None:
        """Leave nothing behind of a cache that was not finished."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, start: int, data: np.ndarray) -> None:
        if self._path is None:
            self._memory.numpy()[start : start + data.size] = data.ravel()
            return
        with self._lock:
            self._file.seek(start)
            self._file.write(data.data)
            self._file.flush()

    def _read(self, start: int, end: int) -> Bytes:
        if self._path is None:
            return self._memory.numpy()[start:end]
        with self._lock:
            self._file.seek(start)
            return np.frombuffer(self._file.read(end - start), np.uint8)


def hash_classes(encoding: LabelEncoding) -> str:
    """Return what tells the meanings of label values apart, as a word of a file's name."""
    return short_hash((encoding.values, encoding.colors))
