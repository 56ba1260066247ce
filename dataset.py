"""Pairs of images as a PyTorch dataset, and the batches of an epoch.

    sample    before (3, H, W) uint8, after (3, H, W) uint8, mask (H, W) uint8, 255 = ignore;
              of semantic change the mask is (2, H, W): the classes before, the classes after
    batch     the same with B in front; bytes until the device: four times less to move

Training takes random crops, as many per image and epoch as a grid of patches has; evaluation takes
the grid itself. Both pad with zeros and `ignore` where an image ends; nothing is ever resized.
A sample is a function of (seed, epoch, index): the number of workers, the order and a resumed run
change nothing.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pairs.augment import Augment
from pairs.bands import AS_STORED, Reading
from pairs.images import IGNORE, read_label
from pairs.labels import choose_classes, choose_encoding, label_values
from pairs.layouts import find_pairs
from pairs.scale import choose_scale
from pairs.sources import FileSource, Source
from pairs.synthetic.sample_set import is_sample
from runtime.distributed import share, world_size
from runtime.errors import DataFault, UserError

PATCH_SIZE = 256  # of validation and testing, as the literature scores

Sample = tuple[Tensor, Tensor, Tensor]


class ChangeDataset(Dataset[Sample]):
    """Crops (with `augment`) or grid patches (without) of pairs of images.

    `dataset[index]` is a sample of epoch 0, `dataset[epoch, index]` of any epoch; without
    `augment` all epochs are alike.

    Args:
        source: the pairs, see `sources.py`.
        crop_size: side of a crop or patch, in pixels.
        augment: makes this a training set.
        seed: of crops and augmentation.
    """

    def __init__(
        self,
        source: Source,
        *,
        crop_size: int = 256,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.crop_size = crop_size
        self.augment = augment
        self.seed = seed
        self.patches = [
            (number, top, left)
            for number, (height, width) in enumerate(source.sizes)
            for top in range(0, height, crop_size)
            for left in range(0, width, crop_size)
        ]

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        number, top, left = self.patches[index]
        if self.augment is None:
            return self._window(number, top, left)
        rng = np.random.default_rng((self.seed, epoch, index))
        height, width = self.source.sizes[number]
        top = int(rng.integers(max(height - self.crop_size, 0) + 1))
        left = int(rng.integers(max(width - self.crop_size, 0) + 1))
        return self.augment(*self._window(number, top, left), rng)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample] | UserError:
        """Return the samples of a batch, or as a value why there are none: see `PairLoader`."""
        try:
            return [self[key] for key in keys]
        except UserError as fault:
            return fault

    def _window(self, number: int, top: int, left: int) -> Sample:
        channels = self.source.read(number, top, left, self.crop_size)
        images, masks = channels[:6], channels[6:]
        height, width = channels.shape[-2:]
        if (height, width) != (self.crop_size, self.crop_size):
            right, bottom = self.crop_size - width, self.crop_size - height
            images = F.pad(images, (0, right, 0, bottom))
            masks = F.pad(masks, (0, right, 0, bottom), value=IGNORE)
        elif self.augment is None:  # which copies, else the sample would be a view of the source
            images, masks = images.clone(), masks.clone()
        return images[:3], images[3:], masks if len(masks) > 1 else masks[0]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch as lists of (epoch, index); `set_epoch` before each.

    The epoch travels with every key, so workers that live on from epoch to epoch need no word. Of
    several processes, each gets its share: with `shuffle` of each batch, which so is the same list
    of samples however many share it; else of the samples, so that each reads its own images.

    Args:
        num_samples: of the dataset.
        batch_size: samples in a batch, of all processes together.
        shuffle: in an order drawn from (seed, epoch); it also drops an incomplete last batch,
            unless that is the only one.
        seed: of the order.
        shared: by all processes; else each one has samples of its own, and takes them all.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool, seed: int, shared: bool = True
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.shared = shared
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with when a run goes on in its middle."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        if self.shuffle:
            return max(1, self.num_samples // self.batch_size)
        return math.ceil(len(self._part(range(self.num_samples))) / self._part_size())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, size = self._part(range(self.num_samples)), self._part_size()
        if self.shuffle:
            # a stream of its own: (seed, epoch, index) belongs to the samples
            rng = np.random.default_rng((self.seed, self.epoch, 0, 1))
            order, size = rng.permutation(self.num_samples).tolist(), self.batch_size
        for batch in range(self.first_batch, len(self)):
            part = order[batch * size : (batch + 1) * size]
            part = self._part(part) if self.shuffle else part
            yield [(self.epoch, index) for index in part]

    def _part(self, items: Sequence[int]) -> Sequence[int]:
        return share(items) if self.shared else items

    def _part_size(self) -> int:
        return math.ceil(self.batch_size / (world_size() if self.shared else 1))


class PairLoader(DataLoader[Sample]):
    """A `DataLoader` whose workers' faults arrive as one line, and which can end.

    Whatever goes wrong with a batch is raised where the next `group` is asked for. A fault of the
    data comes in place of the batch: torch would wrap what a worker raises into its traceback.

    Attributes:
        group: batches that are fetched before the first of them is given: those of an update.
        waited: seconds that its user waited for batches, in all.
    """

    dataset: ChangeDataset
    group = 1
    waited = 0.0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        batches = self._batches()
        while True:
            asked = time.perf_counter()
            group = list(islice(batches, self.group))
            self.waited += time.perf_counter() - asked
            if not group:
                return
            yield from group

    def _batches(self) -> Iterator[Sample]:
        number = 0
        try:
            with _signals_of_children_kept():
                batches = super().__iter__()
            for number, batch in enumerate(batches, 1):  # noqa: B007
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except UserError:
            self.close()
            raise
        except Exception as error:
            fault = self._death(number) if "DataLoader worker" in str(error) else None
            self.close()
            if fault is None:
                raise
            raise fault from None

    def _death(self, number: int) -> DataFault | None:
        """Say which worker has died, how, and over which of the batches from `number` on."""
        workers = getattr(self._iterator, "_workers", [])
        for place, worker in enumerate(workers):
            if not (code := worker.exitcode):
                continue
            # batches go to the workers in turn, and each has some in hand
            first = number + (place - number) % len(workers)
            last = first + len(workers) * (self.prefetch_factor or 1)
            sampler: Any = self.batch_sampler
            batches = islice(sampler, first, last, len(workers))
            found = {self.dataset.patches[index][0] for keys in batches for _, index in keys}
            pairs = [self.dataset.source.pairs[place] for place in sorted(found)]
            names = ", ".join(pair.label.name for pair in pairs[:20])
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            if code == -getattr(signal, "SIGKILL", 0):
                how += ", perhaps for lack of memory"
            elif code == -getattr(signal, "SIGBUS", 0):
                how += ", for lack of shared memory: give a container --ipc=host"
            where = f" of {pairs[0].label.parent}" if pairs else ""
            return DataFault(
                f"a loader process ended {how}; it was to read {names}{where}; try fewer workers, "
                "or --workers 0"
            )
        return None

    def close(self) -> None:
        """End the workers: as they ignore SIGTERM, the interpreter would wait for them forever."""
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()


@contextmanager
def _signals_of_children_kept() -> Iterator[None]:
    """Undo torch's handler, which raises amid a training step when a worker dies.

    The loader looks for dead workers itself while it waits for a batch, every five seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None:  # else it is another library's, which Python cannot put back
        signal.signal(signal.SIGCHLD, before)


