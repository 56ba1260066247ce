"""How the sample run goes on where ImageNet weights cannot be had.

On the synthetic sample set alone a run may take the small encoder whose weights pip brings, or
train from scratch, by recipes of their own, and says so loudly. On real data missing weights are an
error.
"""

from collections.abc import Collection
from typing import Any

from networks import weights
from networks.encoders import LITE
from networks.weights import PACKAGE, WeightsUnavailableError
from runtime.config import as_flags

# Small crops, small batches: 40 pairs of 256 x 256 make 1,200 updates of 30 epochs, not 150
# (EXPERIMENTS.md)
SMALL_SET: dict[str, Any] = {"crop_size": 128, "batch_size": 4, "lr": 2e-3}
FROM_PIP: dict[str, Any] = {"backbone": LITE, **SMALL_SET}
# What a CPU can teach a network from scratch in minutes
FROM_SCRATCH: dict[str, Any] = {
    "weights": "none",
    "backbone": "resnet18",
    "freeze_backbone": False,
    **SMALL_SET,
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
        has_package = "backbone" not in given and weights.package_folder() is not None
        recipe = FROM_PIP if has_package else FROM_SCRATCH
        recipe = {name: value for name, value in recipe.items() if name not in given}
        how = (
            f"with ImageNet's weights of {LITE} from {PACKAGE}"
            if has_package
            else "FROM SCRATCH, all of it learning"
        )
        rule = "!" * 100
        print(f"{rule}\n!! NO IMAGENET WEIGHTS OF {backbone}: {error}")
        print(f"!! The sample run goes on {how}, with {as_flags(recipe)}:")
        print(f"!! its scores are not those of {backbone}. On real data this is an error.")
        print(rule)
        return recipe
    return {}
