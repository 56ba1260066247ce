"""Broken and hostile input at every reader: a result, or an error of ours, and nothing else.

Each test draws a few dozen inputs, always the same ones; with `-m slow` some thousands. What has
failed once is kept as an `example` or as a test beside its reader.
"""

import csv
import io
import json
import logging
import signal
import socket
import string
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import mask_of, picture, save_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import main
from main import Config
from metrics import Confusion
from model import load_model
from networks.weights import read_state_dict
from pairs import fetch as fetching
from pairs.check import check
from pairs.download import unpack
from pairs.fetch import fetch
from pairs.images import read_image, read_label, read_size
from pairs.labels import Classes, LabelEncoding, choose_classes, choose_encoding
from pairs.layouts import find_pairs
from pairs.synthetic.sample_set import read_marker
from runtime import config as cli
from runtime.checkpoint import read_checkpoint, restore, save_checkpoint
from runtime.errors import UserError
from runtime.tracking import Tracker
from training.engine import Progress, build_optimizer, warmup_cosine
from training.run import open_run
from training.run_folder import find_checkpoint

PATIENCE = 60  # seconds for one input, which takes milliseconds: longer is a hang
times = pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
drawn = 0  # inputs of this session


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise AssertionError("a reader hangs")

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fuzz(strategy: st.SearchStrategy, num_inputs: int, reader: Callable[[Any], object]) -> None:
    """Give the reader so many inputs; nothing but a UserError of one line may come out."""

    def once(value: Any) -> None:
        global drawn  # noqa: PLW0603
        drawn += 1
        signal.alarm(PATIENCE)
        try:
            reader(value)
        except UserError as error:
            assert 0 < len(str(error)) < 3000
        signal.alarm(0)

    quiet = settings(
        max_examples=num_inputs,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(strategy)(once))()


# ---- what is thrown


def pieces(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with a few of them changed, cut out, repeated or put in, or the file cut off."""
    place = st.integers(0, max(0, len(content) - 1))
    change = st.one_of(
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=1)),
        st.tuples(
            st.just("set"), place,
            st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x01"]),
        ),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("cut"), place, st.integers(1, 200)),
        st.tuples(st.just("repeat"), place, st.integers(1, 200)),
        st.tuples(st.just("end"), place, st.none()),
    )  # fmt: skip

    def apply(changes: list[tuple[str, int, Any]]) -> bytes:
        out = bytearray(content)
        for kind, at, what in changes:
            if kind == "set":
                out[at : at + len(what)] = what
            elif kind == "insert":
                out[at:at] = what
            elif kind == "cut":
                del out[at : at + what]
            elif kind == "repeat":
                out[at:at] = out[at : at + what]
            else:
                del out[at:]
        return bytes(out)

    return st.lists(change, min_size=1, max_size=4).map(apply)


def damaged(*contents: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(*(pieces(content) for content in contents), st.binary(max_size=300))


def words() -> st.SearchStrategy[str]:
    return st.one_of(
        st.text(max_size=20),
        st.text(string.printable, max_size=20),
        st.sampled_from(
            ["../x.png", "/etc/passwd", "a\\b.png", "..", ".", "CON", "-1", "nan", "1e999"]
        ),
    )


def values() -> st.SearchStrategy:
    """Whatever JSON, or a checkpoint without code, can hold."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**9, 2**63, 10**400, -1, 0]),
        st.floats(),
        words(),
    )
    return st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(words(), inner, max_size=4)
        ),
        max_leaves=8,
    )


def with_change(content: Any) -> st.SearchStrategy:
    """The nested content with one of its parts replaced or missing."""

    def places(value: Any, path: tuple = ()) -> list[tuple]:
        below = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        return [path, *(p for key, part in below for p in places(part, (*path, key)))]

    def replaced(value: Any, path: tuple, new: Any) -> Any:
        if not path:
            return new
        copy = dict(value) if isinstance(value, dict) else list(value)
        if len(path) == 1 and new is KeyError:
            del copy[path[0]]
        else:
            copy[path[0]] = replaced(copy[path[0]], path[1:], new)
        return copy

    some = st.one_of(values(), st.just(KeyError), st.sampled_from([torch.zeros(2), torch.zeros(0)]))
    return st.tuples(st.sampled_from(places(content)[1:]), some).map(
        lambda drawn: replaced(content, *drawn)
    )


