"""What reading each file of a dataset shows, read in threads and remembered (`memo.py`)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pairs.bands import Bools, Reading, holes_in
from pairs.images import Bytes, Pixels, is_lossy, read_label, read_pixels
from pairs.labels import Classes, LabelEncoding, label_values
from pairs.memo import Memo, Stamp, short_hash, stamp_of
from pairs.splits import Layout, Pair
from pairs.threads import in_threads
from runtime.errors import UserError

# Takes a decoded pair: images (H, W, 3 or 4), see `Pixels.stacked`, and labels (H, W) as their
# files write them
Keep = Callable[[Pair, Sequence[Bytes]], None]
# The files that are decoded, and what does it: what each file showed, by file and kind
Job = tuple[Sequence[Path], Callable[[], dict[tuple[Path, str], "FileRecord"]]]


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
        has_holes: of an image, whether it lacks data anywhere.
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
    has_holes: bool = False
    fault: str = ""


class Reader:
    """Reads files that are not in the memo.

    Attributes:
        stamps: of every file that is there.
        cut: what labels show where both dates have data, of pairs with holes.
    """

    def __init__(self, classes: Classes, reading: Reading, crop_size: int, memo: Memo) -> None:
        self.classes, self.crop_size, self.memo = classes, crop_size, memo
        self.reading, self.image_kind = reading, f"image {reading}"
        self.jpeg_coding = LabelEncoding((0, 128, 255) if classes.num_labels == 3 else (0, 255))
        self.first_value = classes.values[0] if classes.values else 0
        self.label_kind = (
            f"label {classes.num_labels} {self.first_value} {crop_size} {classes.colors or ''}"
        )
        self.stamps: dict[Path, Stamp] = {}
        self.cut: dict[tuple[Pair, Path], FileRecord] = {}

    def read(
        self,
        layout: Layout,
        begin: Callable[[Mapping[Path, Stamp]], Mapping[str, Keep]] | None = None,
    ) -> dict[Path, FileRecord]:
        """Return what every file shows; hand the pairs of some splits on as they are decoded."""
        records: dict[Path, FileRecord] = {}
        pairs = [pair for split in layout.splits.values() for pair in split]
        for pair in pairs:
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
        self._run(list(self._jobs(layout, keep, records)), records)
        self._run(list(self._jobs_of_cut(pairs, records)), records)
        self.memo.save()
        return records

    def _run(self, jobs: Sequence[Job], records: dict[Path, FileRecord]) -> None:
        for new in in_threads(jobs, "reading", "files"):
            for (path, kind), record in new.items():
                if kind in (self.label_kind, self.image_kind):
                    records[path] = record
                if not record.fault:
                    self.memo.put(path, kind, self.stamps[path], asdict(record))

    def _jobs(
        self, layout: Layout, keep: Mapping[str, Keep], records: Mapping[Path, FileRecord]
    ) -> Iterator[Job]:
        """What to decode: whole pairs where they are kept, else the files that are not known."""
        seen = set(records)
        for name, split in layout.splits.items():
            for pair in split:
                new = [path for path in pair.files if path not in seen]
                seen.update(new)
                if name in keep and all(path in self.stamps for path in pair.files):
                    yield pair.files, partial(self._read, pair, pair.files, new, keep[name])
                elif new:
                    yield new, partial(self._read, pair, new, new, None)

    def _jobs_of_cut(
        self, pairs: Sequence[Pair], records: Mapping[Path, FileRecord]
    ) -> Iterator[Job]:
        """Look up what labels show where there is data, and decode the pairs that nobody knows."""
        for pair in pairs:
            of_pair = [records[path] for path in pair.files]
            is_whole = all(not r.fault and r.size == of_pair[0].size for r in of_pair)
            if not is_whole or not (of_pair[0].has_holes or of_pair[1].has_holes):
                continue
            kind = self._cut_kind(pair)
            for path in pair.labels:
                found = self.memo.get(path, kind, self.stamps[path])
                if found is not None:
                    self.cut[pair, path] = _from_json(found)
            if any((pair, path) not in self.cut for path in pair.labels):
                yield pair.files, partial(self._read, pair, pair.files, [], None)

    def _read(
        self, pair: Pair, paths: Sequence[Path], new: Sequence[Path], keep: Keep | None
    ) -> dict[tuple[Path, str], FileRecord]:
        """Decode files of a pair, look at the new ones, and hand all of them on."""
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
        if is_whole and len(paths) == len(pair.files) and (holes := holes_in(arrays)) is not None:
            for path, array in zip(pair.labels, arrays[2:], strict=True):
                self.cut[pair, path] = record = self._inspect_label(path, array, ~holes)
                found[path, self._cut_kind(pair)] = record
        if keep and is_whole:
            keep(pair, arrays)
        return found

    def _cut_kind(self, pair: Pair) -> str:
        images = [(str(path), self.stamps[path]) for path in (pair.before, pair.after)]
        return f"{self.label_kind} {short_hash((images, self.reading))}"

    def _kind(self, pair: Pair, path: Path) -> str:
        return self.label_kind if path in pair.labels else self.image_kind

    def _decode(self, pair: Pair, path: Path) -> tuple[Bytes, Pixels | None]:
        if path in pair.labels:
            return read_label(path, self.classes.colors), None
        image = read_pixels(path, self.reading)
        return image.stacked(), image

    def _inspect(self, path: Path, array: Bytes, image: Pixels | None) -> FileRecord:
        if image is None:
            return self._inspect_label(path, array)
        return FileRecord(
            array.shape[:2],
            _digest(array),
            bands=image.bands,
            remarks=image.remarks,
            has_holes=image.valid is not None,
        )

    def _inspect_label(self, path: Path, array: Bytes, has_data: Bools | None = None) -> FileRecord:
        label_values(array, path)
        lossy = is_lossy(path)
        if lossy:
            snapped = self.jpeg_coding.decode(array, path)
            array = np.array(self.jpeg_coding.values, dtype=np.uint8)[snapped]
        return FileRecord(
            array.shape,
            _digest(array),
            _count(array if has_data is None else array[has_data]),
            _count_uniform(array, self.crop_size, has_data),
            _digest(np.packbits(array == self.first_value)),
            lossy,
        )


def _from_json(record: dict) -> FileRecord:
    pixels, uniform = (
        {int(value): count for value, count in record[name].items()}
        for name in ("pixels", "uniform")
    )
    height, width = record["size"]
    return FileRecord(
        (height, width),
        record["digest"],
        pixels,
        uniform,
        record["outline"],
        record["is_lossy"],
        record["bands"],
        tuple(record["remarks"]),
        record["has_holes"],
    )


def _digest(array: Bytes) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def _count(raw: Bytes) -> dict[int, int]:
    counts = np.bincount(raw.ravel(), minlength=256)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _count_uniform(raw: Bytes, side: int, has_data: Bools | None = None) -> dict[int, int]:
    found: dict[int, int] = {}
    for top in range(0, raw.shape[0], side):
        for left in range(0, raw.shape[1], side):
            place = slice(top, top + side), slice(left, left + side)
            values = raw[place] if has_data is None else raw[place][has_data[place]]
            if values.size and (values == values.flat[0]).all():
                found[int(values.flat[0])] = found.get(int(values.flat[0]), 0) + 1
    return found
