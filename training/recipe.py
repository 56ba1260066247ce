"""How the sample run goes on where ImageNet weights cannot be had.

On the synthetic sample set alone a run may train from scratch, by a recipe of its own, and says so
loudly. On real data missing weights are an error.
"""

from collections.abc import Collection
from typing import Any

from networks import weights
from networks.weights import WeightsUnavailableError
from runtime.config import as_flags

# What a CPU can teach a network from scratch in minutes
FROM_SCRATCH: dict[str, Any] = {
    "weights": "none",
    "backbone": "resnet18",
    "crop_size": 128,
    "batch_size": 4,
    "freeze_backbone": False,
    "lr": 2e-3,
}


def recipe_without_weights(backbone: str, given: Collection[str]) -> dict[str, Any]:
    """Return the options that replace ImageNet's weights where these cannot be had, else nothing.

    Args:
        backbone: whose weights are wanted.
        given: names of the options that the user has chosen; these stay.
    """
    try:
        weights.library_weights(backbone)
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
