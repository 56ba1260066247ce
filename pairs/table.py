"""A table of pairs, for trees that no convention fits: one row a pair.

    split,before,after,label
    train,2018/abudhabi/img.tif,2020/abudhabi/img.tif,masks/abudhabi.png

Paths are relative to the dataset's folder, else to that of the table, and stay below it. Without a
column `split`, val is taken from the pairs by scene; a column `label_after` has the classes of the
later date. Commas, semicolons and tabs part the columns, as spreadsheets have it.
"""

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

from pairs.splits import SPLITS, Pair, listing
from runtime.errors import UserError, counted

COLUMNS = ("before", "after", "label")


def read_table(
    path: Path, home: Path, task: str = "change", *, skip_broken: bool = False
) -> tuple[dict[str, tuple[Pair, ...]], list[str]]:
    """Return the pairs by split, "" where the table has none, and why rows were left out.

    Args:
        path: of the table, a CSV file.
        home: what its paths are relative to.
        task: "change", or "semantic" for labels of both dates.
        skip_broken: leave out rows whose files are not there instead of raising.

    Raises:
        UserError: the table is not as the module says, or files are missing (all are listed).
    """
    columns = (*COLUMNS, *(["label_after"] if task == "semantic" else []))
    rows = _rows(path, columns)
    by_row: dict[int, tuple[str, dict[str, Path]]] = {}
    faults = []
    for number, row in rows.items():
        files = {name: _below(home, row[name], f"{path}, line {number}") for name in columns}
        missing = [str(file) for file in files.values() if not file.exists()]
        faults += [f"{path}, line {number}: {file} is missing" for file in missing]
        if not missing:
            by_row[number] = _split(row, f"{path}, line {number}"), files
    if faults and not skip_broken:
        raise UserError(listing(f"missing: {counted(len(faults), 'file')} of pairs", faults))
    names = _names(home, {number: files["before"] for number, (_, files) in by_row.items()})
    splits: dict[str, list[Pair]] = defaultdict(list)
    for number, (split, files) in by_row.items():
        splits[split].append(Pair(rows[number].get("name") or names[number], **files))
    for split, pairs in splits.items():
        twice = [name for name, count in Counter(pair.name for pair in pairs).items() if count > 1]
        if twice:
            raise UserError(f"{path}: names {', '.join(twice[:3])} twice in {split or 'one split'}")
    if "" in splits and len(splits) > 1:
        raise UserError(f"{path}: some rows have no split; give train, val or test in every row")
    return {
        name: tuple(sorted(found, key=lambda p: p.name)) for name, found in splits.items()
    }, faults


def _rows(path: Path, columns: tuple[str, ...]) -> dict[int, dict[str, str]]:
    """Return the rows by line, without blank ones."""
    if not path.is_file():
        raise UserError(f"--pairs {path}: no such file; give a CSV with split,{','.join(columns)}")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text in UTF-8"
        raise UserError(f"--pairs {path}: cannot be read ({reason})") from None
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.DictReader(text.splitlines(), delimiter=delimiter, strict=True)
        reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or []]
        if lacking := [name for name in columns if name not in reader.fieldnames]:
            raise UserError(
                f"--pairs {path}: has no column {', '.join(lacking)}; its first line has to name "
                f"split,{','.join(columns)}"
            )
        rows: dict[int, dict] = {}
        for row in reader:
            rows[reader.line_num] = row
    except csv.Error as error:
        raise UserError(f"--pairs {path}: is no CSV ({error})") from None
    cleaned = {
        number: {
            name: (value or "").strip() for name, value in row.items() if isinstance(name, str)
        }
        for number, row in rows.items()
        if None not in row
    }
    if odd := sorted(set(rows) - set(cleaned)):
        raise UserError(f"--pairs {path}, line {odd[0]}: has more columns than the first line")
    found = {number: row for number, row in cleaned.items() if any(row.values())}
    if not found:
        raise UserError(f"--pairs {path}: names no pair")
    return found


def _below(home: Path, name: str, where: str) -> Path:
    if not name:
        raise UserError(f"{where}: lacks a path")
    path = Path(os.path.normpath(home / name))
    if not path.is_relative_to(os.path.normpath(home)):
        raise UserError(
            f"{where}: {name!r} leads out of {home}; give the folder above all files as --data-dir"
        )
    return path


def _split(row: dict[str, str], where: str) -> str:
    word = row.get("split", "").lower()
    for split, words in SPLITS.items():
        if word in words:
            return split
    if word:
        raise UserError(f"{where}: {word!r} is no split; give train, val or test")
    return ""


def _names(home: Path, files: dict[int, Path]) -> dict[int, str]:
    """Name pairs by the stem of the earlier image, or by its whole path where stems repeat."""
    stems = {number: path.stem for number, path in files.items()}
    if len(set(stems.values())) == len(stems):
        return stems
    base = os.path.normpath(home)
    return {
        number: "_".join(path.relative_to(base).with_suffix("").parts)
        for number, path in files.items()
    }
