"""Which bands of a file are red, green and blue, and how their values become bytes.

    names     what the file calls its bands: "red", "gray", "alpha", "palette", "undefined", ...
    rows      (n, h, w) of the bands in `Rendering.needed`, in the file's own type
    result    (3, h, w) uint8 RGB, and (h, w) bool, where there is data

Training, evaluation and prediction all go through `Rendering`, whoever decoded the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

PERCENTILES = (2, 98)  # that become 0 and 255 where more than 8 bits come without a scale
_OPAQUE_SHARE = 0.01  # alpha that is full on less than this is hardly alpha
_FILL_SHARE = 0.001  # of the pixels: an extreme value that occurs so often may be a filling
_STRIP = 2**18  # pixels that are scaled at once
_FILLS = (-9999, -99999, -32768, -32767)  # customary ones; others are told by their distance

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """How the bands of image files become RGB bytes; kept in checkpoints.

    Attributes:
        bands: red, green and blue counted from 1, or one for all; None takes what a file says.
        scale: the values that become 0 and 255; None takes 8 bits as they are.
        alpha: the band that is 0 where there is no data; None takes what a file says, or with
            `bands` no band.
    """

    bands: tuple[int, ...] | None = None
    scale: tuple[float, float] | None = None
    alpha: int | None = None

    @classmethod
    def asked(
        cls,
        bands: Sequence[int] | None = None,
        scale: Sequence[float] | None = None,
        alpha: int | None = None,
    ) -> "Reading":
        """Return what the options --bands, --scale and --alpha say.

        Raises:
            UserError: they make no sense.
        """
        if bands is not None and (len(bands) not in (1, 3) or min(bands) < 1):
            raise UserError(
                f"--bands {','.join(map(str, bands))}: give one or three numbers, counted from 1"
            )
        if alpha is not None and (alpha < 1 or alpha in (bands or ())):
            raise UserError(f"--alpha {alpha}: give another band than --bands, counted from 1")
        if scale is None:
            return cls(tuple(bands) if bands else None, None, alpha)
        is_range = len(scale) == 2 and bool(np.isfinite(scale).all())
        if not is_range or not scale[0] < scale[1]:
            raise UserError(
                f"--scale {','.join(f'{x:g}' for x in scale)}: give two numbers, the lower first"
            )
        return cls(tuple(bands) if bands else None, (float(scale[0]), float(scale[1])), alpha)

    @classmethod
    def saved(cls, data: Mapping[str, Any], source: Path) -> "Reading":
        """Return what a checkpoint's `data` entry says; older ones say nothing.

        Raises:
            UserError: it holds something else.
        """
        bands, scale, alpha = (data.get(name) for name in ("bands", "scale", "alpha"))
        try:
            if not all(type(band) is int for band in [*(bands or ()), alpha or 1]):
                raise TypeError
            if not all(type(value) in (int, float) for value in scale or ()):
                raise TypeError
            return cls.asked(bands, scale, alpha)
        except (TypeError, ValueError, OverflowError, UserError):
            raise UserError(f"{source}: its bands, scale or alpha are none") from None

    def over(self, other: "Reading") -> "Reading":
        """Return what is said here, and what the other says of the rest."""
        return Reading(
            self.bands or other.bands,
            self.scale or other.scale,
            self.alpha if self.alpha is not None or self.bands else other.alpha,
        )

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint's `data` entry says."""
        return {
            "bands": list(self.bands) if self.bands else None,
            "scale": list(self.scale) if self.scale else None,
            "alpha": self.alpha,
        }


AS_STORED = Reading()


@dataclass(frozen=True)
class Kind:
    """What the samples of a file are.

    Attributes:
        names: of the bands.
        dtype: of the samples, by numpy's name.
        bits: of a sample.
        is_white_zero: grey values count from white.
        palette: the colours (256, 4) of the values, with alpha.
    """

    names: tuple[str, ...]
    dtype: str = "uint8"
    bits: int = 8
    is_white_zero: bool = False
    palette: Bytes | None = None


