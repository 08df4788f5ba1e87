"""What every reader hands out: a `Split`, a light description of images and, where there are any, labels.

A split holds strings only, so thousands of samples pickle in a moment and any worker can read any pixel. A
file that cannot be decoded raises `UnreadableImage`, always, so that a stream can skip it, count it and
name it; a layout that is not the expected one raises `DataError` before anything is read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.errors import UnreadableImage
from actors.storage import Place, listed, place, readable
from pipelines.datasets.classes import IGNORE
from pipelines.datasets.png16 import decode_rgb16

Size = tuple[int, int]
"""Width and height, in this order."""

Channel = Literal["index", "first of RGBA", "first of 16-bit RGB", "number", "colour"]
"""Where a label file keeps a pixel's raw id: the number of an 8-bit gray or palette image; the first channel of an RGBA
or 16-bit RGB one; `number`, whatever a single-channel image of any depth holds; `colour`, RGB as 0xRRGGBB."""


BROKEN_FILE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises for a broken file, depending on which byte is wrong."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a photo upright, by the value of its EXIF orientation."""


class DataError(ValueError):
    """The data are not laid out as expected; says what was given, what is expected, what to change."""


@dataclass(frozen=True)
class LabelEncoding:
    """How a label file becomes train ids: where in the file the raw id stands, and what each raw id means."""

    name: str
    channel: Channel
    raw_ids: tuple[int, ...]
    """Every raw id that means something, ascending."""
    train_ids: tuple[int, ...]
    """What they mean, in the same order; 255 = ignore. A raw id that is not listed is ignored, too."""
    complete: bool = False
    """Whether every id that occurs should be listed. The published datasets have ids that nobody uses."""

    @staticmethod
    def of(name: str, channel: Channel, mapping: dict[int, int], *, complete: bool = False) -> LabelEncoding:
        """Build an encoding from a map raw id → train id."""
        raw_ids = tuple(sorted(mapping))
        return LabelEncoding(name, channel, raw_ids, tuple(mapping[raw] for raw in raw_ids), complete)

    def narrowed(self, kept: tuple[int, ...]) -> LabelEncoding:
        """The same files with fewer classes: train id `kept[i]` becomes `i`, every other one is ignored."""
        new_ids = {train_id: i for i, train_id in enumerate(kept)}
        # Raw ids whose class is dropped stay listed: they still mean something, and are no surprise to a check.
        return replace(self, train_ids=tuple(new_ids.get(train_id, IGNORE) for train_id in self.train_ids))

    def decode(self, path: str) -> NDArray[np.uint8]:
        """Read the label file at `path` as train ids, (H, W) uint8."""
        return self.meaning_of(self.raw(path))

    def meaning_of(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        """Raw ids, (H, W) uint8, uint16 or (colours) uint32, as train ids."""
        train_ids = np.array(self.train_ids, np.uint8)
        if raw.dtype == np.uint32:
            place = np.searchsorted(self.raw_ids, raw).clip(max=len(self.raw_ids) - 1)
            return np.where(np.array(self.raw_ids, np.uint32)[place] == raw, train_ids[place], np.uint8(IGNORE))
        table = np.full(np.iinfo(raw.dtype).max + 1, IGNORE, np.uint8)
        fits = np.array(self.raw_ids) < len(table)
        table[np.array(self.raw_ids)[fits]] = train_ids[fits]
        return table[raw]

    def raw(self, path: str) -> NDArray[Any]:
        """Read the raw ids of the label file at `path`, (H, W) uint8, uint16 or (colours) uint32."""
        return _guarded(path, lambda: self._raw_ids(path))

    def _raw_ids(self, path: str) -> NDArray[Any]:
        if self.channel == "first of 16-bit RGB":
            return decode_rgb16(readable(path))[:, :, 0]
        with Image.open(readable(path)) as image:
            if self.channel == "number":
                return _numbers(image)
            if self.channel == "colour":
                red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.uint32), 2, 0)
                return red << 16 | green << 8 | blue
            allowed = ("P", "L") if self.channel == "index" else ("RGBA",)
            if image.mode not in allowed:
                raise ValueError(
                    f"{self.name} labels are {self.channel} images (mode {' or '.join(allowed)}), "
                    f"this one has mode {image.mode}"
                )
            pixels = np.asarray(image)
        return pixels if self.channel == "index" else np.ascontiguousarray(pixels[:, :, 0])


