"""One picture: a street is laid out by chance within its domain's habits, then drawn, then photographed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.miniature.canvas import Camera, Canvas
from pipelines.datasets.miniature.furniture import draw_lamp, draw_sign, draw_traffic_light, draw_tree
from pipelines.datasets.miniature.people import draw_person, draw_two_wheeler
from pipelines.datasets.miniature.styles import Light, Style
from pipelines.datasets.miniature.surfaces import (
    Ground,
    barrier_shader,
    draw_ground,
    draw_sky,
    facade_shader,
    fence_shader,
    hedge_shader,
)
from pipelines.datasets.miniature.vehicles import Pose, draw_bus, draw_car, draw_train, draw_truck

Rng = np.random.Generator
EGO_VEHICLE = 1
_FAR = 110.0

RARE = (
    "wall", "fence", "light", "sign", "terrain", "rider_bicycle", "truck", "bus",
    "train", "motorcycle", "bicycle", "rider_motorcycle", "person", "pole", "vegetation", "car",
)  # fmt: skip
"""Kinds that a picture can be asked to contain, near and in sight."""

_NEEDS = {"rider_bicycle": "rider", "rider_motorcycle": "rider"}


def render(
    style: Style,
    size: tuple[int, int],
    rng: Rng,
    absent: frozenset[str] = frozenset(),
    wanted: frozenset[str] = frozenset(),
    oversampling: float = 1.5,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render one street: RGB (H, W, 3) and ids (H, W) (`labelIds`, `LANE_MARKING`).

    Args:
        style: the domain.
        size: width and height of the picture.
        rng: the only source of chance.
        absent: class names that never occur.
        wanted: kinds of `RARE` that must be in sight.
        oversampling: how much finer the street is drawn than it is photographed.
    """
    return _Street(style, size, rng, absent, wanted, oversampling).photograph()


