"""Read a whole dataset once before training, name every fault at once, and sum it up.

What was found is remembered (`memo.py`), so that a second start is instant. Where a cache is to be
filled, it takes the pixels that are decoded here: no file is decoded twice.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from pairs.bands import AS_STORED, Reading
from pairs.images import Bytes, Pixels, is_lossy, read_label, read_pixels
from pairs.labels import Classes, MaskCoding, choose_mask_coding, label_values
from pairs.memo import Memo, Stamp, stamp_of
from pairs.splits import Layout, Pair, listing
from runtime.errors import UserError, visible
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


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers."""

    pairs: int
    sizes: tuple[tuple[int, int], ...]
    patches: int
    empty_patches: int
    class_pixels: tuple[int, ...]

    @property
    def change_share(self) -> float:
        """Share of the counted pixels that are not class 0."""
        return sum(self.class_pixels[1:]) / max(1, sum(self.class_pixels))

    @property
    def holds_change(self) -> bool:
        """Whether a score of it can tell a good model from one that never sees a change."""
        return any(self.class_pixels[1:])


@dataclass(frozen=True)
class DataSummary:
    """A dataset that may be trained on.

    Attributes:
        layout: its pairs, without those that were left out.
        encoding: what the label values mean.
        splits: numbers by split.
        warnings: what is odd but may be meant.
        fingerprint: of names and pixels; tells on resuming whether the data is the same.
        reading: how images become RGB bytes.
        bands: those of the images that are in use, in words.
        skipped: why pairs were left out, one line a fault.
        stamps: of every file, as it was when it was read.
        sizes: (height, width) of every pair.
    """

    layout: Layout
    encoding: MaskCoding
    splits: dict[str, SplitSummary]
    warnings: tuple[str, ...] = ()
    fingerprint: str = ""
    reading: Reading = AS_STORED
    bands: str = ""
    skipped: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False, compare=False)
    sizes: Mapping[Pair, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def table(self) -> str:
        """Return a small table: pairs, sizes, share of change, share of empty patches."""
        lines = [f"{'split':8}{'pairs':>7}  {'size':14}{'patches':>8}{'empty':>8}{'change':>9}"]
        for name, split in self.splits.items():
            sizes = sorted(split.sizes)
            size = f"{sizes[0][1]} x {sizes[0][0]}" + (" ..." if len(sizes) > 1 else "")
            lines.append(
                f"{name:8}{split.pairs:7}  {size:14}{split.patches:8}"
                f"{split.empty_patches / max(1, split.patches):8.0%}{split.change_share:9.2%}"
            )
        return "\n".join(lines)


def check(
    layout: Layout,
    classes: Classes,
    *,
    reading: Reading = AS_STORED,
    crop_size: int = 256,
    memo: Path | None = None,
    begin: Callable[[Mapping[Path, Stamp]], Mapping[str, Keep]] | None = None,
    skip_broken: bool = False,
) -> DataSummary:
    """Read every file of every split that has changed since it was last read.

    Args:
        layout: the pairs.
        classes: what is known of the labels' classes.
        reading: how images become RGB bytes.
        crop_size: side of the patches that are counted.
        memo: a folder to remember results in; not writable is no fault.
        begin: takes the stamps of all files that are there, and returns by split what takes each of
            its pairs when it is decoded, called in threads; such pairs are decoded in any case.
        skip_broken: leave out pairs with a fault instead of raising.

    Raises:
        UserError: lists every fault: unreadable files, sizes that differ within a pair, label
            values that are no class.
    """
    reader = _Reader(classes, reading, crop_size, Memo(memo, layout.root))
    records = reader.read(layout, begin)
    faults = {
        pair: found
        for split in layout.splits.values()
        for pair in split
        if (found := _faults(pair, records))
    }
    if skip_broken:
        faults |= _strange_labels(layout, classes, records, faults)
    lines = sorted({line for found in faults.values() for line in found})
    if lines and not skip_broken:
        headline = f"{layout.root}: {len(lines)} faults in the data (--skip-broken leaves them out)"
        raise UserError(listing(headline, lines))
    if faults:
        layout = _without(layout, faults)

    labels = [path for split in layout.splits.values() for pair in split for path in pair.labels]
    examples = {value: path for path in labels for value in records[path].pixels}
    encoding = choose_mask_coding(examples, classes, examples)
    splits = {
        name: _summarize(split, records, encoding, crop_size)
        for name, split in layout.splits.items()
    }
    return DataSummary(
        layout,
        encoding,
        splits,
        warnings=tuple(_warnings(layout, splits, records, encoding)),
        fingerprint=_fingerprint(layout, records),
        reading=reading,
        bands=_bands_in_use(records[path].bands for path in _images(layout)),
        skipped=(*layout.skipped, *lines),
        stamps=reader.stamps,
        sizes={pair: records[pair.label].size for s in layout.splits.values() for pair in s},
    )


def show(summary: DataSummary) -> None:
    """Print what there is, and what is odd about it."""
    layout = summary.layout
    print(f"data    {layout.root} ({layout.description})\n{summary.table()}")
    print(f"bands   {summary.bands}")
    notes = [*layout.notes, *summary.warnings]
    if summary.skipped:
        notes.append(listing(f"{len(summary.skipped)} faults, pairs left out", summary.skipped))
    for warning in notes:
        print(f"warning: {visible(warning)}")


class _Reader:
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


def _faults(pair: Pair, records: Mapping[Path, FileRecord]) -> list[str]:
    """Say what is wrong with the files of a pair: unreadable, or not of one size."""
    label = records[pair.label]
    unreadable = [records[path].fault for path in pair.files if records[path].fault]
    return unreadable + [
        f"{path}: {_text(records[path].size)}, but its label {pair.label} is {_text(label.size)}"
        for path in (pair.before, pair.after, *pair.labels[1:])
        if not records[path].fault and not label.fault and records[path].size != label.size
    ]


def _strange_labels(
    layout: Layout,
    classes: Classes,
    records: Mapping[Path, FileRecord],
    broken: Collection[Pair],
) -> dict[Pair, list[str]]:
    """Name the labels with values that are no class, as long as they are few.

    The values of the fewest pairs are given up first, until those that are left mean something.
    """
    pairs = [p for split in layout.splits.values() for p in split if p not in broken]
    values = {pair: {v for p in pair.labels for v in records[p].pixels} for pair in pairs}
    strange: dict[Pair, list[str]] = {}
    while True:
        left = Counter(v for pair, found in values.items() if pair not in strange for v in found)
        try:
            choose_mask_coding(left, classes)
        except UserError:
            rarest = min(left, key=left.__getitem__, default=None)
            given_up = [pair for pair in pairs if rarest in values[pair] and pair not in strange]
            if rarest is None or 2 * (len(strange) + len(given_up)) > len(pairs):
                return {}  # it is not a few labels that are wrong: the error will list all values
            for pair in given_up:
                strange[pair] = [f"{pair.label}: holds the value {rarest}, which is no class"]
        else:
            return strange


def _without(layout: Layout, broken: Collection[Pair]) -> Layout:
    def whole(splits: Mapping[str, Sequence[Pair]]) -> dict[str, tuple[Pair, ...]]:
        return {name: tuple(p for p in split if p not in broken) for name, split in splits.items()}

    splits = whole(layout.splits)
    for name, split in splits.items():
        if not split:
            raise UserError(f"{layout.root}: every pair of the {name} split has a fault")
    trained_as = layout.trained_as and whole(layout.trained_as)
    return replace(layout, splits=splits, trained_as=trained_as)


def _warnings(
    layout: Layout,
    splits: Mapping[str, SplitSummary],
    records: Mapping[Path, FileRecord],
    encoding: MaskCoding,
) -> Iterator[str]:
    for name, summary in splits.items():
        if not summary.holds_change:
            yield f"the {name} split holds no change: its scores will say little"
        elif summary.change_share == 1:
            yield f"the {name} split holds nothing but change: its scores will say little"
    pairs = [pair for split in layout.splits.values() for pair in split]
    if jpegs := sum(records[path].is_lossy for pair in pairs for path in pair.labels):
        yield f"{jpegs} labels are JPEGs: their noise is snapped to {encoding.values}"
    if disagreeing := [p for p in pairs if len({records[path].outline for path in p.labels}) > 1]:
        yield (
            f"{len(disagreeing)} pairs have labels that disagree on where anything changed; such "
            f"pixels are ignored ({disagreeing[0].label}, ...)"
        )
    if odd := [remark for path in _images(layout) for remark in records[path].remarks]:
        yield f"{odd[0]}{f' ({len(odd)} such remarks)' if len(odd) > 1 else ''}"
    yield from _twins(layout, records)


def _images(layout: Layout) -> list[Path]:
    pairs = [pair for split in layout.splits.values() for pair in split]
    return [path for pair in pairs for path in (pair.before, pair.after)]


def _bands_in_use(bands: Iterable[str]) -> str:
    """Return the bands of all images, the most frequent kind first."""
    found = Counter(bands).most_common(5)
    if len(found) == 1:
        return found[0][0]
    return "; ".join(f"{text}: {count} images" for text, count in found)


def _fingerprint(layout: Layout, records: Mapping[Path, FileRecord]) -> str:
    content = [
        (name, pair.name, *(records[path].digest for path in pair.files))
        for name, split in (layout.trained_as or layout.splits).items()
        for pair in split
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _summarize(
    split: Sequence[Pair], records: Mapping[Path, FileRecord], encoding: MaskCoding, side: int
) -> SplitSummary:
    labels = [records[pair.label] for pair in split]
    all_labels = [records[path] for pair in split for path in pair.labels]
    return SplitSummary(
        pairs=len(labels),
        sizes=tuple(sorted({label.size for label in labels})),
        patches=sum(-(-h // side) * -(-w // side) for h, w in (label.size for label in labels)),
        empty_patches=sum(label.uniform.get(encoding.values[0], 0) for label in labels),
        class_pixels=tuple(sum(r.pixels.get(v, 0) for r in all_labels) for v in encoding.values),
    )


def _twins(layout: Layout, records: Mapping[Path, FileRecord]) -> list[str]:
    """Name the images that lie in two splits: a score on them is no score."""
    seen: dict[str, tuple[str, Path]] = {}
    found = []
    for name, split in layout.splits.items():
        for path in (path for pair in split for path in (pair.before, pair.after)):
            first = seen.setdefault(records[path].digest, (name, path))
            if first[0] != name:
                found.append(f"{path} ({name}) is the same image as {first[1]} ({first[0]})")
    return found[:20] + ([f"... and {len(found) - 20} more"] if len(found) > 20 else [])


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
