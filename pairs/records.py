"""What reading each file of a dataset shows, read in threads and remembered (`memo.py`)."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pairs.bands import Reading
from pairs.images import Bytes, Pixels, is_lossy, read_label, read_pixels
from pairs.labels import Classes, MaskCoding, label_values
from pairs.memo import Memo, Stamp, stamp_of
from pairs.splits import Layout, Pair
from runtime.errors import UserError
from runtime.progress import Bar

# Takes a decoded pair: images (H, W, 3 or 4), see `Pixels.stacked`, and labels (H, W) as their
# files write them
Keep = Callable[[Pair, Sequence[Bytes]], None]


@dataclass(frozen=True)
class FileRecord:
    """What reading one file showed.

    Attributes:
        size: (height, width).
        digest: of the decoded pixels.
        pixels: of a label, the number of pixels of each value.
        uniform: of a label, the number of grid patches that hold one value alone, by value.
        outline: of a label, the digest of where it holds the value of class 0.
        is_lossy: of a label, whether it carries JPEG's noise.
        bands: of an image, those in use.
        remarks: of an image, what is odd about it.
        fault: why it cannot be used.
    """

    size: tuple[int, int] = (0, 0)
    digest: str = ""
    pixels: dict[int, int] = field(default_factory=dict)
    uniform: dict[int, int] = field(default_factory=dict)
    outline: str = ""
    is_lossy: bool = False
    bands: str = ""
    remarks: tuple[str, ...] = ()
    fault: str = ""


class Reader:
    """Reads files that are not in the memo, in threads: Pillow decodes without the GIL."""

    def __init__(self, classes: Classes, reading: Reading, crop_size: int, memo: Memo) -> None:
        self.classes, self.crop_size, self.memo = classes, crop_size, memo
        self.reading, self.image_kind = reading, f"image {reading}"
        self.jpeg_coding = MaskCoding((0, 128, 255) if classes.num_labels == 3 else (0, 255))
        self.first_value = classes.values[0] if classes.values else 0
        self.label_kind = (
            f"label {classes.num_labels} {self.first_value} {crop_size} {classes.colors or ''}"
        )
        self.stamps: dict[Path, Stamp] = {}

    def read(
        self,
        layout: Layout,
        begin: Callable[[Mapping[Path, Stamp]], Mapping[str, Keep]] | None = None,
    ) -> dict[Path, FileRecord]:
        """Return what every file shows; hand the pairs of some splits on as they are decoded."""
        records: dict[Path, FileRecord] = {}
        for pair in (pair for split in layout.splits.values() for pair in split):
            for path in pair.files:
                if path not in self.stamps and path not in records:
                    try:
                        self.stamps[path] = stamp_of(path)
                    except UserError as error:
                        records[path] = FileRecord(fault=str(error))
                        continue
                    found = self.memo.get(path, self._kind(pair, path), self.stamps[path])
                    if found is not None:
                        records[path] = _from_json(found)
        keep = begin(self.stamps) if begin else {}
        jobs = list(self._jobs(layout, keep, records))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            done = pool.map(lambda job: job(), jobs)
            try:
                for new in Bar(done, "reading", total=len(jobs), unit="files", delay=1):
                    for (path, kind), record in new.items():
                        records[path] = record
                        if not record.fault:
                            self.memo.put(path, kind, self.stamps[path], asdict(record))
            except BaseException:  # Ctrl-C: leave now, not after the files that are queued
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.memo.save()
        return records

    def _jobs(
        self, layout: Layout, keep: Mapping[str, Keep], records: Mapping[Path, FileRecord]
    ) -> Iterator[Callable[[], dict[tuple[Path, str], FileRecord]]]:
        """What to decode: whole pairs where they are kept, else the files that are not known."""
        seen = set(records)
        for name, split in layout.splits.items():
            for pair in split:
                new = [path for path in pair.files if path not in seen]
                seen.update(new)
                if name in keep and all(path in self.stamps for path in pair.files):
                    yield partial(self._read, pair, pair.files, new, keep[name])
                elif new:
                    yield partial(self._read, pair, new, new, None)

    def _read(
        self, pair: Pair, paths: Sequence[Path], new: Sequence[Path], keep: Keep | None
    ) -> dict[tuple[Path, str], FileRecord]:
        """Decode some files of a pair, look at the new ones, and hand all of them on."""
        found, arrays = {}, []
        for path in paths:
            try:
                array, image = self._decode(pair, path)
                record = self._inspect(path, array, image) if path in new else None
                if stamp_of(path) != self.stamps[path]:
                    raise UserError(f"{path}: changed while it was read; start again")
                arrays.append(array)
            except UserError as error:
                record = FileRecord(fault=str(error))
            if record is not None:
                found[path, self._kind(pair, path)] = record
        is_whole = len(arrays) == len(paths) and len({array.shape[:2] for array in arrays}) == 1
        if keep and is_whole:
            keep(pair, arrays)
        return found

    def _kind(self, pair: Pair, path: Path) -> str:
        return self.label_kind if path in pair.labels else self.image_kind

    def _decode(self, pair: Pair, path: Path) -> tuple[Bytes, Pixels | None]:
        if path in pair.labels:
            return read_label(path, self.classes.colors), None
        image = read_pixels(path, self.reading)
        return image.stacked(), image

    def _inspect(self, path: Path, array: Bytes, image: Pixels | None) -> FileRecord:
        if image is not None:
            said = {"bands": image.bands, "remarks": image.remarks}
            return FileRecord(array.shape[:2], _digest(array), **said)  # type: ignore[arg-type]
        label_values(array, path)
        lossy = is_lossy(path)
        if lossy:
            snapped = self.jpeg_coding.decode(array, path)
            array = np.array(self.jpeg_coding.values, dtype=np.uint8)[snapped]
        return FileRecord(
            array.shape,
            _digest(array),
            _count(array),
            _count_uniform(array, self.crop_size),
            _digest(np.packbits(array == self.first_value)),
            lossy,
        )


def _from_json(record: dict) -> FileRecord:
    pixels, uniform = (
        {int(value): count for value, count in record[name].items()}
        for name in ("pixels", "uniform")
    )
    height, width = record["size"]
    rest = record["outline"], record["is_lossy"], record["bands"], tuple(record["remarks"])
    return FileRecord((height, width), record["digest"], pixels, uniform, *rest)


def _digest(array: Bytes) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def _count(raw: Bytes) -> dict[int, int]:
    counts = np.bincount(raw.ravel(), minlength=256)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _count_uniform(raw: Bytes, side: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for top in range(0, raw.shape[0], side):
        for left in range(0, raw.shape[1], side):
            patch = raw[top : top + side, left : left + side]
            if (patch == patch[0, 0]).all():
                found[int(patch[0, 0])] = found.get(int(patch[0, 0]), 0) + 1
    return found
