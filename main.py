"""Train a change detector on pairs of images: `python main.py`, `python main.py --help`.

Every knob is an `option` below. Without a dataset under data/ it makes a small synthetic one and
trains on that. A run lives in runs/<name>/ and can be resumed: `python main.py --resume`. Several
processes share each batch: `torchrun --standalone --nproc-per-node 2 main.py`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime import config as cli
from runtime.config import option

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """The options of a run; `Config()` is a good one."""

    # fmt: off
    # data
    data_dir: str | None = option(None, "folder of the dataset; else data/, else a sample set is made", aliases=["--data-path"], resumable=True)  # noqa: E501
    download: bool = option(False, "first fetch LEVIR-CD, for academic use only, into --data-dir, else data/LEVIR-CD/", resumable=True)  # noqa: E501
    task: str = option("change", "change, or semantic: from which class to which", choices=("change", "semantic"))  # noqa: E501
    num_classes: int | None = option(None, "1 = change or not; K > 1 counts 'no change' too; of --task semantic kinds of land cover; else as classes.json beside the data, else 1, or 6", at_least=1, at_most=250)  # noqa: E501
    mask_values: tuple[int, ...] | None = option(None, "label value of class 0, 1, ...: 0,128,255")
    crop_size: int = option(256, "side of a training crop", above=0, at_most=8192, multiple_of=32)

    # model
    backbone: str = option("resnet50", "encoder; --list shows them all")
    fusion: str = option("concat", "of both dates: concat, diff, concat_diff, cross_attention")
    weights: str = option("imagenet", "of the encoder: imagenet, none or a file")
    freeze_backbone: bool | None = option(None, "keep the encoder fixed; yes if it is pretrained")

    # loss
    loss: str = option("bce_iou", "bce_iou, ce, dice, focal, or a sum such as bce_iou+focal")
    class_weights: str = option("none", "of cross-entropies; balanced = rare classes more", choices=("none", "balanced"))  # noqa: E501
    bce_weight: float = option(1.0, "of bce_iou: factor of the cross-entropy", at_least=0)
    iou_weight: float = option(1.0, "of bce_iou: factor of 1 - soft IoU", at_least=0)

    # training
    epochs: int = option(30, "passes over the training split", above=0, resumable=True)
    batch_size: int = option(8, "pairs in a step, of all processes together", short="-b", above=0)
    lr: float = option(1e-3, "peak learning rate; a pretrained encoder takes a tenth", above=0)
    weight_decay: float = option(1e-2, "of AdamW", at_least=0)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up before the cosine", at_least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 = no limit", at_least=0)
    accumulate: int = option(1, "batches per update", above=0)
    seed: int = option(0, "of weights, order and augmentation", at_least=0, at_most=2**63 - 1)

    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", resumable=True)
    amp: str = option("auto", "precision; auto = bf16 where it pays", choices=("auto", "off", "bf16", "fp16"), resumable=True)  # noqa: E501
    compile: bool = option(False, "compile the model; pays on a GPU", resumable=True)
    cache: str = option("auto", "of decoded pairs: in a file, in memory, or none; auto = where there is room", choices=("auto", "ram", "disk", "none"), resumable=True)  # noqa: E501
    workers: int | None = option(None, "loader processes of each process", short="-j", at_least=0, at_most=1024, resumable=True)  # noqa: E501

    # run
    name: str | None = option(None, "of the run's folder; else date and backbone", resumable=True)
    output_dir: str | None = option(None, "folder of the runs; else runs/", resumable=True)
    resume: str | None = option(None, "auto (the newest run; with --name that one, begun if need be), a run's folder or a last.pt", bare="auto", resumable=True)  # noqa: E501
    save_every: str = option("10m", "within an epoch: a time (90s, 10m, 1h) or a number of updates", resumable=True)  # noqa: E501
    draw_every: int = option(5, "epochs between pictures", above=0, resumable=True)
    mlflow: bool = option(True, "log to MLflow as well", resumable=True)
    # fmt: on


if __name__ == "__main__":  # before the imports below, which take seconds
    SWITCHES = {"list": "show the backbones, fusions and losses that there are, and exit"}
    GIVEN = cli.parse(Config, switches=SWITCHES, description=__doc__)

import torch

from losses import build_loss, check_loss
from model import build_model, check_names, count_parameters
from networks.encoders import TIMM
from networks.weights import check_source, load_weights
from pairs.download import fetch_dataset
from pairs.labels import MaskCoding, choose_classes
from pairs.layouts import find_pairs
from pairs.synthetic.sample_set import choose_data, is_sample
from runtime.checkpoint import restore, versions
from runtime.devices import (
    Precision,
    describe,
    explain_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_precision,
)
from runtime.distributed import (
    agree,
    from_rank_0,
    in_turn,
    is_restarted,
    launch_id,
    local_rank,
    parallel,
    rank,
    run,
    world_size,
)
from runtime.errors import DataFault, Interrupted, StopRequest, UserError
from runtime.files import write_json
from runtime.sync_batch_norm import synchronize
from runtime.tracking import Tracker
from training.catalogue import catalogue
from training.engine import (
    Learner,
    Progress,
    build_optimizer,
    check_finite,
    evaluate,
    learn_epoch,
    warmup_cosine,
)
from training.recipe import recipe_without_weights
from training.recorder import PICTURE, Recorder, SaveEvery
from training.run_folder import (
    OPTIONS,
    check_name,
    claimed,
    find_checkpoint,
    find_launch,
    new_run_folder,
    read_options,
    sweep,
)
from training.splits import Data, open_data


def train(given: dict[str, Any]) -> dict[str, float]:
    """Train from the options that a command line gives.

    Returns:
        The epoch and scores of the best epoch on the validation split.

    Raises:
        UserError: anything the user can mend.
        Interrupted: by a signal, after saving.
    """
    with ExitStack() as held:  # the lock of the run's folder, from before it is read
        config, last, state = from_rank_0(lambda: choose_options(given, held))
        return train_run(given, config, last, state, held)


def train_run(
    given: dict[str, Any],
    config: Config,
    last: Path | None,
    state: dict[str, Any] | None,
    held: ExitStack,
) -> dict[str, float]:
    """Train as `train` says, with what `choose_options` returned."""
    device = pick_device(config.device, local_rank())
    amp = pick_precision(config.amp, device)
    keep_freed_memory()

    with in_turn():
        if config.download:
            folder = fetch_dataset(Path(config.data_dir or ROOT / "data" / "LEVIR-CD"))
            config = replace(config, data_dir=str(folder), download=False)
        root = config.data_dir or choose_data(ROOT / "data", config.task, config.num_classes)
        layout = find_pairs(root, config.task)
    on_sample = is_sample(layout.root)
    if on_sample and not state and config.weights == "imagenet" and "weights" not in given:
        recipe = from_rank_0(lambda: recipe_without_weights(config.backbone, given))
        config = replace(config, **recipe)
    classes = choose_classes(
        layout.root,
        task=config.task,
        num_classes=config.num_classes,
        mask_values=config.mask_values,
    )
    config = replace(config, num_classes=classes.num_classes)
    with in_turn():
        data = open_data(
            layout,
            classes,
            cache=config.cache,
            cache_dir=ROOT / "data" / "cache",
            crop_size=config.crop_size,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            workers=config.workers,
            seed=config.seed,
            device=device,
        )
    learner = build(config, state, device, amp, data)
    progress = learner.progress
    confusion = data.confusion(device)
    best: dict[str, Any] = {"epoch": 0, "change_iou": -1.0, confusion.headline: -1.0}

    # ---- the run's folder, or the point where it stopped
    if last and state:
        if state["data"]["fingerprint"] != data.checked.fingerprint:
            raise UserError(
                f"{last}: was trained on other images or labels than {layout.root} holds now; give "
                "their folder by --data-dir, or begin a new run without --resume"
            )
        check_classes(state["data"], data.checked.coding, last)
        restore(learner.parts(), state, last)
        best = {**best, **state["best"]}
        if progress.epoch >= config.epochs:
            raise UserError(f"{last}: all {config.epochs} epochs are done; --epochs N adds more")
    run_dir = from_rank_0(lambda: open_run(config, last, held))
    learning, total = count_parameters(learner.model)
    print(
        f"model   {config.backbone}, {config.fusion}: {learning / 1e6:.1f} M of "
        f"{total / 1e6:.1f} M parameters learn; weights: {learner.weights}\n"
        f"device  {describe(device)}, {amp if learner.precision.dtype else 'float32'}, "
        f"{data.train.num_workers} workers"
        f"{f', each of {world_size()} processes' if world_size() > 1 else ''}\n"
        f"run     {run_dir}",
        flush=True,
    )
    set_name = "synthetic sample" if on_sample else layout.root.name
    options = cli.as_dict(config)
    tracker = None
    if rank() == 0:
        tracker = Tracker(
            run_dir,
            config=options,
            tags={"dataset": set_name, "weights": learner.weights},
            store=ROOT,
            use_mlflow=config.mlflow,
            first_step=progress.epoch + 1 if last else 0,
            mlflow_run_id=state.get("mlflow_run_id") if state else None,
        )
    about = {
        "model_kwargs": learner.model_kwargs,
        "config": options,
        "weights": learner.weights,
        "data": data.about(),
    }
    recorder = Recorder(
        run_dir,
        tracker,
        about=about,
        val_set=data.val.dataset,
        picture=ROOT / "images" / PICTURE,
        is_sample=on_sample,
    )
    with StopRequest(is_silent=rank() > 0) as stop, recorder:
        recorder.log_datasets(
            set_name,
            digest=data.checked.fingerprint,
            source=str(layout.root),
            num_pairs={split: found.pairs for split, found in data.checked.splits.items()},
        )
        if not state:  # from here on there is always a checkpoint, and room for the next
            recorder.save("last.pt", learner.parts(), best)
        best = fit(config, learner, data, recorder, best, stop)
        recorder.finish(device, best, config.epochs)
    print(recorder.summary(best, store=ROOT))
    return best


def fit(
    config: Config,
    learner: Learner,
    data: Data,
    recorder: Recorder,
    best: dict[str, Any],
    stop: StopRequest,
) -> dict[str, Any]:
    """Train the epochs that are left, saving what a run needs to go on.

    Returns:
        The epoch and scores of the best epoch, which is in best.pt.

    Raises:
        UserError: a file of the data went or changed, after saving.
        Interrupted: by a signal, after saving.
    """
    progress = learner.progress
    confusion = data.confusion(progress.device)
    save_every = SaveEvery(config.save_every)
    resume = f"go on with: python main.py --resume '{recorder.run_dir}'"

    def save() -> Path:
        check_finite(progress)
        return recorder.save("last.pt", learner.parts(), best)

    def save_in_time(*, is_time: bool) -> None:
        """Save if it is time to, or if a signal asks to leave; all processes together."""
        signal_number, is_time_for_one = agree(stop.signal_number, is_time)
        if not signal_number and not is_time_for_one:
            return
        path = save()
        save_every.restart()
        if signal_number:
            raise Interrupted(f"saved {path}\n{resume}", signal_number)

    @contextmanager
    def saved_if_data_fails() -> Iterator[None]:
        try:
            yield
        except DataFault as fault:
            if world_size() > 1:  # the others are in the middle of a step
                raise
            raise UserError(f"{fault}; saved {save()}, {resume}") from None

    with (
        saved_if_data_fails(),
        closing(data.train),
        closing(data.val),
        explain_out_of_memory(config.batch_size, config.crop_size),
    ):
        while progress.epoch < config.epochs:
            epoch = progress.epoch + 1
            on_train, speed, waiting = learn_epoch(
                learner,
                data.train,
                title=f"epoch {epoch}/{config.epochs}",
                batch_size=config.batch_size,
                accumulate=config.accumulate,
                clip_norm=config.clip_grad,
                after_update=lambda: save_in_time(is_time=save_every.after_update()),
            )
            on_val, histogram = evaluate(
                learner.model,
                learner.criterion,
                data.val,
                confusion=confusion,
                precision=learner.precision,
            )
            is_best = on_val[confusion.headline] > best[confusion.headline]
            name = confusion.headline.replace("_", " ").replace("iou", "IoU")
            score = f"{name} {on_val[confusion.headline]:.3f}  "
            headline = "" if confusion.headline == "change_iou" else score
            print(
                f"epoch {epoch:3}/{config.epochs}  loss {on_train['loss']:.3f}  "
                f"val: loss {on_val['loss']:.3f}  change IoU {on_val['change_iou']:.3f}  "
                f"change Dice {on_val['change_dice']:.3f}  mean Dice {on_val['mean_dice']:.3f}  "
                f"{headline}{speed:.1f} pairs/s, {waiting:.0%} waiting for data"
                f"{'  best' if is_best else ''}",
                flush=True,
            )
            recorder.log_epoch(
                epoch,
                on_train,
                on_val,
                histogram,
                lr=float(learner.scheduler.get_last_lr()[0]),
                pairs_per_second=speed,
                data_wait_share=waiting,
            )
            if epoch % config.draw_every == 0:
                recorder.draw(learner.model, epoch, on_val["change_iou"])
            progress.start(epoch)
            if is_best:
                best = {"epoch": epoch, **on_val}
                recorder.draw_matrix(confusion, epoch)
                recorder.save("best.pt", {"model": learner.model}, best)
            save_in_time(is_time=True)
    return best


def choose_options(
    given: dict[str, Any], held: ExitStack
) -> tuple[Config, Path | None, dict[str, Any] | None]:
    """Return the options, and of a run to go on with the checkpoint's path and content.

    Such a run is claimed until `held` ends.

    A run that was killed before its first checkpoint has a path without content. A process that
    torchrun has started again goes on with the run that it began.

    Raises:
        UserError: an unknown name, a file that is not there, or an option that may not change.
    """
    config, last, state = Config(**given), None, None
    runs = Path(config.output_dir or ROOT / "runs")
    if is_restarted() and (own := find_launch(launch_id(), runs)):
        given = {**given, "resume": str(own)}
        config = Config(**given)
    begins = config.resume == "auto" and config.name and not (runs / config.name).exists()
    if config.resume and not begins:
        last, state = find_checkpoint(
            config.resume, runs, config.name, lambda folder: held.enter_context(claimed(folder))
        )
        saved = cli.from_dict(Config, state["config"] if state else read_options(last.parent))
        config = replace(saved, **given)
        if changed := cli.differences(saved, config):
            raise UserError(f"{last}: a resumed run keeps its options; {'; '.join(changed)}")
    check_names(config.task, config.backbone, config.fusion)
    check_loss(config.loss, config.class_weights, config.task)
    SaveEvery(config.save_every)
    if not state:
        check_source(config.weights)
        check_name(config.name)
    return config, last, state


def check_classes(saved: dict[str, Any], coding: MaskCoding, last: Path) -> None:
    """Raise UserError if classes are no longer what a run has learned."""
    learned = (list(saved.get("class_names") or coding.names), list(saved["mask_values"]))
    now = (list(coding.names), list(coding.values))
    if learned != now:
        before, after = (
            ", ".join(f"{name} {value}" for name, value in zip(*classes, strict=False))
            for classes in (learned, now)
        )
        raise UserError(f"{last}: its classes were {before}; now they are {after} (classes.json)")


def open_run(config: Config, last: Path | None, held: ExitStack) -> Path:
    """Return the folder of a run, made if it is new, in which config.json says how it goes on."""
    options = {**cli.as_dict(config), "versions": versions(), "launch": launch_id()}
    if last:
        sweep(last.parent)
        write_json(last.parent / OPTIONS, options)
        return last.parent
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.backbone}"
    folder = new_run_folder(Path(config.output_dir or ROOT / "runs"), name, options)
    held.enter_context(claimed(folder))
    return folder


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
    }
    model = build_model(**architecture, freeze_backbone=False)
    # the other processes get them from rank 0, in `parallel`
    weights = from_rank_0(
        lambda: (
            state["weights"]
            if state
            else load_weights(model.encoder, config.backbone, config.weights)
        )
    )
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
    return Learner(
        model=model,
        in_training=parallel(model, device, has_idle_weights=config.backbone.startswith(TIMM)),
        model_kwargs={**architecture, "freeze_backbone": model.encoder.frozen},
        weights=weights,
        criterion=build_loss(
            config.loss,
            task=config.task,
            bce_weight=config.bce_weight,
            iou_weight=config.iou_weight,
            class_weights=data.balanced_weights() if config.class_weights == "balanced" else None,
        ).to(device),
        optimizer=optimizer,
        scheduler=scheduler,
        precision=Precision.named(amp, device),
        progress=Progress(data.confusion(device)),
    )


if __name__ == "__main__":
    sys.exit(run(lambda: print(catalogue()) if GIVEN.pop("list", False) else train(GIVEN)))
