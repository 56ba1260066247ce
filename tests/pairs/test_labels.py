"""Names and codes of classes: told by the dataset, by a file, or asked for."""

import json
from pathlib import Path

import pytest

from pairs.labels import LEVIR_MCI, SECOND, Classes, choose_classes
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
