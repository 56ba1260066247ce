"""Changed objects, and which of them a prediction finds, misses or makes up.

    object    connected component of changed pixels: pixels that share an edge
    found     at least half of its pixels are predicted; else missed
    false     a predicted object under which not one pixel changed

Objects of fewer than `min_pixels` are not counted, neither true nor predicted ones: a speck of a
few pixels is no building. One object may be found by several predicted ones, and one of these may
find several: the counts say whether people find what changed, not how well its outline is drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FOUND_SHARE = 0.5  # of an object's pixels

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ObjectCounts:
    """Objects of an image, or of many: they add up.

    Attributes:
        in_truth: changed objects.
        found: those of them that are found.
        predicted: predicted objects.
        false: those of them that are false.
    """

    in_truth: int = 0
    found: int = 0
    predicted: int = 0
    false: int = 0

    def __add__(self, other: "ObjectCounts") -> "ObjectCounts":
        return ObjectCounts(
            self.in_truth + other.in_truth,
            self.found + other.found,
            self.predicted + other.predicted,
            self.false + other.false,
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counts by the names that tables have."""
        return {
            "objects_in_truth": self.in_truth,
            "objects_found": self.found,
            "objects_missed": self.in_truth - self.found,
            "objects_predicted": self.predicted,
            "objects_false": self.false,
        }


def count_objects(truth: Mask, predicted: Mask, min_pixels: int = 1) -> ObjectCounts:
    """Compare the objects of two masks.

    Args:
        truth: (H, W), True where something changed; False where it is ignored.
        predicted: (H, W), True where change is predicted; False where the truth is ignored.
        min_pixels: of an object that counts.
    """
    true_sizes, true_overlaps = _sizes(truth, predicted, min_pixels)
    predicted_sizes, predicted_overlaps = _sizes(predicted, truth, min_pixels)
    return ObjectCounts(
        in_truth=len(true_sizes),
        found=int((true_overlaps >= FOUND_SHARE * true_sizes).sum()),
        predicted=len(predicted_sizes),
        false=int((predicted_overlaps == 0).sum()),
    )


def _sizes(mask: Mask, other: Mask, min_pixels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels of each object that counts, and how many of them `other` holds."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    overlaps = np.bincount(labels[other], minlength=len(sizes) + 1)[1:]
    is_counted = sizes >= min_pixels
    return sizes[is_counted], overlaps[is_counted]