# ---- images and labels


def image_files() -> list[bytes]:
    colours, mask = Image.fromarray(picture(0, 9, 13)), Image.fromarray(mask_of(9, 13))
    wide = Image.fromarray(np.arange(117, dtype=np.uint16).reshape(9, 13))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for image, kind, options in (
        (colours, "PNG", {}),
        (colours.convert("P"), "PNG", {"exif": exif}),
        (mask.convert("1"), "PNG", {}),
        (mask, "PNG", {}),
        (wide, "PNG", {}),
        (colours, "JPEG", {"exif": exif}),
        (mask, "JPEG", {}),
        (colours, "TIFF", {}),
        (mask, "TIFF", {"compression": "tiff_lzw"}),
        (colours, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (colours.convert("RGBA"), "TIFF", {"compression": "packbits"}),
        (colours, "BMP", {}),
        (mask, "GIF", {}),
        (colours, "WEBP", {}),
        (colours.convert("CMYK"), "JPEG", {}),
    ):
        memory = io.BytesIO()
        image.save(memory, kind, **options)
        files.append(memory.getvalue())
    return files


def with_good_sums(content: bytes) -> bytes:
    """Repair the check sums of a PNG, so that its damage goes deeper."""
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        length = min(int.from_bytes(content[at : at + 4], "big"), len(content) - at - 12)
        body = content[at + 4 : at + 8 + length]
        out += length.to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


@times
@pytest.mark.fault("D3", "D4", "D5")
def test_images_and_labels(times: int, tmp_path: Path) -> None:
    def read(drawn: tuple[bytes, str]) -> None:
        content, ending = drawn
        path = tmp_path / f"x{ending}"
        path.write_bytes(content)
        for reader in (read_size, read_image, read_label):
            try:
                result = reader(path)
            except UserError:
                continue
            if reader is read_size:
                assert result[0] > 0 and result[1] > 0
            else:
                assert isinstance(result, np.ndarray) and result.dtype == np.uint8
                assert result.ndim == (3 if reader is read_image else 2)
        label = read_label(path)
        encoding = choose_encoding(set(np.unique(label).tolist()), Classes(1))
        assert set(np.unique(encoding.decode(label, path))) <= {0, 1, 255}

    endings = st.sampled_from([".png", ".jpg", ".TIF", ".bmp"])
    broken = damaged(*image_files())
    fuzz(st.tuples(st.one_of(broken, broken.map(with_good_sums)), endings), 250 * times, read)


@times
@pytest.mark.fault("D5", "D6")
def test_coloured_labels(times: int, tmp_path: Path) -> None:
    def read(drawn: tuple[bytes, list[tuple[int, int, int]]]) -> None:
        (tmp_path / "x.png").write_bytes(drawn[0])
        indices = read_label(tmp_path / "x.png", drawn[1])
        assert indices.dtype == np.uint8 and indices.ndim == 2

    byte = st.sampled_from([0, 128, 255])
    colors = st.lists(st.tuples(byte, byte, byte), min_size=2, max_size=9, unique=True)
    files = damaged(*image_files()).map(with_good_sums)
    fuzz(st.tuples(files, colors), 60 * times, read)


@times
@pytest.mark.fault("D6")
def test_codings(times: int) -> None:
    def choose(drawn: tuple[set[int], int, str, tuple[int, ...] | None, bytes]) -> None:
        found, num_classes, task, asked, content = drawn
        classes = Classes(num_classes, task, values=asked)
        encoding = choose_encoding(found, classes)
        assert isinstance(encoding, LabelEncoding) and len(encoding.values) == classes.num_labels
        raw = np.frombuffer(content, np.uint8).reshape(1, -1)
        decoded = encoding.decode(raw, Path("x.png"))
        assert set(np.unique(decoded)) <= {*range(len(encoding.values)), 255}

    numbers = st.integers(0, 255)
    some = st.sets(st.one_of(st.sampled_from([0, 1, 2, 128, 254, 255]), numbers), max_size=6)
    asked = st.none() | st.lists(st.integers(-3, 300), max_size=4).map(tuple)
    tasks = st.sampled_from(["change", "semantic"])
    content = st.binary(min_size=1, max_size=9)
    fuzz(st.tuples(some, st.integers(1, 249), tasks, asked, content), 100 * times, choose)


# ---- folders, lists, notes


@times
@pytest.mark.fault("D8", "D12")
def test_lists_and_names(times: int, tmp_path: Path) -> None:
    numbers = iter(range(10**9))

    def read(drawn: tuple[bytes, list[str]]) -> None:
        text, names = drawn
        root = tmp_path / str(next(numbers))
        for folder in ("A", "B", "label", "list"):
            (root / folder).mkdir(parents=True)
        (root / "list" / "train.txt").write_bytes(text)
        for name in ("a.png", "b.tif", *names):
            for folder in ("A", "B", "label"):
                try:
                    (root / folder / name.replace("/", "_")).write_bytes(b"")
                except (OSError, ValueError):  # a name that no file can have
                    continue
        layout = find_pairs(root)
        for pair in (pair for pairs in layout.splits.values() for pair in pairs):
            for path in (pair.before, pair.after, pair.label):
                assert path.is_file() and path.resolve().is_relative_to(root.resolve())

    line = st.one_of(st.sampled_from(["a.png", "b.tif 1", "a", "", "../a.png", "/a.png"]), words())
    text = st.lists(line, max_size=6).map("\r\n".join)
    encoded = st.one_of(
        text.map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=60)
    )
    names = st.lists(words().map(lambda word: word + ".png"), max_size=4)
    fuzz(st.tuples(encoded, names), 80 * times, read)


