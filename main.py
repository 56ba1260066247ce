"""Train a change detector on pairs of images: `python main.py`, `python main.py --help`.

Every knob is an `option` below. Without a dataset under data/ it makes a small synthetic one and
trains on that. A run lives in runs/<name>/ and can be resumed: `python main.py --resume`.
"""

import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import config as cli
from config import option
from errors import Interrupted, StopRequest, UserError, run_script

ROOT = Path(__file__).resolve().parent
PICTURE = ROOT / "images" / "validation_predictions.png"
SAMPLE_LABEL = "SYNTHETIC SAMPLE DATA"
PATCH_SIZE = 256  # of the validation grid, as the literature has it
# The sample run without ImageNet weights: what a CPU can teach a network from scratch in minutes
FROM_SCRATCH: dict[str, Any] = {
    "weights": "none",
    "backbone": "resnet18",
    "crop_size": 128,
    "batch_size": 4,
    "freeze_backbone": False,
    "lr": 2e-3,
}


@dataclass(frozen=True)
class Config:
    """The options of a run; `Config()` is a good one."""

    # fmt: off
    # data
    data_dir: str | None = option(None, "folder of the dataset; else data/, else a sample set is made", aliases=["--data-path"], resumable=True)  # noqa: E501
    num_classes: int = option(1, "1 = change; 3 = none, road, building; K", at_least=1, at_most=255)
    mask_values: tuple[int, ...] | None = option(None, "label value of class 0, 1, ...: 0,128,255")
    crop_size: int = option(256, "side of a training crop", above=0, multiple_of=32)

    # model
    backbone: str = option("resnet50", "encoder")
    fusion: str = option("concat", "how the features of both dates become one")
    weights: str = option("imagenet", "of the encoder: imagenet, none or a file")
    freeze_backbone: bool | None = option(None, "keep the encoder fixed; yes if it is pretrained")

    # loss
    bce_weight: float = option(1.0, "factor of the cross-entropy", at_least=0)
    iou_weight: float = option(1.0, "factor of 1 - soft IoU", at_least=0)

    # training
    epochs: int = option(30, "passes over the training split", above=0, resumable=True)
    batch_size: int = option(8, "pairs in a step", short="-b", above=0)
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
    workers: int | None = option(None, "loader processes", short="-j", at_least=0, resumable=True)

    # run
    name: str | None = option(None, "of the run's folder; else date and backbone", resumable=True)
    output_dir: str | None = option(None, "folder of the runs; else runs/", resumable=True)
    resume: str | None = option(None, "auto (the newest run), a run's folder or a last.pt", bare="auto", resumable=True)  # noqa: E501
    draw_every: int = option(5, "epochs between pictures", above=0, resumable=True)
    mlflow: bool = option(True, "log to MLflow as well", resumable=True)
    # fmt: on


