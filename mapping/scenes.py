"""Which scenes are to be mapped: two files, or two folders whose files are paired by stem."""

from dataclasses import dataclass
from pathlib import Path

from mapping.rasters import ENDINGS, check_readable
from runtime.errors import UserError


@dataclass(frozen=True)
class ScenePair:
    """Both dates of a scene, and what its maps are called after."""

    name: str
    before: Path
    after: Path


def find_scenes(before: Path, after: Path) -> list[ScenePair]:
    """Return the scene of two files, or those of two folders.

    Raises:
        UserError: a file that is not there or cannot be opened, one without a partner, or nothing
            at all.
    """
    if before.is_dir() != after.is_dir() and before.exists() and after.exists():
        raise UserError(f"{before} and {after}: give two files or two folders")
    if not before.is_dir():
        check_readable(before, after)
        return [ScenePair(before.stem, before, after)]
    first, second = _by_stem(before), _by_stem(after)
    alone = [first[s] for s in first if s not in second]
    alone += [second[s] for s in second if s not in first]
    if alone:
        names = ", ".join(str(path) for path in sorted(alone)[:5])
        raise UserError(f"{len(alone)} files have no partner of their stem: {names}")
    if not first:
        raise UserError(f"{before}: holds no image ({', '.join(sorted(ENDINGS))})")
    check_readable(*first.values(), *second.values())
    return [ScenePair(stem, first[stem], second[stem]) for stem in sorted(first)]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in ENDINGS or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{folder}: {found[path.stem].name} and {path.name}; keep one")
        found[path.stem] = path
    return found
