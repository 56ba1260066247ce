import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from transforms import Augment

GEOMETRY = Augment(brightness=0, contrast=0, saturation=0)


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Three arrays of which each pixel tells where it came from."""
    place = torch.arange(6 * 9, dtype=torch.uint8).view(6, 9)
    return place.repeat(3, 1, 1), place.repeat(3, 1, 1) + 100, place.clone()


def test_geometry_is_the_same_for_all_three() -> None:
    seen = set()
    for seed in range(200):
        before, after, mask = GEOMETRY(*sample(), np.random.default_rng(seed))
        first, second = (before, after) if before[0, 0, 0] < 100 else (after, before)
        assert torch.equal(first[0], mask)
        assert torch.equal(second[0], mask + 100)
        seen.add((mask.shape, tuple(mask.flatten().tolist()), bool(before[0, 0, 0] < 100)))
    assert len(seen) == 4 * 2 * 2  # turns, flips, swaps: each one occurs


@pytest.mark.parametrize(("flip", "turn", "swap"), list(itertools.product([True, False], repeat=3)))
def test_switches(flip: bool, turn: bool, swap: bool) -> None:
    augment = Augment(flip=flip, turn=turn, swap=swap, brightness=0, contrast=0, saturation=0)
    seen = set()
    for seed in range(100):
        before, _, mask = augment(*sample(), np.random.default_rng(seed))
        seen.add((tuple(mask.flatten().tolist()), mask.shape, bool(before[0, 0, 0] < 100)))
    assert len(seen) == 2**flip * 4**turn * 2**swap


def test_colours_change_for_each_date_alone_and_the_mask_never() -> None:
    augment = Augment(flip=False, turn=False, swap=False, hue=0.1)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    mask = torch.tensor([[0, 1], [255, 2]], dtype=torch.uint8).repeat(8, 8)
    before, after, same = augment(image, image, mask, np.random.default_rng(0))
    assert before.dtype == after.dtype == torch.uint8
    assert not torch.equal(before, image)
    assert not torch.equal(before, after)
    assert torch.equal(same, mask)


def test_brightness_stays_in_its_reach() -> None:
    augment = Augment(False, False, False, brightness=0.2, contrast=0, saturation=0)
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [
        int(augment(image, image, image[0], np.random.default_rng(s))[0].max()) for s in range(300)
    ]
    assert 79 <= min(values) < 85
    assert 115 < max(values) <= 120


def test_the_generator_alone_decides() -> None:
    augment, pair = Augment(hue=0.05), sample()
    state = torch.get_rng_state()
    first = augment(*pair, np.random.default_rng(3))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (the global state must not matter)
    second = augment(*pair, np.random.default_rng(3))
    third = augment(*pair, np.random.default_rng(4))
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_the_input_is_left_alone() -> None:
    pair = sample()
    kept = [x.clone() for x in pair]
    for seed in range(5):
        Augment()(*pair, np.random.default_rng(seed))
    assert all(torch.equal(a, b) for a, b in zip(pair, kept, strict=True))