class Rendering:
    """How the samples of one file become RGB bytes.

    Args:
        path: named in errors.
        kind: of its samples.
        reading: what was asked for.

    Attributes:
        colors: the bands of red, green and blue, counted from 1.
        alpha: the band of alpha.
        needed: the bands to decode, each once.
        remarks: what is odd about the file.

    Raises:
        UserError: the file does not tell which bands are colours, lacks one that was asked for,
            or the scale is for others.
    """

    def __init__(self, path: Path, kind: Kind, reading: Reading) -> None:
        self.path, self.kind = path, kind
        self.colors, self.alpha = choose_bands(path, kind.names, reading)
        self.needed = list(dict.fromkeys([*self.colors, *([self.alpha] if self.alpha else [])]))
        is_palette = kind.names[0] == "palette" and reading.bands is None
        self.palette = kind.palette if is_palette else None
        self.remarks: list[str] = []
        self.range: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        if kind.dtype.startswith("complex"):
            raise UserError(f"{path}: has complex numbers; give their magnitude")
        if reading.scale is not None and self.palette is None:
            if kind.dtype == "uint8" and reading.scale[1] > 255:
                raise UserError(
                    f"{path}: has 8 bits, but --scale {_text(reading.scale)} is for more; "
                    "--scale 0,255 takes 8 bits as they are"
                )
            self._take(*reading.scale)
        elif kind.bits < 8 and self.palette is None:
            self._take(0, 2**kind.bits - 1)

    @property
    def is_open(self) -> bool:
        """Whether nothing says yet which values become 0 and 255."""
        return self.range is None and self.kind.dtype != "uint8"

    def refuse_open(self) -> None:
        """Raise UserError if nothing says which values become 0 and 255."""
        if self.is_open:
            raise UserError(
                f"{self.path}: has {self.kind.dtype} pixels, not 8 bits; --scale LOW,HIGH says "
                "which values become 0 and 255"
            )

    def describe(self) -> str:
        """Return the bands in words: "1,2,3 of 4 (uint8), alpha 4"."""
        depth = self.kind.dtype if self.kind.bits >= 8 else f"{self.kind.bits} bits"
        if self.palette is not None:
            return f"1 of 1 ({depth}), through its palette"
        few, alpha = set(self.colors), f", alpha {self.alpha}" if self.alpha else ""
        which = ",".join(map(str, self.colors if len(few) > 1 else few))
        return f"{which} of {len(self.kind.names)} ({depth}){alpha}"

    def fit(self, rows: NDArray[Any], valid: Bools) -> str:
        """Take the percentiles of each band as the range, and say so.

        Args:
            rows: (n, h, w) of the needed bands, thinned out.
            valid: (h, w), where they have data. Without any, no value is ever shown, and any
                range will do: a mosaic has empty tiles.
        """
        low, high = [], []
        for values in self.values(rows, valid):
            if not values.size:
                low.append(0.0)
                high.append(1.0)
                continue
            self.remarks += filling(self.path, values)
            first, last = np.percentile(values, PERCENTILES)
            low.append(first)
            high.append(max(last, first + 1e-6 * max(abs(first), 1)))
        self.remarks = list(dict.fromkeys(self.remarks))
        self._take(low, high)
        limits = [f"{a:.5g} to {b:.5g}" for a, b in zip(low, high, strict=True)]
        return (
            f"{self.kind.dtype} becomes 8 bits between the percentiles {PERCENTILES[0]} and "
            f"{PERCENTILES[1]} of each band "
            f"({', '.join(limits if len(set(self.colors)) > 1 else limits[:1])})"
        )

    def values(self, rows: NDArray[Any], valid: Bools) -> NDArray[np.float64]:
        """Return the three colours (3, N) where they have data."""
        rows, valid = self._parts(rows, valid)
        return rows[:, valid].astype(np.float64)

    def look(self, rows: NDArray[Any]) -> None:
        """Note what is odd about the alpha band, of thinned-out rows."""
        if self.alpha:
            values = rows[self.needed.index(self.alpha)]
            self.remarks += odd_alpha(self.path, self.alpha, values, self.colors)

    def render(self, rows: NDArray[Any], valid: Bools) -> tuple[Bytes, Bools]:
        """Return RGB (3, h, w) and where there is data (h, w)."""
        if self.palette is not None:
            colors = self.palette[rows[0].astype(np.uint8, copy=False)]
            return colors[..., :3].transpose(2, 0, 1), valid & (colors[..., 3] > 0)
        if self.range is None:
            rows, valid = self._parts(rows, valid)
            return rows.astype(np.uint8, copy=False), valid
        height, width = valid.shape
        rgb, has_data = np.empty((3, height, width), np.uint8), np.empty_like(valid)
        step = max(1, _STRIP // max(1, width))  # the steps between take fifty bytes a pixel
        for top in range(0, height, step):
            part = slice(top, top + step)
            rgb[:, part], has_data[part] = self._scaled(rows[:, part], valid[part])
        return rgb, has_data

    def _scaled(self, rows: NDArray[Any], valid: Bools) -> tuple[Bytes, Bools]:
        assert self.range is not None
        rows, valid = self._parts(rows, valid)
        if rows.dtype.kind == "f":
            rows = np.where(valid, rows, 0)
        low, high = self.range
        scaled = (rows.astype(np.float32) - low) * (255 / (high - low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8), valid

    def _parts(self, rows: NDArray[Any], valid: Bools) -> tuple[NDArray[Any], Bools]:
        """Return the three colours, and where there is data by alpha and by being numbers too."""
        if self.alpha:
            valid = valid & (rows[self.needed.index(self.alpha)] != 0)
        if rows.dtype.kind == "f":
            distinct = list(dict.fromkeys(self.needed.index(b) for b in self.colors))
            valid = valid & np.isfinite(rows[distinct]).all(0)
        places = [self.needed.index(b) for b in self.colors]
        if places != list(range(len(rows))):  # else a copy of all would be for nothing
            rows = rows[places]
        if self.kind.is_white_zero:
            rows = rows.dtype.type(2**self.kind.bits - 1) - rows
        return rows, valid

    def _take(self, low: Any, high: Any) -> None:
        low, high = (
            np.broadcast_to(np.asarray(limit, np.float32), (3,)).reshape(3, 1, 1)
            for limit in (low, high)
        )
        self.range = low, high


def choose_bands(
    path: Path, names: Sequence[str], reading: Reading
) -> tuple[list[int], int | None]:
    """Return the bands of red, green and blue, and that of alpha, counted from 1.

    Raises:
        UserError: the file does not tell, or lacks one that was asked for.
    """
    count = len(names)
    if reading.alpha is not None and reading.alpha > count:
        raise UserError(f"--alpha {reading.alpha}: {path} has {count} bands")
    if reading.bands is not None:
        if not all(1 <= band <= count for band in reading.bands):
            raise UserError(
                f"--bands {','.join(map(str, reading.bands))}: give one or three numbers from 1 to "
                f"{count}, the bands of {path}"
            )
        return list(reading.bands) * (3 // len(reading.bands)), reading.alpha
    alpha = reading.alpha
    if alpha is None and "alpha" in names:
        alpha = 1 + list(names).index("alpha")
    if {"red", "green", "blue"} <= set(names):
        return [1 + list(names).index(color) for color in ("red", "green", "blue")], alpha
    colors = [1 + i for i, name in enumerate(names) if name != "alpha" and 1 + i != alpha]
    if len(colors) not in (1, 3):
        raise UserError(
            f"{path}: has {count} bands ({', '.join(names)}); say which are red, green and "
            f"blue, such as --bands {','.join(map(str, range(min(3, count), 0, -1)))}"
        )
    return colors * (3 // len(colors)), alpha


def odd_alpha(path: Path, band: int, values: NDArray[Any], colors: Sequence[int]) -> list[str]:
    """Say if an alpha band does not look like one."""
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else values.max()
    partial = float(((values != 0) & (values != top)).mean())
    opaque = float((values == top).mean())
    if not partial and opaque >= _OPAQUE_SHARE:
        return []
    what = f"{partial:.1%} of it is neither 0 nor {top}" if partial else f"{opaque:.1%} is {top}"
    return [
        f"{path}: band {band} counts as alpha, but {what}; if it is near infrared or the like, "
        f"--bands {','.join(map(str, colors))} leaves it out"
    ]


def filling(path: Path, values: NDArray[np.float64]) -> list[str]:
    """Say if an extreme value looks like "no data" that was not declared."""
    for value in (values.min(), values.max()):
        others = values[values != value]
        if others.size == values.size or not others.size:
            continue
        if 1 - others.size / values.size < _FILL_SHARE:
            continue
        spread = float(np.subtract(*np.percentile(others, PERCENTILES[::-1])))
        if value in _FILLS or float(np.abs(others - value).min()) > max(spread, 1e-9):
            share = 1 - others.size / values.size
            return [
                f"{path}: {share:.1%} of its pixels are {value:g}, which may mean no data but is "
                f"not declared; if so: gdal_edit.py -a_nodata {value:g} FILE, or --scale LOW,HIGH"
            ]
    return []


def holes_in(arrays: Sequence[Bytes]) -> Bools | None:
    """Return where a date of a pair has no data (H, W); None is nowhere."""
    alphas = [array[..., 3] == 0 for array in arrays[:2] if array.shape[2] == 4]
    return np.logical_or.reduce(alphas) if alphas else None


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
