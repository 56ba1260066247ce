"""A scene of houses, streets and fields, drawn from a seed at two dates.

A pair of pictures is one planned `Scene`, painted and exposed once per date. Every thing in it has
a colour and a height in pixels of 0.5 m; cast shadows and the shading of roofs and crowns follow
from the heights, so a sun that moved turns all of them alike.

    plan        Scene                           what stands where, and at which of the two dates
    paint       Canvas (3, n, n) and (n, n)     colour, height, slopes; n = size + 2 * PAD
    expose      (size, size, 3) uint8           sun, shadows, haze, contrast, blur, noise, crop
    draw_mask   (size, size) uint8              roofs of one date only, on the grid of `before`
    draw_land   (size, size) uint8              land cover of one date, on the grid of `before`

The same seed gives the same pixels everywhere: all chance is `Generator.random()` of PCG64, and all
arithmetic is elementwise + - * / and sqrt, which IEEE 754 rounds alike on every machine. Hence no
sin, exp or power, no sum over floats, and nothing drawn or filtered by Pillow.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
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


# ---- what a scene is made of ---------------------------------------------------------------------


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


# ---- plan ----------------------------------------------------------------------------------------


def plan(draw: Draw, n: int) -> Scene:
    """Choose a place, its two dates and what is built in between."""
    cover = 0.9 * draw.noise(n, 90) + 0.5 * draw.noise(n, 37) + 0.3 * draw.noise(n, 17)
    for _ in range(int(draw.uniform(0, 3.5))):  # behind each line another field begins
        _, _, y = anywhere(draw, n, 0.5).local(n, 2 * n)
        cover += draw.uniform(-0.5, 0.5) * clip01(y)
    detail = 0.45 * draw.noise(n, 11) + 0.5 * draw.noise(n, 5.3) + 0.6 * draw.noise(n, 2.3)
    detail += 0.5 * draw.grain(n) + furrows(draw, n)
    detail *= draw.uniform(0.45, 1.1)
    wobble = draw.noise(n, 23) + draw.noise(n, 9) + 0.5 * draw.noise(n, 4)
    first = plan_date(draw, 0.0)
    dates = first, halfway(first, plan_date(draw, 1.2))
    changed, taken = draw.chance(0.85), np.zeros((n, n), bool)
    greys = SOIL, FENCE, TWIG, CONCRETE, SAND  # no two regions have the same soil
    dry, green, soil = (mix(c, draw.pick(greys), draw.uniform(0, 0.5)) for c in (DRY, GREEN, SOIL))
    scene = Scene(n, draw, changed, dates, (dry, green, soil), cover, detail, wobble, taken)
    kind = draw.pick((*["suburb"] * 6, "farms", "halls", "halls"))
    plan_extras(scene)
    if kind == "suburb":
        plan_suburb(scene)
    else:
        plan_country(scene, halls=kind == "halls")
    plan_trees(scene, draw.uniform(-0.25, 0.7) if kind != "halls" else 0.6)
    return scene


def plan_date(draw: Draw, shift: float) -> Date:
    """Anything from hard, warm light on dry ground to a dim and green day."""
    c, s = draw.direction(0.5)
    gain, warm, tint = (
        draw.uniform(0.65, 1.35),
        draw.uniform(-0.09, 0.08),
        draw.uniform(-0.03, 0.03),
    )
    return Date(
        green=draw.uniform(-0.15, 0.85),
        sun=(s, c) if draw.chance(0.85) else (c, s),  # from the south, now and then east or west
        climb=draw.uniform(0.65, 1.7),
        ambient=draw.uniform(0.14, 0.36),
        gain=rgb(1 + warm, 1 + tint, 1 - warm) * gain,
        haze=draw.uniform(0, 0.12),
        contrast=draw.uniform(0.9, 1.4),
        saturation=draw.uniform(0.45, 1.05),
        blur=draw.uniform(-0.22, 0.06),
        noise=draw.uniform(0.004, 0.022),
        shift=(draw.uniform(-shift, shift), draw.uniform(-shift, shift)),
    )


def halfway(first: Date, other: Date) -> Date:
    """Between two dates: light and season of a place differ less than those of two places do."""
    (a, b), (c, d) = first.sun, other.sun
    x, y = a + c, b + d
    length = math.sqrt(x * x + y * y)
    between = {
        name: (getattr(first, name) + getattr(other, name)) / 2
        for name in ("green", "climb", "ambient", "gain", "haze", "contrast", "saturation")
    }
    return replace(other, sun=(x / length, y / length), **between)


def furrows(draw: Draw, n: int) -> Map:
    """(n, n) parallel lines, straight like a plough's or bent like terraces, fading in and out."""
    _, _, y = anywhere(draw, n, 0.5).local(n, 2 * n)
    y = (y + draw.uniform(0, 90) * draw.noise(n, 110)) * draw.uniform(0.25, 0.6)
    profile = (draw.random(4 * n + 200) - 0.5).astype(np.float32)
    lines = profile[y.astype(np.int64) + 2 * n + 100]
    return lines * clip01(draw.noise(n, 70) + draw.uniform(0, 0.5)) * 1.2


