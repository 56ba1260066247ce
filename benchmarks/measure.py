"""What the benchmarks share: alternated timing, memory, the machine's ceiling, results as files.

Machines are noisy, so variants take turns, and what counts is the ratio of neighbours: variant i of
round r against the baseline of round r. The median over the rounds is reported, with the quartiles.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

sys.path.insert(0, str(HERE.parent))  # the scripts of the repository, wherever this is called from

Work = Callable[[], float]  # does some work and returns how much: pairs, FLOPs


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments.add_argument(
        "--rounds", type=int, default=7, help="of all variants (default: %(default)s)"
    )
    arguments.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    arguments.add_argument("--only", help="run one variant and print its peak memory")
    arguments.add_argument("-o", "--output", type=Path, help="the JSON file to write")
    return arguments


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    variants: Mapping[str, Work],
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time the variants in turn; the first one is the baseline.

    Of work in this process alone, `time.process_time` as the clock does not count what others do.

    Returns:
        Of each: n, the median rate (work per second), its quartiles, and the median and quartiles
        of its ratio to the baseline of the same round.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, work in variants.items():
            synchronize(device)
            start = clock()
            done = work()
            synchronize(device)
            if turn >= warmup:
                rates[name].append(done / (clock() - start))
            print(f"\r{turn + 1}/{warmup + rounds} {name:40}", end="", file=sys.stderr)
    print("\r" + 60 * " " + "\r", end="", file=sys.stderr)
    baseline = rates[next(iter(variants))]
    table = {}
    for name, of_variant in rates.items():
        ratios = [a / b for a, b in zip(of_variant, baseline, strict=True)]
        table[name] = {"n": rounds, **_spread("rate", of_variant), **_spread("ratio", ratios)}
    return table


def _spread(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process held: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, ru_maxrss goes on counting from the parent's
        lines = status.read_text("ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_of(variant: str) -> int:
    """Run this very command with one variant in a process of its own."""
    command = [sys.executable, *sys.argv, "--only", variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def ceilings(device: torch.device, scale: float | None = None) -> dict[str, float]:
    """Measure the most FLOP/s that convolutions and products reach here, per precision."""
    found = {}
    scale = scale or (4 if device.type == "cuda" else 1)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        side = int(2048 * scale)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        x = torch.randn(int(8 * scale), 256, 32, 32, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype)
        kernel = kernel.contiguous(memory_format=torch.channels_last)

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> float:
            a @ b
            return 2.0 * len(a) ** 3

        def convolution(x: torch.Tensor = x, kernel: torch.Tensor = kernel) -> float:
            F.conv2d(x, kernel, padding=1)
            return 2.0 * x.numel() * 256 * 9

        with torch.inference_mode():
            table = alternate({"product": product, "convolution": convolution}, device, 9, 3)
        found[name] = max(row["rate"] for row in table.values())
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    found: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def result_path(name: str, arguments: argparse.Namespace) -> Path:
    """Return where `save` writes: --output, else NAME-DEVICE.json among the results."""
    device = torch.device(arguments.device)
    path: Path = arguments.output or RESULTS / f"{name}-{device.type}.json"
    return path


def commit() -> str:
    """Return the short name of the commit that is checked out."""
    return _git("rev-parse", "--short", "HEAD")


def save(name: str, results: Mapping[str, Any], arguments: argparse.Namespace) -> Path:
    """Write a result with all it depends on."""
    device = torch.device(arguments.device)
    path = result_path(name, arguments)
    script = Path(sys.argv[0]).name
    content = {
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "commit": commit(),
        "changed_files": len(_git("status", "--porcelain", "--", "*.py").splitlines()),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
        },
        "hardware": hardware(device),
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {os.path.relpath(path)}")
    return path


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def show(table: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Print rates and ratios."""
    print(f"{'':34}{unit:>12}{'ratio':>9}   quartiles of the ratio")
    for name, row in table.items():
        print(
            f"{name:34}{row['rate']:12.2f}{row['ratio']:9.2f}"
            f"   {row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}"
        )
