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

import hashlib
import platform
import reprlib
import shutil
from collections.abc import Mapping, ValuesView
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.config import VERSION
from runtime.errors import UserError
from runtime.files import read_torch_file, whole_file

FORMAT = 1
MOMENTS, RATES = ("exp_avg", "exp_avg_sq"), ("lr", "initial_lr")  # in the states of AdamW
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
    try:
        previous = previous_of(path) if keep_previous else None
        with whole_file(path, previous=previous) as beside, beside.open("wb") as file:
            torch.save({"format": FORMAT, **state, "versions": versions()}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        needed = sum(t.nbytes for t in _tensors(state)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be saved, it needs {needed:.0f} MB and {free:.0f} MB are free "
            f"({reason}); make room and resume, the checkpoint before it is untouched"
        ) from None


def digest_of(path: Path) -> str:
    """Return what tells one checkpoint file from another, wherever it was copied to."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept: last.pt -> last.previous.pt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, running no code in it.

    Raises:
        UserError: missing, damaged, not ours, or of a newer format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such run or checkpoint")
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
            f"it was written by {short(state.get('versions') or 'a later version')}"
        )
    return state


def restore(parts: Mapping[str, Any], state: Mapping[str, Any], source: str | Path) -> None:
    """Fill everything that has a `load_state_dict` from the entry of its name.

    Raises:
        UserError: an entry is missing or does not fit.
    """
    for name, part in parts.items():
        if name == "scaler" and isinstance(state.get(name, {}), dict) and not state.get(name):
            continue  # of a run that was not in float16
        try:
            part.load_state_dict(_trusted(part, state[name]))
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source}: its {name} does not fit this run ({reason})") from None


def _trusted(part: Any, saved: Any) -> Any:
    """Return the state of a part, with nothing in it that the part's own state does not have.

    `load_state_dict` of torch's optimizers and schedulers takes whatever there is: a moment of
    another shape than its weight made the fused AdamW write beyond it, and a schedule's attributes
    may be any.
    """
    if isinstance(part, nn.Module):
        return saved  # strict by itself
    own = part.state_dict()
    if not isinstance(part, Optimizer):
        return _alike(saved, own)
    # of its groups the rates alone: all else is what the run's options say
    rates = [{k: v for k, v in group.items() if k in RATES} for group in own["param_groups"]]
    rates = _alike(saved["param_groups"], rates)
    groups = [group | rate for group, rate in zip(own["param_groups"], rates, strict=True)]
    weights = [weight for group in part.param_groups for weight in group["params"]]
    moments = {}
    for number, entry in saved["state"].items():
        weight = weights[number]
        moments[number] = {
            "step": _alike(entry["step"], torch.zeros(())),
            # in the memory layout of the weight, whatever that of the saved one was
            **{k: torch.empty_like(weight).copy_(_alike(entry[k], weight)) for k in MOMENTS},
        }
    return {"state": moments, "param_groups": groups}


def _alike(saved: Any, own: Any) -> Any:
    """Return `saved`, without what `own` lacks and with what only `own` has.

    Raises:
        ValueError: a part has another type, length or shape.
    """
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            raise ValueError(f"{short(saved)} is no dictionary")
        # names that begin with _ come and go with torch's versions
        if missing := [k for k in own if k not in saved and not k.startswith("_")]:
            raise ValueError(f"lacks {', '.join(missing)}")
        return {k: _alike(saved[k], v) if k in saved else v for k, v in own.items()}
    if isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(f"{short(saved)} is no list of {len(own)}")
        return type(own)(_alike(*pair) for pair in zip(saved, own, strict=True))
    if isinstance(own, Tensor):
        fits = isinstance(saved, Tensor) and saved.shape == own.shape
        if not fits or saved.layout != torch.strided or saved.is_complex():
            raise ValueError(f"a tensor of shape {tuple(own.shape)} is another one")
        return saved
    if isinstance(own, float):
        if type(saved) not in (float, int) or not abs(saved) < 2**63:
            raise ValueError(f"{short(saved)} is no number")
        return float(saved)
    if type(saved) is not type(own) or (isinstance(saved, int) and abs(saved) >= 2**63):
        raise ValueError(f"{short(saved)} is no {type(own).__name__}")
    return saved


def versions() -> dict[str, str]:
    """Return what a result depends on, for checkpoints and run folders."""
    return {
        "repository": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "platform": platform.platform(),
    }


short = reprlib.Repr().repr  # a hostile value may be as long as it likes


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    return [t for p in parts for t in _tensors(p)] if isinstance(parts, list | ValuesView) else []
