import threading
import time
from pathlib import Path

import pytest
from data_helpers import png_bomb, save_tree

from pairs import images, threads
from pairs.cache import open_splits
from pairs.images import read_label, read_pixels
from pairs.labels import Classes
from pairs.layouts import find_pairs
from pairs.threads import in_threads
from runtime.errors import UserError


@pytest.mark.fault("D11")
def test_large_files_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "x.png"
    large.write_bytes(png_bomb(1000))  # 16 kB would do for a gigabyte
    running, most, lock = 0, 0, threading.Lock()

    def job() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return 1

    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "available_memory", lambda: 2 * 1_500_000 * images.BYTES_A_PIXEL)
    assert sum(in_threads([([large], job)] * 8, "reading", "files")) == 8
    assert most == 1
    most = 0
    monkeypatch.setattr(threads, "available_memory", lambda: 2**40)
    assert sum(in_threads([([large], job)] * 8, "reading", "files")) == 8
    assert most > 1


@pytest.mark.fault("D11")
def test_what_does_not_fit_into_memory_is_refused_by_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = save_tree(tmp_path / "data", train=2, val=1)
    (root / "train" / "A" / "train_0.png").write_bytes(png_bomb(5000))
    monkeypatch.setattr(images, "available_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"train_0\.png: 5000 x 5000 .* 0\.5 GB .* into tiles"):
        open_splits(
            find_pairs(root), Classes(1), ("train", "val"), cache="none", folder=tmp_path / "cache"
        )


@pytest.mark.fault("D11")
@pytest.mark.parametrize("read", [read_pixels, read_label])
def test_no_memory_is_no_broken_file(
    read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    root = save_tree(tmp_path / "data", train=1)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", full)
    with pytest.raises(UserError, match=r"train_0\.png: no memory is left .* tiles"):
        read(root / "train" / "label" / "train_0.png")  # type: ignore[operator]
