"""Cars, trucks, buses and trains: side profiles drawn out across their width, seen in perspective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.miniature.canvas import NEAR, Canvas, Colour, Point, Sketch
from pipelines.datasets.miniature.styles import Style
from pipelines.datasets.miniature.surfaces import pick
from pipelines.datasets.miniature.textures import noise

Rng = np.random.Generator
Outline = tuple[tuple[float, float], ...]

# Profiles in (metres ahead of the middle, metres above ground), clockwise from the rear bumper, and the
# indices of the edges that are glass (rear window, windscreen), and the width.
_PROFILES: dict[str, tuple[Outline, tuple[int, ...], float]] = {
    "sedan": (
        (
            (-2.2, 0.3),
            (-2.2, 0.9),
            (-1.45, 0.98),
            (-0.85, 1.43),
            (0.45, 1.43),
            (1.1, 0.98),
            (2.1, 0.82),
            (2.2, 0.3),
        ),
        (2, 4),
        1.8,
    ),
    "hatch": (
        ((-1.9, 0.3), (-1.95, 0.95), (-1.6, 1.5), (0.3, 1.52), (1.0, 1.0), (1.75, 0.85), (1.9, 0.3)),
        (1, 3),
        1.75,
    ),
    "wagon": (
        ((-2.3, 0.3), (-2.3, 1.0), (-2.0, 1.5), (0.4, 1.5), (1.1, 1.02), (2.1, 0.88), (2.25, 0.3)),
        (1, 3),
        1.85,
    ),
    "suv": (
        ((-2.2, 0.45), (-2.25, 1.15), (-2.1, 1.85), (0.4, 1.87), (0.95, 1.25), (2.1, 1.12), (2.25, 0.45)),
        (1, 3),
        1.95,
    ),
    "boxy": (
        (
            (-2.1, 0.35),
            (-2.1, 1.05),
            (-1.9, 1.08),
            (-1.75, 1.62),
            (0.6, 1.62),
            (0.8, 1.08),
            (2.1, 1.02),
            (2.1, 0.35),
        ),
        (2, 4),
        1.85,
    ),
    "low": (
        (
            (-2.2, 0.25),
            (-2.25, 0.75),
            (-1.7, 0.85),
            (-0.7, 1.18),
            (0.2, 1.18),
            (1.0, 0.8),
            (2.2, 0.6),
            (2.25, 0.25),
        ),
        (2, 4),
        1.95,
    ),
    "van": (
        ((-2.4, 0.35), (-2.45, 1.2), (-2.35, 1.95), (1.0, 1.95), (1.75, 1.2), (2.3, 1.0), (2.4, 0.35)),
        (1, 3),
        1.95,
    ),
}


@dataclass(frozen=True)
class Pose:
    """Where a thing stands and which way it points; yaw 0 points away from the camera."""

    x: float
    z: float
    yaw: float

    def place(self, ahead: float, up: float, across: float) -> Point:
        """From the thing's own coordinates to the street's."""
        c, s = float(np.cos(self.yaw)), float(np.sin(self.yaw))
        return self.x + across * c + ahead * s, up, self.z - across * s + ahead * c


def _dark(colour: Colour, by: float) -> Colour:
    return colour[0] * by, colour[1] * by, colour[2] * by


class _Body:
    """An extruded profile in one sketch, faces far to near, hidden faces left out."""

    def __init__(self, sketch: Sketch, pose: Pose, eye: float, label: int, sun: float) -> None:
        self.sketch, self.pose, self.eye, self.label, self.sun = sketch, pose, eye, label, sun

    def visible(self, at: Point, normal: tuple[float, float, float]) -> bool:
        """Whether a face looks towards the eye."""
        end = self.pose.place(*normal)
        nx, ny, nz = end[0] - self.pose.x, end[1], end[2] - self.pose.z
        return at[0] * nx + (at[1] - self.eye) * ny + at[2] * nz < 0

    def extrude(self, outline: Outline, width: float, colour: Colour, glass: tuple[int, ...], pane: Colour) -> int:
        """Draw the hull; returns which flank is visible, −1 or 1."""
        half = width / 2
        faces: list[tuple[float, list[Point], Colour]] = []
        for i, (a, b) in enumerate(zip(outline, outline[1:] + outline[:1], strict=True)):
            da, dy = b[0] - a[0], b[1] - a[1]
            length = float(np.hypot(da, dy)) or 1.0
            normal = (-dy / length, da / length, 0.0)
            middle = self.pose.place((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, 0.0)
            if not self.visible(middle, normal):
                continue
            corners = [
                self.pose.place(*a, -half),
                self.pose.place(*b, -half),
                self.pose.place(*b, half),
                self.pose.place(*a, half),
            ]
            tone = 0.82 + 0.3 * max(normal[1], 0.0)
            shade = pane if i in glass else _dark(colour, tone)
            faces.append((middle[2], corners, shade))
        flank = 1 if self.visible(self.pose.place(0, 1, half), (0.0, 0.0, 1.0)) else -1
        seen = self.visible(self.pose.place(0, 1, flank * half), (0.0, 0.0, float(flank)))
        for _, corners, shade in sorted(faces, key=lambda face: -face[0]):
            self.sketch.polygon(corners, shade, self.label)
        if seen:
            side = [self.pose.place(*p, flank * half) for p in outline]
            self.sketch.polygon(side, _dark(colour, 0.9 * self.sun), self.label)
        return flank

    def flank_patch(self, points: Outline, across: float, colour: Colour) -> None:
        """A polygon on the visible flank: a window, a stripe."""
        if self.visible(self.pose.place(0, 1, across), (0.0, 0.0, float(np.sign(across)))):
            self.sketch.polygon([self.pose.place(*p, across) for p in points], colour, self.label)

    def wheel(self, ahead: float, radius: float, across: float, rim: Colour) -> None:
        """A wheel on the flank."""
        angle = np.linspace(0, 2 * np.pi, 11)[:-1]
        for part, colour in ((1.0, (0.06, 0.06, 0.07)), (0.55, rim)):
            points = tuple(
                (ahead + float(c) * radius * part, radius + float(s) * radius * part)
                for c, s in zip(np.cos(angle), np.sin(angle), strict=True)
            )
            self.flank_patch(points, across, colour)

    def end_patch(self, ahead: float, low: float, high: float, left: float, right: float, colour: Colour) -> None:
        """A rectangle on the rear (negative `ahead`) or front: lamps, number plate, windows."""
        if self.visible(self.pose.place(ahead, 1, 0), (float(np.sign(ahead)), 0.0, 0.0)):
            corners = [(low, left), (low, right), (high, right), (high, left)]
            self.sketch.polygon([self.pose.place(ahead, up, b) for up, b in corners], colour, self.label)


def _shadow(canvas: Canvas, pose: Pose, length: float, width: float, strength: float) -> None:
    """Darken the ground under a vehicle."""
    cam = canvas.camera
    corners = [
        pose.place(ahead * length * 0.52, 0.0, across * width * 0.6)
        for ahead, across in ((-1, -1), (-1, 1), (1, 1), (1, -1))
    ]
    if min(p[2] for p in corners) < NEAR:
        return
    uv = np.array([cam.project(p) for p in corners])
    (left, top), (right, bottom) = np.floor(uv.min(0)).astype(int), np.ceil(uv.max(0)).astype(int)
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, cam.width), min(bottom, cam.height)
    if right <= left or bottom <= top:
        return
    u = (np.arange(left, right)[None, :] - (uv[:, 0].min() + uv[:, 0].max()) / 2) / max(np.ptp(uv[:, 0]) / 2, 1)
    v = (np.arange(top, bottom)[:, None] - (uv[:, 1].min() + uv[:, 1].max()) / 2) / max(np.ptp(uv[:, 1]) / 2, 1)
    inside = np.clip(1.5 * (1.0 - (u**4 + v**4)), 0.0, 1.0).astype(np.float32)
    box = (slice(top, bottom), slice(left, right))
    free = canvas.depth[box] > pose.z
    canvas.rgb[box] *= (1.0 - strength * inside * free)[:, :, None]


def draw_car(canvas: Canvas, style: Style, rng: Rng, pose: Pose, sun: float) -> None:
    """A passenger car of one of the domain's shapes."""
    names, weights = zip(*style.cars, strict=True)
    shape = names[int(rng.choice(len(names), p=np.asarray(weights) / sum(weights)))]
    outline, glass, width = _PROFILES[shape]
    scale = rng.uniform(0.93, 1.07)
    outline = tuple((a * scale, y * rng.uniform(0.99, 1.01)) for a, y in outline)
    colour = pick(rng, style.car_colours, 0.08)
    pane: Colour = (0.12, 0.14, 0.17) if rng.random() < 0.6 else (0.3, 0.36, 0.42)
    _shadow(canvas, pose, 4.4, width, 0.6)
    sketch = Sketch(canvas, pose.z - 1.0)
    body = _Body(sketch, pose, canvas.camera.eye, LABEL_IDS["car"], sun)
    rear, front = outline[0][0], outline[-1][0]
    flank = body.extrude(outline, width, colour, glass, pane) * width / 2
    belt = outline[glass[1] + 1][1] * 0.97
    roof = max(y for _, y in outline)
    tops = [a for a, y in outline if y > roof - 0.06]
    base_rear, base_front = outline[glass[0]][0], outline[glass[1] + 1][0]
    low, high = belt + 0.03, roof - 0.09
    body.flank_patch(
        ((base_rear + 0.25, low), (min(tops) + 0.1, high), (-0.22, high), (-0.22, low)),
        flank,
        _dark(pane, 0.9),
    )
    body.flank_patch(((-0.12, low), (-0.12, high), (max(tops), high), (base_front - 0.2, low)), flank, pane)
    for ahead in (rear * 0.62, front * 0.66):
        body.wheel(ahead, 0.33 if shape != "suv" else 0.4, flank * 1.01, (0.5, 0.5, 0.52))
    height = outline[1][1]
    for sign in (-1, 1):
        a, b = sorted((sign * width * 0.48, sign * width * 0.3))
        body.end_patch(rear - 0.05, height * 0.66, height * 0.92, a, b, (0.75, 0.08, 0.06))
        body.end_patch(front + 0.05, 0.55, 0.72, a, b, (0.95, 0.93, 0.85))
    body.end_patch(rear - 0.05, 0.45, 0.57, -0.26, 0.26, (0.92, 0.92, 0.9))
    body.end_patch(front + 0.05, 0.3, 0.5, -0.5, 0.5, (0.1, 0.1, 0.11))
    body.end_patch(rear - 0.04, 0.2, 0.34, -width * 0.45, width * 0.45, (0.08, 0.08, 0.08))
    sketch.finish(noise(style.seed + 50, 1.2), 0.05)


