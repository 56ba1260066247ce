"""A planned scene as pictures and masks.

paint       Canvas (3, n, n) and (n, n)     colour, height, slopes; n = size + 2 * PAD
expose      (size, size, 3) uint8           sun, shadows, haze, contrast, blur, noise, crop
draw_mask   (size, size) uint8              roofs of one date only, on the grid of `before`
draw_land   (size, size) uint8              land cover of one date, on the grid of `before`
"""

import math

import numpy as np

from pairs.synthetic.scene import (
    AIR,
    BUILDING,
    CALICHE,
    CONCRETE,
    GABLE,
    GROUND,
    LEAF,
    LINE,
    LOW,
    PAD,
    SAND,
    SKY,
    TREE,
    TWIG,
    WHOLE,
    Colour,
    Date,
    Draw,
    Frame,
    House,
    Image8,
    Map,
    Road,
    Scene,
    Window,
    clip01,
    mix,
)

# Roofs are brighter than the ground around them, on photographs by a factor of 1.4
GROUND_SHADE = 0.72


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
    canvas.colour[:] = (grass + bare * (soil - grass)) * texture * GROUND_SHADE


def paint_boxes(canvas: Canvas, scene: Scene, date: int, layer: int) -> None:
    """Flat things, and upright ones with a flat top."""
    texture = 1 + (0.08 if layer else 0.25) * scene.detail
    for box in scene.boxes:
        if box.seen[date] and box.layer == layer:
            window, cover = box.cover(scene.n, scene.wobble)
            colour = box.later if date and box.later is not None else box.colour
            shade = 1.0 if box.layer else GROUND_SHADE
            canvas.lay(window, cover, colour * shade, texture[window])
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
