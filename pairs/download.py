"""Fetch LEVIR-CD from where its authors published it, or nothing at all.

    DIR/../.DIR.download/train.zip.part     what has come so far; a later start goes on from there
                         train.zip          whole, its check sum verified
                         unpacked/          checked, then renamed
    DIR/{train,val,test}/{A,B,label}        complete, or not there

Each file comes by `fetch.py`. An archive may write below its own folder alone. What the user has is
never touched.
"""

import errno
import shutil
import stat
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pairs.fetch import SPARE_BYTES, fetch
from pairs.layouts import ENDINGS, find_pairs
from runtime.errors import FULL, UserError
from runtime.files import locked
from runtime.progress import Bar

LICENCE = (
    "LEVIR-CD is for academic use only: H. Chen and Z. Shi, Remote Sensing 12(10), 2020, "
    "doi:10.3390/rs12101662; https://justchenhao.github.io/LEVIR/"
)
MAX_UNPACKED = 4  # times the size of the archive: pictures hardly shrink in a zip
PATIENCE = 24 * 3600  # seconds to wait for another process that downloads


@dataclass(frozen=True)
class Archive:
    """A zip of one split.

    Attributes:
        split: train, val or test.
        url: where it is.
        md5: of the file, as published; it tells damage, and nobody knows how to forge a second one.
        num_pairs: inside.
    """

    split: str
    url: str
    md5: str
    num_pairs: int


def _drive(file_id: str) -> str:
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


# The authors' files, with the check sums that torchgeo publishes (torchgeo/datasets/levircd.py)
LEVIR_CD = (
    Archive("train", _drive("18GuoCuBn48oZKAlEo-LrNwABrFhVALU-"),
            "a638e71f480628652dea78d8544307e4", 445),
    Archive("val", _drive("1BqSt4ueO7XAyQ_84mUjswUSJt13ZBuzG"),
            "f7b857978524f9aa8c3bf7f94e3047a4", 64),
    Archive("test", _drive("1jj3qJD_grJlgIhUWO09zibRGJe0R4Tn0"),
            "07d5dd89e46f5c1359e2eca746989ed9", 128),
)  # fmt: skip


def fetch_dataset(folder: Path, archives: Sequence[Archive] = LEVIR_CD) -> Path:
    """Make `folder` the dataset, unless it is there already, and return it.

    What has come before a fault stays beside it, hidden, and the next call goes on from there.

    Raises:
        UserError: no network, no room, not the file that was published, or something else lies in
            `folder`.
    """
    folder = folder.absolute()
    work = folder.with_name(f".{folder.name}.download")
    if _is_complete(folder, archives):
        print(f"download: {folder} is there already")
        return folder
    print(f"download: {LICENCE}", flush=True)
    try:
        with locked(work.with_suffix(".lock"), PATIENCE):
            if not _is_complete(folder, archives):  # another process may have been faster
                work.mkdir(exist_ok=True)
                _fetch_all(folder, archives, work)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise UserError(f"{error}; another process downloads, or has hung") from None
        where = error.filename or work
        raise UserError(f"{where}: {error.strerror or error}; make room or access") from None
    return folder


def _fetch_all(folder: Path, archives: Sequence[Archive], work: Path) -> None:
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    zips = [fetch(archive.url, work / f"{archive.split}.zip", archive.md5) for archive in archives]
    for archive, path in zip(archives, zips, strict=True):
        inside = work / "unpacked.part"
        shutil.rmtree(inside, ignore_errors=True)
        unpack(path, inside)
        unpacked.mkdir(exist_ok=True)
        _home(inside, path).replace(unpacked / archive.split)
        shutil.rmtree(inside, ignore_errors=True)
    if not _is_complete(unpacked, archives):
        raise UserError(f"{work}: the archives do not hold the pairs of the dataset; delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    unpacked.replace(folder)
    shutil.rmtree(work, ignore_errors=True)


def _is_complete(folder: Path, archives: Sequence[Archive]) -> bool:
    """Whether the dataset is there.

    Raises:
        UserError: something else is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    wanted = {archive.split: archive.num_pairs for archive in archives}
    try:
        found = {split: len(pairs) for split, pairs in find_pairs(folder).splits.items()}
    except UserError as error:
        found, fault = {}, str(error).splitlines()[0]
    else:
        fault = f"{found} pairs, not {wanted}"
    if found != wanted:
        raise UserError(
            f"{folder}: is not the dataset to download ({fault}) and stays untouched; move it, or "
            "name another folder with --data-dir"
        )
    return True


def _home(folder: Path, archive: Path) -> Path:
    """Return the folder of A, B and label, which may lie a folder or two deeper."""
    for home in (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))):
        if all((home / names).is_dir() for names in ("A", "B", "label")):
            return home
    raise UserError(f"{archive}: holds no folders A, B and label; delete it")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip of images into a new folder.

    Raises:
        UserError: it is broken, or has an entry that would be written elsewhere, is a link or a
            device, or is larger than pictures can be; nothing outside `folder` is touched.
        OSError: the disk is full or read-only.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            for entry in entries:
                if fault := _fault(entry):
                    raise UserError(f"{archive}: its entry {entry.filename!r} {fault}; delete it")
            _check_room(archive, folder, sum(entry.file_size for entry in entries), len(entries))
            for entry in Bar(entries, f"unpack {archive.name}", unit="files"):
                if Path(entry.filename).suffix.lower() in ENDINGS:  # what else may be inside
                    content.extract(entry, folder)  # checks each file's CRC
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (*FULL, errno.EACCES, errno.EROFS):
            raise  # the disk's fault
        # zipfile raises a dozen types for hostile files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{archive}: cannot be unpacked ({reason}); delete it") from None


def _fault(entry: zipfile.ZipInfo) -> str:
    """Say why an entry may not be unpacked, or nothing."""
    name = entry.orig_filename
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or a device"
    if "\\" in name or "\0" in name or ":" in name or name.startswith("/"):
        return "is an absolute path or of another system"
    if ".." in PurePosixPath(name).parts:
        return "leads out of the folder"
    if entry.flag_bits & 1:
        return "is encrypted"
    return ""


def _check_room(archive: Path, folder: Path, size: int, num_files: int) -> None:
    limit = MAX_UNPACKED * archive.stat().st_size + 2**20
    if size > limit or num_files > 100_000:
        raise UserError(
            f"{archive}: claims to hold {size / 1e9:.1f} GB in {num_files} files; delete it"
        )
    free = shutil.disk_usage(folder.parent).free
    if size + SPARE_BYTES > free:
        raise UserError(
            f"{folder.parent}: unpacking {archive.name} takes {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; make room, or --data-dir"
        )
