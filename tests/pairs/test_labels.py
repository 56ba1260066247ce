"""Names and codes of classes: told by the dataset, by a file, or asked for."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import mask_of, save, save_tree
from PIL import Image

from pairs.check import check
from pairs.labels import LEVIR_MCI, SECOND, Classes, choose_classes
from pairs.layouts import find_pairs
from runtime.errors import UserError


def write(root: Path, content: object) -> Path:
    path = root / "classes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_a_file_the_number_decides(tmp_path: Path) -> None:
    assert choose_classes(tmp_path) == Classes(1)
    assert choose_classes(tmp_path).names_for((0, 255)) == ("no change", "change")
    three = choose_classes(tmp_path, num_classes=3)
    assert three.names_for((0, 128, 255)) == tuple(LEVIR_MCI)
    assert three.names_for((0, 1, 2)) == ("no change", "class 1", "class 2")


def test_semantic_is_second_unless_said_otherwise(tmp_path: Path) -> None:
    second = choose_classes(tmp_path, task="semantic")
    assert (second.num_classes, second.num_labels) == (6, 7)
    assert second.names_for(tuple(range(7))) == tuple(SECOND)
    assert second.colors == tuple(SECOND.values())
    other = choose_classes(tmp_path, task="semantic", num_classes=4)
    assert (other.num_labels, other.colors) == (5, None)
    assert other.names_for(tuple(range(5)))[:2] == ("unchanged", "class 1")
    with pytest.raises(UserError, match="two classes beside the unchanged"):
        choose_classes(tmp_path, task="semantic", num_classes=1)


@pytest.mark.parametrize(
    ("content", "task", "num_classes"),
    [
        ({"no": 0, "yes": 255}, "change", 1),
        (LEVIR_MCI, "change", 3),
        ({"unchanged": [255, 255, 255], "water": [0, 0, 255], "tree": [0, 1, 0]}, "semantic", 2),
    ],
)
def test_a_file_names_them_all(content: dict, task: str, num_classes: int, tmp_path: Path) -> None:
    write(tmp_path, content)
    found = choose_classes(tmp_path, task=task)
    assert found.num_classes == num_classes
    assert found.names == tuple(content)
    codes = found.values if found.colors is None else tuple(map(list, found.colors))
    assert codes == tuple(content.values())
    assert choose_classes(tmp_path, task=task, num_classes=num_classes) == found


def test_mask_values_go_before_a_file(tmp_path: Path) -> None:
    write(tmp_path, LEVIR_MCI)
    assert choose_classes(tmp_path, mask_values=(2, 1, 0)).values == (2, 1, 0)


def test_a_number_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path, LEVIR_MCI)
    with pytest.raises(UserError, match=r"--num-classes 5: .*classes.json names 3 classes"):
        choose_classes(tmp_path, num_classes=5)


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "3", '"no change"', {}, {"one": 0}, {"a": 0, "b": 0}, {"a": 0, "b": 256},
        {"a": 0, "b": True}, {"a": 0, "b": 1.5}, {"a": 0, "b": [0, 0, 0]}, {"a": None, "b": 1},
        {"a": [0, 0], "b": [0, 1]}, {"a": [1, 1, 1], "b": [1, 1, 1]}, {" ": 0, "b": 1},
        '{"a": 0, "a": 1}', '{"a": {"b": 1}, "c": 2}', [["a", 0], ["b", 1]], "\x00", "[" * 100_000,
        {str(k): k % 256 for k in range(300)},
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_the_remedy(content: object, tmp_path: Path) -> None:
    write(tmp_path, content)
    with pytest.raises(UserError, match=r"classes\.json: "):
        choose_classes(tmp_path)


@pytest.mark.fault("D5")
@pytest.mark.parametrize(("num_classes", "middle"), [(1, 0), (3, 128)])
@pytest.mark.parametrize("how", ["resized", "JPEG called .png", "resized JPEG called .png"])
def test_soft_edges_and_jpegs_under_other_names_get_a_remedy_that_helps(
    num_classes: int, middle: int, how: str, tmp_path: Path
) -> None:
    mask = mask_of(64, 64)
    mask[40:60, 40:60] = middle
    image = Image.fromarray(mask)
    if "resized" in how:
        image = image.resize((37, 37), Image.Resampling.BILINEAR).resize((64, 64))
    root = save_tree(tmp_path, size=(64, 64), train=2, val=1)
    label = root / "train" / "label" / "train_0.png"
    image.save(label, "JPEG" if "JPEG" in how else "PNG", quality=75)
    look = functools.partial(check, find_pairs(root), Classes(num_classes))
    if "resized" not in how:
        assert "1 labels are JPEGs: their noise is snapped" in look().warnings[0]
        return
    with pytest.raises(UserError, match="nearest neighbour") as error:
        look()
    assert str(error.value).count("train_0.png") == 1
    assert ("no png's" in str(error.value)) == ("JPEG" in how)
    # what the remedy asks for is taken
    hard = np.asarray(image)
    steps = (64, 192) if middle else (128,)
    values = np.array([0, 128, 255] if middle else [0, 255], np.uint8)
    save(label, values[np.digitize(hard, steps)])
    look()
