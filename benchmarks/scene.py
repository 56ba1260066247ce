"""How fast predict.py maps a scene, and what memory it takes, as the scene grows.

    python benchmarks/scene.py
    python benchmarks/scene.py --sizes 2500 5000 10000 20000 --device cuda

Generated GeoTIFF pairs of SIZE x SIZE pixels, a model with random weights; each size in a process
of its own, from reading to polygons and cloud-optimised files. `--backbone none` compares single
pixels instead: what is left is the cost of all but the network.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import save_checkpoint
from maps import Kinds
from model import build_model
from predict import Config, predict, predict_pair
from scenes import ScenePair


def write_scene(path: Path, size: int, seed: int) -> None:
    """Write a GeoTIFF of coarse noise, tiled, row block by row block."""
    import rasterio
    from rasterio.transform import from_origin

    draw = np.random.default_rng(seed)
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=size, width=size, dtype="uint8",
        crs="EPSG:32632", transform=from_origin(5e5, 5.2e6, 0.5, 0.5), tiled=True,
        blockxsize=512, blockysize=512, compress="deflate", zlevel=1,
    ) as file:  # fmt: skip
        for top in range(0, size, 512):
            num_rows = min(512, size - top)
            coarse = draw.integers(0, 256, (3, 32, -(-size // 16)), dtype=np.uint8)
            rows = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :num_rows, :size]
            file.write(rows, window=((top, top + num_rows), (0, size)))


class Brighter(nn.Module):
    """Change where the later date is much brighter; a tenth of the pixels of this noise."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return a logit (B, 1, H, W)."""
        return (after[:, :1].float() - before[:, :1].float()) / 32 - 4.5


def run(folder: Path, device: str, backbone: str, batch_size: int) -> None:
    """Predict one scene, and print its seconds and the most bytes that were held."""
    before, after, out = folder / "before.tif", folder / "after.tif", folder / "out"
    if backbone == "none":
        config = Config("", str(before), str(after), batch_size=batch_size)
        kinds = Kinds.of("change", 1, {})
        pair = ScenePair("scene", before, after)
        result = predict_pair(Brighter(), kinds, pair, out, config=config)
        assert result is not None
    else:
        kwargs: dict[str, Any] = {"backbone": backbone, "freeze_backbone": False}
        torch.manual_seed(0)
        state = {"model": build_model(**kwargs).state_dict(), "model_kwargs": kwargs}
        save_checkpoint(folder / "model.pt", {**state, "config": {}, "data": {}})
        given = {"checkpoint": folder / "model.pt", "before": before, "after": after}
        given["output_dir"] = out
        paths = {name: str(path) for name, path in given.items()}
        (result,) = predict({**paths, "device": device, "batch_size": batch_size})
    print(result.seconds, measure.peak_memory(torch.device("cpu")))


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[2500, 5000, 10000])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="of the pair that --only predicts")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.only:
        run(arguments.folder, arguments.device, arguments.backbone, arguments.batch)
        return
    growth = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_scene(folder / "before.tif", size, 0)
            write_scene(folder / "after.tif", size, 1)
            command = [sys.executable, *sys.argv, "--only", str(size), "--folder", temporary]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak = done.stdout.splitlines()[-1].split()
        megapixels = size**2 / 1e6
        growth.append(
            {
                "size": size,
                "seconds": float(seconds),
                "megapixels_per_second": megapixels / float(seconds),
                "peak_bytes": int(peak),
            }
        )
        print(
            f"{size:6} x {size:<6} {megapixels / float(seconds):6.2f} megapixels/s"
            f"  {int(peak) / 1e9:5.2f} GB at most",
            flush=True,
        )
        about = {"backbone": arguments.backbone, "batch": arguments.batch, "growth": growth}
        measure.save("scene", about, arguments)  # each time: the large ones take long


if __name__ == "__main__":
    main()
