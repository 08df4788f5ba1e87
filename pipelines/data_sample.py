"""Two folders of pictures to try things on: a rendered pair of domains, with the TOML files a user would write."""

from __future__ import annotations

from pathlib import Path

from actors.errors import RunError
from actors.storage import local
from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.classes import CITYSCAPES_19
from pipelines.datasets.miniature import write_miniature

NAMES = ("road", "sidewalk", "building", "vegetation", "sky", "person", "car", "sign", "light")
"""Nine classes, enough for a first look."""
TITLES = {"source": "game", "target": "city", "validation": "city-validation"}
MERGED = {"person": ("rider",), "car": ("truck", "bus"), "building": ("wall",), "sidewalk": ("terrain",)}
"""Classes of the pictures that count as one of the nine."""


def write_sample(folder: str | Path, size: str) -> tuple[Path, Path, Path]:
    """Render pictures and describe them.

    Args:
        folder: where; must not exist yet, or be empty.
        size: ``tiny`` or ``mini``, as the miniatures'.

    Returns:
        The TOML files of the source, of the unlabelled target, and of labelled target pictures to score on.

    Raises:
        RunError: the folder holds something, or cannot be written.
    """
    folder = local(str(folder), "the folder", "pictures are rendered into it, and it appears by rename").absolute()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} exists already and is not empty; give another folder")
        inside = write_miniature("gta2city", size, folder).relative_to(folder).as_posix()
        files = {
            "source": (f"{inside}/GTA5/images/*.png", f"{inside}/GTA5/labels/*.png"),
            "target": (f"{inside}/Cityscapes/leftImg8bit/train/*/*.png", None),
            "validation": (
                f"{inside}/Cityscapes/leftImg8bit/val/*/*_leftImg8bit.png",
                f"{inside}/Cityscapes/gtFine/val/*/*_gtFine_labelIds.png",
            ),
        }
        written = []
        for name, (images, labels) in files.items():
            path = folder / f"{name}.toml"
            path.write_text(f'name = "{TITLES[name]}"\n' + _description(images, labels), encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    source, target, validation = written
    return source, target, validation


def _description(images: str, labels: str | None) -> str:
    lines = [f'images = "{images}"']
    if labels is None:
        return lines[0] + "\n"
    ids = {name: [LABEL_IDS[name], *(LABEL_IDS[other] for other in MERGED.get(name, ()))] for name in NAMES}
    used = {raw for group in ids.values() for raw in group}
    ignored = [raw for raw in range(35) if raw not in used] + [255]
    lines += [f'labels = "{labels}"', f"ignore = {ignored}"]
    for name in NAMES:
        red, green, blue = CITYSCAPES_19.palette[CITYSCAPES_19.index(name)]
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        lines += ["", "[[classes]]", f'name = "{name}"', f"ids = {ids[name]}", f'colour = "{colour}"']
    return "\n".join(lines) + "\n"
