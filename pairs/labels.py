"""What the classes of a dataset are called, and how its label files write them: `LabelEncoding`.

    classes.json beside the splits      {"no change": 0, "road": 128, "building": 255}
                                        {"unchanged": [255, 255, 255], "water": [0, 0, 255], ...}

One line a class, class 0 first: its name, and its value or its colour in the label files. Without
such a file, names and values are those of the dataset that a task and a number of classes point to.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pairs.images import IGNORE, Bytes, Color, is_lossy, read_label
from pairs.memo import stamp_of
from runtime.errors import UserError

FILE = "classes.json"
MIN_PIXELS = 10  # of a connected component that counts as an object, unless asked otherwise
MAX_CLASSES = 250  # of the labels: 255 is "ignore", 254 "unknown"
_UNKNOWN = 254  # in a lookup table: a value that is no class
MIN_SOFT = 5  # values between two classes that tell soft edges
MAX_GUESSED = 20  # classes of values 0, 1, 2, ...
SOFT_EDGES = (
    "values between them come of soft edges: resize masks with nearest neighbour, or save them "
    "with a threshold, such as 255 where they are 128 or more"
)
MAX_JPEG_DOUBT = 0.01  # share of a label's pixels that may lie between two classes

# LEVIR-MCI, arXiv:2403.19646
LEVIR_MCI = {"no change": 0, "road": 128, "building": 255}
# SECOND, arXiv:2010.05687; its label files are coloured
SECOND = {
    "unchanged": (255, 255, 255),
    "water": (0, 0, 255),
    "ground": (128, 128, 128),
    "low vegetation": (0, 128, 0),
    "tree": (0, 255, 0),
    "building": (128, 0, 0),
    "playground": (255, 0, 0),
}


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset's labels; what is None is told from the labels.

    Attributes:
        num_classes: K of the model: 1 for binary change, else as many as the labels have, but for
            semantic change, where "unchanged" is none of them.
        task: "change" or "semantic".
        names: of the labels' classes, class 0 first.
        values: of the classes in label files of one channel.
        colors: of the classes in coloured label files.
    """

    num_classes: int
    task: str = "change"
    names: tuple[str, ...] | None = None
    values: tuple[int, ...] | None = None
    colors: tuple[Color, ...] | None = None

    @property
    def num_labels(self) -> int:
        """How many classes the labels have."""
        return self.num_classes + 1 if self.task == "semantic" else max(self.num_classes, 2)

    def names_for(self, values: tuple[int, ...]) -> tuple[str, ...]:
        """Return the names, given the values that the label files turned out to have."""
        if self.names is not None:
            return self.names
        if values == tuple(LEVIR_MCI.values()):
            return tuple(LEVIR_MCI)
        if self.num_labels == 2:
            return ("no change", "change")
        first = "unchanged" if self.task == "semantic" else "no change"
        return (first, *(f"class {k}" for k in range(1, self.num_labels)))


def choose_classes(
    root: Path,
    *,
    task: str = "change",
    num_classes: int | None = None,
    mask_values: tuple[int, ...] | None = None,
) -> Classes:
    """Find out the classes of a dataset.

    Args:
        root: its folder, perhaps with a `classes.json`.
        task: "change" or "semantic".
        num_classes: K if it was asked for; else that of the file, else 1, or SECOND's 6.
        mask_values: the values of the classes if they were asked for.

    Raises:
        UserError: the file is broken, or does not go with what was asked for.
    """
    path = root / FILE
    if path.exists() or path.is_symlink():
        stamp_of(path)  # a pipe of that name would be waited for
        found = read_classes(path, task)
        if num_classes not in (None, found.num_classes):
            raise UserError(
                f"--num-classes {num_classes}: {path} names {len(found.names or ())} classes, "
                f"which is --num-classes {found.num_classes} of --task {task}"
            )
    elif task == "semantic" and num_classes in (None, len(SECOND) - 1):
        found = Classes(len(SECOND) - 1, task, tuple(SECOND), colors=tuple(SECOND.values()))
    else:
        found = Classes(num_classes or 1, task)
    if task == "semantic" and found.num_classes < 2:
        raise UserError(
            "--task semantic: needs two classes beside the unchanged one; where there is one, "
            "--task change finds its change"
        )
    if mask_values is not None:
        return replace(found, values=tuple(mask_values), colors=None)
    return found


