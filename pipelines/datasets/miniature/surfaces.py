"""The large surfaces: sky, ground, facades, and the upright walls, fences and hedges between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.miniature.canvas import LANE_MARKING, Array, Canvas, Colour, Shader
from pipelines.datasets.miniature.styles import Facade, Material, Style
from pipelines.datasets.miniature.textures import bricks, grid, noise, sample

Rng = np.random.Generator


@dataclass(frozen=True)
class Ground:
    """The ground plan of one street: its course and what lies beside the carriageway."""

    heading: float
    curve: float
    road_left: float
    road_right: float
    walk_left: float
    walk_right: float
    verge: float
    crossing: tuple[float, float] | None
    lanes: tuple[float, ...]
    terrain_beyond: tuple[bool, bool]

    def course(self, z: Array) -> Array:
        """X of the street's axis at depth z."""
        return self.heading * z + 0.5 * self.curve * z * z

    def at(self, side: float, z: float) -> float:
        """X of the line that runs `side` metres beside the axis, at depth z."""
        return float(side + self.heading * z + 0.5 * self.curve * z * z)


def pick(rng: Rng, colours: tuple[Colour, ...], jitter: float = 0.0) -> Colour:
    """One of the colours, shaken a little in brightness and hue."""
    base = np.asarray(colours[rng.integers(len(colours))])
    shaken = base * (1.0 + rng.normal(0.0, jitter)) + rng.normal(0.0, jitter * 0.4, 3)
    r, g, b = np.clip(shaken, 0.02, 0.98)
    return float(r), float(g), float(b)


def paint(material: Material, base: Colour, seed: int, u: Array, v: Array, far: Array) -> Array:
    """Colour a surface with a material; pattern and grain fade with distance."""
    tile = noise(seed, material.slope, stretch=material.stretch)
    fade = np.clip(1.3 - far / 45.0, 0.15, 1.0)
    tone = 1.0 + material.grain * sample(tile, u, v, material.per_metre) * fade
    if material.pattern != "plain":
        lines = (
            bricks(u, v, material.size * 2.2, material.size, 0.18)
            if material.pattern == "bricks"
            else grid(u, v, material.size, 0.12)
        )
        tone = tone + material.joint * lines * fade
    return tone[:, :, None] * np.asarray(base, np.float32)


