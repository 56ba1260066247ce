"""Where the files of a dataset are: told by convention, without a line of configuration.

    {train,val,test}/{A,B,label}          LEVIR-CD, LEVIR-CD+, S2Looking, SYSU-CD, CLCD, CDD, DSIFN
    {A,B,label} + list/{train,val,test}.txt      the 256-crop tree of BIT and ChangeFormer
    {A,B,label} with train_1.png, val_7.png      the zips unpacked into one folder
    {A,B,label}, or train/ alone          your own images; val is split off by scene
    {im1,im2,label1,label2} in any of these      SECOND: the classes of each date

The folders of a date may be called otherwise (`DATES`), the whole may lie a folder or two deeper,
and the files of a pair are matched by stem: A/x.png goes with B/x.tif.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
DATES = {
    "before": ("a", "t1", "im1", "img1", "image1", "time1", "pre", "before"),
    "after": ("b", "t2", "im2", "img2", "image2", "time2", "post", "after"),
    "label": ("label", "labels", "out", "mask", "masks", "gt", "cm"),
}
# of semantic change, where each date has its labels
SEMANTIC_DATES = {
    "before": DATES["before"],
    "after": DATES["after"],
    "label": ("label1", "labela", "label_a", "labels1", "mask1", "gt1", "sem1"),
    "label_after": ("label2", "labelb", "label_b", "labels2", "mask2", "gt2", "sem2"),
}
ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
EXPECTED = (
    "expected DIR/train/A, DIR/train/B, DIR/train/label and the same under DIR/val, "
    "or DIR/A, DIR/B, DIR/label with DIR/list/train.txt and val.txt (data/README.md)"
)
VAL_SHARE = 0.2  # of the scenes, where a dataset comes without val
MAX_LISTED = 20  # faults in one message

Kinds = dict[str, tuple[str, ...]]  # names of the folders


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

    `notes` say what was passed over.
    """

    root: Path
    description: str
    splits: dict[str, tuple[Pair, ...]]
    notes: tuple[str, ...] = ()


def find_pairs(root: str | Path, task: str = "change") -> Layout:
    """Recognise a dataset and pair its files.

    Args:
        root: its folder, or one above.
        task: "change", or "semantic" for labels of both dates.

    Raises:
        UserError: no known layout, an empty split, or files without partners (all are listed).
    """
    root = Path(root)
    try:
        return _find_pairs(root, SEMANTIC_DATES if task == "semantic" else DATES)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from None


def _find_pairs(root: Path, kinds: Kinds) -> Layout:
    if not root.exists():
        raise UserError(f"{root}: no such folder; {EXPECTED}")
    if not root.is_dir():
        raise UserError(f"{root}: is a file, not a folder; {EXPECTED}")
    home = _descend(root, kinds)
    splits = {name: folder for name in SPLITS if (folder := _child(home, SPLITS[name]))}
    if splits:
        pairs = {name: _match(_dates(folder, kinds)) for name, folder in splits.items()}
        description = "split folders"
    else:
        dates = _dates(home, kinds)
        lists = _child(home, ("list", "lists"))
        if lists is not None and list(lists.glob("*.txt")):
            pairs = _by_lists(dates, lists)
            description = "lists of names"
        else:
            pairs = _by_prefix(_match(dates))
            description = "prefixed names" if len(pairs) > 1 else "one folder"
    if "train" not in pairs or not pairs["train"]:
        raise UserError(f"{home}: the train split holds no pair; {EXPECTED}")
    if "val" not in pairs:
        pairs["train"], pairs["val"] = _split_by_scene(pairs["train"])
        description += f", no val: {VAL_SHARE:.0%} of the scenes taken from train"
    for name, found in pairs.items():
        if not found:
            raise UserError(f"{home}: the {name} split holds no pair; {EXPECTED}")
    return Layout(home, description, {name: pairs[name] for name in SPLITS if name in pairs})


def _descend(root: Path, kinds: Kinds) -> Path:
    """Go down to the dataset, as archives often unpack into LEVIR-CD/LEVIR-CD or Real/subset.

    Other folders beside it (a cache, __MACOSX) do no harm; two datasets do.
    """
    known = {name for names in (*SPLITS.values(), *kinds.values()) for name in names}
    level = [root]
    for _ in range(3):
        homes = [f for f in level if any(p.name.lower() in known for p in f.iterdir())]
        # generated sample sets (sample_data.MARKER) give way to the user's own data
        homes = [f for f in homes if not (f / "sample.json").is_file()] or homes
        if len(homes) > 1:
            names = ", ".join(str(f) for f in homes[:5])
            raise UserError(f"{root}: holds several datasets, {names}; name one of them")
        if homes:
            return homes[0]
        level = [p for f in level for p in sorted(f.iterdir()) if _is_visible_folder(p)]
        if len(level) > MAX_LISTED:
            break
    raise UserError(f"{root}: no dataset is recognised here; {EXPECTED}")


