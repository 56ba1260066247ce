import shutil
from pathlib import Path

import pytest

from errors import UserError
from layouts import find_pairs, scene_of
from scenes import write_pair, write_tree


def names(root: Path) -> dict[str, list[str]]:
    return {split: [p.name for p in pairs] for split, pairs in find_pairs(root).splits.items()}


@pytest.mark.parametrize(
    "folders",
    [
        ("A", "B", "label"),
        ("Image1", "Image2", "label"),
        ("time1", "time2", "label"),
        ("im1", "im2", "GT"),
        ("t1", "t2", "mask"),
        ("A", "B", "OUT"),
    ],
)
def test_split_folders_of_the_sister_sets(folders: tuple[str, str, str], tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("x_2", "x_1"):
            write_pair(tmp_path / split, name, names=folders)
    layout = find_pairs(tmp_path)
    assert names(tmp_path) == {split: ["x_1", "x_2"] for split in ("train", "val", "test")}
    pair = layout.splits["val"][0]
    assert pair.before == tmp_path / "val" / folders[0] / "x_1.png"
    assert pair.after == tmp_path / "val" / folders[1] / "x_1.png"
    assert pair.label == tmp_path / "val" / folders[2] / "x_1.png"


def test_lists_with_crlf_blank_lines_columns_and_no_endings(tmp_path: Path) -> None:
    for i in range(4):
        write_pair(tmp_path, f"s {i}")
    write_pair(tmp_path, "plain")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_bytes(b"s 0.png\r\n\r\ns 1.png s 1.png\r\n")
    (tmp_path / "list" / "val.txt").write_text("s 2.png\nplain\n")
    assert names(tmp_path) == {"train": ["s 0", "s 1"], "val": ["plain", "s 2"]}


@pytest.mark.parametrize("line", ["../outside.png", "/etc/passwd.png", "a\\b.png", ".."])
def test_d12_a_list_cannot_leave_the_folder(line: str, tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text(f"a.png\n{line}\n")
    with pytest.raises(UserError, match=r"train\.txt: .* is a path"):
        find_pairs(tmp_path)


def test_d12_names_that_are_not_there_are_all_listed(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text("a.png\nb.png\nc.png\n")
    with pytest.raises(UserError, match=r"6 files of pairs are missing(.|\n)*A/b(.|\n)*label/c"):
        find_pairs(tmp_path)


def test_names_with_a_prefix_are_split_by_it(tmp_path: Path) -> None:
    for name in ("train_1", "train_2", "val_1", "test_7"):
        write_pair(tmp_path, name)
    assert names(tmp_path) == {
        "train": ["train_1", "train_2"],
        "val": ["val_1"],
        "test": ["test_7"],
    }


def test_without_val_whole_scenes_are_held_out_always_the_same(tmp_path: Path) -> None:
    for scene in range(6):
        for crop in range(3):
            write_pair(tmp_path / "train", f"town_{scene}_{crop:04}_0256")
    found = names(tmp_path)
    assert found == names(tmp_path)
    assert sorted(found["train"] + found["val"]) == sorted(
        p.stem for p in (tmp_path / "train" / "A").iterdir()
    )
    scenes = {split: {scene_of(n) for n in found[split]} for split in found}
    assert len(scenes["val"]) == 1 and not scenes["train"] & scenes["val"]


def test_scene_of_a_crop() -> None:
    assert scene_of("train_36_0512_0512") == "train_36"
    assert scene_of("train_36") == "train_36"
    assert scene_of("a-256-0") == "a-256-0"


@pytest.mark.parametrize("deeper", ["LEVIR-CD", "Real/subset"])
def test_a_lone_folder_is_entered(deeper: str, tmp_path: Path) -> None:
    write_tree(tmp_path / deeper)
    assert find_pairs(tmp_path).root == tmp_path / deeper


def test_d1_every_missing_partner_is_listed(tmp_path: Path) -> None:
    write_tree(tmp_path, num=30)
    for i in range(12):
        (tmp_path / "train" / "B" / f"train_{i}.png").unlink()
    (tmp_path / "train" / "label" / "train_20.png").unlink()
    with pytest.raises(UserError) as error:
        find_pairs(tmp_path)
    assert "13 files of pairs are missing" in str(error.value)
    assert str(error.value).count("missing\n") + str(error.value).endswith("missing") == 13


def test_d8_strange_names_work_and_system_files_are_passed_over(tmp_path: Path) -> None:
    write_tree(tmp_path)
    for name in ("höhe 高さ", "with space"):
        write_pair(tmp_path / "train", name)
    for part in ("A", "B", "label"):
        folder = tmp_path / "train" / part
        (folder / "with space.png").rename(folder / "with space.PNG")
        for junk in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
            (folder / junk).write_bytes(b"junk")
    (tmp_path / ".cache").mkdir()
    target = tmp_path / "elsewhere.png"
    (tmp_path / "train" / "A" / "train_0.png").rename(target)
    (tmp_path / "train" / "A" / "train_0.png").symlink_to(target)
    expected = {"höhe 高さ", "train_0", "train_1", "train_2", "with space"}
    assert set(names(tmp_path)["train"]) == expected


def test_d8_two_files_of_one_stem_are_an_error(tmp_path: Path) -> None:
    write_tree(tmp_path)
    shutil.copy(tmp_path / "val" / "A" / "val_0.png", tmp_path / "val" / "A" / "val_0.tif")
    with pytest.raises(UserError, match=r"val_0\.png and val_0\.tif have the same stem"):
        find_pairs(tmp_path)


def test_files_of_a_pair_may_have_other_endings(tmp_path: Path) -> None:
    write_tree(tmp_path)
    label = tmp_path / "val" / "label" / "val_0.png"
    label.rename(label.with_suffix(".tiff"))
    assert find_pairs(tmp_path).splits["val"][0].label.suffix == ".tiff"


def test_d7_wrong_places_show_the_expected_tree(tmp_path: Path) -> None:
    def refused(root: Path, says: str) -> None:
        with pytest.raises(UserError, match=f"{says}.*expected DIR/train/A"):
            find_pairs(root)

    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file, not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no dataset is recognised")
    root = write_tree(tmp_path / "nolabel")
    shutil.rmtree(root / "train" / "label")
    refused(root, r"has no folder for label \(label, labels")
    (root / "train" / "label").write_text("")
    refused(root, "is a file, not a folder")
    root = write_tree(tmp_path / "novalpairs")
    for part in ("A", "B", "label"):
        shutil.rmtree(root / "val" / part)
        (root / "val" / part).mkdir()
    refused(root, "the val split holds no pair")
    refused(write_tree(tmp_path / "testonly", splits=["val"]), "the train split holds no pair")


def test_a_single_scene_cannot_be_split(tmp_path: Path) -> None:
    write_pair(tmp_path, "only")
    with pytest.raises(UserError, match="a single scene"):
        find_pairs(tmp_path)
