"""How many training pairs a second the data path gives, against the naive one.

    python benchmarks/loader.py                      on generated pairs of 1024 x 1024
    python benchmarks/loader.py --data-dir data      on the pairs of a dataset

Variants on one core: naive (decode, resize to 256, Pillow jitter) and ours (256 crops, flips,
turns, jitter) from the files, from memory and from the cache on disk; the latter with torchvision's
jitter and with none. Then an epoch in which every pair of the cache is proved, against one in which
it was; files of 8 bits read by ours and by plain Pillow; a second start with 10,000 pairs; and
batches of 8 through the loader with worker processes.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
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

NUM_PAIRS = 48  # generated; more than a process keeps decoded, which is 36
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
    for side, count in ((1024, 4), (256, 40)):
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
    seconds = []
    for _ in range(4):
        start = time.process_time()
        layout = find_pairs(folder / "small")
        open_splits(
            layout, Classes(1), ("train", "val"), cache="disk", folder=folder / "small-cache"
        )
        seconds.append(time.process_time() - start)
    print(f"start with {NUM_SMALL} pairs: {seconds[0]:.1f} s, again {min(seconds[1:]):.1f} s")
    return {"pairs": NUM_SMALL, "first_s": seconds[0], "second_s": min(seconds[1:])}


def loading(dataset: ChangeDataset, num_workers: int, device: str) -> Work:
    loader = make_loader(
        dataset, min(8, len(dataset)), shuffle=True, num_workers=num_workers, device=device
    )

    def work() -> float:
        return float(sum(len(mask) for _, _, mask in loader))

    return work


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="a dataset instead of generated pairs")
    parser.add_argument("--note", default="", help="about the machine, for the JSON")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="to try")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        root = arguments.data_dir or make_sample_set(
            scratch / "pairs", size=1024, num_pairs={"train": NUM_PAIRS, "val": 1}
        )
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
