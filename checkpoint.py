"""Checkpoints: one file, tensors and plain types, written beside and then moved into place.

    format           1
    model            state dict, float32, plain names          model_kwargs   of build_model
    optimizer, scheduler, scaler, progress                     absent from best.pt
    best             epoch and scores of the best so far       weights        the encoder began with
    config           of the run                                data           what it was trained on
    mlflow_run_id, versions

No random state is kept, for there is none: order, crops and augmentation are functions of
(seed, epoch, index), and the model draws nothing.
"""

import os
import platform
import reprlib
import shutil
from collections.abc import Mapping, ValuesView
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torchvision
from torch import Tensor

from errors import UserError
from model import SiameseUNet, build_model
from torch_file import read_torch_file

FORMAT = 1
VERSION = "0.1.0"  # of this repository, as in CHANGELOG.md
REQUIRED = {"format": int, "model": dict, "model_kwargs": dict, "config": dict, "data": dict}


def save_checkpoint(path: Path, state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
    """Write a checkpoint so that at every moment a whole one lies on the disk.

    Args:
        path: where to; a file there stays until the new one is complete.
        state: tensors and plain types, without "format" and "versions".
        keep_previous: keep what `path` held under `previous_of(path)`.

    Raises:
        UserError: the weights are not finite, or the disk is full or read-only.
    """
    for name, tensor in state["model"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: not saved, for {name} is no longer finite; try a lower --lr")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            torch.save({"format": FORMAT, **state, "versions": versions()}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            path.replace(previous_of(path))
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        needed = sum(t.nbytes for t in _tensors(state)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be saved, it needs {needed:.0f} MB and {free:.0f} MB are free "
            f"({reason}); make room and resume, the checkpoint before it is untouched"
        ) from None


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept: last.pt -> last.previous.pt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, running no code in it.

    Raises:
        UserError: missing, damaged, not ours, or of a newer format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = read_torch_file(path, checked=True)
    except ValueError as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: not one of our checkpoints, it holds a {type(state).__name__}")
    for key, kind in REQUIRED.items():
        if not isinstance(state.get(key), kind):
            raise UserError(
                f"{path}: not one of our checkpoints, '{key}' is {type(state.get(key)).__name__}; "
                "for the weights of a backbone alone use --weights"
            )
    if state["format"] > FORMAT:
        raise UserError(
            f"{path}: format {state['format']} is newer than this code's {FORMAT}; "
            f"it was written by {state.get('versions') or 'a later version'}"
        )
    return state


def restore(parts: Mapping[str, Any], state: Mapping[str, Any], source: str | Path) -> None:
    """Fill everything that has a `load_state_dict` from the entry of its name.

    Raises:
        UserError: an entry is missing or does not fit.
    """
    for name, part in parts.items():
        if name == "scaler" and not state.get(name):
            continue  # of a run that was not in float16
        try:
            part.load_state_dict(state[name])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source}: its {name} does not fit this run ({reason})") from None


def restore_model(state: Mapping[str, Any], source: str | Path) -> SiameseUNet:
    """Build the model that a checkpoint describes and fill it.

    Raises:
        UserError: the description is none of a model, or its weights do not fit it.
    """
    known = get_type_hints(build_model)
    for name, value in state["model_kwargs"].items():
        if name not in known or name == "return":
            raise UserError(f"{source}: its model cannot be built ({name!r} is unknown here)")
        if type(value) is not known[name]:
            raise UserError(f"{source}: its model cannot be built ({name} is {_short(value)})")
    try:
        model = build_model(**state["model_kwargs"])
    except (UserError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its model cannot be built ({reason})") from None
    restore({"model": model}, state, source)
    return model


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SiameseUNet:
    """Load a trained model for prediction: on `device`, in eval mode.

    Args:
        path: of best.pt or last.pt in a run's folder.
        device: where to put it.

    Raises:
        UserError: the file is not one of our checkpoints.
    """
    return restore_model(read_checkpoint(Path(path)), path).to(device).eval()


def versions() -> dict[str, str]:
    """Return what a result depends on, for checkpoints and run folders."""
    return {
        "repository": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "platform": platform.platform(),
    }


_short = reprlib.Repr().repr  # a hostile value may be as long as it likes


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    return [t for p in parts for t in _tensors(p)] if isinstance(parts, list | ValuesView) else []
