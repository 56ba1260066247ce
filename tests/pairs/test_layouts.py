"""Every layout that a user may have on disk, and what is said of a broken one."""

import contextlib
import os
import shutil
import socket
import unicodedata
from pathlib import Path

import pytest
from data_helpers import mask_of, picture, save, save_pair, save_tree
from PIL import Image

from pairs.labels import choose_classes
from pairs.layouts import DATES, find_pairs
from pairs.splits import scene_of
from runtime.errors import UserError


def names(root: Path) -> dict[str, list[str]]:
    return {split: [p.name for p in pairs] for split, pairs in find_pairs(root).splits.items()}


def flat(root: Path, *stems: str) -> Path:
    for seed, stem in enumerate(stems):
        save_pair(root, stem, seed, (4, 4))
    return root


def write_lists(root: Path, **texts: str) -> Path:
    (root / "list").mkdir(exist_ok=True)
    for split, text in texts.items():
        (root / "list" / f"{split}.txt").write_bytes(text.encode())
    return root


def test_split_folders(tmp_path: Path) -> None:
    layout = find_pairs(save_tree(tmp_path, train=2, val=1, test=1))
    assert list(layout.splits) == ["train", "val", "test"]
    first = layout.splits["train"][0]
    assert first.name == "train_0"
    assert [p.parent.name for p in (first.before, first.after, first.label)] == ["A", "B", "label"]


@pytest.mark.parametrize("valid", ["valid", "validation", "Val"])
def test_other_names_of_val(tmp_path: Path, valid: str) -> None:
    save_tree(tmp_path, (32, 32), train=1)
    save_pair(tmp_path / valid, f"{valid}_0", 9)
    assert names(tmp_path) == {"train": ["train_0"], "val": [f"{valid}_0"]}


@pytest.mark.parametrize("number", range(6))
def test_folder_aliases_in_any_case(tmp_path: Path, number: int) -> None:
    save_tree(tmp_path, train=1, val=1)
    for split in ("train", "val"):
        for standard, aliases in zip(("A", "B", "label"), DATES.values(), strict=True):
            alias = aliases[number % len(aliases)].upper()
            (tmp_path / split / standard).rename(tmp_path / split / f"{alias}_")
            (tmp_path / split / f"{alias}_").rename(tmp_path / split / alias)
    assert names(tmp_path) == {"train": ["train_0"], "val": ["val_0"]}


@pytest.mark.parametrize("inner", ["LEVIR-CD", "Real/subset"])
def test_one_or_two_folders_deeper_beside_others(tmp_path: Path, inner: str) -> None:
    save_tree(tmp_path / inner, train=1, val=1)
    (tmp_path / "__MACOSX" / "train").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    assert find_pairs(tmp_path).root == tmp_path / inner


def test_two_datasets_in_one_folder_are_not_guessed(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_tree(tmp_path / name, train=1, val=1)
    with pytest.raises(UserError, match=r"several datasets, .*first, .*second"):
        find_pairs(tmp_path)
    (tmp_path / "second" / "sample.json").write_text("{}")  # a generated set gives way
    assert find_pairs(tmp_path).root == tmp_path / "first"


@pytest.mark.fault("D12")
def test_flat_with_lists(tmp_path: Path) -> None:  # D12: CRLF, blank lines, second column, BOM
    flat(tmp_path, "a 1", "b", "c", "unlisted")
    write_lists(tmp_path, train="\ufeffa 1.png\r\n\r\nb.png label/b.png\r\n", val="c\n")
    assert names(tmp_path) == {"train": ["a 1", "b"], "val": ["c"]}


@pytest.mark.fault("D12")
@pytest.mark.parametrize("line", ["../secret.png", "/etc/passwd.png", "..", "A\\a.png", "x/../a"])
def test_a_list_does_not_lead_out_of_the_folder(tmp_path: Path, line: str) -> None:
    write_lists(flat(tmp_path, "a", "b"), train=f"a\n{line}\n", val="b\n")
    with pytest.raises(UserError, match=r"train\.txt.*is a path"):
        find_pairs(tmp_path)


@pytest.mark.fault("D12")
def test_names_that_are_not_there_are_all_named(tmp_path: Path) -> None:
    write_lists(flat(tmp_path, "a", "b"), train="a\ngone.png\nlost\n", val="b\n")
    with pytest.raises(UserError) as error:
        find_pairs(tmp_path)
    assert "gone" in str(error.value)
    assert "lost" in str(error.value)
    assert "A/a" not in str(error.value)


def test_flat_with_prefixes(tmp_path: Path) -> None:
    flat(tmp_path, "train_1", "train_10", "val_3", "test_7")
    expected = {"train": ["train_1", "train_10"], "val": ["val_3"], "test": ["test_7"]}
    assert names(tmp_path) == expected


def test_val_is_split_off_by_scene_and_always_alike(tmp_path: Path) -> None:
    stems = [f"city_{n}_{y:04}_{x:04}" for n in range(10) for y in (0, 256) for x in (0, 256)]
    found = names(flat(tmp_path, *stems))
    scenes = {split: {scene_of(name) for name in group} for split, group in found.items()}
    assert not scenes["train"] & scenes["val"]
    assert (len(scenes["val"]), len(found["val"])) == (2, 8)
    assert sorted(found["train"] + found["val"]) == sorted(stems)
    assert names(tmp_path) == found


def test_split_folders_without_val(tmp_path: Path) -> None:
    found = names(save_tree(tmp_path, train=5, test=2))
    assert [len(group) for group in found.values()] == [4, 1, 2]
    assert "train" in find_pairs(tmp_path).description


def test_a_single_scene_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="single scene"):
        find_pairs(flat(tmp_path, "a_0000_0000", "a_0000_0256"))


