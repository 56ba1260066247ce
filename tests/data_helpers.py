"""Small datasets, drawn from a seed; a disk that is full."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]


def picture(seed: int, height: int = 32, width: int = 32) -> Bytes:
    """Noise (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(height: int = 32, width: int = 32, value: int = 255) -> Bytes:
    """One changed block in the upper left quarter, (H, W)."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[: max(1, height // 2), : max(1, width // 2)] = value
    return mask


def save(path: Path, pixels: Bytes | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)
    return path


def save_pair(
    folder: Path, name: str, seed: int, size: tuple[int, int] = (32, 32), mask: Bytes | None = None
) -> None:
    """Write A/name.png, B/name.png, label/name.png under folder."""
    save(folder / "A" / f"{name}.png", picture(2 * seed, *size))
    save(folder / "B" / f"{name}.png", picture(2 * seed + 1, *size))
    save(folder / "label" / f"{name}.png", mask_of(*size) if mask is None else mask)


def save_tree(root: Path, size: tuple[int, int] = (32, 32), **counts: int) -> Path:
    """Write a tree of split folders: save_tree(root, train=3, val=2)."""
    for number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            save_pair(root / split, f"{split}_{index}", 100 * number + index, size)
    return root


def png_bomb(side: int = 20_000) -> bytes:
    """A valid PNG of side x side black pixels in some 50 kB, written chunk by chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # 1 bit, grey
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk that is full, for everything larger; Python ignores the signal that comes with it."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