def draw_sky(canvas: Canvas, style: Style, rng: Rng) -> None:
    """Fill the whole canvas with sky; everything else is drawn over it."""
    light = style.light
    choice = int(rng.integers(len(light.sky_top)))
    height, width = canvas.ids.shape
    t = np.clip(np.arange(height, dtype=np.float32) / max(canvas.camera.horizon, 1.0), 0.0, 1.0)[:, None, None]
    sky = np.asarray(light.sky_top[choice]) * (1 - t) + np.asarray(light.sky_low[choice]) * t
    sky = np.broadcast_to(sky, (height, width, 3)).astype(np.float32)
    amount = rng.uniform(*light.clouds)
    if amount > 0.02:
        tile = noise(style.seed + 90, 1.6, low=1.0, stretch=0.6)
        rows = (np.arange(height) * 256 // max(width, 1) * 2 + rng.integers(256)) % 256
        columns = (np.arange(width) * 256 // max(width, 1) + rng.integers(256)) % 256
        cover = np.clip(tile[rows][:, columns] * 0.6 + amount * 1.2 - 0.4, 0.0, 1.0)[:, :, None] * 0.85
        sky = sky * (1 - cover) + np.float32(0.93) * cover
    canvas.rgb[:] = sky
    canvas.ids[:] = LABEL_IDS["sky"]


def draw_ground(canvas: Canvas, style: Style, ground: Ground, rng: Rng) -> None:
    """Draw everything below the horizon: carriageway, markings, kerbs, pavement, grass."""
    cam = canvas.camera
    first = max(0, int(cam.horizon) + 1)
    if first >= cam.height:
        return
    rows = np.arange(first, cam.height, dtype=np.float32)[:, None] + 0.5
    z = np.broadcast_to(cam.focal * cam.eye / (rows - cam.horizon), (cam.height - first, cam.width))
    z = np.minimum(z, 400.0).astype(np.float32)
    x = (np.arange(cam.width, dtype=np.float32)[None, :] + 0.5 - cam.centre) * z / cam.focal
    side = (x - ground.course(z)).astype(np.float32)
    road = (side > -ground.road_left) & (side < ground.road_right)
    walk = (side > -ground.road_left - ground.walk_left) & (side < ground.road_right + ground.walk_right) & ~road
    crossing = np.zeros_like(road)
    if ground.crossing is not None:
        crossing = (z > ground.crossing[0]) & (z < ground.crossing[1])
        road, walk = road | crossing, walk & ~crossing
    beside = np.where(side < 0, ground.terrain_beyond[0], ground.terrain_beyond[1])
    kerb_distance = np.where(side < 0, -side - ground.road_left, side - ground.road_right)
    grass = (beside & ~walk) | ((kerb_distance < ground.verge) & walk)
    grass &= ~road
    shift = rng.uniform(0, 100, 2)
    u, v = (side + shift[0] + 100.0).astype(np.float32), (z + shift[1]).astype(np.float32)
    box = (slice(first, cam.height), slice(0, cam.width))
    rgb, ids = canvas.rgb[box], canvas.ids[box]
    for mask, material, name, seed in (
        (~road & ~grass, style.sidewalk, "sidewalk", 1),
        (grass, style.terrain, "terrain", 2),
        (road, style.road, "road", 3),
    ):
        colour = pick(rng, material.colours, material.jitter)
        if mask.any():
            rgb[mask] = paint(material, colour, style.seed + seed, u, v, z)[mask]
            ids[mask] = LABEL_IDS[name]
    kerb = (kerb_distance > 0) & (kerb_distance < 0.22) & ~crossing
    rgb[kerb] *= 1.18
    _draw_markings(style, ground, rng, side, z, road & ~crossing, rgb, ids)
    if rng.random() < 0.6:
        _draw_wear(style, side, z, road, rgb, rng)


def _draw_markings(
    style: Style,
    ground: Ground,
    rng: Rng,
    side: Array,
    z: Array,
    road: NDArray[np.bool_],
    rgb: Array,
    ids: NDArray[np.uint8],
) -> None:
    """Lane lines, edge lines, and the zebra before a crossing."""
    phase = rng.uniform(0, 12)
    lines = np.zeros_like(road)
    for lane in ground.lanes:
        dashed = ((z + phase) % 9.0) < 4.5
        lines |= (np.abs(side - lane) < 0.09) & dashed
    if rng.random() < 0.5:
        lines |= (np.abs(side + ground.road_left - 0.35) < 0.07) | (np.abs(side - ground.road_right + 0.35) < 0.07)
    if ground.crossing is not None:
        near = ground.crossing[0]
        lines |= (z > near - 3.5) & (z < near - 1.0) & (((side + 50.0) % 1.1) < 0.55)
    lines &= road
    rgb[lines] = 0.25 * rgb[lines] + 0.75 * np.asarray(style.marking, np.float32)
    ids[lines] = LANE_MARKING


def _draw_wear(style: Style, side: Array, z: Array, road: NDArray[np.bool_], rgb: Array, rng: Rng) -> None:
    """Tyre tracks and repaired patches."""
    tracks = np.exp(-(((np.abs(side - rng.uniform(-2, 2)) - 0.8) / 0.3) ** 2))
    patch = (np.abs(side - rng.uniform(-3, 3)) < 0.9) & (np.abs(z - rng.uniform(6, 20)) < rng.uniform(1, 4))
    tone = 1.0 - 0.10 * tracks - 0.14 * patch
    rgb[road] *= tone[road][:, None]


def facade_shader(facade: Facade, style: Style, rng: Rng, height: float, lit: float, index: int) -> Shader:
    """Windows in storeys on a wall of some material; the ground floor may be a shop."""
    base = pick(rng, facade.wall.colours, facade.wall.jitter)
    glass = np.asarray(pick(rng, facade.glass, 0.08), np.float32)
    storey, pitch = rng.uniform(*facade.storey), rng.uniform(*facade.pitch)
    part_w, part_h = (f * rng.uniform(0.85, 1.15) for f in facade.window)
    shop = rng.random() < facade.shop
    shop_colour = np.asarray(rng.uniform(0.15, 0.85, 3), np.float32)
    start = rng.uniform(0, pitch)
    seed = style.seed + 10 + index
    roof = np.asarray(facade.roof, np.float32)
    lights = noise(style.seed + 60, 0.0, low=0.0)

    def shade(u: Array, y: Array, z: Array) -> tuple[Array, NDArray[np.uint8], None]:
        rgb = paint(facade.wall, base, seed, u, y + 40.0, z)
        row, column = np.floor(y / storey), np.floor((u + start) / pitch)
        fy, fx = y / storey - row - 0.5, (u + start) / pitch - column - 0.5
        upper = (y > storey) if shop else (y > 0.3)
        upper &= y < height - 0.5
        if facade.frame is not None:
            trim = (np.abs(fx) < part_w / 2 + 0.05) & (np.abs(fy) < part_h / 2 + 0.04) & upper
            rgb[trim] = np.asarray(facade.frame, np.float32)
        window = (np.abs(fx) < part_w / 2) & (np.abs(fy) < part_h / 2) & upper
        pane = 1.0 + 0.25 * lights[row.astype(int) & 255, column.astype(int) & 255] + 0.5 * fy
        rgb[window] = glass * np.clip(pane[window], 0.4, 2.0)[:, None]
        if facade.ledge > 0:
            rgb[(fy > 0.5 - facade.ledge) & (y < height)] *= 1.12
        if shop:
            front = (y < storey) & (y > 0.5)
            rgb[front & (y < storey * 0.75) & (np.abs(fx) < 0.42)] = glass * 0.8
            rgb[front & (y >= storey * 0.75)] = shop_colour
        rgb[y > height] = roof
        rgb *= lit
        return rgb, np.full((1, 1), LABEL_IDS["building"], np.uint8), None

    return shade


def barrier_shader(style: Style, rng: Rng, lit: float) -> Shader:
    """A free-standing wall of stone or concrete."""
    base = pick(rng, style.barrier.colours, style.barrier.jitter)

    def shade(u: Array, y: Array, z: Array) -> tuple[Array, NDArray[np.uint8], None]:
        rgb = paint(style.barrier, base, style.seed + 30, u, y + 40.0, z) * lit
        return rgb, np.full((1, 1), LABEL_IDS["wall"], np.uint8), None

    return shade


def hedge_shader(style: Style, rng: Rng, height: float, lit: float) -> Shader:
    """A hedge, or the wood at the end of the street: foliage with a ragged upper edge."""
    base = pick(rng, style.foliage.colours, style.foliage.jitter)
    edge = noise(style.seed + 41, 0.8)
    roughness = 0.06 if style.trees == "lollipop" else 0.18

    def shade(u: Array, y: Array, z: Array) -> tuple[Array, NDArray[np.uint8], NDArray[np.bool_]]:
        rgb = paint(style.foliage, base, style.seed + 40, u, y + 40.0, z) * lit
        top = height * (0.85 + roughness * sample(edge, u, np.zeros_like(u), 20.0))
        return rgb, np.full((1, 1), LABEL_IDS["vegetation"], np.uint8), y < top

    return shade


def fence_shader(style: Style, rng: Rng, height: float, lit: float) -> Shader:
    """A fence; between its bars one sees what stands behind, but all of it is labelled fence."""
    colour = np.asarray(pick(rng, (style.fence_colour,), 0.06), np.float32) * lit
    kind = style.fence_kind
    gap = rng.uniform(0.28, 0.4) if kind == "bars" else rng.uniform(0.16, 0.24)

    def shade(u: Array, y: Array, z: Array) -> tuple[Array, NDArray[np.uint8], None]:
        across, up = (u / gap) % 1.0, (y / gap) % 1.0
        rails = (np.abs(y - height * 0.92) < 0.07) | (np.abs(y - height * 0.15) < 0.06)
        if kind == "bars":
            solid = rails | (across < 0.34)
        elif kind == "mesh":
            solid = rails | (((u + y) / gap) % 1.0 < 0.28) | (((u - y) / gap + 100.0) % 1.0 < 0.28)
        else:
            solid = (up < 0.72) & (across > 0.04)
        rgb = np.where(solid[:, :, None], colour, colour * 0.45 + 0.12).astype(np.float32)
        return rgb, np.full((1, 1), LABEL_IDS["fence"], np.uint8), None

    return shade
