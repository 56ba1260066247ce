import threading
import time
from collections.abc import Generator
from itertools import count

import numpy as np
import pytest

from mapping.grids import Grid
from mapping.pipeline import ahead, leave_if_unwanted, read_strips
from mapping.rasters import PlainImage, Scene
from networks.sliding_window import Windows
from runtime.errors import UserError


def numbers(end: int, seen: list[int]) -> Generator[int, None, None]:
    try:
        for number in range(end):
            seen.append(number)
            yield number
    finally:
        seen.append(-1)


def test_items_come_in_order_and_one_ahead() -> None:
    seen: list[int] = []
    taken: list[int] = []
    for item in ahead(numbers(5, seen)):
        time.sleep(0.05)
        taken.append(item)
        assert max(seen) <= item + 1  # memory is that of one item ahead
    assert taken == [0, 1, 2, 3, 4] and seen == [0, 1, 2, 3, 4, -1]


def test_an_error_in_the_thread_is_raised_where_items_are_taken() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise UserError("x.tif: cannot be read")

    taken: list[int] = []
    with pytest.raises(UserError, match=r"x\.tif: cannot be read"):
        taken.extend(ahead(failing()))
    assert not [t for t in threading.enumerate() if "(work)" in t.name]


def test_who_takes_no_more_ends_the_thread() -> None:
    seen: list[int] = []
    items = ahead(numbers(10**9, seen))
    assert next(items) == 0
    items.close()
    assert seen[-1] == -1 and len(seen) < 5

    def endless() -> Generator[int, None, None]:
        yield 1
        for _ in count():
            time.sleep(0.01)
            leave_if_unwanted()
        yield 2

    inner = ahead(endless())
    assert next(inner) == 1
    inner.close()


class Date(PlainImage):
    """Random pixels in memory, some without data."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        draw = np.random.default_rng(seed)
        self.rgb = draw.integers(1, 256, (3, height, width), dtype=np.uint8)
        self.valid = draw.random((height, width)) < 0.7
        self.grid = Grid(height, width)

    def read(self, top: int, bottom: int):  # type: ignore[no-untyped-def]
        return self.rgb[:, top:bottom], self.valid[top:bottom]


def test_pairs_of_a_series_are_black_where_one_of_their_two_dates_has_no_data() -> None:
    dates = [Date(seed, 9, 7) for seed in range(3)]
    for number, (before, after, valid) in enumerate(Scene(*dates).read_pairs(2, 8)):
        first, second = dates[number : number + 2]
        expected = first.valid & second.valid
        assert np.array_equal(valid, expected[2:8])
        for rows, date in ((before, first), (after, second)):
            assert np.array_equal(rows, (date.rgb * expected)[:, 2:8])


@pytest.mark.parametrize(("end_of_holes", "overlap"), [(0, 5), (20, 5), (20, 0)])
def test_strips_of_a_series_are_the_rows_of_its_pairs(end_of_holes: int, overlap: int) -> None:
    dates = [Date(seed, 40, 7) for seed in range(3)]
    for date in dates:
        date.valid[end_of_holes:] = True
    scene, windows = Scene(*dates), Windows(40, 7, window=12, overlap=overlap)
    for strip in read_strips(scene, windows, range(len(windows.tops))):
        top = windows.tops[strip.number]
        expected = scene.read_pairs(top, top + 12)
        for rows, pair, of_pair in zip(strip.read, strip.pairs, expected, strict=True):
            for one, other in zip(rows, of_pair, strict=True):
                assert np.array_equal(one, other)
            assert all(np.array_equal(a, b) for a, b in zip(pair, of_pair[:2], strict=True))
        if not end_of_holes:  # the middle date is read and held once
            assert strip.pairs[0][1] is strip.pairs[1][0]