@pytest.mark.parametrize(
    ("name", "scene"),
    [
        ("train_412_0512_0768", "train_412"),
        ("a_12_256_512", "a_12"),
        ("a_0256_0512", "a"),
        ("train_1_1", "train_1"),
        ("train_12_15", "train_12"),
        ("train_12", "train_12"),
        ("synthetic_00012", "synthetic_00012"),
        ("plain", "plain"),
        ("12", "12"),
    ],
)
def test_scene_of_a_crop(name: str, scene: str) -> None:
    assert scene_of(name) == scene


@pytest.mark.fault("D8")
def test_odd_but_harmless_files(tmp_path: Path) -> None:
    save_tree(tmp_path, train=1, val=1)
    train = tmp_path / "train"
    for junk in ("._train_0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        for folder in ("A", "label"):
            (train / folder / junk).write_bytes(b"junk")
    odd = "größe 1"
    save(train / "A" / f"{odd}.JPG", picture(1))
    save(train / "B" / f"{odd}.tif", picture(2))
    save(tmp_path / "elsewhere.bmp", mask_of())
    (train / "label" / f"{odd}.BMP").symlink_to(tmp_path / "elsewhere.bmp")
    assert names(tmp_path)["train"] == sorted([odd, "train_0"])


@pytest.mark.fault("D8")
def test_names_written_on_another_system(tmp_path: Path) -> None:
    save_tree(tmp_path, train=1, val=1)
    composed = unicodedata.normalize("NFC", "größe")
    for folder, name in (("A", composed), ("B", unicodedata.normalize("NFD", composed))):
        save(tmp_path / "train" / folder / f"{name}.png", mask_of())
    save(tmp_path / "train" / "label" / f"{composed}.png", mask_of())
    assert len(names(tmp_path)["train"]) == 2


@pytest.mark.fault("D8")
def test_the_same_stem_twice(tmp_path: Path) -> None:
    save_tree(tmp_path, train=1, val=1)
    save(tmp_path / "train" / "A" / "train_0.tif", picture(3))
    with pytest.raises(UserError, match=r"train_0\.png and train_0\.tif"):
        find_pairs(tmp_path)


@pytest.mark.fault("D1")
def test_all_missing_partners_are_listed(tmp_path: Path) -> None:
    train = save_tree(tmp_path, train=40, val=1) / "train"
    for index in range(4):
        (train / "A" / f"train_{index}.png").unlink()
    (train / "label" / "train_7.png").unlink()
    with pytest.raises(UserError) as error:
        find_pairs(tmp_path)
    lines = str(error.value).splitlines()
    assert "5 files" in lines[0]
    assert len(lines) == 6
    assert any("label" in line and "train_7" in line for line in lines)
    for path in (train / "B").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"and \d+ more") as error:
        find_pairs(tmp_path)
    assert len(str(error.value).splitlines()) < 25


@pytest.mark.fault("D7")
@pytest.mark.parametrize(
    "spoil",
    ["no root", "root is a file", "no label", "empty val", "A is a file", "train is a file",
     "nothing there", "test only"],
)  # fmt: skip
def test_the_expected_tree_is_shown(tmp_path: Path, spoil: str) -> None:
    root = save_tree(tmp_path / "data", train=1, val=1)
    if spoil == "no root":
        root = tmp_path / "other"
    elif spoil == "root is a file":
        root = save(tmp_path / "x.png", mask_of())
    elif spoil == "no label":
        shutil.rmtree(root / "train" / "label")
    elif spoil == "empty val":
        for folder in ("A", "B", "label"):
            (root / "val" / folder / "val_0.png").unlink()
    elif spoil in ("A is a file", "train is a file"):
        path = root / "train" / "A" if spoil[0] == "A" else root / "train"
        shutil.rmtree(path)
        path.write_text("")
    elif spoil == "nothing there":
        root = tmp_path / "empty"
        root.mkdir()
    else:
        shutil.rmtree(root / "val")
        (root / "train").rename(root / "test")
    with pytest.raises(UserError, match="expected DIR/train/A") as error:
        find_pairs(root)
    assert str(root) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.fault("D12")
