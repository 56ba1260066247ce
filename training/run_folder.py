"""Where a run lives: runs/<name>/, never overwritten, found again to resume.

    config.json    the options      metrics.csv    one row per epoch
    best.pt, last.pt, last.previous.pt      pictures      TensorBoard's event files
    .lock          held by the process that writes here

Every path inside is relative, so the folder can be moved or copied to another machine. Every file
is written beside and moved into place: a process may be killed at any moment.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from runtime.checkpoint import previous_of, read_checkpoint
from runtime.errors import UserError
from runtime.files import is_there, locked, new_folder, read_json, write_json
from runtime.options import newest_runs, written_at

OPTIONS = "config.json"
PATIENCE = 15  # seconds: a killed process holds its lock until its workers have noticed


def new_run_folder(output_dir: Path, name: str, options: Mapping[str, Any]) -> Path:
    """Create output_dir/name, or name-2, name-3, ... if that is taken, with its config.json.

    Raises:
        UserError: the name leaves the folder, or nothing can be written there.
    """
    check_name(name)
    try:
        return new_folder(output_dir / name, lambda folder: write_json(folder / OPTIONS, options))
    except FileExistsError:
        raise UserError(f"--output-dir {output_dir}: is a file, not a folder") from None
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
        raise UserError(f"{output_dir / name}: {reason}; --output-dir") from None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a run.

    Raises:
        UserError: another one is still at it, or nothing can be written there.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock", PATIENCE))
        except TimeoutError:
            raise UserError(
                f"{folder}: this run is still running; wait for it, or stop it and resume"
            ) from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
        yield


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in a run that is claimed."""
    for unfinished in folder.glob("*.tmp"):
        unfinished.unlink(missing_ok=True)


def check_name(name: str | None) -> None:
    """Raise UserError for a name that would leave the folder of the runs."""
    if name is not None and (Path(name).name != name or name in (".", "..")):
        raise UserError(f"--name {name}: give a plain name, without a path")


def find_launch(launch: str | None, output_dir: Path) -> Path | None:
    """Return the folder of the newest run that this launch of torchrun has begun or resumed."""
    found = [
        folder
        for folder in output_dir.glob("[!.]*")
        if launch is not None and _read_options_file(folder).get("launch") == launch
    ]
    return max(found, key=lambda folder: written_at(folder / OPTIONS), default=None)


def find_checkpoint(
    resume: str,
    output_dir: Path,
    name: str | None,
    claim: Callable[[Path], object] = lambda _: None,
) -> tuple[Path, dict[str, Any] | None]:
    """Find and read the checkpoint to go on from.

    Args:
        resume: "auto" for the newest run (or the one called `name`), a run's folder, its name in
            `output_dir`, or one of its checkpoints.
        output_dir: where the runs are.
        name: of the run that "auto" shall take.
        claim: is called with the run's folder before anything in it is read to go on from, so that
            no other process writes there from then on.

    Returns:
        The path of last.pt (or of what was named), whose folder is the run's, and its content.
        A damaged last.pt is passed over, with a word, for the one before it. The content is None
        where the run was killed before it saved anything, so that it has to begin again.

    Raises:
        UserError: there is nothing to resume, or every checkpoint of the run is damaged.
    """
    if resume == "auto":
        folders = [output_dir / name] if name else list(output_dir.glob("[!.]*"))
        found = [f for f in folders if _checkpoints(f) or _never_saved(f)]
        if not found:
            raise UserError(f"--resume auto: no checkpoint under {output_dir}")
        resume = str(max(found, key=_last_sign))
    path = Path(resume)
    if not path.exists() and (output_dir / resume).is_dir():
        path = output_dir / resume
    if not path.exists():
        raise UserError(f"--resume {resume}: no such run or checkpoint{newest_runs(output_dir)}")
    if path.name == "best.pt" and _checkpoints(path.parent):
        path = path.parent  # it names its run, which goes on from last.pt
    if path.is_dir() and not _checkpoints(path) and not _never_saved(path):
        raise UserError(f"--resume {resume}: no last.pt in this folder")
    claim(path if path.is_dir() else path.parent)
    candidates = _checkpoints(path) if path.is_dir() else [path]
    if not candidates:
        print(f"{path}: was ended before its first checkpoint, so it begins again")
        return path / "last.pt", None
    faults = []
    for candidate in candidates:
        try:
            state = read_checkpoint(candidate)
        except UserError as error:
            faults.append(str(error))
            continue
        if "optimizer" not in state:
            raise UserError(f"{candidate}: holds weights only; resume from last.pt beside it")
        if faults:
            print(f"{faults[0]}; resuming from {candidate.name}")
            # out of the way, so that it is not kept as the checkpoint before the next one
            candidates[0].replace(candidates[0].with_suffix(".damaged"))
        _check_entries(candidate, state)
        return candidate, state
    raise UserError("; ".join(faults))


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options in a run's config.json, empty where there is none."""
    content = _read_options_file(folder)
    return {name: content[name] for name in content if name not in ("versions", "launch")}


def _read_options_file(folder: Path) -> dict[str, Any]:
    content = read_json(folder / OPTIONS)
    return content if isinstance(content, dict) else {}


def _never_saved(folder: Path) -> bool:
    """Whether a run has begun here and was ended before it wrote last.pt, its first file of all."""
    names = ("best.pt", "metrics.csv")
    return bool(read_options(folder)) and not any(is_there(folder / name) for name in names)


def _last_sign(folder: Path) -> float:
    """Return when a run last wrote a checkpoint, or else began."""
    return max(written_at(path) for path in _checkpoints(folder) or [folder / OPTIONS])


def _check_entries(path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that a run cannot go on from, before anything is built."""
    missing = [name for name in ("weights", "best", "progress") if state.get(name) is None]
    missing += [name for name in ["fingerprint"] if state["data"].get(name) is None]
    if missing:
        raise UserError(
            f"{path}: lacks {', '.join(missing)}; resume from a last.pt of this program"
        )
    if state["best"]["epoch"] > 0 and not (path.parent / "best.pt").is_file():
        raise UserError(f"{path}: its best.pt is not beside it; copy the whole folder of the run")


def _checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints that can be resumed from, newest first."""
    last = folder / "last.pt"
    return [p for p in (last, previous_of(last)) if is_there(p)]
