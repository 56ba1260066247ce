"""The cache of decoded pairs: the same pixels as the files, never stale, never half there."""

import errno
import importlib
import itertools
import multiprocessing
import multiprocessing.queues
import multiprocessing.synchronize
import os
import pickle
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import Bytes, mask_of, picture, save, save_pair
from test_dataset import CODING, SIZES, digest

import dataset as datasets
from pairs import cache as caching
from pairs.augment import Augment
from pairs.build import Build
from pairs.cache import MAX_GB, open_source, open_splits
from pairs.labels import Classes, LabelEncoding
from pairs.layouts import find_pairs
from pairs.sources import SUMMED, CachedSource, FileSource, Source, sum_of
from pairs.splits import Pair
from runtime.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for index, size in enumerate(SIZES):
        save_pair(root / "train", f"p{index}", index, size)
    save_pair(root / "val", "v", 99)
    return root


def opened(
    root: Path, cache: str = "disk", encoding: LabelEncoding = CODING, max_gb: float = MAX_GB
) -> Source:
    pairs = find_pairs(root).splits["train"]
    return open_source(pairs, encoding, cache=cache, folder=root / "cache", max_gb=max_gb)


def caches(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache").glob("*") if path.name != "lock")


def same(one: Source, other: Source) -> bool:
    return len(one) == len(other) and all(
        torch.equal(one.channels(number), other.channels(number)) for number in range(len(one))
    )


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    read = FileSource.read_files

    def counted(self: FileSource, number: int) -> list[Bytes]:
        decoded.append(number)
        return read(self, number)

    monkeypatch.setattr(FileSource, "read_files", counted)
    return decoded


@pytest.mark.parametrize("cache", ["auto", "disk", "ram", "none"])
def test_planes_are_what_was_saved(data: Path, cache: str) -> None:
    source = opened(data, cache)
    assert isinstance(source, FileSource if cache == "none" else CachedSource)
    assert source.sizes == SIZES
    for number, size in enumerate(SIZES):
        channels = source.channels(number).numpy()
        assert np.array_equal(channels[:3].transpose(1, 2, 0), picture(2 * number, *size))
        assert np.array_equal(channels[3:6].transpose(1, 2, 0), picture(2 * number + 1, *size))
        assert np.array_equal(channels[6], mask_of(*size) // 255)


@pytest.mark.parametrize("cache", ["disk", "ram"])
@pytest.mark.parametrize("augment", [None, Augment()])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_are_those_of_the_files(
    data: Path, cache: str, augment: Augment | None, num_workers: int
) -> None:
    def batches(source: Source, num_workers: int) -> list[str]:
        data_set = datasets.ChangeDataset(source, crop_size=32, augment=augment)
        loader = datasets.make_loader(data_set, 4, shuffle=True, num_workers=num_workers)
        found = digest(loader)
        loader.close()
        return found

    assert batches(opened(data, cache), num_workers) == batches(opened(data, "none"), 0)


def test_a_cache_is_built_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decoding(monkeypatch)
    opened(data)
    assert sorted(decoded) == list(range(len(SIZES)))
    before = caches(data)
    opened(data)
    assert len(decoded) == len(SIZES)
    assert caches(data) == before and len(before) == 1


@pytest.mark.fault("D13")
@pytest.mark.parametrize("which", ["A", "B", "label"])
def test_a_changed_file_is_decoded_again(data: Path, which: str) -> None:
    stale = opened(data)
    path = data / "train" / which / "p2.png"
    save(path, mask_of(32, 32, 0) if which == "label" else picture(77))
    assert not same(opened(data), stale)
    assert same(opened(data), opened(data, "none"))
    assert len(caches(data)) == 1  # the old one is gone


@pytest.mark.fault("D13")
def test_the_same_bytes_at_another_time_are_decoded_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(data)
    decoded = count_decoding(monkeypatch)
    path = data / "train" / "A" / "p2.png"
    os.utime(path, ns=(1, 1))
    opened(data)
    assert len(decoded) == len(SIZES)


def test_other_labels_or_other_pairs_have_caches_of_their_own(data: Path) -> None:
    one = opened(data)
    swapped = opened(data, encoding=LabelEncoding((255, 0)))
    assert len(caches(data)) == 2
    assert torch.equal(one.channels(2)[6], 1 - swapped.channels(2)[6])
    pairs = find_pairs(data).splits["train"][1:]
    open_source(pairs, CODING, cache="disk", folder=data / "cache")
    assert len(caches(data)) == 3


def test_the_same_labels_of_other_images_have_a_cache_of_their_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    for path in data.rglob("*.png"):
        link = other / path.relative_to(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        if "label" in path.parts:
            link.symlink_to(path)
        else:
            shutil.copy2(path, link)  # of the same size and time
    for root in (data, other):
        monkeypatch.chdir(root)
        pairs = find_pairs(".").splits["train"]
        open_source(pairs, CODING, cache="disk", folder=data / "cache")
    assert len(caches(data)) == 2


@pytest.mark.fault("D13")
def test_a_run_that_began_keeps_its_cache_while_files_change(data: Path) -> None:
    source, expected = opened(data), opened(data, "ram")
    save(data / "train" / "A" / "p2.png", picture(77))
    opened(data)
    assert same(source, expected)


@pytest.mark.fault("D13")
def test_a_truncated_cache_is_built_again(data: Path) -> None:
    opened(data)
    (name,) = caches(data)
    path = data / "cache" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert same(opened(data), opened(data, "none"))
    assert path.read_bytes() == content


def damage(path: Path, how: str) -> None:
    """Zero a cache, or flip bits of its pixels and of its sums."""
    content = bytearray(path.read_bytes())
    if how == "zeros":
        content[:] = bytes(len(content))
    elif how == "sums":
        content[-1] ^= 1
    else:
        rng = np.random.default_rng(0)
        for place in rng.integers(0, len(content) - 100, int(how)).tolist():
            content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


@pytest.mark.fault("D22")
@pytest.mark.parametrize("how", ["zeros", "sums", "1", "200"])
@pytest.mark.parametrize("keeps_time", [True, False])
def test_a_damaged_cache_is_built_again(data: Path, how: str, keeps_time: bool) -> None:
    opened(data)
    (path,) = (data / "cache").glob("*.pixels")
    content, before = path.read_bytes(), path.stat()
    damage(path, how)
    if keeps_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(opened(data), opened(data, "none"))
    assert path.read_bytes() == content


@pytest.mark.fault("D22")
@pytest.mark.parametrize("how", ["zeros", "1", "200", "shorter"])
@pytest.mark.parametrize("is_used", [True, False])
def test_damage_during_a_run_reaches_no_pair(
    data: Path, capsys: pytest.CaptureFixture[str], how: str, is_used: bool
) -> None:
    source, expected = opened(data), opened(data, "none")
    assert isinstance(source, CachedSource) and (not is_used or same(source, expected))
    (path,) = (data / "cache").glob("*.pixels")
    if how == "shorter":
        os.truncate(path, 100)
    else:
        damage(path, how)
    for _ in range(2):
        assert same(source, expected)
    assert capsys.readouterr().err.count("is damaged, and its pairs are decoded again") == 1
    assert not path.exists()  # the next start makes it anew
    assert same(opened(data), expected)


@pytest.mark.fault("D22")
def test_a_pair_that_no_sample_of_the_opening_meets_is_proved_when_it_is_used(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(data)
    monkeypatch.setattr("pairs.sources.SAMPLES", 1)
    (path,) = (data / "cache").glob("*.pixels")
    content = bytearray(path.read_bytes())
    content[-4 * len(SIZES) - 8] ^= 1  # a label of the last pair
    path.write_bytes(content)
    source = opened(data)
    assert path.exists()
    assert same(source, opened(data, "none"))
    assert not path.exists()


@pytest.mark.fault("D22")
def test_every_flipped_bit_and_every_page_out_of_place_shows() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 3 * 8 * SUMMED + 77, dtype=np.uint8)
    found = {sum_of(data)}
    for place in [0, 7, 8 * SUMMED, data.size - 1, *rng.integers(0, data.size, 200).tolist()]:
        other = data.copy()
        other[place] ^= 1 << int(rng.integers(8))
        found.add(sum_of(other))
    for one, two in ((0, 1), (0, 8), (3, 11), (2, 22)):
        other = data.copy()
        first, second = (slice(4096 * page, 4096 * (page + 1)) for page in (one, two))
        other[first], other[second] = data[second], data[first]
        found.add(sum_of(other))
    assert len(found) == 1 + 204 + 4
    assert sum_of(data[1:]) != sum_of(data[:-1])  # at any place in memory


@pytest.mark.fault("D22")
def test_a_cache_with_the_sums_of_earlier_versions_is_used_and_proved(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(data)
    (path,) = (data / "cache").glob("*.pixels")
    assert isinstance(source, CachedSource)
    content, offsets = bytearray(path.read_bytes()), source._offsets
    pairs = itertools.pairwise(offsets)
    sums = np.array([zlib.crc32(content[a:b]) for a, b in pairs], "<u4")
    content[offsets[-1] :] = sums.tobytes() + zlib.crc32(sums.tobytes()).to_bytes(4, "little")
    path.write_bytes(content)
    decoded = count_decoding(monkeypatch)
    assert same(opened(data), opened(data))
    assert not decoded
    damage(path, "1")
    assert same(opened(data), opened(data, "none"))


@pytest.mark.fault("D21")
@pytest.mark.parametrize("which", ["A", "B", "label"])
def test_a_file_of_the_same_size_and_time_is_decoded_again(data: Path, which: str) -> None:
    folder = data / "train" / which
    (folder / "p2.png").unlink()
    path = save(folder / "p2.bmp", mask_of() if which == "label" else picture(1))
    stale, before = opened(data), path.stat()
    save(path, mask_of() * 0 if which == "label" else picture(2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert not same(opened(data), stale)
    assert same(opened(data), opened(data, "none"))


@pytest.mark.fault("D20")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_with_the_name_of_a_cache_or_a_file(data: Path) -> None:
    opened(data)
    (path,) = (data / "cache").glob("*.pixels")
    path.unlink()
    os.mkfifo(path)
    assert same(opened(data), opened(data, "none"))
    source = opened(data, "none")
    name = source.pairs[2].before
    name.unlink()
    os.mkfifo(name)
    with pytest.raises(UserError, match="is a named pipe, not a file"):
        source.channels(2)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)


@pytest.mark.fault("D23")
@pytest.mark.skipif(os.name == "nt", reason="other locks")
def test_two_that_build_one_cache_without_locks_spoil_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    put = Build.put
    others: list[Source] = []
    begun: list[bool] = []

    def slow(self: Build, pair: Pair, arrays: Sequence[Bytes]) -> None:
        if not begun:  # a second process comes while the first is in the middle
            begun.append(True)
            others.append(opened(data))
        put(self, pair, arrays)

    monkeypatch.setattr(Build, "put", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    first = opened(data)
    monkeypatch.undo()
    expected = opened(data, "none")
    assert same(first, expected) and same(others[0], expected)
    assert [path.split(".")[-1] for path in caches(data)] == ["pixels"]


@pytest.mark.fault("D23")
@pytest.mark.skipif(os.name == "nt", reason="other locks")
def test_the_rest_of_a_killed_build_goes_in_time_where_there_are_no_locks(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    (data / "cache").mkdir()
    young, old = (data / "cache" / f"{name}.unfinished" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    opened(data)
    assert young.exists() and not old.exists()


def test_a_cold_start_decodes_each_file_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    for module in ("records", "sources"):
        for name in ("read_pixels", "read_label"):
            reader = getattr(importlib.import_module(f"pairs.{module}"), name)

            def counted(path: Path, *rest: object, reader: Any = reader) -> Bytes:
                read.append(path)
                return reader(path, *rest)

            monkeypatch.setattr(f"pairs.{module}.{name}", counted)
    layout = find_pairs(data)
    for cache in ("disk", "ram"):
        read.clear()
        shutil.rmtree(data / "cache", ignore_errors=True)
        _, sources = open_splits(
            layout, Classes(1), ("train", "val"), cache=cache, folder=data / "cache"
        )
        files = [path for split in layout.splits.values() for p in split for path in p.files]
        assert sorted(read) == sorted(files)
        assert same(sources["train"], opened(data, "none"))
    read.clear()
    for _ in range(2):  # the memo, and what was cached, are enough
        open_splits(layout, Classes(1), ("train", "val"), cache="disk", folder=data / "cache")
    assert len(read) == len(files)


def test_a_full_disk_during_the_check_takes_memory_instead(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    _, sources = open_splits(
        find_pairs(data), Classes(1), ("train",), cache="auto", folder=data / "cache"
    )
    assert "No space left on device): decoding into memory" in capsys.readouterr().out
    assert same(sources["train"], opened(data, "none"))


def test_broken_pairs_are_left_out(data: Path) -> None:
    (data / "train" / "A" / "p1.png").write_bytes(b"no image")
    save(data / "train" / "label" / "p3.png", mask_of(*SIZES[3], value=7))
    for _ in range(2):
        checked, sources = open_splits(
            find_pairs(data), Classes(1), ("train",), cache="disk", folder=data / "cache",
            skip_broken=True,
        )  # fmt: skip
        assert [pair.name for pair in sources["train"].pairs] == ["p0", "p2", "p4"]
        assert len(checked.skipped) == 2 and "p1.png" in checked.skipped[0]
        plain = opened(data, "none")
        for number, of_all in enumerate((0, 2, 4)):
            assert torch.equal(sources["train"].channels(number), plain.channels(of_all))
    with pytest.raises(UserError, match=r"1 fault in the data \(--skip-broken"):
        open_splits(find_pairs(data), Classes(1), ("train",), folder=data / "cache")


def test_the_rest_of_a_killed_build_goes(data: Path) -> None:
    (data / "cache").mkdir()
    rest = data / "cache" / "0-0.unfinished"
    rest.write_bytes(b"half")
    opened(data)
    assert not rest.exists()


def test_a_broken_file_leaves_nothing_behind(data: Path) -> None:
    path = data / "train" / "B" / "p4.png"
    path.write_bytes(path.read_bytes()[:-40])
    for cache in ("disk", "auto", "ram"):
        with pytest.raises(UserError, match=r"p4\.png"):
            opened(data, cache)
        assert caches(data) == []


@pytest.mark.fault("D13")
def test_a_file_that_changes_while_it_is_decoded_is_no_cache(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FileSource.read_files

    def change(self: FileSource, number: int) -> list[Bytes]:
        arrays = read(self, number)
        os.utime(self.pairs[number].after, ns=(1, 1))
        return arrays

    monkeypatch.setattr(FileSource, "read_files", change)
    with pytest.raises(UserError, match="changed during the run"):
        opened(data)
    assert caches(data) == []


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "available_memory", lambda: 10)


@pytest.mark.fault("P4")
def test_a_full_disk_is_said(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(UserError, match="--cache disk: no cache of .* make room, or --cache none"):
        opened(data)
    assert isinstance(opened(data, "auto"), CachedSource)
    assert capsys.readouterr().out.endswith("GB are free): decoding into memory\n")
    no_memory(monkeypatch)
    assert isinstance(opened(data, "auto"), FileSource)
    assert capsys.readouterr().out.endswith("decoding each pair whenever it is needed\n")
    with pytest.raises(UserError, match="--cache ram: takes .* try --cache disk"):
        opened(data, "ram")
    assert caches(data) == []


@pytest.mark.fault("P4")
def test_a_disk_that_fills_while_decoding(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    assert isinstance(opened(data, "auto"), CachedSource)
    assert "No space left on device): decoding into memory" in capsys.readouterr().out
    assert caches(data) == []


@pytest.mark.fault("D15")
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(data: Path) -> None:
    (data / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        opened(data)


@pytest.mark.fault("D15")
def test_a_cache_folder_that_is_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "cache").write_text("not a folder")
    assert isinstance(opened(data, "auto"), CachedSource)
    assert "no cache of" in capsys.readouterr().out


def test_the_cache_used_longest_ago_makes_room(data: Path) -> None:
    size = sum(7 * height * width for height, width in SIZES)
    limit = (2 * size + 100) / 1e9

    def use(*values: int) -> str:
        """Open with these mask values, and return the name of their cache."""
        known = set(caches(data))
        opened(data, encoding=LabelEncoding(values), max_gb=limit)
        return (set(caches(data)) - known).pop()

    first, second = use(0, 255), use(255, 0)
    os.utime(data / "cache" / second, (1, 1))
    os.utime(data / "cache" / first, (2, 2))
    third = use(7, 0, 255)
    assert set(caches(data)) == {first, third}
    limit = (size - 1) / 1e9
    with pytest.raises(UserError, match="more than"):
        use(3, 0, 255)


def build(
    root: Path,
    gate: multiprocessing.synchronize.Event,
    results: "multiprocessing.queues.Queue[tuple[int, int]]",
) -> None:
    decoded: list[int] = []
    read = FileSource.read_files

    def counted(self: FileSource, number: int) -> list[Bytes]:
        decoded.append(number)
        return read(self, number)

    FileSource.read_files = counted  # type: ignore[method-assign]
    gate.wait()
    source = opened(root)
    results.put((len(decoded), int(source.channels(4).sum())))


@pytest.mark.fault("R13", "P4")
def test_processes_that_start_together_build_once(data: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Event(), context.Queue()
    processes = [context.Process(target=build, args=(data, gate, results)) for _ in range(3)]
    for process in processes:
        process.start()
    gate.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in found) == [0, 0, len(SIZES)]
    assert {total for _, total in found} == {int(opened(data, "none").channels(4).sum())}


@pytest.mark.parametrize("cache", ["disk", "ram", "none"])
def test_a_source_travels_to_another_process(data: Path, cache: str) -> None:
    source = opened(data, cache)
    source.channels(4)
    passed: Source = pickle.loads(pickle.dumps(source))
    assert same(passed, source)


def test_pixels_on_disk_do_not_travel(data: Path) -> None:
    source = opened(data)
    assert len(pickle.dumps(source)) < 4000


def windows(source: Source, side: int) -> Sequence[torch.Tensor]:
    return [
        source.read(number, top, left, side)
        for number, (height, width) in enumerate(source.sizes)
        for top in range(0, height, 13)
        for left in range(0, width, 17)
    ]


def test_windows_are_the_same_and_are_views(data: Path) -> None:
    cached, files = opened(data), opened(data, "none")
    pairs = zip(windows(cached, 24), windows(files, 24), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    whole = cached.channels(4)
    assert cached.read(4, 8, 3, 16).untyped_storage().data_ptr() == (
        whole.untyped_storage().data_ptr()
    )


def test_writing_into_a_window_does_not_reach_the_file(data: Path) -> None:
    opened(data).channels(2).fill_(9)  # a private map
    assert same(opened(data), opened(data, "none"))
