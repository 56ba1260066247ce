"""Patches, crops, order and loaders: two ways to the same bytes wherever there are two ways."""

import dataclasses
import hashlib
import os
import pickle
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import mask_of, picture, save, save_pair, save_tree
from torch import Tensor

from dataset import ChangeDataset, EpochSampler, make_loader, open_dataset
from pairs.augment import Augment
from pairs.images import IGNORE
from pairs.labels import LabelEncoding
from pairs.layouts import find_pairs
from pairs.sources import FileSource
from runtime.errors import DataFault, UserError

CODING = LabelEncoding((0, 255))
SIZES = [(1, 1), (17, 33), (32, 32), (50, 20), (70, 64)]


def source_of(root: Path, sizes: Iterable[tuple[int, int]] = SIZES) -> FileSource:
    for index, size in enumerate(sizes):
        save_pair(root / "train", f"p{index}", index, size)
    save_pair(root / "val", "v", 99)
    return FileSource(find_pairs(root).splits["train"], CODING)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    return source_of(tmp_path_factory.mktemp("data"))


def digest(batches: Iterable[Iterable[Tensor]]) -> list[str]:
    return [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in batch)).hexdigest()
        for batch in batches
    ]


@pytest.mark.fault("D10")
@pytest.mark.parametrize("crop_size", [32, 256])
def test_patches_of_any_size_make_up_the_whole(source: FileSource, crop_size: int) -> None:
    dataset = ChangeDataset(source, crop_size=crop_size)
    for number, (height, width) in enumerate(SIZES):
        side = [-(-n // crop_size) * crop_size for n in (height, width)]
        whole = [np.zeros((*n, *side), np.uint8) for n in ((3,), (3,), ())]
        for index, (owner, top, left) in enumerate(dataset.patches):
            if owner != number:
                continue
            for canvas, patch in zip(whole, dataset[index], strict=True):
                assert patch.dtype == torch.uint8
                assert patch.shape[-2:] == (crop_size, crop_size)
                canvas[..., top : top + crop_size, left : left + crop_size] = patch.numpy()
        inside = (..., slice(height), slice(width))
        assert np.array_equal(
            whole[0][inside], picture(2 * number, height, width).transpose(2, 0, 1)
        )
        assert np.array_equal(
            whole[1][inside], picture(2 * number + 1, height, width).transpose(2, 0, 1)
        )
        assert np.array_equal(whole[2][inside], mask_of(height, width) // 255)
        assert (whole[2] == IGNORE).sum() == side[0] * side[1] - height * width
        assert whole[0].sum() == whole[0][inside].sum()  # padding is black


@pytest.mark.fault("D10")
def test_training_crops_of_any_size(source: FileSource) -> None:
    augment = Augment(brightness=0, contrast=0, saturation=0)
    dataset = ChangeDataset(source, crop_size=32, augment=augment)
    for index, (number, *_) in enumerate(dataset.patches):
        height, width = SIZES[number]
        for epoch in range(3):
            before, _, mask = dataset[epoch, index]
            assert before.shape == (3, 32, 32)
            counted = int((mask != IGNORE).sum())
            assert counted == min(height, 32) * min(width, 32)


def test_crops_reach_every_corner_and_lie_inside(tmp_path: Path) -> None:
    source = source_of(tmp_path, [(40, 48)])
    still = Augment(flip=False, turn=False, swap=False, brightness=0, contrast=0, saturation=0)
    dataset = ChangeDataset(source, crop_size=32, augment=still)
    image = picture(0, 40, 48).transpose(2, 0, 1)
    windows = {
        image[:, top : top + 32, left : left + 32].tobytes(): (top, left)
        for top in range(9)
        for left in range(17)
    }
    seen = {windows[dataset[epoch, 0][0].numpy().tobytes()] for epoch in range(1500)}
    assert {(0, 0), (0, 16), (8, 0), (8, 16)} <= seen


def test_as_many_crops_as_patches(source: FileSource) -> None:
    grid = ChangeDataset(source, crop_size=32)
    assert len(grid) == len(ChangeDataset(source, crop_size=32, augment=Augment()))
    assert len(grid) == 1 + 2 + 1 + 2 + 6


@pytest.mark.fault("R22")
def test_a_sample_is_a_function_of_seed_epoch_and_index(source: FileSource) -> None:
    def sample(seed: int, epoch: int, index: int) -> list[str]:
        dataset = ChangeDataset(source, crop_size=32, augment=Augment(), seed=seed)
        return digest([dataset[epoch, index]])

    assert sample(0, 1, 6) == sample(0, 1, 6)
    assert len({*sample(0, 1, 6), *sample(0, 2, 6), *sample(1, 1, 6), *sample(0, 1, 7)}) == 4
    plain = ChangeDataset(source, crop_size=32, augment=Augment())
    assert digest([plain[6]]) == sample(0, 0, 6)


def test_evaluation_is_alike_in_every_epoch(source: FileSource) -> None:
    dataset = ChangeDataset(source, crop_size=32)
    assert digest([dataset[0, 5]]) == digest([dataset[7, 5]])


@pytest.mark.parametrize("augment", [None, Augment(flip=False, turn=False, brightness=0)])
def test_a_sample_may_be_written_to(tmp_path: Path, augment: Augment | None) -> None:
    dataset = ChangeDataset(source_of(tmp_path, [(32, 32)]), crop_size=32, augment=augment)
    expected = digest([dataset[0]])
    for tensor in dataset[0]:
        tensor.fill_(7)
    assert digest([dataset[0]]) == expected


@pytest.mark.parametrize("num_samples", [1, 3, 4, 8, 11])
def test_every_sample_is_scored_once(num_samples: int) -> None:
    sampler = EpochSampler(num_samples, 4, shuffle=False, seed=0)
    batches = list(sampler)
    assert [index for batch in batches for _, index in batch] == list(range(num_samples))
    assert len(batches) == len(sampler)


@pytest.mark.parametrize(("num_samples", "sizes"), [(3, [3]), (4, [4]), (11, [4, 4])])
def test_training_drops_a_short_batch_unless_it_is_the_only_one(
    num_samples: int, sizes: list[int]
) -> None:
    sampler = EpochSampler(num_samples, 4, shuffle=True, seed=0)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == sizes
    assert len(sampler) == len(sizes)
    indices = [index for batch in batches for _, index in batch]
    assert len(set(indices)) == len(indices)


def test_order_depends_on_seed_and_epoch_and_goes_on_in_the_middle() -> None:
    def batches(seed: int, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
        sampler = EpochSampler(50, 4, shuffle=True, seed=seed)
        sampler.set_epoch(epoch, start)
        return list(sampler)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(index for batch in batches(seed, epoch) for _, index in batch)

    assert batches(0, 3) == batches(0, 3)
    assert len({order(0, 3), order(0, 4), order(1, 3)}) == 3
    assert batches(0, 3, 5) == batches(0, 3)[5:]
    assert all(epoch == 3 for batch in batches(0, 3) for epoch, _ in batch)


@pytest.mark.fault("R22")
@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_change_nothing(source: FileSource, shuffle: bool) -> None:
    seen = []
    for num_workers in (0, 2):
        dataset = ChangeDataset(source, crop_size=32, augment=Augment() if shuffle else None)
        loader = make_loader(dataset, 4, shuffle=shuffle, seed=1, num_workers=num_workers)
        epochs = []
        for epoch, start in ((0, 0), (1, 0), (1, 2)):
            assert isinstance(loader.batch_sampler, EpochSampler)
            loader.batch_sampler.set_epoch(epoch, start)
            epochs.append(digest(loader))
        seen.append(epochs)
    assert seen[0] == seen[1]
    first, second, resumed = seen[0]
    assert resumed == second[2:]
    assert (first == second) == (not shuffle)


def test_a_source_and_a_dataset_can_be_pickled(source: FileSource) -> None:
    dataset = ChangeDataset(source, crop_size=32, augment=Augment())
    copy = pickle.loads(pickle.dumps(dataset))
    assert digest([copy[1, 4]]) == digest([dataset[1, 4]])


@pytest.mark.fault("D13")
@pytest.mark.parametrize("spoil", ["delete", "shrink", "repaint", "truncate"])
def test_a_file_that_changes_during_a_run_is_named(tmp_path: Path, spoil: str) -> None:
    source = source_of(tmp_path, [(32, 32), (32, 32)])
    dataset = ChangeDataset(source, crop_size=32)
    expected = digest([dataset[0], dataset[1]])
    path = source.pairs[1].after
    stat = path.stat()
    if spoil == "delete":
        path.unlink()
    elif spoil == "truncate":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        save(path, picture(5, 32, 31 if spoil == "shrink" else 32))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert digest([dataset[0]]) == expected[:1]
    with pytest.raises(UserError, match="p1"):
        dataset[1]


@pytest.mark.fault("R6")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_one_clear_line(tmp_path: Path, num_workers: int) -> None:
    source = source_of(tmp_path, [(32, 32)])
    loader = make_loader(
        ChangeDataset(source, crop_size=32), 1, shuffle=False, num_workers=num_workers
    )
    assert len(list(loader)) == 1
    gone = source.pairs[0].before
    gone.unlink()
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value).startswith(f"{gone}: is gone")
    assert len(str(error.value).splitlines()) == 1


class Deadly(FileSource):
    """Ends its process, as the system's memory killer or a crash in a decoder does."""

    def channels(self, number: int) -> torch.Tensor:
        if number == 3:
            os._exit(3) if self.pairs[0].name == "p0" else os.kill(os.getpid(), signal.SIGKILL)
        return super().channels(number)


@pytest.mark.fault("R6")
@pytest.mark.parametrize(("first", "says"), [
    pytest.param("p0", "code 3", marks=pytest.mark.slow), ("q0", "signal 9")
])  # fmt: skip
def test_a_worker_that_dies_is_one_clear_line(first: str, says: str, tmp_path: Path) -> None:
    files = source_of(tmp_path, [(32, 32)] * 5)
    pairs = [dataclasses.replace(pair, name=f"{first[0]}{i}") for i, pair in enumerate(files.pairs)]
    dataset = ChangeDataset(Deadly(pairs, CODING), crop_size=32)
    loader = make_loader(dataset, 1, shuffle=False, num_workers=2)
    got = []
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataFault, match=rf"{says}.*p3\.png of .*--workers 0") as error:
        for batch in loader:
            got.append(batch)
            # torch would raise here, amid a step, as soon as a child ends
            assert signal.getsignal(signal.SIGCHLD) is before
    assert len(got) in (1, 3)  # its last batch may not have left it
    assert len(str(error.value).splitlines()) == 1
    assert loader._iterator is None


@pytest.mark.fault("D13")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_is_met_between_two_groups(tmp_path: Path, num_workers: int) -> None:
    source = source_of(tmp_path, [(32, 32)] * 7)
    dataset = ChangeDataset(source, crop_size=32)
    loader = make_loader(dataset, 1, shuffle=False, num_workers=num_workers, group=3)
    assert len(list(loader)) == 7
    source.pairs[4].before.unlink()
    got = []
    with pytest.raises(DataFault, match=r"p4\.png: is gone"):
        for batch in loader:
            got.append(batch)
    assert len(got) == 3


@pytest.mark.fault("D2")
def test_sizes_that_differ_within_a_pair(tmp_path: Path) -> None:
    source = source_of(tmp_path, [(32, 32)])
    save(source.pairs[0].after, picture(1, 16, 32))
    with pytest.raises(UserError, match=r"p0\.png.*16.*32"):
        ChangeDataset(FileSource(source.pairs, CODING), crop_size=32)[0]


def test_open_dataset(tmp_path: Path) -> None:
    save_tree(tmp_path, train=2, val=3)
    save(tmp_path / "val" / "label" / "val_1.png", mask_of(value=0))
    dataset = open_dataset(tmp_path, "val", crop_size=16)
    assert len(dataset) == 12
    assert (
        torch.stack([mask for _, _, mask in map(dataset.__getitem__, range(12))]).sum() == 2 * 256
    )
    assert open_dataset(str(tmp_path), "train", mask_values=(255, 0)).source.encoding.values == (
        255,
        0,
    )
    with pytest.raises(UserError, match="no test split, only train, val"):
        open_dataset(tmp_path, "test")


def semantic_pair(root: Path) -> Path:
    """One pair of 32 x 32 whose labels disagree in one pixel, in two splits."""
    before, after = mask_of(value=3), mask_of(value=5)
    after[20, 30] = 2
    for split in ("train", "val"):
        for folder, pixels in (
            ("im1", picture(0)), ("im2", picture(1)), ("label1", before), ("label2", after),
        ):  # fmt: skip
            save(root / split / folder / "x.png", pixels)
    return root


def test_semantic_masks_are_of_both_dates_and_agree_on_change(tmp_path: Path) -> None:
    dataset = open_dataset(semantic_pair(tmp_path), "val", task="semantic", crop_size=40)
    before, after, masks = dataset[0]
    assert before.shape == after.shape == (3, 40, 40)
    assert masks.shape == (2, 40, 40) and masks.dtype == torch.uint8
    assert (masks[:, 32:] == IGNORE).all()
    assert masks[:, 20, 30].tolist() == [IGNORE, IGNORE]
    assert masks[:, 0, 0].tolist() == [3, 5]
    assert torch.equal(masks[0, :32, :32] == 0, masks[1, :32, :32] == 0)
