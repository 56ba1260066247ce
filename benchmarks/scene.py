"""How fast predict.py maps a scene, and what memory it takes, as the scene grows.

    python benchmarks/scene.py runs/NAME/best.pt
    python benchmarks/scene.py runs/NAME/best.pt --sizes 2500 5000 10000 20000 --device cuda
    python benchmarks/scene.py

GeoTIFF pairs of SIZE x SIZE pixels, a mosaic of the synthetic sample set; each size in a process of
its own, from reading to polygons and cloud-optimised files. Without a checkpoint single pixels are
compared instead: what is left is the cost of all but the network.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np
import torch
from torch import Tensor, nn

from mapping.maps import Kinds
from mapping.scenes import ScenePair
from pairs.synthetic.sample_set import make_pair
from predict import Config, job_of, predict
from runtime.checkpoint import read_checkpoint

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
    print(result.seconds, peak, result.changed, result.polygons)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="of a trained model")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2500, 5000, 10000])
    parser.add_argument("--batch", type=int, default=4)
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
    growth = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            write_scene(Path(temporary), size)
            command = [sys.executable, *sys.argv, "--only", str(size), "--folder", temporary]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak, changed, polygons = map(float, done.stdout.splitlines()[-1].split())
        megapixels = size**2 / 1e6
        growth.append(
            {
                "size": size,
                "seconds": seconds,
                "megapixels_per_second": megapixels / seconds,
                "peak_bytes": int(peak),
                "changed": changed,
                "polygons": int(polygons),
            }
        )
        print(
            f"{size:6} x {size:<6} {megapixels / seconds:6.2f} megapixels/s"
            f"  {peak / 1e9:5.2f} GB at most  {changed:.1%} changed, {polygons:,.0f} polygons",
            flush=True,
        )
        about = {"model": model, "batch": arguments.batch, "growth": growth}
        measure.save(name, about, arguments)  # each time: the large ones take long


if __name__ == "__main__":
    main()
