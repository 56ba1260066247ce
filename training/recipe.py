"""How the sample run differs from others: small crops, and a way on without ImageNet weights.

On the synthetic sample set alone a run may take the small encoder whose weights pip brings, or
train from scratch, and says so loudly. On real data missing weights are an error.
"""

import textwrap
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


def sample_recipe(backbone: str, given: Collection[str]) -> dict[str, Any]:
    """Return the options of a sample run that are not the defaults.

    Args:
        backbone: whose ImageNet weights are wanted.
        given: names of the options that the user has chosen; these stay.
    """
    try:
        weights.library_weights(backbone)
    except WeightsUnavailableError as error:
        has_package = "backbone" not in given and weights.package_folder() is not None
        recipe = _without(FROM_PIP if has_package else FROM_SCRATCH, given)
        how = (
            f"with ImageNet's weights of {LITE} from {PACKAGE}"
            if has_package
            else "FROM SCRATCH, all of it learning"
        )
        notice = (
            f"NO IMAGENET WEIGHTS OF {backbone}: {error}",
            f"The sample run goes on {how}, with {as_flags(recipe)}: its scores are not those of "
            f"{backbone}. On real data this is an error.",
        )
        rule = "!" * 100
        # an option or a path is never cut in two
        lines = textwrap.TextWrapper(
            100, initial_indent="!! ", subsequent_indent="!! ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        print(rule, *map(lines.fill, notice), rule, sep="\n")
        return recipe
    recipe = _without(SMALL_SET, given)
    if recipe:
        print(f"small   the sample set is, so this run takes {as_flags(recipe)}")
    return recipe


def _without(recipe: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in given}
