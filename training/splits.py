"""The splits of a dataset as a run uses them: checked, cached, in batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset import PATCH_SIZE, ChangeDataset, PairLoader, make_loader
from losses import balanced_weights
from metrics import Confusion, build_confusion
from pairs.augment import Augment
from pairs.bands import Reading
from pairs.cache import open_splits
from pairs.check import DataSummary, show
from pairs.labels import Classes
from pairs.scale import choose_scale
from pairs.splits import Layout
from pairs.synthetic.sample_set import is_sample
from runtime.devices import pick_workers
from runtime.distributed import local_world_size, rank, world_size
from runtime.errors import UserError, counted, visible
from runtime.files import whole_file


@dataclass(frozen=True)
class Data:
    """The dataset as a run uses it."""

    root: Path
    checked: DataSummary
    classes: Classes
    train: PairLoader
    val: PairLoader

    @property
    def is_sample(self) -> bool:
        """Whether it is drawn by this repository, so that its scores are no results."""
        return is_sample(self.root)

    @property
    def name(self) -> str:
        """What the trackers call it."""
        return "synthetic sample" if self.is_sample else self.root.name

    def write_skipped(self, folder: Path) -> None:
        """List in a run's folder the pairs that were left out, and why."""
        if self.checked.skipped and rank() == 0:
            lines = "".join(f"{visible(line)}\n" for line in self.checked.skipped)
            with whole_file(folder / "skipped.txt") as beside:
                beside.write_text(lines, encoding="utf-8")

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint says of it."""
        encoding = self.checked.encoding
        return {
            "fingerprint": self.checked.fingerprint,
            "is_sample": self.is_sample,
            "mask_values": list(encoding.values),
            "class_names": list(encoding.names),
            "class_colors": [list(color) for color in encoding.colors or ()],
            **self.checked.reading.about(),
        }

    def confusion(self, device: torch.device) -> Confusion:
        """Return an empty confusion matrix of the classes."""
        names = self.checked.encoding.names
        return build_confusion(self.classes.task, self.classes.num_classes, device, names)

    def balanced_weights(self) -> list[float]:
        """Return the weights of the classes that cross-entropies look at, rare ones higher."""
        pixels = self.checked.splits["train"].class_pixels
        return balanced_weights(pixels[1:] if self.classes.task == "semantic" else pixels)


def open_data(
    layout: Layout,
    classes: Classes,
    *,
    reading: Reading,
    cache: str,
    cache_dir: Path,
    cache_gb: float,
    skip_broken: bool,
    crop_size: int,
    batch_size: int,
    accumulate: int,
    workers: int | None,
    seed: int,
    device: torch.device,
) -> Data:
    """Check every file, say what there is, and open the training and the validation split.

    Args:
        layout: the pairs of every split.
        classes: what is known of the labels' classes.
        reading: how images become RGB bytes; a scale that they need is chosen from train.
        cache: see `cache.open_source`.
        cache_dir: where the caches are.
        cache_gb: what all of them may take.
        skip_broken: leave out pairs with a fault.
        crop_size: side of a training crop; validation is in patches of `PATCH_SIZE`.
        batch_size: pairs in a batch, of all processes together.
        accumulate: batches per update.
        workers: loader processes; None for a number that suits the machine.
        seed: of order and augmentation.
        device: where the batches go.

    Raises:
        UserError: a fault in the data, all of them named.
    """
    images = [path for pair in layout.splits["train"] for path in (pair.before, pair.after)]
    reading, lines = choose_scale(images, reading, "the training split")
    checked, sources = open_splits(
        layout,
        classes,
        ("train", "val"),
        reading=reading,
        cache=cache,
        folder=cache_dir,
        max_gb=cache_gb,
        crop_size=PATCH_SIZE,
        skip_broken=skip_broken,
    )
    show(checked)
    print(*lines, sep="\n", end="\n" if lines else "")

    def loader(split: str, crop_size: int, augment: Augment | None) -> PairLoader:
        return make_loader(
            ChangeDataset(sources[split], crop_size=crop_size, augment=augment, seed=seed),
            batch_size,
            shuffle=augment is not None,
            seed=seed,
            num_workers=pick_workers(workers, local_world_size()),
            group=accumulate if augment else 1,
            device=device,
        )

    train_loader = loader("train", crop_size, Augment())
    in_batch = min(batch_size, len(train_loader.dataset))
    if in_batch < world_size():
        raise UserError(
            f"{counted(in_batch, 'pair')} a batch: too few for {world_size()} processes"
        )
    if in_batch == 1 and crop_size == 32:
        raise UserError("--crop-size 32 with one pair in a batch: BatchNorm needs more; try 64")
    return Data(layout.root, checked, classes, train_loader, loader("val", PATCH_SIZE, None))