def _is_visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__"))


def _child(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the subfolder with one of these names, whatever its case."""
    wanted = list(names)
    found = [p for p in folder.iterdir() if p.name.lower() in wanted]
    for path in sorted(found, key=lambda p: wanted.index(p.name.lower())):
        if not path.is_dir():
            raise UserError(f"{path}: is a file, not a folder; {EXPECTED}")
        return path
    return None


def _dates(folder: Path, kinds: Kinds) -> dict[str, Path]:
    found = {date: _child(folder, names) for date, names in kinds.items()}
    missing = [f"{date} ({', '.join(kinds[date][:4])}, ...)" for date in found if not found[date]]
    if missing:
        other, flag = (SEMANTIC_DATES, "semantic") if kinds is DATES else (DATES, "change")
        if not found["label"] and _child(folder, other["label"]):
            raise UserError(f"{folder}: is a dataset of another kind; try --task {flag}")
        raise UserError(f"{folder}: has no folder for {' or '.join(missing)}; {EXPECTED}")
    return {date: path for date, path in found.items() if path is not None}


def _files(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by stem, passing over hidden and foreign files."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in ENDINGS:
            continue
        stem = _composed(path.stem)
        if stem in files:
            raise UserError(
                f"{folder}: {files[stem].name} and {path.name} have the same stem; keep one"
            )
        files[stem] = path
    return files


def _composed(name: str) -> str:
    """Write accents in one way: macOS takes letters apart, lists and other systems do not."""
    return unicodedata.normalize("NFC", name)


def _match(dates: dict[str, Path], stems: Iterable[str] | None = None) -> tuple[Pair, ...]:
    """Pair the files of the folders by stem; every one without a partner is an error."""
    files = {date: _files(folder) for date, folder in dates.items()}
    wanted = sorted({s for found in files.values() for s in found} if stems is None else stems)
    faults = [
        f"{dates[date] / stem}.*: missing"
        for stem in wanted
        for date in files
        if stem not in files[date]
    ]
    if faults:
        raise UserError(listing(f"{len(faults)} files of pairs are missing", faults))
    return tuple(Pair(s, **{date: found[s] for date, found in files.items()}) for s in wanted)


def _by_lists(dates: dict[str, Path], lists: Path) -> dict[str, tuple[Pair, ...]]:
    pairs: dict[str, tuple[Pair, ...]] = {}
    for split, names in SPLITS.items():
        for path in (lists / f"{name}.txt" for name in names):
            if path.is_file():
                pairs[split] = _match(dates, _read_list(path))
    return pairs


def _read_list(path: Path) -> list[str]:
    """Return the stems that a list names: one a line, a second column and blank lines ignored."""
    stems = []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8") from None
    for line in map(_composed, lines):
        if not line.strip():
            continue
        # names may hold spaces; a second column starts after a known ending
        match = re.match(r"(.+?\.(?:png|jpe?g|tiff?|bmp))(?:\s|$)", line.strip(), re.IGNORECASE)
        name = match[1] if match else line.split()[0]
        if "/" in name or "\\" in name or name in (".", ".."):
            raise UserError(f"{path}: {name!r} is a path; give plain file names")
        stems.append(Path(name).stem if match else name)
    twice = sorted({s for s in stems if stems.count(s) > 1}) if len(set(stems)) < len(stems) else []
    if twice:
        raise UserError(f"{path}: names {', '.join(twice[:3])} twice")
    return stems


def _by_prefix(pairs: tuple[Pair, ...]) -> dict[str, tuple[Pair, ...]]:
    """Split by train_, val_, test_ in front of the names, if every name has one."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        prefix = re.split(r"[_-]", pair.name)[0].lower()
        split = next((name for name, words in SPLITS.items() if prefix in words), "")
        groups[split].append(pair)
    if "" in groups or "train" not in groups:
        return {"train": pairs}
    return {name: tuple(groups[name]) for name in SPLITS if name in groups}


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
