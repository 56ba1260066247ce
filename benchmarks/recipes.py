"""Recipes compared at a third of a run's cost: the decoder alone, on stored features.

    python benchmarks/recipes.py --data-dir PATH --recipe "" "--lr 2e-3" "--batch-size 4"
    python benchmarks/recipes.py --data-dir data/sample --score PATH --crop-size 128 --recipe ""

What a frozen encoder sees of `--views` augmented epochs of seed 0 is computed once and kept on disk
(1.8 MB a pair of 256 x 256). A recipe is some options of main.py; each is trained with each seed,
which draws the weights and the order. Views repeat when a recipe has more epochs, the encoder never
learns, and augmentation cannot be compared: so this is for choosing what to try in real runs.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measure
import torch
from torch import Tensor, nn

from dataset import ChangeDataset, EpochSampler, open_dataset
from losses import build_loss
from main import Config
from metrics import Confusion
from model import SiameseUNet, build_model
from networks.weights import load_weights
from pairs.augment import Augment
from runtime import config as cli
from training.engine import build_optimizer, warmup_cosine

BACKBONE = "efficientnet_lite0"
BATCH = 8  # of the encoder and of scoring
# The options of main.py that a recipe may have: the others concern the stored features, or nothing
USED = {
    "fusion", "loss", "bce_weight", "iou_weight", "iou_smooth", "lr", "weight_decay", "batch_size",
    "warmup_epochs", "clip_grad",
}  # fmt: skip
Maps = list[Tensor]


class Stored:
    """Features of pairs, one file per scale, and their masks.

    Args:
        model: whose encoder is asked.
        dataset: gives pairs by a key.
        keys: of the pairs.
        folder: where the files go.
    """

    def __init__(
        self, model: SiameseUNet, dataset: ChangeDataset, keys: Sequence[Any], folder: Path
    ) -> None:
        folder.mkdir()
        masks, self.maps = [], Maps()
        for start in range(0, len(keys), BATCH):
            part = [dataset[key] for key in keys[start : start + BATCH]]
            before, after, mask = (torch.stack(x) for x in zip(*part, strict=True))
            masks.append(mask)
            features = encode(model, before, after)
            self.maps = self.maps or [
                create(folder / f"{number}.bin", (len(keys), 2, *of_scale.shape[1:]))
                for number, of_scale in enumerate(features)
            ]
            for stored, of_scale in zip(self.maps, features, strict=True):
                dates = of_scale.unflatten(0, (2, -1)).transpose(0, 1)
                stored[start : start + BATCH] = dates
            print(f"\r{folder.name} {start + len(part)}/{len(keys)}  ", end="", file=sys.stderr)
        self.masks = torch.cat(masks)

    def batch(self, numbers: list[int]) -> tuple[Maps, Tensor]:
        """Return the features (2B, C, h, w) and the masks (B, H, W) of some pairs."""
        taken = [x[numbers].transpose(0, 1).flatten(0, 1) for x in self.maps]
        layout = torch.channels_last
        return [x.contiguous(memory_format=layout) for x in taken], self.masks[numbers]


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with train/ and val/")
    parser.add_argument("--score", help="folder whose val/ is scored as well")
    parser.add_argument("--recipe", nargs="+", required=True, help="each some options of main.py")
    parser.add_argument("--crop-size", type=int, default=256, help="of training (default: 256)")
    parser.add_argument("--views", type=int, default=4, help="epochs to store (default: 4)")
    parser.add_argument("--epochs", type=int, default=8, help="of every recipe (default: 8)")
    parser.add_argument("--seeds", type=int, default=2, help="of every recipe (default: 2)")
    arguments = parser.parse_args()
    recipes = {recipe: cli.parse(Config, shlex.split(recipe)) for recipe in arguments.recipe}
    for recipe, options in recipes.items():
        if unused := sorted(options.keys() - USED):
            parser.error(f"--recipe {recipe!r}: takes no {', '.join(unused)} into account")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with TemporaryDirectory(prefix="features-") as folder:
        train, val = store(arguments, Path(folder))
        print(file=sys.stderr)
        for recipe, options in recipes.items():
            for seed in range(arguments.seeds):
                config = Config(**{**options, "backbone": BACKBONE, "seed": seed})
                model = learn(config, train, arguments.views, arguments.epochs)
                found = {name: score(model, split) for name, split in val.items()}
                print(json.dumps({"recipe": recipe, "seed": seed, **found}), flush=True)


def store(arguments: argparse.Namespace, folder: Path) -> tuple[Stored, dict[str, Stored]]:
    """Return the features of the training views, and of one or two validation splits."""
    model = build_model(backbone=BACKBONE)
    load_weights(model.encoder, BACKBONE, "imagenet")
    source = open_dataset(arguments.data_dir, "train").source
    views = ChangeDataset(source, crop_size=arguments.crop_size, augment=Augment(), seed=0)
    keys = [(epoch, i) for epoch in range(arguments.views) for i in range(len(views))]
    roots = {"val": arguments.data_dir, "score": arguments.score}
    splits = {name: open_dataset(root, "val") for name, root in roots.items() if root}
    return Stored(model, views, keys, folder / "train"), {
        name: Stored(model, split, range(len(split)), folder / name)
        for name, split in splits.items()
    }


def encode(model: SiameseUNet, before: Tensor, after: Tensor) -> Maps:
    image = torch.cat([before, after]).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features: Maps = model.encoder(image.float() / 255)
    return features


def create(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return a bfloat16 tensor that lies in a file."""
    size = math.prod(shape)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(shape)


def learn(config: Config, train: Stored, num_views: int, epochs: int) -> SiameseUNet:
    """Train a decoder as main.py would, but for the views that repeat."""
    torch.manual_seed(config.seed)
    model = build_model(backbone=BACKBONE, fusion=config.fusion).train()
    criterion = build_loss(
        config.loss,
        bce_weight=config.bce_weight,
        iou_weight=config.iou_weight,
        iou_smooth=config.iou_smooth,
    )
    optimizer = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    num_pairs = len(train.masks) // num_views
    sampler = EpochSampler(num_pairs, config.batch_size, shuffle=True, seed=config.seed)
    scheduler = warmup_cosine(
        optimizer,
        warmup_steps=round(config.warmup_epochs * len(sampler)),
        total_steps=epochs * len(sampler),
    )
    learning = [p for p in model.parameters() if p.requires_grad]
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for keys in sampler:
            maps, mask = train.batch([epoch % num_views * num_pairs + i for _, i in keys])
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model._compare(maps), mask)
            loss.backward()
            nn.utils.clip_grad_norm_(learning, config.clip_grad or float("inf"))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    return model


@torch.no_grad()
def score(model: SiameseUNet, split: Stored) -> dict[str, float]:
    """Return scores at 0.5 of the last epoch, which nobody chose."""
    model.eval()
    confusion = Confusion(1)
    for start in range(0, len(split.masks), BATCH):
        numbers = list(range(start, min(start + BATCH, len(split.masks))))
        maps, mask = split.batch(numbers)
        with torch.autocast("cpu", torch.bfloat16):
            confusion.update(model._compare(maps), mask)
    scores = confusion.scores()
    names = ("change_iou", "change_dice", "mean_dice")
    return {name: round(scores[name], 4) for name in names}


if __name__ == "__main__":
    main()