def read_classes(path: Path, task: str = "change") -> Classes:
    """Read a `classes.json`.

    Raises:
        UserError: it is not the dictionary that the module describes.
    """
    try:
        # pairs, as a dictionary would drop a name that is given twice
        pairs: Any = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not readable JSON ({error})") from None
    example = '{"no change": 0, "road": 128, "building": 255}'
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not is_object or not 2 <= len(pairs) <= MAX_CLASSES:
        raise UserError(f"{path}: give 2 to {MAX_CLASSES} classes, such as {example}")
    names, codes = tuple(name for name, _ in pairs), tuple(code for _, code in pairs)
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UserError(f"{path}: every class needs a name of its own")
    num_classes = len(names) - 1 if task == "semantic" else 1 if len(names) == 2 else len(names)
    if all(_is_byte(code) for code in codes) and len(set(codes)) == len(codes):
        return Classes(num_classes, task, names, values=codes)
    if all(isinstance(c, list) and len(c) == 3 and all(map(_is_byte, c)) for c in codes):
        colors = tuple((r, g, b) for r, g, b in codes)
        if len(set(colors)) == len(colors):
            return Classes(num_classes, task, names, colors=colors)
    raise UserError(
        f"{path}: give every class another value from 0 to 255, or every class another "
        f"[red, green, blue], such as {example}"
    )


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


@dataclass(frozen=True)
class LabelEncoding:
    """Which value in a label file means which class: `values[i]` is class i, called `names[i]`.

    255 means "ignore" where it is not the value of a class. Where there are `colors`, those of
    coloured files are the classes' too.
    """

    values: tuple[int, ...]
    names: tuple[str, ...] = ()
    colors: tuple[Color, ...] | None = None

    def read(self, path: Path) -> Bytes:
        """Read a label file as (H, W) uint8 class indices, 255 = ignore.

        Raises:
            UserError: as `read_label` and `decode`.
        """
        return self.decode(read_label(path, self.colors), path)

    def decode(self, raw: Bytes, path: Path) -> Bytes:
        """Turn file values into class indices, 255 = ignore.

        Args:
            raw: (H, W) uint8, as `read_label` gives it.
            path: named in errors; a JPEG's noise is snapped to the nearest class.

        Raises:
            UserError: a value that is no class.
        """
        if is_lossy(path):
            raw = self._snapped(raw, path)
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        table[IGNORE] = IGNORE
        table[list(self.values)] = np.arange(len(self.values), dtype=np.uint8)
        classes = table[raw]
        if (classes == _UNKNOWN).any():
            strange = sorted(set(np.unique(raw).tolist()) - set(self.values) - {IGNORE})
            remedy = f"; {SOFT_EDGES}" if _is_soft(strange, [self.values]) else " (--mask-values)"
            raise UserError(
                f"{path}: values {strange[:8]} are no class; expected "
                f"{', '.join(map(str, self.values))}{remedy}"
            )
        return classes

    def _snapped(self, raw: Bytes, path: Path) -> Bytes:
        """Snap each pixel to the nearest value; noise is small but for a few pixels at edges."""
        values = np.array(self.values, dtype=np.int16)
        distance = np.abs(np.arange(256, dtype=np.int16)[:, None] - values)
        is_far = distance.min(1) > np.diff(np.sort(values)).min() / 4
        if is_far[raw].mean() > MAX_JPEG_DOUBT:
            raise UserError(
                f"{path}: {_lossy(path)} whose values do not gather around "
                f"{', '.join(map(str, self.values))} (--mask-values): soft edges or too few bits; "
                "make it anew as PNG, resized with nearest neighbour"
            )
        return values[distance.argmin(1)].astype(np.uint8)[raw]


