"""Map the change between two scenes: `python predict.py runs/x/best.pt before.tif after.tif`.

Scenes of any size, PNG, JPEG, TIFF or GeoTIFF; or two folders, whose files are paired by stem.
Nothing needs a label. For each pair it writes the probability of change, the mask of classes and a
picture of both over the later date; for GeoTIFFs on the same grid, with polygons (maps.py,
polygons.py say what is in them).
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import config as cli
from config import REQUIRED, option


@dataclass(frozen=True)
class Config:
    """The options of a prediction."""

    # fmt: off
    checkpoint: str = option(REQUIRED, "best.pt of a run", positional=True)
    before: str = option(REQUIRED, "the earlier date: a file or a folder", positional=True)
    after: str = option(REQUIRED, "the later date: a file or a folder", positional=True)

    # what comes out
    output_dir: str = option("predictions", "folder of what is written", short="-o", aliases=["--output"])  # noqa: E501
    overwrite: bool = option(False, "replace what is there")
    threshold: float | None = option(None, "of the change probability; else as evaluate.py chose it on val, else 0.5", at_least=0, at_most=1)  # noqa: E501
    probability: str = option("uint8", "how it is stored: uint8 (254 p, 255 = no data) or float32", choices=("uint8", "float32"))  # noqa: E501
    min_area: float = option(0.0, "of a polygon, in square metres", at_least=0)
    fill_holes: float = option(0.0, "fill holes of polygons up to so many square metres", at_least=0)  # noqa: E501

    # what goes in
    align: bool = option(False, "resample the later date onto the grid of the earlier one")
    bands: tuple[int, ...] | None = option(None, "red, green and blue, counted from 1: 4,3,2; or one")  # noqa: E501
    scale: tuple[float, ...] | None = option(None, "values that become 0 and 255; else 8 bits as they are, others between percentiles")  # noqa: E501

    # windows
    window: int = option(512, "side of the windows that the model sees", above=0)
    overlap: int = option(128, "of neighbouring windows", at_least=0)
    batch_size: int = option(4, "windows at once", short="-b", above=0)
    flips: bool = option(False, "average over mirror images: four times the cost")

    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = option("auto", "precision; auto = bf16 where it pays", choices=("auto", "off", "bf16", "fp16"))  # noqa: E501
    # fmt: on


if __name__ == "__main__":  # before the imports below, which take seconds
    GIVEN = cli.parse(Config, description=__doc__)

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import read_checkpoint, restore_model
from errors import Interrupted, StopRequest, UserError, run_script
from hardware import explain_out_of_memory, keep_freed_memory, pick_device
from inference import predict_bands
from maps import LAYERS, Kinds, SceneMaps, unfinished
from raster import ENDINGS, open_scene
from score_report import FEW_PAIRS


def predict(given: dict[str, Any]) -> list[dict[str, float]]:
    """Predict from the options that a command line gives.

    Returns:
        Of each pair: megapixels, seconds, share of changed pixels and number of polygons.

    Raises:
        UserError: anything the user can mend; of the pair that it concerns nothing is written.
        Interrupted: by a signal; what is written is whole.
    """
    config = Config(**given)
    check(config)
    pairs = find_pairs(Path(config.before), Path(config.after))
    out = Path(config.output_dir)
    path = Path(config.checkpoint)
    state = read_checkpoint(path)
    device = pick_device(config.device)
    keep_freed_memory()
    model = restore_model(state, path).to(device).eval()
    kinds = Kinds.of(model.task, model.num_classes, state["data"])
    if not kinds.has_threshold:
        if config.threshold is not None:
            raise UserError(
                f"--threshold {config.threshold}: {path} has {model.num_classes} classes, of "
                "which each pixel gets the likeliest; leave it out"
            )
    elif config.threshold is None and (chosen := stored_threshold(path)):
        threshold, source = chosen
        print(f"threshold {threshold:g}, chosen on val ({source}); --threshold sets another")
        config = replace(config, threshold=threshold)
    elif config.threshold is None:
        print("threshold 0.5; evaluate.py chooses one on val, --threshold sets it")
    if not config.overwrite:
        endings = (".png", ".tif", ".geojson")
        names = [f"{name}_{layer}{e}" for name, *_ in pairs for layer in LAYERS for e in endings]
        there = next((out / name for name in names if (out / name).exists()), None)
        if there:
            raise UserError(f"{there}: is there already; --overwrite, or another --output-dir")
    results: list[dict[str, float]] = []
    with StopRequest() as stop, explain_out_of_memory(config.batch_size, config.window, "--window"):

        def leave_if_asked() -> None:
            if stop.signal_number:
                raise Interrupted(
                    f"stopped after {len(results)} of {len(pairs)} scenes; nothing of the next "
                    "one was written",
                    stop.signal_number,
                )

        for name, before, after in pairs:
            result = predict_pair(
                model, kinds, name, before, after, out, config=config, after_batch=leave_if_asked
            )
            results.append(result)
    return results


def check(config: Config) -> None:
    """Raise UserError for options that do not go together."""
    if config.overlap >= config.window:
        raise UserError(f"--overlap {config.overlap}: give less than --window {config.window}")
    if config.scale is not None and not (
        len(config.scale) == 2 and np.isfinite(config.scale).all() and np.diff(config.scale) > 0
    ):
        raise UserError(
            f"--scale {','.join(f'{x:g}' for x in config.scale)}: give two numbers, the lower first"
        )


def stored_threshold(checkpoint: Path) -> tuple[float, Path] | None:
    """Return the threshold that evaluate.py chose on val for a checkpoint, and the file it is in.

    Of overlapping windows if that protocol was evaluated, else of the first one. An evaluation
    that is older than the checkpoint, of other data than the training's, of fewer than
    `FEW_PAIRS`, or that cannot be read, does not count.
    """
    found = list(checkpoint.parent.glob("evaluation/*/scores.json"))
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        if path.stat().st_mtime < checkpoint.stat().st_mtime:
            continue
        try:
            report = json.loads(path.read_text("utf-8"))
            runs = report["runs"]
            (run,) = (r for r in runs if Path(r["checkpoint"]).name == checkpoint.name)
            if not run["trained_on_this_data"] or report["val_pairs"] < FEW_PAIRS:
                continue
            protocols = run["protocols"]
            protocol = protocols.get("sliding") or next(iter(protocols.values()))
            threshold = float(protocol["points"]["val"]["threshold"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            continue
        if 0 <= threshold <= 1:
            return threshold, path
    return None


def find_pairs(before: Path, after: Path) -> list[tuple[str, Path, Path]]:
    """Return the name and both files of each scene: of two files, or of two folders by stem.

    Raises:
        UserError: a file without a partner, or nothing at all.
    """
    if before.is_dir() != after.is_dir() and before.exists() and after.exists():
        raise UserError(f"{before} and {after}: give two files or two folders")
    if not before.is_dir():
        return [(before.stem, before, after)]
    first, second = _by_stem(before), _by_stem(after)
    alone = [first[s] for s in first if s not in second]
    alone += [second[s] for s in second if s not in first]
    if alone:
        names = ", ".join(str(path) for path in sorted(alone)[:5])
        raise UserError(f"{len(alone)} files have no partner of their stem: {names}")
    if not first:
        raise UserError(f"{before}: holds no image ({', '.join(sorted(ENDINGS))})")
    return [(stem, first[stem], second[stem]) for stem in sorted(first)]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in ENDINGS or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{folder}: {found[path.stem].name} and {path.name}; keep one")
        found[path.stem] = path
    return found


def predict_pair(
    model: nn.Module,
    kinds: Kinds,
    name: str,
    before: Path,
    after: Path,
    out: Path,
    *,
    config: Config,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Predict one pair and write its maps: `name`_probability, `name`_mask, ... in `out`.

    Args:
        model: `(before, after) -> logits`, on its device.
        kinds: of its classes.
        name: of the files.
        before: the earlier date.
        after: the later date.
        out: folder of the maps.
        config: the options.
        after_batch: may raise to end it; then nothing is left behind.

    Returns:
        Megapixels, seconds, share of changed pixels (of those with data), number of polygons.
    """
    threshold = 0.5 if config.threshold is None else config.threshold
    reading = open_scene(
        before, after, bands=config.bands, scale=config.scale, align=config.align
    )  # fmt: skip
    with reading as scene, unfinished(out) as folder:
        for note in scene.notes:
            print(note, flush=True)
        grid = scene.grid
        megapixels, start = grid.height * grid.width / 1e6, time.perf_counter()
        maps = SceneMaps(folder, name, scene, kinds, config.probability)
        num_valid = num_changed = 0
        with tqdm(
            total=megapixels,
            desc=name,
            unit="MP",
            leave=False,
            disable=None,
            bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_fmt}]",
        ) as bar:

            def read_rows(top: int, bottom: int) -> tuple[Tensor, Tensor]:
                first, second, _ = scene.read(top, bottom)
                return torch.from_numpy(first), torch.from_numpy(second)

            def after_window(share: float) -> None:
                bar.update(share * megapixels)
                after_batch()

            for top, logits in predict_bands(
                model,
                read_rows,
                grid.height,
                grid.width,
                window=config.window,
                overlap=config.overlap,
                batch_size=config.batch_size,
                flips=config.flips,
                amp=config.amp,
                after_batch=after_window,
            ):
                valid, is_change = maps.write(top, logits, threshold)
                num_valid += valid
                num_changed += is_change
        num_polygons = maps.finish(config.min_area, config.fill_holes)
        seconds = time.perf_counter() - start
    share, no_data = num_changed / max(num_valid, 1), 1 - num_valid / (grid.height * grid.width)
    print(
        f"{out / name}_*: {grid.width} x {grid.height}, {share:.2%} changed"
        f"{f', {num_polygons} polygons' if grid.has_place else ''}"
        f"{f', {no_data:.1%} without data' if no_data else ''}"
        f", {megapixels / seconds:.2f} megapixels/s",
        flush=True,
    )
    return {
        "megapixels": megapixels,
        "seconds": seconds,
        "changed": share,
        "polygons": num_polygons,
    }


if __name__ == "__main__":
    sys.exit(run_script(lambda: predict(GIVEN)))
