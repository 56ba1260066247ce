"""What stands where in a scene, and at which of the two dates: suburbs, farms, halls, trees."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from pairs.synthetic.scene import (
    ASPHALTS,
    BOTH,
    CALICHE,
    CARS,
    CONCRETE,
    DRY,
    FENCE,
    GABLE,
    GLASS,
    GREEN,
    LOW,
    METALS,
    POOL,
    SAND,
    SHINGLES,
    SLATE,
    SOIL,
    TWIG,
    WATER,
    WATERS,
    Box,
    Colour,
    Date,
    Draw,
    Frame,
    House,
    Map,
    Part,
    Points,
    Road,
    Scene,
    Seen,
    Tree,
    clip01,
    mix,
    rgb,
)


def plan(draw: Draw, n: int) -> Scene:
    """Choose a place, its two dates and what is built in between."""
    cover = 0.9 * draw.noise(n, 90) + 0.5 * draw.noise(n, 37) + 0.3 * draw.noise(n, 17)
    for _ in range(int(draw.uniform(0, 3.5))):  # behind each line another field begins
        _, _, y = anywhere(draw, n, 0.5).local(n, 2 * n)
        cover += draw.uniform(-0.5, 0.5) * clip01(y)
    detail = 0.45 * draw.noise(n, 11) + 0.5 * draw.noise(n, 5.3) + 0.6 * draw.noise(n, 2.3)
    detail += 0.5 * draw.grain(n) + furrows(draw, n)
    detail *= draw.uniform(0.45, 1.1) * 1.5
    wobble = draw.noise(n, 23) + draw.noise(n, 9) + 0.5 * draw.noise(n, 4)
    first = plan_date(draw, 0.0)
    dates = first, halfway(first, plan_date(draw, 1.2))
    changed, taken = draw.chance(0.85), np.zeros((n, n), bool)
    greys = SOIL, FENCE, TWIG, CONCRETE, SAND  # no two regions have the same soil
    dry, green, soil = (mix(c, draw.pick(greys), draw.uniform(0, 0.5)) for c in (DRY, GREEN, SOIL))
    scene = Scene(n, draw, changed, dates, (dry, green, soil), cover, detail, wobble, taken)
    kind = draw.pick((*["suburb"] * 9, "farms", "halls", "halls"))
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
        blur=draw.uniform(-0.5, 0.0),
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
    window, cover = house.cover(scene.n, 0.7)  # neighbours nearly touch
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


def dwelling(draw: Draw, frame: Frame, colour: Colour, seen: Seen, widest: float = 18.0) -> House:
    """A family house: a hip or gable roof with up to two wings; its half width has a limit."""
    half_width, half_depth = min(draw.uniform(12.5, 18), widest), draw.uniform(11.5, 20)
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
    block, lot, family = draw.uniform(135, 165), draw.uniform(29, 46), draw.pick(SHINGLES)
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
    house = dwelling(draw, spot, family, seen, yard["width"] / 2 - 2.5)
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
    boxes.append(Box(drive, draw.uniform(4, 7), front / 2, pale, seen, layer=1))
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
