"""Train a change detector on pairs of images: `python main.py`, `python main.py --help`.

Every knob is an `option` below. Without a dataset under data/ it makes a small synthetic one and
trains on that. A run lives in runs/<name>/ and can be resumed: `python main.py --resume`. Several
processes share each batch: `torchrun --standalone --nproc-per-node 2 main.py`.
"""

if __name__ == "__main__":  # Ctrl-C ends it in silence from here on, while modules are imported
    import _signal  # type: ignore[import-not-found] # of `signal`: no file has to be read

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.config import option
from runtime.options import shared
from runtime.start import start
from training.catalogue import catalogue, check_options

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """The options of a run; `Config()` is a good one."""

    data_dir: str | None = option(
        None,
        "folder of the dataset; else data/, else a sample set is made there",
        group="data",
        aliases=["--data-path"],
        may_change=True,
    )
    download: bool = option(
        False,
        "first fetch LEVIR-CD, for academic use only, into --data-dir, else data/LEVIR-CD/",
        may_change=True,
    )
    task: str = option(
        "change", "change, or semantic: from which class to which", choices=("change", "semantic")
    )
    num_classes: int | None = option(
        None,
        "1: change or not; more: classes of change, 'no change' counted; with --task semantic: "
        "classes of land cover; else as in classes.json beside the data, else 1, or 6",
        at_least=1,
        at_most=250,
    )
    mask_values: tuple[int, ...] | None = option(None, "label value of class 0, 1, ...: 0,128,255")
    folders: tuple[str, ...] | None = shared("folders")
    pairs: str | None = shared("pairs")
    skip_broken: bool = shared("skip_broken")
    bands: tuple[int, ...] | None = option(
        None, "red, green and blue of the images, counted from 1: 4,3,2; or one; else by the files"
    )
    scale: tuple[float, ...] | None = option(
        None,
        "values that become 0 and 255; else 8 bits as they are, more by percentiles of the "
        "training split",
    )
    alpha: int | None = option(
        None,
        "band that is 0 where there is no data; else, without --bands, the one the files call so",
        above=0,
    )
    crop_size: int = option(
        256, "side of a training crop in pixels", above=0, at_most=8192, multiple_of=32
    )

    backbone: str = option("resnet50", "encoder; --list shows them all", group="model")
    fusion: str = option(
        "concat", "how both dates become one: concat, diff, concat_diff, cross_attention"
    )
    upsample: int = option(
        1,
        "2: the network sees the images at twice their size: finer outlines of small objects, "
        "four times the work",
        at_least=1,
        at_most=2,
    )
    weights: str = option("imagenet", "weights the encoder starts from: imagenet, none or a file")
    init: str | None = option(
        None,
        "run or checkpoint whose whole model, not the encoder alone, this run starts from",
    )
    freeze_backbone: bool | None = option(None, "keep the encoder fixed; yes if it is pretrained")

    loss: str = option(
        "bce_iou", "bce_iou, ce, dice, focal, or a sum such as bce_iou+focal", group="loss"
    )
    class_weights: str = option(
        "none",
        "weights in cross-entropies; balanced: rare classes more",
        choices=("none", "balanced"),
    )
    bce_weight: float = option(1.0, "factor of the cross-entropy in bce_iou", at_least=0)
    iou_weight: float = option(1.0, "factor of 1 - soft IoU in bce_iou", at_least=0)
    iou_smooth: float = option(
        64.0,
        "pixels added to both sides of soft IoU's fraction in bce_iou; the more, the less do "
        "images with little change count",
        above=0,
    )

    epochs: int = option(
        30, "passes over the training split", group="training", above=0, may_change=True
    )
    batch_size: int = option(8, "pairs in a step, of all processes together", short="-b", above=0)
    lr: float = option(1e-3, "peak learning rate; a pretrained encoder takes a tenth", above=0)
    weight_decay: float = option(1e-2, "weight decay of AdamW", at_least=0)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up before the cosine", at_least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0: no limit", at_least=0)
    accumulate: int = option(1, "batches per update", above=0)
    seed: int = option(0, "seed of weights, order, augmentation", at_least=0, at_most=2**63 - 1)

    device: str = shared("device", group="machine")
    amp: str = shared("amp")
    compile: bool = option(False, "compile the model; pays on a GPU")
    cache: str = shared("cache")
    cache_gb: float = shared("cache_gb")
    workers: int | None = shared("workers")

    name: str | None = option(
        None,
        "name of the run's folder; else date and backbone",
        group="run",
        form=(r"(?!\.{1,2}$)[^/]+", "a plain name, without a path"),
    )
    output_dir: str | None = option(None, "folder of the runs; else runs/")
    resume: str | None = option(
        None,
        "go on with a run: its folder or last.pt; auto: the newest, or the one called --name, "
        "begun if need be",
        bare="auto",
    )
    save_every: str = option(
        "10m",
        "how often to save within an epoch: a time (90s, 10m, 1h) or a number of updates",
        form=(r"0*[1-9]\d*[smh]?", "a time, such as 90s, 10m or 1h, or a number of updates: 500"),
    )
    draw_every: int = option(5, "epochs between pictures", above=0)
    keep: str = option(
        "needed",
        "what stays of a run; all: also the weights of each epoch, and in MLflow a model that runs "
        "without this repository",
        choices=("needed", "all"),
    )
    mlflow: bool = option(True, "log to MLflow as well")