def anywhere(draw: Draw, n: int, inset: float) -> Frame:
    """Any place in the middle 2 * inset of the canvas, any heading."""
    x, y = (n * draw.uniform(0.5 - inset, 0.5 + inset) for _ in "xy")
    return Frame(x, y, *draw.pick(((1, 0), (0, 1), (-1, 0), (0, -1)))).turn(*draw.direction(0.42))


def curve(frame: Frame, back: float, ahead: float, bend: float) -> Points:
    """A quadratic Bezier along the heading, bent by about `bend` pixels, as 12 straight pieces."""
    a, b, c = frame.at(-back, bend), frame.at(0, -bend), frame.at(ahead, bend)
    points = []
    for i in range(13):
        t = i / 12
        u, v, w = (1 - t) * (1 - t), 2 * t * (1 - t), t * t
        points.append((u * a.x + v * b.x + w * c.x, u * a.y + v * b.y + w * c.y))
    return points


def pieces(points: Points) -> Iterator[tuple[Frame, float]]:
    """Start, heading and length of each straight piece."""
    for (ax, ay), (bx, by) in pairwise(points):
        length = math.sqrt((bx - ax) * (bx - ax) + (by - ay) * (by - ay))
        yield Frame(ax, ay, (bx - ax) / length, (by - ay) / length), length


def walk(points: Points, step: float, start: float) -> Iterator[Frame]:
    """A frame every `step` pixels."""
    for frame, length in pieces(points):
        while start < length:
            yield frame.at(start, 0)
            start += step
        start -= length


def add_road(
    scene: Scene, points: Points, kind: str, seen: Seen, *, bulb: float = 0.0, graded: bool = False
) -> Road:
    """Lay a road; `bulb` is the radius of the turning circle at its end."""
    draw, n = scene.draw, scene.n
    half_width = {"street": 8.5, "highway": 10.0, "track": 2.5}[kind] + draw.uniform(0, 2.5)
    reach = half_width + 20
    distance = np.full((n, n), reach * reach, np.float32)
    for frame, length in pieces(points):
        window, x, y = frame.at(length / 2, 0).local(n, length / 2 + reach)
        beyond = np.maximum(abs(x) - length / 2, 0)
        distance[window] = np.minimum(distance[window], beyond * beyond + y * y)
    distance = np.sqrt(distance)
    if bulb:
        window, x, y = Frame(*points[-1], 1, 0).local(n, bulb + reach)
        ring = np.maximum(np.sqrt(x * x + y * y) - (bulb - half_width), 0)
        distance[window] = np.minimum(distance[window], ring)
    new = SAND if kind == "track" else draw.pick(ASPHALTS)
    aged = mix(new, CALICHE if kind == "track" else draw.pick(ASPHALTS), 0.3)
    scene.roads.append(Road(points, half_width, kind, (new, aged), seen, graded, distance))
    np.logical_or(scene.taken, distance < half_width + 4, out=scene.taken)
    return scene.roads[-1]


def add_house(scene: Scene, house: House) -> bool:
    """Build unless something stands there or nobody would see it."""
    window, cover = house.cover(scene.n, 3)
    if not cover.size or (scene.taken[window] & (cover > 0.5)).any():
        return False
    scene.taken[window] |= cover > 0.5
    scene.houses.append(house)
    return True


def park(scene: Scene, frame: Frame, seen: Seen, chance: float) -> None:
    """Perhaps a car with a dark windscreen, another one or none at the other date."""
    for date in (0, 1):
        if seen[date] and scene.draw.chance(chance):
            now = (date == 0, date == 1)
            scene.boxes.append(Box(frame, 4.3, 1.9, scene.draw.pick(CARS), now, 2.5, layer=1))
            scene.boxes.append(Box(frame.at(1, 0), 0.9, 1.5, GLASS, now, 2.5, layer=1))


