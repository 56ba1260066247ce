"""metrics.csv: one row per epoch, the source of truth of a run's history.

    step,train/loss,val/loss,lr
    1,1.2661165237426757,1.283719539642334,0.002

Nothing that somebody else has put into the file is lost: where it is not as this module wrote it
(a spreadsheet saved it, a note stands in a cell), the file is kept beside as metrics.edited.csv.
"""

import csv
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from runtime.files import whole_file

LOGGER = logging.getLogger("tracking")
FILE = "metrics.csv"


class MetricsTable:
    """The table of a run, written anew with each row: it is small, and may get new columns.

    Args:
        run_dir: the run's folder.
        first_step: rows from this step on are dropped, for a resumed run repeats them.

    Attributes:
        rows: numbers as text, by step and name.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / FILE
        rows: dict[int, dict[str, str]] = {}
        self.is_foreign = self.is_old = False
        if os.path.lexists(self.path):
            # only a regular file can be read without waiting for somebody to write into it
            content = self.path.read_bytes() if self.path.is_file() else b""
            rows = parse(content)
            self.is_foreign = render(rows).encode() != content
        self.rows = {step: row for step, row in rows.items() if step < first_step}
        self.is_old = len(self.rows) < len(rows)

    def tidy(self) -> None:
        """Write the file, if it holds more than the rows that count."""
        if self.is_foreign or self.is_old:
            self._write()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers to the row of a step.

        Rows that a full disk has refused come along with the next one.
        """
        self.rows.setdefault(step, {}).update({k: repr(v) for k, v in values.items()})
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.is_foreign:
            beside = _free_name(self.path.with_name("metrics.edited.csv"))
            self.path.rename(beside)
            self.is_foreign = False
            LOGGER.warning(
                "%s: is not as this run wrote it; its %d earlier epochs that can be read are taken "
                "over, and the file is kept as %s", self.path, len(self.rows), beside.name,
            )  # fmt: skip
        with whole_file(self.path) as beside:
            beside.write_bytes(render(self.rows).encode())
        self.is_old = False


def render(rows: Mapping[int, Mapping[str, str]]) -> str:
    """Return the text of the file."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["step", *columns], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows({"step": str(step), **row} for step, row in rows.items())
    return text.getvalue()


def parse(content: bytes) -> dict[int, dict[str, str]]:
    """Return every number that can be read, also of what a spreadsheet has saved.

    It takes UTF-8 with a mark and UTF-16, semicolons and tabs with decimal commas, and cells with
    text. Each line stands for itself, so an open quote costs its own line at most.
    """
    lines = _decode(content).splitlines()
    if not lines:
        return {}
    separator = max(",;\t", key=lines[0].count)
    header, *others = (_cells(line, separator) for line in lines)
    names = [name.strip() for name in header]
    if "step" not in names:
        return {}
    rows: dict[int, dict[str, str]] = {}
    for cells in others:
        row = dict(zip(names, cells, strict=False))
        step = _number(row.pop("step", ""), separator)
        if step is None or not step.is_integer():  # also infinite and not a number
            continue
        numbers = {name: _number(cell, separator) for name, cell in row.items() if name}
        rows[int(step)] = {name: repr(x) for name, x in numbers.items() if x is not None}
    return rows


def _decode(content: bytes) -> str:
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return line.split(separator)


def _number(cell: str, separator: str) -> float | None:
    if separator != ",":  # countries that separate by semicolons write 0,5
        cell = cell.replace(",", ".")
    try:
        return float(cell)
    except ValueError:
        return None


def _free_name(path: Path) -> Path:
    number = 2
    free = path
    while os.path.lexists(free):
        free = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return free
