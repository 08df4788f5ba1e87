"""The class sets of the benchmarks, their colours, and the protocols that scores are averaged over.

A protocol is a tuple of *train ids of its class set*: with 19 outputs the 16- and 13-class figures of SYNTHIA
are means over some rows of the 19-way confusion matrix, so a prediction of one of the three absent classes
counts as an error. ProDA and FADA train 16 outputs instead (methods §2.3): `CITYSCAPES_16` and `CITYSCAPES_13`
are the protocols as class sets of their own, with contiguous train ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Train id of a pixel that nobody learns from and nobody is scored on."""


@dataclass(frozen=True)
class ClassSet:
    """Names and colours of the classes that a network tells apart; a class's train id is its position."""

    name: str
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(f"class set {self.name}: {len(self.names)} names but {len(self.palette)} colours")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Train id of the class called `name`."""
        return self.names.index(name)

    def narrowed(self, name: str, kept: tuple[int, ...]) -> ClassSet:
        """A class set of some of the classes: the one with train id `kept[i]` gets train id `i`."""
        return ClassSet(name, tuple(self.names[i] for i in kept), tuple(self.palette[i] for i in kept))

    def colourise(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Paint train ids (…, H, W) in the palette's RGB (…, H, W, 3); ignored pixels become black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.palette
        return table[label]


_STREET: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)),
    ("fence", (190, 153, 153)),
    ("pole", (153, 153, 153)),
    ("light", (250, 170, 30)),
    ("sign", (220, 220, 0)),
    ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)),
    ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)),
    ("truck", (0, 0, 70)),
    ("bus", (0, 60, 100)),
    ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)),
    ("bicycle", (119, 11, 32)),
)
_ROBOT: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)),
    ("two-wheel", (119, 11, 32)),
    ("automobile", (0, 0, 142)),
    ("sign", (220, 220, 0)),
    ("light", (250, 170, 30)),
    ("building", (70, 70, 70)),
    ("sidewalk", (244, 35, 232)),
    ("road", (128, 64, 128)),
)

CITYSCAPES_19 = ClassSet("cityscapes19", tuple(n for n, _ in _STREET), tuple(c for _, c in _STREET))
ROBOTCAR_9 = ClassSet("robotcar9", tuple(n for n, _ in _ROBOT), tuple(c for _, c in _ROBOT))

_ABSENT_IN_SYNTHIA = ("terrain", "truck", "train")
_LEFT_OUT_OF_13 = ("wall", "fence", "pole")

PROTOCOLS: dict[str, tuple[int, ...]] = {
    "19": tuple(range(19)),
    "16": tuple(i for i, n in enumerate(CITYSCAPES_19.names) if n not in _ABSENT_IN_SYNTHIA),
    "13": tuple(i for i, n in enumerate(CITYSCAPES_19.names) if n not in _ABSENT_IN_SYNTHIA + _LEFT_OUT_OF_13),
    "9": tuple(range(9)),
}
"""Protocol → train ids whose IoU is averaged ("9" in `ROBOTCAR_9`, the others in `CITYSCAPES_19`)."""

CITYSCAPES_16 = CITYSCAPES_19.narrowed("cityscapes16", PROTOCOLS["16"])
CITYSCAPES_13 = CITYSCAPES_19.narrowed("cityscapes13", PROTOCOLS["13"])