def _box(length: float, low: float, high: float, slant: float = 0.0) -> Outline:
    half = length / 2
    return ((-half, low), (-half, high), (half - slant, high), (half, low))


def draw_bus(canvas: Canvas, style: Style, rng: Rng, pose: Pose, sun: float) -> None:
    """A bus; double-decked where the domain has such."""
    double = style.layout.drive_left
    length, height, width = rng.uniform(9, 12), (4.2 if double else rng.uniform(2.9, 3.2)), 2.5
    colour = pick(rng, style.bus_colours, 0.05)
    pane: Colour = (0.13, 0.16, 0.2)
    _shadow(canvas, pose, length, width, 0.6)
    sketch = Sketch(canvas, pose.z - 2.0)
    body = _Body(sketch, pose, canvas.camera.eye, LABEL_IDS["bus"], sun)
    flank = body.extrude(_box(length, 0.35, height), width, colour, (), pane) * width / 2
    half, count = length / 2, int(rng.integers(5, 8))
    decks = ((1.25, 2.1), (2.75, 3.6)) if double else ((1.35, height - 0.55),)
    for low, high in decks:
        step = (length - 0.6) / count
        for i in range(count):
            a = -half + 0.3 + i * step
            body.flank_patch(((a, low), (a, high), (a + step * 0.88, high), (a + step * 0.88, low)), flank, pane)
        for end in (-half - 0.02, half + 0.02):
            body.end_patch(end, low, high, -width * 0.42, width * 0.42, pane)
    body.end_patch(half + 0.02, height - 0.45, height - 0.1, -0.8, 0.8, (0.95, 0.75, 0.2))
    for sign in (-1, 1):
        a, b = sorted((sign * 1.15, sign * 0.85))
        body.end_patch(-half - 0.02, 0.7, 1.0, a, b, (0.75, 0.08, 0.06))
        body.end_patch(half + 0.02, 0.6, 0.85, a, b, (0.95, 0.93, 0.85))
    for ahead in (-half * 0.55, half * 0.7):
        body.wheel(ahead, 0.48, flank * 1.01, (0.4, 0.4, 0.4))
    sketch.finish(noise(style.seed + 50, 1.2), 0.05)


