"""GTA5 (*Playing for Data*): `images/00001.png …` and `labels/` with the same names.

Labels are 8-bit palette PNGs whose *indices* are Cityscapes `labelIds`; the RGB that the palette shows is
never read.
"""

from __future__ import annotations

from actors.storage import Place, matching
from pipelines.datasets.cityscapes import TO_19_CLASSES
from pipelines.datasets.dataset import LabelEncoding, Split, build_split, existing_folder

LAYOUT = "`images/00001.png …` and `labels/00001.png …` (identical file names)"
ENCODING = LabelEncoding.of("GTA5", "index", TO_19_CLASSES)


def train(root: str | Place) -> Split:
    """All images of GTA5 under `root`, with labels in the 19 classes of Cityscapes."""
    images = existing_folder(root, "images", "GTA5", LAYOUT)
    labels = existing_folder(root, "labels", "GTA5", LAYOUT)
    samples = [(path.stem, path, labels / path.name) for path in matching(images, "*.png")]
    return build_split("gta5/train", samples, ENCODING, images)
