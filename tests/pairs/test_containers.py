"""Reader x container x depth x layout: files that other libraries wrote, pixel by pixel.

`PYTHONPATH=. python tests/pairs/test_containers.py` prints the table of what happens to each kind.
"""

import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mapping.rasters import open_scene
from pairs.bands import Reading
from pairs.images import read_label, read_pixels, read_size
from runtime.errors import UserError

cv2 = pytest.importorskip("cv2")
rasterio = pytest.importorskip("rasterio")
tifffile = pytest.importorskip("tifffile")

HEIGHT, WIDTH = 37, 51
_DRAW = np.random.default_rng(7)


def noise(bands: int, dtype: str = "uint8", top: int = 256) -> np.ndarray:
    shape = (HEIGHT, WIDTH, bands) if bands > 1 else (HEIGHT, WIDTH)
    return _DRAW.integers(0, top, shape).astype(dtype)


G8, RGB8, RGBA8 = noise(1), noise(3), noise(4)
G16, RGB16 = noise(1, "uint16", 3001), noise(3, "uint16", 3001)
RGBA8[..., 3] = np.where(G8 > 128, 255, 0)
RGBA16 = np.dstack([RGB16, np.where(G8 > 128, 65535, 0).astype(np.uint16)])
FIVE = np.dstack([RGB8, RGB8[..., :2]])
BITS4, BITS1 = G8 >> 4, G8 >> 7
SMOOTH = np.dstack([np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)).astype(np.uint8) + k
                    for k in (0, 40, 90)])  # fmt: skip
PALETTE = _DRAW.integers(0, 256, (256, 3)).astype(np.uint8)


@dataclass(frozen=True)
class Case:
    """A file of one kind, and what it should be read as.

    Attributes:
        name: library, container, depth and layout.
        ending: of the file.
        write: takes the path.
        pixels: (H, W) or (H, W, 3), what it holds; None: refused.
        said: in the refusal.
        scale: for more than 8 bits.
        valid: (H, W), where it has data.
        label: what `read_label` gives; None: refused.
        extra: whether rasterio is needed; without it, it is named.
        near: how far pixels of a lossy file may be off.
    """

    name: str
    ending: str
    write: Callable[[Path], Any]
    pixels: np.ndarray | None = None
    said: str = ""
    scale: tuple[float, float] | None = None
    valid: np.ndarray | None = None
    label: np.ndarray | None = None
    extra: bool = False
    near: int = 0

    def expected(self) -> np.ndarray:
        assert self.pixels is not None
        values = self.pixels.astype(np.float64)
        if self.scale:
            low, high = self.scale
            values = np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255)
        return values if values.ndim == 3 else np.dstack([values] * 3)


def pil(image: Any, **options: Any) -> Callable[[Path], Any]:
    whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return lambda path: whole.save(path, **options)


def paletted(bits: int = 8) -> Image.Image:
    image = Image.fromarray(G8 >> (8 - bits))
    image.putpalette(PALETTE[: 2**bits].tobytes())
    return image


def tif(pixels: np.ndarray, **options: Any) -> Callable[[Path], Any]:
    return lambda path: tifffile.imwrite(path, pixels, **options)


def cv(pixels: np.ndarray) -> Callable[[Path], Any]:
    order = [2, 1, 0, 3][: pixels.shape[-1]]
    stored = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., order])
    return lambda path: cv2.imwrite(str(path), stored)


def gdal(
    pixels: np.ndarray, driver: str = "GTiff", mask: np.ndarray | None = None, **options: Any
) -> Callable[[Path], Any]:
    bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def write(path: Path) -> None:
        profile = {"count": len(bands), "height": HEIGHT, "width": WIDTH, "dtype": bands.dtype}
        with (
            warnings.catch_warnings(),
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        ):
            warnings.simplefilter("ignore")
            with rasterio.open(path, "w", driver=driver, **profile, **options) as file:
                file.write(bands)
                if mask is not None:
                    file.write_mask(mask)

    return write


def bytes_of(write: Callable[[Path], Any], ending: str) -> Callable[[Path], Any]:
    """Write a file of another ending than its name says."""

    def under_another_name(path: Path) -> None:
        other = path.with_suffix(ending)
        write(other)
        other.replace(path)

    return under_another_name