def draw_truck(canvas: Canvas, style: Style, rng: Rng, pose: Pose, sun: float) -> None:
    """A lorry: a load box behind a cab of another colour."""
    colour, load = pick(rng, style.car_colours, 0.08), pick(rng, style.truck_colours, 0.06)
    length, height, width = rng.uniform(4.5, 7.5), rng.uniform(2.9, 3.7), 2.45
    _shadow(canvas, pose, length + 2, width, 0.6)
    sketch = Sketch(canvas, pose.z - 2.0)
    label = LABEL_IDS["truck"]
    cab_pose = Pose(*_offset(pose, length / 2 + 1.0), pose.yaw)
    parts = [("cab", cab_pose), ("load", pose)]
    for part, at in sorted(parts, key=lambda item: -item[1].z):
        body = _Body(sketch, at, canvas.camera.eye, label, sun)
        if part == "cab":
            flank = body.extrude(_box(1.9, 0.5, 2.55, 0.25), width * 0.94, colour, (), (0.1, 0.1, 0.1)) * width * 0.47
            body.flank_patch(((-0.5, 1.5), (-0.5, 2.3), (0.5, 2.3), (0.65, 1.5)), flank, (0.13, 0.15, 0.18))
            body.end_patch(0.97, 1.45, 2.3, -1.0, 1.0, (0.14, 0.17, 0.2))
            body.end_patch(0.98, 0.7, 0.95, -1.0, 1.0, (0.8, 0.8, 0.75))
            body.wheel(0.1, 0.48, flank * 1.01, (0.4, 0.4, 0.4))
            continue
        half = length / 2
        flank = body.extrude(_box(length, 0.95, height), width, load, (), (0.1, 0.1, 0.1)) * width / 2
        body.flank_patch(((-half, 0.55), (-half, 0.95), (half, 0.95), (half, 0.55)), flank, (0.1, 0.1, 0.1))
        body.end_patch(-half - 0.01, 0.5, 0.95, -1.1, 1.1, (0.1, 0.1, 0.1))
        body.end_patch(-half - 0.02, 1.0, height - 0.1, -0.03, 0.03, _dark(load, 0.6))
        for sign in (-1, 1):
            a, b = sorted((sign * 1.1, sign * 0.8))
            body.end_patch(-half - 0.02, 0.65, 0.88, a, b, (0.75, 0.08, 0.06))
        for ahead in (-half * 0.7, -half * 0.35):
            body.wheel(ahead, 0.48, flank * 1.01, (0.4, 0.4, 0.4))
    sketch.finish(noise(style.seed + 50, 1.2), 0.05)