if __name__ == "__main__":  # the imports below take seconds; a wrong word is answered before
    LIST = {"list": ("show the backbones, fusions and losses that there are, and exit", catalogue)}
    GIVEN = start(Config, description=__doc__, answers=LIST, check=check_options)

import torch

from losses import build_loss
from model import SiameseUNet, build_model
from networks.encoders import TIMM
from networks.weights import load_weights
from pairs.bands import Reading
from pairs.download import fetch_dataset
from pairs.labels import choose_classes
from pairs.layouts import find_pairs
from pairs.synthetic.sample_set import choose_data, is_sample
from runtime.devices import (
    Precision,
    explain_out_of_memory,
    pick_device,
    pick_precision,
)
from runtime.distributed import (
    from_rank_0,
    in_turn,
    local_rank,
    parallel,
    run,
)
from runtime.memory import keep_freed_memory
from runtime.progress import duration
from runtime.sync_batch_norm import synchronize
from training.engine import (
    Learner,
    Progress,
    build_optimizer,
    evaluate,
    learn_epoch,
    load_init,
    warmup_cosine,
)
from training.recipe import sample_recipe
from training.results import Results, describe_run
from training.run import Run, open_run
from training.splits import Data, open_data
from training.step import Step


def train(given: dict[str, Any]) -> dict[str, float]:
    """Train from the options that a command line gives.

    Returns:
        The epoch and scores of the best epoch on the validation split.

    Raises:
        UserError: anything the user can mend.
        Interrupted: by a signal, after saving.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        run = open_run(Config, given, ROOT / "runs", stack, check_options)
        device = pick_device(run.config.device, local_rank())
        amp = pick_precision(run.config.amp, device)
        keep_freed_memory()
        data = open_splits(run, given, device)
        learner = build(run.config, run.state, device, amp, data)
        run.start(learner, data)
        data.write_skipped(run.folder)
        print(describe_run(run, learner, data), flush=True)
        tracker = stack.enter_context(run.open_tracker(data, ROOT))
        results = Results(run, tracker, data, ROOT / "images")
        if run.is_new:  # from here on there is always a checkpoint, and room for the next
            run.save(learner)
        fit(run, learner, data, results)
        results.finish(learner)
    print(f"{results.summary(ROOT)}\ntime        {duration(time.monotonic() - began)}", flush=True)
    return run.best


def fit(run: Run, learner: Learner, data: Data, results: Results) -> None:
    """Train the epochs that are left, saving what a run needs to go on.

    Raises:
        UserError: a file of the data went or changed, after saving.
        Interrupted: by a signal, after saving.
    """
    config, progress = run.config, learner.progress
    began, done_before = time.monotonic(), progress.epoch + progress.batch / len(data.train)
    confusion = data.confusion(progress.device)
    with (
        run.saved_if_data_fails(learner),
        closing(data.train),
        closing(data.val),
        explain_out_of_memory(
            f"--batch-size {config.batch_size} and --crop-size {config.crop_size}",
            f"--batch-size {max(1, config.batch_size // 2)} --accumulate 2, or smaller crops",
        ),
    ):
        while progress.epoch < config.epochs:
            epoch = progress.epoch + 1
            on_train, speed = learn_epoch(
                learner,
                data.train,
                last_epoch=config.epochs,
                after_update=lambda: run.save_if_due(learner),
            )
            on_val, histogram = evaluate(
                learner.model,
                learner.step.criterion,
                data.val,
                confusion=confusion,
                precision=learner.step.precision,
            )
            seconds = (time.monotonic() - began) / max(epoch - done_before, 1 / len(data.train))
            left = seconds * (config.epochs - epoch)
            results.print_epoch(epoch, on_train, on_val, **speed, seconds_left=left)
            rate = float(learner.scheduler.get_last_lr()[0])
            results.log_epoch(epoch, on_train, on_val, histogram, lr=rate, **speed)
            if epoch % config.draw_every == 0:
                results.draw(learner.model, epoch, on_val["change_iou"])
            if run.is_best(on_val):
                results.draw_matrix(confusion, epoch)
            run.save_epoch(learner, on_val)


def open_splits(run: Run, given: dict[str, Any], device: torch.device) -> Data:
    """Find the data, choose what depends on it, and open the training and validation split."""
    config: Config = run.config
    with in_turn():
        if config.download:
            folder = fetch_dataset(Path(config.data_dir or ROOT / "data" / "LEVIR-CD"))
            config = replace(config, data_dir=str(folder), download=False)
        root = config.data_dir
        if not root and not config.pairs:
            root = str(choose_data(ROOT / "data", config.task, config.num_classes))
        layout = find_pairs(
            root,
            config.task,
            folders=config.folders or (),
            table=config.pairs,
            skip_broken=config.skip_broken,
        )
    is_chosen = config.weights != "imagenet" or "weights" in given or config.init
    if is_sample(layout.root) and run.state is None and not is_chosen:
        recipe = from_rank_0(lambda: sample_recipe(config.backbone, given))
        config = replace(config, **recipe)
    classes = choose_classes(
        layout.root,
        task=config.task,
        num_classes=config.num_classes,
        mask_values=config.mask_values,
    )
    run.config = config = replace(config, num_classes=classes.num_classes)
    reading = Reading.asked(config.bands, config.scale, config.alpha)
    if run.state and run.last:  # a scale that was chosen stays
        reading = reading.over(Reading.saved(run.state["data"], run.last))
    with in_turn():
        return open_data(
            layout,
            classes,
            reading=reading,
            cache=config.cache,
            cache_dir=ROOT / "data" / "cache",
            cache_gb=config.cache_gb,
            skip_broken=config.skip_broken,
            crop_size=config.crop_size,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            workers=config.workers,
            seed=config.seed,
            device=device,
        )


def load_start(
    config: Config, state: dict[str, Any] | None, model: SiameseUNet, architecture: dict[str, Any]
) -> str:
    """Fill a new run's model with what it starts from, and return a phrase that says so."""
    if state:
        return str(state["weights"])  # restored later, with all else
    if config.init:
        return load_init(model, architecture, config.init)
    return load_weights(model.encoder, config.backbone, config.weights)


