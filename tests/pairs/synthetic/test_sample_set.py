"""The embedded data set: the same everywhere, honest masks, and never a foreign file touched."""

import json
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import open_dataset
from pairs.labels import choose_classes
from pairs.synthetic import sample_set as sample_data
from pairs.synthetic.sample_set import MARKER, SPLITS, make_pair, make_sample_set
from runtime.errors import UserError

FEW = {"train": 2, "val": 1, "test": 1}
PINNED = "2d296436583a961019977b5142aaf135d59bce994aeb8db9b0e790a7db6b4ef3"


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, ...]]:
    return [make_pair(0, "train", index) for index in range(24)]


def test_pixels_are_the_same_on_every_machine() -> None:
    pairs = [make_pair(0, "train", index, size=64, kind="3-classes") for index in range(6)]
    pixels = b"".join(array.tobytes() for pair in pairs for array in pair)
    # Another hash after a change to the drawing is fine: pin it anew and raise VERSION.
    assert sha256(pixels).hexdigest() == PINNED


def test_a_pair_depends_on_its_key_and_on_nothing_else() -> None:
    first = make_pair(7, "val", 1, size=48)
    for array, again in zip(first, make_pair(7, "val", 1, size=48), strict=True):
        assert np.array_equal(array, again)
    for other in ((8, "val", 1), (7, "train", 1), (7, "val", 2)):
        assert not np.array_equal(first[0], make_pair(*other, size=48)[0])


@pytest.mark.parametrize("size", [16, 48, 100])
@pytest.mark.parametrize("kind", ["change", "3-classes"])
def test_shapes_and_values(size: int, kind: str) -> None:
    for split in SPLITS:
        before, after, mask = make_pair(1, split, 0, size=size, kind=kind)
        assert before.shape == after.shape == (size, size, 3)
        assert mask.shape == (size, size)
        assert before.dtype == after.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) <= ({0, 255} if kind == "change" else {0, 128, 255})


def test_three_classes_add_roads_and_leave_buildings_alone() -> None:
    values: set[int] = set()
    for index in range(8):
        before, after, mask = make_pair(0, "train", index, size=128, kind="3-classes")
        binary = make_pair(0, "train", index, size=128)
        assert np.array_equal(before, binary[0])
        assert np.array_equal(after, binary[1])
        assert np.array_equal(mask == 255, binary[2] == 255)
        values |= set(np.unique(mask).tolist())
    assert values == {0, 128, 255}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kind is 'roads'"):
        make_pair(0, "train", 0, kind="roads")
    with pytest.raises(ValueError, match="split is 'trian'"):
        make_pair(0, "trian", 0)
    with pytest.raises(ValueError, match="size is 8"):
        make_pair(0, "train", 0, size=8)


def test_share_of_change(pairs: list) -> None:
    shares = np.array([(mask > 0).mean() for _, _, mask in pairs])
    assert 0.06 < shares.mean() < 0.15
    assert 0.04 < (shares == 0).mean() < 0.5
    assert shares.max() < 0.4


def test_masks_lie_where_the_pictures_differ(pairs: list) -> None:
    inside, outside = [], []
    for before, after, mask in pairs:
        if mask.any():
            a, b = (x.astype(float).mean(axis=2) for x in (before, after))
            a, b = ((x - x[mask == 0].mean()) / x[mask == 0].std() for x in (a, b))  # other light
            edges = [np.abs(np.diff(x, axis=0, prepend=x[:1])) for x in (a, b)]
            difference = np.abs(a - b) + np.abs(edges[0] - edges[1])
            inside.append(difference[mask > 0].mean())
            outside.append(difference[mask == 0].mean())
    assert len(inside) >= 8
    assert np.mean(inside) > 1.25 * np.mean(outside)


def test_dates_differ_where_nothing_changed_too(pairs: list) -> None:
    calm = [(before, after) for before, after, mask in pairs if not mask.any()]
    assert calm
    for before, after in calm:
        assert np.abs(before.astype(int) - after).mean() > 3