def draw_train(canvas: Canvas, style: Style, rng: Rng, pose: Pose, sun: float) -> None:
    """A tram or a train: long, with a band of windows and a coloured skirt."""
    length, height, width = rng.uniform(14, 22), rng.uniform(3.3, 3.7), 2.6
    colour, skirt = pick(rng, style.train_colours, 0.05), pick(rng, style.train_colours, 0.3)
    pane: Colour = (0.12, 0.14, 0.17)
    sketch = Sketch(canvas, pose.z - 3.0)
    body = _Body(sketch, pose, canvas.camera.eye, LABEL_IDS["train"], sun)
    half = length / 2
    outline: Outline = (
        (-half, 0.2),
        (-half + 0.3, height - 0.4),
        (-half + 0.8, height),
        (half - 0.8, height),
    )
    outline = (*outline, (half - 0.3, height - 0.4), (half, 0.2))
    flank = body.extrude(outline, width, colour, (), pane) * width / 2
    body.flank_patch(((-half, 0.2), (-half + 0.1, 1.0), (half - 0.1, 1.0), (half, 0.2)), flank, skirt)
    count = 7
    step = (length - 1.0) / count
    for i in range(count):
        a = -half + 0.6 + i * step
        body.flank_patch(
            ((a, 1.4), (a, height - 0.9), (a + step * 0.9, height - 0.9), (a + step * 0.9, 1.4)), flank, pane
        )
    for end in (-half - 0.02, half + 0.02):
        body.end_patch(end, 1.4, height - 0.7, -width * 0.4, width * 0.4, pane)
        body.end_patch(end, 0.6, 1.0, -width * 0.45, width * 0.45, skirt)
        for sign in (-1, 1):
            a, b = sorted((sign * 1.1, sign * 0.8))
            body.end_patch(end, 0.7, 0.95, a, b, (0.95, 0.9, 0.8) if end * np.cos(pose.yaw) > 0 else (0.8, 0.1, 0.08))
    body.end_patch(half, height - 0.6, height - 0.3, -0.7, 0.7, (0.95, 0.7, 0.15))
    sketch.finish(noise(style.seed + 50, 1.2), 0.05)


def _offset(pose: Pose, ahead: float) -> tuple[float, float]:
    x, _, z = pose.place(ahead, 0.0, 0.0)
    return x, z