def build(
    config: Config, state: dict[str, Any] | None, device: torch.device, amp: str, data: Data
) -> Learner:
    """Build the model and all that changes it, as they are before the first step."""
    torch.manual_seed(config.seed)
    architecture: dict[str, Any] = {
        "task": config.task,
        "backbone": config.backbone,
        "fusion": config.fusion,
        "num_classes": data.classes.num_classes,
        "upsample": config.upsample,
    }
    model = build_model(**architecture, freeze_backbone=False)
    # the other processes get them from rank 0, in `parallel`
    weights = from_rank_0(lambda: load_start(config, state, model, architecture))
    is_pretrained = config.weights != "none"
    if is_pretrained if config.freeze_backbone is None else config.freeze_backbone:
        model.encoder.freeze()
    model.to(device)
    synchronize(model)
    if config.compile:
        model.compile()
    num_updates = -(-len(data.train) // config.accumulate)
    optimizer = build_optimizer(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        encoder_factor=0.1 if is_pretrained else 1.0,
    )
    scheduler = warmup_cosine(
        optimizer,
        warmup_steps=round(config.warmup_epochs * num_updates),
        total_steps=config.epochs * num_updates,
    )
    criterion = build_loss(
        config.loss,
        task=config.task,
        bce_weight=config.bce_weight,
        iou_weight=config.iou_weight,
        iou_smooth=config.iou_smooth,
        class_weights=data.balanced_weights() if config.class_weights == "balanced" else None,
    )
    in_training = parallel(model, device, has_idle_weights=config.backbone.startswith(TIMM))
    return Learner(
        model=model,
        step=Step(in_training, criterion.to(device), Precision.named(amp, device)),
        model_kwargs={**architecture, "freeze_backbone": model.encoder.frozen},
        weights=weights,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=Progress(data.confusion(device)),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        clip_norm=config.clip_grad,
    )


if __name__ == "__main__":
    sys.exit(run(lambda: train(GIVEN)))
