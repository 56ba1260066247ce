"""Objects of a mask, and which of them a prediction found, missed or invented.

    object      changed pixels that hang together by their edges, as the polygons of predict.py
    found       at least half of its pixels are claimed; else missed
    invented    a claimed object under which not one pixel changed

Objects of fewer than `min_pixels` are not counted, neither real nor claimed ones: a speck of a
few pixels is no building. Pixels of one object may be claimed by several, and one claim may find
several objects: the counts say whether people find what changed, not how well its outline is drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOUND_SHARE = 0.5  # of an object's pixels

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ObjectCounts:
    """Objects of an image, or of many: they add up.

    Attributes:
        real: in the truth.
        found: of these.
        claimed: in the prediction.
        invented: of these.
    """

    real: int = 0
    found: int = 0
    claimed: int = 0
    invented: int = 0

    def __add__(self, other: "ObjectCounts") -> "ObjectCounts":
        return ObjectCounts(
            self.real + other.real,
            self.found + other.found,
            self.claimed + other.claimed,
            self.invented + other.invented,
        )

    @property
    def missed(self) -> int:
        """How many real objects were not found."""
        return self.real - self.found


def count_objects(truth: Mask, claimed: Mask, min_pixels: int = 1) -> ObjectCounts:
    """Compare the objects of two masks.

    Args:
        truth: (H, W), True where something changed; False where it is ignored.
        claimed: (H, W), True where a change is predicted; False where the truth is ignored.
        min_pixels: of an object that counts.
    """
    real_sizes, real_hits = _sizes(label_objects(truth), claimed, min_pixels)
    claimed_sizes, claimed_hits = _sizes(label_objects(claimed), truth, min_pixels)
    return ObjectCounts(
        real=len(real_sizes),
        found=int((real_hits >= FOUND_SHARE * real_sizes).sum()),
        claimed=len(claimed_sizes),
        invented=int((claimed_hits == 0).sum()),
    )


def label_objects(mask: Mask) -> NDArray[np.int64]:
    """Number the objects of a mask (H, W): 0 where it is False, else 1, 2, ...

    Rows are cut into runs, runs that touch across two rows are linked, and every run takes the
    lowest number that it is linked to. Cost: about 10 ms at 1024 x 1024.
    """
    width = mask.shape[1] + 2  # an empty column at both sides parts the runs of two rows
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).ravel().view(np.int8))
    starts, ends = np.flatnonzero(steps == 1) + 1, np.flatnonzero(steps == -1) + 1
    # runs of the next row that touch run i: those from first[i] to last[i] - 1
    first = np.searchsorted(ends, starts + width, side="right")
    last = np.searchsorted(starts, ends + width)
    num_links = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), num_links)
    lower = np.arange(len(upper)) + np.repeat(first - num_links.cumsum() + num_links, num_links)
    root = np.arange(len(starts))
    while True:
        a, b = root[upper], root[lower]
        if (a == b).all():
            break
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
    _, numbers = np.unique(root, return_inverse=True)
    labels = np.zeros(mask.shape, dtype=np.int64)
    labels[mask] = np.repeat(numbers + 1, ends - starts)
    return labels


def _sizes(
    labels: NDArray[np.int64], other: Mask, min_pixels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels of each object that counts, and how many of them `other` holds."""
    sizes = np.bincount(labels.ravel())[1:]
    hits = np.bincount(labels[other], minlength=len(sizes) + 1)[1:]
    counts = sizes >= min_pixels
    return sizes[counts], hits[counts]
