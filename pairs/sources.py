"""Where the pixels of a split come from: windows of pairs, from files or a cache.

channels    (7, h, w) uint8: before R, G, B, after R, G, B, class (255 = ignore)
            (8, h, w) of semantic change: the classes before, the classes after
"""

import contextlib
import mmap
import os
import sys
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairs.bands import AS_STORED, Bools, Reading, holes_in
from pairs.images import IGNORE, Bytes, read_label, read_pixels, read_size
from pairs.labels import LabelEncoding
from pairs.memo import Stamp, stamp_of
from pairs.splits import Pair
from runtime.errors import DataFault, UserError, visible

SUMMED = 4099  # words of 8 bytes in a row of `sum_of`: no whole number of pages
SAMPLES = 16  # pairs that are summed up when a cache is opened, for files of zeros


class Source(ABC):
    """Windows of the pairs of a split.

    Attributes:
        pairs: the files.
        encoding: of the labels.
        sizes: (height, width) of each pair.
        num_channels: of each pair.
    """

    pairs: tuple[Pair, ...]
    encoding: LabelEncoding
    sizes: list[tuple[int, int]]
    num_channels: int

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, number: int, top: int, left: int, side: int) -> Tensor:
        """Return the channels (P, h, w) of a window of a pair: a view, not to be written to.

        The window is cut where the image ends, so h and w may be less than `side`.

        Raises:
            DataFault: a file is gone, has changed, or cannot be decoded.
        """
        return self.channels(number)[:, top : top + side, left : left + side]

    @abstractmethod
    def channels(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W), not to be written to."""


class FileSource(Source):
    """Decodes the files, keeping the last decoded pairs in memory.

    Args:
        pairs: the files.
        encoding: of the labels.
        reading: how images become RGB bytes.
        stamps: of the files, if they were looked at before; they must not have changed since.
        sizes: of the pairs, if they are known.
        keep_bytes: how much each process keeps; the last pair always stays, so that sixteen patches
            of one LEVIR-CD image decode it once as long as they come in order.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        encoding: LabelEncoding,
        reading: Reading = AS_STORED,
        *,
        stamps: Mapping[Path, Stamp] | None = None,
        sizes: Mapping[Pair, tuple[int, int]] | None = None,
        keep_bytes: int = 2**28,
    ) -> None:
        self.pairs = tuple(pairs)
        self.encoding = encoding
        self.reading = reading
        self.num_channels = 6 + len(self.pairs[0].labels)
        self.keep_bytes = keep_bytes
        stamps = stamps or {path: stamp_of(path) for pair in pairs for path in pair.files}
        self.stamps = {path: stamps[path] for pair in pairs for path in pair.files}
        self.sizes = [sizes[pair] if sizes else read_size(pair.label) for pair in pairs]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}  # pixels do not travel to workers

    def channels(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W), decoded if it is not one of the last."""
        try:
            self.check_unchanged(number)
            channels = self._kept.pop(number, None)
            if channels is None:
                channels = self.decode(number)
                self._kept_bytes += channels.nbytes
        except UserError as error:
            raise DataFault(str(error)) from None
        self._kept[number] = channels
        while self._kept_bytes > self.keep_bytes and len(self._kept) > 1:
            self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return channels

    def decode(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W) and keep nothing."""
        pair = self.pairs[number]
        arrays = self.read_files(number)
        channels = stack_files(pair, arrays)
        if channels.shape[1:] != self.sizes[number]:
            raise UserError(f"{pair.label}: {channels.shape[1:]} is not {self.sizes[number]}")
        channels[6:] = encode_labels(pair, channels[6:], self.encoding, holes_in(arrays))
        return torch.from_numpy(channels)

    def read_files(self, number: int) -> list[Bytes]:
        """Return images (H, W, 3 or 4) of a pair, and labels (H, W) as their files write them."""
        pair = self.pairs[number]
        labels = [read_label(path, self.encoding.colors) for path in pair.labels]
        images = [read_pixels(path, self.reading) for path in (pair.before, pair.after)]
        return [*(image.stacked() for image in images), *labels]

    def check_unchanged(self, number: int) -> None:
        """Raise UserError if a file of the pair is no longer what it was at the start."""
        pair = self.pairs[number]
        for path in pair.files:
            if stamp_of(path) != self.stamps[path]:
                raise UserError(f"{pair.name}: {path} changed during the run")

    def _forget(self) -> None:
        self._kept: dict[int, Tensor] = {}  # the one used last stands last
        self._kept_bytes = 0