def make_loader(
    dataset: ChangeDataset,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    group: int = 1,
    device: torch.device | str = "cpu",
    shared: bool = True,
) -> PairLoader:
    """Return a loader whose `batch_sampler` is an `EpochSampler`; its workers outlive epochs."""
    sampler = EpochSampler(len(dataset), batch_size, shuffle=shuffle, seed=seed, shared=shared)
    loader = PairLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collated,
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=num_workers > 0,
    )
    loader.group = group
    return loader


def _collated(samples: list[Sample] | UserError) -> Any:
    return samples if isinstance(samples, UserError) else default_collate(samples)


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Let workers live through Ctrl-C, which a terminal sends to all, until the run has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open_dataset(
    root: str | Path,
    split: str = "val",
    *,
    task: str = "change",
    num_classes: int | None = None,
    crop_size: int = 256,
    mask_values: Sequence[int] | None = None,
    reading: Reading = AS_STORED,
) -> ChangeDataset:
    """Open one split for looking and scoring, as a notebook wants it.

    Args:
        root: the dataset's folder, in any layout of `layouts.py`.
        split: "train", "val" or "test".
        task: "change", or "semantic" for labels of both dates.
        num_classes: 1 for binary; None as `choose_classes` has it.
        crop_size: side of a patch.
        mask_values: the value of class 0, 1, ...; told from the labels when None.
        reading: how images become RGB bytes; a scale that they need is chosen from the split.

    Raises:
        UserError: as `find_pairs`, `choose_classes` and `choose_encoding`.
    """
    layout = find_pairs(root, task, wanted=(split,))
    of_three = layout.root.with_name("sample-3-classes")
    if num_classes == 3 and is_sample(layout.root) and is_sample(of_three):
        layout = find_pairs(of_three, task, wanted=(split,))
    pairs = layout.splits[split]
    classes = choose_classes(
        layout.root,
        task=task,
        num_classes=num_classes,
        mask_values=None if mask_values is None else tuple(mask_values),
    )
    values: set[int] = set()
    if classes.values is None:
        for path in (path for pair in pairs for path in pair.labels):
            values |= label_values(read_label(path, classes.colors), path)
    encoding = choose_encoding(values, classes)
    images = [path for pair in pairs for path in (pair.before, pair.after)]
    reading, lines = choose_scale(images, reading, f"the {split} split")
    print(*lines, sep="\n", end="\n" if lines else "")
    return ChangeDataset(FileSource(pairs, encoding, reading), crop_size=crop_size)
