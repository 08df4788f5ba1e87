"""Persons, riders, bicycles and motorcycles: flat figures that face the camera, built from polygons."""

from __future__ import annotations

import numpy as np

from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.miniature.canvas import Canvas, Colour, Point, Sketch
from pipelines.datasets.miniature.styles import Style
from pipelines.datasets.miniature.surfaces import pick
from pipelines.datasets.miniature.textures import noise

Rng = np.random.Generator
_SKIN: tuple[Colour, ...] = ((0.85, 0.66, 0.54), (0.72, 0.52, 0.4), (0.45, 0.31, 0.23), (0.9, 0.72, 0.62))
_HAIR: tuple[Colour, ...] = ((0.1, 0.08, 0.07), (0.3, 0.2, 0.12), (0.65, 0.5, 0.3), (0.5, 0.5, 0.5))
_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 13)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 13)[:-1])], 1)


class _Figure:
    """Polygons in an upright plane at depth z that faces the camera; `squash` narrows what is turned away."""

    def __init__(self, sketch: Sketch, x: float, z: float, squash: float, flip: float) -> None:
        self.sketch, self.x, self.z, self.factor = sketch, x, z, squash * flip

    def at(self, dx: float, y: float) -> Point:
        return self.x + dx * self.factor, y, self.z

    def shape(self, points: list[tuple[float, float]], colour: Colour | None, label: int) -> None:
        self.sketch.polygon([self.at(dx, y) for dx, y in points], colour, label)

    def disc(self, dx: float, y: float, rx: float, ry: float, colour: Colour | None, label: int) -> None:
        self.sketch.polygon([self.at(dx + rx * c, y + ry * s) for c, s in _CIRCLE], colour, label)

    def limb(self, a: tuple[float, float], b: tuple[float, float], thick: float, colour: Colour, label: int) -> None:
        """A bar of the given thickness from a to b."""
        across = np.array([b[1] - a[1], a[0] - b[0]])
        norm = float(np.hypot(*across)) or 1.0
        dx, dy = across / norm * thick / 2
        dx /= max(abs(self.factor), 0.35)
        corners = [
            (a[0] + dx, a[1] + dy),
            (b[0] + dx, b[1] + dy),
            (b[0] - dx, b[1] - dy),
            (a[0] - dx, a[1] - dy),
        ]
        self.shape([(float(p), float(q)) for p, q in corners], colour, label)


def draw_person(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, sun: float) -> None:
    """A pedestrian, standing or walking."""
    label = LABEL_IDS["person"]
    k = rng.uniform(0.9, 1.08) * (rng.uniform(0.6, 0.8) if rng.random() < 0.1 else 1.0)
    sketch = Sketch(canvas, z)
    figure = _Figure(sketch, x, z, 1.0, 1.0)
    cloth, legs = pick(rng, style.cloth, 0.1), pick(rng, style.legs, 0.1)
    skin, hair = pick(rng, _SKIN, 0.05), pick(rng, _HAIR, 0.05)
    cloth = (cloth[0] * sun, cloth[1] * sun, cloth[2] * sun)
    stride, lean = rng.uniform(0.03, 0.32), rng.uniform(-0.05, 0.05)
    coat = rng.uniform(0.6, 0.95)
    for foot in (-stride, stride):
        figure.limb((foot * 0.3, 0.9 * k), (foot, 0.05), 0.19 * k, legs, label)
        figure.limb((foot - 0.05, 0.05), (foot + 0.12, 0.05), 0.1, (0.1, 0.09, 0.08), label)
    shoulder = rng.uniform(0.22, 0.28) * k
    figure.shape(
        [
            (-0.2 * k, coat * k),
            (0.2 * k, coat * k),
            (shoulder + lean, 1.42 * k),
            (-shoulder + lean, 1.42 * k),
        ],
        cloth,
        label,
    )
    for arm in (-1, 1):
        hand = (arm * shoulder * 1.15 + rng.uniform(-0.15, 0.15), 0.85 * k)
        figure.limb((arm * shoulder, 1.38 * k), hand, 0.12 * k, _mul(cloth, 0.88), label)
    figure.disc(lean, 1.6 * k, 0.12 * k, 0.15 * k, skin, label)
    figure.disc(lean, 1.66 * k, 0.125 * k, 0.1 * k, hair, label)
    if rng.random() < 0.3:
        figure.shape(
            [(0.2, 0.7 * k), (0.42, 0.7 * k), (0.4, 1.0 * k), (0.22, 1.0 * k)],
            pick(rng, style.cloth, 0.2),
            label,
        )
    sketch.finish(noise(style.seed + 51, 1.0), 0.08)


def _mul(colour: Colour, by: float) -> Colour:
    return colour[0] * by, colour[1] * by, colour[2] * by


