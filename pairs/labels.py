"""What the classes of a dataset are called, and how its label files write them.

    classes.json beside the splits      {"no change": 0, "road": 128, "building": 255}
                                        {"unchanged": [255, 255, 255], "water": [0, 0, 255], ...}

One line a class, class 0 first: its name, and its value or its colour in the label files. Without
such a file, names and values are those of the dataset that a task and a number of classes point to.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import UserError

FILE = "classes.json"
MIN_PIXELS = 10  # of a connected component that counts as an object, unless asked otherwise
MAX_CLASSES = 250  # of the labels: 255 is "ignore", 254 "unknown"

Color = tuple[int, int, int]

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
    if path.is_file():
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