def choose_encoding(
    values: Iterable[int], classes: Classes, examples: Mapping[int, Path] | None = None
) -> LabelEncoding:
    """Tell from the values of a whole dataset what they mean.

    Args:
        values: every value that occurs in any label, see `label_values`.
        classes: what is known of them.
        examples: a file for each value, to name in errors.

    Raises:
        UserError: the values fit no known encoding; it lists them and says what to do.
    """
    num_labels, asked = classes.num_labels, classes.values
    found = set(values)
    if asked is not None:
        is_byte = set(asked) <= set(range(256))
        if len(asked) != num_labels or len(set(asked)) != num_labels or not is_byte:
            raise UserError(
                f"--mask-values {','.join(map(str, asked))}: give {num_labels} different values "
                f"from 0 to 255, class 0 first, for --num-classes {classes.num_classes}"
            )
        known = [tuple(asked)]
    elif num_labels == 2:
        known = [(0, 255), (0, 1)]
    else:
        known = [tuple(LEVIR_MCI.values())] if num_labels == 3 and not classes.colors else []
        known += [tuple(range(num_labels))]
    for encoding in known:
        may_ignore = {IGNORE} if asked is not None or classes.num_classes > 1 else set()
        # 0 and 255 alone are rather two classes than one class and pixels to ignore
        is_ignored_whole = bool(found - set(encoding)) and not found & set(encoding[1:])
        if found <= {*encoding, *may_ignore} and not is_ignored_whole:
            return LabelEncoding(encoding, classes.names_for(encoding), classes.colors)
    strange = min((sorted(found - set(encoding)) for encoding in known), key=len)
    files = ", ".join(dict.fromkeys(str(examples[v]) for v in strange[:3])) if examples else ""
    remedy = "give the value of class 0, 1, ... as --mask-values"
    if num_labels == 2 and found <= {0, 128, 255}:
        remedy = "--num-classes 3 reads them as none, road, building"
    elif num_labels == 2 and found == set(range(len(found))) and len(found) <= MAX_GUESSED:
        remedy += f"; or, if they are kinds of change, --num-classes {len(found)}"
    elif _is_soft(strange, known):
        remedy = SOFT_EDGES
    raise UserError(
        f"labels hold the values {_listed(sorted(found))}; "
        f"expected {' or '.join(','.join(map(str, k)) for k in known)} "
        f"for --num-classes {classes.num_classes}{f' (see {files})' if files else ''}; {remedy}"
    )


def label_values(raw: Bytes, path: Path) -> set[int]:
    """Return the values of a label that tell its encoding; a JPEG's are noise and tell none.

    Raises:
        UserError: a JPEG whose classes lie closer together than its noise.
    """
    if not is_lossy(path):
        return set(np.unique(raw).tolist())
    if 0 < raw.max() < 100:
        raise UserError(
            f"{path}: {_lossy(path)} with values up to {raw.max()} only: its noise hides the "
            "classes; save labels as PNG"
        )
    return set()


def _is_soft(strange: Sequence[int], known: Sequence[Sequence[int]]) -> bool:
    """Whether values lie between classes, as smoothing leaves them, and are no classes."""
    lowest, highest = min(map(min, known)), max(map(max, known))
    return len(strange) >= MIN_SOFT and lowest < min(strange) and max(strange) < highest


def _lossy(path: Path) -> str:
    is_named_so = path.suffix.lower() in (".jpg", ".jpeg")
    return (
        "a JPEG label" if is_named_so else f"a lossy label (its bytes are no {path.suffix[1:]}'s)"
    )


def _listed(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:12]))
    return f"{shown}, ... ({len(values)} in all)" if len(values) > 12 else shown
