import csv
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_helpers import picture, save, save_tree
from PIL import Image
from test_predict import checkpoint_of, geo_pair
from torch import Tensor, nn

import evaluate
import main
import predict
from dataset import EpochSampler
from main import train
from metrics import Confusion
from runtime import distributed
from runtime.checkpoint import read_checkpoint
from runtime.devices import Precision
from runtime.sync_batch_norm import SyncBatchNorm, synchronize
from training.engine import Progress, train_one_epoch
from training.step import Step

SCRIPT = Path(main.__file__)
OPTIONS: dict[str, Any] = {
    "backbone": "resnet18",
    "weights": "none",
    "crop_size": 64,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "amp": "off",
    "cache": "none",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return save_tree(tmp_path / "levir", train=7, val=3, size=(64, 64))


def launch(tmp_path: Path, *words: str, restarts: int = 0) -> subprocess.Popen:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    return torchrun(SCRIPT, *options, f"--data-dir={tmp_path / 'levir'}",
                    f"--output-dir={tmp_path / 'runs'}", "--no-mlflow", "--name=a", *words,
                    restarts=restarts)  # fmt: skip


def torchrun(script: Path, *words: object, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", f"--max-restarts={restarts}", script, *words]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def end(run: subprocess.Popen, timeout: float = 120) -> tuple[str, str]:
    try:
        return run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        out, errors = run.communicate()
        raise AssertionError(f"hangs:\n{out}\n{errors}") from None


def wait_for(run: subprocess.Popen, text: str) -> None:
    assert run.stdout is not None
    for line in run.stdout:
        if text in line:
            return
    raise AssertionError(f"ended before {text!r}:\n{run.stderr.read() if run.stderr else ''}")


def ranks_of(launcher: subprocess.Popen, script: Path = SCRIPT) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    scripts = [
        child for child in children
        if str(script) in Path(f"/proc/{child}/cmdline").read_text()
    ]  # fmt: skip
    return sorted(map(int, scripts))


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        table = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    for row in table:
        del row["pairs_per_second"], row["data_wait_share"]
    return table


def alone(tree: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Train in this process, as the launched ones do."""
    monkeypatch.setattr(main, "ROOT", tree.parent)
    train({**OPTIONS, "data_dir": str(tree), "mlflow": False, **more})


@pytest.mark.slow
@pytest.mark.fault("P1", "P2", "P6")
def test_two_processes_train_as_one(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # AdamW turns a gradient's rounding into a step of the learning rate's size: so a small one
    run = launch(tmp_path, "--epochs=2", "--accumulate=2", "--batch-size=3", "--lr=1e-4")
    alone(tree, monkeypatch, epochs=2, accumulate=2, batch_size=3, lr=1e-4, name="one")
    out, errors = end(run)
    assert run.returncode == 0, errors
    assert out.count("epoch   1/2") == out.count("best epoch") == 1
    runs = tmp_path / "runs"
    assert len(list((runs / "a").glob("*tfevents*"))) == 1
    for two, one in zip(rows(runs / "a"), rows(runs / "one"), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-5)
        assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-5)
        scores = {k for k in one if k.startswith("val/") and k != "val/loss"}
        assert {k: two[k] for k in scores} == {k: one[k] for k in scores}
    first, second = (read_checkpoint(runs / name / "last.pt") for name in ("a", "one"))
    assert first["model"].keys() == second["model"].keys()  # plain names
    for key, value in first["model"].items():
        other = second["model"][key]
        # of a gradient near 0, rounding decides the sign, and so two steps of 1e-4 each; the test
        # of the same weights, in float64, is the exact one
        torch.testing.assert_close(value, other, rtol=1e-2, atol=5e-4)


@pytest.mark.fault("P2", "P5")
@pytest.mark.parametrize(("num_samples", "batch_size"), [(7, 4), (8, 3), (1, 8), (5, 16)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_sample_is_lost_or_seen_twice(
    shuffle: bool, num_samples: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(rank: int, size: int) -> list[list[tuple[int, int]]]:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)
        monkeypatch.setattr("dataset.world_size", lambda: size)
        sampler = EpochSampler(num_samples, batch_size, shuffle=shuffle, seed=3)
        sampler.set_epoch(2)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    whole = batches(0, 1)
    for size in (2, 3):
        parts = [batches(rank, size) for rank in range(size)]
        if shuffle:
            assert [list(chain(*shares)) for shares in zip(*parts, strict=True)] == whole
        else:
            assert list(chain(*chain(*parts))) == list(chain(*whole))


def in_two_processes(work: Callable[[int], None], folder: Path) -> None:
    torch.multiprocessing.spawn(_join, (work, folder), nprocs=2)


def _join(rank: int, work: Callable[[int], None], folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(rank)
    distributed.wait_for_all()
    dist.destroy_process_group()


class Tiny(nn.Module):
    """A network with a BatchNorm, in float64, where rounding cannot be taken for a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)
        )

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.layers(torch.cat([before, after], dim=1))


class MeanOverImages(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), (target == 1).double())


