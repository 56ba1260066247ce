"""The samples of a label file to class values (H, W) uint8, or why they are none.

    grey       as it is, whatever its depth; 1-bit as 0 and 255
    palette    its grey if all its used colours are grey, else its indices
    RGB        one channel if all are equal; of classes with colours, the index of the colour

An alpha channel, or a mask, that says more than the colours is refused: nobody knows which of the
two holds the classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairs.bands import Bools, Bytes, Kind
from runtime.errors import UserError

Color = tuple[int, int, int]


def class_values(
    rows: NDArray[Any],
    kind: Kind,
    colors: Sequence[Color] | None,
    path: Path,
    mask: Bools | None = None,
) -> Bytes:
    """Return the values that stand for classes, or the indices of the classes' colours.

    Args:
        rows: all samples (n, H, W), as stored.
        kind: what they are.
        colors: of the classes; None refuses a coloured label.
        path: named in errors.
        mask: (H, W), where the file says that it has data.

    Raises:
        UserError: unknown colours, values above 255, or an alpha channel or a mask that says more
            than the colours.
    """
    if kind.is_white_zero:
        rows = rows.dtype.type(2**kind.bits - 1) - rows
    if mask is not None:
        _check_alpha(rows, mask.astype(np.uint8) * 255, path, "its mask")
    if "alpha" in kind.names:
        alpha = list(kind.names).index("alpha")
        _check_alpha(np.delete(rows, alpha, 0), rows[alpha], path)
        rows = np.delete(rows, alpha, 0)
    if kind.palette is not None:
        return _of_palette(rows[0].astype(np.uint8, copy=False), kind.palette, colors, path)
    if len(rows) == 3 and colors is not None and rows.dtype == np.uint8:
        return _indices(np.ascontiguousarray(rows.transpose(1, 2, 0)), colors, path)
    if len(rows) > 1 and not (rows == rows[:1]).all():
        raise _coloured(rows, kind, path)
    return _as_bytes(rows[0], kind, path)


def _check_alpha(
    rows: NDArray[Any], alpha: NDArray[Any], path: Path, name: str = "its alpha channel"
) -> None:
    """Raise UserError if the alpha channel or the mask of a label says more than its colours do.

    It says no more where each colour has one alpha, and what is transparent is black.
    """
    if (alpha == alpha.max()).all() and alpha.max() > 0:
        return
    pairs = np.concatenate([rows, alpha[None]]).reshape(len(rows) + 1, -1).T
    found = np.unique(pairs, axis=0)
    colors = np.unique(found[:, :-1], axis=0)
    if len(found) > len(colors) or found[found[:, -1] == 0, :-1].any():
        values = ", ".join(map(str, np.unique(alpha)[:8].tolist()))
        raise UserError(
            f"{path}: {name} ({values}) says other than its colours "
            f"({', '.join(map(str, colors[:4].tolist()))}); save the mask as one channel of class "
            "values, without alpha or a mask"
        )


def _of_palette(
    indices: Bytes, palette: Bytes, colors: Sequence[Color] | None, path: Path
) -> Bytes:
    """Return the grey of a palette whose used colours are grey, else its indices."""
    if colors is not None:
        return _indices(palette[indices][..., :3], colors, path)
    used = palette[np.unique(indices)]
    if not (used[:, :3] == used[:, :1]).all():
        return indices
    grey = palette[indices]
    if (used[:, 3] != 255).any():
        _check_alpha(grey[None, ..., 0], grey[..., 3], path)
    return np.ascontiguousarray(grey[..., 0])


def _coloured(rows: NDArray[Any], kind: Kind, path: Path) -> UserError:
    if kind.names[0] == "cyan":
        return UserError(f"{path}: a label of CMYK pixels; save one channel of class values")
    if len(rows) != 3:
        return UserError(
            f"{path}: a label of {len(rows)} bands that differ ({', '.join(kind.names)}); save "
            "the band of class values alone"
        )
    found = np.unique(rows.reshape(3, -1).T, axis=0)[:8].tolist()
    return UserError(
        f"{path}: a coloured label, with {', '.join(map(str, found))}; "
        "save it with one channel of class values, or name the colours in classes.json"
    )


def _as_bytes(values: NDArray[Any], kind: Kind, path: Path) -> Bytes:
    """Return class values of any whole-number type as bytes."""
    if values.dtype.kind not in "iu":
        raise UserError(f"{path}: a label of {kind.dtype} pixels; save whole numbers from 0 to 255")
    if kind.bits == 1 and values.max() <= 1:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8 or (values.min() >= 0 and values.max() <= 255):
        return np.ascontiguousarray(values.astype(np.uint8, copy=False))
    if kind.dtype == "uint16" and set(np.unique(values).tolist()) <= {0, 65535}:
        return np.where(values > 0, 255, 0).astype(np.uint8)
    raise UserError(
        f"{path}: a label of {kind.dtype} pixels from {values.min()} to {values.max()}; save 8 bits"
    )


def _indices(rgb: Bytes, colors: Sequence[Color], path: Path) -> Bytes:
    """Return the index of each pixel's colour."""
    packed = rgb.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    known = np.array(colors, dtype=np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    order = np.argsort(known)
    place = order[np.searchsorted(known, packed, sorter=order).clip(max=len(known) - 1)]
    strange = np.unique(rgb[known[place] != packed], axis=0)[:8].tolist()
    if strange:
        raise UserError(
            f"{path}: the colours {', '.join(map(str, strange))} are no class (classes.json)"
        )
    return place.astype(np.uint8)