def _numbers(image: Image.Image) -> NDArray[Any]:
    """The numbers of a single-channel image: 1, 8 or 16 bits, palette indices, or gray saved as RGB."""
    if image.mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8)
    if image.mode.startswith("I"):
        numbers = np.asarray(image)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError(f"its ids reach from {numbers.min()} to {numbers.max()}; ids from 0 to 65535 are read")
        return numbers.astype(np.uint16)
    if image.mode in ("LA", "RGB", "RGBA"):
        bands = [np.asarray(band) for band in image.split()]
        if all(np.array_equal(band, bands[0]) for band in bands[1 : 3 if len(bands) > 2 else 1]):
            return bands[0]
        raise ValueError('it is a colour image; write encoding = "colours" and give every class its colour')
    raise ValueError(f"an image of mode {image.mode} holds no class ids; save it as 8- or 16-bit gray or palette PNG")


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

    def narrowed(self, kept: tuple[int, ...]) -> Split:
        """The same files with fewer classes (see `LabelEncoding.narrowed`); itself where there are no labels."""
        if self.label_encoding is None:
            return self
        return replace(self, label_encoding=self.label_encoding.narrowed(kept))

    def first(self, count: int) -> Split:
        """The first `count` samples."""
        return self.subset(range(len(self))[:count])

    def without(self, image_paths: Iterable[str]) -> Split | None:
        """The samples but those of some images; None when none is left."""
        gone = set(image_paths)
        rest = [i for i, path in enumerate(self.image_paths) if path not in gone]
        return self.subset(rest) if rest else None

    def subset(self, indices: Sequence[int]) -> Split:
        """Some of the samples, in the given order."""
        labels = None if self.label_paths is None else tuple(self.label_paths[i] for i in indices)
        return replace(
            self,
            image_ids=tuple(self.image_ids[i] for i in indices),
            image_paths=tuple(self.image_paths[i] for i in indices),
            label_paths=labels,
        )


def read_image(path: str, size: Size | None = None) -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3) uint8 RGB, resized (bicubic) to `size` = (width, height) if given.

    A photo that its EXIF data say is turned is turned upright; the high byte of 16-bit gray is read; alpha is dropped.
    """

    def decode() -> NDArray[np.uint8]:
        with Image.open(readable(path)) as image:
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _as_rgb(image)
        rgb = rgb if turn is None else rgb.transpose(turn)
        if size is not None and rgb.size != size:
            rgb = rgb.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(rgb)

    return _guarded(path, decode)


def image_size(path: str) -> Size | None:
    """(width, height) of an image, upright, from its header alone; None where that cannot be read."""
    try:
        with Image.open(readable(path)) as image:
            return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size
    except BROKEN_FILE:
        return None


def _orientation(image: Image.Image) -> int:
    """Its EXIF orientation; 1, upright, where it says nothing or nonsense. The pixels may be good all the same."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except BROKEN_FILE:
        return 1
    return found if isinstance(found, int) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any colour mode as 8-bit RGB. Pillow itself clips 16-bit gray to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32-bit numbers) is no photo; save it as 8- or 16-bit PNG, JPEG or TIFF")
    return image.convert("RGB")


def read_label(path: str, encoding: LabelEncoding, size: Size | None = None) -> NDArray[np.uint8]:
    """Decode a label file to (H, W) uint8 train ids, resized (nearest) to (width, height) if given."""
    label = encoding.decode(path)
    if size is not None and (label.shape[1], label.shape[0]) != size:
        label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return label


def existing_folder(root: str | Place, relative: str, dataset: str, layout: str) -> Place:
    """`root/relative` if it is a folder, looked into once, else a `DataError` that shows the expected layout."""
    folder = listed(place(root) / relative)
    if folder.is_dir():
        return folder
    state = "exists but is not a folder" if folder.exists() else "does not exist"
    raise DataError(
        f"{dataset}: {folder} {state}. A {dataset} root is expected to hold {layout}. "
        f"Give the folder that directly contains `{relative.split('/')[0]}`."
    )


def build_split(
    name: str,
    samples: Sequence[tuple[str, Place, Place | None]],
    encoding: LabelEncoding | None,
    folder: Place,
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


def any_file(paths: Sequence[Place | None]) -> bool:
    """Whether at least one of the paths is a file."""
    return any(path is not None and path.is_file() for path in paths)


def _guarded(path: str, decode: Callable[[], NDArray]) -> NDArray:
    """Run a decoder; whatever a broken file makes Pillow raise becomes `UnreadableImage`."""
    try:
        return decode()
    except BROKEN_FILE as error:
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from error
