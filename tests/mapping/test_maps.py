from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mapping import files
from mapping.files import Overlay
from mapping.maps import Kinds
from mapping.pipeline import code_probability
from mapping.rasters import Grid


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 10**6))
def test_thinned_out_picture_shows_every_change(
    height: int, width: int, side: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    after = draw.integers(0, 256, (3, height, width), dtype=np.uint8)
    classes = ((draw.random((height, width)) < 0.05) * draw.integers(1, 3, (height, width))).astype(
        np.uint8
    )
    classes[draw.random((height, width)) < 0.05] = 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PREVIEW_SIDE", side)
        overlay = Overlay(Path("x.png"), Grid(height, width), Kinds.of("change", 3, {}).palette)
    top = 0
    while top < height:
        bottom = min(height, top + int(draw.integers(1, 8)))
        overlay.write(top, after[:, top:bottom], classes[top:bottom])
        top = bottom
    step = -(-max(height, width) // side)
    for row, column in np.ndindex(overlay.classes.shape):
        block = classes[row * step : (row + 1) * step, column * step : (column + 1) * step]
        assert overlay.classes[row, column] == np.where(block == 255, 0, block).max()
        assert (overlay.picture[row, column] == after[:, row * step, column * step]).all()
    assert max(overlay.classes.shape) <= side


def test_change_is_tinted_and_its_edge_is_its_colour(tmp_path: Path) -> None:
    after = np.full((3, 9, 9), 100, dtype=np.uint8)
    classes = np.zeros((9, 9), dtype=np.uint8)
    classes[2:7, 2:7] = 1
    overlay = Overlay(tmp_path / "x.png", Grid(9, 9), Kinds.of("change", 1, {}).palette)
    overlay.write(0, after, classes)
    overlay.finish()
    with Image.open(tmp_path / "x.png") as image:
        shown = np.asarray(image)
    assert (shown[classes == 0] == 100).all()
    assert (shown[2, 2:7] == files.SINGLE).all() and (shown[2:7, 6] == files.SINGLE).all()
    mixed = np.rint(0.55 * 100 + 0.45 * np.array(files.SINGLE))
    assert (shown[3:6, 3:6] == mixed).all()


def test_stored_probabilities_keep_255_for_no_data() -> None:
    chance = np.array([[0, 0.5, 1, 1]], dtype=np.float32)
    valid = np.array([[True, True, True, False]])
    assert code_probability(chance, valid, "uint8").tolist() == [[0, 127, 254, 255]]
    floats = code_probability(chance, valid, "float32")
    assert floats.dtype == np.float32 and np.isnan(floats[0, 3])


def test_kinds_take_names_and_colours_that_fit() -> None:
    colors = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    data = {"class_names": ["none", "road", "house"], "class_colors": colors}
    kinds = Kinds.of("change", 3, data)
    assert kinds.names == ("none", "road", "house") and kinds.palette == [
        (1, 2, 3),
        (4, 5, 6),
        (7, 8, 9),
    ]
    assert kinds.describe(2) == {"class": 2, "name": "house"} and not kinds.has_threshold
    semantic = Kinds.of("semantic", 2, data)
    assert semantic.describe(256 * 1 + 2) == {"from": "road", "to": "house"}
    assert semantic.has_threshold
    many = Kinds.of("change", 20, data)
    assert len(many.palette) == 20 and many.names[19] == "19"
    assert (np.array(many.palette[1:]).sum(1) > 0).all()  # black is no change alone
