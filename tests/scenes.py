"""Tiny datasets on disk for the tests: every image is drawn from its name, none is stored."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(name: str, height: int = 40, width: int = 48) -> NDArray[np.uint8]:
    """Noise that depends on the name alone, (H, W, 3) uint8."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def box_mask(height: int = 40, width: int = 48, value: int = 255) -> NDArray[np.uint8]:
    """A rectangle of `value` in the upper left quarter, (H, W) uint8."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 8 : height // 2, width // 8 : width // 2] = value
    return mask


def write_pair(
    folder: Path,
    name: str,
    *,
    size: tuple[int, int] = (40, 48),
    names: tuple[str, str, str] = ("A", "B", "label"),
    mask: NDArray[np.uint8] | None = None,
) -> None:
    """Write folder/{A,B,label}/name.png."""
    pictures = (picture(f"{name} a", *size), picture(f"{name} b", *size))
    for part, array in zip(
        names, (*pictures, box_mask(*size) if mask is None else mask), strict=True
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / part / f"{name}.png")


def write_tree(
    root: Path,
    splits: Iterable[str] = ("train", "val"),
    num: int = 3,
    size: tuple[int, int] = (40, 48),
) -> Path:
    """Write the tree of LEVIR-CD with `num` pairs per split."""
    for split in splits:
        for i in range(num):
            write_pair(root / split, f"{split}_{i}", size=size)
    return root
