"""LEVIR-CD-like pairs drawn from a seed: the data set of a user who has none yet.

    kind         folders                 labels
    change       A, B, label             0, 255: buildings
    3-classes    A, B, label             0, 128, 255: none, road, building, as LEVIR-MCI's
    semantic     im1, im2, label1, label2    SECOND's colours, and a classes.json

The pictures are those of `paint.py`, the same for every kind.
"""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pairs import labels as classes
from pairs.synthetic.paint import draw_land, draw_mask, expose, paint
from pairs.synthetic.plan import plan
from pairs.synthetic.scene import PAD, Draw, Image8
from runtime.errors import UserError

SPLITS = {"train": 40, "val": 16, "test": 16}
VERSION = 4  # of the drawing: raise it when the same seed gives other pixels
SAMPLE_LABEL = "SYNTHETIC SAMPLE DATA"
MARKER = "sample.json"
NOTE = "Synthetic pictures drawn by sample_data.py; nothing here is a photograph of a real place."
FOLDERS = {
    "change": ("A", "B", "label"),
    "3-classes": ("A", "B", "label"),
    "semantic": ("im1", "im2", "label1", "label2"),
}
LAND = {name: color for name, color in classes.SECOND.items() if name != "playground"}


def make_pair(
    seed: int, split: str, index: int, *, size: int = 256, kind: str = "change"
) -> tuple[Image8, ...]:
    """Draw one pair; about a third of all pairs hold no change of buildings.

    Args:
        seed: of the whole set, 0 or more.
        split: a key of SPLITS; splits never share a place.
        index: of the pair in its split, 0 or more.
        size: height and width in pixels of 0.5 m, 16 or more.
        kind: a key of FOLDERS.

    Returns:
        before, after (size, size, 3) uint8 RGB and mask (size, size) uint8, on the grid of before;
        of semantic change two masks, of 0 where the land cover did not change, else of the place of
        what was there in `LAND`.
    """
    if kind not in FOLDERS:
        raise ValueError(f"kind is {kind!r}, has to be one of {', '.join(FOLDERS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, has to be one of {', '.join(SPLITS)}")
    if size < 16:
        raise ValueError(f"size is {size}, has to be 16 or more")
    key = seed, list(SPLITS).index(split), index
    scene = plan(Draw(*key, 0), size + 2 * PAD)
    images = []
    for i, date in enumerate(scene.dates):
        draw = Draw(*key, 1 + i)
        images.append(expose(paint(scene, i, draw), date, draw, size))
    if kind != "semantic":
        return *images, draw_mask(scene, size, with_roads=kind == "3-classes")
    before, after = draw_land(scene, 0, size), draw_land(scene, 1, size)
    changed = before != after
    return *images, before * changed, after * changed


OURS = re.compile(
    r"sample\.json|classes\.json"
    r"|(train|val|test)(/(A|B|label|im[12]|label[12])(/synthetic_\d{5,}\.png)?)?"
)


def file_of(root: Path, split: str, folder: str, index: int) -> Path:
    """Where one picture lies."""
    return root / split / folder / f"synthetic_{index:05d}.png"


def read_marker(root: Path) -> dict[str, object]:
    """What the marker says of the set; nothing if there is none, or it is not ours."""
    with suppress(OSError, ValueError):
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
        if isinstance(marker, dict) and marker.get("note") == NOTE:
            return marker
    return {}


def is_complete(root: Path, parameters: Mapping[str, object]) -> bool:
    """Whether a set of these parameters lies there, with all its files."""
    marker, num_pairs = read_marker(root), parameters["num_pairs"]
    assert isinstance(num_pairs, dict)
    kind = str(parameters["kind"])
    has_names = kind != "semantic" or (root / classes.FILE).is_file()
    is_same = all(marker.get(name) == value for name, value in parameters.items())
    return (
        is_same
        and has_names
        and all(
            file_of(root, split, folder, index).is_file()
            for split, count in num_pairs.items()
            for folder in FOLDERS[kind]
            for index in range(count)
        )
    )