WIDE = (0.0, 2805.0)  # steps of 11: no value lies half way
GREY: dict[str, Any] = {"pixels": G8, "label": G8}
COLOR: dict[str, Any] = {"pixels": RGB8}
DEEP: dict[str, Any] = {"pixels": RGB16, "scale": WIDE, "extra": True}
DEEP_GREY: dict[str, Any] = {"pixels": G16, "scale": WIDE}
OPAQUE = RGBA8[..., 3] > 0
CUT: dict[str, Any] = {"pixels": RGBA8[..., :3], "valid": OPAQUE}
TILED: dict[str, Any] = {"tiled": True, "blockxsize": 16, "blockysize": 16}
HOLES = np.where(np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) > 30, G8 | 1, 0).astype(np.uint8)
CORNER = G8.copy()
CORNER[:32, :32] = 0
CODES = np.array([0, 1, 2, 255])[G8 >> 6].astype(np.uint8)

CASES = [
    Case("Pillow PNG 8 grey", ".png", pil(G8), **GREY),
    Case("Pillow PNG 8 RGB", ".png", pil(RGB8), **COLOR),
    Case("Pillow PNG 8 RGB, a colour is transparent", ".png",
         pil(RGB8, transparency=tuple(RGB8[0, 0].tolist())), RGB8,
         valid=(RGB8[0, 0] != RGB8).any(-1)),
    Case("Pillow PNG 8 RGBA", ".png", pil(RGBA8), **CUT),
    Case("Pillow PNG 8 grey + alpha", ".png", pil(np.dstack([G8, RGBA8[..., 3]])), G8,
         valid=OPAQUE),
    Case("Pillow PNG 1 grey", ".png", pil(Image.fromarray(BITS1 * 255).convert("1")), BITS1 * 255,
         label=BITS1 * 255),
    Case("Pillow PNG 8 palette", ".png", pil(paletted()), PALETTE[G8], label=G8),
    Case("Pillow PNG 2 palette", ".png", pil(paletted(2)), PALETTE[G8 >> 6], label=G8 >> 6),
    Case("Pillow PNG 8 palette, some transparent", ".png",
         pil(paletted(), transparency=bytes(range(256))), PALETTE[G8], valid=G8 > 0, label=G8),
    Case("Pillow PNG 16 grey", ".png", pil(G16), **DEEP_GREY),
    Case("Pillow BMP 8 RGB", ".bmp", pil(RGB8), **COLOR),
    Case("Pillow BMP 8 grey", ".bmp", pil(G8), **GREY),
    Case("Pillow GIF under .png", ".png", bytes_of(pil(G8), ".gif"), **GREY),
    Case("Pillow GIF of two pictures", ".png",
         bytes_of(pil(G8, save_all=True, append_images=[Image.fromarray(255 - G8)]), ".gif"),
         said="several pictures"),
    Case("Pillow WebP lossless under .png", ".png", bytes_of(pil(RGB8, lossless=True), ".webp"),
         **COLOR),
    Case("Pillow JPEG RGB", ".jpg", pil(SMOOTH, quality=95), SMOOTH, near=12),
    Case("Pillow JPEG CMYK", ".jpg", pil(Image.fromarray(SMOOTH).convert("CMYK"), quality=98),
         SMOOTH, near=14),
    Case("opencv PNG 16 grey", ".png", cv(G16), **DEEP_GREY),
    Case("opencv PNG 16 RGB", ".png", cv(RGB16), **DEEP),
    Case("opencv PNG 16 RGBA", ".png", cv(RGBA16), RGB16, scale=WIDE, valid=OPAQUE, extra=True),
    Case("opencv TIFF 16 RGB", ".tif", cv(RGB16), **DEEP),
    Case("opencv TIFF 8 RGB", ".tif", cv(RGB8), **COLOR),
    Case("opencv TIFF float32 RGB", ".tif", cv(RGB16.astype(np.float32)), **DEEP),
    Case("rasterio PNG 16 grey + alpha", ".png",
         gdal(np.dstack([G16, RGBA16[..., 3]]), "PNG"), G16, scale=WIDE, valid=OPAQUE, extra=True),
    Case("tifffile TIFF 8 grey", ".tif", tif(G8), **GREY),
    Case("tifffile TIFF 8 grey, big-endian, deflate", ".tif",
         tif(G8, byteorder=">", compression="zlib", predictor=True), **GREY),
    Case("tifffile TIFF 8 grey, white is 0", ".tif", tif(255 - G8, photometric="miniswhite"),
         **GREY),
    Case("tifffile TIFF 16 grey, white is 0", ".tif", tif(65535 - G16, photometric="miniswhite"),
         G16, scale=WIDE, extra=True),
    Case("tifffile TIFF 1 grey", ".tif", tif(BITS1.astype(bool), photometric="minisblack"),
         BITS1 * 255, label=BITS1 * 255),
    Case("tifffile TIFF 8 RGB", ".tif", tif(RGB8, photometric="rgb"), **COLOR),
    Case("tifffile BigTIFF 8 RGB, tiles", ".tif",
         tif(RGB8, photometric="rgb", bigtiff=True, tile=(16, 16)), **COLOR),
    Case("tifffile TIFF 8 RGB, planar", ".tif",
         tif(RGB8.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"), RGB8,
         extra=True),
    Case("tifffile TIFF 8 RGBA", ".tif", tif(RGBA8, photometric="rgb"), **CUT),
    Case("tifffile TIFF 8 RGB + one of no meaning", ".tif",
         tif(RGBA8, photometric="rgb", extrasamples=["unspecified"]), RGBA8[..., :3]),
    Case("tifffile TIFF 8 RGBA, multiplied", ".tif",
         tif(RGBA8, photometric="rgb", extrasamples=["assocalpha"]), **CUT, extra=True),
    Case("tifffile TIFF 8 grey + one of no meaning", ".tif",
         tif(RGBA8[..., :2], photometric="minisblack", planarconfig="contig"),
         said="has 2 bands.*--bands", extra=True),
    Case("tifffile TIFF 8 palette", ".tif",
         tif(G8, photometric="palette", colormap=PALETTE.T.astype(np.uint16) * 257), PALETTE[G8],
         label=G8),
    Case("tifffile TIFF 16 grey", ".tif", tif(G16), **DEEP_GREY),
    Case("tifffile TIFF 16 grey, big-endian, tiles", ".tif",
         tif(G16.astype(">u2"), byteorder=">", tile=(16, 16), compression="zlib"), **DEEP_GREY),
    Case("tifffile TIFF 16 RGB", ".tif", tif(RGB16, photometric="rgb"), **DEEP),
    Case("tifffile TIFF 16 RGB, turned", ".tif",
         tif(np.rot90(RGB16), photometric="rgb", extratags=[(274, "H", 1, 6, True)]), **DEEP),
    Case("tifffile TIFF 16 RGB, planar", ".tif",
         tif(RGB16.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"), **DEEP),
    Case("tifffile TIFF int8 grey", ".tif", tif(G8.view(np.int8)), G8.view(np.int8),
         scale=(-128, 127), extra=True),
    Case("tifffile TIFF int16 grey", ".tif", tif(G16.astype(np.int16) - 1500),
         G16.astype(int) - 1500, scale=(-1500, 1305)),
    Case("tifffile TIFF int16 grey, big-endian, deflate", ".tif",
         tif((G16.astype(int) - 1500).astype(">i2"), byteorder=">", compression="zlib"),
         G16.astype(int) - 1500, scale=(-1500, 1305), extra=True),
    Case("tifffile TIFF uint32 grey", ".tif", tif(G16.astype(np.uint32) * 10**6),
         G16.astype(np.int64) * 10**6, scale=(0, 3e9), extra=True, near=1),
    Case("tifffile TIFF float16 grey", ".tif", tif(G8.astype(np.float16)), G8, scale=(0, 255),
         extra=True),
    Case("tifffile TIFF float32 grey", ".tif", tif(G16.astype(np.float32)), **DEEP_GREY),
    Case("tifffile TIFF float32 grey, big-endian, deflate", ".tif",
         tif(G16.astype(">f4"), byteorder=">", compression="zlib"), **DEEP_GREY, extra=True),
    Case("tifffile TIFF float64 RGB", ".tif", tif(RGB16.astype(np.float64), photometric="rgb"),
         **DEEP),
    Case("tifffile TIFF 5 bands", ".tif",
         tif(FIVE, photometric="minisblack", planarconfig="contig"),
         said="has 5 bands.*--bands 3,2,1", extra=True),
    Case("tifffile TIFF 5 bands, RGB first", ".tif", tif(FIVE, photometric="rgb"), RGB8,
         extra=True),
    Case("tifffile TIFF three pages", ".tif",
         tif(RGB8.transpose(2, 0, 1).copy(), photometric="minisblack"), said="3 pages"),
    Case("tifffile TIFF CMYK 8", ".tif", tif(255 - np.dstack([RGB8, 0 * G8 + 255]),
         photometric="separated"), RGB8, near=1),
    Case("tifffile TIFF CMYK 16", ".tif", tif(RGBA16, photometric="separated"), said="CMYK"),
    Case("tifffile TIFF LAB", ".tif", tif(RGB8, photometric="cielab"), said="LAB"),
    Case("tifffile TIFF YCbCr", ".tif", tif(RGB8, photometric="ycbcr"), said="YCbCr"),
    Case("tifffile TIFF complex", ".tif", tif(G8.astype(np.complex64)), said="complex"),
    Case("rasterio TIFF 8 RGB, LZW", ".tif", gdal(RGB8, compress="lzw", predictor=2), **COLOR),
    Case("rasterio TIFF 8 RGB, ZSTD", ".tif", gdal(RGB8, compress="zstd"), RGB8, extra=True),
    Case("rasterio TIFF 8 RGB, LERC", ".tif", gdal(RGB8, compress="lerc"), RGB8, extra=True),
    Case("rasterio TIFF 8 RGB, JPEG", ".tif",
         gdal(SMOOTH, compress="jpeg", photometric="ycbcr", jpeg_quality=95, **TILED), SMOOTH,
         near=12),
    Case("rasterio TIFF 8 grey, sparse", ".tif", gdal(CORNER, sparse_ok=True, **TILED), CORNER,
         label=CORNER, extra=True),
    Case("rasterio TIFF 8 grey, sparse, deflate", ".tif",
         gdal(CORNER, sparse_ok=True, compress="deflate", **TILED), CORNER, label=CORNER,
         extra=True),
    Case("rasterio TIFF 4 grey", ".tif", gdal(BITS4, nbits=4), BITS4 * 17, label=BITS4),
    Case("rasterio TIFF 12 grey", ".tif", gdal(G16, nbits=12), **DEEP_GREY, extra=True),
    Case("rasterio TIFF 8 grey, no data 0", ".tif", gdal(HOLES, nodata=0), HOLES,
         valid=HOLES > 0, label=HOLES),
    Case("rasterio TIFF 16 RGB, no data 0", ".tif",
         gdal(np.where(OPAQUE[..., None], RGB16 | 1, 0), nodata=0),
         np.where(OPAQUE[..., None], RGB16 | 1, 0), scale=WIDE, valid=OPAQUE, extra=True),
    Case("rasterio TIFF float32 grey with NaN", ".tif",
         gdal(np.where(OPAQUE, G16, np.nan).astype(np.float32)), np.where(OPAQUE, G16, 0),
         scale=WIDE, valid=OPAQUE),
    Case("rasterio TIFF 8 RGB, a mask inside", ".tif", gdal(RGB8, mask=OPAQUE), RGB8,
         valid=OPAQUE, extra=True),
    Case("rasterio TIFF int8 grey of classes", ".tif", gdal(np.minimum(CODES, 2).astype(np.int8)),
         np.minimum(CODES, 2), scale=(0, 255), label=np.minimum(CODES, 2), extra=True),
    Case("opencv PNG 16 RGB of classes", ".png", cv(np.dstack([CODES.astype(np.uint16)] * 3)),
         CODES, scale=(0, 255), label=CODES, extra=True),
    Case("opencv PNG 16 of classes", ".png", cv(CODES.astype(np.uint16)), CODES, scale=(0, 255),
         label=CODES),
]  # fmt: skip
IDS = [case.name for case in CASES]


def look(case: Case, path: Path) -> None:
    """Compare what all readers make of a file with what was written."""
    reading = Reading(scale=case.scale)
    found = read_pixels(path, reading)
    expected = case.expected()
    valid = np.ones((HEIGHT, WIDTH), bool) if case.valid is None else case.valid
    assert np.array_equal(valid if found.valid is None else found.valid, valid)
    assert np.abs(found.rgb[valid].astype(float) - expected[valid]).max() <= case.near
    assert read_size(path) == (HEIGHT, WIDTH)
    with open_scene(path, path, reading=reading) as scene:
        before, after, has_data = scene.read(0, HEIGHT)
        assert scene.notes[0].startswith("bands   ")
    assert np.array_equal(has_data, valid)
    assert np.array_equal(before[:, valid], found.rgb.transpose(2, 0, 1)[:, valid])
    assert not after[:, ~valid].any()


def look_at_label(case: Case, path: Path) -> str:
    """Compare a label's values as stored with what was written, and say what happened."""
    try:
        label = read_label(path)
    except UserError as error:
        assert case.label is None
        return f"refused: {str(error).split(': ', 1)[-1][:60]}"
    expected = case.label
    if expected is None:
        assert case.pixels is not None
        expected = case.pixels.reshape(HEIGHT, WIDTH, -1)[..., 0]
    assert np.array_equal(label, expected)
    return "right"


@pytest.mark.fault("D16", "D17", "D18", "U9")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_all_readers_read_what_was_written(case: Case, tmp_path: Path) -> None:
    path = tmp_path / f"x{case.ending}"
    case.write(path)
    if case.pixels is None:
        for read in (read_pixels, read_label):
            with pytest.raises(UserError, match=case.said if read is read_pixels else "x"):
                read(path)
        return
    look(case, path)
    look_at_label(case, path)
    if case.scale:
        with pytest.raises(UserError, match="not 8 bits; --scale LOW,HIGH"):
            read_pixels(path)


@pytest.mark.fault("D16", "D18", "U3")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_without_rasterio_the_same_or_its_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x{case.ending}"
    case.write(path)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    if case.extra:
        with pytest.raises(UserError, match=r"x\.\w+: .*requirements-geo\.txt"):
            read_pixels(path, Reading(scale=case.scale))
        with pytest.raises(UserError, match=r"requirements-geo\.txt"):
            read_label(path)
    elif case.pixels is not None:
        look(case, path)
        look_at_label(case, path)


def turned_png(path: Path) -> None:
    """Write 16 bits with EXIF's word that the picture lies on its side."""
    cv(np.ascontiguousarray(np.rot90(RGB16)))(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    written = path.read_bytes()
    path.write_bytes(written[:33] + chunk + written[33:])


def turned_jpeg_with_mask(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(SMOOTH))).save(path, quality=98, exif=exif)
    beside = path.with_name(f"{path.name}.msk")
    mask = np.ascontiguousarray(np.rot90(np.where(OPAQUE, 255, 0).astype(np.uint8)))
    size = {"height": WIDTH, "width": HEIGHT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(beside, "w", driver="GTiff", count=1, dtype="uint8", **size) as file:
            file.write(mask[None])
            file.update_tags(**{f"INTERNAL_MASK_FLAGS_{band}": "2" for band in (1, 2, 3)})


FOUR = np.rot90(np.dstack([RGB8, G8]))
TURNED: dict[str, tuple[str, Callable[[Path], Any], Reading, np.ndarray, int]] = {
    "PNG of 16 bits": (".png", turned_png, Reading(scale=(0, 255)), np.minimum(RGB16, 255), 0),
    "JPEG with a mask beside it": (".jpg", turned_jpeg_with_mask, Reading(), SMOOTH, 12),
    "JPEG, --bands": (".jpg", turned_jpeg_with_mask, Reading(bands=(3, 2, 1)),
                      SMOOTH[..., ::-1], 12),
    "TIFF, the fourth band": (
        ".tif",
        tif(FOUR, photometric="rgb", extrasamples=["unspecified"],
            extratags=[(274, "H", 1, 6, True)]),
        Reading(bands=(4, 1, 2)), np.dstack([G8, RGB8[..., :2]]), 0,
    ),
    "TIFF, the fourth band is alpha": (
        ".tif",
        tif(FOUR, photometric="rgb", extrasamples=["unspecified"],
            extratags=[(274, "H", 1, 6, True)]),
        Reading(alpha=4), RGB8, 0,
    ),
}  # fmt: skip


@pytest.mark.fault("D4", "U9")
@pytest.mark.parametrize("name", TURNED)
def test_orientation_counts_with_every_option(name: str, tmp_path: Path) -> None:
    ending, write, reading, expected, near = TURNED[name]
    path = tmp_path / f"x{ending}"
    write(path)
    found = read_pixels(path, reading)
    valid = np.ones((HEIGHT, WIDTH), bool) if found.valid is None else found.valid
    assert read_size(path) == found.rgb.shape[:2] == (HEIGHT, WIDTH)
    assert np.abs(found.rgb[valid].astype(int) - expected[valid]).max() <= near
    if "mask" in name:
        assert np.array_equal(valid, OPAQUE)
    with open_scene(path, path, reading=reading) as scene:
        before, _, has_data = scene.read(0, HEIGHT)
    assert np.array_equal(has_data, valid)
    assert np.array_equal(before[:, valid], found.rgb.transpose(2, 0, 1)[:, valid])


@pytest.mark.fault("U9")
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_large_image_is_turned_too_and_a_placed_one_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, exif = tmp_path / f"x{ending}", Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(SMOOTH).save(path, exif=exif)
    monkeypatch.setattr("mapping.rasters.MAX_PLAIN", 100)
    with open_scene(path, path) as scene:
        assert (scene.grid.height, scene.grid.width) == (WIDTH, HEIGHT)
    path.with_suffix(f"{ending[:2]}{ending[-1]}w").write_text("0.5\n0\n0\n-0.5\n0\n0\n")
    with pytest.raises(UserError, match=r"orientation \(8\) turns it; save it upright"):  # noqa: SIM117
        with open_scene(path, path):
            pass


HIDDEN = np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), np.where(OPAQUE, 255, 0)])
HIDDEN = HIDDEN.astype(np.uint8)


@pytest.mark.fault("D17")
@pytest.mark.parametrize(
    ("ending", "write", "said"),
    [
        (".tif", tif(HIDDEN, photometric="rgb", extrasamples=["unspecified"]), "4 bands that"),
        (".tif", tif(HIDDEN, photometric="rgb"), "alpha channel"),
        (".tif", tif(HIDDEN[..., 2:], photometric="minisblack", planarconfig="contig"), "2 bands"),
        (".tif", gdal(HIDDEN[..., 0], mask=OPAQUE), "its mask"),
        (".bmp", pil(HIDDEN), "a fourth channel"),
        (".png", bytes_of(pil(HIDDEN, lossless=True, exact=True), ".webp"), "alpha channel"),
    ],
    ids=["no meaning", "TIFF alpha", "grey + one", "mask inside", "BMP of 32 bits", "WebP"],
)
def test_a_label_drawn_where_colours_are_not(
    ending: str, write: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{ending}"
    write(path)
    with pytest.raises(UserError, match=said):
        read_label(path)


def test_a_label_with_channels_that_say_the_same(tmp_path: Path) -> None:
    grey = np.where(OPAQUE, 255, 0).astype(np.uint8)
    pil(np.dstack([grey] * 3 + [0 * grey]))(tmp_path / "x.bmp")
    gdal(grey, mask=OPAQUE)(tmp_path / "x.tif")
    tif(np.dstack([grey] * 4), photometric="rgb", extrasamples=["unspecified"])(tmp_path / "y.tif")
    for name in ("x.bmp", "x.tif", "y.tif"):
        assert np.array_equal(read_label(tmp_path / name), grey)


def look_at_image(case: Case, path: Path) -> str:
    if case.pixels is not None:
        look(case, path)
        return f"right, --scale {case.scale[0]:g},{case.scale[1]:g}" if case.scale else "right"
    with pytest.raises(UserError) as error:
        read_pixels(path)
    return f"refused: {str(error.value).split(': ', 1)[-1][:60]}"


if __name__ == "__main__":
    print("| written by, container, bits, layout | image | label | needs rasterio |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            path = Path(folder) / f"{number}{case.ending}"
            case.write(path)
            shown = look_at_image(case, path), look_at_label(case, path)
            print(f"| {case.name} | {' | '.join(shown)} | {'yes' if case.extra else ''} |")
