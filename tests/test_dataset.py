import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    ChangeDataset,
    EpochSampler,
    FileSource,
    _decode,
    make_loader,
    open_dataset,
)
from errors import UserError
from image_io import MaskCoding
from layouts import find_pairs
from scenes import box_mask, write_pair, write_tree
from transforms import Augment


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Tests overwrite files; the two decoded pairs that a process keeps must not outlive one."""
    _decode.cache_clear()
    yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = write_tree(tmp_path / "set", num=2, size=(70, 90))
    write_pair(tree / "train", "small", size=(17, 33))
    write_pair(tree / "train", "tiny", size=(1, 1))
    return tree


def training_set(root: Path, crop_size: int = 32, seed: int = 0) -> ChangeDataset:
    source = FileSource(find_pairs(root).splits["train"], MaskCoding((0, 255)))
    return ChangeDataset(source, crop_size=crop_size, augment=Augment(), seed=seed)


def equal(first: object, second: object) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[call-overload]


def test_a_sample_is_bytes(root: Path) -> None:
    for dataset in (training_set(root), open_dataset(root, crop_size=32)):
        before, after, mask = dataset[0]
        assert before.shape == after.shape == (3, 32, 32)
        assert mask.shape == (32, 32)
        assert before.dtype == after.dtype == mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) <= {0, 1, 255}


def test_patches_put_together_are_the_image(root: Path) -> None:
    dataset = open_dataset(root, crop_size=32)
    assert len(dataset) == 2 * 3 * 3
    whole = torch.zeros(3 * 32, 3 * 32, dtype=torch.uint8)
    picture = torch.zeros(3, 3 * 32, 3 * 32, dtype=torch.uint8)
    for index in range(9):
        _, top, left = dataset.patches[index]
        before, _, mask = dataset[index]
        whole[top : top + 32, left : left + 32] = mask
        picture[:, top : top + 32, left : left + 32] = before
    expected = np.asarray(Image.open(root / "val" / "A" / "val_0.png")).transpose(2, 0, 1)
    assert np.array_equal(picture[:, :70, :90], expected)
    assert np.array_equal(whole[:70, :90], box_mask(70, 90) > 0)
    assert (whole[70:] == 255).all() and (whole[:, 90:] == 255).all()
    assert (picture[:, 70:] == 0).all()


def test_d10_small_images_are_padded_not_resized(root: Path) -> None:
    dataset = training_set(root)
    names = [pair.name for pair in dataset.source.pairs]
    for name, pixels in (("small", 17 * 32), ("tiny", 1)):
        number = names.index(name)
        index = next(i for i, patch in enumerate(dataset.patches) if patch[0] == number)
        assert (dataset[index][2] != 255).sum() == pixels


def test_an_epoch_has_as_many_crops_as_patches(root: Path) -> None:
    assert len(training_set(root)) == 2 * 9 + 2 + 1


def test_r22_a_sample_depends_on_seed_epoch_and_index_alone(root: Path) -> None:
    first, again, other = training_set(root), training_set(root), training_set(root, seed=1)
    for index in (0, 5, len(first) - 1):
        assert equal(first[2, index], again[2, index])
    assert equal(first[0], first[0, 0])
    assert not equal(first[0, 0], first[1, 0])
    assert not equal(first[0, 0], first[0, 1])
    assert not equal(first[0, 0], other[0, 0])


def test_crops_reach_every_corner(root: Path) -> None:
    dataset = training_set(root)
    seen: set[tuple[int, int]] = set()
    read = dataset.source.read
    dataset.source.read = lambda n, top, left, side: (  # type: ignore[method-assign]
        seen.add((top, left)) if n == len(dataset.source) - 1 else None, read(n, top, left, side)
    )[1]  # fmt: skip
    index = len(dataset) - 1
    for epoch in range(400):
        dataset[epoch, index]
    assert {top for top, _ in seen} == set(range(70 - 32 + 1))
    assert {left for _, left in seen} == set(range(90 - 32 + 1))


def batches(root: Path, num_workers: int, epoch: int = 1, first: int = 0) -> list:
    loader = make_loader(training_set(root), 4, shuffle=True, seed=3, num_workers=num_workers)
    sampler = loader.batch_sampler
    assert isinstance(sampler, EpochSampler)
    sampler.set_epoch(epoch, first)
    return list(loader)


def test_r22_workers_change_nothing_and_a_later_start_is_the_rest(root: Path) -> None:
    alone = batches(root, 0)
    assert len(alone) == 21 // 4
    for a, b in zip(alone, batches(root, 2), strict=True):
        assert equal(a, b)
    for a, b in zip(alone[2:], batches(root, 0, first=2), strict=True):
        assert equal(a, b)
    assert not equal(alone[0], batches(root, 0, epoch=2)[0])


def test_living_workers_see_the_new_epoch(root: Path) -> None:
    loader = make_loader(training_set(root), 4, shuffle=True, seed=3, num_workers=1)
    sampler = loader.batch_sampler
    assert isinstance(sampler, EpochSampler)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for a, b in zip(loader, batches(root, 0, epoch=epoch), strict=True):
            assert equal(a, b)


def test_sampler_covers_everything_once() -> None:
    keys = [key for batch in EpochSampler(11, 4, shuffle=False, seed=0) for key in batch]
    assert keys == [(0, i) for i in range(11)]
    shuffled = EpochSampler(12, 4, shuffle=True, seed=0)
    assert sorted(k for b in shuffled for k in b) == [(0, i) for i in range(12)]
    assert [len(b) for b in EpochSampler(11, 4, shuffle=True, seed=0)] == [4, 4]
    assert [len(b) for b in EpochSampler(3, 4, shuffle=True, seed=0)] == [3]


def test_evaluation_covers_each_patch_once_in_order(root: Path) -> None:
    dataset = open_dataset(root, crop_size=32)
    loader = make_loader(dataset, 4, shuffle=False)
    assert len(loader) == 5
    masks = torch.cat([batch[2] for batch in loader])
    assert torch.equal(masks, torch.stack([dataset[i][2] for i in range(18)]))


def test_a_dataset_travels_to_a_spawned_worker(root: Path) -> None:
    dataset = training_set(root)
    assert equal(pickle.loads(pickle.dumps(dataset))[3, 4], dataset[3, 4])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_d13_a_file_that_disappears_is_named(num_workers: int, root: Path) -> None:
    dataset = open_dataset(root, crop_size=32)
    _decode.cache_clear()
    (root / "val" / "B" / "val_1.png").unlink()
    with pytest.raises(UserError, match=r"val_1\.png: is gone"):
        list(make_loader(dataset, 4, shuffle=False, num_workers=num_workers))


def test_d13_a_file_that_changes_its_size_is_named(root: Path) -> None:
    dataset = open_dataset(root, crop_size=32)
    _decode.cache_clear()
    for part in ("A", "B"):
        Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(root / "val" / part / "val_0.png")
    with pytest.raises(UserError, match="does not match its label's"):
        dataset[0]
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "val" / "label" / "val_0.png")
    with pytest.raises(UserError, match="changed its size during the run"):
        dataset[0]


class Dying(ChangeDataset):
    def __getitem__(self, key: object) -> tuple:  # type: ignore[override]
        os._exit(7)


def test_r6_a_worker_that_dies_is_an_error_not_a_hang(root: Path) -> None:
    source = FileSource(find_pairs(root).splits["val"], MaskCoding((0, 255)))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(make_loader(Dying(source, crop_size=32), 4, shuffle=False, num_workers=1))


def test_open_dataset_names_the_splits_there_are(root: Path) -> None:
    with pytest.raises(UserError, match="has no test split, only train, val"):
        open_dataset(root, "test")
    assert len(open_dataset(root, mask_values=(0, 255))) == 2
