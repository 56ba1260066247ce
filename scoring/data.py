"""The split that an evaluation looks at, and val beside it: found, checked, opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairs.bands import Reading
from pairs.cache import open_splits
from pairs.check import show
from pairs.labels import choose_classes
from pairs.layouts import find_pairs
from pairs.scale import choose_scale
from pairs.sources import Source
from pairs.synthetic.sample_set import SAMPLE_LABEL, choose_data, is_sample
from runtime.errors import UserError
from scoring.protocols import PATCH_SIZE


def kind_of(model_kwargs: Mapping[str, Any]) -> tuple[str, int]:
    """Return the task and the number of classes of a model."""
    return model_kwargs.get("task", "change"), model_kwargs.get("num_classes", 1)


@dataclass(frozen=True)
class EvaluationData:
    """The splits that an evaluation looks at; `split` is `val` where that was asked for."""

    name: str
    folder: str
    fingerprint: str
    names: tuple[str, ...]
    chosen: str | None  # --data-dir of the training that it was opened for
    split: Source
    val: Source | None
    is_all: bool  # whether the split is all pairs of a set that has no splits


def open_data(
    state: Mapping[str, Any],
    path: Path,
    split: str,
    *,
    data_dir: str | None,
    pairs: str | None,
    folders: Sequence[str] | None,
    mask_values: tuple[int, ...] | None,
    reading: Reading,
    skip_broken: bool,
    home: Path,
    cache: str,
    cache_gb: float,
) -> EvaluationData:
    """Check the dataset, and open the split, and val if there is one.

    What is not given is as in the training.

    Args:
        state: the checkpoint.
        path: of it.
        split: "test", "val" or "train".
        data_dir: the dataset's folder.
        pairs: a table of pairs, see `find_pairs`.
        folders: names of the folders, see `find_pairs`.
        mask_values: label values of the classes.
        reading: what was asked for of how images become RGB bytes.
        skip_broken: leave out pairs with a fault.
        home: holds the sample set and the caches.
        cache: see `cache.open_source`.
        cache_gb: what all caches may take.

    Raises:
        UserError: a fault in the data, or a split that it does not have.
    """
    task, num_classes = kind_of(state["model_kwargs"])
    saved = state["config"]
    root, table = data_dir, pairs
    if not root and not table:  # the data of the training
        root, table = saved.get("data_dir"), saved.get("pairs")
    if not root and not table:
        root = str(choose_data(home, task, num_classes))
    skip_broken = skip_broken or bool(saved.get("skip_broken"))
    layout = find_pairs(
        root,
        task,
        folders=folders or saved.get("folders") or (),
        table=table,
        wanted=(split,),
        skip_broken=skip_broken,
    )
    classes = choose_classes(
        layout.root,
        task=task,
        num_classes=num_classes,
        mask_values=mask_values or tuple(saved.get("mask_values") or ()) or None,
    )
    reading, lines = choose_scale(
        [path for pair in layout.splits[split] for path in (pair.before, pair.after)],
        reading.over(Reading.saved(state["data"], path)),
        f"the {split} split",
    )
    checked, sources = open_splits(
        layout,
        classes,
        sorted({split, "val"} & set(layout.splits)),
        reading=reading,
        cache=cache,
        folder=home / "cache",
        max_gb=cache_gb,
        crop_size=PATCH_SIZE,
        skip_broken=skip_broken,
    )
    show(checked)
    print(*lines, sep="\n", end="\n" if lines else "")
    return EvaluationData(
        SAMPLE_LABEL if is_sample(layout.root) else layout.root.name,
        layout.root.name,
        checked.fingerprint,
        checked.encoding.names,
        chosen=saved.get("data_dir"),
        split=sources[split],
        val=sources.get("val"),
        is_all=layout.trained_as is not None,
    )


def check_classes(saved: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Raise UserError if the classes of the data are not those that a checkpoint has learned.

    Of two classes the second is the change, whatever it is called.
    """
    learned = list(saved.get("class_names") or names)
    if len(names) > 2 and learned != list(names):
        raise UserError(
            f"{path}: it has learned the classes {', '.join(learned)}, but the data has "
            f"{', '.join(names)}; give the data the classes.json of the training"
        )