def train(given: dict[str, Any]) -> dict[str, float]:
    """Train from the options that a command line gives.

    Returns:
        The epoch and scores of the best epoch on the validation split.

    Raises:
        UserError: anything the user can mend.
        Interrupted: by a signal, after saving.
    """
    # imported here, so that --help answers before the seconds that torch takes
    import torch
    from tqdm import tqdm

    from checkpoint import load_model, restore, save_checkpoint, versions
    from data_check import check
    from dataset import ChangeDataset, make_loader
    from engine import Precision, Progress, check_finite, evaluate, train_one_epoch
    from hardware import (
        default_workers,
        describe,
        explain_out_of_memory,
        keep_freed_memory,
        pick_device,
        pick_precision,
    )
    from layouts import find_pairs
    from losses import build_loss
    from model import build_model, check_names, count_parameters
    from optimizer import build_optimizer, warmup_cosine
    from pretrained import check_source, load_weights
    from run_folder import check_name, find_checkpoint, new_run_folder, write_json
    from sample_data import MARKER
    from sources import open_source
    from tracking import Tracker
    from transforms import Augment
    from visualize import plot_predictions, save_figure

    # ---- options, of a new run or of the one to go on with
    config, state = Config(**given), None
    output_dir = Path(config.output_dir or ROOT / "runs")
    if config.resume:
        path, state = find_checkpoint(config.resume, output_dir, config.name)
        saved = cli.from_dict(Config, state["config"])
        config, run_dir = replace(saved, **given), path.parent
        if changed := cli.differences(saved, config):
            raise UserError(f"{path}: a resumed run keeps its options; {'; '.join(changed)}")
    check_names(config.backbone, config.fusion)
    if not state:
        check_source(config.weights)
        check_name(config.name)
    device = pick_device(config.device)
    amp = pick_precision(config.amp, device)
    workers = default_workers() if config.workers is None else config.workers
    keep_freed_memory()

    # ---- data
    data_dir = choose_data(config)
    layout, cache_dir = find_pairs(data_dir), ROOT / "data" / "cache"
    is_sample = (layout.root / MARKER).is_file()
    if is_sample and not state:
        config = without_missing_weights(config, given)
    data = check(
        layout,
        num_classes=config.num_classes,
        mask_values=config.mask_values,
        crop_size=PATCH_SIZE,
        memo=cache_dir / "checked.json",
    )
    print(f"data    {data_dir} ({layout.description})\n{data.table()}")
    for warning in data.warnings:
        print(f"warning: {warning}")
    train_set, val_set = (
        ChangeDataset(
            open_source(layout.splits[split], data.coding, cache=config.cache, folder=cache_dir),
            crop_size=crop_size,
            augment=augment,
            seed=config.seed,
        )
        for split, crop_size, augment in (
            ("train", config.crop_size, Augment()),
            ("val", PATCH_SIZE, None),
        )
    )
    train_loader, val_loader = (
        make_loader(
            dataset,
            config.batch_size,
            shuffle=dataset is train_set,
            seed=config.seed,
            num_workers=workers,
            device=device,
        )
        for dataset in (train_set, val_set)
    )

    # ---- model, loss, optimizer
    if min(config.batch_size, len(train_set)) == 1 and config.crop_size == 32:
        raise UserError("--crop-size 32 with one pair in a batch: BatchNorm needs more; try 64")
    torch.manual_seed(config.seed)
    architecture: dict[str, Any] = {
        "backbone": config.backbone,
        "fusion": config.fusion,
        "num_classes": config.num_classes,
    }
    model = build_model(**architecture, freeze_backbone=False)
    weights = (
        state["weights"] if state else load_weights(model.encoder, config.backbone, config.weights)
    )
    is_pretrained = not weights.startswith("none")
    if is_pretrained if config.freeze_backbone is None else config.freeze_backbone:
        model.encoder.freeze()
    model.to(device)
    criterion = build_loss(config.num_classes, config.bce_weight, config.iou_weight)
    num_batches = len(train_loader)
    num_updates = -(-num_batches // config.accumulate)
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
    precision = Precision.named(amp, device)
    progress = Progress(config.num_classes, device)
    best: dict[str, Any] = {"epoch": 0, "change_iou": -1.0}

    # ---- the run's folder, or the point where it stopped
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": precision.scaler,
        "progress": progress,
    }
    if state:
        if state["data"]["fingerprint"] != data.fingerprint:
            raise UserError(f"{path}: was trained on other data than {data_dir}; --data-dir")
        restore(parts, state, path)
        best = state["best"]
        if progress.epoch >= config.epochs:
            raise UserError(f"{path}: all {config.epochs} epochs are done; --epochs N adds more")
    else:
        name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.backbone}"
        run_dir = new_run_folder(output_dir, name)
    about = {
        "model_kwargs": {**architecture, "freeze_backbone": model.encoder.frozen},
        "config": cli.as_dict(config),
        "weights": weights,
        "data": {"fingerprint": data.fingerprint, "mask_values": list(data.coding.values)},
    }
    write_json(run_dir / "config.json", {**cli.as_dict(config), "versions": versions()})
    learning, total = count_parameters(model)
    print(
        f"model   {config.backbone}, {config.fusion}: {learning / 1e6:.1f} M of "
        f"{total / 1e6:.1f} M parameters learn; weights: {weights}\n"
        f"device  {describe(device)}, {amp if precision.dtype else 'float32'}, {workers} workers\n"
        f"run     {run_dir}",
        flush=True,
    )
    if config.compile:
        model.compile()

    tracker = Tracker(
        run_dir,
        config=cli.as_dict(config),
        tags={"dataset": "synthetic sample" if is_sample else data_dir.name, "weights": weights},
        store=ROOT,
        use_mlflow=config.mlflow,
        first_step=progress.epoch + 1 if state else 0,
        mlflow_run_id=state.get("mlflow_run_id") if state else None,
    )

    def save(file: str, kept: dict[str, Any]) -> None:
        states = {key: part.state_dict() for key, part in kept.items()}
        content = {**about, **states, "best": best, "mlflow_run_id": tracker.mlflow_run_id}
        save_checkpoint(run_dir / file, content, keep_previous="optimizer" in kept)

    def leave_if_asked() -> None:
        if stop.signal_number:
            check_finite(progress)
            save("last.pt", parts)
            raise Interrupted(
                f"saved {run_dir / 'last.pt'}\ngo on with: python main.py --resume '{run_dir}'",
                stop.signal_number,
            )

    def draw(drawn: torch.nn.Module, epoch: int, change_iou: float) -> None:
        title = f"epoch {epoch}: change IoU {change_iou:.3f} on val"
        title = f"{SAMPLE_LABEL}, {title}" if is_sample else title
        figure = plot_predictions(drawn, val_set, device, path=None, title=title)
        tracker.log_figure("validation_predictions", figure, epoch)
        for path in (run_dir / PICTURE.name, PICTURE):
            try:
                save_figure(figure, path)
            except OSError as error:  # a picture is no reason to lose a run
                print(f"warning: {path}: not drawn ({error.strerror})")

    # ---- train
    with (
        StopRequest() as stop,
        tracker,
        closing(train_loader),
        closing(val_loader),
        explain_out_of_memory(config.batch_size, config.crop_size),
    ):
        tracker.log_datasets(
            "sample" if is_sample else data_dir.name,
            digest=data.fingerprint,
            source=str(data_dir),
            num_pairs={split: summary.pairs for split, summary in data.splits.items()},
        )
        while progress.epoch < config.epochs:
            epoch, start, waited = progress.epoch + 1, time.perf_counter(), train_loader.waited
            sampler: Any = train_loader.batch_sampler
            sampler.set_epoch(progress.epoch, first_batch=progress.batch)
            num_pairs = (num_batches - progress.batch) * config.batch_size
            with tqdm(
                total=num_batches,
                initial=progress.batch,
                desc=f"epoch {epoch}/{config.epochs}",
                unit="batch",
                leave=False,
                disable=None,  # where nobody watches
            ) as bar:

                def after_update(progress: Progress, bar: tqdm = bar) -> None:
                    if bar.update(progress.batch - bar.n):  # when it was drawn anew, not each step
                        bar.set_postfix(loss=f"{progress.mean_loss():.3f}", refresh=False)
                    leave_if_asked()

                on_train = train_one_epoch(
                    model,
                    criterion,
                    train_loader,
                    optimizer,
                    scheduler,
                    progress,
                    precision=precision,
                    num_batches=num_batches,
                    accumulate=config.accumulate,
                    clip_norm=config.clip_grad,
                    after_update=after_update,
                )
            seconds = time.perf_counter() - start
            speed, waiting = num_pairs / seconds, (train_loader.waited - waited) / seconds
            on_val, histogram = evaluate(
                model,
                criterion,
                val_loader,
                num_classes=config.num_classes,
                device=device,
                precision=precision,
            )
            is_best = on_val["change_iou"] > best["change_iou"]
            print(
                f"epoch {epoch:3}/{config.epochs}  loss {on_train['loss']:.3f}  "
                f"val: loss {on_val['loss']:.3f}  change IoU {on_val['change_iou']:.3f}  "
                f"change Dice {on_val['change_dice']:.3f}  mean Dice {on_val['mean_dice']:.3f}  "
                f"{speed:.1f} pairs/s, {waiting:.0%} waiting for data"
                f"{'  best' if is_best else ''}",
                flush=True,
            )
            scores = {f"train/{key}": value for key, value in on_train.items()}
            scores |= {f"val/{key}": value for key, value in on_val.items()}
            scores |= {"lr": float(scheduler.get_last_lr()[0]), "pairs_per_second": speed}
            scores["data_wait_share"] = waiting
            tracker.log(scores, epoch)
            tracker.log_pr_curve("val/precision_recall", histogram.counts, epoch)
            if epoch % config.draw_every == 0:
                draw(model, epoch, on_val["change_iou"])
            progress.start(epoch)
            if is_best:
                best = {"epoch": epoch, **on_val}
                save("best.pt", {"model": model})
            save("last.pt", parts)
            leave_if_asked()

        # ---- the best epoch, drawn and summed up
        model = load_model(run_dir / "best.pt", device)
        draw(model, int(best["epoch"]), best["change_iou"])
        tracker.log_summary({k: v for k, v in best.items() if k != "epoch"}, config.epochs)
        tracker.log_artifact(run_dir / "best.pt")
        tracker.log_model(model)
    print(summary(best, weights, is_sample, run_dir))
    return best


