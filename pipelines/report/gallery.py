"""The pictures of a report, as files in a run directory: ``pictures/``, with an index that names them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.showcase import Shown
from actors.storage import Place, remove_tree
from pipelines import pictures
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.results import write_json

FOLDER = "pictures"
INDEX = "index.json"
PALE = 0.3
"""How much of the image, in gray on white, shows where a pseudo label is withheld."""


@dataclass(frozen=True)
class Row:
    """The pictures of one image."""

    image_id: str
    files: dict[str, str]
    """File name by what it shows: ``image``, ``truth``, names of weights, ``pseudo_label``, ``confidence``."""


@dataclass(frozen=True)
class Gallery:
    """All rows, and the classes that occur in them."""

    rows: tuple[Row, ...]
    classes: tuple[int, ...]


def write_gallery(folder: Place, shown: Sequence[Shown], classes: ClassSet) -> None:
    """Write the pictures; those of an earlier time go.

    Args:
        folder: run directory.
        shown: what is to be seen.
        classes: names and colours.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    target = folder / FOLDER
    remove_tree(target)
    rows, present = [], set()
    for number, item in enumerate(shown, 1):
        maps = [*item.predictions.values(), *([] if item.truth is None else [item.truth])]
        present |= {int(i) for found in maps for i in np.unique(found)} - {IGNORE}
        files = {}
        for kind, pixels in _painted(item, classes).items():
            files[kind] = f"{number:02d}-{kind}.{'jpg' if kind in ('image', 'pseudo_label') else 'png'}"
            pictures.save(Image.fromarray(pixels), target / files[kind])
        rows.append(Row(item.image_id, files))
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / INDEX, asdict(Gallery(tuple(rows), tuple(sorted(present)))))


def _painted(item: Shown, classes: ClassSet) -> dict[str, NDArray[np.uint8]]:
    """(H, W, 3) pictures by kind, in the order in which they are looked at."""
    painted = {"image": item.image}
    if item.truth is not None:
        painted["truth"] = classes.colourise(item.truth)
    painted |= {name: classes.colourise(found) for name, found in item.predictions.items()}
    if item.pseudo_label is not None:
        pale = 255 - (255 - item.image.mean(2, keepdims=True)) * PALE
        kept = (item.pseudo_label != IGNORE)[..., None]
        painted["pseudo_label"] = np.where(kept, classes.colourise(item.pseudo_label), pale).astype(np.uint8)
    painted["confidence"] = pictures.heat(item.confidence.astype(np.float32) / np.float32(255))
    return painted


def read_gallery(folder: Place) -> Gallery:
    """What :func:`write_gallery` wrote; empty where a run has no pictures."""
    path = folder / FOLDER / INDEX
    if not path.is_file():
        return Gallery((), ())
    plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Gallery(tuple(Row(**row) for row in plain["rows"]), tuple(plain["classes"]))