def dwelling(draw: Draw, frame: Frame, colour: Colour, seen: Seen) -> House:
    """A family house: a hip or gable roof with up to two wings."""
    half_width, half_depth = draw.uniform(12.5, 18), draw.uniform(11.5, 17)
    pitch, gable, wide = draw.uniform(0.35, 0.75), draw.chance(0.2), half_width > half_depth
    pitch_x, pitch_y = GABLE if gable and wide else pitch, GABLE if gable and not wide else pitch
    parts = [Part(0, 0, half_width, half_depth, pitch_x, pitch_y)]
    for front in (-1, 1):
        if draw.chance(0.7):
            w, d = draw.uniform(5.5, 9), draw.uniform(7, 11)
            dx = (half_width - w + draw.uniform(-4, 2)) * draw.pick((-1, 1))
            dy = (half_depth - d + draw.uniform(2, 8)) * front
            parts.append(Part(dx, dy, w, d, pitch, draw.pick((pitch, pitch, GABLE))))
    for _ in range(int(draw.uniform(0, 3))):  # chimneys and vents stand out by their shadows
        dx, dy = draw.uniform(-0.6, 0.6) * half_width, draw.uniform(-0.6, 0.6) * half_depth
        parts.append(Part(dx, dy, 0.8, 0.8, 0.0, 0.0, pitch * half_depth + 1))
    colour = mix(colour, draw.pick(SHINGLES), 0.35)
    later = draw.pick(SHINGLES) if draw.chance(0.08) else mix(colour, SLATE, 0.2)
    return House(frame, parts, draw.uniform(4.5, 7), (colour, later), seen)


def hall(draw: Draw, frame: Frame, size: float, seen: Seen) -> House:
    """A flat or low metal roof: workshop, school, barn."""
    half_width, half_depth = size * draw.uniform(0.8, 1.6), size * draw.uniform(0.45, 0.9)
    flat = draw.chance(0.4)
    pitch_x, pitch_y = (0.0, 0.0) if flat else (GABLE, draw.uniform(0.08, 0.35))
    parts = [Part(0, 0, half_width, half_depth, pitch_x, pitch_y)]
    if draw.chance(0.4):
        w, d = half_width * draw.uniform(0.3, 0.6), half_depth * draw.uniform(0.4, 0.8)
        dx, dy = (half_width - w) * draw.pick((-1, 1)), half_depth + d * draw.uniform(-0.5, 0.9)
        parts.append(Part(dx, dy, w, d, pitch_x, pitch_y))
    for _ in range(int(draw.uniform(0, 7)) if flat else 0):
        dx, dy = draw.uniform(-0.8, 0.8) * half_width, draw.uniform(-0.8, 0.8) * half_depth
        parts.append(Part(dx, dy, 1.6, 1.6, 0.0, 0.0, 3.0))
    colour = draw.pick(METALS)
    later = mix(colour, draw.pick(METALS), draw.uniform(0, 0.4))
    seams = 0.0 if flat else draw.uniform(2.5, 6)
    return House(frame, parts, draw.uniform(6, 13), (colour, later), seen, seams)


def plan_suburb(scene: Scene) -> None:
    """Parallel streets with a row of houses on each side; some are new, some have gaps."""
    draw, n = scene.draw, scene.n
    base, bend = anywhere(draw, n, 0.3), draw.uniform(-0.12, 0.12) * n
    block, lot, family = draw.uniform(135, 165), draw.uniform(38, 50), draw.pick(SHINGLES)
    stories = (*["new"] * 4, "infill", "old") if scene.changed else ("old", "old", "none")
    rows = []
    for k in (0, -1, 1, -2, 2):
        story = draw.pick(stories)
        if k == 0 and story == "none":
            story = stories[0]
        if story == "none":
            continue
        ends_here = draw.chance(0.3)
        ahead, bulb = (draw.uniform(20, 60), draw.uniform(18, 24)) if ends_here else (n, 0.0)
        points = curve(base.at(draw.uniform(-30, 30), k * block), n, ahead, bend)
        seen = (draw.chance(0.4), True) if story == "new" else BOTH
        graded = not seen[0] and draw.chance(0.4)
        rows.append((story, add_road(scene, points, "street", seen, bulb=bulb, graded=graded)))
    for story, road in rows:  # after all roads, which houses have to avoid
        share = {"new": 1.0, "infill": draw.uniform(0.2, 0.6), "old": 0.0}[story]
        for side in (1, -1):
            setback = draw.uniform(12, 20)
            depth = block / 2 - road.half_width - setback  # as far as the next street's gardens
            yard = {"width": lot, "depth": depth, "setback": setback}
            for spot in walk(road.points, lot, draw.uniform(0, 30)):
                heading = spot.turn(side, 0)
                plan_lot(scene, heading, road, share_new=share, family=family, **yard)
        for spot in walk(road.points, 30, draw.uniform(5, 30)):
            lane = draw.pick((-1, 1)) * (road.half_width - 2.8)
            park(scene, spot.at(draw.uniform(-9, 9), lane), road.seen, 0.2)