def draw_two_wheeler(
    canvas: Canvas, style: Style, rng: Rng, x: float, z: float, sun: float, kind: str, ridden: bool
) -> None:
    """A bicycle or a motorcycle, with or without its rider, seen from any side."""
    squash = float(rng.choice([1.0, 0.75, 0.35])) if not ridden else float(rng.choice([1.0, 0.5, 0.3]))
    sketch = Sketch(canvas, z)
    figure = _Figure(sketch, x, z, squash, float(rng.choice([-1.0, 1.0])))
    frame = pick(rng, style.cloth + style.car_colours, 0.1)
    (_bicycle if kind == "bicycle" else _motorcycle)(figure, frame)
    if ridden:
        _rider(figure, style, rng, sun, 0.95 if kind == "bicycle" else 0.8)
    sketch.finish(noise(style.seed + 51, 1.0), 0.08)


def _bicycle(figure: _Figure, frame: Colour) -> None:
    label = LABEL_IDS["bicycle"]
    tyre: Colour = (0.08, 0.08, 0.09)
    for hub in (-0.52, 0.52):
        for (c0, s0), (c1, s1) in zip(_CIRCLE, np.roll(_CIRCLE, -1, 0), strict=True):
            ring = [(hub + 0.35 * c0, 0.36 + 0.35 * s0), (hub + 0.35 * c1, 0.36 + 0.35 * s1)]
            ring += [(hub + 0.26 * c1, 0.36 + 0.26 * s1), (hub + 0.26 * c0, 0.36 + 0.26 * s0)]
            figure.shape([(float(a), float(b)) for a, b in ring], tyre, label)
        figure.disc(hub, 0.36, 0.34, 0.34, None, label)
    figure.shape([(-0.52, 0.4), (0.45, 0.4), (0.5, 0.85), (-0.2, 0.85)], None, label)
    for a, b in (
        ((-0.52, 0.36), (-0.2, 0.85)),
        ((-0.2, 0.85), (0.42, 0.85)),
        ((-0.05, 0.36), (0.42, 0.85)),
        ((-0.52, 0.36), (-0.05, 0.36)),
        ((0.52, 0.36), (0.4, 1.0)),
    ):
        figure.limb(a, b, 0.09, frame, label)
    figure.limb((-0.34, 0.97), (-0.08, 0.97), 0.1, tyre, label)
    figure.limb((0.28, 1.04), (0.52, 1.04), 0.08, tyre, label)


def _motorcycle(figure: _Figure, frame: Colour) -> None:
    label = LABEL_IDS["motorcycle"]
    dark: Colour = (0.1, 0.1, 0.11)
    for hub in (-0.62, 0.66):
        figure.disc(hub, 0.32, 0.32, 0.32, dark, label)
        figure.disc(hub, 0.32, 0.15, 0.15, (0.5, 0.5, 0.5), label)
    figure.shape([(-0.5, 0.3), (0.45, 0.28), (0.4, 0.65), (-0.5, 0.62)], (0.25, 0.25, 0.26), label)
    figure.shape([(-0.85, 0.72), (-0.1, 0.68), (0.3, 0.98), (0.55, 0.8), (0.4, 0.6), (-0.6, 0.58)], frame, label)
    figure.shape([(-0.75, 0.76), (-0.05, 0.72), (-0.05, 0.84), (-0.7, 0.86)], dark, label)
    figure.limb((0.66, 0.32), (0.42, 1.08), 0.1, (0.45, 0.45, 0.45), label)
    figure.limb((0.25, 1.12), (0.5, 1.08), 0.08, dark, label)
    figure.disc(0.58, 0.9, 0.1, 0.1, (0.95, 0.93, 0.8), label)


def _rider(figure: _Figure, style: Style, rng: Rng, sun: float, seat: float) -> None:
    label = LABEL_IDS["rider"]
    cloth, legs = _mul(pick(rng, style.cloth, 0.1), sun), pick(rng, style.legs, 0.1)
    figure.limb((-0.2, seat), (0.15, 0.62), 0.2, legs, label)
    figure.limb((0.15, 0.62), (0.0, 0.22), 0.15, legs, label)
    top = (0.06, seat + 0.58)
    figure.limb((-0.2, seat - 0.02), top, 0.36, cloth, label)
    figure.limb((0.06, seat + 0.48), (0.4, 1.05), 0.12, _mul(cloth, 0.85), label)
    wide = 1.0 / max(abs(figure.factor), 0.35)
    figure.disc(0.12, seat + 0.76, 0.12 * wide, 0.15, pick(rng, _SKIN, 0.05), label)
    helmet = pick(rng, style.cloth, 0.2) if rng.random() < 0.6 else pick(rng, _HAIR, 0.05)
    figure.disc(0.11, seat + 0.83, 0.14 * wide, 0.1, helmet, label)
