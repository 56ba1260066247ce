"""What is odd about bands and values is said, in training and in prediction."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import picture, save, save_tree
from PIL import Image

from dataset import open_dataset
from pairs.bands import Reading
from pairs.check import check
from pairs.images import read_pixels
from pairs.labels import Classes
from pairs.layouts import find_pairs
from pairs.scale import choose_scale
from runtime.errors import UserError

SIDE = 64


def alpha_of(kind: str) -> np.ndarray:
    if kind == "near infrared":
        return picture(5, SIDE, SIDE)[..., 0]
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    if kind == "hardly ever full":
        alpha[:2, :8] = 255
    elif kind == "a collar":
        alpha[8:, 8:] = 255
    return alpha


@pytest.mark.fault("U9")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("near infrared", "neither 0 nor 255"),
        ("hardly ever full", "is 255"),
        ("a collar", ""),
    ],
)
def test_a_suspicious_alpha_is_said_before_training(kind: str, said: str, tmp_path: Path) -> None:
    root = save_tree(tmp_path, size=(SIDE, SIDE), train=2, val=1)
    path = root / "train" / "A" / "train_0.png"
    rgb = np.asarray(Image.open(path))
    save(path, np.dstack([rgb, alpha_of(kind)]))
    (said_so,) = [w for w in check(find_pairs(root), Classes(1)).warnings if "alpha" in w] or [""]
    assert said in said_so
    assert bool(said) == bool(said_so)
    if said:
        assert "train_0.png: band 4 counts as alpha" in said_so
        assert "--bands 1,2,3 leaves it out" in said_so
    found = read_pixels(path, Reading(bands=(1, 2, 3)))
    assert np.array_equal(found.rgb, rgb)
    assert found.valid is None
    assert not found.remarks


def save_deep(root: Path, fill: float | None, share: float = 0.05) -> Path:
    """Write images of float32 with a share of pixels that nobody declared to be no data."""
    save_tree(root, size=(SIDE, SIDE), train=3, val=1)
    rng = np.random.default_rng(0)
    for path in [*root.glob("*/A/*"), *root.glob("*/B/*")]:
        path.unlink()
        values = rng.normal(1000, 200, (SIDE, SIDE)).astype(np.float32)
        if fill is not None:
            values[rng.random((SIDE, SIDE)) < share] = fill
        Image.fromarray(values).save(path.with_suffix(".tif"))
    return root


@pytest.mark.fault("U9")
@pytest.mark.parametrize("fill", [-9999, -32768, 1e6, None])
def test_a_filling_that_nobody_declared_is_warned_of(
    fill: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save_deep(tmp_path, fill)
    images = [p for pair in find_pairs(root).splits["train"] for p in (pair.before, pair.after)]
    _, lines = choose_scale(images, Reading(), "the training split")
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert bool(warnings) == (fill is not None)
    open_dataset(root, "val")
    said = capsys.readouterr().out
    remarks = read_pixels(images[0], stretch=True).remarks
    for text in (*warnings, *remarks) if fill is not None else ():
        assert f"of its pixels are {fill:g}, which may mean no data" in text
        assert "gdal_edit.py -a_nodata" in text
        assert "which may mean no data" in said
    assert bool(remarks) == (fill is not None)


@pytest.mark.fault("U9")
def test_alpha_and_align_together(tmp_path: Path) -> None:
    """A band that no file calls alpha cuts both dates, wherever their grids lie."""
    pytest.importorskip("rasterio")
    from geo_helpers import write_tif
    from rasterio.transform import from_origin

    from mapping.rasters import open_scene

    first = picture(0, 60, 60).transpose(2, 0, 1)
    wide = picture(1, 80, 80).transpose(2, 0, 1)
    alpha = np.full((1, 60, 60), 9, np.uint8)
    alpha_wide = np.full((1, 80, 80), 9, np.uint8)
    alpha[:, :, :10] = 0
    alpha_wide[:, 30:40] = 0
    for reading in (Reading(alpha=4), Reading(bands=(3, 2, 1), alpha=4)):
        for declared in ({}, {"photometric": "rgb", "alpha": "no"}):
            a = write_tif(tmp_path / "a.tif", np.concatenate([first, alpha]), **declared)
            b = write_tif(
                tmp_path / "b.tif",
                np.concatenate([wide, alpha_wide]),
                transform=from_origin(5e5 - 5, 5.2e6 + 5, 0.5, 0.5),
                **declared,
            )
            with open_scene(a, b, align=True, reading=reading) as scene:
                _, after, valid = scene.read(0, 60)
                assert "alpha 4" in scene.notes[0]
            expected = np.ones((60, 60), bool)
            expected[:, :10] = False
            expected[20:30] = False
            assert np.array_equal(valid, expected)
            order = [2, 1, 0] if reading.bands else [0, 1, 2]
            assert np.array_equal(after[:, valid], wide[order, 10:70, 10:70][:, valid])


@pytest.mark.fault("U9")
def test_explicit_bands_are_bands_with_align_too(tmp_path: Path) -> None:
    """Near infrared that a tool has tagged as alpha cuts nothing once bands are given."""
    pytest.importorskip("rasterio")
    from geo_helpers import write_tif
    from rasterio.enums import ColorInterp
    from rasterio.transform import from_origin

    from mapping.rasters import open_scene

    rgba = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    four = np.concatenate([picture(0, 60, 60), picture(1, 60, 60)[..., :1]], 2).transpose(2, 0, 1)
    four[3, 10:20] = 0
    a = write_tif(tmp_path / "a.tif", four, colorinterp=rgba)
    for shift in (0.0, 0.5):
        place = from_origin(5e5 + shift, 5.2e6, 0.5, 0.5)
        b = write_tif(tmp_path / "b.tif", four, colorinterp=rgba, transform=place)
        for bands in ((1, 2, 3), (4, 2, 1)):
            reading = Reading(bands=bands)
            with open_scene(a, b, align=True, reading=reading) as scene:
                before, _, valid = scene.read(0, 60)
            assert valid[:, 2:].all()
            expected = four[[band - 1 for band in bands]]
            assert np.array_equal(before[:, :, 2:], expected[:, :, 2:])


@pytest.mark.fault("D16")
def test_a_deep_image_among_many_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start looks at some headers only; whoever is passed over is met when files are read."""
    root = save_tree(tmp_path, train=6, val=1)
    path = root / "train" / "A" / "train_1.png"
    save(path, Image.fromarray(np.full((32, 32), 3000, np.uint16)))
    images = [p for pair in find_pairs(root).splits["train"] for p in (pair.before, pair.after)]
    with pytest.raises(UserError, match=r"train_1\.png has uint16.*no scale fits both"):
        choose_scale(images, Reading(), "the training split")
    monkeypatch.setattr("pairs.scale.MAX_FILES", 3)
    reading, lines = choose_scale(images, Reading(), "the training split")
    assert (reading, lines) == (Reading(), [])
    with pytest.raises(UserError, match=r"train_1\.png: has uint16 pixels, not 8 bits"):
        check(find_pairs(root), Classes(1), reading=reading)
