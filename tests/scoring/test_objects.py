import numpy as np
import pytest

from scoring.objects import ObjectCounts, count_objects, label_objects

scipy_ndimage = pytest.importorskip("scipy.ndimage")  # MLflow brings it


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in line] for line in text.split()])


def test_objects_by_hand() -> None:
    labels = label_objects(picture("##..# ..... #.#.# #.##. .#..#"))  # corners do not hang together
    assert labels.tolist() == [
        [1, 1, 0, 0, 2],
        [0, 0, 0, 0, 0],
        [3, 0, 4, 0, 5],
        [3, 0, 4, 4, 0],
        [0, 6, 0, 0, 7],
    ]


def test_arms_that_meet_late_are_one_object() -> None:
    assert label_objects(picture("#.#.# #.#.# #####")).max() == 1
    spiral = picture("####### #.....# #.###.# #.#...# #.##### #......")
    assert label_objects(spiral).max() == 1


def test_rows_do_not_run_into_each_other() -> None:
    assert label_objects(picture("..# #..")).max() == 2


@pytest.mark.parametrize("density", [0.05, 0.4, 0.6, 0.95])
def test_agrees_with_scipy(density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 40, 2)) < density
        ours = label_objects(mask)
        theirs, number = scipy_ndimage.label(mask)
        assert ours.max() == number
        pairs = set(zip(ours.ravel().tolist(), theirs.ravel().tolist(), strict=True))
        assert len(pairs) == len(np.unique(ours))


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_of_one_value(value: bool) -> None:
    assert label_objects(np.full((3, 4), value)).max() == int(value)


def test_found_missed_invented_by_hand() -> None:
    truth = picture("##..#### ##..#### ........ #......#")
    claimed = picture("##....## ........ ........ #..#....")
    #  2 x 2: half claimed, found; 4 x 2: a quarter, missed; 1: found; 1: missed
    expected = ObjectCounts(real=4, found=2, claimed=4, invented=1)
    assert count_objects(truth, claimed) == expected
    assert expected.missed == 2
    assert count_objects(truth, claimed, min_pixels=2) == ObjectCounts(2, 1, 2, 0)


def test_one_claim_may_find_several_and_is_not_invented() -> None:
    truth, claimed = picture("#.#.#"), picture("#####")
    assert count_objects(truth, claimed) == ObjectCounts(real=3, found=3, claimed=1, invented=0)


def test_counts_add_up() -> None:
    assert ObjectCounts(1, 2, 3, 4) + ObjectCounts(1, 1, 1, 1) == ObjectCounts(2, 3, 4, 5)
