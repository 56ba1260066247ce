"""Pairs of files, and which of them a model learns from, is chosen by and is scored on."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
EXPECTED = (
    "expected DIR/train/A, DIR/train/B, DIR/train/label and the same under DIR/val, "
    "or DIR/A, DIR/B, DIR/label with DIR/list/train.txt and val.txt (data/README.md)"
)
VAL_SHARE = 0.2  # of the scenes, where a dataset comes without val
MAX_LISTED = 20  # faults in one message


@dataclass(frozen=True)
class Pair:
    """Two dates of one scene and what changed; `name` is the stem, unique in a split.

    Of semantic change `label` holds the classes before, and `label_after` those after.
    """

    name: str
    before: Path
    after: Path
    label: Path
    label_after: Path | None = None

    @property
    def labels(self) -> tuple[Path, ...]:
        """The label files, one or two."""
        return (self.label,) if self.label_after is None else (self.label, self.label_after)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the pair."""
        return (self.before, self.after, *self.labels)


@dataclass(frozen=True)
class Layout:
    """A dataset's pairs by split ("train", "val", perhaps "test"), each sorted by name.

    Attributes:
        root: its folder.
        description: how the pairs were found.
        splits: the pairs.
        notes: what was passed over.
        skipped: why pairs were left out, one line a fault.
        trained_as: the splits that a training would make of it, if those are others.
    """

    root: Path
    description: str
    splits: dict[str, tuple[Pair, ...]]
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    trained_as: dict[str, tuple[Pair, ...]] | None = None


def complete(
    home: Path,
    description: str,
    splits: dict[str, tuple[Pair, ...]],
    wanted: Sequence[str],
    notes: Sequence[str] = (),
    skipped: Sequence[str] = (),
) -> Layout:
    """Take val from train if need be, and see that what is wanted is there.

    Args:
        home: the dataset's folder.
        description: how the pairs were found.
        splits: what was found; "" holds pairs of no split.
        wanted: the splits that have to be there.
        notes: what was passed over.
        skipped: why pairs were left out.

    Raises:
        UserError: a split is empty or missing.
    """
    unsplit = splits.pop("", ())
    trained_as = None
    if unsplit:
        splits["train"] = unsplit
    if "val" not in splits and splits.get("train"):
        try:
            splits["train"], splits["val"] = _split_by_scene(splits["train"])
            description += f", no val: {VAL_SHARE:.0%} of the scenes taken from train"
        except UserError:
            if "val" in wanted:
                raise
    if unsplit and wanted and not set(wanted) <= set(splits):
        trained_as, splits = splits, {wanted[0]: unsplit}
        description = f"no splits: all pairs are {wanted[0]}"
    if not splits or ("train" in wanted and not splits.get("train")):
        raise UserError(f"{home}: the train split holds no pair; {EXPECTED}")
    for name, found in splits.items():
        if not found:
            raise UserError(f"{home}: the {name} split holds no pair; {EXPECTED}")
    for name in wanted:
        if name not in splits:
            there = f"{home}: has no {name} split, only {', '.join(splits)}"
            is_val = name == "test" and "val" in splits
            raise UserError(there + "; --split val scores on val, not independent" * is_val)
    ordered = {name: splits[name] for name in SPLITS if name in splits}
    return Layout(home, description, ordered, tuple(notes), tuple(skipped), trained_as)


def scene_of(name: str) -> str:
    """Return the scene that a crop was cut from, by the numbers at the end of its name.

    a_12_0256_0512 -> a_12    three numbers: scene, row, column
    a_0256_0512    -> a       two of three digits or more: row, column
    a_12_7         -> a_12    two: scene, crop
    a_12           -> a_12    one: the scene itself
    """
    numbers = re.search(r"(?:[_-]\d+)*$", name)
    parts = re.findall(r"[_-]\d+", numbers[0]) if numbers else []
    if len(parts) < 2:
        return name
    is_row_column = len(parts) > 2 or all(len(part) > 3 for part in parts)
    cut = parts[-2:] if is_row_column else parts[-1:]
    return name.removesuffix("".join(cut))


def _split_by_scene(pairs: tuple[Pair, ...]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Take val from train by a hash of the scene, so that no scene has crops in both."""

    def rank(scene: str) -> str:
        return hashlib.sha256(scene.encode()).hexdigest()

    scenes = sorted({scene_of(p.name) for p in pairs}, key=rank)
    if len(scenes) < 2:
        raise UserError(
            f"{pairs[0].before.parent}: a single scene cannot be split into train and val; "
            "make a val split yourself"
        )
    held = set(scenes[: max(1, round(len(scenes) * VAL_SHARE))])
    is_val: Callable[[Pair], bool] = lambda pair: scene_of(pair.name) in held  # noqa: E731
    return tuple(p for p in pairs if not is_val(p)), tuple(p for p in pairs if is_val(p))


def listing(headline: str, faults: Sequence[str]) -> str:
    """Put every fault on a line under a headline, or the first twenty and a count."""
    shown = [f"  {fault}" for fault in faults[:MAX_LISTED]]
    if len(faults) > MAX_LISTED:
        shown.append(f"  ... and {len(faults) - MAX_LISTED} more")
    return "\n".join([f"{headline}:", *shown])
