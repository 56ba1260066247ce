"""Pixels without data mean the same in every cache, in the shares of classes and in scores."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import mask_of, picture, save, save_tree
from PIL import Image

from dataset import ChangeDataset
from pairs.bands import AS_STORED, Reading
from pairs.cache import open_splits
from pairs.check import DataSummary
from pairs.labels import Classes
from pairs.layouts import find_pairs
from pairs.memo import stamp_of
from pairs.sources import Source
from runtime.errors import UserError

SIDE = 32
HOLES = np.zeros((SIDE, SIDE), bool)
HOLES[4:20, 4:20] = True  # over the change of `mask_of`, but for its border


def with_alpha(path: Path, rgb: np.ndarray) -> None:
    alpha = np.where(HOLES, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(path.with_suffix(".png"))


def with_key(path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(_marked(rgb, (1, 2, 3))).save(path.with_suffix(".png"), transparency=(1, 2, 3))


def with_notes(path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(_marked(rgb, (7, 7, 7))).save(path.with_suffix(".png"))
    notes(path.with_suffix(".png"))


def notes(image: Path, value: str = "7") -> None:
    bands = "".join(
        f'<PAMRasterBand band="{band}"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
        for band in (1, 2, 3)
    )
    image.with_name(f"{image.name}.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")


def with_tag(path: Path, rgb: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    tags = [(42113, "s", 2, "7", True)]
    marked = _marked(rgb, (7, 7, 7))
    tifffile.imwrite(path.with_suffix(".tif"), marked, photometric="rgb", extratags=tags)


def with_mask_inside(path: Path, rgb: np.ndarray) -> None:
    rasterio = pytest.importorskip("rasterio")
    from geo_helpers import write_tif

    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_tif(path.with_suffix(".tif"), rgb.transpose(2, 0, 1))
        with rasterio.open(path.with_suffix(".tif"), "r+") as file:
            file.write_mask(~HOLES)


def with_mask_beside(path: Path, rgb: np.ndarray) -> None:
    rasterio = pytest.importorskip("rasterio")
    from geo_helpers import write_tif

    Image.fromarray(rgb).save(path.with_suffix(".png"))
    beside = path.with_name(f"{path.name}.png.msk")
    write_tif(beside, np.where(HOLES, 0, 255).astype(np.uint8)[None])
    with rasterio.open(beside, "r+") as file:
        file.update_tags(**{f"INTERNAL_MASK_FLAGS_{band}": "2" for band in (1, 2, 3)})


def with_nan(path: Path, rgb: np.ndarray) -> None:
    values = np.where(HOLES, np.nan, rgb[..., 0]).astype(np.float32)
    Image.fromarray(values).save(path.with_suffix(".tif"))


def _marked(rgb: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.where(HOLES[..., None], np.array(color, np.uint8), np.maximum(rgb, 8))


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "alpha": with_alpha,
    "a transparent colour": with_key,
    "GDAL's notes beside a PNG": with_notes,
    "GDAL's tag": with_tag,
    "a mask inside": with_mask_inside,
    "a mask beside": with_mask_beside,
    "NaN": with_nan,
}


def save_with_holes(root: Path, write: Callable[[Path, np.ndarray], None], seed: int = 0) -> Path:
    """Write two pairs a split; a later date has holes, and what lies under them is of the seed."""
    save_tree(root, size=(SIDE, SIDE), train=2, val=2)
    for split in ("train", "val"):
        after = root / split / "B" / f"{split}_0.png"
        pixels = np.asarray(Image.open(after))
        after.unlink()
        write(after.with_suffix(""), np.where(HOLES[..., None], picture(seed, SIDE, SIDE), pixels))
        if write is with_nan:  # images of one depth
            for path in [*(root / split / "A").iterdir(), root / split / "B" / f"{split}_1.png"]:
                grey = np.asarray(Image.open(path))[..., 0].astype(np.float32)
                path.unlink()
                save(path.with_suffix(".tif"), Image.fromarray(grey))
    return root


def opened(root: Path, cache: str, **options: Any) -> tuple[DataSummary, dict[str, Source]]:
    layout = find_pairs(root)
    return open_splits(
        layout, Classes(1), ("train", "val"), cache=cache, folder=root.parent / "cache", **options
    )


@pytest.mark.fault("U9")
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("kind", WRITERS)
def test_holes_count_in_no_cache(kind: str, cache: str, tmp_path: Path) -> None:
    root = save_with_holes(tmp_path / "data", WRITERS[kind])
    reading = Reading(scale=(0, 255)) if kind == "NaN" else AS_STORED
    for _ in range(2):  # the second start takes what the first one has left
        checked, sources = opened(root, cache, reading=reading)
        before, after, mask = ChangeDataset(sources["val"], crop_size=SIDE)[0]
        assert not before[:, HOLES].any()
        assert not after[:, HOLES].any()
        assert (mask[HOLES] == 255).all()
        assert (mask[~HOLES] != 255).all()
        assert before[:, ~HOLES].any()
        truth = mask_of(SIDE, SIDE) > 0
        changed = int(truth.sum() + (truth & ~HOLES).sum())
        counted = 2 * SIDE**2 - int(HOLES.sum())
        assert checked.splits["val"].class_pixels == (counted - changed, changed)


@pytest.mark.fault("U9")
def test_a_patch_whose_change_lies_under_holes_is_empty(tmp_path: Path) -> None:
    root = save_tree(tmp_path / "data", size=(SIDE, SIDE), train=2, val=1)
    after = root / "val" / "B" / "val_0.png"
    alpha = np.where(mask_of(SIDE, SIDE) > 0, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([np.asarray(Image.open(after)), alpha])).save(after)
    checked, _ = opened(root, "none")
    assert checked.splits["val"].empty_patches == 1
    assert not checked.splits["val"].holds_change
    assert any("the val split holds no change" in line for line in checked.warnings)


@pytest.mark.fault("D21", "U9")
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_notes_and_masks_beside_an_image_are_part_of_it(cache: str, tmp_path: Path) -> None:
    root = save_with_holes(tmp_path / "data", with_notes)
    image = root / "val" / "B" / "val_0.png"
    stamp = stamp_of(image)
    opened(root, cache)
    notes(image, value="200")
    assert stamp_of(image) != stamp
    _, sources = opened(root, cache)
    assert (sources["val"].channels(0)[6] != 255).all()
    image.with_name(f"{image.name}.aux.xml").unlink()
    assert len(stamp_of(image)) < len(stamp)


@pytest.mark.fault("U9")
def test_no_data_values_that_differ_need_rasterio_and_one_alone_leaves_data(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    from pairs.images import read_pixels

    rgb = picture(1, SIDE, SIDE)
    path = save(tmp_path / "x.png", rgb)
    beside = tmp_path / "x.png.aux.xml"
    band = '<PAMRasterBand band="{}"><NoDataValue>{}</NoDataValue></PAMRasterBand>'
    different = "".join(band.format(i + 1, value) for i, value in enumerate(rgb[3, 5].tolist()))
    beside.write_text(f"<PAMDataset>{different}</PAMDataset>")
    found = read_pixels(path).valid
    assert found is not None
    assert not found[3, 5]
    beside.write_text(f"<PAMDataset>{band.format(1, 7)}</PAMDataset>")
    assert read_pixels(path).valid is None


@pytest.mark.fault("U9")
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_data_among_few_bits_is_told_by_the_stored_value(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    from pairs.images import read_pixels

    top = 2**bits - 1
    stored = (picture(2, SIDE, SIDE)[..., 0] >> (8 - bits)).astype(np.uint8)
    image = Image.fromarray(stored)
    image.putpalette([value for grey in range(top + 1) for value in 3 * [255 * grey // top]])
    image.save(tmp_path / "x.png", bits=bits)
    beside = '<PAMRasterBand band="1"><NoDataValue>1</NoDataValue></PAMRasterBand>'
    (tmp_path / "x.png.aux.xml").write_text(f"<PAMDataset>{beside}</PAMDataset>")
    found = read_pixels(tmp_path / "x.png").valid
    assert found is not None
    assert np.array_equal(found, stored != 1)


@pytest.mark.fault("D20", "U6")
@pytest.mark.parametrize(
    ("end", "content", "said"),
    [
        (".aux.xml", None, r"val_0\.png\.aux\.xml: is a named pipe"),
        (".msk", None, r"val_0\.png\.msk: is a named pipe"),
        (".msk", b"<VRTDataset/>", r"val_0\.png\.msk: no TIFF"),
        (".aux.xml", b"<NoDataValue>" * 100_000, ""),
        (".aux.xml", bytes(range(256)), ""),
    ],
)
def test_hostile_neighbours_of_an_image_are_refused_or_say_nothing(
    end: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    pytest.importorskip("rasterio")
    root = save_tree(tmp_path / "data", size=(SIDE, SIDE), train=2, val=1)
    beside = root / "val" / "B" / f"val_0.png{end}"
    if content is None:
        os.mkfifo(beside)
    else:
        beside.write_bytes(content)
    if said:
        with pytest.raises(UserError, match=said):
            opened(root, "none")
        return
    _, sources = opened(root, "none")
    assert (sources["val"].channels(0)[6] != 255).all()
