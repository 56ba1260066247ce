"""Where a run lives: runs/<name>/, never overwritten, found again to resume.

    config.json    the options      metrics.csv    one row per epoch
    best.pt, last.pt, last.previous.pt      pictures      TensorBoard's event files

Every path inside is relative, so the folder can be moved or copied to another machine.
"""

import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoint import previous_of, read_checkpoint
from errors import UserError


def new_run_folder(output_dir: Path, name: str) -> Path:
    """Create output_dir/name, or name-2, name-3, ... if that is taken.

    Raises:
        UserError: the name leaves the folder, or nothing can be written there.
    """
    check_name(name)
    for number in itertools.count(1):
        folder = output_dir / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not output_dir.is_dir():
                raise UserError(f"--output-dir {output_dir}: is a file, not a folder") from None
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); --output-dir") from None
        return folder
    raise AssertionError("unreachable")


def check_name(name: str | None) -> None:
    """Raise UserError for a name that would leave the folder of the runs."""
    if name is not None and (Path(name).name != name or name in (".", "..")):
        raise UserError(f"--name {name}: give a plain name, without a path")


def find_checkpoint(resume: str, output_dir: Path, name: str | None) -> tuple[Path, dict[str, Any]]:
    """Find and read the checkpoint to go on from.

    Args:
        resume: "auto" for the newest run (or the one called `name`), or the path of a checkpoint
            or a run's folder.
        output_dir: where the runs are.
        name: of the run that "auto" shall take.

    Returns:
        The path of last.pt (or of what was named), whose folder is the run's, and its content.
        A damaged last.pt is passed over, with a word, for the one before it.

    Raises:
        UserError: there is nothing to resume, or every checkpoint of the run is damaged.
    """
    if resume == "auto":
        folders = [output_dir / name] if name else list(output_dir.glob("*"))
        found = [f for f in folders if _checkpoints(f)]
        if not found:
            raise UserError(f"--resume auto: no checkpoint under {output_dir}")
        resume = str(max(found, key=lambda f: max(p.stat().st_mtime for p in _checkpoints(f))))
    path = Path(resume)
    candidates = _checkpoints(path) if path.is_dir() else [path]
    if not candidates:
        raise UserError(f"--resume {resume}: no last.pt in this folder")
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


def _check_entries(path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that a run cannot go on from, before anything is built."""
    best = state.get("best")
    if not (
        isinstance(state.get("weights"), str)
        and isinstance(best, dict)
        and {"epoch", "change_iou"} <= best.keys()
        and isinstance(best["epoch"], int)
        and all(type(v) in (int, float) and abs(v) < 2**63 for v in best.values())
        and all(isinstance(name, str) for name in best)
        and isinstance(state["data"].get("fingerprint"), str)
        and isinstance(state.get("progress"), dict)
        and isinstance(state.get("mlflow_run_id"), str | None)
    ):
        raise UserError(f"{path}: lacks entries of a run; resume from a last.pt of ours")
    if best["epoch"] > 0 and not (path.parent / "best.pt").is_file():
        raise UserError(f"{path}: its best.pt is not beside it; copy the whole folder of the run")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one move.

    Raises:
        UserError: the disk is full or read-only; what was there stays.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from None


def _checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints that can be resumed from, newest first."""
    last = folder / "last.pt"
    return [p for p in (last, previous_of(last)) if p.is_file()]
