"""How many training pairs a second the data path gives, against the naive one.

    python benchmarks/loader.py                      on generated pairs of 1024 x 1024
    python benchmarks/loader.py --data-dir data      on the pairs of a dataset

Variants on one core: naive (decode, resize to 256, Pillow jitter) and ours (256 crops, flips,
turns, jitter) from the files, from memory and from the cache on disk; the latter with torchvision's
jitter and with none. Then an epoch in which every pair of the cache is proved, against one in which
it was; files of 8 bits read by ours and by plain Pillow; starts with 10,000 pairs, the first of
which decodes, and how often; and batches of 8 through the loader with worker processes.

It takes two minutes on a quiet machine of two cores.
"""

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import Work
from naive import NaiveDataset
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dataset import ChangeDataset, make_loader
from pairs.augment import Augment
from pairs.cache import open_source, open_splits
from pairs.images import read_image, read_label
from pairs.labels import Classes, choose_encoding, label_values
from pairs.layouts import find_pairs
from pairs.sources import CachedSource
from pairs.splits import Pair
from pairs.synthetic.sample_set import make_sample_set
from runtime.memory import keep_freed_memory

NUM_PAIRS = 48  # generated; more than a process keeps decoded, which is 36
SIDE, PART = 1024, 256  # pixels of a pair, and of the drawn ones that it is made of
NUM_SMALL = 10_000  # pairs of a second start
EPOCHS = 30  # of a run
STILL = Augment(brightness=0, contrast=0, saturation=0)


class TorchvisionJitter(Augment):
    """The jitter by torchvision's functions, step by step."""

    def _jitter(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        image = image.float() / 255
        steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, None)
        for number in rng.permutation(4):
            value, adjust = 0.8 + 0.4 * rng.random(), steps[number]
            image = adjust(image, value) if adjust else image
        return (image * 255).round_().to(torch.uint8)


def make_pairs(folder: Path) -> Path:
    """Write pairs as mosaics of a few small ones: to draw large ones takes minutes."""
    small = make_sample_set(folder / "parts", size=PART, num_pairs={"train": 12, "val": 1})
    draw, root = np.random.default_rng(0), folder / "pairs"
    per_side = SIDE // PART
    for split, number in (("train", NUM_PAIRS), ("val", 1)):
        parts = {}
        for name in ("A", "B", "label"):
            (root / split / name).mkdir(parents=True)
            files = sorted((small / split / name).iterdir())
            parts[name] = [np.asarray(Image.open(file)) for file in files]
        for index in range(number):
            picks = draw.integers(len(parts["A"]), size=(per_side, per_side))
            for name, pictures in parts.items():
                rows = [np.concatenate([pictures[i] for i in row], axis=1) for row in picks]
                Image.fromarray(np.concatenate(rows)).save(
                    root / split / name / f"{index:03}.png", compress_level=1
                )
    return root


def naive(pairs: list[Pair], samples: int) -> Work:
    dataset = NaiveDataset([(pair.before, pair.after, pair.label) for pair in pairs])

    def work() -> float:
        for index in torch.randint(len(dataset), (samples,)).tolist():
            dataset[index]
        return float(samples)

    return work


def ours(dataset: ChangeDataset, samples: int) -> Work:
    def work() -> float:
        for index in torch.randint(len(dataset), (samples,)).tolist():
            dataset[0, index]
        return float(samples)

    return work


def proving(dataset: ChangeDataset, *, first: bool) -> Work:
    """An epoch in the order of the pairs, the first in its process or a later one."""
    source = dataset.source
    assert isinstance(source, CachedSource)
    mapped = source._mapped
    assert mapped is not None

    def work() -> float:
        if first:
            mapped.proved = bytearray(len(source))
        for index in range(len(dataset)):
            dataset[0, index]
        return float(len(dataset))

    return work


def proof_of_pairs(one: ChangeDataset, other: ChangeDataset, rounds: int) -> dict[str, Any]:
    """Return what it costs to sum up every pair at its first use in a process."""
    epochs = measure.alternate(
        {
            "pairs proved before": proving(one, first=False),
            "pairs proved now": proving(other, first=True),
        },
        torch.device("cpu"),
        rounds,
        clock=time.process_time,
    )
    measure.show(epochs, "pairs/s")
    first = 1 / epochs["pairs proved now"]["ratio"]
    of_a_run = (first + EPOCHS - 1) / EPOCHS
    print(f"time of the first epoch {first:.3f}, of {EPOCHS} epochs {of_a_run:.4f}")
    return {
        "epochs": epochs,
        "time_of_first_epoch": first,
        f"time_of_{EPOCHS}_epochs": of_a_run,
    }