def learn(folder: Path, rank: int) -> None:
    """Two epochs of 5 batches of 3 pairs, by updates of 2, 2 and 1 batches; batches fall 1 to 2."""
    torch.manual_seed(0)
    samples = [
        (*torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.randint(0, 2, (8, 8)).byte())
        for _ in range(15)
    ]
    torch.manual_seed(rank)  # the weights of rank 0 count
    model = Tiny().double()
    synchronize(model)
    device = torch.device("cpu")
    ddp_model = distributed.parallel(model, device, has_idle_weights=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=True)
    progress = Progress(Confusion(1))
    sampler = EpochSampler(15, 3, shuffle=True, seed=0)
    for epoch in range(2):
        progress.start(epoch)
        sampler.set_epoch(epoch)
        drawn = [[samples[index] for _, index in keys] for keys in sampler]
        batches: Any = [tuple(map(torch.stack, zip(*pairs, strict=True))) for pairs in drawn]
        summary = train_one_epoch(
            Step(ddp_model, MeanOverImages(), Precision.named("off", device)), batches, optimizer,
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), progress,
            num_batches=5, batch_size=3, accumulate=2,
        )  # fmt: skip
    kind = "one" if distributed.world_size() == 1 else f"two-{rank}"
    torch.save((model.state_dict(), summary), folder / f"{kind}.pt")


@pytest.mark.slow
@pytest.mark.fault("P1", "P5")
def test_two_processes_learn_the_same_weights(tmp_path: Path) -> None:
    learn(tmp_path, rank=0)
    in_two_processes(functools.partial(learn, tmp_path), tmp_path)
    weights, scores = torch.load(tmp_path / "one.pt")
    for rank in (0, 1):
        same_weights, same_scores = torch.load(tmp_path / f"two-{rank}.pt")
        torch.testing.assert_close(same_weights, weights, rtol=1e-12, atol=1e-12)
        assert same_scores.pop("loss") == pytest.approx(scores["loss"], rel=1e-6)  # of float32
        assert same_scores == {key: value for key, value in scores.items() if key != "loss"}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(7, 5, 6, 4, generator=generator) + 10
    return x, torch.randn(7, 5, 6, 4, generator=generator)


def normalize(x: Tensor, gradient: Tensor) -> tuple[Tensor, nn.BatchNorm2d]:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight)
    synchronize(norm)
    x.requires_grad_()
    y = norm(x)
    y.backward(gradient)
    assert x.grad is not None
    return torch.stack([y.detach(), x.grad]), norm


def normalize_part(folder: Path, rank: int) -> None:
    parts, norm = normalize(*(t.split([4, 3])[rank] for t in batch()))
    assert type(norm) is SyncBatchNorm
    gradients = torch.stack([p.grad for p in norm.parameters() if p.grad is not None])
    torch.save((parts, gradients, norm.state_dict()), folder / f"{rank}.pt")


@pytest.mark.slow
def test_batch_norm_of_two_parts_is_that_of_the_whole(tmp_path: Path) -> None:
    in_two_processes(functools.partial(normalize_part, tmp_path), tmp_path)
    (one, grads, state), (two, more, same) = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    whole, norm = normalize(*batch())
    assert type(norm) is nn.BatchNorm2d  # one process keeps torch's own
    torch.testing.assert_close(torch.cat([one, two], dim=1), whole, rtol=1e-5, atol=2e-6)
    expected = torch.stack([p.grad for p in norm.parameters() if p.grad is not None])
    torch.testing.assert_close(grads + more, expected, rtol=1e-5, atol=1e-5)
    for key, value in norm.state_dict().items():
        assert torch.equal(state[key], same[key])
        torch.testing.assert_close(state[key], value)


