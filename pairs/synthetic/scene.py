"""The things of a scene: houses, streets, trees, and where they stand at two dates.

Every thing has a colour and a height in pixels of 0.5 m. `plan.py` decides what stands where;
`paint.py` draws it, with the shadows and the shading that follow from the heights, so a sun that
moved turns all of them alike.

The same seed gives the same pixels everywhere: all chance is `Generator.random()` of PCG64, and all
arithmetic is elementwise + - * / and sqrt, which IEEE 754 rounds alike on every machine. Hence no
sin, exp or power, no sum over floats, and nothing drawn or filtered by Pillow.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

PAD = 12  # pixels around the picture, from which shadows and registration errors come in

T = TypeVar("T")
Map = NDArray[Any]  # float32 (n, n), or a window of it; numpy types its scalar products too wide
Image8 = NDArray[np.uint8]
Colour = NDArray[Any]  # float32 (3, 1, 1) reflectance, 0 to 1
Window = tuple[slice, slice]
Points = list[tuple[float, float]]
Seen = tuple[bool, bool]  # stands there (before, after)
BOTH: Seen = (True, True)
# land cover, in the order of SECOND's classes
WATER, GROUND, LOW, TREE, BUILDING = 1, 2, 3, 4, 5
WHOLE: Window = (slice(None), slice(None))


def rgb(*channels: float) -> Colour:
    """Colour that broadcasts over (3, h, w)."""
    return np.array(channels, np.float32)[:, None, None]


DRY, GREEN, SOIL = rgb(0.49, 0.42, 0.32), rgb(0.28, 0.34, 0.21), rgb(0.45, 0.37, 0.30)
CALICHE, SAND, CONCRETE = rgb(0.82, 0.77, 0.65), rgb(0.62, 0.53, 0.43), rgb(0.72, 0.68, 0.60)
LEAF, TWIG, FENCE = rgb(0.15, 0.21, 0.12), rgb(0.33, 0.31, 0.29), rgb(0.16, 0.13, 0.11)
GLASS, POOL, LINE = rgb(0.10, 0.10, 0.11), rgb(0.25, 0.60, 0.66), rgb(0.80, 0.76, 0.62)
ASPHALTS = rgb(0.46, 0.455, 0.44), rgb(0.38, 0.375, 0.37), rgb(0.54, 0.525, 0.50)
SLATE, CLAY = rgb(0.36, 0.35, 0.34), rgb(0.41, 0.31, 0.26)
SHINGLES = (
    *(SLATE, CLAY, rgb(0.40, 0.37, 0.33), rgb(0.29, 0.29, 0.30), rgb(0.33, 0.36, 0.38)),
    *(rgb(0.47, 0.43, 0.37), rgb(0.60, 0.58, 0.55)),
)
METALS = rgb(0.84, 0.85, 0.85), rgb(0.66, 0.68, 0.69), rgb(0.52, 0.56, 0.60), rgb(0.74, 0.70, 0.62)
CARS = rgb(0.9, 0.9, 0.9), GLASS, rgb(0.55, 0.56, 0.58), rgb(0.5, 0.12, 0.1), rgb(0.16, 0.2, 0.32)
WATERS = rgb(0.20, 0.27, 0.17), rgb(0.36, 0.29, 0.20), rgb(0.14, 0.17, 0.17)
SKY, AIR = rgb(0.9, 1.0, 1.12), rgb(0.55, 0.60, 0.64)  # light in shadows, and of haze


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour between two."""
    return a + (b - a) * share


def clip01(x: Map) -> Map:
    """Into [0, 1]; of a signed distance in pixels + 0.5, the covered share of a pixel."""
    return np.minimum(np.maximum(x, 0), 1)


class Draw:
    """Chance, from uniform doubles only: the stream least likely to change with numpy."""

    def __init__(self, *key: int) -> None:
        self.random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).random

    def uniform(self, low: float, high: float) -> float:
        """A number between two."""
        return low + (high - low) * float(self.random())

    def chance(self, probability: float) -> bool:
        """True so often."""
        return float(self.random()) < probability

    def pick(self, options: tuple[T, ...]) -> T:
        """One of several."""
        return options[int(len(options) * float(self.random()))]

    def direction(self, spread: float) -> tuple[float, float]:
        """Unit vector around (1, 0), up to 90 degrees off at spread 1; rational, so without sin."""
        t = self.uniform(-spread, spread)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)

    def noise(self, n: int, cell: float) -> Map:
        """(n, n) value noise in [-0.5, 0.5] whose features are `cell` pixels wide."""
        position = np.arange(n) / cell
        i = position.astype(np.int64)
        f = (position - i).astype(np.float32)
        f = f * f * (3 - 2 * f)
        lattice = self.random((int(i[-1]) + 2, int(i[-1]) + 2)).astype(np.float32) - 0.5
        rows = lattice[i] + (lattice[i + 1] - lattice[i]) * f[:, None]
        return rows[:, i] + (rows[:, i + 1] - rows[:, i]) * f

    def grain(self, n: int) -> Map:
        """(n, n) independent triangular noise, standard deviation 0.29."""
        return ((self.random((n, n)) + self.random((n, n)) - 1) * 0.7).astype(np.float32)


