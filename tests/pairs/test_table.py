"""A table of pairs fits any tree, and says in which line it is wrong."""

from pathlib import Path

import pytest
from data_helpers import mask_of, picture, save

from pairs.layouts import find_pairs
from pairs.splits import Layout
from runtime.errors import UserError

CITIES = ("abudhabi", "aguasclaras", "beihai")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One folder a city, with files of the same names."""
    for number, city in enumerate(CITIES):
        save(tmp_path / city / "imgs_1" / "rgb.png", picture(2 * number))
        save(tmp_path / city / "imgs_2" / "rgb.tif", picture(2 * number + 1))
        save(tmp_path / "masks" / f"{city}.png", mask_of())
    return tmp_path


def table(tree: Path, text: str, encoding: str = "utf-8") -> Layout:
    path = tree / "pairs.csv"
    path.write_text(text, encoding=encoding)
    return find_pairs(None, table=path)


def row(city: str, split: str = "train", mark: str = ",") -> str:
    words = (split, f"{city}/imgs_1/rgb.png", f"{city}/imgs_2/rgb.tif", f"masks/{city}.png")
    return mark.join(words) + "\n"


HEAD = "split,before,after,label\n"


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_any_tree(tree: Path, mark: str, encoding: str) -> None:
    rows = [row("abudhabi", mark=mark), "\n", row("beihai", "VAL", mark).replace("\n", "\r\n")]
    layout = table(tree, HEAD.replace(",", mark) + "".join(rows), encoding)
    assert {name: len(pairs) for name, pairs in layout.splits.items()} == {"train": 1, "val": 1}
    (pair,) = layout.splits["val"]
    assert pair.files == tuple(
        tree / name
        for name in ("beihai/imgs_1/rgb.png", "beihai/imgs_2/rgb.tif", "masks/beihai.png")
    )
    assert pair.name == "beihai_imgs_1_rgb"  # the stems are alike
    assert layout.root == tree and "pairs.csv" in layout.description


def test_without_splits_val_is_taken_by_scene(tree: Path) -> None:
    layout = table(tree, "after,label,before,name\n" + "".join(
        f"{c}/imgs_2/rgb.tif,masks/{c}.png,{c}/imgs_1/rgb.png,{c}\n" for c in CITIES
    ))  # fmt: skip
    assert {name: len(pairs) for name, pairs in layout.splits.items()} == {"train": 2, "val": 1}
    assert {p.name for split in layout.splits.values() for p in split} == set(CITIES)
    only = find_pairs(None, table=tree / "pairs.csv", wanted=("test",))
    assert len(only.splits["test"]) == 3


def test_paths_from_another_folder(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("elsewhere") / "pairs.csv"
    path.write_text(HEAD + row("abudhabi") + row("beihai", "val"))
    with pytest.raises(UserError, match="missing: 6 files of pairs"):
        find_pairs(None, table=path)
    assert find_pairs(tree, table=path).root == tree
    path.write_text(
        HEAD + row(f"{tree}/abudhabi".lstrip()).replace("masks/", "") + row("beihai", "val")
    )
    with pytest.raises(UserError, match=r"line 2: .* is missing"):
        find_pairs(tree, table=path)


def test_two_labels(tree: Path) -> None:
    text = "split,before,after,label,label_after\n"
    for split, city in (("train", "abudhabi"), ("val", "beihai")):
        text += row(city, split).strip() + ",masks/aguasclaras.png\n"
    (tree / "pairs.csv").write_text(text)
    (pair,) = find_pairs(None, "semantic", table=tree / "pairs.csv").splits["val"]
    assert [path.stem for path in pair.labels] == ["beihai", "aguasclaras"]
    with pytest.raises(UserError, match="has no column label_after"):
        (tree / "pairs.csv").write_text(HEAD + row("beihai"))
        find_pairs(None, "semantic", table=tree / "pairs.csv")


@pytest.mark.fault("D12")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column before, after, label"),
        ("before,after\n", "has no column label"),
        (HEAD, "names no pair"),
        (HEAD + row("abudhabi", "trian"), "line 2: 'trian' is no split"),
        (HEAD + row("abudhabi") + row("beihai", ""), "some rows have no split"),
        (HEAD + row("abudhabi").strip() + ",more\n", "line 2: has more columns"),
        (HEAD + "train,abudhabi/imgs_1/rgb.png,,masks/abudhabi.png\n", "line 2: lacks a path"),
        (HEAD + row("abudhabi") + row("abudhabi"), "twice in train"),
        (HEAD + row("atlantis"), r"missing: 3 files of pairs"),
        (HEAD + row("../abudhabi"), r"line 2: '\.\./abudhabi.* leads out of"),
        (HEAD + "train,/etc/passwd,/etc/passwd,/etc/passwd\n", "line 2: '/etc/passwd' leads out"),
        (HEAD + '"train,x', "is no CSV"),
    ],
)
def test_what_is_wrong_is_said(tree: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        table(tree, text)


def test_a_table_that_cannot_be_read(tree: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        find_pairs(None, table=tree / "nowhere.csv")
    save(tree / "image.png", picture(1))
    with pytest.raises(UserError, match="no text in UTF-8"):
        find_pairs(None, table=tree / "image.png")


def test_rows_without_files_are_left_out(tree: Path) -> None:
    (tree / "pairs.csv").write_text(HEAD + row("abudhabi") + row("atlantis") + row("beihai", "val"))
    layout = find_pairs(None, table=tree / "pairs.csv", skip_broken=True)
    assert len(layout.splits["train"]) == 1
    assert len(layout.skipped) == 3 and "line 3" in layout.skipped[0]
