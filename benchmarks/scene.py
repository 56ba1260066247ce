"""How fast predict.py maps a scene, against the network alone, and what memory it takes.

    python benchmarks/scene.py runs/NAME/best.pt
    python benchmarks/scene.py runs/NAME/best.pt --sizes 2500 5000 10000 20000 --device cuda
    python benchmarks/scene.py runs/NAME/best.pt --threads 1 --side 3072 --sizes    turns alone
    python benchmarks/scene.py

GeoTIFF pairs of SIZE x SIZE pixels, a mosaic of the synthetic sample set, from reading to polygons
and cloud-optimised files. First, at --side, the network over the same pixels in memory and all of
predict.py take turns: the ratio of their rates, and the CPU seconds of all but the network. Then
scenes of growing size, each in a process of its own. Without a checkpoint single pixels are
compared instead: what is left is the cost of all but the network.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor, nn

from mapping.maps import Kinds
from mapping.scenes import ScenePair
from model import load_model
from networks.sliding_window import predict_bands
from pairs.synthetic.sample_set import make_pair
from predict import Config, job_of, predict
from runtime.checkpoint import read_checkpoint
from runtime.memory import keep_freed_memory

TILE, NUM_TILES = 512, 8


def write_scene(folder: Path, size: int) -> None:
    """Write before.tif and after.tif, tiled, a row of tiles at a time."""
    import rasterio
    from rasterio.transform import from_origin

    tiles = [make_pair(0, "test", i, size=TILE) for i in range(NUM_TILES)]
    for date, name in enumerate(("before", "after")):
        draw = np.random.default_rng(0)  # the same places for both dates
        with rasterio.open(
            folder / f"{name}.tif", "w", driver="GTiff", count=3, height=size, width=size,
            dtype="uint8", crs="EPSG:32632", transform=from_origin(5e5, 5.2e6, 0.5, 0.5),
            tiled=True, blockxsize=TILE, blockysize=TILE, compress="deflate", zlevel=1,
        ) as file:  # fmt: skip
            for top in range(0, size, TILE):
                row = [tiles[draw.integers(NUM_TILES)][date] for _ in range(-(-size // TILE))]
                rows = np.concatenate(row, axis=1)[: size - top, :size]
                file.write(rows.transpose(2, 0, 1), window=((top, top + len(rows)), (0, size)))


class Brighter(nn.Module):
    """Change where the later date is much brighter."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return a logit (B, 1, H, W)."""
        return (after[:, :1].float() - before[:, :1].float()) / 32 - 4.5


def run(folder: Path, checkpoint: str | None, device: str, batch_size: int) -> None:
    """Predict one scene, and print its seconds and the most bytes that were held."""
    before, after, out = folder / "before.tif", folder / "after.tif", folder / "out"
    if checkpoint is None:
        config = Config("", "", "", output_dir=str(out), batch_size=batch_size)
        job = job_of(config, Brighter(), Kinds.of("change", 1, {}))
        (result,) = job.run([ScenePair("scene", before, after)]) or []
    else:
        given = {"checkpoint": checkpoint, "before": before, "after": after, "output_dir": out}
        paths = {name: str(path) for name, path in given.items()}
        (result,) = predict({**paths, "device": device, "batch_size": batch_size})
    peak = measure.peak_memory(torch.device("cpu"))
    cpu = time.process_time()  # the start of the process among it: some 5 s
    print(result.seconds, peak, result.changed, result.polygons, cpu)


def against_network(checkpoint: str, side: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Let the network alone and all of predict.py map one scene in turn, on the CPU.

    Returns:
        The share of the network's own rate, and CPU seconds a megapixel: medians over the rounds.
    """
    model = load_model(checkpoint)
    config = Config("", "", "", batch_size=batch_size)
    keep_freed_memory(one_arena=True)  # as `predict` does
    rows: dict[str, list[float]] = {"share": [], "network_cpu": [], "other_cpu": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scene(folder, side)
        pair = ScenePair("scene", folder / "before.tif", folder / "after.tif")
        config = replace(config, output_dir=str(folder / "out"), overwrite=True)
        job = job_of(config, model, Kinds.of(model.task, model.num_classes, {}))
        with job.open([pair]) as scene:
            before, after, _ = (torch.from_numpy(rows) for rows in scene.read(0, side))

        def network() -> None:
            bands = predict_bands(
                model, lambda top, bottom: (before[:, top:bottom], after[:, top:bottom]),
                side, side, window=config.window, overlap=config.overlap, batch_size=batch_size,
            )  # fmt: skip
            for _ in bands:
                pass

        for turn in range(rounds + 1):  # the first one also prepares
            times = []
            for work in (network, lambda: job.run([pair])):
                began = time.perf_counter(), time.process_time()
                with redirect_stdout(StringIO()):
                    work()
                times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            (alone, alone_cpu), (whole, whole_cpu) = times
            if turn:
                rows["share"].append(alone / whole)
                rows["network_cpu"].append(alone_cpu / side**2 * 1e6)
                rows["other_cpu"].append((whole_cpu - alone_cpu) / side**2 * 1e6)
    found = {name: statistics.median(values) for name, values in rows.items()}
    print(
        f"{side} x {side}: {found['share']:.0%} of the network's own rate; CPU s a megapixel: "
        f"{found['network_cpu']:.2f} of the network, {found['other_cpu']:.2f} of all else"
    )
    return {"side": side, "rounds": rounds, **found, "shares": rows["share"]}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("checkpoint", nargs="?", help="of a trained model")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2500, 5000])
    parser.add_argument("--side", type=int, default=2304, help="of the scene for both in turn")
    parser.add_argument("--batch", type=int, default=Config.batch_size)
    parser.add_argument("--folder", type=Path, help="of the pair that --only predicts")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.only:
        run(arguments.folder, arguments.checkpoint, arguments.device, arguments.batch)
        return
    model, name = "single pixels compared", "scene_without_network"
    if arguments.checkpoint:
        kwargs = read_checkpoint(Path(arguments.checkpoint))["model_kwargs"]
        model, name = f"{kwargs['backbone']}, {kwargs['fusion']}", "scene"
    about: dict[str, Any] = {"model": model, "batch": arguments.batch}
    about["windows"] = f"windows of {Config.window}, overlap {Config.overlap}"
    if arguments.checkpoint and arguments.device == "cpu":
        turns = arguments.side, arguments.rounds, arguments.batch
        about["against_network"] = against_network(arguments.checkpoint, *turns)
        if not arguments.sizes:
            measure.save("scene_turns", {**about, "growth": []}, arguments)
    growth = about["growth"] = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            write_scene(Path(temporary), size)
            command = [sys.executable, *sys.argv, "--only", str(size), "--folder", temporary]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak, changed, polygons, cpu = map(float, done.stdout.splitlines()[-1].split())
        megapixels = size**2 / 1e6
        growth.append(
            {
                "size": size,
                "seconds": seconds,
                "megapixels_per_second": megapixels / seconds,
                "peak_bytes": int(peak),
                "cpu_seconds": cpu,
                "changed": changed,
                "polygons": int(polygons),
            }
        )
        print(
            f"{size:6} x {size:<6} {megapixels / seconds:6.2f} megapixels/s"
            f"  {peak / 1e9:5.2f} GB at most  {changed:.1%} changed, {polygons:,.0f} polygons",
            flush=True,
        )
        measure.save(name, about, arguments)  # each time: the large ones take long


if __name__ == "__main__":
    main()