@pytest.mark.slow
@pytest.mark.fault("P3")
def test_the_others_end_when_one_is_killed(tree: Path, tmp_path: Path) -> None:
    run = launch(tmp_path, "--epochs=500")
    wait_for(run, "epoch   1/")
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    _, errors = end(run, timeout=40)
    assert run.returncode == 1
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and "lost another process" in ours[0]
    read_checkpoint(tmp_path / "runs" / "a" / "last.pt")


@pytest.mark.slow
@pytest.mark.fault("P3")
def test_torchrun_starts_it_again_and_it_goes_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch(tmp_path, "--epochs=4", restarts=1)
    wait_for(run, "epoch   2/")
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    _, errors = end(run)
    assert run.returncode == 0, errors
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()] == ["a"]
    assert [row["step"] for row in rows(tmp_path / "runs" / "a")] == [1, 2, 3, 4]
    straight = launch(tmp_path, "--epochs=4", "--name=straight")
    end(straight)
    assert rows(tmp_path / "runs" / "a") == rows(tmp_path / "runs" / "straight")


@pytest.mark.slow
@pytest.mark.fault("P7", "P8")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_one_process_goes_on(
    number: signal.Signals, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch(tmp_path, "--epochs=500")
    wait_for(run, "epoch   2/")
    for process in [*ranks_of(run), run.pid]:  # as a terminal does; torchrun repeats it
        os.kill(process, number)
    _, errors = end(run, timeout=60)
    assert errors.count("go on with: python main.py --resume") == 1
    assert errors.count("stopping after this step") == 1
    state = read_checkpoint(tmp_path / "runs" / "a" / "last.pt")
    epoch = state["progress"]["epoch"]
    assert epoch >= 2
    monkeypatch.setattr(main, "ROOT", tmp_path)
    train({"resume": str(tmp_path / "runs" / "a"), "epochs": epoch + 1})
    straight = {**OPTIONS, "data_dir": str(tree), "mlflow": False, "epochs": 500, "name": "one"}
    assert state["config"]["batch_size"] == straight["batch_size"]
    assert [row["step"] for row in rows(tmp_path / "runs" / "a")] == list(range(1, epoch + 2))


@pytest.mark.slow
@pytest.mark.fault("P4", "P5")
def test_a_validation_split_smaller_than_the_processes(tmp_path: Path) -> None:
    save_tree(tmp_path / "levir", train=3, val=1, size=(64, 64))
    run = launch(tmp_path, "--epochs=1", "--cache=disk")
    _, errors = end(run)
    assert run.returncode == 0, errors
    assert len(rows(tmp_path / "runs" / "a")) == 1


@pytest.mark.slow
@pytest.mark.fault("P3")
def test_a_mistake_is_one_line_of_one_process(tree: Path, tmp_path: Path) -> None:
    run = launch(tmp_path, "--batch-size=1")
    _, errors = end(run)
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert ours == ["error: 1 pair a batch: too few for 2 processes"]


@pytest.mark.slow
@pytest.mark.fault("P1", "P2", "P6")
def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    save_tree(tmp_path / "levir", size=(270, 100), train=1, val=3, test=5)
    checkpoint = checkpoint_of(tmp_path / "best.pt")
    given: dict[str, Any] = {
        **{key: OPTIONS[key] for key in ("amp", "device", "cache", "workers")},
        "data_dir": str(tmp_path / "levir"), "window": 128, "overlap": 32,
    }  # fmt: skip
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    run = torchrun(Path(evaluate.__file__), checkpoint, *words, "--no-mlflow", "--robustness",
                   "--json", "-o", tmp_path / "two")  # fmt: skip
    evaluate.evaluate({"checkpoints": (str(checkpoint),), "output_dir": str(tmp_path / "one"),
                       "mlflow": False, "robustness": True, **given})  # fmt: skip
    out, errors = end(run)
    assert run.returncode == 0, errors
    assert errors.count("device  cpu") == 1 and "each of 2 processes" in errors
    assert out == (tmp_path / "two" / "scores.json").read_text()
    files = {path.name for path in (tmp_path / "one").iterdir() if "tfevents" not in path.name}
    assert {p.name for p in (tmp_path / "two").iterdir() if "tfevents" not in p.name} == files
    for name in files:
        one, two = ((tmp_path / kind / name).read_bytes() for kind in ("one", "two"))
        assert one == two, name
    assert {p.name for p in tmp_path.iterdir()} == {"levir", "best.pt", "one", "two"}


PREDICTION: dict[str, Any] = {"window": 64, "overlap": 16, "batch_size": 2, "amp": "off",
                              "device": "cpu"}  # fmt: skip


def predicting(*paths: Path) -> subprocess.Popen:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in PREDICTION.items()]
    return torchrun(Path(predict.__file__), *options, *paths[:3], "-o", paths[3])