def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    write_lists(flat(tmp_path, "a", "b"), train="a", val="b")
    Image.new("L", (4, 4)).save(tmp_path / "list" / "x.png")
    (tmp_path / "list" / "x.png").rename(tmp_path / "list" / "train.txt")
    with pytest.raises(UserError, match=r"train\.txt: is not a text file"):
        find_pairs(tmp_path)


def semantic_tree(root: Path, *folders: str) -> Path:
    for folder in folders or ("im1", "im2", "label1", "label2"):
        for split in ("train", "val"):
            save(root / split / folder / "00001.png", mask_of())
    return root


def test_second_has_labels_of_both_dates(tmp_path: Path) -> None:
    (pair,) = find_pairs(semantic_tree(tmp_path), "semantic").splits["train"]
    assert [path.parent.name for path in pair.files] == ["im1", "im2", "label1", "label2"]
    assert [path.parent.name for path in pair.labels] == ["label1", "label2"]
    assert pair.name == "00001"


def test_the_other_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--task semantic"):
        find_pairs(semantic_tree(tmp_path / "second"))
    with pytest.raises(UserError, match="--task change"):
        find_pairs(save_tree(tmp_path / "levir", train=1, val=1), "semantic")


def test_a_missing_label_of_one_date_is_listed(tmp_path: Path) -> None:
    root = semantic_tree(tmp_path)
    (root / "val" / "label2" / "00001.png").unlink()
    with pytest.raises(UserError, match=r"label2.00001\.\*: missing"):
        find_pairs(root, "semantic")


@pytest.mark.fault("D19")
def test_what_is_passed_over_is_counted_and_named_once(tmp_path: Path) -> None:
    train = save_tree(tmp_path, train=5, val=1) / "train"
    for name in ("train_5.jp2", "train_6.npy"):
        for folder in ("A", "B", "label"):
            (train / folder / name).write_bytes(b"what nobody reads")
    save(train / "A" / "more" / "train_9.png", picture(1))
    save(train / "edges" / "train_0.png", mask_of())
    (tmp_path / "README.txt").write_text("harmless")
    (train / "A" / ".DS_Store").write_bytes(b"")
    layout = find_pairs(tmp_path)
    assert len(layout.splits["train"]) == 5
    (note,) = layout.notes
    assert note.startswith("8 files or folders are passed over (")
    assert "edges" in note and ".png" in note
    assert find_pairs(save_tree(tmp_path / "clean", train=1, val=1)).notes == ()


def irregular(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        # the path of a socket may have a hundred letters
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
            server.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(path.with_name("nowhere"))


@pytest.mark.fault("D20")
@pytest.mark.skipif(os.name == "nt", reason="no such files there")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pipe", "is a named pipe, not a file"),
        ("socket", "is a socket, not a file"),
        ("device", "is a device, not a file"),
        ("loop", "is a link that leads to itself"),
        ("dangling", "is gone"),
    ],
)
def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path, kind: str, said: str) -> None:
    save_tree(tmp_path, train=2, val=1)
    irregular(tmp_path / "train" / "B" / "train_1.png", kind)
    with pytest.raises(UserError, match=rf"train_1\.png: {said}"):
        find_pairs(tmp_path)
    irregular(tmp_path / "classes.json", kind)
    with pytest.raises(UserError, match=rf"classes\.json: {said}"):
        choose_classes(tmp_path)


@pytest.mark.parametrize("splits", [("test",), ("val",), ("val", "test"), ("train", "test")])
def test_one_split_is_enough_for_who_wants_one(tmp_path: Path, splits: tuple[str, ...]) -> None:
    save_tree(tmp_path, (32, 32), **dict.fromkeys(splits, 3))
    for split in splits:
        layout = find_pairs(tmp_path, wanted=(split,))
        assert len(layout.splits[split]) == (
            2 if splits == ("train", "test") == (split, "test") else 3
        )
        assert layout.trained_as is None
    if "train" not in splits:
        with pytest.raises(UserError, match="the train split holds no pair"):
            find_pairs(tmp_path)
    if "test" not in splits:
        with pytest.raises(UserError, match="has no test split, only val"):
            find_pairs(tmp_path, wanted=("test",))