class CachedSource(Source):
    """Pairs decoded before, from a file that is mapped into memory or from memory itself.

    Args:
        files: what was decoded; a pair that is damaged in the cache comes from there again.
        pixels: the file, or (bytes,) uint8.
    """

    def __init__(self, files: FileSource, pixels: Path | Tensor) -> None:
        self.pairs, self.encoding, self.sizes = files.pairs, files.encoding, files.sizes
        self.num_channels = files.num_channels
        self.files = files
        self._offsets = offsets_of(files.pairs, files.sizes)
        self._mapped: _Mapped | None = None
        self._pixels = pixels
        if isinstance(pixels, Path):
            self._mapped = self._map(pixels)

    def _map(self, path: Path) -> "_Mapped":
        return _Mapped(path, self._offsets, 6 / self.num_channels)

    def __getstate__(self) -> dict[str, Any]:
        # a file is mapped anew by each process; torch passes memory on without copying it
        return {**self.__dict__, "_mapped": None}

    def channels(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W)."""
        if isinstance(self._pixels, Tensor):
            start, end = self._offsets[number : number + 2]
            pixels: Tensor | None = self._pixels[start:end]
        else:
            if self._mapped is None:
                with contextlib.suppress(OSError):  # it went before this process began
                    self._mapped = self._map(self._pixels)
            pixels = self._mapped.pair(number) if self._mapped else None
        if pixels is None:
            return self.files.channels(number)
        return pixels.view(self.num_channels, *self.sizes[number])

    def is_whole(self) -> bool:
        """Whether some pairs, spread over all, are as they were written."""
        step = max(1, len(self) // SAMPLES)
        return self._mapped is None or all(
            self._mapped.pair(number) is not None for number in range(0, len(self), step)
        )


class _Mapped:
    """A cache file in memory, whose pairs are summed up before they are used.

    Args:
        path: of the file.
        offsets: of the pairs, and where they end.
        share: of the images in a pair's bytes; the rest are its labels.

    Raises:
        OSError: it is not there, or is no cache of these pairs.
    """

    def __init__(self, path: Path, offsets: Sequence[int], share: float) -> None:
        self.path, self.offsets, self.share = path, offsets, share
        self.size = offsets[-1] + 4 * len(offsets)
        if not path.is_file():  # a pipe of that name would be waited for
            raise FileNotFoundError(f"{path}: is not there")
        self.file = path.open("rb")
        weakref.finalize(self, self.file.close)
        if os.fstat(self.file.fileno()).st_size != self.size:
            raise OSError(f"{path}: has another size than it should")
        # private: what is written into a window does not reach the file
        self.map = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_COPY)
        self.pixels = torch.frombuffer(self.map, dtype=torch.uint8, count=offsets[-1])
        sums = np.frombuffer(self.map, "<u4", len(offsets), offsets[-1])
        self.is_crc = sum_of_sums(sums[:-1], is_crc=True) == sums[-1]  # as it was at first
        if not self.is_crc and sum_of_sums(sums[:-1]) != sums[-1]:
            raise OSError(f"{path}: is damaged")
        self.sums: list[int] = sums[:-1].tolist()
        self.state = self._look()
        self.proved = bytearray(len(self.sums))
        self.is_damaged = False

    def pair(self, number: int) -> Tensor | None:
        """Return the bytes of a pair, None if they are damaged."""
        state = self._look()
        if state != self.state:  # somebody has written to the file: nothing is proved any more
            self.state, self.proved = state, bytearray(len(self.sums))
        if state[0] != self.size:  # to look behind the end of a file kills the process
            self._say_damaged()
            return None
        pixels = self.pixels[self.offsets[number] : self.offsets[number + 1]]
        if not self.proved[number]:
            if self._sum(pixels.numpy()) != self.sums[number]:
                self._say_damaged()
                return None
            self.proved[number] = True
        return pixels

    def _sum(self, pair: Bytes) -> int:
        if self.is_crc:
            return zlib.crc32(pair.data)
        images = round(len(pair) * self.share)
        return sum_of(pair[images:], sum_of(pair[:images]))

    def _look(self) -> tuple[int, int, int]:
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _say_damaged(self) -> None:
        """Say it once, and let the next start build the cache anew."""
        if not self.is_damaged:
            self.is_damaged = True
            with contextlib.suppress(OSError):
                self.path.unlink()
            text = f"warning: {self.path}: is damaged, and its pairs are decoded again"
            print(visible(text), file=sys.stderr, flush=True)


class Subset(Source):
    """Some pairs of a source.

    Args:
        source: all of them.
        numbers: of those to take, in this order.
    """

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        self.pairs = tuple(source.pairs[i] for i in numbers)
        self.sizes = [source.sizes[i] for i in numbers]
        self.encoding, self.num_channels = source.encoding, source.num_channels
        self.source, self.numbers = source, numbers

    def channels(self, number: int) -> Tensor:
        """Return a whole pair (P, H, W)."""
        return self.source.channels(self.numbers[number])


def sum_of(data: Bytes, start: int = 0) -> int:
    """Return a check sum of contiguous bytes, in a fifth of the time of a CRC-32.

    The words of 8 bytes are added up in `SUMMED` columns, and these sums have a CRC-32: one flipped
    bit always shows, and so do pages that are zero, or at the place of others.
    """
    flat = data.reshape(-1)
    whole = flat.size // (8 * SUMMED) * 8 * SUMMED
    columns = flat[:whole].view("<u8").reshape(-1, SUMMED)
    start = zlib.crc32(np.add.reduce(columns, axis=0, dtype="<u8").data, start)
    return zlib.crc32(flat[whole:].data, start)


def sum_of_sums(sums: np.ndarray, *, is_crc: bool = False) -> int:
    """Return what stands behind the sums of a cache, and tells which kind they are."""
    return zlib.crc32(sums.tobytes(), 0 if is_crc else SUMMED)


def stack_files(pair: Pair, arrays: Sequence[Bytes]) -> Bytes:
    """Put the decoded files of a pair together: (P, H, W), labels as their files write them.

    Where a date has no data, both are black, as in prediction.
    """
    size = arrays[2].shape
    channels = np.empty((4 + len(arrays), *size), np.uint8)
    for path, array, part in zip(
        pair.files, arrays, (channels[:3], channels[3:6], *channels[6:]), strict=True
    ):
        if array.shape[:2] != size:
            raise UserError(f"{path}: {array.shape[:2]} does not match {pair.label}'s {size}")
        part[:] = array[..., :3].transpose(2, 0, 1) if array.ndim == 3 else array
    if (holes := holes_in(arrays)) is not None:
        channels[:6, holes] = 0
    return channels


def encode_labels(
    pair: Pair, labels: Bytes, encoding: LabelEncoding, holes: Bools | None = None
) -> Bytes:
    """Return the classes (L, H, W) of labels as their files write them.

    Holes are ignored, and where the labels of both dates disagree on whether anything changed.
    """
    classes = np.stack(
        [encoding.decode(raw, path) for raw, path in zip(labels, pair.labels, strict=True)]
    )
    if pair.label_after is not None:
        before, after = classes
        classes[:, (before == 0) != (after == 0)] = IGNORE
    if holes is not None:
        classes[:, holes] = IGNORE
    return classes


def offsets_of(pairs: Sequence[Pair], sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return where each pair begins in the cache, and behind the last its end."""
    channels = 6 + len(pairs[0].labels)
    lengths = [channels * h * w for h, w in sizes]
    return [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
