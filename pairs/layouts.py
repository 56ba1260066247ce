"""Where the files of a dataset are: told by convention, without a line of configuration.

    {train,val,test}/{A,B,label}          LEVIR-CD, LEVIR-CD+, S2Looking, SYSU-CD, CLCD, CDD, DSIFN
    {A,B,label} + list/{train,val,test}.txt      the 256-crop tree of BIT and ChangeFormer
    {A,B,label} with train_1.png, val_7.png      the zips unpacked into one folder
    {A,B,label}, or train/ alone          your own images; val is split off by scene
    {im1,im2,label1,label2} in any of these      SECOND: the classes of each date

The folders of a date may be called otherwise (`DATES`, --folders), the whole may lie a folder or
two deeper, and the files of a pair are matched by stem: A/x.png goes with B/x.tif. So are names
that say their date: pre_x, post_x and mask_x, or x_A, x_B and x_label, in three folders or in one.
Any other tree is told by a table (`table.py`).
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairs.memo import stamp_of
from pairs.splits import EXPECTED, MAX_LISTED, SPLITS, Layout, Pair, complete, listing
from pairs.table import read_table
from runtime.errors import UserError, counted

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

# what lies beside images and is none: not worth a word
BESIDE = {".txt", ".md", ".json", ".csv", ".xml", ".db", ".ini", ".pgw", ".jgw", ".tfw", ".wld",
          ".prj", ".ovr"}  # fmt: skip
# what --folders calls a date: as here, or as the folders of LEVIR-CD and SECOND
FOLDER_WORDS = {
    "a": "before", "before": "before", "b": "after", "after": "after", "label": "label",
    "label1": "label", "label_before": "label", "label2": "label_after",
    "label_after": "label_after",
}  # fmt: skip

Names = Mapping[str, tuple[str, ...]]  # of the folders of each date


@dataclass(frozen=True)
class _Date:
    """The files of one date by stem, and their folder."""

    folder: Path
    files: Mapping[str, Path]


Dates = Mapping[str, _Date]


def find_pairs(
    root: str | Path | None,
    task: str = "change",
    *,
    folders: Sequence[str] = (),
    table: str | Path | None = None,
    wanted: Sequence[str] = ("train", "val"),
    skip_broken: bool = False,
) -> Layout:
    """Recognise a dataset and pair its files.

    Where there is no val, it is taken from train, by scene; where nothing says which pairs are
    which, the one split that is wanted is all of them, unless a training makes it.

    Args:
        root: its folder, or one above; None is that of the table.
        task: "change", or "semantic" for labels of both dates.
        folders: "A=2018", "B=2020", "label=masks": other names of the folders of a date.
        table: a CSV file that names the files of each pair, see `table.py`.
        wanted: the splits that have to be there.
        skip_broken: leave out pairs that lack a file instead of raising.

    Raises:
        UserError: no known layout, an empty split, or files without partners (all are listed).
    """
    if table is not None:
        home = Path(root) if root else Path(table).parent
        splits, skipped = read_table(Path(table), home, task, skip_broken=skip_broken)
        return complete(home, f"table {table}", splits, wanted, skipped=skipped)
    root = Path(root or ".")
    names = dict(SEMANTIC_DATES if task == "semantic" else DATES)
    for date, folder in read_folders(folders, task).items():
        names[date] = (folder, *names[date])
    finder = _Finder(names, is_semantic=task == "semantic", skip_broken=skip_broken)
    try:
        home, description, splits = finder.find(root)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from None
    return complete(home, description, splits, wanted, finder.notes(home), finder.skipped)


def read_folders(folders: Sequence[str], task: str) -> dict[str, str]:
    """Return the name of the folder of each date, from "A=2018", "B=2020", "label=masks".

    Raises:
        UserError: another word than A, B, label, or a path that leads out of the dataset.
    """
    found = {}
    for word in folders:
        name, _, folder = word.partition("=")
        date = FOLDER_WORDS.get(name.strip().lower())
        known = SEMANTIC_DATES if task == "semantic" else DATES
        parts = Path(folder.strip()).parts
        if date not in known or not parts or ".." in parts or Path(folder).is_absolute():
            example = ",label1=classes1,label2=classes2" if task == "semantic" else ",label=masks"
            raise UserError(f"--folders {word}: give folders such as A=2018,B=2020{example}")
        found[date] = folder.strip()
    return found


class _Finder:
    """Looks through the folders of a dataset.

    Args:
        names: of the folders of each date.
        is_semantic: whether each date has labels.
        skip_broken: leave out pairs that lack a file.
    """

    def __init__(self, names: Names, *, is_semantic: bool, skip_broken: bool) -> None:
        self.names, self.is_semantic, self.skip_broken = names, is_semantic, skip_broken
        self.passed: list[Path] = []
        self.skipped: list[str] = []

    def find(self, root: Path) -> tuple[Path, str, dict[str, tuple[Pair, ...]]]:
        """Return the dataset's folder, how its pairs were found, and the pairs by split."""
        if not root.exists():
            raise UserError(f"{root}: no such folder; {EXPECTED}")
        if not root.is_dir():
            raise UserError(f"{root}: is a file, not a folder; {EXPECTED}")
        home = self._descend(root)
        folders = {name: folder for name in SPLITS if (folder := _child(home, SPLITS[name]))}
        if folders:
            self._pass_over(home, [*folders.values()])
            found = {name: self._match(self._dates(folder)) for name, folder in folders.items()}
            return home, "split folders", found
        lists = _child(home, ("list", "lists"))
        dates = self._dates(home, beside=[lists] if lists else [])
        if lists is not None and list(lists.glob("*.txt")):
            return home, "lists of names", self._by_lists(dates, lists)
        found = _by_prefix(self._match(dates))
        return home, "one folder" if "" in found else "prefixed names", found

    def notes(self, home: Path) -> list[str]:
        """Say once what was passed over."""
        if not self.passed:
            return []
        shown = [str(path.relative_to(home)) for path in self.passed[:5]]
        more = ", ..." if len(self.passed) > len(shown) else ""
        return [
            f"{len(self.passed)} files or folders are passed over ({', '.join(shown)}{more}); "
            f"images end in {', '.join(sorted(ENDINGS))}"
        ]

    def _descend(self, root: Path) -> Path:
        """Go down to the dataset, as archives often unpack into LEVIR-CD/LEVIR-CD or Real/subset.

        Other folders beside it (a cache, __MACOSX) do no harm; two datasets do. Of generated sample
        sets (sample_set.MARKER), which give way to the user's own data, the first that fits is
        taken.
        """
        dates = {Path(name).parts[0].lower() for names in self.names.values() for name in names}
        known = {name for names in SPLITS.values() for name in names} | dates
        level = [root]
        for _ in range(3):
            homes = [f for f in level if any(p.name.lower() in known for p in f.iterdir())]
            own = [f for f in homes if not (f / "sample.json").is_file()]
            if not own and len(homes) > 1:
                return next((f for f in sorted(homes) if self._fits(f)), homes[0])
            homes = own or homes
            if len(homes) > 1:
                names = ", ".join(str(f) for f in homes[:5])
                raise UserError(f"{root}: holds several datasets, {names}; name one of them")
            if homes:
                return homes[0]
            if level == [root] and self._by_marker(root, _files(root)[0]):
                return root
            level = [p for f in level for p in sorted(f.iterdir()) if _is_visible_folder(p)]
            if len(level) > MAX_LISTED:
                break
        raise UserError(f"{root}: no dataset is recognised here; {EXPECTED}")

    def _fits(self, home: Path) -> bool:
        folder = _child(home, SPLITS["train"]) or home
        return all(_child(folder, names) for names in self.names.values())

    def _dates(self, folder: Path, beside: Sequence[Path] = ()) -> Dates:
        """Return the files of each date."""
        found = {date: _child(folder, names) for date, names in self.names.items()}
        if not any(found.values()):
            files, passed = _files(folder)
            if dates := self._by_marker(folder, files):
                self.passed += passed
                return dates
        if missing := [date for date in found if not found[date]]:
            other, flag = (DATES, "change") if self.is_semantic else (SEMANTIC_DATES, "semantic")
            if not found["label"] and _child(folder, other["label"]):
                raise UserError(f"{folder}: is a dataset of another kind; try --task {flag}")
            words = [f"{date} ({', '.join(self.names[date][:4])}, ...)" for date in missing]
            raise UserError(
                f"{folder}: has no folder for {' or '.join(words)}; name them by --folders "
                f"A=...,B=...,label=..., or {EXPECTED}"
            )
        self._pass_over(folder, [path for path in (*found.values(), *beside) if path])
        dates = {}
        for date, path in found.items():
            assert path is not None
            files, passed = _files(path)
            dates[date] = _Date(path, files)
            self.passed += passed
        return dates

    def _pass_over(self, folder: Path, known: Sequence[Path]) -> None:
        """Note what lies beside the folders that are used."""
        used = {path.relative_to(folder).parts[0] for path in known} | {"cache", "list", "lists"}
        for path in sorted(folder.iterdir()):
            is_odd = _is_visible_folder(path) or path.suffix.lower() in ENDINGS
            if is_odd and path.name not in used and not path.name.startswith("."):
                self.passed.append(path)

    def _by_marker(self, folder: Path, files: Mapping[str, Path]) -> Dates | None:
        """Sort the files of one folder by the date that their names say, if all do."""
        dates: dict[str, dict[str, Path]] = {date: {} for date in self.names}
        for stem, path in files.items():
            cores = {d: core for d, names in self.names.items() if (core := _core(stem, names))}
            if len(cores) != 1:
                return None
            ((date, core),) = cores.items()
            if core in dates[date]:
                raise UserError(f"{folder}: {path.name} and {dates[date][core].name} are one image")
            dates[date][core] = path
        return {d: _Date(folder, dates[d]) for d in dates} if all(dates.values()) else None

    def _match(self, dates: Dates, stems: Iterable[str] | None = None) -> tuple[Pair, ...]:
        """Pair the files of the dates by stem; every one without a partner is an error."""
        if stems is None:
            dates = self._without_markers(dates)
            stems = {stem for date in dates.values() for stem in date.files}
        wanted = sorted(stems)
        faults = [
            f"{date.folder / stem}.*: missing"
            for stem in wanted
            for date in dates.values()
            if stem not in date.files
        ]
        if faults and not self.skip_broken:
            raise UserError(listing(f"missing: {counted(len(faults), 'file')} of pairs", faults))
        self.skipped += faults
        return tuple(
            Pair(stem, **{name: date.files[stem] for name, date in dates.items()})
            for stem in wanted
            if all(stem in date.files for date in dates.values())
        )

    def _without_markers(self, dates: Dates) -> Dates:
        """Take off what names the date, such as pre_ or _A, where more names agree without it."""

        def agreeing(given: Dates) -> int:
            return len(set.intersection(*(set(date.files) for date in given.values())))

        if all(len(date.files) == agreeing(dates) for date in dates.values()):
            return dates
        bare: dict[str, _Date] = {}
        for name, date in dates.items():
            cores = {_core(s, self.names[name]) or s: path for s, path in date.files.items()}
            is_sure = len(cores) == len(date.files)  # else two files would be one
            bare[name] = _Date(date.folder, cores) if is_sure else date
        return bare if agreeing(bare) > agreeing(dates) else dates

    def _by_lists(self, dates: Dates, lists: Path) -> dict[str, tuple[Pair, ...]]:
        pairs: dict[str, tuple[Pair, ...]] = {}
        for split, names in SPLITS.items():
            for path in (lists / f"{name}.txt" for name in names):
                if path.is_file():
                    pairs[split] = self._match(dates, _read_list(path))
        return pairs