def check_is_ours(root: Path, parameters: Mapping[str, object]) -> None:
    """Refuse a folder that holds more than our pictures: unfinished, or of an older VERSION."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; the sample set needs a folder of its own there")
    marker = read_marker(root)
    for name, value in parameters.items():
        if marker and name != "version" and marker.get(name) != value:
            raise UserError(
                f"{root} holds a sample set with {name} = {marker.get(name)}, not {value}; "
                "delete that folder, or choose another one"
            )
    for folder, folders, files in os.walk(root):  # unlike rglob, calm when another process moves it
        for path in (Path(folder, name) for name in sorted(folders + files)):
            name = path.relative_to(root).as_posix()
            is_ours = OURS.fullmatch(name) and not path.is_symlink()
            is_foreign = name in (MARKER, classes.FILE) and not marker and path.exists()
            if not is_ours or is_foreign:
                raise UserError(
                    f"{root} is not empty ({name} is no part of the sample set), so nothing was "
                    "written there; choose an empty or a new folder"
                )


def unfinished_prefix(root: Path) -> str:
    """How the names of the folders begin that will become root."""
    return f".{root.name}-unfinished-"


def sweep(root: Path) -> None:
    """Delete what a killed process left beside root: ten minutes without a new picture."""
    for path in root.parent.iterdir():
        with suppress(FileNotFoundError):  # its owner may be faster
            ours = path.name.startswith(unfinished_prefix(root))
            if ours and time.time() - path.stat().st_mtime > 600:
                shutil.rmtree(path, ignore_errors=True)


def move_into_place(drawn: Path, root: Path, parameters: Mapping[str, object]) -> None:
    """Make the drawn folder the root, unless another process has been faster."""
    if is_complete(root, parameters):
        return
    check_is_ours(root, parameters)
    aside = drawn.with_name(drawn.name + "-old")
    with suppress(FileNotFoundError):
        root.replace(aside)  # rather than delete: root is missing for an instant only
    try:
        drawn.replace(root)
    except OSError:
        if not is_complete(root, parameters):
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def make_sample_set(
    root: Path,
    *,
    seed: int = 0,
    num_pairs: Mapping[str, int] = SPLITS,
    size: int = 256,
    kind: str = "change",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write {train,val,test}/FOLDER/NAME.png under root, once, and return root.

    A complete set of the same parameters is left as it is; one of an older VERSION, or with files
    missing, is drawn again. This happens beside root, which is then renamed into place, so root is
    whole or absent, also when two processes start at once.

    Args:
        root: the folder to make; its parents are made too.
        seed: see make_pair.
        num_pairs: pairs per split, keys as in SPLITS.
        size: see make_pair.
        kind: see make_pair.
        progress: called with (pairs done, pairs in all) after each pair.

    Raises:
        UserError: root holds anything else than such pictures, or a set of other parameters.
    """
    if unknown := set(num_pairs) - set(SPLITS):
        raise ValueError(f"num_pairs names {unknown}, has to be of {', '.join(SPLITS)}")
    counts = {split: num_pairs[split] for split in SPLITS if split in num_pairs}
    parameters = {"version": VERSION, "seed": seed, "num_pairs": counts}
    parameters |= {"size": size, "kind": kind}
    target = Path(root).resolve()
    if is_complete(target, parameters):
        return root
    check_is_ours(target, parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    drawn = target.with_name(f"{unfinished_prefix(target)}{uuid.uuid4().hex[:8]}")
    try:
        marker = {"note": NOTE, **parameters, "sha256": _draw_all(drawn, parameters, progress)}
        if kind == "semantic":
            (drawn / classes.FILE).write_text(json.dumps(LAND, indent=1) + "\n", encoding="utf-8")
        (drawn / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        move_into_place(drawn, target, parameters)
    finally:
        shutil.rmtree(drawn, ignore_errors=True)
    return root


def _draw_all(
    folder: Path, parameters: Mapping[str, Any], progress: Callable[[int, int], None] | None
) -> str:
    """Draw all pairs into a folder, and return the digest of their pixels."""
    counts, kind, done = parameters["num_pairs"], parameters["kind"], 0
    digest, palette = sha256(), np.array(list(LAND.values()), dtype=np.uint8)
    for split, count in counts.items():
        for name in FOLDERS[kind]:
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            pair = make_pair(parameters["seed"], split, index, size=parameters["size"], kind=kind)
            for name, pixels in zip(FOLDERS[kind], pair, strict=True):
                digest.update(pixels.tobytes())
                is_coloured = kind == "semantic" and pixels.ndim == 2
                image = Image.fromarray(palette[pixels] if is_coloured else pixels)
                image.save(file_of(folder, split, name, index), compress_level=3)
            os.utime(folder)  # a sign of life for sweep
            done += 1
            if progress:
                progress(done, sum(counts.values()))
    return digest.hexdigest()


def choose_data(data: Path, task: str = "change", num_classes: int | None = None) -> Path:
    """Return the folder of the datasets if one is there; else make a sample set inside.

    Args:
        data: the folder, data/ of the repository.
        task: "semantic" asks for a set with the classes of each date.
        num_classes: 3 asks for a set with none, road and building, all else for a binary one.
    """
    kind = "semantic" if task == "semantic" else "3-classes" if num_classes == 3 else ""
    folder = data / (f"sample-{kind}" if kind else "sample")
    if any(
        path.name not in ("README.md", "cache", folder.name)
        and not path.name.startswith(".")
        and not is_sample(path)
        for path in data.glob("*")
    ):
        return data
    verb = "takes the one" if is_sample(folder) else "makes one"
    print(f"{SAMPLE_LABEL}: no dataset under {data}, so this run {verb} in {folder}")
    return make_sample_set(folder, kind=kind or "change")


def is_sample(folder: Path) -> bool:
    """Whether a dataset was drawn by `py`."""
    return (folder / MARKER).is_file()
