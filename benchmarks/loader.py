"""How many training pairs a second the data path gives, against the naive one.

    python benchmarks/loader.py                      on generated pairs of 1024 x 1024
    python benchmarks/loader.py --data-dir data      on the pairs of a dataset

Variants on one core: naive (decode, resize to 256, Pillow jitter) and ours (256 crops, flips,
turns, jitter) from the files, from memory and from the cache on disk. Then batches of 8 through
the loader with worker processes.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Work
from naive import NaiveDataset

from dataset import ChangeDataset, make_loader
from pairs.augment import Augment
from pairs.cache import open_source
from pairs.images import read_label
from pairs.labels import Classes, choose_mask_coding, label_values
from pairs.layouts import find_pairs
from pairs.splits import Pair
from pairs.synthetic.sample_set import make_sample_set

NUM_PAIRS = 48  # generated; more than a process keeps decoded, which is 36


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
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="to try")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        root = arguments.data_dir or make_sample_set(
            scratch / "pairs", size=1024, num_pairs={"train": NUM_PAIRS, "val": 1}
        )
        pairs = list(find_pairs(root).splits["train"])
        values: set[int] = set()
        for pair in pairs:
            values |= label_values(read_label(pair.label), pair.label)
        encoding = choose_mask_coding(values, Classes(1))

        def dataset(cache: str) -> ChangeDataset:
            source = open_source(pairs, encoding, cache=cache, folder=scratch / "cache")
            return ChangeDataset(source, augment=Augment())

        builders: dict[str, Callable[[], Work]] = {
            "naive": lambda: naive(pairs, 8),
            "files": lambda: ours(dataset("none"), 8),
            "ram": lambda: ours(dataset("ram"), 400),
            "disk": lambda: ours(dataset("disk"), 400),
        }
        if arguments.only:
            builders[arguments.only]()()
            print(measure.peak_memory(torch.device("cpu")))
            return
        one_core = measure.alternate(
            {name: build() for name, build in builders.items()},
            torch.device("cpu"),
            arguments.rounds,
        )
        measure.show(one_core, "pairs/s")
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
            "one_core": one_core,
            "batches_of_8": batches,
        }
        measure.save("loader", results, arguments)


if __name__ == "__main__":
    main()
