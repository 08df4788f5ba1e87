"""Cityscapes: `leftImg8bit/{train,val}/<city>/…`, `gtFine/{train,val}/<city>/…_gtFine_labelIds.png`.

The label files hold `labelIds` (0–33, and 255 for the licence plates' −1), which become 19 train ids, or 9
where Cityscapes is the source of the RobotCar benchmark.
"""

from __future__ import annotations

from actors.storage import Place, listed, matching, place
from pipelines.datasets.dataset import LabelEncoding, Split, any_file, build_split, existing_folder

LAYOUT = (
    "`leftImg8bit/{train,val}/<city>/<city>_<seq>_<frame>_leftImg8bit.png` and, where labels are used, "
    "`gtFine/{train,val}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png`"
)

LABEL_IDS: dict[str, int] = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "light": 19,
    "sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""The `labelId` of every class that is learned."""

TO_19_CLASSES: dict[int, int] = {
    7: 0,  # road
    8: 1,  # sidewalk
    11: 2,  # building
    12: 3,  # wall
    13: 4,  # fence
    17: 5,  # pole
    19: 6,  # light
    20: 7,  # sign
    21: 8,  # vegetation
    22: 9,  # terrain
    23: 10,  # sky
    24: 11,  # person
    25: 12,  # rider
    26: 13,  # car
    27: 14,  # truck
    28: 15,  # bus
    31: 16,  # train
    32: 17,  # motorcycle
    33: 18,  # bicycle
}
"""`labelId` → train id of `CITYSCAPES_19`; everything else is ignored."""

TO_9_CLASSES: dict[int, int] = {
    23: 0,
    24: 1,
    25: 1,
    32: 2,
    33: 2,
    26: 3,
    27: 3,
    28: 3,
    20: 4,
    19: 5,
    11: 6,
    8: 7,
    7: 8,
}
"""`labelId` → train id of `ROBOTCAR_9`, for Cityscapes as the source of RobotCar."""

ENCODING_19 = LabelEncoding.of("Cityscapes", "index", TO_19_CLASSES)
ENCODING_9 = LabelEncoding.of("Cityscapes", "index", TO_9_CLASSES)

_IMAGE_SUFFIX = "_leftImg8bit"


def train(root: str | Place, encoding: LabelEncoding = ENCODING_19) -> Split:
    """The training images with their labels (source, or oracle)."""
    return _open(root, "train", encoding)


def train_without_labels(root: str | Place) -> Split:
    """The training images alone; no label file needs to exist."""
    return _open(root, "train", None)


def validation(root: str | Place, encoding: LabelEncoding = ENCODING_19) -> Split:
    """The validation images with their labels, for the evaluator."""
    return _open(root, "val", encoding)


def has_train_labels(root: str | Place) -> bool:
    """Whether at least one training image has a label file."""
    return any_file([label for _, _, label in _samples(root, "train")])


def _open(root: str | Place, part: str, encoding: LabelEncoding | None) -> Split:
    if encoding is not None:
        existing_folder(root, f"gtFine/{part}", "Cityscapes", LAYOUT)
    samples = _samples(root, part)
    return build_split(f"cityscapes/{part}", samples, encoding, place(root) / "leftImg8bit" / part)


def _samples(root: str | Place, part: str) -> list[tuple[str, Place, Place]]:
    images = existing_folder(root, f"leftImg8bit/{part}", "Cityscapes", LAYOUT)
    labels, samples = listed(place(root) / "gtFine" / part), []
    for path in matching(images, f"*/*{_IMAGE_SUFFIX}.png"):
        city, stem = path.parent.name, path.stem.removesuffix(_IMAGE_SUFFIX)
        label = labels / city / f"{stem}_gtFine_labelIds.png"
        samples.append((f"{city}/{stem}", path, label))
    return samples
