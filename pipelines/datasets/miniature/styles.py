"""What a domain looks like, as data: camera, street layout, materials, the shape of things, light.

The domains differ the way real ones do: in texture, in the shape of things, in layout and class frequency;
colour, light, haze, blur and noise differ moderately. None of these numbers was ever chosen by looking at
an adaptation method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.datasets.miniature.canvas import Colour

Range = tuple[float, float]
Pattern = Literal["plain", "bricks", "grid"]


@dataclass(frozen=True)
class Material:
    """Colours to draw from, a joint pattern, and a grain (noise tile)."""

    colours: tuple[Colour, ...]
    jitter: float = 0.04
    pattern: Pattern = "plain"
    size: float = 1.0
    joint: float = -0.15
    grain: float = 0.05
    slope: float = 1.0
    per_metre: float = 24.0
    stretch: float = 1.0


@dataclass(frozen=True)
class Facade:
    """One architecture: storeys, windows, ground floor, roof."""

    wall: Material
    storey: Range = (2.9, 3.4)
    storeys: tuple[int, int] = (3, 6)
    pitch: Range = (2.2, 3.2)
    window: tuple[float, float] = (0.45, 0.55)
    glass: tuple[Colour, ...] = ((0.2, 0.24, 0.3),)
    frame: Colour | None = (0.9, 0.9, 0.88)
    ledge: float = 0.0
    shop: float = 0.3
    gable: float = 0.0
    roof: Colour = (0.45, 0.22, 0.16)
    length: Range = (9.0, 20.0)
    weight: float = 1.0


@dataclass(frozen=True)
class Layout:
    """Camera and ground plan."""

    focal: Range
    eye: Range
    horizon: Range
    lateral: Range
    road: Range
    walk: Range
    setback: Range = (0.0, 1.0)
    curve: Range = (-0.004, 0.004)
    heading: Range = (-0.05, 0.05)
    crossing: float = 0.4
    verge: float = 0.0
    open_side: float = 0.15
    wall_or_fence: float = 0.25
    drive_left: bool = False
    hood: bool = False


@dataclass(frozen=True)
class Light:
    """What air and lens do; the part of the gap that normalisation statistics could explain."""

    sky_top: tuple[Colour, ...]
    sky_low: tuple[Colour, ...]
    clouds: Range
    sun: Range
    shadow: Range
    haze: Range
    haze_colour: Colour
    gain: Range = (0.9, 1.1)
    tint: Colour = (1.0, 1.0, 1.0)
    gamma: Range = (0.95, 1.05)
    blur: Range = (0.0, 0.4)
    noise: Range = (0.005, 0.015)
    vignette: float = 0.0


@dataclass(frozen=True)
class Style:
    """Everything that makes a domain."""

    name: str
    seed: int
    layout: Layout
    light: Light
    road: Material
    sidewalk: Material
    terrain: Material
    marking: Colour
    facades: tuple[Facade, ...]
    barrier: Material
    fence_colour: Colour
    fence_kind: Literal["bars", "mesh", "planks"]
    foliage: Material
    trees: Literal["lollipop", "ragged", "palm", "broad"]
    trunk: Colour
    pole_colour: Colour
    pole_width: float
    lamp: Literal["curved", "straight", "lantern"]
    signs: Literal["discs", "boards", "plates"]
    light_box: Colour
    cars: tuple[tuple[str, float], ...]
    car_colours: tuple[Colour, ...]
    bus_colours: tuple[Colour, ...]
    truck_colours: tuple[Colour, ...]
    train_colours: tuple[Colour, ...]
    cloth: tuple[Colour, ...]
    legs: tuple[Colour, ...]
    density: dict[str, float] = field(default_factory=dict)
