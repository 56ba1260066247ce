"""Options that several scripts have, and the run or checkpoint that a word names; without torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.config import option
from runtime.errors import UserError

RUNS = Path(__file__).parents[1] / "runs"
MODELS = ("best.pt", "last.pt")  # of a run, the better one first

SHARED: dict[str, dict[str, Any]] = {
    "folders": {
        "default": None,
        "help": "names of the folders where they are others: A=2018,B=2020,label=masks",
        "may_change": True,
    },
    "pairs": {
        "default": None,
        "help": "CSV file that names the files of each pair: split,before,after,label",
        "may_change": True,
    },
    "skip_broken": {
        "default": False,
        "help": "leave out pairs that lack a file, cannot be read or have strange labels",
        "may_change": True,
    },
    "cache_gb": {
        "default": 100.0,
        "help": "GB that all caches of decoded pairs may take on the disk",
        "above": 0,
    },
    "flips": {
        "default": False,
        "help": "average over mirror images: four times the cost",
    },
    "device": {
        "default": "auto",
        "help": "device: auto, cpu, cuda, cuda:1 or mps",
        "form": (r"auto|(cpu|cuda|mps)(:\d+)?", "auto, cpu, cuda, cuda:1 or mps"),
    },
    "amp": {
        "default": "auto",
        "help": "precision of the model; auto takes bf16 where it pays",
        "choices": ("auto", "off", "bf16", "fp16"),
    },
    "cache": {
        "default": "auto",
        "help": "where decoded pairs are kept; auto: where there is room",
        "choices": ("auto", "ram", "disk", "none"),
    },
    "workers": {
        "default": None,
        "help": "loader processes of each process; else by the number of cores",
        "short": "-j",
        "at_least": 0,
        "at_most": 1024,
    },
}


def shared(name: str, *, group: str | None = None) -> Any:
    """Declare a field that several scripts have, from `SHARED`."""
    return option(**SHARED[name], group=group)


def find_model(word: str | Path, runs: Path = RUNS) -> Path:
    """Return the checkpoint that a word names.

    Args:
        word: a run's folder, its name under `runs`, or the path of a checkpoint. Of a run it is
            best.pt, else last.pt.
        runs: the folder of the runs.

    Raises:
        UserError: there is no such run or checkpoint; the newest runs are named.
    """
    path = Path(word)
    if not path.exists() and (runs / word).is_dir():
        path = runs / word
    if path.is_dir():
        found = [path / name for name in MODELS if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds no best.pt or last.pt{newest_runs(runs)}")
        return found[0]
    if not path.is_file():
        raise UserError(f"{word}: no such run or checkpoint{newest_runs(runs)}")
    return path


def newest_runs(runs: Path) -> str:
    """Return what to add to an error: "; the newest runs are runs/b, runs/a", or nothing."""
    times = {}
    with suppress(OSError):
        for folder in runs.glob("[!.]*"):
            written = [written_at(folder / name) for name in MODELS]
            if max(written):
                times[folder] = max(written)
    newest = sorted(times, key=lambda folder: times[folder], reverse=True)[:5]
    return f"; the newest are {', '.join(map(str, newest))}" if newest else ""


def written_at(path: Path) -> float:
    """Return when a file was written, 0 where there is none or it cannot be looked at."""
    try:
        return path.stat().st_mtime if path.is_file() else 0
    except OSError:
        return 0
