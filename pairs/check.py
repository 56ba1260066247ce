"""Read a whole dataset once before training, name every fault at once, and sum it up.

What was found is remembered by (path, size, time of change), so that a second start is instant.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pairs.images import Bytes, is_lossy, read_image, read_label
from pairs.labels import Classes, MaskCoding, choose_mask_coding, label_values
from pairs.layouts import Layout, Pair, listing
from runtime.errors import UserError, visible

MAX_FILES = 100_000  # in the memo
MAX_KINDS = 4  # of records of one file in it


@dataclass(frozen=True)
class FileRecord:
    """What reading one file showed.

    Attributes:
        size: (height, width).
        digest: of the decoded pixels.
        pixels: of a label, the number of pixels of each value.
        uniform: of a label, the number of grid patches that hold one value alone, by value.
        outline: of a label, the digest of where it holds the value of class 0.
        fault: why it cannot be used.
    """

    size: tuple[int, int] = (0, 0)
    digest: str = ""
    pixels: dict[int, int] = field(default_factory=dict)
    uniform: dict[int, int] = field(default_factory=dict)
    outline: str = ""
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


@dataclass(frozen=True)
class DataSummary:
    """A dataset that may be trained on.

    Attributes:
        coding: what the label values mean.
        splits: numbers by split.
        warnings: what is odd but may be meant.
        fingerprint: of names and pixels; tells on resuming whether the data is the same.
    """

    coding: MaskCoding
    splits: dict[str, SplitSummary]
    warnings: tuple[str, ...] = field(default=())
    fingerprint: str = ""

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
    crop_size: int = 256,
    memo: Path | None = None,
) -> DataSummary:
    """Read every file of every split.

    Args:
        layout: the pairs.
        classes: what is known of the labels' classes.
        crop_size: side of the patches that are counted.
        memo: a JSON file to remember results in; not writable is no fault.

    Raises:
        UserError: lists every fault: unreadable files, sizes that differ within a pair, label
            values that are no class.
    """
    pairs = [pair for split in layout.splits.values() for pair in split]
    jpeg_coding = MaskCoding((0, 128, 255) if classes.num_labels == 3 else (0, 255))
    first_value = classes.values[0] if classes.values else 0

    def inspect_image(path: Path) -> FileRecord:
        image = read_image(path)
        return FileRecord(image.shape[:2], _digest(image))

    def inspect_label(path: Path) -> FileRecord:
        raw = read_label(path, classes.colors)
        label_values(raw, path)
        if is_lossy(path):
            raw = np.array(jpeg_coding.values, dtype=np.uint8)[jpeg_coding.decode(raw, path)]
        outline = _digest(np.packbits(raw == first_value))
        return FileRecord(
            raw.shape, _digest(raw), _count(raw), _count_uniform(raw, crop_size), outline
        )

    images = [path for pair in pairs for path in (pair.before, pair.after)]
    with _Memo(memo) as known:
        records = known.inspect(images, inspect_image, "image")
        kind = f"label {classes.num_labels} {first_value} {crop_size} {classes.colors or ''}"
        labels = known.inspect([p for pair in pairs for p in pair.labels], inspect_label, kind)
    records |= labels
    faults = [record.fault for record in records.values() if record.fault]
    faults += [fault for pair in pairs for fault in _size_faults(pair, records)]
    if faults:
        raise UserError(listing(f"{layout.root}: {len(faults)} faults in the data", sorted(faults)))

    examples = {value: path for path, record in labels.items() for value in record.pixels}
    coding = choose_mask_coding(examples, classes, examples)
    splits = {
        name: _summarize(split, labels, coding, crop_size) for name, split in layout.splits.items()
    }
    warnings = [
        f"the {name} split holds {'no change' if share == 0 else 'nothing but change'}: "
        "its scores will say little"
        for name, summary in splits.items()
        if (share := summary.change_share) in (0, 1)
    ]
    if jpegs := sum(is_lossy(path) for path in labels):
        warnings.append(f"{jpegs} labels are JPEGs: their noise is snapped to {coding.values}")
    if disagreeing := [p for p in pairs if len({labels[path].outline for path in p.labels}) > 1]:
        warnings.append(
            f"{len(disagreeing)} pairs have labels that disagree on where anything changed; such "
            f"pixels are ignored ({disagreeing[0].label}, ...)"
        )
    warnings += _twins(layout, records)
    content = [
        (name, pair.name, *(records[path].digest for path in pair.files))
        for name, split in layout.splits.items()
        for pair in split
    ]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return DataSummary(coding, splits, tuple(warnings), fingerprint)


def show(summary: DataSummary, layout: Layout) -> None:
    """Print what there is, and what is odd about it."""
    print(f"data    {layout.root} ({layout.description})\n{summary.table()}")
    for warning in summary.warnings:
        print(f"warning: {visible(warning)}")


class _Memo:
    """Records kept from one start to the next; a memo that cannot be read or written is no loss.

    {path: {kind: {"stamp": [bytes, time of change], ..., "sum": check sum}}}, last used last
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, dict[str, dict]] = {}
        self.is_new = False

    def __enter__(self) -> "_Memo":
        if self.path is not None:
            try:
                self.known = dict(json.loads(self.path.read_text("utf-8")))
            except (OSError, ValueError, TypeError, RecursionError):
                self.known = {}
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is None or not self.is_new:
            return
        for gone in [path for path in self.known if not Path(path).exists()]:
            del self.known[gone]
        kept = dict(list(self.known.items())[-MAX_FILES:])
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(kept), "utf-8")
            beside.replace(self.path)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def inspect(
        self, paths: Sequence[Path], look: Callable[[Path], FileRecord], kind: str
    ) -> dict[Path, FileRecord]:
        """Look at every file that is not known yet, in threads: Pillow decodes without the GIL."""
        stamps = {path: _stamp(path) for path in paths}
        records = {}
        for path, stamp in stamps.items():
            try:
                known = self.known[str(path.resolve())][kind]
                if known["stamp"] == stamp and known["sum"] == _sum(
                    str(path.resolve()), kind, known
                ):
                    records[path] = _from_json(known)
                    self._keep(path, kind, known)
            except (AttributeError, LookupError, TypeError, ValueError):
                continue
        new = [path for path in paths if path not in records]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            looked = pool.map(lambda path: _try(look, path), new)
            name = f"checking {kind.split(maxsplit=1)[0]}s"
            bar = tqdm(looked, name, len(new), disable=None, leave=False, delay=1)
            try:
                for path, record in zip(new, bar, strict=True):
                    records[path] = record
                    if not record.fault:
                        new_record = {"stamp": stamps[path], **asdict(record)}
                        new_record["sum"] = _sum(str(path.resolve()), kind, new_record)
                        self._keep(path, kind, new_record)
                        self.is_new = True
            except BaseException:  # Ctrl-C: leave now, not after the files that are queued
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return records

    def _keep(self, path: Path, kind: str, record: dict) -> None:
        kinds = self.known.pop(str(path.resolve()), {})
        kinds = dict(kinds) if isinstance(kinds, dict) else {}
        kinds.pop(kind, None)
        self.known[str(path.resolve())] = dict([*kinds.items(), (kind, record)][-MAX_KINDS:])


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _try(look: Callable[[Path], FileRecord], path: Path) -> FileRecord:
    try:
        return look(path)
    except UserError as error:
        return FileRecord(fault=str(error))


