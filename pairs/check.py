"""Read a whole dataset once before training, name every fault at once, and sum it up.

What was found is remembered (`memo.py`), so that a second start is instant. Where a cache is to be
filled, it takes the pixels that are decoded here: no file is decoded twice.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pairs.bands import AS_STORED, Reading
from pairs.labels import Classes, LabelEncoding, choose_encoding
from pairs.memo import Memo, Stamp
from pairs.records import FileRecord, Keep, Reader
from pairs.splits import Layout, Pair, listing
from runtime.errors import UserError, counted, visible


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
    encoding: LabelEncoding
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
    reader = Reader(classes, reading, crop_size, Memo(memo, layout.root))
    records = reader.read(layout, begin)
    pairs = [pair for split in layout.splits.values() for pair in split]
    faults = {pair: found for pair in pairs if (found := _faults(pair, records))}
    if skip_broken:
        faults |= _strange_labels(layout, classes, records, faults)
    lines = sorted({line for found in faults.values() for line in found})
    if lines and not skip_broken:
        headline = f"{layout.root}: {counted(len(lines), 'fault')} in the data"
        raise UserError(listing(f"{headline} (--skip-broken leaves them out)", lines))
    if faults:
        layout = _without(layout, faults)

    labels = [path for split in layout.splits.values() for pair in split for path in pair.labels]
    examples = {value: path for path in labels for value in records[path].pixels}
    encoding = choose_encoding(examples, classes, examples)
    splits = {
        name: _summarize(split, records, reader.cut, encoding, crop_size)
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
        notes.append(
            listing(f"{counted(len(summary.skipped), 'fault')}, pairs left out", summary.skipped)
        )
    for warning in notes:
        print(f"warning: {visible(warning)}")


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
            choose_encoding(left, classes)
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
    encoding: LabelEncoding,
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
    return "; ".join(f"{text}: {counted(count, 'image')}" for text, count in found)


def _fingerprint(layout: Layout, records: Mapping[Path, FileRecord]) -> str:
    content = [
        (name, pair.name, *(records[path].digest for path in pair.files))
        for name, split in (layout.trained_as or layout.splits).items()
        for pair in split
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _summarize(
    split: Sequence[Pair],
    records: Mapping[Path, FileRecord],
    cut: Mapping[tuple[Pair, Path], FileRecord],
    encoding: LabelEncoding,
    side: int,
) -> SplitSummary:
    """Return a split in numbers; pixels without data are in none of its classes."""
    by_pair = [[cut.get((pair, path), records[path]) for path in pair.labels] for pair in split]
    firsts = [records[0] for records in by_pair]
    all_labels = [record for records in by_pair for record in records]
    return SplitSummary(
        pairs=len(split),
        sizes=tuple(sorted({label.size for label in firsts})),
        patches=sum(-(-h // side) * -(-w // side) for h, w in (label.size for label in firsts)),
        empty_patches=sum(label.uniform.get(encoding.values[0], 0) for label in firsts),
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
