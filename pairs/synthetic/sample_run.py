"""What a run does where there is no dataset, and the sample run where there are no weights.

Without data a small synthetic set is drawn. On that set alone, a run may go on without ImageNet
weights: it then trains from scratch by a recipe of its own, and says so loudly. On real data
missing weights are an error.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from networks import weights as pretrained
from networks.weights import WeightsUnavailableError
from pairs.synthetic import sample_set as sample_data
from runtime.config import as_flags

SAMPLE_LABEL = "SYNTHETIC SAMPLE DATA"
# What a CPU can teach a network from scratch in minutes
FROM_SCRATCH: dict[str, Any] = {
    "weights": "none",
    "backbone": "resnet18",
    "crop_size": 128,
    "batch_size": 4,
    "freeze_backbone": False,
    "lr": 2e-3,
}


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
    return sample_data.make_sample_set(folder, kind=kind or "change")


def is_sample(folder: Path) -> bool:
    """Whether a dataset was drawn by `sample_data.py`."""
    return (folder / sample_data.MARKER).is_file()


def recipe_without_weights(backbone: str, given: Collection[str]) -> dict[str, Any]:
    """Return the options that replace ImageNet's weights where these cannot be had, else nothing.

    Args:
        backbone: whose weights are wanted.
        given: names of the options that the user has chosen; these stay.
    """
    try:
        pretrained.library_weights(backbone)
    except WeightsUnavailableError as error:
        recipe = {name: value for name, value in FROM_SCRATCH.items() if name not in given}
        rule = "!" * 100
        print(f"{rule}\n!! NO IMAGENET WEIGHTS: {error}")
        print(
            f"!! The sample run goes on FROM SCRATCH, all of it learning, with {as_flags(recipe)}:"
        )
        print("!! its scores are not those of a pretrained model. On real data this is an error.")
        print(rule)
        return recipe
    return {}
