"""Pictures for people: a label painted in its classes' colours, laid over its image, with a key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from actors.storage import Place, whole
from pipelines.datasets.classes import IGNORE, ClassSet

OPACITY = 0.55
KEY_ROW = 16
"""Pixels of a row of the key."""
EDGE = 0.35
"""Brightness of the line between two classes."""


def overlay(image: NDArray[np.uint8], label: NDArray[np.uint8], classes: ClassSet) -> NDArray[np.uint8]:
    """Lay a label over its image.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 train ids; ignored pixels show the image alone.
        classes: names and colours.

    Returns:
        (H, W, 3) uint8 RGB, with a dark line where two classes meet.
    """
    paint = classes.colourise(label).astype(np.float32)
    mixed = np.where((label == IGNORE)[..., None], image, image * (1 - OPACITY) + paint * OPACITY)
    edges = np.zeros(label.shape, bool)
    edges[:, 1:] |= label[:, 1:] != label[:, :-1]
    edges[1:] |= label[1:] != label[:-1]
    mixed[edges] *= EDGE
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def heat(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values in [0, 1], (H, W), as colours from dark blue over red to pale yellow, (H, W, 3) uint8."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)
    place = values.clip(0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    share = (place - low)[..., None]
    return np.rint(stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8)


def shrunk(label: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A label at another size (width, height), nearest."""
    return np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))


def fitted(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """(width, height) of a picture of shape (H, W, …) with its longer side at most ``side``."""
    factor = min(1.0, side / max(shape[:2]))
    return max(1, round(shape[1] * factor)), max(1, round(shape[0] * factor))


def side_by_side(pictures: Sequence[NDArray[np.uint8]], gap: int = 4) -> NDArray[np.uint8]:
    """Pictures of one height, (H, W, 3) uint8, in a row on white."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (white, picture)][1:]
    return np.concatenate(row, axis=1)


def with_key(picture: NDArray[np.uint8], classes: ClassSet, shown: Sequence[int], title: str = "") -> Image.Image:
    """A picture above a key of the classes that it shows.

    Args:
        picture: (H, W, 3) uint8 RGB.
        classes: names and colours.
        shown: train ids in the key.
        title: a line above the picture.
    """
    font = ImageFont.load_default(size=11)
    width, height = max(picture.shape[1], 160), picture.shape[0]
    cells, right, row = [], 4, 0
    for train_id in shown:
        length = 18 + round(font.getlength(classes.names[train_id])) + 10
        if right + length > width and right > 4:
            right, row = 4, row + 1
        cells.append((right, row, train_id))
        right += length
    top = KEY_ROW if title else 0
    canvas = Image.new("RGB", (width, top + height + (row + 1) * KEY_ROW + 6), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((4, 2), title, fill="black", font=font)
    canvas.paste(Image.fromarray(picture), (0, top))
    for left, line, train_id in cells:
        y = top + height + 4 + line * KEY_ROW
        draw.rectangle((left, y + 1, left + 12, y + 12), fill=classes.palette[train_id], outline="black")
        draw.text((left + 17, y), classes.names[train_id], fill="black", font=font)
    return canvas


def save(picture: Image.Image, path: Place) -> None:
    """Write a picture; it appears complete or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        picture.save(file, format={".png": "PNG", ".jpg": "JPEG"}[path.suffix], quality=90)
