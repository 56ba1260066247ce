"""Bands of one pair that several jobs predict, and one joins.

    NAME_parts/about.json       what makes the bands: dates, checkpoint, options
    NAME_parts/00000384.npz     the band that begins with row 384: probability and classes

Each band is a file that is whole or not there, so a job can be killed at any time and started
again: it goes on with the first band that is missing.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mapping.pipeline import Band
from mapping.rasters import PairRows, Scene, SceneFault
from mapping.sidecars import MAKERS
from networks.sliding_window import Windows
from runtime.errors import UserError
from runtime.files import read_json, whole_file, write_json


class Parts:
    """The bands of one pair on the disk.

    Args:
        folder: where the maps will be.
        name: of the pair.
        about: the provenance, with both dates.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]) -> None:
        self.folder = folder / f"{name}_parts"
        made: dict[str, Any] = {key: about.get(key) for key in MAKERS}
        for date in ("before", "after"):
            path = Path(about[date])
            state = path.stat()
            made[f"{date} date"] = [path.name, state.st_size, state.st_mtime_ns]
        self.about = json.loads(json.dumps(made))

    def open(self) -> None:
        """Make the folder.

        Raises:
            UserError: what is there is of other dates or options, or nothing can be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror})") from None
        path = self.folder / "about.json"
        found = read_json(path)
        if found is None:
            write_json(path, self.about)
        else:
            self._check(found)

    def _check(self, found: Any) -> None:
        known = found if isinstance(found, dict) else {}
        other = [key for key in self.about if known.get(key) != self.about[key]]
        if other:
            what = other[0].replace("_", " ")
            raise SceneFault(
                f"{self.folder}: its parts were made with another {what}; remove the folder, or "
                "give another --output-dir"
            )

    def has(self, top: int) -> bool:
        """Whether the band that begins with a row is there."""
        return self._path(top).is_file()

    def write(self, band: Band) -> None:
        """Keep a band.

        Raises:
            UserError: the disk is full.
        """
        path = self._path(band.top)
        try:
            with whole_file(path) as beside, beside.open("wb") as file:
                np.savez_compressed(file, probability=band.probability, classes=band.classes)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from None

    def check_whole(self, windows: Windows) -> None:
        """Raise SceneFault if bands are missing, or are of other dates or options."""
        found = read_json(self.folder / "about.json")
        if found is None:
            raise SceneFault(
                f"{self.folder}: holds no parts to join; make them with --part 1/N, ..."
            )
        self._check(found)
        missing = [i for i, top in enumerate(windows.tops) if not self.has(top)]
        if missing:
            top, end = windows.band(missing[0])
            raise SceneFault(
                f"{self.folder}: {len(missing)} of {len(windows.tops)} bands are missing, the "
                f"first of rows {top} to {end - 1}; start the jobs again that have not ended"
            )

    def read(self, top: int, rows: PairRows) -> Band:
        """Return the band that begins with a row.

        Raises:
            UserError: it is damaged.
        """
        before, after, valid = rows
        path = self._path(top)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                probability, classes = arrays["probability"], arrays["classes"]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
            probability = classes = np.empty(0)
        if probability.shape != valid.shape or classes.shape[1:] != valid.shape:
            raise UserError(f"{path}: is damaged; remove it, and start the job of its part again")
        return Band(top, before, after, probability, classes)

    def _path(self, top: int) -> Path:
        return self.folder / f"{top:08}.npz"


def bands_of_part(windows: Windows, number: int, num_parts: int) -> range:
    """Return the bands of a part, counted from 1; parts are as even as can be."""
    num_bands = len(windows.tops)
    return range(num_bands * (number - 1) // num_parts, num_bands * number // num_parts)


def joined_bands(
    scene: Scene, windows: Windows, parts: Sequence[Parts], leave_if_asked: Callable[[], None]
) -> Generator[list[Band], None, None]:
    """Give all bands of all pairs of a scene, from what jobs have predicted."""
    for part in parts:
        part.check_whole(windows)
    for number in range(len(windows.tops)):
        leave_if_asked()
        top, end = windows.band(number)
        rows = scene.read_pairs(top, end)
        yield [part.read(top, of_pair) for part, of_pair in zip(parts, rows, strict=True)]


def left_of(bands: range, parts: Sequence[Parts], windows: Windows) -> range:
    """Return the bands from the first one on that a pair lacks."""
    tops = windows.tops
    first = next((i for i in bands if not all(p.has(tops[i]) for p in parts)), bands.stop)
    return range(first, bands.stop)
