"""The strong view of ProDA: RandAugment and CutOut on a weakly augmented crop (methods §2.4, §5.2 step 8).

All that moves or hides pixels is recorded as one matrix and one box a sample. They are independent of resolution, so
that label maps and prototype assignments of any size follow the image exactly. Colours are Pillow's, on 8-bit values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines import colour_operations as colours

FILL = 127.0
"""What an image shows where nothing of the crop is left, and in the cut-out."""
NUDGE = 2.0**-9
"""Pixels to the right and down: a point between two pixels belongs to the second one, however its coordinate rounds."""

Mode = Literal["nearest", "bilinear"]
Name = Literal[
    "autocontrast", "equalize", "identity", "brightness", "color", "contrast", "sharpness", "posterize", "solarize",
    "rotate", "shear-x", "shear-y", "translate-x", "translate-y",
]  # fmt: skip

COLOURS: dict[Name, Callable[[Tensor, int], Tensor]] = {
    "autocontrast": lambda image, level: colours.autocontrast(image),
    "equalize": lambda image, level: colours.equalize(image),
    "brightness": lambda image, level: colours.brightness(image, level * 0.9 / 10 + 0.05),
    "color": lambda image, level: colours.color(image, level * 0.9 / 10 + 0.05),
    "contrast": lambda image, level: colours.contrast(image, level * 0.9 / 10 + 0.05),
    "sharpness": lambda image, level: colours.sharpness(image, level * 0.9 / 10 + 0.05),
    "posterize": lambda image, level: colours.posterize(image, level * 4 // 10 + 4),
    "solarize": lambda image, level: colours.solarize(image, 256 - level * 256 // 10),
}
"""From a level 1…9; images as in :mod:`pipelines.colour_operations`."""
MOVEMENTS: tuple[Name, ...] = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")
"""In the order in which the published code replays them on maps (Q-PD-7)."""
OPERATIONS: tuple[Name, ...] = (*COLOURS, "identity", *MOVEMENTS)


class Operation(NamedTuple):
    """One step of RandAugment: its level is 1…9, its sign ±1 (of movements alone)."""

    name: Name
    level: int
    sign: int


@dataclass(frozen=True)
class Draw:
    """What is done to one sample.

    Attributes:
        mirror: whether it is mirrored, before all else.
        operations: those that are executed, in order; at most two.
        cut: the middle of the cut-out, as shares of width and height.
    """

    mirror: bool
    operations: tuple[Operation, ...]
    cut: tuple[float, float]


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a batch of strong views come from, whatever their resolution.

    Attributes:
        matrix: float32 N×2×3, from a point (x, y, 1) of the strong view to its point of the weak crop; both run from
            −1 to 1 between the outer edges of the pixels.
        cut: float32 N×4, left, top, right and bottom of the cut-out, as shares (0…1) of the strong view's sides.
    """

    matrix: Tensor
    cut: Tensor

    def warp(
        self, maps: Tensor, fill: float, mode: Mode = "nearest", crop: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps of the weak crop as the strong view shows them.

        Args:
            maps: N×C×h×w of any size and type ("bilinear": float32) that cover the crop.
            fill: value where the crop does not reach, and in the cut-out.
            mode: "nearest" takes the pixel that holds the source point of a pixel's centre.
            crop: (width, height) of the crop where a map's pixels are points from its first to its last pixel (corners
                aligned), as enlarged logits are. None for pixels that divide the crop among them.

        Returns:
            The maps, and which of their pixels show something of the crop, bool N×h×w.
        """
        moved, inside = _sample(maps, self.matrix, mode, crop)
        seen = inside & ~self._cut_out(maps.shape[-2], maps.shape[-1], crop)
        return moved.masked_fill(~seen[:, None], fill), seen

    def _cut_out(self, height: int, width: int, crop: tuple[int, int] | None = None) -> Tensor:
        """Pixels whose centre the cut-out hides, bool N×h×w."""
        left, top, right, bottom = (self.cut[:, k, None] for k in range(4))
        wide, tall = (width, height) if crop is None else crop
        x = _centres(width, wide, self.cut.device) + NUDGE
        y = _centres(height, tall, self.cut.device) + NUDGE
        columns = (x >= left * wide) & (x < right * wide)
        rows = (y >= top * tall) & (y < bottom * tall)
        return rows[:, :, None] & columns[:, None, :]


@dataclass(frozen=True)
class StrongView:
    """RandAugment and CutOut (methods §2.4), a pure function of (seed, position).

    Attributes:
        seed: of the run.
        translation: "published" moves maps, not images, w/h times too far along x (Q-PD-6).
        replay: "published" moves maps by mirror, shear-x, shear-y, translate-x, translate-y, rotate, whatever the order
            of the image, and of an operation that was drawn twice only by the second (Q-PD-7).
    """

    seed: int
    translation: Literal["exact", "published"] = "exact"
    replay: Literal["ordered", "published"] = "ordered"

    def __call__(self, images: Tensor, positions: np.ndarray) -> tuple[Tensor, Geometry]:
        """Strong views of weakly augmented crops.

        Args:
            images: float32 N×3×h×w RGB, 0–255.
            positions: int64 N, places in the stream.

        Returns:
            The views, like the images, and the geometry by which maps follow them.
        """
        return self.apply(images, [self.draw(int(position)) for position in positions])

    def draw(self, position: int) -> Draw:
        """What is done to the sample at a position of the stream."""
        numbers = np.random.default_rng([self.seed, 9, position]).random(11)
        operations = tuple(
            Operation(OPERATIONS[int(kind * len(OPERATIONS))], 1 + int(level * 9), 1 if sign < 0.5 else -1)
            for kind, level, executed, sign in numbers[1:9].reshape(2, 4)
            if executed < 0.5
        )
        return Draw(bool(numbers[0] < 0.5), operations, (float(numbers[9]), float(numbers[10])))

    def apply(self, images: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Geometry]:
        """As :meth:`__call__`, with a given draw for each image."""
        height, width = images.shape[-2:]
        views = torch.stack([_view(image, draw) for image, draw in zip(images, draws, strict=True)])
        matrices = np.stack([self._map_matrix(draw, width, height) for draw in draws])
        boxes = np.array([_cut_box(draw, width, height) for draw in draws], np.float32)
        geometry = Geometry(_upload(matrices, images.device), _upload(boxes, images.device))
        return views.masked_fill(geometry._cut_out(height, width)[:, None], FILL), geometry

    def _map_matrix(self, draw: Draw, width: int, height: int) -> np.ndarray:
        """As in :class:`Geometry`, for one sample."""
        operations = list(draw.operations)
        if self.replay == "published":
            last = {operation.name: operation for operation in operations}
            operations = [last[name] for name in MOVEMENTS if name in last]
        # The published code counts a pixel as 2/H of the way from −1 to 1 where 2/W is meant.
        stretch = width / height if self.translation == "published" else 1.0
        return _matrix(draw.mirror, operations, width, height, stretch)


def _view(image: Tensor, draw: Draw) -> Tensor:
    """One image float32 3×h×w as its strong view shows it, without the cut-out."""
    height, width = image.shape[-2:]
    # Colours do not tell left from right, so the mirror may wait for the movements and be one of them.
    mirror = draw.mirror
    operations = [operation for operation in draw.operations if operation.name != "identity"]
    for moving, run in groupby(operations, lambda operation: operation.name in MOVEMENTS):
        if moving:
            # All movements in one: the image is filtered once, and what the first pushes out the second may bring back,
            # in maps as well.
            matrix, mirror = _matrix(mirror, list(run), width, height), False
            moved, inside = _sample(image[None], _upload(matrix[None], image.device), "bilinear")
            image = moved[0].clamp(0, 255).masked_fill(~inside, FILL)
        else:
            pixels = image.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
            for operation in run:
                pixels = COLOURS[operation.name](pixels, operation.level)
            image = pixels.permute(2, 0, 1).to(image.dtype)
    return image.flip(-1) if mirror else image


def _cut_box(draw: Draw, width: int, height: int) -> tuple[float, float, float, float]:
    """As in :class:`Geometry`, for one sample: whole pixels of the image."""
    side = min(width, height) // 3
    left = max(0, int(np.floor(draw.cut[0] * width - side / 2)))
    top = max(0, int(np.floor(draw.cut[1] * height - side / 2)))
    return left / width, top / height, min(width, left + side) / width, min(height, top + side) / height


def _matrix(mirror: bool, operations: Sequence[Operation], width: int, height: int, stretch: float = 1.0) -> np.ndarray:
    """A mirror and the movements among the operations in one matrix, as in :class:`Geometry` (float32 2×3)."""
    pixels = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) if mirror else np.eye(3)
    for operation in operations:
        # From the result back to the crop: what is done to the image first stands outermost.
        pixels = pixels @ _movement(operation, width, height, stretch)
    scale = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    return (np.linalg.inv(scale) @ pixels @ scale)[:2].astype(np.float32)


def _movement(operation: Operation, width: int, height: int, stretch: float) -> np.ndarray:
    """3×3, from a point of the result to its source, in pixels from the upper left corner as Pillow counts them.

    Args:
        operation: one that moves nothing gives the identity.
        width: of the image.
        height: of the image.
        stretch: factor of translate-x.
    """
    matrix = np.eye(3)
    share = operation.sign * operation.level * 0.3 / 10
    degrees = operation.sign * operation.level * 30 / 10
    if operation.name == "shear-x":
        matrix[0, 1] = share
    elif operation.name == "shear-y":
        matrix[1, 0] = share
    elif operation.name == "translate-x":
        matrix[0, 2] = int(share * width) * stretch
    elif operation.name == "translate-y":
        matrix[1, 2] = int(share * height)
    elif operation.name == "rotate":
        cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = np.array([[cosine, -sine], [sine, cosine]])
        centre = np.array([width / 2, height / 2])
        matrix[:2, :2], matrix[:2, 2] = turn, centre - turn @ centre
    return matrix


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for what it is busy with."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _centres(count: int, pixels: int, device: torch.device) -> Tensor:
    """Where the pixels of a map lie in a crop of so many pixels, its own or points from its first to its last."""
    step = 1.0 if count == pixels else (pixels - 1) / max(1, count - 1)
    return torch.arange(count, device=device) * step + 0.5


def _sample(maps: Tensor, matrix: Tensor, mode: Mode, crop: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Maps N×C×h×w at the source points of their pixels' centres, and which of these lie on the map (bool N×h×w)."""
    height, width = maps.shape[-2:]
    wide, tall = (width, height) if crop is None else crop
    x = (2 * _centres(width, wide, maps.device) / wide - 1)[None, None, :]
    y = (2 * _centres(height, tall, maps.device) / tall - 1)[None, :, None]
    # Written out: a matrix product may run in TF32, ten bits of coordinate.
    m = matrix[..., None, None]
    x, y = (m[:, k, 0] * x + m[:, k, 1] * y + m[:, k, 2] for k in range(2))
    across, down = (x + 1) * (wide / 2), (y + 1) * (tall / 2)  # in pixels of the crop
    right, below = across + NUDGE, down + NUDGE
    inside = (right >= 0) & (right < wide) & (below >= 0) & (below < tall)
    if crop is not None and (wide, tall) != (width, height):  # from pixels to points, each with its half of the way
        across = (across - 0.5) * ((width - 1) / max(1, wide - 1)) + 0.5
        down = (down - 0.5) * ((height - 1) / max(1, tall - 1)) + 0.5
    if mode == "bilinear":
        grid = torch.stack((2 * across / width - 1, 2 * down / height - 1), dim=-1)
        return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False), inside
    column, row = ((place + NUDGE).floor().long() for place in (across, down))
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    place = (row * width + column).flatten(1)
    picked = maps.flatten(2).gather(2, place[:, None, :].expand(-1, maps.shape[1], -1))
    return picked.view(maps.shape), inside