@times
@pytest.mark.fault("D6")
def test_class_files(times: int, tmp_path: Path) -> None:
    def read(drawn: tuple[bytes, str, int | None]) -> None:
        content, task, num_classes = drawn
        (tmp_path / "classes.json").write_bytes(content)
        classes = choose_classes(tmp_path, task=task, num_classes=num_classes)
        assert classes.names is not None and len(classes.names) == classes.num_labels
        assert (classes.values is None) != (classes.colors is None)

    good: list[Any] = [
        {"no change": 0, "road": 128, "building": 255},
        {"unchanged": [255, 255, 255], "water": [0, 0, 255], "tree": [0, 255, 0]},
    ]
    changed = st.one_of(*map(with_change, good), values())
    texts = changed.map(lambda value: json.dumps(value, default=str).encode())
    files = st.one_of(damaged(*(json.dumps(g).encode() for g in good)), texts)
    tasks = st.sampled_from(["change", "semantic"])
    fuzz(st.tuples(files, tasks, st.none() | st.integers(1, 4)), 120 * times, read)


@times
@pytest.mark.fault("D13")
def test_memos(times: int, tmp_path: Path) -> None:
    layout = find_pairs(save_tree(tmp_path / "data", train=1, val=1))
    folder = tmp_path / "memos"
    expected = check(layout, Classes(1), memo=folder)
    (memo,) = folder.iterdir()
    content = memo.read_bytes()
    first, _, text = content.partition(b"\n")  # a check sum, then what it is of

    def read(drawn: bytes) -> None:
        memo.write_bytes(drawn)
        assert check(layout, Classes(1), memo=folder) == expected

    other = with_change(json.loads(text)).map(
        lambda value: first + b"\n" + json.dumps(value, default=str).encode()
    )
    fuzz(st.one_of(damaged(content), other), 60 * times, read)


