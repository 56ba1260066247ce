"""The check before training: every fault at once, warnings, numbers by hand, a true memo."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import mask_of, picture, save, save_pair, save_tree
from PIL import Image

from pairs import records
from pairs.check import DataSummary, check
from pairs.labels import Classes
from pairs.layouts import find_pairs
from pairs.memo import MAX_KINDS
from runtime.errors import UserError


def checked(
    root: Path,
    *,
    num_classes: int = 1,
    mask_values: tuple[int, ...] | None = None,
    crop_size: int = 16,
    memo: Path | None = None,
) -> DataSummary:
    classes = Classes(num_classes, values=mask_values)
    return check(find_pairs(root), classes, crop_size=crop_size, memo=memo)


def test_numbers_of_a_split(tmp_path: Path) -> None:
    summary = checked(save_tree(tmp_path, train=3, val=2))
    train = summary.splits["train"]
    assert summary.encoding.values == (0, 255)
    assert summary.warnings == ()
    assert (train.pairs, train.sizes, train.patches) == (3, ((32, 32),), 12)
    assert train.class_pixels == (3 * 768, 3 * 256)
    assert train.change_share == 0.25
    assert train.empty_patches == 9  # three of the four 16 x 16 patches of each
    table = summary.table().splitlines()
    assert len(table) == 3
    assert "32 x 32" in table[1]
    assert "75%" in table[1]
    assert "25.00%" in table[1]


def test_classes_of_a_multi_class_set(tmp_path: Path) -> None:
    save_tree(tmp_path, train=1, val=1)
    labels = np.repeat(np.array([0, 128, 255, 0], np.uint8), 8)[:, None].repeat(32, 1)
    save(tmp_path / "train" / "label" / "train_0.png", labels)
    summary = checked(tmp_path, num_classes=3)
    assert summary.splits["train"].class_pixels == (512, 256, 256)
    assert summary.splits["val"].class_pixels == (768, 0, 256)


@pytest.mark.fault("D2", "D3")
def test_all_faults_at_once(tmp_path: Path) -> None:
    train = save_tree(tmp_path, train=4, val=1) / "train"
    save(train / "B" / "train_0.png", picture(9, 32, 31))
    (train / "A" / "train_1.png").write_bytes(b"")
    data = (train / "label" / "train_2.png").read_bytes()
    (train / "label" / "train_2.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as error:
        checked(tmp_path)
    first, *rest = str(error.value).splitlines()
    assert "3 faults" in first
    assert len(rest) == 3
    size = next(line for line in rest if "train_0" in line)
    assert "31 x 32" in size
    assert "is 32 x 32" in size
    for name in ("A/train_1.png", "label/train_2.png"):
        assert sum(name in line for line in rest) == 1


@pytest.mark.fault("D6")
@pytest.mark.parametrize("value", [254, 128, 2])
def test_a_strange_value_names_its_file(tmp_path: Path, value: int) -> None:
    save_tree(tmp_path, train=2, val=2)
    save(tmp_path / "val" / "label" / "val_1.png", mask_of(value=value))
    with pytest.raises(UserError, match=rf"{value}.*val_1\.png"):
        checked(tmp_path)


def test_the_coding_is_told_from_all_files(tmp_path: Path) -> None:
    save_tree(tmp_path, train=2, val=1)
    for path in tmp_path.glob("*/label/*.png"):
        save(path, mask_of(value=1))
    save(tmp_path / "train" / "label" / "train_0.png", np.zeros((32, 32), np.uint8))
    assert checked(tmp_path).encoding.values == (0, 1)
    save(tmp_path / "train" / "label" / "train_0.png", mask_of(value=255))
    with pytest.raises(UserError, match="0, 1, 255"):
        checked(tmp_path)
    assert checked(tmp_path, mask_values=(0, 1)).encoding.values == (0, 1)  # 255 is ignored


@pytest.mark.fault("D14")
@pytest.mark.parametrize(("value", "said"), [(0, "no change"), (255, "nothing but change")])
def test_a_split_of_one_class_is_warned_of(tmp_path: Path, value: int, said: str) -> None:
    save_tree(tmp_path, train=1, val=1)
    save(tmp_path / "val" / "label" / "val_0.png", np.full((32, 32), value, np.uint8))
    (warning,) = checked(tmp_path).warnings
    assert "val" in warning
    assert said in warning


@pytest.mark.fault("D9")
@pytest.mark.parametrize("date", ["A", "B"])
def test_an_image_in_two_splits_is_warned_of(date: str, tmp_path: Path) -> None:
    save_tree(tmp_path, train=2, val=1)
    pixels = np.asarray(Image.open(tmp_path / "train" / date / "train_1.png"))
    (tmp_path / "val" / "A" / "val_0.png").unlink()
    save(tmp_path / "val" / "A" / "val_0.bmp", pixels)  # the same pixels in another file
    (warning,) = checked(tmp_path).warnings
    assert "val_0.bmp" in warning
    assert "train_1.png" in warning


@pytest.mark.fault("D5")
def test_jpeg_labels_are_said_once(tmp_path: Path) -> None:
    save_tree(tmp_path, train=2, val=1)
    for path in list(tmp_path.glob("*/label/*.png")):
        Image.open(path).save(path.with_suffix(".jpg"), quality=60)
        path.unlink()
    summary = checked(tmp_path)
    (warning,) = summary.warnings
    assert "3 labels are JPEGs" in warning
    assert summary.splits["train"].class_pixels == (2 * 768, 2 * 256)


@pytest.mark.parametrize("change", ["nothing", "pixels", "name", "split", "touch"])
def test_fingerprint_knows_names_and_pixels(tmp_path: Path, change: str) -> None:
    save_tree(tmp_path, train=2, val=2)
    before = checked(tmp_path).fingerprint
    path = tmp_path / "train" / "A" / "train_0.png"
    if change == "pixels":
        pixels = np.array(Image.open(path))
        pixels[0, 0, 0] ^= 1
        save(path, pixels)
    elif change == "touch":
        os.utime(path, (1, 1))
    elif change in ("name", "split"):
        for folder in ("A", "B", "label"):
            name = "other" if change == "name" else "train_0"
            split = "train" if change == "name" else "val"
            source = tmp_path / "train" / folder / "train_0.png"
            source.rename(tmp_path / split / folder / f"{name}.png")
    assert (checked(tmp_path).fingerprint == before) == (change in ("nothing", "touch"))


@pytest.mark.fault("D13")
def test_memo_reads_nothing_twice_and_notices_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def spy(original: Callable[..., object]) -> Callable[..., object]:
        def reader(path: Path, *rest: object) -> object:
            read.append(path)
            return original(path, *rest)

        return reader

    for name in ("read_pixels", "read_label"):
        monkeypatch.setattr(records, name, spy(getattr(records, name)))
    data, memo = save_tree(tmp_path / "data", train=2, val=1), tmp_path / "new" / "memos"
    first = checked(data, memo=memo)
    assert len(read) == 9
    assert checked(data, memo=memo) == first
    assert len(read) == 9
    changed = save(data / "train" / "label" / "train_1.png", mask_of() * 0)
    os.utime(changed, (1, 1))
    again = checked(data, memo=memo)
    assert read[9:] == [changed]
    assert again == checked(data)
    assert again.fingerprint != first.fingerprint
    assert len(list(memo.iterdir())) == 1


def content_of(memo: Path) -> dict[str, dict[str, list]]:
    """What the only memo in a folder holds."""
    (path,) = memo.glob("*.json")
    return json.loads(path.read_text().partition("\n")[2])


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"x": 1}', "null", "\x00", "[" * 100_000])
def test_a_corrupt_memo_is_ignored(tmp_path: Path, text: str) -> None:
    data, memo = save_tree(tmp_path / "data", train=1, val=1), tmp_path / "memo"
    expected = checked(data, memo=memo)
    (path,) = memo.iterdir()
    path.write_text(text)
    assert checked(data, memo=memo) == expected


@pytest.mark.fault("D22")
@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
def test_a_flipped_bit_in_the_memo_is_noticed(tmp_path: Path, place: float) -> None:
    data, memo = save_tree(tmp_path / "data", train=1, val=1), tmp_path / "memo"
    expected = checked(data, memo=memo)
    (path,) = memo.iterdir()
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    assert checked(data, memo=memo) == expected


@pytest.mark.fault("D21")
@pytest.mark.parametrize("how", ["written", "moved in"])
def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path: Path, how: str) -> None:
    data, memo = save_tree(tmp_path / "data", train=1, val=1), tmp_path / "memo"
    path = data / "train" / "A" / "train_0.bmp"
    path.with_suffix(".png").unlink()
    save(path, picture(5))
    first, before = checked(data, memo=memo), path.stat()
    other = save(tmp_path / "other.bmp", picture(6))
    if how == "written":
        path.write_bytes(other.read_bytes())
    else:
        other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = checked(data, memo=memo)
    assert again.fingerprint != first.fingerprint
    assert again == checked(data)


def test_the_memo_does_not_grow_for_ever(tmp_path: Path) -> None:
    memo, data = tmp_path / "memo", save_tree(tmp_path / "a", train=2, val=1)
    checked(data, memo=memo)
    assert len(content_of(memo)) == 9
    for seed in range(3):  # another state of a file takes the place of the one before
        save(data / "val" / "B" / "val_0.png", picture(7 + seed))
        checked(data, memo=memo)
    assert len(content_of(memo)) == 9
    for crop_size in range(10, 60, 10):  # each counts other patches
        checked(data, memo=memo, crop_size=crop_size)
    assert {len(kinds) for kinds in content_of(memo).values()} == {1, MAX_KINDS}
    for folder in ("A", "B", "label"):
        (data / "train" / folder / "train_1.png").unlink()
    save(data / "val" / "B" / "val_0.png", picture(1))
    checked(data, memo=memo)
    assert len(content_of(memo)) == 6


def test_each_dataset_has_a_memo_until_nobody_uses_it(tmp_path: Path) -> None:
    memo = tmp_path / "memo"
    first, second = (save_tree(tmp_path / name, train=1, val=1) for name in "ab")
    for root in (first, second):
        checked(root, memo=memo)
    old, _ = sorted(memo.iterdir(), key=lambda path: path.stat().st_mtime)
    os.utime(old, (1, 1))
    checked(save_tree(tmp_path / "c", train=1, val=1), memo=memo)
    assert not old.exists() and len(list(memo.iterdir())) == 2


@pytest.mark.fault("D15")
def test_a_memo_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    data = save_tree(tmp_path / "data", train=1, val=1)
    (tmp_path / "file").write_text("")
    assert checked(data, memo=tmp_path / "file" / "memo") == checked(data)


def test_faults_are_not_remembered(tmp_path: Path) -> None:
    data, memo = save_tree(tmp_path / "data", train=1, val=1), tmp_path / "memo"
    path = data / "train" / "A" / "train_0.png"
    good = path.read_bytes()
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="train_0"):
            checked(data, memo=memo)
    path.write_bytes(good)
    assert checked(data, memo=memo) == checked(data)


def test_mixed_sizes(tmp_path: Path) -> None:
    save_tree(tmp_path, train=1, val=1)
    save_pair(tmp_path / "train", "wide", 7, (17, 33))
    summary = checked(tmp_path)
    assert summary.splits["train"].sizes == ((17, 33), (32, 32))
    assert summary.splits["train"].patches == 4 + 2 * 3


def test_labels_of_both_dates_are_counted_and_compared(tmp_path: Path) -> None:
    before, after = mask_of(value=3), mask_of(value=5)
    for split in ("train", "val"):
        for folder, pixels in (
            ("im1", picture(0)), ("im2", picture(1 + len(split))), ("label1", before),
            ("label2", after),
        ):  # fmt: skip
            save(tmp_path / split / folder / f"{split}.png", pixels)
    save(tmp_path / "val" / "im1" / "val.png", picture(7))

    def summary() -> DataSummary:
        classes = Classes(6, "semantic")
        return check(find_pairs(tmp_path, "semantic"), classes, crop_size=16)

    train = summary().splits["train"]
    assert summary().warnings == ()
    assert train.class_pixels == (2 * 768, 0, 0, 256, 0, 256, 0)
    assert (train.pairs, train.patches, train.empty_patches) == (1, 4, 3)
    after[0, 0] = 0
    save(tmp_path / "train" / "label2" / "train.png", after)
    (warning,) = summary().warnings
    assert "1 pairs have labels that disagree" in warning and "train.png" in warning
    save(tmp_path / "train" / "label2" / "train.png", after[:20])
    with pytest.raises(UserError, match="label2.*32 x 20, but its label"):
        summary()
