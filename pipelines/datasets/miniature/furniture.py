"""What stands at the kerb: poles with lamps, traffic lights, signs, and trees."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.miniature.canvas import Canvas, Colour, Point, Sketch
from pipelines.datasets.miniature.styles import Style
from pipelines.datasets.miniature.surfaces import pick
from pipelines.datasets.miniature.textures import noise

Rng = np.random.Generator
_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 13)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 13)[:-1])], 1)


def _rect(x: float, z: float, left: float, right: float, low: float, high: float) -> list[Point]:
    return [(x + left, low, z), (x + right, low, z), (x + right, high, z), (x + left, high, z)]


def _disc(x: float, y: float, z: float, radius: float) -> list[Point]:
    return [(x + radius * float(c), y + radius * float(s), z) for c, s in _CIRCLE]


def draw_lamp(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, inward: float) -> None:
    """A lamp post; its arm, where it has one, reaches over the carriageway."""
    label, w = LABEL_IDS["pole"], style.pole_width
    colour = pick(rng, (style.pole_colour,), 0.08)
    sketch = Sketch(canvas, z)
    height = rng.uniform(3.4, 4.2) if style.lamp == "lantern" else rng.uniform(6.0, 8.5)
    sketch.polygon(_rect(x, z, -w / 2, w / 2, 0.0, height), colour, label)
    sketch.polygon(_rect(x, z, -w, w, 0.0, 0.7), colour, label)
    reach = inward * rng.uniform(1.2, 2.4)
    if style.lamp == "straight":
        sketch.polygon(_rect(x, z, min(0, reach), max(0, reach), height - 0.16, height), colour, label)
        sketch.polygon(_rect(x + reach, z, -0.35, 0.35, height - 0.3, height - 0.05), (0.85, 0.85, 0.8), label)
    elif style.lamp == "curved":
        knots = [(0.0, -0.6), (0.25, -0.1), (0.6, 0.15), (1.0, 0.2)]
        for (a, ya), (b, yb) in pairwise(knots):
            corners = [(a, ya), (b, yb), (b, yb + 0.15), (a, ya + 0.15)]
            sketch.polygon([(x + reach * p, height + q, z) for p, q in corners], colour, label)
        sketch.polygon(_rect(x + reach, z, -0.3, 0.3, height + 0.05, height + 0.25), (0.9, 0.88, 0.7), label)
    else:
        sketch.polygon(_rect(x, z, -0.25, 0.25, height, height + 0.55), (0.9, 0.88, 0.75), label)
        sketch.polygon(_rect(x, z, -0.32, 0.32, height + 0.5, height + 0.65), colour, label)
    sketch.finish()


def draw_traffic_light(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, inward: float) -> None:
    """Traffic lights on a pole, in some domains also hung out over the lane."""
    pole, light, w = LABEL_IDS["pole"], LABEL_IDS["light"], style.pole_width
    colour = pick(rng, (style.pole_colour,), 0.08)
    sketch = Sketch(canvas, z)
    height = rng.uniform(3.2, 3.8)
    sketch.polygon(_rect(x, z, -w / 2, w / 2, 0.0, height + 0.2), colour, pole)
    heads = [(x, height)]
    if style.lamp != "lantern" and rng.random() < 0.5:
        reach = inward * rng.uniform(2.5, 4.0)
        sketch.polygon(_rect(x, z, -w / 2, w / 2, 0.0, 5.6), colour, pole)
        sketch.polygon(_rect(x, z, min(0, reach), max(0, reach), 5.4, 5.6), colour, pole)
        heads.append((x + reach, 5.7))
    lit = int(rng.integers(3))
    lamps: tuple[Colour, ...] = ((0.95, 0.15, 0.1), (0.98, 0.7, 0.1), (0.15, 0.9, 0.45))
    for hx, hy in heads:
        sketch.polygon(_rect(hx, z, -0.34, 0.34, hy - 1.4, hy), style.light_box, light)
        for i, lamp in enumerate(lamps):
            dim = 1.0 if i == lit else 0.28
            on: Colour = (lamp[0] * dim, lamp[1] * dim, lamp[2] * dim)
            sketch.polygon(_disc(hx, hy - 0.26 - 0.44 * i, z, 0.19), on, light)
    sketch.finish()


def draw_sign(canvas: Canvas, style: Style, rng: Rng, x: float, z: float) -> None:
    """One or two road signs on a post, of the domain's kind."""
    pole, sign, w = LABEL_IDS["pole"], LABEL_IDS["sign"], style.pole_width * 0.75
    colour = pick(rng, (style.pole_colour,), 0.08)
    sketch = Sketch(canvas, z)
    height = rng.uniform(2.2, 2.9)
    sketch.polygon(_rect(x, z, -w / 2, w / 2, 0.0, height), colour, pole)
    for level in range(int(rng.integers(1, 3))):
        y = height - 0.35 - level * 0.85
        _sign_face(sketch, style.signs, rng, x, y, z, sign)
    sketch.finish()


