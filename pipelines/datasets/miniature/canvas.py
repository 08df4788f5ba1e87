"""A pinhole camera over a flat street, and a canvas with a depth buffer to draw on.

Street coordinates in metres: x to the right, y up from the ground, z away from the camera. The camera looks
along z from height `eye`; pitch only moves the horizon, so verticals stay vertical. Ids on the canvas are
Cityscapes `labelIds`, plus `LANE_MARKING`, which the writers turn into whatever their dataset calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]
Colour = tuple[float, float, float]
Point = tuple[float, float, float]
Shader = Callable[[Array, Array, Array], tuple[Array, NDArray[np.uint8], NDArray[np.bool_] | None]]
"""(distance along the wall, height, depth) → colours, ids, and where the wall has material at all."""

LANE_MARKING = 200
NEAR = 0.7


@dataclass(frozen=True)
class Camera:
    """Where the eye is and how it projects."""

    width: int
    height: int
    focal: float
    centre: float
    horizon: float
    eye: float

    def project(self, point: Point) -> tuple[float, float]:
        """Column and row of a point; depths before the near plane are pushed onto it."""
        x, y, z = point
        z = max(z, NEAR)
        return self.centre + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z


class Canvas:
    """Colour, id and depth of every pixel; whatever is nearest wins, in any order of drawing."""

    def __init__(self, camera: Camera) -> None:
        shape = (camera.height, camera.width)
        self.camera = camera
        self.rgb: Array = np.zeros((*shape, 3), np.float32)
        self.ids: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        self.depth: Array = np.full(shape, np.inf, np.float32)

    def wall(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        top: float,
        shade: Shader,
        bottom: float = 0.0,
    ) -> None:
        """Draw an upright wall between two points (x, z) of the ground plan."""
        clipped = _clip(start, end)
        if clipped is None:
            return
        (x0, z0), (x1, z1), offset = clipped
        cam = self.camera
        edges = (cam.centre + cam.focal * x0 / z0, cam.centre + cam.focal * x1 / z1)
        left, right = max(0, int(min(edges))), min(cam.width, int(np.ceil(max(edges))))
        if right <= left:
            return
        ray = ((np.arange(left, right, dtype=np.float32) + 0.5) - cam.centre) / cam.focal
        dx, dz = x1 - x0, z1 - z0
        slope = dx - ray * dz
        slope = np.where(np.abs(slope) < 1e-6, 1e-6, slope)
        t = np.clip((ray * z0 - x0) / slope, 0.0, 1.0)
        z = (z0 + t * dz).astype(np.float32)
        along = (offset + t * np.hypot(dx, dz)).astype(np.float32)
        nearest = float(z.min())
        first = max(0, int(cam.horizon + cam.focal * (cam.eye - top) / (nearest if top > cam.eye else z.max())))
        last = min(cam.height, int(np.ceil(cam.horizon + cam.focal * (cam.eye - bottom) / nearest)))
        if last <= first:
            return
        rows = np.arange(first, last, dtype=np.float32)[:, None] + np.float32(0.5)
        y = (cam.eye - (rows - cam.horizon) * (z / cam.focal)[None, :]).astype(np.float32)
        rgb, ids, solid = shade(np.broadcast_to(along, y.shape), y, np.broadcast_to(z, y.shape))
        box = (slice(first, last), slice(left, right))
        mask = (y <= top) & (y >= bottom) & (z[None, :] < self.depth[box])
        if solid is not None:
            mask &= solid
        self.rgb[box][mask] = rgb[mask]
        self.ids[box][mask] = np.broadcast_to(ids, mask.shape)[mask]
        self.depth[box][mask] = np.broadcast_to(z, mask.shape)[mask]


def _clip(
    start: tuple[float, float], end: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float], float] | None:
    """Cut a ground-plan segment at the near plane; also how much of its beginning was cut off."""
    (x0, z0), (x1, z1) = start, end
    if max(z0, z1) <= NEAR:
        return None
    offset = 0.0
    if z0 < NEAR:
        t = (NEAR - z0) / (z1 - z0)
        offset = t * float(np.hypot(x1 - x0, z1 - z0))
        x0, z0 = x0 + t * (x1 - x0), NEAR
    elif z1 < NEAR:
        t = (NEAR - z0) / (z1 - z0)
        x1, z1 = x0 + t * (x1 - x0), NEAR
    return (x0, z0), (x1, z1), offset


class Sketch:
    """One thing drawn with polygons: a list of shapes that lands on the canvas in one piece."""

    def __init__(self, canvas: Canvas, depth: float) -> None:
        self._canvas = canvas
        self._depth = depth
        self._shapes: list[tuple[list[tuple[float, float]], Colour | None, int]] = []

    def polygon(self, points: Sequence[Point], colour: Colour | None, label: int) -> None:
        """Add a polygon in street coordinates; without a colour only its ids are drawn (bars, spokes)."""
        self._shapes.append(([self._canvas.camera.project(p) for p in points], colour, label))

    def finish(self, texture: Array | None = None, strength: float = 0.0) -> None:
        """Put the shapes on the canvas where nothing nearer stands, roughened by a noise tile."""
        if not self._shapes:
            return
        xy = np.concatenate([np.asarray(points) for points, _, _ in self._shapes])
        cam = self._canvas.camera
        left, top = np.maximum(np.floor(xy.min(0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(xy.max(0)).astype(int) + 1, (cam.width, cam.height))
        if right <= left or bottom <= top:
            return
        size = (int(right - left), int(bottom - top))
        paint, ids = Image.new("RGB", size), Image.new("L", size)
        painted = Image.new("L", size)
        draw, draw_ids, draw_painted = ImageDraw.Draw(paint), ImageDraw.Draw(ids), ImageDraw.Draw(painted)
        for points, colour, label in self._shapes:
            moved = [(u - left, v - top) for u, v in points]
            draw_ids.polygon(moved, fill=label)
            if colour is not None:
                draw.polygon(moved, fill=tuple(int(255 * min(max(c, 0.0), 1.0)) for c in colour))
                draw_painted.polygon(moved, fill=1)
        self._blend(paint, ids, painted, (slice(top, bottom), slice(left, right)), texture, strength)

    def _blend(
        self,
        paint: Image.Image,
        ids: Image.Image,
        painted: Image.Image,
        box: tuple[slice, slice],
        texture: Array | None,
        strength: float,
    ) -> None:
        canvas = self._canvas
        colours = np.asarray(paint, np.float32) / 255.0
        labels = np.asarray(ids)
        if texture is not None and strength > 0.0:
            height, width = labels.shape
            colours = colours * (1.0 + strength * _fit(texture, height, width))[:, :, None]
        mask = (labels > 0) & (canvas.depth[box] > self._depth)
        canvas.ids[box][mask] = labels[mask]
        canvas.depth[box][mask] = self._depth
        mask &= np.asarray(painted) > 0
        canvas.rgb[box][mask] = colours[mask]


def _fit(texture: Array, height: int, width: int) -> Array:
    """Repeat a tile until it covers the box, and cut it to size."""
    rows = np.arange(height) % texture.shape[0]
    columns = np.arange(width) % texture.shape[1]
    return texture[rows][:, columns]