def _core(stem: str, names: Sequence[str]) -> str | None:
    """Return a stem without the name of a date before or behind it: pre_12, 12_pre -> 12."""
    for name in names:
        for form in (rf"{re.escape(name)}[_.-](.+)", rf"(.+)[_.-]{re.escape(name)}"):
            if match := re.fullmatch(form, stem, re.IGNORECASE):
                return match[1]
    return None


def _is_visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__"))


def _child(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the subfolder with one of these names, whatever its case."""
    wanted = [name.lower() for name in names]
    found = {path.name.lower(): path for path in folder.iterdir()}
    for name in wanted:
        path = found.get(name) or (folder / name if "/" in name else None)
        if path is None or ("/" in name and not path.is_dir()):
            continue
        if not path.is_dir():
            raise UserError(f"{path}: is a file, not a folder; {EXPECTED}")
        return path
    return None


def _files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Return the images of a folder by stem, and what was passed over; hidden files are neither.

    Raises:
        UserError: two have one stem, or one is no regular file: reading that might never end.
    """
    files: dict[str, Path] = {}
    passed = []
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        ending = path.suffix.lower()
        if entry.name.startswith(".") or ending in BESIDE:
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link that leads to itself
            is_folder = is_file = False
        if ending not in ENDINGS or is_folder:
            passed.append(path)
            continue
        if not is_file:
            stamp_of(path)  # says what it is instead
        stem = _composed(path.stem)
        if stem in files:
            raise UserError(
                f"{folder}: {files[stem].name} and {path.name} have the same stem; keep one"
            )
        files[stem] = path
    return files, passed


def _composed(name: str) -> str:
    """Write accents in one way: macOS takes letters apart, lists and other systems do not."""
    return unicodedata.normalize("NFC", name)


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
    if "" in groups or len(groups) < 2:
        return {"": pairs}
    return {name: tuple(groups[name]) for name in SPLITS if name in groups}
