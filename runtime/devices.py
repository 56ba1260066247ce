"""What this machine offers: the device, a precision that pays there, workers, memory that stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from runtime.errors import UserError, counted
from runtime.start import usable_cores


def pick_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """Return the device called `name`, or the best one for "auto": CUDA, then MPS, then the CPU.

    Args:
        name: what --device says.
        local_rank: this process's number, where several run on this machine: it takes the GPU of
            that number, or the CPU.

    Raises:
        UserError: the device is not there.
    """
    device = _named(name) if local_rank is None else _device_of_process(name, local_rank)
    if device.type == "cuda":
        # shapes stay the same, so the search for the fastest convolution pays
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it
    return device


def _named(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: give auto, cpu, cuda, cuda:1 or mps") from None
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= there.get(device.type, 0):
        raise UserError(f"--device {name}: PyTorch does not see it here; try --device auto")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" where the device multiplies it faster than float32, else "off".

    float16 is never picked: it needs a scaler and can overflow.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "off"


@dataclass(frozen=True)
class Precision:
    """How numbers are held in a step: autocast's dtype (None is float32) and the scaler."""

    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    @classmethod
    def named(cls, name: str, device: torch.device) -> "Precision":
        """Build from "off", "bf16" or "fp16". Only float16 needs its gradients scaled."""
        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        return cls(dtype, scaler)

    def autocast(self, device: torch.device, *, cache: bool = True) -> torch.autocast:
        """Return the context of a forward pass; `cache`: a weight is cast once, not at each use."""
        is_on = self.dtype is not None
        return torch.autocast(device.type, self.dtype, enabled=is_on, cache_enabled=cache)


def describe(device: torch.device) -> str:
    """Name the device for people: "cuda (NVIDIA H100)", "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = counted(torch.get_num_threads(), "thread")
    return f"cpu ({threads})" if device.type == "cpu" else str(device)


def pick_workers(asked: int | None, num_processes: int = 1) -> int:
    """Return the number of loader processes: `asked`, or one less than the usable cores, at most 8.

    Args:
        asked: the user's choice.
        num_processes: processes that train on this machine and share its cores.
    """
    if asked is not None:
        return asked
    return max(0, min(8, usable_cores() // num_processes - 1))


@contextmanager
def explain_out_of_memory(used: str, remedy: str) -> Iterator[None]:
    """Turn an exhausted device or machine into one line: what was used, and what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's has no type of its own
        is_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not is_cpu:
            raise
        raise UserError(f"out of memory with {used}; try {remedy}") from None


def _device_of_process(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: of several processes each takes its own; cuda or cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not num_gpus):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank + 1} on this machine finds {num_gpus} GPUs: start as many with "
            "--nproc-per-node, or give --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bfloat16 products; without them oneDNN emulates, slower than float32."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, probe, lambda: False)():
            return True
    return False
