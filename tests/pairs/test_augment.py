"""Augmentation: the same geometry for all three, colour for each date, chance only from the rng."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pairs.augment import Augment
from pairs.images import IGNORE

GEOMETRY = Augment(brightness=0, contrast=0, saturation=0, hue=0)
STILL = Augment(flip=False, turn=False, swap=False, brightness=0, contrast=0, saturation=0, hue=0)
Triple = tuple[Tensor, Tensor, Tensor]


def sample(height: int = 6, width: int = 6) -> Triple:
    """Two dates with a mask that repeats their first channel, so that moves can be compared."""
    numbers = torch.arange(height * width, dtype=torch.uint8).view(height, width)
    before = torch.stack([numbers, numbers, numbers])
    return before, before + 100, numbers


def augmented(augment: Augment, seed: int, given: Triple | None = None) -> Triple:
    return augment(*(given or sample()), np.random.default_rng(seed))


def test_geometry_is_one_for_both_dates_and_the_mask() -> None:
    seen: Counter[tuple[bool, tuple[int, ...]]] = Counter()
    for seed in range(400):
        before, after, mask = augmented(GEOMETRY, seed)
        swapped = bool(before.max() > after.max())
        dates = (after, before) if swapped else (before, after)
        assert torch.equal(dates[0][0], mask)
        assert torch.equal(dates[1][0], mask + 100)
        seen[swapped, tuple(mask.flatten().tolist())] += 1
    assert len(seen) == 16  # 8 symmetries of the square, swapped or not
    assert max(seen.values()) < 50  # of 400 / 16 = 25


def test_nothing_switched_on_changes_nothing() -> None:
    for seed in range(8):
        for out, given in zip(augmented(STILL, seed), sample(), strict=True):
            assert torch.equal(out, given)


def test_jitter_differs_per_date_and_spares_the_mask() -> None:
    given = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    image = given.to(torch.uint8)
    mask = torch.full((16, 16), IGNORE, dtype=torch.uint8)
    augment = Augment(flip=False, turn=False, swap=False)
    before, after, out = augmented(augment, 3, (image, image.clone(), mask))
    assert torch.equal(out, mask)
    assert not torch.equal(before, after)
    assert not torch.equal(before, image)
    assert before.dtype == after.dtype == torch.uint8


@pytest.mark.parametrize("knob", ["brightness", "contrast", "saturation", "hue"])
def test_each_knob_has_an_effect(knob: str) -> None:
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(1))
    given = (image.to(torch.uint8), image.to(torch.uint8), torch.zeros(8, 8, dtype=torch.uint8))
    off = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    augment = Augment(flip=False, turn=False, swap=False, **{**off, knob: 0.4})
    assert not torch.equal(augmented(augment, 0, given)[0], given[0])


@pytest.mark.parametrize("size", [(64, 64), (1, 7), (17, 33), (130, 62)])
@pytest.mark.parametrize("mask_of", [1, 2])
def test_every_byte_is_where_rot90_and_flip_put_it(size: tuple[int, int], mask_of: int) -> None:
    for seed in range(24):
        pixels = np.random.default_rng(seed).integers(0, 256, (6 + mask_of, *size), dtype=np.uint8)
        before, after, mask = torch.from_numpy(pixels).split((3, 3, mask_of))
        rng = np.random.default_rng(seed)
        flipped, turns, swapped = rng.random() < 0.5, int(rng.integers(4)), rng.random() < 0.5
        parts = [after, before, mask.flip(0)] if swapped else [before, after, mask]
        expected = [torch.rot90(x.flip(-1) if flipped else x, turns, (-2, -1)) for x in parts]
        found = augmented(GEOMETRY, seed, (before, after, mask))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed
        assert all(part.is_contiguous() for part in found)


def with_torchvision(augment: Augment, image: Tensor, rng: np.random.Generator) -> Tensor:
    """What the jitter does to an image, by torchvision's functions, before it becomes bytes."""
    image = image.float() / 255
    steps = (
        (F.adjust_brightness, augment.brightness),
        (F.adjust_contrast, augment.contrast),
        (F.adjust_saturation, augment.saturation),
        (F.adjust_hue, augment.hue),
    )
    for number in rng.permutation(4):
        adjust, reach = steps[number]
        value = (adjust is not F.adjust_hue) + reach * (2 * rng.random() - 1)
        image = adjust(image, value) if reach else image
    return image * 255


@pytest.mark.parametrize("size", [(64, 64), (130, 61)])
@pytest.mark.parametrize("reach", [0.2, 0.5])
def test_colours_are_those_of_torchvision(size: tuple[int, int], reach: float) -> None:
    """Where nothing is cut off on the way: from the middle of the range, that is."""
    augment = Augment(brightness=reach, contrast=reach, saturation=reach)
    for seed in range(24):
        pixels = np.random.default_rng(seed).integers(60, 100, (3, *size), dtype=np.uint8)
        image = torch.from_numpy(pixels)
        expected = with_torchvision(augment, image, np.random.default_rng(seed))
        found = augment._jitter(image, np.random.default_rng(seed)).float()
        assert expected.min() > 0 and expected.max() < 255
        assert (found - expected).abs().max() < 2.6, seed
        assert (found - expected).mean().abs() < 1, seed


def test_colours_that_leave_the_range_are_cut_off() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image = torch.from_numpy(rng.choice([0, 255], (3, 32, 32)).astype(np.uint8))
        for reach in (0.2, 1.0):
            augment = Augment(brightness=reach, contrast=reach, saturation=reach)
            expected = with_torchvision(augment, image, np.random.default_rng(seed))
            found = augment._jitter(image, np.random.default_rng(seed)).float()
            # each pixel moves to the same side; only cutting off at each step tells them apart
            assert (found - expected).abs().mean() < 100 * reach
            assert found[image == 255].mean() >= found[image == 0].mean()


def test_hue_is_torchvisions() -> None:
    image = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(2))
    augment = Augment(brightness=0, contrast=0, saturation=0, hue=0.2)
    found = augment._jitter(image.byte(), np.random.default_rng(0)).float()
    expected = with_torchvision(augment, image.byte(), np.random.default_rng(0))
    assert (found - expected).abs().max() < 2.1


def test_chance_comes_from_the_generator_alone() -> None:
    state = torch.random.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    torch.manual_seed(1)
    first = augmented(Augment(hue=0.1), 5)
    torch.manual_seed(2)
    second = augmented(Augment(hue=0.1), 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    third = augmented(Augment(hue=0.1), 6)
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    torch.random.set_rng_state(state[0])
    augmented(Augment(hue=0.1), 7)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert repr(np.random.get_state()) == state[1]  # noqa: NPY002


def test_geometry_does_not_depend_on_the_colours() -> None:
    for seed in range(20):
        assert torch.equal(augmented(GEOMETRY, seed)[2], augmented(Augment(), seed)[2])


def test_exchanged_dates_take_their_labels_along() -> None:
    before, after, numbers = sample()
    masks = torch.stack([numbers, numbers + 100])
    swaps = 0
    for seed in range(40):
        first, second, both = augmented(GEOMETRY, seed, (before, after, masks))
        assert torch.equal(torch.stack([first[0], second[0]]), both)
        swaps += bool(first.max() > second.max())
    assert 10 < swaps < 30
