from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import save_tree

from dataset import open_dataset
from pairs.images import IGNORE
from pairs.sources import Source, Subset
from scoring.corruptions import CORRUPTIONS, CorruptedSource, blur, rotate, shift


def image(height: int = 12, width: int = 17) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    )


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_dataset(save_tree(tmp_path / "set", size=(20, 30), train=1, val=5)).source


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_neutral_level_changes_nothing(name: str, source: Source) -> None:
    corruption = CORRUPTIONS[name]
    assert corruption.neutral in corruption.levels
    for number in range(4):
        after, valid = corruption.corrupt(image(), corruption.neutral, number)
        assert torch.equal(after, image())
        assert valid is None or valid.all()
    whole = CorruptedSource(source, corruption, corruption.neutral)
    assert torch.equal(whole.channels(1), source.channels(1))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_other_levels_change_the_later_date_alone(name: str, source: Source) -> None:
    corruption = CORRUPTIONS[name]
    untouched = source.channels(2).clone()
    for level in set(corruption.levels) - {corruption.neutral}:
        channels = CorruptedSource(source, corruption, level).channels(2)
        assert channels.dtype == torch.uint8
        assert torch.equal(channels[:3], untouched[:3])
        assert not torch.equal(channels[3:6], untouched[3:6])
        counted = channels[6] != IGNORE
        assert torch.equal(channels[6][counted], untouched[6][counted])
    assert torch.equal(source.channels(2), untouched)


@pytest.mark.parametrize(
    ("number", "down", "right"), [(0, 0, 3), (1, 3, 0), (2, 0, -3), (3, -3, 0)]
)
def test_a_shift_by_hand(number: int, down: int, right: int) -> None:
    shifted, valid = shift(image(), 3, number)
    assert valid is not None
    rolled = torch.roll(image(), (down, right), (1, 2))
    assert torch.equal(shifted[:, valid], rolled[:, valid])
    lost = 3 * (12 if right else 17)
    assert int((~valid).sum()) == lost


def test_a_shift_beyond_the_frame_leaves_nothing_to_count() -> None:
    shifted, valid = shift(image(4, 4), 8, 0)
    assert shifted.shape == (3, 4, 4)
    assert valid is not None and not valid.any()


def test_four_quarter_turns_are_those_of_torch() -> None:
    square = image(11, 11)
    for number, turns in ((0, 1), (1, -1)):
        turned, valid = rotate(square, 90, number)
        assert valid is not None and valid.all()
        assert torch.equal(turned, torch.rot90(square, turns, (1, 2)))


def test_a_turn_ignores_the_corners_and_keeps_the_centre() -> None:
    _, valid = rotate(image(41, 41), 10, 0)
    assert valid is not None
    assert not valid[0, 0] and not valid[-1, -1] and valid[20, 20]


def test_blur_keeps_a_flat_image_and_small_ones() -> None:
    flat = torch.full((3, 2, 2), 77, dtype=torch.uint8)
    assert torch.equal(blur(flat, 4, 0)[0], flat)


def test_some_of_the_pairs(source: Source) -> None:
    part = CorruptedSource(Subset(source, [1, 3]), CORRUPTIONS["blur"], 0)
    assert [pair.name for pair in part.pairs] == ["val_1", "val_3"]
    assert len(part) == len(part.sizes) == 2
    assert torch.equal(part.channels(1), source.channels(3))