@dataclass(frozen=True)
class Frame:
    """A place and a heading: local x runs along (ux, uy), local y a quarter turn further."""

    x: float
    y: float
    ux: float
    uy: float

    def at(self, dx: float, dy: float) -> "Frame":
        """Same heading, moved by a local offset."""
        x, y = self.x + dx * self.ux - dy * self.uy, self.y + dx * self.uy + dy * self.ux
        return Frame(x, y, self.ux, self.uy)

    def turn(self, c: float, s: float) -> "Frame":
        """Same place, heading turned by the unit vector (c, s)."""
        ux, uy = self.ux * c - self.uy * s, self.uy * c + self.ux * s
        return Frame(self.x, self.y, ux, uy)

    def local(self, n: int, reach: float) -> tuple[Window, Map, Map]:
        """The part of an (n, n) canvas within `reach`, and its local x and y in pixels."""
        left, right = (min(max(int(self.x + r), 0), n) for r in (-reach, reach + 2))
        top, bottom = (min(max(int(self.y + r), 0), n) for r in (-reach, reach + 2))
        x = np.arange(left, right, dtype=np.float32) - self.x
        y = np.arange(top, bottom, dtype=np.float32)[:, None] - self.y
        along, across = x * self.ux + y * self.uy, y * self.ux - x * self.uy
        return (slice(top, bottom), slice(left, right)), along, across


@dataclass(frozen=True)
class Part:
    """One rectangle of a roof; pitch is rise per pixel, GABLE leaves an upright end wall."""

    dx: float
    dy: float
    half_width: float
    half_depth: float
    pitch_x: float
    pitch_y: float
    lift: float = 0.0  # of chimneys and roof units, above the eaves


GABLE = 9.0


@dataclass(frozen=True)
class House:
    """A building, what the mask is about; its front faces local -y."""

    frame: Frame
    parts: list[Part]
    wall: float
    colours: tuple[Colour, Colour]
    seen: Seen
    seams: float = 0.0  # period of the seams of a metal roof; 0 for shingles

    def local(self, n: int, margin: float) -> tuple[Window, Map, Map]:
        """The window that holds all parts grown by `margin`."""
        reaches = [abs(p.dx) + abs(p.dy) + p.half_width + p.half_depth for p in self.parts]
        return self.frame.local(n, max(reaches) + margin)

    def cover(self, n: int, margin: float = 0.0) -> tuple[Window, Map]:
        """Share of each pixel under the roof grown by `margin`."""
        window, x, y = self.local(n, margin)
        cover = np.zeros_like(x)
        for p in self.parts:
            inside = np.minimum(p.half_width - abs(x - p.dx), p.half_depth - abs(y - p.dy))
            cover = np.maximum(cover, clip01(inside + (margin + 0.5)))
        return window, cover


@dataclass(frozen=True)
class Box:
    """Whatever else has an outline: lawn, driveway, fence, car, pool, pond. Never in the mask."""

    frame: Frame
    half_width: float
    half_depth: float
    colour: Colour
    seen: Seen = BOTH
    height: float = 0.0
    later: Colour | None = None  # its colour at the second date, if another
    rough: float = 0.0  # pixels by which the outline wanders
    round: bool = False
    layer: int = 0  # 0 ground, 1 paving and what stands on it
    land: int = GROUND  # what it is to `draw_land`, unless it has a height

    def cover(self, n: int, wobble: Map | None = None) -> tuple[Window, Map]:
        """Share of each pixel; ground with a rough outline also fades out."""
        reach = 1.42 * max(self.half_width, self.half_depth) + self.rough + 1
        window, x, y = self.frame.local(n, reach)
        if self.round:
            x, y = x / self.half_width, y / self.half_depth
            inside = (1 - np.sqrt(x * x + y * y)) * min(self.half_width, self.half_depth)
        else:
            inside = np.minimum(self.half_width - abs(x), self.half_depth - abs(y))
        if wobble is not None and self.rough:
            inside = inside + self.rough * wobble[window]
        if self.layer:
            return window, clip01(inside + 0.5)
        return window, clip01(inside / (1 + self.rough / 2) + 0.5) * 0.85


@dataclass(frozen=True)
class Road:
    """A street, highway or track; `distance` (n, n) is that to its centre line."""

    points: Points
    half_width: float
    kind: str
    colours: tuple[Colour, Colour]
    seen: Seen
    graded: bool  # a bare strip lies there before the road is built
    distance: Map


@dataclass(frozen=True)
class Tree:
    """A crown of one radius per date (0: not there), evergreen (bare = 0) or leafless in winter."""

    x: float
    y: float
    radii: tuple[float, float]
    bare: float
    tone: float


@dataclass(frozen=True)
class Date:
    """Season, light and sensor: what sets two pictures of an unchanged place apart."""

    green: float
    sun: tuple[float, float]  # unit vector towards the sun
    climb: float  # tangent of its elevation
    ambient: float
    gain: Colour
    haze: float
    contrast: float
    saturation: float
    blur: float  # below 0 it sharpens
    noise: float
    shift: tuple[float, float]  # misregistration in pixels


@dataclass(frozen=True)
class Scene:
    """Everything about a pair but its pixels."""

    n: int
    draw: Draw
    changed: bool
    dates: tuple[Date, Date]
    ground: tuple[Colour, Colour, Colour]  # of dry grass, green grass and soil
    cover: Map  # where grass grows well, or not
    detail: Map  # small texture, the same at both dates
    wobble: Map  # by which outlines wander
    taken: NDArray[np.bool_]  # by roads and houses, whatever the date
    roads: list[Road] = field(default_factory=list)
    houses: list[House] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
