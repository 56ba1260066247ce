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
from collections.abc import Callable, Mapping, ValuesView
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.config import VERSION
from runtime.errors import UserError
from runtime.files import file_size_limit, read_torch_file, whole_file

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
        path.parent.mkdir(parents=True, exist_ok=True)
        previous = previous_of(path) if keep_previous else None
        with whole_file(path, previous=previous) as beside, beside.open("wb") as file:
            torch.save({"format": FORMAT, **state, "versions": versions()}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        needed = sum(t.nbytes for t in _tensors(state))
        raise UserError(f"{path}: cannot be saved, {_why_not(path, needed, error)}") from None


def _why_not(path: Path, needed: int, error: Exception) -> str:
    """Say why a file cannot be written, and what to do: a limit is no full disk."""
    rest = "and resume, the checkpoint before it is untouched"
    limit = file_size_limit()
    if limit is not None and needed > limit:
        return (
            f"it needs {needed / 1e6:.0f} MB and no file may have more than {limit / 1e6:.0f} MB "
            f"here (ulimit -f); raise the limit {rest}"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return f"{reason}; make its folder writable {rest}"
    return (
        f"it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free ({reason}); "
        f"make room {rest}"
    )


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
    for entry, (is_right, expected) in ENTRIES.items():
        *parents, name = entry.split(".")
        holder = state.get(parents[0]) or {} if parents else state
        if (value := holder.get(name)) is not None and not is_right(value):
            raise UserError(
                f"{path}: its entry {entry} is {short(value)}, not {expected}; it is damaged, or "
                "was not written by this program"
            )
    return state


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and not abs(value) >= 2**63  # type: ignore[arg-type]


def _is_list(value: object, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(is_right(part) for part in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_label(value: object) -> bool:
    return _is_count(value) and value <= 65535  # type: ignore[operator]


def _is_color(value: object) -> bool:
    return _is_list(value, _is_count) and len(value) == 3 and max(value) <= 255  # type: ignore


def _are_scores(value: object) -> bool:
    return (
        isinstance(value, dict)
        and {"epoch", "change_iou"} <= value.keys()
        and _is_count(value["epoch"])
        and all(_is_text(name) and _is_number(score) for name, score in value.items())
    )


def _is_plain(value: object) -> bool:
    """Whether it is a value that an option may have."""
    return value is None or isinstance(value, bool | str) or _is_number(value)


def _are_options(value: object) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name) and (_is_plain(option) or _is_list(option, _is_plain))
        for name, option in value.items()
    )


# What each entry is, where there is one; restoring judges the states of optimizer and schedule.
ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "best": (_are_scores, "an epoch with its scores"),
    "weights": (_is_text, "text"),
    "mlflow_run_id": (_is_text, "text"),
    "progress": (lambda value: isinstance(value, dict), "a dictionary"),
    "versions": (lambda value: isinstance(value, dict), "a dictionary"),
    "config": (_are_options, "a dictionary of options"),
    "config.data_dir": (_is_text, "text"),
    "config.batch_size": (lambda value: _is_count(value) and value > 0, "a positive number"),
    "config.mask_values": (lambda value: _is_list(value, _is_label), "a list of label values"),
    "data.fingerprint": (_is_text, "text"),
    "data.mask_values": (lambda value: _is_list(value, _is_label), "a list of label values"),
    "data.class_names": (lambda value: _is_list(value, _is_text), "a list of names"),
    "data.class_colors": (lambda value: _is_list(value, _is_color), "a list of colours"),
    "progress.epoch": (_is_count, "a number of epochs"),
    "progress.batch": (_is_count, "a number of batches"),
}


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
