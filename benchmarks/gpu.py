"""All there is to ask of a GPU, in less than ten minutes and unattended.

    bash benchmarks/gpu.sh OUT                     on the machine; it says what to fetch before
    python benchmarks/gpu.py OUT                   the same where everything is installed
    python benchmarks/gpu.py OUT --only run,trace
    python benchmarks/gpu.py OUT --device cpu --tiny     whether it works at all

tests      python -m pytest -m cuda
step       the training step over the batch size, the encoder frozen or learning; memory, and the
           share of the most that bfloat16 reaches here
peers      naive, ours and other people's models in turns
run        main.py on as many pairs of 1,024 x 1,024 as LEVIR-CD has
scene      the network on a pair of 10,000 x 10,000 in memory; with rasterio predict.py on GeoTIFFs
trace      what a step launches: a table, and a trace for chrome://tracing
compile    the training step compiled

Each part is a process of its own with a time limit. It writes OUT/gpu_PART-DEVICE.json anew with
each figure, so that a part that was cut off keeps what was done.
"""

import argparse
import collections
import csv
import gzip
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import batch_of, flops_per_pair, ours, train, variants

from networks.sliding_window import predict_bands
from pairs.synthetic.sample_set import make_pair

LEVIR = {"train": 445, "val": 64}  # pairs
EPOCHS = 30  # of a run
TILE = 512


def parts() -> dict[str, tuple[Callable[[argparse.Namespace], None], int]]:
    """Return what there is to do, and the most seconds that each part may take."""
    return {
        "tests": (tests, 150),
        "step": (step, 150),
        "peers": (peers, 90),
        "run": (run, 150),
        "scene": (scene, 100),
        "trace": (trace, 60),
        "compile": (compiled, 300),
    }


