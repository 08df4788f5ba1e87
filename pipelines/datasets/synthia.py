"""SYNTHIA-RAND-CITYSCAPES: `RGB/0000000.png …` and `GT/LABELS/` with the same names.

Labels are 16-bit, 3-channel PNGs; the class id is the first channel in RGB order, the instance id the
second. A reader that reduces them to 8 bits by dropping the low byte sees nothing but zeros. Lane markings
(22) are not road.
"""

from __future__ import annotations

from actors.storage import Place, matching
from pipelines.datasets.dataset import LabelEncoding, Split, build_split, existing_folder

LAYOUT = "`RGB/0000000.png …` and `GT/LABELS/0000000.png …` (identical file names)"

TO_19_CLASSES: dict[int, int] = {
    3: 0,  # road
    4: 1,  # sidewalk
    2: 2,  # building
    21: 3,  # wall
    5: 4,  # fence
    7: 5,  # pole
    15: 6,  # light
    9: 7,  # sign
    6: 8,  # vegetation
    16: 9,  # terrain, does not occur in the data
    1: 10,  # sky
    10: 11,  # person
    17: 12,  # rider
    8: 13,  # car
    18: 14,  # truck, does not occur in the data
    19: 15,  # bus
    20: 16,  # train, does not occur in the data
    12: 17,  # motorcycle
    11: 18,  # bicycle
}
"""Raw class id → train id; 0 void, 13 parking, 14 road-work and 22 lane marking are ignored."""

ENCODING = LabelEncoding.of("SYNTHIA", "first of 16-bit RGB", TO_19_CLASSES)


def train(root: str | Place) -> Split:
    """All images of SYNTHIA-RAND-CITYSCAPES under `root`, with labels in the 19 classes of Cityscapes."""
    images = existing_folder(root, "RGB", "SYNTHIA", LAYOUT)
    labels = existing_folder(root, "GT/LABELS", "SYNTHIA", LAYOUT)
    samples = [(path.stem, path, labels / path.name) for path in matching(images, "*.png")]
    return build_split("synthia/train", samples, ENCODING, images)