def _sign_face(sketch: Sketch, kind: str, rng: Rng, x: float, y: float, z: float, label: int) -> None:
    white: Colour = (0.93, 0.93, 0.92)
    red: Colour = (0.8, 0.1, 0.1)
    if kind == "boards":
        board = pick(rng, ((0.05, 0.4, 0.2), (0.9, 0.75, 0.1), (0.9, 0.9, 0.88), (0.75, 0.1, 0.1)), 0.05)
        half = rng.uniform(0.35, 0.6)
        sketch.polygon(_rect(x, z, -half, half, y - 0.35, y + 0.4), board, label)
        sketch.polygon(_rect(x, z, -half * 0.7, half * 0.7, y - 0.05, y + 0.1), white, label)
        return
    if kind == "plates":
        half = rng.uniform(0.28, 0.4)
        sketch.polygon(_rect(x, z, -half, half, y - 0.55, y + 0.45), (0.1, 0.25, 0.6), label)
        sketch.polygon(_rect(x, z, -half * 0.6, half * 0.6, y - 0.25, y + 0.2), white, label)
        return
    form = int(rng.integers(4))
    if form == 0:
        for radius, colour in ((0.42, red), (0.3, white)):
            sketch.polygon(_disc(x, y, z, radius), colour, label)
    elif form == 1:
        for r, colour in ((0.5, red), (0.32, white)):
            corners = [(x - r, y - r * 0.7, z), (x + r, y - r * 0.7, z), (x, y + r * 0.95, z)]
            sketch.polygon(corners, colour, label)
    elif form == 2:
        sketch.polygon(_disc(x, y, z, 0.42), (0.1, 0.25, 0.65), label)
        sketch.polygon(_rect(x, z, -0.07, 0.07, y - 0.25, y + 0.25), white, label)
    else:
        r = 0.42
        corners = [(x - r, y, z), (x, y + r, z), (x + r, y, z), (x, y - r, z)]
        sketch.polygon(corners, (0.95, 0.8, 0.15), label)


def draw_tree(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, sun: float) -> None:
    """A tree of the domain's habit: round on a stick, broad, ragged and see-through, or a palm."""
    label = LABEL_IDS["vegetation"]
    habit = style.trees
    height = rng.uniform(5.5, 9.0) if habit != "lollipop" else rng.uniform(4.0, 6.0)
    thick = rng.uniform(0.22, 0.4)
    trunk = pick(rng, (style.trunk,), 0.08)
    sketch = Sketch(canvas, z)
    bare = height * (0.75 if habit == "palm" else 0.5)
    sketch.polygon(_rect(x, z, -thick / 2, thick / 2, 0.0, bare), trunk, label)
    if habit == "palm":
        _fronds(sketch, style, rng, x, z, bare, label)
    sketch.finish(noise(style.seed + 52, 0.8, stretch=0.3), 0.2)
    if habit != "palm":
        _crown(canvas, style, rng, x, z, height, sun)


def _fronds(sketch: Sketch, style: Style, rng: Rng, x: float, z: float, top: float, label: int) -> None:
    for angle in np.linspace(-0.4, np.pi + 0.4, 9) + rng.uniform(-0.1, 0.1, 9):
        c, s = float(np.cos(angle)), float(np.sin(angle))
        reach = rng.uniform(1.5, 2.2)
        tip = (x + reach * c, top + reach * (s * 0.6 - 0.25), z)
        middle = (x + reach * 0.55 * c, top + reach * (s * 0.55 + 0.15), z)
        low = (x + reach * 0.5 * c, top + reach * (s * 0.55 - 0.2), z)
        colour = pick(rng, style.foliage.colours, 0.12)
        sketch.polygon([(x, top, z), middle, tip, low], colour, label)


def _crown(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, height: float, sun: float) -> None:
    """Foliage as a noisy union of discs."""
    cam = canvas.camera
    habit = style.trees
    spread = height * (0.28 if habit == "lollipop" else 0.38 if habit == "ragged" else 0.45)
    low = height * (0.45 if habit == "lollipop" else 0.33)
    (left, top), (right, bottom) = (
        cam.project((x - spread * 1.2, height * 1.08, z)),
        cam.project((x + spread * 1.2, low * 0.85, z)),
    )
    columns = np.arange(max(0, int(left)), min(cam.width, int(right) + 1))
    rows = np.arange(max(0, int(top)), min(cam.height, int(bottom) + 1))
    if columns.size == 0 or rows.size == 0:
        return
    dx = ((columns + 0.5 - cam.centre) * z / cam.focal - x).astype(np.float32)[None, :]
    y = (cam.eye - (rows + 0.5 - cam.horizon) * z / cam.focal).astype(np.float32)[:, None]
    middle, half = (height + low) / 2, (height - low) / 2
    if habit == "lollipop":
        body = 1.0 - (dx / spread) ** 2 - ((y - middle) / half) ** 2
    else:
        body = np.full((rows.size, columns.size), -9.0, np.float32)
        for _ in range(7):
            cx, cy = rng.uniform(-0.55, 0.55) * spread, middle + rng.uniform(-0.55, 0.6) * half
            r = rng.uniform(0.35, 0.6)
            body = np.maximum(body, 1.0 - ((dx - cx) / (spread * r)) ** 2 - ((y - cy) / (half * r)) ** 2)
    shift = rng.integers(0, 256, 2)
    grain = style.foliage.per_metre
    u = ((dx + 30) * grain).astype(int) + shift[0]
    v = ((y + 30) * grain).astype(int) + shift[1]
    leaves = noise(style.seed + 40, style.foliage.slope, stretch=style.foliage.stretch)[v & 255, u & 255]
    rough = {"lollipop": 0.06, "broad": 0.3, "ragged": 0.5}[habit]
    solid = body + rough * leaves > (0.0 if habit != "ragged" else 0.15)
    base = np.asarray(pick(rng, style.foliage.colours, style.foliage.jitter), np.float32)
    tone = (1.0 + style.foliage.grain * leaves + 0.22 * (y - middle) / half) * sun
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    mask = solid & (canvas.depth[box] > z)
    canvas.rgb[box][mask] = (tone[:, :, None] * base)[mask]
    canvas.ids[box][mask] = LABEL_IDS["vegetation"]
    canvas.depth[box][mask] = z
