"""How often each class occurs in the labels of a split: pixels of every class in every image, counted once.

Label shift needs class shares of the source (methods §7.3), class-aware sampling which images hold a class (methods
§7.1). Counts are made from the label files at their own size and kept in a small file, named by a hash of everything
that decides them, so nothing is ever stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.errors import UnreadableImage
from actors.storage import status_of
from pipelines.datasets.classes import IGNORE
from pipelines.datasets.dataset import BROKEN_FILE, DataError, LabelEncoding, Split, read_label

STATISTICS_VERSION = 1
IN_FLIGHT = 64
DAMAGED = (*BROKEN_FILE, RuntimeError, zipfile.BadZipFile)
"""What NumPy raises for a damaged file, depending on which byte is wrong."""

_Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ClassPixels:
    """Labelled pixels of every class in every image of a split.

    Attributes:
        pixels: int64 images × C, in the order of the split; zeros where a label cannot be read.
        skipped: the label files that cannot be read.
    """

    pixels: _Counts
    skipped: tuple[str, ...] = ()

    @property
    def presence(self) -> NDArray[np.bool_]:
        """Which classes an image shows at all, bool images × C."""
        return self.pixels > 0

    @property
    def pixel_counts(self) -> _Counts:
        """Pixels of every class over all images, int64 C."""
        return self.pixels.sum(0)

    def image_counts(self, least_share: float = 0.001) -> _Counts:
        """Images of every class, int64 C: those of whose labelled pixels it covers at least a share.

        How the published counts of the sources were made is unknown; about 0.1 % fits them (methods §7.3).

        Args:
            least_share: from 0 (which counts every image that shows the class) to 1.
        """
        labelled = self.pixels.sum(1, keepdims=True)
        return (self.presence & (self.pixels >= least_share * labelled)).sum(0)


def class_pixels(
    split: Split,
    folder: Path | None,
    progress: Callable[[int, int], None] = lambda done, files: None,
    ignore_bottom: float = 0.0,
) -> ClassPixels:
    """Count the labels of a split, or read what was counted before; what could not be read is tried again.

    Args:
        split: labelled. C is one more than the highest train id of its encoding.
        folder: where counts are kept, in ``statistics/``; None keeps nothing.
        progress: told (label files read, files to read).
        ignore_bottom: share of the labels' height, from below, that is not counted.

    Raises:
        DataError: the split has no labels.
    """
    if split.label_paths is None or split.label_encoding is None:
        raise DataError(f"{split.name} has no labels to count; count those of a labelled split")
    paths, encoding = split.label_paths, split.label_encoding
    classes = 1 + max(train_id for train_id in encoding.train_ids if train_id != IGNORE)
    entry = None if folder is None else Path(folder) / "statistics" / f"{_key(paths, encoding, ignore_bottom)}.npz"
    pixels, missing = _kept(entry, (len(paths), classes))
    if not missing:
        return ClassPixels(pixels)
    todo, unread = iter(missing), []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done = 0
        while chunk := list(islice(todo, IN_FLIGHT)):
            counted = pool.map(lambda index: _count(paths[index], encoding, classes, ignore_bottom), chunk)
            for index, found in zip(chunk, counted, strict=True):
                if found is None:
                    unread.append(index)
                else:
                    pixels[index] = found
            done += len(chunk)
            progress(done, len(missing))
    if entry is not None and len(unread) < len(missing):
        _keep(entry, pixels, unread)
    return ClassPixels(pixels, tuple(paths[index] for index in unread))


def _count(path: str, encoding: LabelEncoding, classes: int, ignore_bottom: float) -> _Counts | None:
    """Pixels of every class in one label file; None if it cannot be read."""
    try:
        label = read_label(path, encoding)
    except UnreadableImage:
        return None
    seen = label[: len(label) - round(ignore_bottom * len(label))]
    return np.bincount(seen.reshape(-1), minlength=classes)[:classes]


def _key(paths: Sequence[str], encoding: LabelEncoding, ignore_bottom: float) -> str:
    """A name for the counts of these files with these train ids."""
    digest = hashlib.sha256(repr((STATISTICS_VERSION, encoding, ignore_bottom)).encode())
    for path in paths:
        try:
            status = status_of(path)
            state = f"{status.st_size}|{status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(b"\0" + os.fsencode(path) + b"\0" + state.encode())
    return digest.hexdigest()[:24]


def _kept(entry: Path | None, shape: tuple[int, int]) -> tuple[_Counts, list[int]]:
    """What was counted before, and which images are still to be counted: all where nothing useful is kept."""
    if entry is not None:
        with contextlib.suppress(*DAMAGED):
            with np.load(entry, allow_pickle=False) as kept:
                pixels, missing = kept["pixels"], kept["missing"]
            if pixels.shape == shape and pixels.dtype == missing.dtype == np.int64:
                return pixels, missing.tolist()
    return np.zeros(shape, np.int64), list(range(shape[0]))


def _keep(entry: Path, pixels: _Counts, missing: Sequence[int]) -> None:
    partial = entry.with_suffix(f".{os.getpid()}.partial")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez_compressed(file, pixels=pixels, missing=np.array(missing, np.int64))
        partial.rename(entry)
    except OSError:  # a full or read-only disk costs speed, not the run
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