def tests(arguments: argparse.Namespace) -> None:
    """Run the tests that need a GPU, and keep each line that pytest prints."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/test_cuda.py"]
    command += ["-vv", "--tb=short", "-n"]  # one v undoes the q of pyproject.toml
    command += ["0", "-k", "full"] if arguments.tiny else ["4"]
    command += ["-p", "no:benchmark"]  # where it is installed, it warns of the processes
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=measure.HERE.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line.rstrip())
            print(lines[-1], flush=True)
            if "PASSED" in line or "FAILED" in line:
                save(arguments, {"exit_code": None, "output": lines[-300:]})
    save(arguments, {"exit_code": process.returncode, "output": lines[-300:]})
    if process.returncode:
        sys.exit(process.returncode)


def step(arguments: argparse.Namespace) -> None:
    """Time the training step over batch sizes, with a frozen and with a learning encoder."""
    device = torch.device(arguments.device)
    found: dict[str, Any] = {
        "ceiling_flops": measure.ceilings(device, 0.25 if arguments.tiny else None),
        "rows": [],
    }
    small, large = (2, 2) if arguments.tiny else (8, 64)
    for num_pairs in (small, large):
        add_step(arguments, found, num_pairs)
    for num_pairs in (small, large):
        add_step(arguments, found, num_pairs, learns=True)
    for num_pairs in (small,) if arguments.tiny else (128, 256, 32):
        add_step(arguments, found, num_pairs)
    for num_pairs in (small, large):
        add_step(arguments, found, num_pairs, mode="no graph")


def compiled(arguments: argparse.Namespace) -> None:
    """Time the training step compiled, then captured; compiling takes up to a minute."""
    found: dict[str, Any] = {"ceiling_flops": {}, "rows": []}
    for num_pairs, learns in ((64, False), (8, False), (64, True)):
        mode = "" if arguments.device == "cpu" else "compiled"
        add_step(arguments, found, 2 if arguments.tiny else num_pairs, learns=learns, mode=mode)


def add_step(
    arguments: argparse.Namespace,
    found: dict[str, Any],
    pairs: int,
    *,
    learns: bool = False,
    mode: str = "",
) -> None:
    """Add a row: how fast a step is, how much memory it takes; mode "" is as main.py does it."""
    device, size = torch.device(arguments.device), 64 if arguments.tiny else 256
    encoder = "learns" if learns else "frozen"
    row: dict[str, Any] = {"batch": pairs, "size": size, "encoder": encoder, "mode": mode}
    with explained(row):
        options: dict[str, Any] = {"backbone": backbone(arguments), "freeze_backbone": not learns}
        model = ours(**options)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        if mode == "compiled":
            torch._dynamo.reset()
            model.to(device).compile()
        steps = 1 if arguments.tiny else max(8, 1024 // pairs)
        batch = batch_of(pairs, size, device)
        work = train(model, device, batch, steps, may_capture=mode != "no graph")
        (rates,) = measure.alternate({"ours": work}, device, 1 if arguments.tiny else 3).values()
        row |= rates
        row["peak_bytes"] = measure.peak_memory(device)
        row["flops_per_pair"] = flops_per_pair(2, size, device, **options)
        if limit := found["ceiling_flops"].get("bf16"):
            row["share_of_bf16"] = row["rate"] * row["flops_per_pair"] / limit
    found["rows"].append(row)
    print(
        {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    )
    save(arguments, found)


def peers(arguments: argparse.Namespace) -> None:
    """Time ours and other people's models in turns, at a small and at a large batch."""
    device = torch.device(arguments.device)
    arguments.size, arguments.compile = 64 if arguments.tiny else 256, False
    found: dict[str, Any] = {"batches": {}}
    for number in (2,) if arguments.tiny else (8, 64):
        arguments.batch, arguments.size, arguments.compile = (
            number,
            64 if arguments.tiny else 256,
            False,
        )
        steps = 1 if arguments.tiny else max(4, 512 // number)
        works = {}
        for name, build in variants(arguments, device, steps).items():
            fault: dict[str, Any] = {}
            with explained(fault):
                works[name] = build()
                works[name]()
            if fault:
                works.pop(name, None)
                found.setdefault("faults", {})[f"{name}, batch {number}"] = fault["fault"]
        table = measure.alternate(works, device, 1 if arguments.tiny else 5)
        measure.show(table, "pairs/s")
        found["batches"][str(number)] = table
        save(arguments, found)


def run(arguments: argparse.Namespace) -> None:
    """Train by main.py; the first epoch also decodes, the last one tells how fast it is."""
    counts = {"train": 4, "val": 2} if arguments.tiny else LEVIR
    side, crop = (64, 64) if arguments.tiny else (1024, 256)
    found: dict[str, Any] = {"pairs": counts, "side": side, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        write_data(data, counts, side)
        for batch in (2,) if arguments.tiny else (64, 8):
            row = {"batch": batch, **one_run(arguments, data, batch, crop)}
            found["rows"].append(row)
            print(row)
            save(arguments, found)


def one_run(arguments: argparse.Namespace, data: Path, batch: int, crop: int) -> dict[str, Any]:
    """Return what a run of a few epochs says of itself."""
    runs, epochs = data.parent / f"runs-{batch}", 1 if arguments.tiny else 3
    command = [
        sys.executable, "main.py", "--data-dir", str(data), "--output-dir", str(runs), "--name",
        "speed", "--epochs", str(epochs), "--batch-size", str(batch), "--crop-size", str(crop),
        "--backbone", backbone(arguments), "--weights", "none", "--freeze-backbone",
        "--device", arguments.device, "--no-mlflow",
    ]  # fmt: skip
    command += ["--cache", "ram", "--workers", "0"] if arguments.tiny else []
    began = time.perf_counter()
    done = in_repository(command)
    seconds = time.perf_counter() - began
    if done.returncode:
        return {"fault": done.stderr[-2000:]}
    rows = list(csv.DictReader((runs / "speed" / "metrics.csv").open()))
    last = {name: float(value) for name, value in rows[-1].items() if value and "/" not in name}
    shutil.rmtree(runs)
    return {"seconds": seconds, "epochs": epochs, "last_epoch": last}


def write_data(folder: Path, counts: dict[str, int], side: int) -> None:
    """Write pairs of PNGs, mosaics of few drawn tiles: no two alike, and quickly drawn."""
    tile = min(TILE, side)
    tiles = [make_pair(0, "train", index, size=tile) for index in range(8)]
    jobs = [
        (folder, tiles, split, i, side // tile) for split, n in counts.items() for i in range(n)
    ]
    with get_context("spawn").Pool() as pool:
        pool.starmap(write_pair, jobs, chunksize=8)


def write_pair(folder: Path, tiles: list[Any], split: str, index: int, across: int) -> None:
    draw = np.random.default_rng((len(split), index))
    places = draw.integers(len(tiles), size=(across, across))
    turns = draw.integers(4, size=(across, across))
    for part, name in enumerate(("A", "B", "label")):
        rows = [
            np.concatenate([np.rot90(tiles[k][part], t) for k, t in zip(*row, strict=True)], axis=1)
            for row in zip(places, turns, strict=True)
        ]
        pixels = np.concatenate(rows)
        pixels[0, 0] = pixels[0, 0] // 2 + index % 100 if name != "label" else pixels[0, 0]
        path = folder / split / name / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)


def scene(arguments: argparse.Namespace) -> None:
    """Time the network over a large pair; then all of predict.py, if GeoTIFFs can be written."""
    device, side = torch.device(arguments.device), 256 if arguments.tiny else 10_000
    found: dict[str, Any] = {"side": side, "network": [], "predict.py": []}
    generator = torch.Generator().manual_seed(0)
    dates = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    for window, batch in ((128, 2),) if arguments.tiny else ((1024, 16), (512, 32), (512, 4)):
        model = ours(backbone=backbone(arguments)).to(device)
        row: dict[str, Any] = {"window": window, "batch": batch}
        for _ in range(1 if arguments.tiny else 2):  # the first time also prepares
            measure.synchronize(device)
            began = time.perf_counter()
            with explained(row):
                bands = predict_bands(
                    model, lambda top, bottom: (dates[0, :, top:bottom], dates[1, :, top:bottom]),
                    side, side, window=window, overlap=window // 4, batch_size=batch,
                )  # fmt: skip
                collections.deque(bands, maxlen=0)
            measure.synchronize(device)
            seconds = time.perf_counter() - began
        row |= {"seconds": seconds, "megapixels_per_second": side**2 / 1e6 / seconds}
        found["network"].append(row)
        print(row)
        save(arguments, found)
    if importlib.util.find_spec("rasterio"):
        found["predict.py"] = [whole_scene(arguments, side, 32)]
        save(arguments, found)


def whole_scene(arguments: argparse.Namespace, side: int, batch: int) -> dict[str, Any]:
    """Map a pair of GeoTIFFs, from reading to polygons."""
    from scene import write_scene

    from mapping.maps import Kinds
    from mapping.scenes import ScenePair
    from predict import Config, job_of

    row: dict[str, Any] = {"batch": batch}
    with tempfile.TemporaryDirectory() as temporary, explained(row):
        folder = Path(temporary)
        write_scene(folder, side)
        before, after = folder / "before.tif", folder / "after.tif"
        model = ours(backbone=backbone(arguments)).to(arguments.device).eval()
        config = Config("", "", "", output_dir=str(folder / "out"), batch_size=batch)
        job = job_of(config, model, Kinds.of("change", 1, {}))
        (result,) = job.run([ScenePair("scene", before, after)]) or []
        row |= {
            "seconds": result.seconds, "megapixels_per_second": side**2 / 1e6 / result.seconds,
            "polygons": result.polygons,
        }  # fmt: skip
    print(row)
    return row


def trace(arguments: argparse.Namespace) -> None:
    """Look into a training step at a small and at a large batch."""
    device, size = torch.device(arguments.device), 64 if arguments.tiny else 256
    found: dict[str, Any] = {"rows": []}
    for pairs in (2,) if arguments.tiny else (8, 64):
        model = ours(backbone=backbone(arguments))
        batch = batch_of(pairs, size, device)
        work = train(model, device, batch, 3, may_capture=False)  # a graph's kernels have no names
        work()
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with profile(activities=activities) as profiler:
            work()
            measure.synchronize(device)
        found["rows"].append({"batch": pairs, **told(profiler.key_averages(), device, steps=3)})
        save(arguments, found)
    raw = arguments.out / "trace.json"
    profiler.export_chrome_trace(str(raw))
    with raw.open("rb") as plain, gzip.open(f"{raw}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    raw.unlink()


def told(events: Any, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Return launches and waits per step, and milliseconds per step of the dearest operators."""
    on_gpu = device.type == "cuda"
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # cuDNN and cuBLAS launch through the driver: cuLaunchKernelEx
    names = {"launches": ("cudaLaunchKernel", "cuLaunchKernel"), "waits": "cudaStreamSynchronize"}
    counts = {n: sum(e.count for e in events if e.key.startswith(k)) for n, k in names.items()}
    # an operator has the time of its kernels, which are listed themselves, too
    events = [event for event in events if event.device_type == DeviceType.CPU]
    dearest = sorted(events, key=lambda event: -getattr(event, time_of))[:30]
    return {
        **{name: count / steps for name, count in counts.items()},
        "milliseconds": {e.key[:100]: getattr(e, time_of) / 1000 / steps for e in dearest},
        "milliseconds_of_all": sum(getattr(e, time_of) for e in events) / 1000 / steps,
        "milliseconds_of_the_host": sum(e.self_cpu_time_total for e in events) / 1000 / steps,
    }


def in_repository(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's folder, and keep what it prints."""
    return subprocess.run(
        command, check=False, cwd=measure.HERE.parent, capture_output=True, text=True
    )


def backbone(arguments: argparse.Namespace) -> str:
    """Return the encoder: of the question, or a small one."""
    return "resnet18" if arguments.tiny else "resnet50"


@contextmanager
def explained(row: dict[str, Any]) -> Iterator[None]:
    """Note a fault, such as a full memory, and go on with the next figure."""
    try:
        yield
    except Exception as error:
        row["fault"] = f"{type(error).__name__}: {error}"[:500]
        torch.cuda.empty_cache()


def save(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what this part has found so far."""
    arguments.output = arguments.out / f"gpu_{arguments.part}-{arguments.device}.json"
    measure.save(arguments.part, found, arguments)


def lead(arguments: argparse.Namespace) -> int:
    """Run each part in a process of its own, as long as there is time; return an exit code."""
    began, failed = time.monotonic(), []
    for name, (_, limit) in parts().items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        left = 60 * arguments.minutes - (time.monotonic() - began)
        if left < 10:
            failed.append(f"{name}: no time left")
            continue
        command = [sys.executable, __file__, str(arguments.out), "--part", name]
        command += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
        print(f"==== {name}, at {time.monotonic() - began:.0f} s", flush=True)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            if code := process.wait(min(limit, left)):
                failed.append(f"{name}: exit code {code}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            failed.append(f"{name}: cut off after {min(limit, left):.0f} s")
    print(f"==== done after {time.monotonic() - began:.0f} s", *failed, sep="\n", flush=True)
    return int(bool(failed))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do in a minute")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    parser.add_argument("--only", help="some of the parts: run,trace")
    parser.add_argument("--part", choices=parts(), help="one of them, in this process")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else []
    if unknown := [name for name in wanted if name not in parts()]:
        parser.error(f"--only {','.join(unknown)}: choose of {', '.join(parts())}")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.part:
        sys.exit(lead(arguments))
    if arguments.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    parts()[arguments.part][0](arguments)


if __name__ == "__main__":
    main()