def choose_data(config: Config) -> Path:
    """Return the dataset's folder; the sample set is made where none is named or in data/."""
    from sample_data import MARKER, make_sample_set

    if config.data_dir:
        return Path(config.data_dir)
    data, is_binary = ROOT / "data", config.num_classes != 3
    folder = data / ("sample" if is_binary else "sample-3-classes")
    if any(
        path.name not in ("README.md", "cache", folder.name)
        and not path.name.startswith(".")
        and not (path / MARKER).is_file()
        for path in data.glob("*")
    ):
        return data
    print(f"{SAMPLE_LABEL}: no dataset under {data}, so this run makes one in {folder}")
    return make_sample_set(folder, num_classes=1 if is_binary else 3)


def without_missing_weights(config: Config, given: dict[str, Any]) -> Config:
    """Let the sample run, and it alone, go on without ImageNet weights that cannot be had."""
    from pretrained import WeightsUnavailableError, download, imagenet_url

    if config.weights != "imagenet" or "weights" in given:
        return config
    try:
        download(imagenet_url(config.backbone))
    except WeightsUnavailableError as error:
        recipe = {name: value for name, value in FROM_SCRATCH.items() if name not in given}
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in recipe.items())
        rule = "!" * 100
        print(f"{rule}\n!! NO IMAGENET WEIGHTS: {error}")
        print(f"!! The sample run goes on FROM SCRATCH, all of it learning, with {flags}:")
        print("!! its scores are not those of a pretrained model. On real data this is an error.")
        print(rule)
        return replace(config, **recipe)
    return config


def summary(best: dict[str, float], weights: str, is_sample: bool, run_dir: Path) -> str:
    """Return the table at the end of a run."""
    from metrics import SCORE_NAMES

    lines = [f"\nbest epoch {best['epoch']:.0f}, whole validation split, threshold 0.5"]
    lines += [f"  {name:36} {best[key]:.4f}" for key, name in SCORE_NAMES.items()]
    if is_sample:
        lines.append(f"  {SAMPLE_LABEL}: these are not LEVIR-CD results")
    lines += [
        f"encoder     {weights}",
        f"checkpoint  {run_dir / 'best.pt'}",
        f"picture     {PICTURE}",
        f"curves      tensorboard --logdir {run_dir.parent}",
        f"MLflow      mlflow ui --workers 1 --backend-store-uri sqlite:///{ROOT / 'mlflow.db'}",
        "            then http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(lambda: train(cli.parse(Config, description=__doc__))))
