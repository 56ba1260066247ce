"""Caches of decoded pairs: made once, proved whenever they are used.

A PNG pair of 1024 x 1024 takes a core a tenth of a second to decode; a crop of it, out of the
cache, 0.1 ms. The cache is one file a split, with the channels of one pair after those of another,
mapped into memory: the system reads what is looked at, and shares it among processes.

    <files>-<state>-<classes>.pixels    <files>: which files; <state>: `memo.Stamp` of each;
                                        <classes>: what the label values mean
    channels of all pairs, then a check sum (uint32) of each pair and one of these

So a cache is never stale: other files, other name. It is never believed either: each process sums
a pair up before it uses it for the first time (0.5 ms at 1024 x 1024), and decodes a damaged one
again. A cache is written under a name of its own and moved into place, under a lock where the drive
has locks, so processes that start together build it once. Only the newest <state> is kept, and the
caches that were used longest ago go when all together exceed a limit.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pairs.bands import AS_STORED, Reading
from pairs.build import Build, hash_classes
from pairs.check import DataSummary, check
from pairs.images import read_size
from pairs.labels import Classes, LabelEncoding
from pairs.memo import Stamp, short_hash
from pairs.records import Keep
from pairs.sources import (
    CachedSource,
    FileSource,
    Source,
    offsets_of,
)
from pairs.splits import Layout, Pair
from pairs.threads import in_threads
from runtime.errors import UserError
from runtime.files import ABANDONED, locked
from runtime.memory import available_memory

MAX_GB = 100.0  # of all caches in a folder; LEVIR-CD takes 4
SPARE_BYTES = 2 * 10**9  # what a cache leaves free on the disk and in memory
PATIENCE = 24 * 3600  # seconds to wait for another process that builds


class _Store:
    """The folder of the caches: finds them, makes room for them, fills them under a lock.

    Args:
        cache: see `open_source`.
        folder: of the caches.
        max_gb: of all caches in it.
        reading: how images become RGB bytes.
    """

    def __init__(self, cache: str, folder: Path, max_gb: float, reading: Reading) -> None:
        self.reading = reading
        self.cache, self.folder, self.max_bytes = cache, folder, max_gb * 1e9
        self._held = ExitStack()
        self._is_locked = False
        self._promised = 0  # bytes of the caches that are being filled
        self._refused: set[str] = set()  # caches for which there is no room

    def __enter__(self) -> "_Store":
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def begin(
        self,
        pairs: Sequence[Pair],
        stamps: Mapping[Path, Stamp],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        is_lost: bool = False,
        on_disk: bool = True,
    ) -> Build | None:
        """Return what is to take the decoded pairs; None if a cache is there, or none is wanted.

        Args:
            pairs: of a split.
            stamps: of their files.
            sizes: of the pairs, if they are known.
            is_lost: the cache that is there is of no use.
            on_disk: else in memory, as the disk has failed.
        """
        if self.cache == "none":
            return None
        name = _name(pairs, stamps, self.reading)
        may_be_there = self.cache != "ram" and on_disk and not is_lost
        if may_be_there and self._has(name):
            return None
        sizes = sizes or [read_size(pair.label) for pair in pairs]
        size = offsets_of(pairs, sizes)[-1]
        if self.cache != "ram" and on_disk:
            try:
                self._lock()
                if may_be_there and self._has(name):  # another process has built it meanwhile
                    return None
                self._make_room(name, size)
                return self._filling(Build(pairs, sizes, self.folder, name))
            except OSError as error:
                self._without_disk(error, size)
        has_room = size + self._promised + SPARE_BYTES < available_memory()
        if self.cache == "auto":
            print("into memory" if has_room else "each pair whenever it is needed")
        elif not has_room:
            raise UserError(f"--cache ram: takes {size / 1e9:.1f} GB of memory; try --cache disk")
        if has_room:
            return self._filling(Build(pairs, sizes))
        self._refused.add(name)
        return None

    def open(self, files: FileSource, build: Build | None) -> Source:
        """Return the pairs: out of their cache, the one that was filled, or one filled now."""
        on_disk, name = True, _name(files.pairs, files.stamps, self.reading)
        if self.cache == "none" or name in self._refused:
            return files
        if build is None and self.cache != "ram":
            with contextlib.suppress(OSError):
                path = self.folder / f"{name}-{hash_classes(files.encoding)}.pixels"
                source = CachedSource(files, path)
                if source.is_whole():
                    with contextlib.suppress(OSError):
                        os.utime(path)  # used now
                    return source
        while True:
            if build is not None and build.pairs == files.pairs:
                try:
                    return build.finish(files)
                except OSError as error:
                    self._without_disk(error, build.offsets[-1])
                    on_disk = False
            build = self.begin(
                files.pairs,
                files.stamps,
                sizes=files.sizes,
                is_lost=True,
                on_disk=on_disk,
            )
            if build is None:
                return files
            _decode_all(files, build)

    def _filling(self, build: Build) -> Build:
        self._promised += build.offsets[-1]
        self._held.callback(build.discard)
        return build

    def _has(self, name: str) -> bool:
        return any(path.is_file() for path in self.folder.glob(f"{name}-*.pixels"))

    def _lock(self) -> None:
        """Wait for others that fill caches, and sweep up what killed ones have left."""
        if self._is_locked:
            return
        is_alone = self._held.enter_context(locked(self.folder / "lock", PATIENCE))
        self._is_locked = True
        for path in self.folder.glob("*.unfinished"):
            with contextlib.suppress(OSError):
                # on a drive without locks others may be at work
                if is_alone or time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _without_disk(self, error: OSError, size: int) -> None:
        reason = f"no cache of {size / 1e9:.1f} GB in {self.folder} ({error.strerror or error})"
        if self.cache == "disk":
            raise UserError(f"--cache disk: {reason}; make room, or --cache none") from None
        print(f"{reason}: decoding ", end="")

    def _make_room(self, name: str, size: int) -> None:
        """Delete what is dead, superseded, or was used longest ago; raise OSError without room."""

        def caches() -> Iterator[Path]:
            return self.folder.glob("*.pixels")

        def delete(path: Path) -> None:
            with contextlib.suppress(OSError):  # Windows keeps files that are in use
                path.unlink()

        for path in self.folder.glob(f"{name.partition('-')[0]}-*.pixels"):
            if not path.name.startswith(f"{name}-"):
                delete(path)
        needed = size + self._promised
        for path in sorted(caches(), key=lambda path: path.stat().st_mtime):
            if sum(other.stat().st_size for other in caches()) + needed <= self.max_bytes:
                break
            delete(path)
        if needed > self.max_bytes:
            raise OSError(f"more than {self.max_bytes / 1e9:g} GB; --cache-gb sets the limit")
        free = shutil.disk_usage(self.folder).free
        if needed + SPARE_BYTES > free:
            raise OSError(f"{free / 1e9:.1f} GB are free")


def open_source(
    pairs: Sequence[Pair],
    encoding: LabelEncoding,
    reading: Reading = AS_STORED,
    *,
    cache: str = "none",
    folder: Path,
    max_gb: float = MAX_GB,
) -> Source:
    """Open the pairs of a split, and decode them first if they are to be cached.

    Args:
        pairs: the files.
        encoding: of the labels.
        reading: how images become RGB bytes.
        cache: "disk": a file in `folder`. "ram": memory, anew at each start. "none": decode again
            and again. "auto": the first of these for which there is room.
        folder: of the caches.
        max_gb: of all caches in it.

    Raises:
        UserError: a file cannot be decoded, or there is no room for the cache that was asked for.
    """
    files = FileSource(pairs, encoding, reading)
    with _Store(cache, folder, max_gb, reading) as store:
        build = store.begin(files.pairs, files.stamps, sizes=files.sizes)
        if build is not None:
            _decode_all(files, build)
        return store.open(files, build)


def open_splits(
    layout: Layout,
    classes: Classes,
    splits: Sequence[str],
    *,
    reading: Reading = AS_STORED,
    cache: str = "none",
    folder: Path,
    max_gb: float = MAX_GB,
    crop_size: int = 256,
    skip_broken: bool = False,
) -> tuple[DataSummary, dict[str, Source]]:
    """Check a dataset and open some of its splits; each file is decoded once at the most.

    Args:
        layout: the pairs of all splits: all are checked.
        classes: what is known of the labels' classes.
        splits: which to open.
        reading: how images become RGB bytes.
        cache: see `open_source`.
        folder: of the caches, and of what is known of files from earlier starts.
        max_gb: of all caches in the folder.
        crop_size: side of the patches that are counted.
        skip_broken: leave out pairs with a fault instead of raising.

    Raises:
        UserError: as `check` and `open_source`.
    """
    builds: dict[str, Build | None] = {}
    with _Store(cache, folder, max_gb, reading) as store:

        def begin(stamps: Mapping[Path, Stamp]) -> dict[str, Keep]:
            for split in splits:
                pairs = layout.splits[split]
                with contextlib.suppress(KeyError, UserError):
                    builds[split] = store.begin(pairs, stamps)
            return {split: build.put for split, build in builds.items() if build}

        checked = check(
            layout,
            classes,
            reading=reading,
            crop_size=crop_size,
            memo=folder,
            begin=begin,
            skip_broken=skip_broken,
        )
        stamps, sizes, encoding = checked.stamps, checked.sizes, checked.encoding
        files = {
            split: FileSource(pairs, encoding, reading, stamps=stamps, sizes=sizes)
            for split, pairs in checked.layout.splits.items()
            if split in splits
        }
        return checked, {split: store.open(files[split], builds.get(split)) for split in splits}


def _decode_all(files: FileSource, build: Build) -> None:
    """Decode every pair once."""

    def decode(number: int) -> None:
        files.check_unchanged(number)
        arrays = files.read_files(number)
        files.check_unchanged(number)
        build.put(files.pairs[number], arrays)

    jobs = [(pair.files, partial(decode, number)) for number, pair in enumerate(files.pairs)]
    for _ in in_threads(jobs, "decoding", "pairs"):
        pass


def _name(pairs: Sequence[Pair], stamps: Mapping[Path, Stamp], reading: Reading) -> str:
    """Return the name of the cache of these files as they are now, without <classes>."""
    paths = [path for pair in pairs for path in pair.files]
    identity = [repr(reading), *(str(path.absolute()) for path in paths)]
    return f"{short_hash(identity)}-{short_hash([stamps[path] for path in paths])}"
