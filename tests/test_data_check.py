import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_check
from data_check import check
from errors import UserError
from layouts import find_pairs
from scenes import box_mask, write_pair, write_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "set")


def test_the_summary_counts_by_hand(tree: Path) -> None:
    write_pair(tree / "train", "big", size=(64, 96))
    write_pair(tree / "train", "still", mask=np.zeros((40, 48), np.uint8))
    data = check(find_pairs(tree), crop_size=32)
    train = data.splits["train"]
    assert train.pairs == 5
    assert train.sizes == ((40, 48), (64, 96))
    assert train.patches == 4 * 4 + 2 * 3
    changed = 3 * 15 * 18 + 24 * 36  # box_mask's rectangles
    assert train.class_pixels == (4 * 40 * 48 + 64 * 96 - changed, changed)
    # a rectangle of 40 x 48 touches one 32-patch, that of 64 x 96 two; all others are empty
    assert train.empty_patches == 22 - 3 - 2
    assert data.coding.values == (0, 255)
    assert data.warnings == ()
    assert "train         5  48 x 40 ..." in data.table()
    assert f"{train.change_share:.2%}" in data.table()


def test_every_fault_is_named_at_once(tree: Path) -> None:
    (tree / "train" / "A" / "train_0.png").write_bytes(b"<html>")
    half = tree / "val" / "B" / "val_1.png"
    half.write_bytes(half.read_bytes()[:200])
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(tree / "val" / "A" / "val_2.png")
    with pytest.raises(UserError) as error:
        check(find_pairs(tree))
    lines = str(error.value).splitlines()
    assert "3 faults in the data" in lines[0]
    assert any("train_0.png: cannot be read" in line for line in lines)
    assert any("val_1.png: cannot be read" in line for line in lines)
    assert any("val_2.png: 12 x 10, but its label" in line and "48 x 40" in line for line in lines)


def test_d6_values_of_the_whole_set_decide(tree: Path) -> None:
    for path in (tree / "train" / "label").iterdir():
        Image.fromarray(box_mask(value=1)).save(path)
    with pytest.raises(UserError, match=r"values 0, 1, 255.*\.png"):
        check(find_pairs(tree))
    for path in (tree / "val" / "label").iterdir():
        Image.fromarray(box_mask(value=1)).save(path)
    assert check(find_pairs(tree)).coding.values == (0, 1)


def test_three_classes(tree: Path) -> None:
    Image.fromarray(box_mask(value=128)).save(tree / "train" / "label" / "train_1.png")
    with pytest.raises(UserError, match="--num-classes 3"):
        check(find_pairs(tree))
    data = check(find_pairs(tree), num_classes=3)
    assert data.coding.values == (0, 128, 255)
    assert data.splits["train"].class_pixels[1:] == (15 * 18, 2 * 15 * 18)


def test_d9_the_same_image_in_two_splits_is_a_warning(tree: Path) -> None:
    shutil.copy(tree / "train" / "A" / "train_1.png", tree / "val" / "A" / "val_0.png")
    (warning,) = check(find_pairs(tree)).warnings
    assert "val_0.png (val) is the same image as" in warning and "train_1.png (train)" in warning


@pytest.mark.parametrize(("value", "says"), [(0, "no change"), (255, "nothing but change")])
def test_d14_a_split_of_one_class_is_a_warning(value: int, says: str, tree: Path) -> None:
    for path in (tree / "val" / "label").iterdir():
        Image.fromarray(np.full((40, 48), value, np.uint8)).save(path)
    assert any(f"the val split holds {says}" in w for w in check(find_pairs(tree)).warnings)


def test_d5_jpeg_labels_are_said(tree: Path) -> None:
    path = tree / "val" / "label" / "val_0.png"
    path.unlink()
    Image.fromarray(box_mask()).save(path.with_suffix(".jpg"), quality=70)
    data = check(find_pairs(tree))
    assert data.coding.values == (0, 255)
    assert any("1 labels are JPEGs" in w for w in data.warnings)


def test_the_memo_spares_reading_and_notices_changes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = tmp_path / "cache" / "checked.json"
    first = check(find_pairs(tree), memo=memo)
    read: list[str] = []
    for name in ("read_image", "read_label"):
        reader = getattr(data_check, name)
        monkeypatch.setattr(
            data_check, name, lambda path, reader=reader: (read.append(path.name), reader(path))[1]
        )
    assert check(find_pairs(tree), memo=memo) == first
    assert read == []
    Image.fromarray(box_mask()[::-1].copy()).save(tree / "val" / "label" / "val_1.png")
    second = check(find_pairs(tree), memo=memo)
    assert read == ["val_1.png"]
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "null"])
def test_a_damaged_memo_is_no_loss(content: str, tree: Path, tmp_path: Path) -> None:
    memo = tmp_path / "checked.json"
    expected = check(find_pairs(tree), memo=memo)
    damaged = {key: {"size": 3} for key in json.loads(memo.read_text())}
    for text in (content, json.dumps(damaged)):
        memo.write_text(text)
        assert check(find_pairs(tree), memo=memo) == expected


def test_d15_a_memo_that_cannot_be_written_is_no_loss(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert (
        check(find_pairs(tree), memo=tmp_path / "file" / "checked.json").splits["train"].pairs == 3
    )


def test_fingerprint_follows_content_not_place(tree: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tree, tmp_path / "moved")
    assert check(find_pairs(tree)).fingerprint == check(find_pairs(moved)).fingerprint