def test_pictures_have_the_tones_of_photographs(pairs: list) -> None:
    pictures = np.stack([picture for pair in pairs for picture in pair[:2]]).astype(float)
    assert 60 < pictures.mean() < 130
    assert (pictures.std(axis=(1, 2, 3)) > 10).all()
    assert (pictures == 255).mean() < 0.05
    assert (pictures == 0).mean() < 0.05


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_set_is_the_pairs_and_a_marker(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    root = make_sample_set(
        tmp_path / "a" / "set",
        seed=5,
        num_pairs=FEW,
        size=32,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert root == tmp_path / "a" / "set"
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(files_of(root)) == 3 * 4 + 1
    digest = sha256()
    for split, count in FEW.items():
        for index in range(count):
            expected = make_pair(5, split, index, size=32)
            for kind, pixels in zip(("A", "B", "label"), expected, strict=True):
                path = sorted((root / split / kind).iterdir())[index]
                with Image.open(path) as image:
                    assert np.array_equal(np.asarray(image), pixels)
                digest.update(pixels.tobytes())
    marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    assert marker["sha256"] == digest.hexdigest()
    assert "Synthetic" in marker["note"]
    assert [path.name for path in root.parent.iterdir()] == ["set"]


def test_a_complete_set_is_left_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_sample_set(tmp_path / "set", num_pairs=FEW, size=16)
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(sample_data, "make_pair", None)  # nothing may be drawn
    make_sample_set(root, num_pairs=FEW, size=16)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.fault("R24")
@pytest.mark.parametrize("lost", [MARKER, "val/B/synthetic_00000.png"])
def test_a_half_made_set_is_made_again(tmp_path: Path, lost: str) -> None:
    root = make_sample_set(tmp_path / "set", num_pairs=FEW, size=16)
    whole = files_of(root)
    (root / lost).unlink()
    (root / "train" / "A" / "synthetic_00001.png").write_bytes(b"half")
    make_sample_set(root, num_pairs=FEW, size=16)
    assert files_of(root) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    make_sample_set(tmp_path / "set", num_pairs={"val": 1}, size=16)
    assert (tmp_path / "set" / MARKER).is_file()


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "train/A/train_1.png", "mine/synthetic_00000.png"]
)
def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path, foreign: str) -> None:
    root = tmp_path / "set"
    (root / foreign).parent.mkdir(parents=True)
    (root / foreign).write_bytes(b"{}")  # also another program's file of our marker's name
    before = files_of(root)
    with pytest.raises(UserError, match=r"set is not empty .*choose"):
        make_sample_set(root, num_pairs=FEW, size=16)
    assert files_of(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(b"mine")
    with pytest.raises(UserError, match="is a file"):
        make_sample_set(tmp_path / "set", num_pairs=FEW, size=16)
    assert (tmp_path / "set").read_bytes() == b"mine"


def test_a_set_of_other_parameters_is_refused_and_untouched(tmp_path: Path) -> None:
    root = make_sample_set(tmp_path / "set", num_pairs=FEW, size=16)
    before = files_of(root)
    with pytest.raises(UserError, match=r"seed = 0, not 1; delete"):
        make_sample_set(root, seed=1, num_pairs=FEW, size=16)
    assert files_of(root) == before
    with pytest.raises(ValueError, match="num_pairs names"):
        make_sample_set(tmp_path / "other", num_pairs={"valid": 1})


def test_a_set_of_an_older_drawing_is_drawn_again(tmp_path: Path) -> None:
    root = make_sample_set(tmp_path / "set", num_pairs=FEW, size=16)
    whole = files_of(root)
    marker = json.loads(whole[MARKER])
    (root / MARKER).write_text(json.dumps(marker | {"version": 0}), encoding="utf-8")
    make_sample_set(root, num_pairs=FEW, size=16)
    assert files_of(root) == whole


@pytest.mark.fault("R24")
def test_what_a_killed_process_left_goes_and_a_living_one_stays(tmp_path: Path) -> None:
    prefix = sample_data.unfinished_prefix(tmp_path / "set")
    dead, alive = tmp_path / f"{prefix}1", tmp_path / f"{prefix}2"
    for folder in (dead, alive):
        (folder / "train").mkdir(parents=True)
    os.utime(dead, (time.time() - 3600,) * 2)
    make_sample_set(tmp_path / "set", num_pairs={"val": 1}, size=16)
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.fault("R24")
def test_an_interrupted_set_leaves_nothing(tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample_set(tmp_path / "set", num_pairs=FEW, size=16, progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("R13", "P4")
@pytest.mark.parametrize("half_made", [False, True])
def test_two_processes_at_once_make_one_set(tmp_path: Path, half_made: bool) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from pairs.synthetic.sample_set import make_sample_set\n"
        f"make_sample_set(Path(sys.argv[1]), num_pairs={FEW}, size=32)"
    )
    if half_made:
        (tmp_path / "set" / "train" / "A").mkdir(parents=True)
        (tmp_path / "set" / "train" / "A" / "synthetic_00000.png").write_bytes(b"half")
    command = [sys.executable, "-c", script, str(tmp_path / "set")]
    here = Path(sample_data.__file__).parents[2]
    runs = [subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        assert run.communicate(timeout=60)[1] == b""
        assert run.returncode == 0
    alone = make_sample_set(tmp_path / "alone", num_pairs=FEW, size=32)
    assert files_of(tmp_path / "set") == files_of(alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "set"]


def test_labels_of_both_dates(tmp_path: Path) -> None:
    told: set[int] = set()
    for index in range(6):
        before, after, first, second = make_pair(0, "train", index, size=128, kind="semantic")
        change = make_pair(0, "train", index, size=128)
        assert np.array_equal(before, change[0]) and np.array_equal(after, change[1])
        assert np.array_equal(first == 0, second == 0)
        assert (first != second)[first > 0].all()  # a change is one of class
        built = (change[2] > 0) & (second == 5) & (first != 5)
        gone = (change[2] > 0) & (first == 5) & (second != 5)
        assert np.array_equal(built | gone, (change[2] > 0) & ((first == 5) != (second == 5)))
        assert ((change[2] > 0) & ~(built | gone)).mean() < 0.01
        told |= set(np.unique(second).tolist())
    assert told == {0, 1, 2, 3, 4, 5}


def test_a_semantic_set_is_read_back_by_its_colours(tmp_path: Path) -> None:
    root = make_sample_set(tmp_path / "s", num_pairs=FEW, size=48, kind="semantic")
    classes = choose_classes(root, task="semantic")
    assert classes.names == ("unchanged", "water", "ground", "low vegetation", "tree", "building")
    dataset = open_dataset(root, "train", task="semantic", crop_size=48)
    for index in range(2):
        drawn = make_pair(0, "train", index, size=48, kind="semantic")
        before, after, masks = dataset[index]
        assert np.array_equal(before.permute(1, 2, 0), drawn[0])
        assert np.array_equal(after.permute(1, 2, 0), drawn[1])
        assert np.array_equal(masks, np.stack(drawn[2:]))
    (root / "classes.json").unlink()
    make_sample_set(root, num_pairs=FEW, size=48, kind="semantic")
    assert (root / "classes.json").is_file()