def plan_lot(
    scene: Scene, spot: Frame, road: Road, *, share_new: float, family: Colour, **yard: float
) -> None:
    """One lot of a row: a new, an old or a vanished house, or none; `yard` is for plan_garden."""
    draw = scene.draw
    new, gone, left_free = draw.chance(share_new), draw.chance(0.04), draw.chance(0.07)
    seen = (not new, new or not (scene.changed and gone))
    house = dwelling(draw, spot, family, seen)
    to_front = max(p.half_depth - p.dy for p in house.parts)
    middle = spot.at(0, road.half_width + yard["setback"] + to_front)
    house = replace(house, frame=middle.at(draw.uniform(-2, 2), 0))
    if not left_free and add_house(scene, house):
        plan_garden(scene, middle, seen, front=yard["setback"] + to_front, **yard)


def plan_garden(
    scene: Scene,
    frame: Frame,
    seen: Seen,
    *,
    front: float,
    width: float,
    depth: float,
    setback: float,
) -> None:
    """Lawn, fences, driveway, patio, pool and junk; the road is `front` pixels off, at -y."""
    draw, boxes = scene.draw, scene.boxes
    back = max(depth + setback - front, 24.0)
    tone, bare = draw.uniform(-0.5, 0.5), draw.pick((0.2, 0.3, 0.8))
    dry, green, _ = scene.ground
    lawns = [mix(dry, green, min(max(date.green + tone, 0.0), 1.0)) for date in scene.dates]
    lawn, later = mix(lawns[0], SOIL, 0.4), mix(lawns[1], SOIL, bare)
    middle, half = frame.at(0, (back - front) / 2 + 2), (back + front) / 2 - 2
    boxes.append(Box(middle, width / 2, half, lawn, seen, later=later, rough=2, land=LOW))
    if seen == (False, True) and draw.chance(0.25):  # graded ground or a slab, but no house yet
        bare_lot, graded = (True, False), mix(SOIL, CALICHE, 0.4)
        boxes.append(Box(middle, width / 2 + 3, half, graded, bare_lot, rough=9))
        if draw.chance(0.4):
            boxes.append(Box(frame, 14, 13, CONCRETE, bare_lot, layer=1))
    if draw.chance(0.85):
        wood, side = mix(FENCE, SAND, draw.uniform(0, 0.4)), width / 2
        boxes.append(Box(frame.at(0, back), side, 0.9, wood, seen, 4, layer=1))
        boxes.append(Box(frame.at(-side, back / 2), 0.9, back / 2, wood, seen, 4, layer=1))
        boxes.append(Box(frame.at(side, back / 2), 0.9, back / 2, wood, seen, 4, layer=1))
    pale = mix(CONCRETE, draw.pick((SAND, CALICHE, FENCE)), draw.uniform(0, 0.5))
    drive = frame.at(draw.pick((-1, 1)) * draw.uniform(5, 10), -front / 2)
    boxes.append(Box(drive, draw.uniform(4, 5.5), front / 2, pale, seen, layer=1))
    park(scene, drive.at(draw.uniform(-2, 2), draw.uniform(-9, -3)).turn(0, 1), seen, 0.4)
    patio = frame.at(draw.uniform(-6, 6), draw.uniform(14, 19))
    boxes.append(Box(patio, draw.uniform(2, 6), 4, pale, seen, layer=1))
    for _ in range(int(draw.uniform(0, 4))):  # sheds, trampolines, heaps: too small to be labelled
        place = frame.at(draw.uniform(-0.4, 0.4) * width, draw.uniform(0.55, 0.9) * back)
        size, colour = draw.uniform(1, 2.5), mix(draw.pick(CARS), SOIL, draw.uniform(0.1, 0.8))
        there, is_round = (seen[0] and draw.chance(0.6), seen[1]), draw.chance(0.4)
        boxes.append(Box(place, size, size, colour, there, 3, round=is_round, layer=1))
    if draw.chance(0.1):
        pool, there = (
            frame.at(draw.uniform(-8, 8), back - 11),
            (seen[0] and draw.chance(0.6), seen[1]),
        )
        boxes.append(Box(pool, 8, 5.5, CONCRETE, there, rough=2, round=True, layer=1))
        boxes.append(Box(pool, 5, 3.5, POOL, there, rough=2, round=True, layer=1, land=WATER))