@times
@pytest.mark.fault("R24")
def test_markers_and_tables(times: int, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / "sample.json").write_bytes(content)
        assert isinstance(read_marker(tmp_path), dict)
        (tmp_path / "metrics.csv").write_bytes(content)
        tracker = Tracker(
            tmp_path, config={}, tags={}, store=tmp_path, use_mlflow=False, first_step=3
        )
        tracker.log({"loss": 1.0}, 3)
        tracker.close()
        with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        assert steps[-1] == 3 and max(steps) == 3
        for path in tmp_path.glob("events*"):
            path.unlink()

    logging.getLogger("tracking").setLevel(logging.CRITICAL)
    table = b"step,train/loss,lr\n1,0.5,0.1\n2,0.25,0.1\n3,0.125,nan\n"
    anything = values().map(lambda value: json.dumps(value).encode())
    try:
        fuzz(st.one_of(damaged(table, b'{"version": 3, "seed": 0}'), anything), 40 * times, read)
    finally:
        logging.getLogger("tracking").setLevel(logging.NOTSET)


# ---- configurations


@times
@pytest.mark.fault("C4")
def test_configs(times: int) -> None:
    def read(given: dict) -> None:
        config = cli.from_dict(Config, given)
        cli.validate(config)
        assert cli.from_dict(Config, json.loads(json.dumps(cli.as_dict(config)))) == config

    fields = st.sampled_from(sorted(cli.as_dict(Config())))
    some = st.dictionaries(
        st.one_of(fields, fields, fields, words(), st.integers()), values(), max_size=3
    )
    fuzz(some, 200 * times, read)


@times
@pytest.mark.fault("R16")
def test_command_lines(times: int) -> None:
    def read(words: list[str]) -> None:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                given = cli.parse(Config, words)
        except SystemExit as stop:
            assert stop.code in (0, 2)
        else:
            cli.validate(Config(**given))

    flags = [f"--{name.replace('_', '-')}" for name in cli.as_dict(Config())]
    word = st.one_of(st.sampled_from(flags), words(), st.integers().map(str), st.floats().map(str))
    fuzz(st.lists(word, max_size=4), 60 * times, read)


# ---- checkpoints, weights, runs