def test_pairs_without_splits_are_all_what_is_wanted(tmp_path: Path) -> None:
    flat(tmp_path, *(f"train_{number}" for number in range(5)))
    layout = find_pairs(tmp_path, wanted=("test",))
    assert {name: len(pairs) for name, pairs in layout.splits.items()} == {"test": 5}
    assert layout.trained_as == find_pairs(tmp_path).splits
    assert names(tmp_path).keys() == {"train", "val"}
    assert find_pairs(tmp_path, wanted=("val",)).splits == find_pairs(tmp_path).splits


@pytest.mark.parametrize(
    "words", [("A=2018", "B=2020", "label=masks"), ("before=2018", "after=2020", "label=masks")]
)
def test_folders_by_name(tmp_path: Path, words: tuple[str, ...]) -> None:
    save_tree(tmp_path, train=2, val=1)
    for split in ("train", "val"):
        for old, new in (("A", "2018"), ("B", "2020"), ("label", "Masks")):
            (tmp_path / split / old).rename(tmp_path / split / new)
    with pytest.raises(UserError, match="--folders A="):
        find_pairs(tmp_path)
    (pair,) = find_pairs(tmp_path, folders=words).splits["val"]
    assert [path.parent.name for path in pair.files] == ["2018", "2020", "Masks"]
    # the usual names are still known
    save_tree(tmp_path / "other", train=1, val=1)
    assert find_pairs(tmp_path / "other", folders=words).splits["val"]


@pytest.mark.parametrize("word", ["C=x", "A", "A=", "A=../x", "A=/x", "label2=x"])
def test_folders_that_make_no_sense(tmp_path: Path, word: str) -> None:
    save_tree(tmp_path, train=1, val=1)
    with pytest.raises(UserError, match="--folders .*: give folders such as A=2018,B=2020"):
        find_pairs(tmp_path, folders=[word])


MARKED = {
    "prefixes": ("pre_{}", "post_{}", "mask_{}"),
    "suffixes": ("{}_A", "{}_B", "{}_label"),
    "dates": ("{}_t1", "{}_t2", "{}"),
}


@pytest.mark.parametrize("forms", MARKED.values(), ids=MARKED)
def test_names_that_say_their_date(tmp_path: Path, forms: tuple[str, str, str]) -> None:
    for split in ("train", "val"):
        for number, (folder, form) in enumerate(zip(("A", "B", "label"), forms, strict=True)):
            for index in range(3):
                pixels = picture(number + index) if number < 2 else mask_of()
                save(tmp_path / split / folder / f"{form.format(f'tile_{index}')}.png", pixels)
    pairs = find_pairs(tmp_path).splits["train"]
    assert [pair.name for pair in pairs] == ["tile_0", "tile_1", "tile_2"]
    assert all([pair.before.stem, pair.after.stem, pair.label.stem]
               == [form.format(pair.name) for form in forms] for pair in pairs)  # fmt: skip
    (tmp_path / "train" / "B" / f"{forms[1].format('tile_1')}.png").unlink()
    with pytest.raises(UserError, match=r"1 file .*\n.*tile_1\.\*: missing"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("deeper", [False, True])
def test_names_that_say_their_date_in_one_folder(tmp_path: Path, deeper: bool) -> None:
    for index in range(5):
        for form in ("{}_A", "{}_B", "{}_mask"):
            folder = tmp_path / "train" if deeper else tmp_path
            save(folder / f"{form.format(f'tile{index}')}.png", mask_of())
    found = find_pairs(tmp_path)
    assert sum(map(len, found.splits.values())) == 5
    pair = found.splits["train"][0]
    assert [path.stem for path in pair.files] == [f"{pair.name}_{m}" for m in ("A", "B", "mask")]


def test_pairs_that_lack_a_file_are_left_out(tmp_path: Path) -> None:
    save_tree(tmp_path, train=4, val=1)
    (tmp_path / "train" / "B" / "train_2.png").unlink()
    layout = find_pairs(tmp_path, skip_broken=True)
    assert [pair.name for pair in layout.splits["train"]] == ["train_0", "train_1", "train_3"]
    assert len(layout.skipped) == 1 and "train_2.*: missing" in layout.skipped[0]


@pytest.mark.parametrize(
    ("task", "wanted"), [("change", "sample"), ("semantic", "sample-semantic")]
)
def test_of_several_sample_sets_the_one_that_fits(tmp_path: Path, task: str, wanted: str) -> None:
    save_tree(tmp_path / "sample", train=1, val=1)
    save_tree(tmp_path / "sample-3-classes", train=1, val=1)
    semantic_tree(tmp_path / "sample-semantic")
    for folder in tmp_path.iterdir():
        (folder / "sample.json").write_text("{}")
    (tmp_path / "cache").mkdir()
    assert find_pairs(tmp_path, task).root == tmp_path / wanted