def plan_country(scene: Scene, halls: bool) -> None:
    """One road or track with scattered farms, or with large halls and their yards."""
    draw, n = scene.draw, scene.n
    base = anywhere(draw, n, 0.3)
    kind = draw.pick(("highway", "street") if halls else ("highway", "track", "track", "street"))
    road = add_road(scene, curve(base, n, n, draw.uniform(-0.15, 0.15) * n), kind, BOTH)
    if draw.chance(0.5):
        path = curve(base.turn(0, 1), 0, n, draw.uniform(-0.2, 0.2) * n)
        add_road(scene, path, "track", (not scene.changed or draw.chance(0.6), True))
    for spot in walk(road.points, draw.uniform(35, 90), 10):
        if draw.chance(0.35):
            continue
        new, gone = scene.changed and draw.chance(0.7), scene.changed and draw.chance(0.1)
        seen, big = (not new, new or not gone), halls and draw.chance(0.8)
        size = draw.uniform(22, 48) if big else draw.uniform(9, 20)
        offset = road.half_width + size + draw.uniform(8, 30 if halls else 90)
        frame = spot.turn(draw.pick((-1, 1)), 0).at(0, offset)
        frame = frame if halls else frame.turn(*draw.direction(0.5))
        is_hall = big or draw.chance(0.35)
        house = hall(draw, frame, size, seen) if is_hall else dwelling(draw, frame, SLATE, seen)
        if add_house(scene, house):
            plan_yard(scene, house, size if is_hall else 16, offset, big)


def plan_yard(scene: Scene, house: House, size: float, offset: float, big: bool) -> None:
    """Worn ground and a drive for a farm; a car park and roof units for a hall."""
    draw, boxes, frame, seen = scene.draw, scene.boxes, house.frame, house.seen
    soil = mix(SOIL, CALICHE, draw.uniform(0, 0.7))
    later = mix(soil, SOIL, 0.5)
    boxes.append(Box(frame, size * 1.7, size * 1.5, soil, seen, later=later, rough=12, round=True))
    if not big:
        drive = frame.at(draw.uniform(-8, 8), -offset / 2)
        boxes.append(Box(drive, 2.5, offset / 2, SAND, seen, rough=3, layer=1))
        return
    grey = mix(draw.pick(ASPHALTS), draw.pick((CONCRETE, SAND)), draw.uniform(0, 0.8))
    half_width = size * draw.uniform(1.2, 1.8)
    yard = frame.at(draw.uniform(-9, 9), -size - draw.uniform(0, 8))
    boxes.append(Box(yard, half_width, size * 1.1, grey, seen, rough=1))
    for i in range(int(half_width / 3)):
        park(scene, yard.at(6 * i - half_width + 3, 0).turn(0, 1), seen, 0.35)


def plan_extras(scene: Scene) -> None:
    """Bare patches and ponds, which come, go and turn colour without being a change."""
    draw = scene.draw
    for _ in range(int(draw.uniform(0, 4))):
        frame, size, ratio = anywhere(draw, scene.n, 0.5), draw.uniform(8, 70), draw.uniform(0.3, 1)
        bare = mix(SOIL, draw.pick((CALICHE, SAND, FENCE, *ASPHALTS)), draw.uniform(0, 1))
        later = mix(bare, draw.pick((CALICHE, SOIL, SAND, bare)), draw.uniform(0, 0.8))
        seen, rough = draw.pick((BOTH, (True, False), (False, True))), size * draw.uniform(0, 0.7)
        patch = Box(frame, size, size * ratio, bare, seen, later=later, rough=rough)
        scene.boxes.append(replace(patch, round=draw.chance(0.6)))
    if draw.chance(0.15):
        frame, x, y = anywhere(draw, scene.n, 0.5), draw.uniform(12, 40), draw.uniform(9, 30)
        water, later = draw.pick(WATERS), draw.pick(WATERS)
        shore = Box(frame, x + 5, y + 5, SAND, later=SOIL, rough=5, round=True)
        pond = Box(frame, x, y, water, later=later, rough=5, round=True, land=WATER)
        scene.boxes.extend((shore, pond))
        window, cover = shore.cover(scene.n)
        scene.taken[window] |= cover > 0


