"""Which values of a whole set of images become 0 and 255, where they have more than 8 bits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pairs.bands import PERCENTILES, Reading, filling
from pairs.headers import header_of
from pairs.images import read_sample
from runtime.errors import UserError

MAX_FILES = 500  # that are looked at, and percentiles taken from, spread over the set
MAX_VALUES = 20_000  # of each band of a file


def choose_scale(paths: Sequence[Path], asked: Reading, whose: str) -> tuple[Reading, list[str]]:
    """Return how the images of a set are read, and lines for the user.

    Args:
        paths: of the images.
        asked: what the options or the checkpoint say; a scale in it stays.
        whose: the images are, in words: "the train split".

    Raises:
        UserError: some files have 8 bits and others more, or one cannot be read.
    """
    if asked.scale is not None:
        low, high = asked.scale
        return asked, [f"scale   {low:g} becomes 0, {high:g} becomes 255"]
    step = -(-len(paths) // MAX_FILES)
    # a few thousand headers take a second; one of more bits is refused when it is read
    if all(_depth(path) == "uint8" for path in paths[::step]):
        return asked, []
    depths = {path: _depth(path) for path in paths}
    found = Counter(depths.values())
    if "uint8" in found:
        first = {depth: path for path, depth in reversed(depths.items())}
        raise UserError(
            f"{', '.join(f'{path} has {depth}' for depth, path in first.items())} pixels: no scale "
            "fits both; save all alike, or give --scale LOW,HIGH"
        )
    samples: dict[Path, np.ndarray] = {}
    for path in paths[::step]:
        try:
            samples[path] = _thin(read_sample(path, asked))
        except UserError:  # the check of the data names all that are broken
            if path == paths[::step][-1] and not samples:
                raise
    values = np.concatenate(list(samples.values()), axis=None)
    if not values.size:
        raise UserError(f"{paths[0].parent}: the images have no data at all; give --scale LOW,HIGH")
    low, high = (float(f"{limit:.6g}") for limit in np.percentile(values, PERCENTILES))
    if low >= high:
        raise UserError(f"{paths[0].parent}: nearly all values are {low:g}; give --scale LOW,HIGH")
    lines = [
        f"scale   {', '.join(sorted(found))}: {low:g} becomes 0, {high:g} becomes 255, the "
        f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of {whose}; --scale sets others"
    ]
    odd = [
        line for path, bands in samples.items() for band in bands for line in filling(path, band)
    ]
    return replace(asked, scale=(low, high)), [*lines, *(f"warning: {line}" for line in odd[:1])]


def _depth(path: Path) -> str:
    try:
        return header_of(path).dtype
    except OSError:  # gone: whoever reads it says so
        return "uint8"


def _thin(values: np.ndarray) -> np.ndarray:
    return values[:, :: max(1, values.shape[1] // MAX_VALUES)]
