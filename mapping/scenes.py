"""Which files are the dates of which scene, and what the maps are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from runtime.errors import UserError, counted

# Rasters have any ending; these are looked for in folders
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".jp2", ".vrt", ".img"}


@dataclass(frozen=True)
class ScenePair:
    """Both dates of a scene, and what its maps are called after."""

    name: str
    before: Path
    after: Path


Series = list[ScenePair]  # the later date of one is the earlier one of the next


def find_scenes(*dates: Path) -> list[Series]:
    """Return the scene of some files, or those of some folders, whose files share their stems.

    Two dates make one pair, called after the earlier one. More make a series: each date is compared
    with the one before, and the pairs are called A_to_B after their files, or STEM_A_to_B after
    their folders.

    Raises:
        UserError: a file that is not there or cannot be opened, one without a partner, or nothing
            at all.
    """
    if len({date.is_dir() for date in dates}) > 1 and all(date.exists() for date in dates):
        number = "two" if len(dates) == 2 else "all"
        raise UserError(f"{' and '.join(map(str, dates))}: give {number} files or {number} folders")
    if not dates[0].is_dir():
        return [_series(dates)]
    folders = [_by_stem(date) for date in dates]
    stems = sorted(set().union(*folders))
    odd = [stem for stem in stems if not all(stem in folder for folder in folders)]
    alone = [folder[stem] for stem in odd for folder in folders if stem in folder]
    if alone:
        names = ", ".join(str(path) for path in sorted(alone)[:5])
        raise UserError(
            f"{counted(len(alone), 'file')} without a partner of the same stem: {names}"
        )
    if not stems:
        raise UserError(f"{dates[0]}: holds no image ({', '.join(sorted(ENDINGS))})")
    return [_series([folder[stem] for folder in folders]) for stem in stems]


def _series(dates: Sequence[Path]) -> Series:
    first = dates[0].stem
    if len(dates) == 2:
        return [ScenePair(first, *dates)]
    is_one_stem = {date.stem for date in dates} == {first}
    words = [date.absolute().parent.name if is_one_stem else date.stem for date in dates]
    start = f"{first}_" if is_one_stem else ""
    names = [f"{start}{before}_to_{after}" for before, after in pairwise(words)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{dates[0]} and later: two maps would be called {twice}; rename the dates")
    return [ScenePair(name, *pair) for name, pair in zip(names, pairwise(dates), strict=True)]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in ENDINGS or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{folder}: {found[path.stem].name} and {path.name}; keep one")
        found[path.stem] = path
    return found