def plan_trees(scene: Scene, edge: float) -> None:
    """Woods where a noise is above `edge`, lone trees elsewhere, few in gardens, none on roofs."""
    draw, n, cell = scene.draw, scene.n, 8.0
    blocked, gardens = np.zeros((2, 2, n, n), bool)
    for date in (0, 1):
        for road in scene.roads:
            if road.seen[date]:
                blocked[date] |= road.distance < road.half_width + 3
        for house in scene.houses:
            if house.seen[date]:
                window, cover = house.cover(n, 4)
                blocked[date][window] |= cover > 0
        for box in scene.boxes:
            if box.seen[date]:
                window, cover = box.cover(n)
                (blocked if box.layer else gardens)[date][window] |= cover > 0
    woods = draw.noise(n, 60) + 0.6 * draw.noise(n, 25)
    lone, felled = draw.uniform(0, 0.1), draw.uniform(-0.5, 0.5) if draw.chance(0.15) else -2.0
    rows = int(n / cell)
    chances = draw.random((rows * rows, 9)).tolist()
    for i, (dx, dy, luck, size, keep, growth, tone, bare, bare2) in enumerate(chances):
        if luck > 0.9:
            continue
        x, y = cell * (i % rows + dx), cell * (i // rows + dy)
        at = int(y), int(x)
        in_woods = float(woods[at]) > edge
        if luck > lone and not in_woods:
            continue
        radius = (3.5 + 6 * size * size) if in_woods else (1.5 + 7 * size * size)
        before, after = (not blocked[d][at] and (keep < 0.2 or not gardens[d][at]) for d in (0, 1))
        after = after and keep < 0.97 and float(woods[at]) > felled
        radii = before * radius, after * radius * (0.9 + 0.25 * growth)
        if before or after:
            scene.trees.append(Tree(x, y, radii, bare * bare2, 0.75 + 0.55 * tone))


# ---- paint ---------------------------------------------------------------------------------------


class Canvas:
    """One date being painted: colour (3, n, n); height and slopes (n, n), in pixels."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.colour = np.zeros((3, n, n), np.float32)
        self.height, self.slope_x, self.slope_y = np.zeros((3, n, n), np.float32)

    def lay(self, window: Window, cover: Map, colour: Colour, texture: Map | float = 1.0) -> None:
        """Lay a colour over the covered share of a window."""
        area = self.colour[:, window[0], window[1]]
        area += cover * (colour * texture - area)

    def raise_to(self, window: Window, height: Map) -> None:
        """Lift the surface where it is lower."""
        self.height[window] = np.maximum(self.height[window], height)


def paint(scene: Scene, date: int, draw: Draw) -> Canvas:
    """All that stands at a date, from the ground up."""
    canvas = Canvas(scene.n)
    paint_ground(canvas, scene, scene.dates[date], draw)
    paint_boxes(canvas, scene, date, layer=0)
    for road in sorted(scene.roads, key=lambda road: road.kind != "track"):  # tracks end at a kerb
        paint_road(canvas, scene, road, date)
    paint_boxes(canvas, scene, date, layer=1)
    for house in scene.houses:
        if house.seen[date]:
            paint_house(canvas, house, date, 1 + 0.14 * scene.detail)
    paint_trees(canvas, scene, date, draw)
    return canvas


def paint_ground(canvas: Canvas, scene: Scene, date: Date, draw: Draw) -> None:
    """Grass between green and dry, soil where it is thin; the season moves, the patches stay."""
    n, cover, detail = scene.n, scene.cover, scene.detail
    season = 0.3 * draw.noise(n, 55) + 0.25 * draw.noise(n, 9)
    dry, green, soil = scene.ground
    grass = dry + clip01(date.green + 1.1 * cover + 0.4 * detail + season) * (green - dry)
    bare = clip01(1.5 * (detail + season - 0.9 * cover) - 0.25)
    texture = 1 + 0.3 * detail + 0.08 * draw.noise(n, 3) - 0.15 * cover
    canvas.colour[:] = (grass + bare * (soil - grass)) * texture


def paint_boxes(canvas: Canvas, scene: Scene, date: int, layer: int) -> None:
    """Flat things, and upright ones with a flat top."""
    texture = 1 + (0.08 if layer else 0.25) * scene.detail
    for box in scene.boxes:
        if box.seen[date] and box.layer == layer:
            window, cover = box.cover(scene.n, scene.wobble)
            colour = box.later if date and box.later is not None else box.colour
            canvas.lay(window, cover, colour, texture[window])
            if box.height:
                canvas.raise_to(window, cover * box.height)


def paint_road(canvas: Canvas, scene: Scene, road: Road, date: int) -> None:
    """Surface, worn lanes, and kerbs, verges or markings by kind."""
    inside = road.half_width - road.distance
    if not (inside > -8).any():  # it passes by
        return
    texture = 1 + 0.1 * scene.detail
    is_bare = road.graded and date == 0
    if is_bare or (road.kind == "track" and road.seen[date]):
        cover = clip01(inside + 2.5 * scene.wobble + 0.5) * 0.85
        canvas.lay(
            WHOLE, cover, CALICHE if is_bare else road.colours[date], 1 + 0.25 * scene.detail
        )
    elif road.seen[date]:
        if road.kind == "street":
            canvas.lay(WHOLE, clip01(inside + 1.8), CONCRETE)
            canvas.lay(WHOLE, clip01(1.5 - abs(inside + 6)) * 0.6, CONCRETE)
        else:
            canvas.lay(WHOLE, clip01((inside + 5) / 4 + scene.wobble) * 0.6, SAND, texture)
        texture *= 1 - 0.06 * clip01(1 - abs(inside - road.half_width / 2) / 2)
        canvas.lay(WHOLE, clip01(inside + 0.5), road.colours[date], texture)
        if road.kind == "highway":
            canvas.lay(WHOLE, clip01(1.3 - road.distance) * 0.4, LINE)
            canvas.lay(WHOLE, clip01(1 - abs(inside - 2)) * 0.6, LINE)


def paint_house(canvas: Canvas, house: House, date: int, texture: Map) -> None:
    """The highest part at each pixel decides, and its face's slope meets the sun."""
    window, cover = house.cover(canvas.n)
    _, x, y = house.local(canvas.n, 0)
    roof, (slope_x, slope_y, ridge) = np.full_like(x, -1), np.zeros((3, *x.shape), np.float32)
    for p in house.parts:
        to_x, to_y = p.half_width - abs(x - p.dx), p.half_depth - abs(y - p.dy)
        rise_x, rise_y = to_x * p.pitch_x, to_y * p.pitch_y
        rise, faces_x = np.minimum(rise_x, rise_y) + p.lift, rise_x < rise_y
        higher = (rise > roof) & (to_x > -0.5) & (to_y > -0.5)
        roof[higher] = rise[higher]
        pitch_x, pitch_y = (
            p.pitch_x % GABLE,
            p.pitch_y % GABLE,
        )  # an end wall is not seen from above
        slope_x[higher] = (-pitch_x * np.sign(x - p.dx) * faces_x)[higher]
        slope_y[higher] = (-pitch_y * np.sign(y - p.dy) * ~faces_x)[higher]
        ridge[higher] = clip01(1 - 2 * abs(rise_x - rise_y))[higher]
    surface = texture[window] * (1 + 0.12 * ridge)
    if house.seams:
        phase = x / house.seams
        surface *= 1 - 0.1 * (phase - np.floor(phase) < 0.4).astype(np.float32)
    canvas.lay(window, cover, house.colours[date], surface)
    canvas.raise_to(window, cover * (house.wall + roof))
    solid, ux, uy = cover > 0.5, house.frame.ux, house.frame.uy
    canvas.slope_x[window][solid] = (slope_x * ux - slope_y * uy)[solid]
    canvas.slope_y[window][solid] = (slope_x * uy + slope_y * ux)[solid]


def paint_trees(canvas: Canvas, scene: Scene, date: int, draw: Draw) -> None:
    """Bumpy domes; a leafless crown lets the ground through and casts less shadow."""
    n = scene.n
    bumps = scene.detail + 0.6 * draw.noise(n, 3.1)
    winter = min(max(1 - 1.5 * scene.dates[date].green, 0.0), 1.0)
    crowns = np.zeros((n, n), np.float32)
    for tree in scene.trees:
        radius, bare = tree.radii[date], tree.bare * winter
        if radius:
            window, x, y = Frame(tree.x, tree.y, 1, 0).local(n, radius + 2)
            dome = 1 - (x * x + y * y) / (radius * radius) + 0.7 * bumps[window]
            cover = clip01(dome * (0.6 * radius)) * (1 - 0.5 * bare)
            canvas.lay(window, cover, mix(LEAF, TWIG, bare), tree.tone * (0.85 + 0.3 * dome))
            canvas.raise_to(window, (1.1 * radius * dome + 2 * cover) * (1 - 0.6 * bare))
            crowns[window] = np.maximum(crowns[window], cover)
    top, (rise_x, rise_y) = canvas.height + 1.5 * bumps, np.zeros((2, n, n), np.float32)
    rise_x[:, 1:-1] = (top[:, 2:] - top[:, :-2]) / 2
    rise_y[1:-1] = (top[2:] - top[:-2]) / 2
    canvas.slope_x += crowns * (np.minimum(np.maximum(rise_x, -1.2), 1.2) - canvas.slope_x)
    canvas.slope_y += crowns * (np.minimum(np.maximum(rise_y, -1.2), 1.2) - canvas.slope_y)


# ---- expose --------------------------------------------------------------------------------------


def shadows(height: Map, date: Date) -> Map:
    """Share of direct light that each pixel loses to whatever rises above its ray to the sun."""
    (sx, sy), n = date.sun, len(height)
    if abs(sx) > abs(sy):  # walk along rows of the transpose, so that steps go along sy
        turned = shadows_from(height.T, sy / abs(sx), sx > 0, date.climb, n)
        return turned.T
    return shadows_from(height, sx / abs(sy), sy > 0, date.climb, n)


def shadows_from(height: Map, slide: float, from_below: bool, climb: float, n: int) -> Map:
    """The shadows of a sun `slide` pixels aside per row."""
    climb *= math.sqrt(1 + slide * slide)
    highest = height.copy()
    for step in range(1, int(22 / climb) + 1):
        whole = math.floor(step * slide)
        part, left, right = step * slide - whole, max(0, -whole), n - 1 - max(0, whole)
        there, here = slice(step, None), slice(None, n - step)
        if not from_below:
            there, here = here, there
        near, far = (height[there, left + i : right + i] for i in (whole, whole + 1))
        ray = near + part * (far - near) - step * climb
        highest[here, left:right] = np.maximum(highest[here, left:right], ray)
    return clip01((highest - height) / 1.5)


def expose(canvas: Canvas, date: Date, draw: Draw, size: int) -> Image8:
    """Light, air and sensor: (size, size, 3) uint8."""
    x, y, (sun_x, sun_y) = canvas.slope_x, canvas.slope_y, date.sun
    facing = np.maximum(1 - (x * sun_x + y * sun_y) / date.climb, 0) / np.sqrt(1 + x * x + y * y)
    direct = (1 - shadows(canvas.height, date)) * facing
    seen = slice(PAD - 3, PAD + size + 3)  # what the blur and the shift need
    light = date.ambient * SKY + (1 - date.ambient) * direct[seen, seen]
    light *= canvas.colour[:, seen, seen] * date.gain
    grey = (light[0] + light[1] + light[2]) / 3
    light = grey + date.saturation * (light - grey)
    light += date.haze * (AIR - light)
    pivot = 0.32 * date.gain[1]  # a meadow's brightness, which contrast leaves alone
    light = pivot + date.contrast * (light - pivot)
    for axis in (1, 2):  # (w, 1 - 2w, w) in both directions
        a = np.moveaxis(light, axis, 0)
        a[1:-1] += date.blur * (a[:-2] + a[2:] - 2 * a[1:-1])
    left, top = 3 + date.shift[0], 3 + date.shift[1]
    j, i = int(left), int(top)
    light = light[:, i : i + size + 1, j : j + size + 1]
    light = light[:, :-1] + (top - i) * (light[:, 1:] - light[:, :-1])
    light = light[:, :, :-1] + (left - j) * (light[:, :, 1:] - light[:, :, :-1])
    light += date.noise * (draw.grain(size) + 0.5 * draw.noise(size, 1.7))
    light += date.noise * (draw.random((3, size, size)).astype(np.float32) - 0.5) * 0.3
    pixels = np.rint(clip01(light) * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def draw_mask(scene: Scene, size: int, *, with_roads: bool) -> Image8:
    """Roofs (255), and perhaps roads (128), that stand at exactly one of the dates."""
    mask = np.zeros((scene.n, scene.n), np.uint8)
    for road in scene.roads:
        if road.seen[0] != road.seen[1] and with_roads:
            mask[road.distance < road.half_width] = 128
    for house in scene.houses:
        if house.seen[0] != house.seen[1]:
            window, cover = house.cover(scene.n)
            mask[window][cover >= 0.5] = 255
    return mask[PAD : PAD + size, PAD : PAD + size].copy()


def draw_land(scene: Scene, date: int, size: int) -> Image8:
    """Land cover of a date, WATER to BUILDING; a crown that grew covers what it will at both."""
    land = np.full((scene.n, scene.n), LOW, np.uint8)

    def lay_boxes(layer: int) -> None:
        for box in scene.boxes:
            if box.seen[date] and box.layer == layer and not box.height:  # no cars, no fences
                window, cover = box.cover(scene.n, scene.wobble)
                land[window][cover >= 0.5] = box.land

    lay_boxes(layer=0)
    for road in scene.roads:
        if road.seen[date] or (road.graded and date == 0):
            land[road.distance < road.half_width] = GROUND
    lay_boxes(layer=1)
    for house in scene.houses:
        if house.seen[date]:
            window, cover = house.cover(scene.n)
            land[window][cover >= 0.5] = BUILDING
    for tree in scene.trees:
        if tree.radii[date]:
            radius = max(tree.radii)
            window, x, y = Frame(tree.x, tree.y, 1, 0).local(scene.n, radius)
            crown = land[window]
            crown[(x * x + y * y < radius * radius) & (crown != BUILDING)] = TREE
    return land[PAD : PAD + size, PAD : PAD + size].copy()