def reading(folder: Path, rounds: int) -> dict[str, float]:
    """Return what reading a file of 8 bits takes, in times of plain Pillow."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    times = {}
    for side, count in ((1024, 2), (256, 20)):
        image = small.resize((side, side), Image.Resampling.BICUBIC)
        mask = image.convert("L").point(lambda value: 255 * (value > 128))
        for name, ending, picture in (
            ("PNG", "png", image),
            ("JPEG", "jpg", image),
            ("TIFF", "tif", image),
            ("mask, PNG", "png", mask),
        ):
            path = folder / f"{side}.{ending}"
            picture.save(path)
            mode, read = ("L", read_label) if picture is mask else ("RGB", read_image)

            def plain(path: Path, mode: str = mode) -> Any:
                return np.asarray(Image.open(path).convert(mode))

            table = measure.alternate(
                {
                    "Pillow": _repeated(plain, path, count),
                    "ours": _repeated(read, path, count),
                },
                torch.device("cpu"),
                rounds,
                clock=time.process_time,
            )
            times[f"{name} {side}"] = 1 / table["ours"]["ratio"]
    print("reading, in times of Pillow: " + ", ".join(f"{k} {v:.2f}" for k, v in times.items()))
    return times


def _repeated(read: Callable[[Path], Any], path: Path, count: int) -> Work:
    def work() -> float:
        for _ in range(count):
            read(path)
        return float(count)

    return work


def second_start(folder: Path) -> dict[str, float]:
    """Return the seconds of a core that `NUM_SMALL` known and cached pairs take to be opened."""
    one = make_sample_set(folder / "one", size=16, num_pairs={"train": 1, "val": 1})
    for pairs, split in ((NUM_SMALL, "train"), (100, "val")):
        for name in ("A", "B", "label"):
            (file,) = (one / split / name).iterdir()
            target = folder / "small" / split / name
            target.mkdir(parents=True)
            for number in range(pairs):
                shutil.copy(file, target / f"{number:05}.png")
    seconds, reads = [], []
    for _ in range(3):
        start = time.process_time()
        with counted_reads() as read:
            layout = find_pairs(folder / "small")
            open_splits(
                layout, Classes(1), ("train", "val"), cache="disk", folder=folder / "small-cache"
            )
        seconds.append(time.process_time() - start)
        reads.append(len(read) / (3 * (NUM_SMALL + 100)))
    print(
        f"start with {NUM_SMALL} pairs: {seconds[0]:.1f} s, each file decoded {reads[0]:g} times; "
        f"again {min(seconds[1:]):.1f} s, {reads[1]:g} times"
    )
    return {
        "pairs": NUM_SMALL,
        "first_s": seconds[0],
        "second_s": min(seconds[1:]),
        "first_reads_per_file": reads[0],
        "second_reads_per_file": reads[1],
    }


@contextmanager
def counted_reads() -> Iterator[list[Path]]:
    """Note each file that is decoded, until the `with` ends."""
    read: list[Path] = []
    readers = {}
    for module in map(importlib.import_module, ("pairs.records", "pairs.sources")):
        for name in ("read_pixels", "read_label"):
            readers[module, name] = reader = getattr(module, name)

            def noted(path: Path, *rest: Any, reader: Callable[..., Any] = reader) -> Any:
                read.append(path)
                return reader(path, *rest)

            setattr(module, name, noted)
    try:
        yield read
    finally:
        for (module, name), reader in readers.items():
            setattr(module, name, reader)


def loading(dataset: ChangeDataset, num_workers: int, device: str) -> Work:
    loader = make_loader(
        dataset, min(8, len(dataset)), shuffle=True, num_workers=num_workers, device=device
    )

    def work() -> float:
        return float(sum(len(mask) for _, _, mask in loader))

    return work


def main() -> None:
    parser = measure.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--data-dir", type=Path, help="a dataset instead of generated pairs")
    parser.add_argument("--note", default="", help="about the machine, for the JSON")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="to try")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as main.py does
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        root = arguments.data_dir or make_pairs(scratch)
        pairs = list(find_pairs(root).splits["train"])
        values = [label_values(read_label(pair.label), pair.label) for pair in pairs]
        encoding = choose_encoding(set().union(*values), Classes(1))

        def dataset(cache: str, augment: Augment | None = None) -> ChangeDataset:
            source = open_source(pairs, encoding, cache=cache, folder=scratch / "cache")
            return ChangeDataset(source, augment=augment or Augment())

        builders: dict[str, Callable[[], Work]] = {
            "naive": lambda: naive(pairs, 8),
            "files": lambda: ours(dataset("none"), 8),
            "ram": lambda: ours(dataset("ram"), 400),
            "disk": lambda: ours(dataset("disk"), 400),
            "disk, torchvision's jitter": lambda: ours(dataset("disk", TorchvisionJitter()), 200),
            "disk, no jitter": lambda: ours(dataset("disk", STILL), 400),
        }
        if arguments.only:
            builders[arguments.only]()()
            print(measure.peak_memory(torch.device("cpu")))
            return
        one_core = measure.alternate(
            {name: build() for name, build in builders.items()},
            torch.device("cpu"),
            arguments.rounds,
            clock=time.process_time,
        )
        measure.show(one_core, "pairs/s")
        proof = proof_of_pairs(dataset("disk"), dataset("disk"), arguments.rounds)
        read = reading(scratch, arguments.rounds)
        start = second_start(scratch)
        batches: dict[str, dict[str, Any]] = measure.alternate(
            {
                f"disk, {n} workers": loading(dataset("disk"), n, arguments.device)
                for n in arguments.workers
            },
            torch.device("cpu"),
            arguments.rounds,
        )
        measure.show(batches, "pairs/s")
        height, width = dataset("disk").source.sizes[0]
        results = {
            "pairs": {
                "count": len(pairs),
                "size": [height, width],
                "generated": not arguments.data_dir,
            },
            "note": arguments.note,
            "one_core": one_core,
            "reading_in_times_of_pillow": read,
            "proof": proof,
            "start": start,
            "batches_of_8": batches,
        }
        measure.save("loader", results, arguments)


if __name__ == "__main__":
    main()
