"""Readers for the published datasets, and the miniature that is rendered in their very layouts.

Every reader returns a `Split`: strings only, so it travels to any worker. Pixels are read where they are
needed.
"""

from pipelines.datasets.classes import CITYSCAPES_19, IGNORE, PROTOCOLS, ROBOTCAR_9, ClassSet
from pipelines.datasets.dataset import (
    DataError,
    LabelEncoding,
    Split,
    UnreadableImage,
    read_image,
    read_label,
)

__all__ = [
    "CITYSCAPES_19",
    "IGNORE",
    "PROTOCOLS",
    "ROBOTCAR_9",
    "ClassSet",
    "DataError",
    "LabelEncoding",
    "Split",
    "UnreadableImage",
    "read_image",
    "read_label",
]