def _from_json(record: dict) -> FileRecord:
    pixels, uniform = (
        {int(value): int(count) for value, count in record[name].items()}
        for name in ("pixels", "uniform")
    )
    height, width = record["size"]
    return FileRecord((height, width), record["digest"], pixels, uniform, record["outline"])


def _sum(path: str, kind: str, record: dict) -> str:
    """Return what tells a damaged record: a wrong digest in it would be another dataset."""
    content = {name: value for name, value in record.items() if name != "sum"}
    return hashlib.blake2b(json.dumps([path, kind, content]).encode(), digest_size=8).hexdigest()


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


def _size_faults(pair: Pair, records: dict[Path, FileRecord]) -> list[str]:
    label = records[pair.label]
    return [
        f"{path}: {_text(records[path].size)}, but its label {pair.label} is {_text(label.size)}"
        for path in (pair.before, pair.after, *pair.labels[1:])
        if not records[path].fault and not label.fault and records[path].size != label.size
    ]


def _summarize(
    split: Sequence[Pair], records: dict[Path, FileRecord], coding: MaskCoding, side: int
) -> SplitSummary:
    labels = [records[pair.label] for pair in split]
    all_labels = [records[path] for pair in split for path in pair.labels]
    return SplitSummary(
        pairs=len(labels),
        sizes=tuple(sorted({label.size for label in labels})),
        patches=sum(-(-h // side) * -(-w // side) for h, w in (label.size for label in labels)),
        empty_patches=sum(label.uniform.get(coding.values[0], 0) for label in labels),
        class_pixels=tuple(sum(r.pixels.get(v, 0) for r in all_labels) for v in coding.values),
    )


def _twins(layout: Layout, records: dict[Path, FileRecord]) -> list[str]:
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