def predict_alone(*paths: Path) -> None:
    names = ("checkpoint", "before", "after", "output_dir")
    predict.predict({**dict(zip(names, map(str, paths), strict=True)), **PREDICTION})


def assert_same_maps(one: Path, two: Path) -> None:
    """Masks are equal where the probability is not at the threshold, which rounding decides."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in (p for p in one.glob("*_probability.*") if p.suffix in (".png", ".tif")):
        mask = path.with_name(path.name.replace("probability", "mask"))
        steps, other, classes, others = (
            np.asarray(Image.open(folder / name.name)).astype(int)
            for name in (path, mask) for folder in (one, two)
        )  # fmt: skip
        assert np.abs(steps - other).max() <= 1 and steps.std() > 0
        assert np.array_equal(classes[steps != 127], others[steps != 127])


@pytest.mark.slow
@pytest.mark.fault("P1", "P6", "U4")
def test_two_processes_map_one_scene_as_one(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "best.pt")
    files = geo_pair(tmp_path, 150, 200)
    run = predicting(checkpoint, *files, tmp_path / "two")
    predict_alone(checkpoint, *files, tmp_path / "one")
    out, errors = end(run)
    assert run.returncode == 0, errors
    assert out.count("threshold 0.5") == out.count("200 x 150") == 1
    assert_same_maps(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.fault("P1", "P2", "P5", "P6")
def test_two_processes_map_three_scenes_as_one(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "best.pt")
    for number, name in enumerate("abc"):  # c is left over, and narrower than two windows
        size = (200, 50) if name == "c" else (70, 130)
        for folder in ("A", "B"):
            pixels = picture(10 * number + (folder == "B"), *size)
            save(tmp_path / folder / f"{name}.png", pixels)
    run = predicting(checkpoint, tmp_path / "A", tmp_path / "B", tmp_path / "two")
    predict_alone(checkpoint, tmp_path / "A", tmp_path / "B", tmp_path / "one")
    out, errors = end(run)
    assert run.returncode == 0, errors
    lines = [line for line in out.splitlines() if "changed" in line]
    assert [Path(line.partition("_*")[0]).name for line in lines] == ["a", "b", "c"]
    assert_same_maps(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.fault("P3", "U4")
@pytest.mark.parametrize("name", ["b", "c"])  # one process reads b, both read c
def test_a_broken_scene_costs_none_of_the_others(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "best.pt")
    for folder in ("A", "B"):
        for stem in "abc":
            save(tmp_path / folder / f"{stem}.png", picture(1, 70, 130))
    whole = tmp_path / "B" / f"{name}.png"
    whole.write_bytes(whole.read_bytes()[:5000])  # the header is fine
    run = predicting(checkpoint, tmp_path / "A", tmp_path / "B", tmp_path / "out")
    _, errors = end(run, timeout=60)
    assert run.returncode == 1
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and "mapped: 2 scenes; with faults: 1" in ours[0]
    assert str(whole) in errors and "exitcode  : 2" in errors
    written = {path.name[0] for path in (tmp_path / "out").iterdir()}
    assert written == {"a", "b", "c"} - {name}


@pytest.mark.slow
@pytest.mark.fault("P7", "U4")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_shared_scene(number: signal.Signals, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "best.pt")
    files = [save(tmp_path / f"{i}.png", picture(i, 4000, 2000)) for i in (1, 2)]
    run = predicting(checkpoint, *files, tmp_path / "out")
    wait_for(run, "threshold 0.5")
    while not list(tmp_path.glob("out/.unfinished-*/")):
        time.sleep(0.1)
    for process in [*ranks_of(run, Path(predict.__file__)), run.pid]:
        os.kill(process, number)
    _, errors = end(run, timeout=60)
    assert errors.count("stopped after 0 of 1 scenes") == 1
    assert errors.count("stopping after this step") == 1
    assert list((tmp_path / "out").iterdir()) == []