def saved(content: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(content, memory)
    return memory.getvalue()


def parts() -> dict[str, Any]:
    """What a run restores, small."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    model.encoder = nn.Conv2d(2, 1, 1)
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.1, encoder_factor=0.1)
    made = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": warmup_cosine(optimizer, warmup_steps=2, total_steps=9),
        "scaler": torch.amp.GradScaler("cpu"),
        "progress": Progress(Confusion(1)),
    }
    step(made)
    return made


def step(made: dict[str, Any]) -> None:
    """Do what a run does with its parts after they were restored."""
    for parameter in made["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    nn.utils.clip_grad_norm_(made["model"].parameters(), 1.0)
    made["optimizer"].found_inf = torch.zeros(())
    made["optimizer"].step()
    made["scheduler"].step()
    made["optimizer"].zero_grad(set_to_none=True)
    made["progress"].batch += 1
    made["progress"].summary()
    [float(rate) for rate in made["scheduler"].get_last_lr()]


def run_state() -> dict[str, Any]:
    states = {name: part.state_dict() for name, part in parts().items()}
    return {
        "format": 1,
        **states,
        "model_kwargs": {
            "task": "change",
            "backbone": "resnet18",
            "fusion": "concat",
            "num_classes": 1,
            "freeze_backbone": True,
        },
        "config": cli.as_dict(Config(epochs=3, data_dir="levir")),
        "data": {"fingerprint": "0123", "mask_values": [0, 255]},
        "weights": "none",
        "best": {"epoch": 1, "change_iou": 0.5},
        "mlflow_run_id": None,
        "versions": {"repository": "0.1.0"},
    }


@times
@pytest.mark.fault("C1", "C2", "C3")
def test_checkpoints_of_broken_bytes(times: int, tmp_path: Path) -> None:
    """Also with good check sums around a broken pickle."""
    small = {
        "format": 1,
        "model": {"w": torch.ones(9)},
        "model_kwargs": {},
        "config": {},
        "data": {},
    }
    whole, old = saved(small), io.BytesIO()
    torch.save(small, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickle_name = next(name for name in entries if name.endswith("data.pkl"))

    def packed(code: bytes) -> bytes:
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, code if name == pickle_name else content)
        return memory.getvalue()

    def read(content: bytes) -> None:
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        try:
            read_state_dict(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        assert isinstance(read_checkpoint(path), dict)

    broken = st.one_of(damaged(whole, old.getvalue()), damaged(entries[pickle_name]).map(packed))
    fuzz(broken, 250 * times, read)


@times
@pytest.mark.fault("C4")
def test_checkpoints_of_strange_content(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(name: str) -> None:
        raise UserError(f"{name}: is not built here, for that takes a second")

    monkeypatch.setattr("model.build_encoder", build)
    (tmp_path / "best.pt").touch()

    def read(state: Any) -> None:
        path = tmp_path / "last.pt"
        torch.save(state, path)
        with pytest.raises(UserError):
            load_model(path)
        _, state = find_checkpoint(str(path), tmp_path, None)
        with ExitStack() as held:
            open_run(Config, {"resume": str(path)}, tmp_path, held, main.check_options)
        made = parts()
        restore(made, state, path)
        step(made)
        best: dict[str, Any] = {"epoch": 0, "change_iou": -1.0, **state["best"]}
        assert f"{best['epoch']:.0f} {best['change_iou']:.3f} {best['change_iou'] < 1.0}" != ""
        save_checkpoint(tmp_path / "again.pt", {**state, "model": made["model"].state_dict()})

    fuzz(st.one_of(with_change(run_state()), values()), 100 * times, read)


# ---- archives and servers


@times
@pytest.mark.fault("C7")
def test_archives(times: int, tmp_path: Path) -> None:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in ("A", "B", "label"):
            archive.writestr(f"{folder}/train_1.png", image_files()[0])
    numbers = iter(range(10**9))

    def named(names: list[str]) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name in names:
                info = zipfile.ZipInfo("x")
                info.filename = info.orig_filename = name
                archive.writestr(info, b"x")
        return made.getvalue()

    def read(content: bytes) -> None:
        home = tmp_path / str(next(numbers))
        home.mkdir()
        (home / "x.zip").write_bytes(content)
        try:
            unpack(home / "x.zip", home / "out")
        finally:
            assert {path.name for path in home.iterdir()} <= {"x.zip", "out"}
            assert not [path for path in (home / "out").rglob("*") if path.is_symlink()]

    before = set(tmp_path.parent.iterdir())
    odd = st.text("abA/.\\:\0~ é", max_size=12).map(lambda name: name + ".png")
    names = st.lists(odd, min_size=1, max_size=4, unique=True)
    readable = names.map(lambda drawn: sorted({name.replace("\0", "") for name in drawn}))
    fuzz(st.one_of(damaged(memory.getvalue()), readable.map(named)), 120 * times, read)
    assert set(tmp_path.parent.iterdir()) == before


@contextmanager
def answering(answer: Callable[[], bytes]) -> Iterator[str]:
    """A server that sends the same bytes to everyone, whatever they ask."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(10_000)
                        connection.sendall(answer())
                        connection.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x.zip"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@times
@pytest.mark.fault("C8")
def test_servers(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE", 0)
    monkeypatch.setattr(fetching, "TIMEOUT", 5)
    body = b"PK" + bytes(500)
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 502\r\nContent-Type: application/zip\r\n\r\n" + body
    part = (
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-501/502\r\nContent-Length: 502\r\n\r\n"
        + body
    )
    page = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><title>x</title>"
        b'<form id="download-form" action="/y"><input type="hidden" name="a" value="b"></form>'
    )
    moved = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nPKabc\r\n0\r\n\r\n"
    current = [b""]

    with answering(lambda: current[0]) as url:

        def read(content: bytes) -> None:
            current[0] = content
            (tmp_path / "x.zip.part").unlink(missing_ok=True)
            try:
                path = fetch(url, tmp_path / "x.zip", "0" * 32)
            finally:
                assert {path.name for path in tmp_path.iterdir()} <= {"x.zip.part"}
            raise AssertionError(f"{path} has no such check sum")

        fuzz(damaged(good, part, page, moved, chunks), 40 * times, read)


def test_enough_was_thrown() -> None:
    """Runs last, and counts: `-s` shows it."""
    print(f"{drawn} inputs were drawn")
    assert main.__doc__
