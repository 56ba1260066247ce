import numpy as np
import pytest

from scoring.objects import ObjectCounts, count_objects


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in line] for line in text.split()])


def number_of(mask: np.ndarray) -> int:
    return count_objects(mask, np.zeros_like(mask)).in_truth


@pytest.mark.parametrize(
    ("mask", "number"),
    [
        ("##..# ..... #.#.# #.##. .#..#", 7),  # corners do not connect
        ("#.#.# #.#.# #####", 1),  # arms that meet late
        ("####### #.....# #.###.# #.#...# #.##### #......", 1),
        ("..# #..", 2),  # rows do not run into each other
        ("...", 0),
        ("###", 1),
    ],
)
def test_objects_are_pixels_that_share_edges(mask: str, number: int) -> None:
    assert number_of(picture(mask)) == number


def test_found_missed_made_up_by_hand() -> None:
    truth = picture("##..#### ##..#### ........ #......#")
    predicted = picture("##....## ........ ........ #..#....")
    #  2 x 2: half predicted, found; 4 x 2: a quarter, missed; 1: found; 1: missed
    expected = ObjectCounts(in_truth=4, found=2, predicted=4, false=1)
    assert count_objects(truth, predicted) == expected
    assert expected.as_dict()["objects_missed"] == 2
    assert count_objects(truth, predicted, min_pixels=2) == ObjectCounts(2, 1, 2, 0)


def test_one_predicted_object_may_find_several_and_is_not_false() -> None:
    truth, predicted = picture("#.#.#"), picture("#####")
    assert count_objects(truth, predicted) == ObjectCounts(3, 3, 1, 0)


def test_counts_add_up() -> None:
    assert ObjectCounts(1, 2, 3, 4) + ObjectCounts(1, 1, 1, 1) == ObjectCounts(2, 3, 4, 5)
