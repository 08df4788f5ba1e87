"""What every reader hands out: a `Split`, a light description of images and, where there are any, labels.

A split holds strings only, so thousands of samples pickle in a moment and any worker can read any pixel. A
file that cannot be decoded raises `UnreadableImage`, always, so that a stream can skip it, count it and
name it; a layout that is not the expected one raises `DataError` before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.errors import UnreadableImage
from pipelines.datasets.classes import IGNORE
from pipelines.datasets.png16 import decode_rgb16

Size = tuple[int, int]
"""Width and height, in this order."""

Channel = Literal["index", "first of RGBA", "first of 16-bit RGB"]


class DataError(ValueError):
    """The data are not laid out as expected; says what was given, what is expected, what to change."""


@dataclass(frozen=True)
class LabelEncoding:
    """How a label file becomes train ids: where in the file the raw id stands, and what each raw id means."""

    name: str
    channel: Channel
    train_ids: tuple[int, ...]
    """`train_ids[raw]` is the train id; raw ids beyond the table are ignored, like those that map to 255."""

    @staticmethod
    def of(name: str, channel: Channel, mapping: dict[int, int]) -> LabelEncoding:
        """Build the table from a map raw id → train id; ids that are not listed are ignored."""
        return LabelEncoding(name, channel, tuple(mapping.get(raw, IGNORE) for raw in range(256)))

    def decode(self, path: str) -> NDArray[np.uint8]:
        """Read the label file at `path` as train ids, (H, W) uint8."""
        raw = _guarded(path, lambda: self._raw_ids(path))
        table = np.full(65536 if raw.dtype == np.uint16 else 256, IGNORE, np.uint8)
        table[: len(self.train_ids)] = self.train_ids
        return table[raw]

    def _raw_ids(self, path: str) -> NDArray[np.uint8] | NDArray[np.uint16]:
        if self.channel == "first of 16-bit RGB":
            return decode_rgb16(path)[:, :, 0]
        with Image.open(path) as image:
            allowed = ("P", "L") if self.channel == "index" else ("RGBA",)
            if image.mode not in allowed:
                raise ValueError(
                    f"{self.name} labels are {self.channel} images (mode {' or '.join(allowed)}), "
                    f"this one has mode {image.mode}"
                )
            pixels = np.asarray(image)
        return pixels if self.channel == "index" else np.ascontiguousarray(pixels[:, :, 0])


@dataclass(frozen=True)
class Split:
    """Images of one dataset in a fixed order, with labels or without. Picklable, and nothing is open."""

    name: str
    """For example `synthia/train`."""
    image_ids: tuple[str, ...]
    """Unique and stable: `<stem>`, for Cityscapes `<city>/<stem>`, for RobotCar `<sequence>/<stem>`."""
    image_paths: tuple[str, ...]
    label_paths: tuple[str, ...] | None = None
    """None where no label path exists at all: the target stream."""
    label_encoding: LabelEncoding | None = None

    def __post_init__(self) -> None:
        if len(self.image_ids) != len(self.image_paths):
            raise ValueError(f"{self.name}: {len(self.image_ids)} ids but {len(self.image_paths)} images")
        if (self.label_paths is None) != (self.label_encoding is None):
            raise ValueError(f"{self.name}: label paths and label encoding come together or not at all")
        if self.label_paths is not None and len(self.label_paths) != len(self.image_paths):
            raise ValueError(f"{self.name}: {len(self.image_paths)} images but {len(self.label_paths)} labels")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def labelled(self) -> bool:
        """Whether labels can be read from this split."""
        return self.label_paths is not None

    def image(self, index: int, size: Size | None = None) -> NDArray[np.uint8]:
        """Image `index` as (H, W, 3) uint8 RGB, resized (bicubic) to `size` = (width, height) if given."""
        return read_image(self.image_paths[index], size)

    def label(self, index: int, size: Size | None = None) -> NDArray[np.uint8]:
        """Label `index` as (H, W) uint8 train ids, 255 = ignore, resized (nearest) to `size` if given."""
        if self.label_paths is None or self.label_encoding is None:
            raise DataError(f"{self.name} has no labels: it was opened as an unlabelled split")
        return read_label(self.label_paths[index], self.label_encoding, size)

    def without_labels(self) -> Split:
        """The same images with no way to a label."""
        return replace(self, label_paths=None, label_encoding=None)

    def first(self, count: int) -> Split:
        """The first `count` samples."""
        labels = None if self.label_paths is None else self.label_paths[:count]
        return replace(
            self,
            image_ids=self.image_ids[:count],
            image_paths=self.image_paths[:count],
            label_paths=labels,
        )


def read_image(path: str, size: Size | None = None) -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3) uint8 RGB, resized (bicubic) to `size` = (width, height) if given."""

    def decode() -> NDArray[np.uint8]:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        if size is not None and rgb.size != size:
            rgb = rgb.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(rgb)

    return _guarded(path, decode)


def read_label(path: str, encoding: LabelEncoding, size: Size | None = None) -> NDArray[np.uint8]:
    """Decode a label file to (H, W) uint8 train ids, resized (nearest) to (width, height) if given."""
    label = encoding.decode(path)
    if size is not None and (label.shape[1], label.shape[0]) != size:
        label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return label


def existing_folder(root: str | Path, relative: str, dataset: str, layout: str) -> Path:
    """`root/relative` if it is a folder, else a `DataError` that shows the expected layout."""
    folder = Path(root) / relative
    if folder.is_dir():
        return folder
    state = "exists but is not a folder" if folder.exists() else "does not exist"
    raise DataError(
        f"{dataset}: {folder} {state}. A {dataset} root is expected to hold {layout}. "
        f"Give the folder that directly contains `{relative.split('/')[0]}`."
    )


def build_split(
    name: str,
    samples: Sequence[tuple[str, Path, Path | None]],
    encoding: LabelEncoding | None,
    folder: Path,
) -> Split:
    """Make a split of (id, image, label) samples; no images, or an image without its label, is refused."""
    if not samples:
        raise DataError(
            f"{name}: no images found under {folder}. Check that the download was unpacked there completely."
        )
    ids, images, labels = zip(*samples, strict=True)
    paths = tuple(str(path) for path in images)
    if encoding is None:
        return Split(name, ids, paths)
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {len(labels)} images have no label file; the first one expected is "
            f"{missing[0]}. Add the missing labels or take the images away."
        )
    return Split(name, ids, paths, tuple(str(path) for path in labels), encoding)


def any_file(paths: Sequence[Path | None]) -> bool:
    """Whether at least one of the paths is a file."""
    return any(path is not None and path.is_file() for path in paths)


def _guarded(path: str, decode: Callable[[], NDArray]) -> NDArray:
    """Run a decoder; whatever a broken file makes Pillow raise becomes `UnreadableImage`."""
    try:
        return decode()
    # Pillow answers a broken PNG with any of these, depending on which byte is wrong.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from error