class _Street:
    """The street of one picture while it is being drawn."""

    def __init__(
        self,
        style: Style,
        size: tuple[int, int],
        rng: Rng,
        absent: frozenset[str],
        wanted: frozenset[str],
        oversampling: float,
    ) -> None:
        self.style, self.size, self.rng = style, size, rng
        self.absent = absent
        self.wanted = {kind for kind in wanted if _NEEDS.get(kind, kind) not in absent}
        layout = style.layout
        width, height = (round(side * oversampling) for side in size)
        self.position = rng.uniform(*layout.lateral)
        self.canvas = Canvas(
            Camera(
                width=width,
                height=height,
                focal=width * rng.uniform(*layout.focal),
                centre=width * rng.uniform(0.47, 0.53),
                horizon=height * rng.uniform(*layout.horizon),
                eye=rng.uniform(*layout.eye),
            )
        )
        self.ground = self._plan()
        self.sun_left = rng.uniform(*style.light.sun)
        self.sun_right = style.light.sun[0] + style.light.sun[1] - self.sun_left
        self.things: list[tuple[float, Callable[[], None]]] = []
        self.taken: list[tuple[float, float, float]] = []
        self.forced = {kind: float(rng.choice([-1.0, 1.0])) for kind in sorted(self.wanted)}

    def _plan(self) -> Ground:
        rng, layout, at = self.rng, self.style.layout, self.position
        half = rng.uniform(*layout.road)
        crossing = None
        if rng.random() < layout.crossing:
            near = rng.uniform(12.0, 40.0)
            crossing = (near, near + rng.uniform(7.0, 13.0))
        verge = layout.verge * rng.uniform(0.8, 1.6) if rng.random() < 2 * layout.verge else 0.0
        grassy = [rng.random() < 0.6, rng.random() < 0.6]
        if "terrain" in self.wanted:
            grassy[int(rng.integers(2))], verge = True, max(verge, 0.8)
        if "terrain" in self.absent:
            grassy, verge = [False, False], 0.0
        count = max(1, round(2 * half / 3.4))
        lanes = tuple(-half + 2 * half * (i + 1) / count - at for i in range(count - 1))
        return Ground(
            heading=rng.uniform(*layout.heading),
            curve=rng.uniform(*layout.curve),
            road_left=half + at,
            road_right=half - at,
            walk_left=rng.uniform(*layout.walk),
            walk_right=rng.uniform(*layout.walk),
            verge=verge,
            crossing=crossing,
            lanes=lanes,
            terrain_beyond=(grassy[0], grassy[1]),
        )

    def photograph(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        draw_sky(self.canvas, self.style, self.rng)
        draw_ground(self.canvas, self.style, self.ground, self.rng)
        self._shade_street()
        self._skyline()
        for side in (-1.0, 1.0):
            self._row_of_lots(side)
        self._traffic()
        self._kerbside()
        self._people()
        for _, draw in sorted(self.things, key=lambda thing: -thing[0]):
            draw()
        if self.style.layout.hood:
            self._hood()
        return photograph(self.canvas, self.style.light, self.size, self.rng)

    # --- what lines the street ---

    def _face(self, side: float, z: float, extra: float = 0.0) -> float:
        """X of the building line on one side at depth z."""
        ground = self.ground
        line = ground.road_right + ground.walk_right if side > 0 else ground.road_left + ground.walk_left
        return ground.at(side * (line + extra), z)

    def _kerb(self, side: float, z: float, inside: float = 0.0) -> float:
        ground = self.ground
        line = (ground.road_right if side > 0 else ground.road_left) - inside
        return ground.at(side * line, z)

    def _lit(self, side: float) -> float:
        return self.sun_left if side < 0 else self.sun_right

    def _in_crossing(self, z: float, margin: float = 0.0) -> bool:
        crossing = self.ground.crossing
        return crossing is not None and crossing[0] - margin < z < crossing[1] + margin

    def _shade_street(self) -> None:
        """The shadow that the sunless row of houses throws on the ground."""
        if self.rng.random() < 0.5:
            return
        cam, rng = self.canvas.camera, self.rng
        first = max(0, int(cam.horizon) + 1)
        rows = np.arange(first, cam.height, dtype=np.float32)[:, None] + 0.5
        z = cam.focal * cam.eye / (rows - cam.horizon)
        x = (np.arange(cam.width, dtype=np.float32)[None, :] + 0.5 - cam.centre) * z / cam.focal
        side = -1.0 if self.sun_left < self.sun_right else 1.0
        edge = rng.uniform(-3.0, 2.0)
        dark = (x - self.ground.course(z)) * side > -edge
        self.canvas.rgb[first:][dark] *= 1.0 - rng.uniform(*self.style.light.shadow)

    def _skyline(self) -> None:
        """What closes the view: far houses and trees."""
        rng, x = self.rng, -170.0
        while x < 170.0:
            step, z = rng.uniform(10, 26), _FAR + rng.uniform(0, 30)
            if rng.random() < 0.3:
                height = rng.uniform(7, 13)
                shader = hedge_shader(self.style, rng, height, 0.9)
                self.canvas.wall((x, z), (x + step, z), height * 1.3, shader)
            else:
                self._house((x, z), (x + step, z), 0.9)
            x += step * rng.uniform(0.9, 1.3)

    def _house(self, start: tuple[float, float], end: tuple[float, float], lit: float, deep: float = 0.0) -> None:
        """A building whose facade runs from start to end; `deep` adds the gable end that faces the camera."""
        rng, facades = self.rng, self.style.facades
        weights = np.array([f.weight for f in facades])
        index = int(rng.choice(len(facades), p=weights / weights.sum()))
        facade = facades[index]
        height = int(rng.integers(facade.storeys[0], facade.storeys[1] + 1)) * float(np.mean(facade.storey)) + 0.6
        top = height + (rng.uniform(1.5, 3.0) if rng.random() < facade.gable else 0.0)
        shader = facade_shader(facade, self.style, rng, height, lit, index)
        self.canvas.wall(start, end, top, shader)
        if deep:
            near = start if start[1] < end[1] else end
            dim = facade_shader(facade, self.style, rng, height, 0.5 * (lit + 0.9), index)
            self.canvas.wall(near, (near[0] + deep, near[1] + 0.01), height, dim)

    def _row_of_lots(self, side: float) -> None:
        rng, layout = self.rng, self.style.layout
        forced = [kind for kind in ("wall", "fence", "vegetation") if self.forced.get(kind) == side]
        z = -3.0
        while z < _FAR:
            crossing = self.ground.crossing
            if crossing is not None and crossing[0] - 3.0 < z < crossing[1]:
                z = crossing[1]
            facade = self.style.facades[int(rng.integers(len(self.style.facades)))]
            end = z + rng.uniform(*facade.length)
            if crossing is not None and z < crossing[0] < end:
                end = crossing[0]
            extra = rng.uniform(*layout.setback)
            if (forced and z > 2.0) or rng.random() < layout.open_side:
                self._open_lot(side, z, end, forced.pop() if forced and z > 2.0 else None)
            else:
                start, stop = (self._face(side, z, extra), z), (self._face(side, end, extra), end)
                self._house(start, stop, self._lit(side), deep=side * 12.0)
            z = end + (rng.uniform(0.5, 4.0) if rng.random() < 0.25 else 0.0)

    def _open_lot(self, side: float, z: float, end: float, force: str | None) -> None:
        """A lot without a house at the pavement: wall, fence or hedge, trees, and a house further back."""
        rng, style = self.rng, self.style
        line = (self._face(side, z, 0.3), z), (self._face(side, end, 0.3), end)
        kind = force
        if kind is None and rng.random() < style.layout.wall_or_fence:
            kind = "wall" if rng.random() < 0.5 else "fence"
        elif kind is None and rng.random() < style.density["hedge"]:
            kind = "vegetation"
        lit = self._lit(side)
        if kind == "wall" and "wall" not in self.absent:
            self.canvas.wall(*line, rng.uniform(1.2, 2.6), barrier_shader(style, rng, lit))
        elif kind == "fence" and "fence" not in self.absent:
            height = rng.uniform(1.1, 2.2)
            self.canvas.wall(*line, height, fence_shader(style, rng, height, lit))
        elif kind == "vegetation":
            height = rng.uniform(1.3, 3.0)
            self.canvas.wall(*line, height * 1.3, hedge_shader(style, rng, height, lit))
        for _ in range(int(rng.integers(1, 4))):
            where = rng.uniform(max(z, 6.0), max(end, 7.0))
            self._tree(self._face(side, where, rng.uniform(1.5, 6.0)), where)
        if rng.random() < 0.7:
            back = rng.uniform(8.0, 16.0)
            self._house((self._face(side, z, back), z), (self._face(side, end, back), end), lit, deep=side * 12.0)

    # --- what stands and moves on it ---

    def _add(self, z: float, draw: Callable[[], None]) -> None:
        self.things.append((z, draw))

    def _count(self, kind: str) -> int:
        """How many of a kind; at least one where it is wanted."""
        if _NEEDS.get(kind, kind) in self.absent:
            return 0
        drawn = int(self.rng.poisson(self.style.density.get(kind, 0.0)))
        return max(drawn, 1) if kind in self.wanted else drawn

    def _depth(self, near: float, far: float, wanted: bool = False) -> float:
        """A depth, denser near the camera; close by where the thing must be seen."""
        if wanted:
            return float(self.rng.uniform(near, near + 7.0))
        return float(near * (far / near) ** self.rng.random())

    def _yaw(self, z: float, reverse: bool) -> float:
        along = float(np.arctan(self.ground.heading + self.ground.curve * z))
        return along + (np.pi if reverse else 0.0) + self.rng.normal(0.0, 0.02)

    def _tree(self, x: float, z: float) -> None:
        self._add(z, lambda: draw_tree(self.canvas, self.style, self.rng, x, z, self._lit(np.sign(x))))

    def _lane(self) -> tuple[float, bool]:
        """Distance of a lane's middle from the axis, and whether its traffic comes towards us."""
        edges = (-self.ground.road_left, *self.ground.lanes, self.ground.road_right)
        lane = int(self.rng.integers(len(edges) - 1))
        middle = (edges[lane] + edges[lane + 1]) / 2
        left_of_axis = middle < -self.position
        return middle, left_of_axis != self.style.layout.drive_left

    def _traffic(self) -> None:
        rng, style = self.rng, self.style
        for kind, draw, length in (
            ("bus", draw_bus, 11.0),
            ("truck", draw_truck, 8.0),
            ("train", draw_train, 20.0),
            ("traffic", draw_car, 4.5),
        ):
            for i in range(self._count(kind)):
                self._moving(draw, length, kind in self.wanted and i == 0)
        for side in (-1.0, 1.0):
            z = rng.uniform(5.0, 10.0)
            row = rng.random() < 0.75
            while z < 55.0 and row and "car" not in self.absent:
                x = self._kerb(side, z, 1.05)
                if rng.random() < style.density["parked"] and not self._in_crossing(z, 5.0) and self._free(x, z, 4.5):
                    reverse = (side < 0) != style.layout.drive_left
                    self._vehicle(draw_car, Pose(x, z, self._yaw(z, reverse)), self._lit(side))
                z += rng.uniform(5.2, 6.5)

    def _moving(self, draw: Callable[..., None], length: float, wanted: bool) -> None:
        """Put a vehicle into a lane where there is room for it."""
        rng = self.rng
        for _ in range(6):
            middle, reverse = self._lane()
            near = 6.0 + length * 0.7 + (5.0 if abs(middle) < 1.7 else 0.0)
            z = self._depth(near, 65.0, wanted)
            pose = Pose(self.ground.at(middle, z), z, self._yaw(z, reverse))
            if self._in_crossing(z) and length < 15.0 and rng.random() < 0.4:
                pose = Pose(pose.x, z, float(rng.choice([-1, 1])) * np.pi / 2 + rng.normal(0, 0.1))
            if self._free(pose.x, z, length):
                self._vehicle(draw, pose, self._lit(np.sign(middle)))
                return

    def _free(self, x: float, z: float, length: float) -> bool:
        """Whether a vehicle fits there; if so, the room is taken."""
        if any(abs(x - a) < 2.4 and abs(z - b) < (length + c) / 2 + 1.0 for a, b, c in self.taken):
            return False
        self.taken.append((x, z, length))
        return True

    def _vehicle(self, draw: Callable[..., None], pose: Pose, sun: float) -> None:
        self._add(pose.z, lambda: draw(self.canvas, self.style, self.rng, pose, 0.5 + 0.5 * sun))

    def _kerbside(self) -> None:
        rng, density = self.rng, self.style.density
        for side in (-1.0, 1.0):
            z = rng.uniform(5.0, 12.0)
            spacing = rng.uniform(10.0, 18.0)
            while z < 60.0:
                if not self._in_crossing(z, 1.0):
                    self._stand(side, z, density)
                z += spacing * rng.uniform(0.8, 1.2)
        for kind in ("light", "sign", "pole"):
            if kind in self.wanted:
                side = float(rng.choice([-1.0, 1.0]))
                self._post(kind, side, rng.uniform(8.0, 14.0))
        if self.ground.crossing is not None and rng.random() < density["light"]:
            for side in (-1.0, 1.0):
                self._post("light", side, self.ground.crossing[0] - 0.5)
        for kind in ("bicycle", "motorcycle"):
            for i in range(self._count(kind)):
                z = self._depth(5.0, 30.0, kind in self.wanted and i == 0)
                side = float(rng.choice([-1.0, 1.0]))
                self._two_wheeler(self._kerb(side, z, -rng.uniform(0.5, 1.6)), z, kind, ridden=False)

    def _stand(self, side: float, z: float, density: dict[str, float]) -> None:
        """Something at the kerb: a lamp, a sign, a tree, or nothing."""
        rng = self.rng
        if rng.random() < density["lamp"] * 0.5:
            self._post("pole", side, z)
        if rng.random() < density["sign"] * 0.35:
            self._post("sign", side, z + rng.uniform(2.0, 5.0))
        if rng.random() < density["light"] * 0.08:
            self._post("light", side, z + rng.uniform(1.0, 2.0))
        if rng.random() < density["tree"] * 0.4:
            self._tree(self._kerb(side, z + 4.0, -rng.uniform(0.8, 1.4)), z + 4.0)

    def _post(self, kind: str, side: float, z: float) -> None:
        x = self._kerb(side, z, -0.45)
        canvas, style, rng = self.canvas, self.style, self.rng
        if kind == "pole" and "pole" not in self.absent:
            self._add(z, lambda: draw_lamp(canvas, style, rng, x, z, -side))
        elif kind == "light":
            self._add(z, lambda: draw_traffic_light(canvas, style, rng, x, z, -side))
        elif kind == "sign":
            self._add(z, lambda: draw_sign(canvas, style, rng, x, z))

    def _two_wheeler(self, x: float, z: float, kind: str, ridden: bool) -> None:
        sun = self._lit(np.sign(x))
        self._add(z, lambda: draw_two_wheeler(self.canvas, self.style, self.rng, x, z, sun, kind, ridden))

    def _people(self) -> None:
        rng = self.rng
        for i in range(self._count("person")):
            z = self._depth(5.0, 32.0, "person" in self.wanted and i == 0)
            side = float(rng.choice([-1.0, 1.0]))
            walk = self.ground.walk_right if side > 0 else self.ground.walk_left
            self._walker(self._kerb(side, z, -rng.uniform(0.4, walk)), z)
        for _ in range(self._count("crossing") if "person" not in self.absent else 0):
            z = self._depth(8.0, 30.0)
            self._walker(self.ground.at(rng.uniform(-self.ground.road_left, self.ground.road_right), z), z)
        for kind in ("rider_bicycle", "rider_motorcycle"):
            for i in range(self._count(kind)):
                z = self._depth(6.0, 30.0, kind in self.wanted and i == 0)
                side = float(rng.choice([-1.0, 1.0]))
                self._two_wheeler(
                    self._kerb(side, z, rng.uniform(1.0, 3.2)), z, kind.removeprefix("rider_"), ridden=True
                )

    def _walker(self, x: float, z: float) -> None:
        self._add(z, lambda: draw_person(self.canvas, self.style, self.rng, x, z, self._lit(np.sign(x))))

    def _hood(self) -> None:
        """The bonnet of the car that carries the camera; nobody learns or is scored on it."""
        cam, rng = self.canvas.camera, self.rng
        columns = (np.arange(cam.width) + 0.5) / cam.width * 2 - 1
        top = cam.height * (0.93 + 0.05 * columns**2 + rng.uniform(-0.01, 0.01))
        mask = np.arange(cam.height)[:, None] > top[None, :]
        gloss = np.linspace(0.28, 0.12, cam.height)[:, None, None]
        self.canvas.rgb[mask] = np.broadcast_to(gloss, self.canvas.rgb.shape)[mask]
        self.canvas.ids[mask] = EGO_VEHICLE
        self.canvas.depth[mask] = 0.5


def photograph(
    canvas: Canvas, light: Light, size: tuple[int, int], rng: Rng
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Air, exposure, lens and sensor; the ids only lose resolution."""
    rgb = canvas.rgb
    distance = np.minimum(canvas.depth, 1000.0)
    rows = np.arange(canvas.camera.height, dtype=np.float32)[:, None] + 0.5
    floor = canvas.camera.focal * canvas.camera.eye / np.maximum(rows - canvas.camera.horizon, 0.5)
    distance = np.where(canvas.ids == LABEL_IDS["sky"], 0.0, np.minimum(distance, floor))
    haze = (1.0 - np.exp(-distance / rng.uniform(*light.haze)))[:, :, None].astype(np.float32)
    rgb = rgb * (1 - haze) + np.asarray(light.haze_colour, np.float32) * haze
    rgb = rgb * (rng.uniform(*light.gain) * np.asarray(light.tint, np.float32))
    rgb = np.clip(rgb, 0.0, 1.0) ** rng.uniform(*light.gamma)
    picture = Image.fromarray((rgb * 255).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    blur = rng.uniform(*light.blur)
    if blur > 0.05:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(picture, np.float32)
    if light.vignette > 0:
        y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
        pixels = pixels * (1.0 - light.vignette * (x**2 + y**2) / 2)[:, :, None].astype(np.float32)
    grain = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(255 * rng.uniform(*light.noise))
    ids = Image.fromarray(canvas.ids).resize(size, Image.Resampling.NEAREST)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8), np.asarray(ids)
