import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import picture, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mapping import rasters as raster
from mapping.grids import place
from mapping.rasters import open_scene
from pairs.bands import Reading
from runtime.errors import UserError

rasterio = pytest.importorskip("rasterio")
from geo_helpers import UTM, write_tif  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.transform import Affine, from_origin  # noqa: E402


def bands_of(seed: int, height: int = 40, width: int = 50, count: int = 3) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(1, 256, (count, height, width), dtype=np.uint8)


@pytest.mark.fault("U5")
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_strips_and_whole_read_agree(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("scene")
    pixels = bands_of(1, 37, 29), bands_of(2, 37, 29)
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    paths = [write_tif(folder / f"{i}.tif", p, **tiled) for i, p in enumerate(pixels)]
    with open_scene(*paths) as scene:
        top = 0
        while top < 37:
            bottom = data.draw(st.integers(top + 1, 37))
            back = data.draw(st.integers(0, top))
            before, after, valid = scene.read(top - back, bottom)
            assert np.array_equal(before, pixels[0][:, top - back : bottom])
            assert np.array_equal(after, pixels[1][:, top - back : bottom])
            assert valid.all()
            top = bottom


def test_plain_images_of_any_kind_are_read_as_training_reads_them(tmp_path: Path) -> None:
    grey = save(tmp_path / "a.png", picture(1)[..., 0])
    jpeg = save(tmp_path / "b.jpg", picture(2))
    with open_scene(grey, jpeg) as scene:
        before, after, valid = scene.read(0, 32)
    assert scene.is_plain and valid.all()
    assert np.array_equal(before, np.stack(3 * [picture(1)[..., 0]]))
    assert np.array_equal(after, np.asarray(Image.open(jpeg)).transpose(2, 0, 1))


def test_plain_and_raster_readers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    palette = Image.fromarray(picture(2)).quantize(7)
    paths = save(tmp_path / "a.png", picture(1)), save(tmp_path / "b.png", palette)
    with open_scene(*paths) as scene:
        plain = scene.read(0, 32)
        assert scene.is_plain
    monkeypatch.setattr(raster, "MAX_PLAIN", 100)
    with open_scene(*paths) as scene:
        assert not scene.is_plain
        for ours, theirs in zip(plain, scene.read(0, 32), strict=True):
            assert np.array_equal(ours, theirs)


OTHER_GRIDS = {
    "CRS": {"crs": "EPSG:32633"},
    "origin": {"transform": from_origin(5e5 + 1, 5.2e6, 0.5, 0.5)},
    "pixel": {"transform": from_origin(5e5, 5.2e6, 0.6, 0.5)},
}


@pytest.mark.fault("U2")
@pytest.mark.parametrize("kind", OTHER_GRIDS)
def test_different_grids_are_refused_with_both_sides(tmp_path: Path, kind: str) -> None:
    a = write_tif(tmp_path / "a.tif", bands_of(1))
    b = write_tif(tmp_path / "b.tif", bands_of(2), **OTHER_GRIDS[kind])
    with pytest.raises(UserError) as caught, open_scene(a, b):
        pass
    for word in (str(a), str(b), "EPSG:32632", "50 x 40", "--align"):
        assert word in str(caught.value)


@pytest.mark.fault("U2")
def test_other_sizes_are_refused_with_both_sides(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png", picture(1)), save(tmp_path / "b.png", picture(2, 32, 40))
    with pytest.raises(UserError, match=r"a\.png \(32 x 32.*b\.png \(40 x 32.*one size"):
        open_scene(a, b, align=True).__enter__()
    c = write_tif(tmp_path / "c.tif", bands_of(1, 32, 32))
    with pytest.raises(UserError, match="not georeferenced"):
        open_scene(a, c, align=True).__enter__()


@pytest.mark.fault("U2")
def test_a_twentieth_of_a_pixel_is_the_same_grid(tmp_path: Path) -> None:
    a = write_tif(tmp_path / "a.tif", bands_of(1))
    near = from_origin(5e5 + 0.01, 5.2e6, 0.5, 0.5)
    with open_scene(a, write_tif(tmp_path / "b.tif", bands_of(2), transform=near)) as scene:
        assert scene.grid.width == 50


@pytest.mark.fault("U2")
def test_align_puts_the_later_date_on_the_grid_of_the_earlier(tmp_path: Path) -> None:
    """A whole-pixel shift of the grid must be exact; beyond the later date there is no data."""
    wide = bands_of(3, 60, 70)
    a = write_tif(tmp_path / "a.tif", bands_of(1))
    moved = from_origin(5e5 - 5, 5.2e6 + 2.5, 0.5, 0.5)  # ten columns and five rows
    b = write_tif(tmp_path / "b.tif", wide, transform=moved)
    with open_scene(a, b, align=True) as scene:
        _, after, valid = scene.read(0, 40)
        assert "resampled" in scene.notes[-1]
    assert valid.all()
    assert np.array_equal(after, wide[:, 5:45, 10:60])

    far = from_origin(5e5 + 10, 5.2e6, 0.5, 0.5)  # begins at column 20
    c = write_tif(tmp_path / "c.tif", bands_of(4), transform=far)
    with open_scene(a, c, align=True) as scene:
        before, after, valid = scene.read(0, 40)
    assert valid[:, 20:].all() and not valid[:, :20].any()
    assert not before[:, :, :20].any() and not after[:, :, :20].any()


@pytest.mark.fault("U2")
@pytest.mark.parametrize("is_rotated", [True, False])
def test_align_onto_a_rotated_grid_and_back_shifts_nothing(
    tmp_path: Path, is_rotated: bool
) -> None:
    """Values that are linear in the place tell a shift of a hundredth of a pixel."""
    middle = Affine.translation(5e5, 5.2e6)
    turned = middle @ Affine.rotation(37) @ Affine.scale(0.5, -0.6)
    upright = from_origin(5e5 - 20, 5.2e6 + 130, 0.5, 0.5)

    def values(transform: Any, height: int, width: int) -> np.ndarray:
        x, y = place(transform, *np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5))
        x, y = (x - 5e5 - 50) / 2, (y - 5.2e6 - 20) / 2
        return (128 + np.stack([x, y, 0.6 * (x + y)])).clip(0, 255)

    grids = [(turned, 320, 320), (upright, 700, 700)]
    grids = grids if is_rotated else grids[::-1]
    files = [
        write_tif(tmp_path / f"{i}.tif", np.rint(values(*grid)).astype(np.uint8), transform=grid[0])
        for i, grid in enumerate(grids)
    ]
    with open_scene(*files, align=True) as scene:
        _, after, valid = scene.read(0, grids[0][1])
    expected = values(*grids[0])
    inside = valid & ((expected > 2) & (expected < 253)).all(0)
    gap = (after - expected)[:, inside]
    assert inside.sum() > 10_000 and np.abs(gap).max() < 1.5 and np.abs(gap.mean(1)).max() < 0.01


@pytest.mark.fault("U2")
def test_align_between_crs_keeps_places(tmp_path: Path) -> None:
    from rasterio.warp import transform_bounds

    smooth = np.add.outer(np.arange(80), np.arange(80)).astype(np.uint8)
    pixels = np.stack(3 * [smooth + 20])
    a = write_tif(tmp_path / "a.tif", pixels)
    west, south, east, north = transform_bounds(UTM, "EPSG:4326", 5e5, 5.2e6 - 40, 5e5 + 40, 5.2e6)
    degrees = from_origin(west, north, (east - west) / 80, (north - south) / 80)
    b = write_tif(tmp_path / "b.tif", pixels, crs="EPSG:4326", transform=degrees)
    with open_scene(a, b, align=True) as scene:
        before, after, valid = scene.read(0, 80)
    inner = np.s_[:, 3:-3, 3:-3]
    assert valid[inner[1:]].all()
    assert np.abs(before[inner].astype(int) - after[inner]).max() <= 3


@pytest.mark.fault("U2")
def test_scenes_without_overlap_are_refused(tmp_path: Path) -> None:
    a = write_tif(tmp_path / "a.tif", bands_of(1))
    b = write_tif(tmp_path / "b.tif", bands_of(2), transform=from_origin(6e5, 5.2e6, 0.5, 0.5))
    with pytest.raises(UserError, match="do not overlap"):
        open_scene(a, b, align=True).__enter__()


@pytest.mark.fault("U2")
def test_nodata_of_either_date_is_black_on_both(tmp_path: Path) -> None:
    first, second = bands_of(1), bands_of(2)
    first[:, :10], second[:, :, :10] = 0, 7
    a = write_tif(tmp_path / "a.tif", first, nodata=0)
    b = write_tif(tmp_path / "b.tif", second, nodata=7)
    with open_scene(a, b) as scene:
        before, after, valid = scene.read(0, 40)
    assert not valid[:10].any() and not valid[:, :10].any() and valid[10:, 10:].all()
    assert not before[:, ~valid].any() and not after[:, ~valid].any()
    assert np.array_equal(before[:, valid], first[:, valid])


@pytest.mark.fault("U2")
def test_nan_and_alpha_are_no_data(tmp_path: Path) -> None:
    floats = bands_of(1).astype(np.float32)
    floats[0, 0, 0] = np.nan
    rgba = bands_of(2, count=4)
    rgba[3] = 255
    rgba[3, 5, 5] = 0
    red, green, blue = ColorInterp.red, ColorInterp.green, ColorInterp.blue
    a = write_tif(tmp_path / "a.tif", floats)
    b = write_tif(tmp_path / "b.tif", rgba, colorinterp=[red, green, blue, ColorInterp.alpha])
    with open_scene(a, b, reading=Reading(scale=(0, 255))) as scene:
        before, after, valid = scene.read(0, 40)
    assert sorted(np.argwhere(~valid).tolist()) == [[0, 0], [5, 5]]
    assert np.array_equal(before[:, valid], floats[:, valid].astype(np.uint8))
    assert np.array_equal(after[:, valid], rgba[:3, valid])


@pytest.mark.fault("U2")
def test_bands_are_chosen_or_asked_for(tmp_path: Path) -> None:
    five = bands_of(1, count=5)
    a = write_tif(tmp_path / "a.tif", five, photometric="minisblack")
    with pytest.raises(UserError, match=r"a\.tif: has 5 bands .*--bands 3,2,1"):
        open_scene(a, a).__enter__()
    with pytest.raises(UserError, match=r"--bands 4,3,6: give one or three numbers from 1 to 5"):
        open_scene(a, a, reading=Reading(bands=(4, 3, 6))).__enter__()
    with open_scene(a, a, reading=Reading(bands=(4, 3, 2))) as scene:
        assert np.array_equal(scene.read(0, 40)[0], five[[3, 2, 1]])
    with open_scene(a, a, reading=Reading(bands=(5,))) as scene:
        assert np.array_equal(scene.read(0, 40)[0], five[[4, 4, 4]])
    mixed = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    b = write_tif(tmp_path / "b.tif", five[:4], photometric="minisblack", colorinterp=mixed)
    with open_scene(b, b) as scene:
        assert np.array_equal(scene.read(0, 40)[0], five[[2, 1, 0]])


@pytest.mark.fault("U2")
def test_sixteen_bits_are_scaled_and_it_is_said(tmp_path: Path) -> None:
    values = bands_of(1).astype(np.uint16) * 16
    a = write_tif(tmp_path / "a.tif", values)
    with open_scene(a, a, reading=Reading(scale=(0, 4080))) as scene:
        assert np.array_equal(scene.read(0, 40)[0], bands_of(1))
        assert scene.notes == ["bands   1,2,3 of 3 (uint16)"]
    with open_scene(a, a) as scene:
        stretched = scene.read(0, 40)[0]
        assert "uint16 becomes 8 bits between the percentiles 2 and 98" in scene.notes[-1]
        assert "--scale" in scene.notes[-1]
    low, high = np.percentile(values[1], (2, 98))
    expected = np.clip((values[1] - low) / (high - low), 0, 1) * 255
    assert np.abs(stretched[1] - expected).max() <= 1


def test_a_grid_without_a_crs_of_the_earth_has_no_place_and_it_is_said(tmp_path: Path) -> None:
    drawing = 'LOCAL_CS["site",UNIT["metre",1]]'
    for crs in (None, drawing):
        a = write_tif(tmp_path / "a.tif", bands_of(1), crs=crs)
        with open_scene(a, a) as scene:
            assert not scene.grid.has_place and scene.grid.transform is not None
            assert "so there are no polygons" in scene.notes[-1]


@pytest.mark.fault("U2")
def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    a = write_tif(tmp_path / "a.tif", np.zeros((1, 8, 8), dtype=np.complex64))
    with pytest.raises(UserError, match="complex numbers"):
        open_scene(a, a).__enter__()


def test_truncated_raster_is_one_line(tmp_path: Path) -> None:
    a = write_tif(tmp_path / "a.tif", bands_of(1, 300, 300), compress="deflate")
    a.write_bytes(a.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"a\.tif: cannot be"), open_scene(a, a) as scene:
        scene.read(0, 300)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tif: no such file"):
        open_scene(tmp_path / "x.tif", tmp_path / "y.tif").__enter__()


@pytest.mark.fault("U3")
def test_without_rasterio_plain_images_work_and_geotiffs_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_tif(tmp_path / "a.tif", bands_of(1, 32, 32))
    b = save(tmp_path / "b.tif", picture(1))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with open_scene(b, b) as scene:
        assert scene.is_plain
        assert np.array_equal(scene.read(0, 32)[0], picture(1).transpose(2, 0, 1))
    with pytest.raises(UserError, match=r"a\.tif: a GeoTIFF, .*requirements-geo\.txt"):
        open_scene(a, a).__enter__()
    with open_scene(b, b, reading=Reading(bands=(1,))) as scene:
        assert np.array_equal(scene.read(0, 32)[0][2], picture(1)[..., 0])


@pytest.mark.fault("U9")
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_tile_without_any_data_is_read_as_no_data(tmp_path: Path, dtype: str) -> None:
    empty = np.zeros((3, 40, 50), dtype)
    paths = [write_tif(tmp_path / name, empty, nodata=0) for name in ("a.tif", "b.tif")]
    with open_scene(*paths) as scene:
        _, _, valid = scene.read(0, 40)
    assert not valid.any()
