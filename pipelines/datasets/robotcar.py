"""Oxford RobotCar segmentation (the NEC-labs release), 9 classes.

`train/<sequence>/<6 digits>.png`, `val/<sequence>_<6 digits>.png` (flat), and for both `anno/<sequence>_<6
digits>.png`. Annotations are RGBA; the id is the first channel.
"""

from __future__ import annotations

from actors.storage import Place, listed, matching, place
from pipelines.datasets.dataset import LabelEncoding, Split, any_file, build_split, existing_folder

LAYOUT = (
    "`train/<sequence>/<6 digits>.png`, `val/<sequence>_<6 digits>.png` and, where labels are used, "
    "`anno/<sequence>_<6 digits>.png`"
)

TO_9_CLASSES: dict[int, int] = {
    1: 0,  # sky
    2: 1,  # person
    3: 2,  # two-wheel
    4: 3,  # automobile
    5: 4,  # sign
    6: 5,  # light
    7: 6,  # building
    10: 7,  # sidewalk
    11: 8,  # road, and the markings and surfaces that count as road
    12: 8,
    13: 8,
    14: 8,
    17: 8,
}
"""Raw id → train id of `ROBOTCAR_9`; everything else is ignored."""

ENCODING = LabelEncoding.of("RobotCar", "first of RGBA", TO_9_CLASSES)


def train(root: str | Place) -> Split:
    """The training images with their labels (oracle only)."""
    return _open(root, _train_samples(root), "robotcar/train", ENCODING)


def train_without_labels(root: str | Place) -> Split:
    """The training images alone; no label file needs to exist."""
    return _open(root, _train_samples(root), "robotcar/train", None)


def validation(root: str | Place) -> Split:
    """The validation images with their labels, for the evaluator."""
    images = existing_folder(root, "val", "RobotCar", LAYOUT)
    labels, samples = listed(place(root) / "anno"), []
    for path in matching(images, "*.png"):
        sequence, _, frame = path.stem.rpartition("_")
        samples.append((f"{sequence}/{frame}", path, labels / path.name))
    return _open(root, samples, "robotcar/val", ENCODING)


def has_train_labels(root: str | Place) -> bool:
    """Whether at least one training image has an annotation."""
    return any_file([label for _, _, label in _train_samples(root)])


def _train_samples(root: str | Place) -> list[tuple[str, Place, Place]]:
    images = existing_folder(root, "train", "RobotCar", LAYOUT)
    labels = listed(place(root) / "anno")
    return [
        (f"{path.parent.name}/{path.stem}", path, labels / f"{path.parent.name}_{path.name}")
        for path in matching(images, "*/*.png")
    ]


def _open(
    root: str | Place, samples: list[tuple[str, Place, Place]], name: str, encoding: LabelEncoding | None
) -> Split:
    if encoding is not None:
        existing_folder(root, "anno", "RobotCar", LAYOUT)
    return build_split(name, samples, encoding, place(root) / name.split("/")[1])
