"""The folders in which the systems of the field keep pseudo labels (methods §2.1).

A folder layout names a label's file by its image's: ``{city}`` is the folder that holds the image (a city, a sequence),
``{stem}`` its name without ending, ``{short}`` the same without Cityscapes' ``_leftImg8bit``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.errors import RunError, UnreadableImage
from actors.storage import place
from pipelines import pictures
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.datasets.dataset import BROKEN_FILE, image_size
from pipelines.label_rules import DEVIATION, DEVIATION_STEPS, MIN_PROB, NEGATIVE

FolderLayout = Literal["mrnet", "eplc", "eplc-min", "proda", "proda-soft", "fada", "bisenet"]
FileLayout = Literal["parquet", FolderLayout]

VOTES = 4
"""The published EPLC generator stores sums over four views (Q-EP-4); we store means and read both."""


@dataclass(frozen=True)
class Ids:
    """How a layout numbers the classes.

    Attributes:
        train_ids: those of the benchmark's classes that it numbers.
        numbers: the number of each.
        withheld: the number of a withheld pixel.
    """

    train_ids: tuple[int, ...]
    numbers: tuple[int, ...]
    withheld: int = IGNORE

    def written(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Train ids (255 = withheld) as the layout's numbers; a class that it does not know is withheld."""
        table = np.full(256, self.withheld, np.uint8)
        table[list(self.train_ids)] = self.numbers
        return table[label]

    def read(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The layout's numbers as train ids; whatever is no class is withheld."""
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.numbers)] = self.train_ids
        return table[numbers]

    def written_bits(self, planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A bit a train id, uint8 (P, H, W) with the lowest bit first, as a bit a number; 0 where there is no class."""
        bits = np.unpackbits(planes, axis=0, bitorder="little")
        found = np.zeros((max(self.numbers) + 1, *planes.shape[1:]), np.uint8)
        found[list(self.numbers)] = bits[list(self.train_ids)]
        return np.packbits(found, axis=0, bitorder="little")


@dataclass(frozen=True)
class Layout:
    """A folder of label files, and of what goes with them.

    Attributes:
        what: one line for people.
        label: the label's file below the folder; a PNG, or for soft labels an array.
        colour: a PNG in the classes' colours.
        heat: a PNG of the confidence as a heat map.
        probability: an NPZ of float32 (H, W) in [0, 1]: ``prob`` (the winner's mean over passes), and where there were
            several passes ``min_prob`` (the highest of the classes' lowest) and ``std`` (of the winner); then also
            ``neg``, uint8 (⌈C/8⌉, H, W), a bit a number that the pixel surely is not, the lowest bit first.
        confidence: a NumPy array, float16 (H, W) in [0, 1].
        contiguous: whether numbers count the classes of the benchmark's first protocol, instead of being the train ids
            of its datasets.
        withheld: the number of a withheld pixel.
        palette: whether the PNG has a palette.
        at_image_size: whether labels are enlarged (nearest) to their images' size.
        soft: whether ``label`` is a float32 C×h×w array of probabilities, h and w a quarter of the label's and 1 more.
    """

    what: str
    label: str
    colour: str | None = None
    heat: str | None = None
    probability: str | None = None
    confidence: str | None = None
    contiguous: bool = False
    withheld: int = IGNORE
    palette: bool = False
    at_image_size: bool = True
    soft: bool = False

    def ids(self, num_classes: int, protocol: Sequence[int], kept: Sequence[int] | None = None) -> Ids:
        """Its numbers for a benchmark.

        Args:
            num_classes: of the benchmark.
            protocol: the benchmark's first.
            kept: the datasets' train id of each class, where the benchmark has fewer than they do; None where they are
                the same.

        Raises:
            RunError: there are more classes than it has numbers.
        """
        train_ids = tuple(protocol) if self.contiguous else tuple(range(num_classes))
        if len(train_ids) > self.withheld:
            raise RunError(f"this layout numbers {self.withheld} classes, and there are {len(train_ids)}; use parquet")
        numbers = tuple(range(len(train_ids))) if self.contiguous or kept is None else tuple(kept)
        return Ids(train_ids, numbers, self.withheld)

    def path(self, folder: Path, image_path: str, template: str | None = None) -> Path:
        """Where the label of an image lies, or another of its files."""
        image = place(image_path)
        short = image.stem.removesuffix("_leftImg8bit")
        return folder / (template or self.label).format(city=image.parent.name, stem=image.stem, short=short)

    def clash(self, image_paths: Sequence[str]) -> tuple[str, str] | None:
        """Two images whose labels would be one file, or None."""
        seen: dict[Path, str] = {}
        for image_path in image_paths:
            other = seen.setdefault(self.path(Path(), image_path), image_path)
            if other != image_path:
                return other, image_path
        return None

    def write(
        self,
        folder: Path,
        image_path: str,
        label: NDArray[np.uint8],
        confidence: NDArray[np.uint8],
        ids: Ids,
        classes: ClassSet,
        more: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> None:
        """Write one label and what goes with it; not for soft layouts.

        Args:
            folder: where the layout begins.
            image_path: of its image.
            label: uint8 (H, W) train ids, 255 = withheld.
            confidence: uint8 (H, W) in steps of 1/255.
            ids: see :meth:`ids`.
            classes: for the colours.
            more: what else a record of :class:`pipelines.label_rules.MonteCarloRule` holds.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        size = image_size(image_path) if self.at_image_size else None
        if size is not None:
            label, confidence = pictures.shrunk(label, size), pictures.shrunk(confidence, size)
        numbers = Image.fromarray(ids.written(label))
        if self.palette:
            colours = np.zeros((256, 3), np.uint8)  # with fewer, Pillow stores fewer bits a pixel
            colours[list(ids.numbers)] = [classes.palette[train_id] for train_id in ids.train_ids]
            numbers.putpalette(colours.reshape(-1).tolist())
        pictures.save(numbers, self.path(folder, image_path))
        if self.colour is not None:
            pictures.save(Image.fromarray(classes.colourise(label)), self.path(folder, image_path, self.colour))
        share = confidence.astype(np.float32) / np.float32(255)
        if self.heat is not None:
            pictures.save(Image.fromarray(pictures.heat(share)), self.path(folder, image_path, self.heat))
        if self.probability is not None:
            arrays = {"prob": share, **_statistics(more or {}, size, ids)}
            np.savez_compressed(self.path(folder, image_path, self.probability), **arrays)
        if self.confidence is not None:
            np.save(self.path(folder, image_path, self.confidence), share.astype(np.float16))

    def write_soft(self, folder: Path, image_path: str, probabilities: NDArray[np.float32], ids: Ids) -> None:
        """Write one soft label, float32 C×h×w over all classes; those that the layout does not number are left out.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        kept = probabilities[list(ids.train_ids)]
        path = self.path(folder, image_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (kept / kept.sum(0, keepdims=True).clip(1e-12)).astype(np.float32))

    def read(
        self, folder: Path, image_path: str, ids: Ids
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None] | None:
        """Label, uint8 (H, W) train ids, and confidence in steps of 1/255 where the layout has it; None without a file.

        Raises:
            UnreadableImage: a file is broken, or holds something else than this layout does.
        """
        path = self.path(folder, image_path)
        if not path.is_file():
            return None
        try:
            if self.soft:
                return _read_soft(path, ids)
            with Image.open(path) as image:
                if image.mode not in ("L", "P"):
                    raise ValueError(f"labels are gray or palette images, this one has mode {image.mode}")
                label = ids.read(np.asarray(image))
            return label, self._read_confidence(folder, image_path, label)
        except BROKEN_FILE as error:
            raise UnreadableImage(str(path), str(error)) from error

    def _read_confidence(self, folder: Path, image_path: str, label: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        template = self.probability or self.confidence
        path = None if template is None else self.path(folder, image_path, template)
        if path is None or not path.is_file():
            return None
        share = _loaded(path, "prob" if self.probability else None)
        if share.shape != label.shape:
            raise ValueError(f"its confidence {path.name} is {share.shape}, the label {label.shape}")
        if self.probability is not None and share.max(initial=0) > 1:
            share = share / np.float32(VOTES)
        return _in_steps(share)


def _statistics(record: Mapping[str, NDArray[np.uint8]], size: tuple[int, int] | None, ids: Ids) -> dict[str, Any]:
    """What an NPZ holds beside ``prob``, at (width, height)."""

    def sized(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return plane if size is None else pictures.shrunk(plane, size)

    found: dict[str, Any] = {}
    for name, column, steps in (("min_prob", MIN_PROB, 255), ("std", DEVIATION, DEVIATION_STEPS)):
        if column in record:
            found[name] = sized(record[column]).astype(np.float32) / np.float32(steps)
    if NEGATIVE in record:
        found["neg"] = np.stack([sized(plane) for plane in ids.written_bits(record[NEGATIVE])])
    return found


def _loaded(path: Path, name: str | None = None) -> NDArray[np.float32]:
    """An array from an NPY file, or one of an NPZ file, as float32.

    Raises:
        ValueError: it is broken. A damaged header makes NumPy raise almost anything.
    """
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            return np.asarray(found if name is None else found[name], np.float32)
    except Exception as error:
        raise ValueError(f"{path.name}: {type(error).__name__}: {error}") from error


def _read_soft(path: Path, ids: Ids) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    probabilities = _loaded(path)
    if probabilities.ndim != 3 or len(probabilities) != len(ids.train_ids) or not probabilities.size:
        raise ValueError(f"soft labels are {len(ids.train_ids)}×h×w, this one is {probabilities.shape}")
    return ids.read(probabilities.argmax(0).astype(np.uint8)), _in_steps(probabilities.max(0))


def _in_steps(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.rint(np.nan_to_num(share).clip(0, 1) * 255).astype(np.uint8)


LAYOUTS: dict[FolderLayout, Layout] = {
    "mrnet": Layout(
        "MRNet: train ids in a folder a city; --out is the folder that it reads as pseudo_FULL/train",
        "{city}/{stem}.png",
        colour="{city}/{stem}_color.png",
        heat="{city}/{stem}_heatmap.png",
    ),
    "eplc": Layout("EPLC: mean labels, prob, min_prob, std, neg", "{city}/{stem}.png", probability="{city}/{stem}.npz"),
    "eplc-min": Layout(
        "EPLC: min or std labels, prob, min_prob, std, neg", "{city}/{stem}_2.png", probability="{city}/{stem}.npz"
    ),
    "proda": Layout(
        "ProDA, hard: contiguous ids, 250 = withheld",
        "{stem}.png",
        colour="{stem}_color.png",
        confidence="{stem}_conf.npy",
        contiguous=True,
        withheld=250,
    ),
    "proda-soft": Layout("ProDA, soft: probabilities", "{stem}.npy", contiguous=True, soft=True),
    "fada": Layout("FADA: contiguous ids in palette images", "{stem}.png", contiguous=True, palette=True),
    "bisenet": Layout(
        "BiSeNet: labels/ and labels_rgb/, at the size at which labels are made",
        "labels/{short}.png",
        colour="labels_rgb/{short}.png",
        at_image_size=False,
    ),
}
