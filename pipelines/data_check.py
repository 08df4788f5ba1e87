"""Look at every file of a benchmark before a run does: counts, sizes, class shares, and whatever is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.errors import RunError, UnreadableImage
from pipelines import pictures
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.datasets.dataset import LabelEncoding, Size, Split, read_image
from pipelines.options import DataOptions
from pipelines.setup import choose_pair

OVERLAYS = 4
OVERLAY_SIDE = 480
"""Longer side of an overlay, in pixels."""
IN_FLIGHT = 64


@dataclass(frozen=True)
class Seen:
    """What one image and its label hold."""

    size: Size | None
    pixels: NDArray[np.int64] | None
    """Pixels of every train id, 256; None without a label that can be read."""
    unmapped: dict[int, int]
    """Raw ids that nothing is said about, and their pixels."""
    problem: str | None


@dataclass
class DomainReport:
    """What was found in one split."""

    name: str
    labelled: int
    """Images that have a label."""
    colours: bool = False
    """Whether raw ids are colours."""
    images: int = 0
    sizes: Counter[Size] = field(default_factory=Counter)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """Pixels of every train id over all labels."""
    present: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """Labels that hold a train id at all."""
    unmapped: Counter[int] = field(default_factory=Counter)
    """Files that hold a raw id that nothing is said about."""
    examples: dict[int, str] = field(default_factory=dict)
    """The first file that holds it."""
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, seen: Seen) -> None:
        """Count one image."""
        self.images += 1
        if seen.size is not None:
            self.sizes[seen.size] += 1
        if seen.pixels is not None:
            self.pixels += seen.pixels
            self.present += seen.pixels > 0
        for raw in seen.unmapped:
            self.unmapped[raw] += 1
            self.examples.setdefault(raw, path)
        if seen.problem is not None:
            self.problems.append(seen.problem)

    def shares(self, classes: int) -> NDArray[np.float64]:
        """Share of every class among the labelled pixels, float64 C; zeros without any."""
        counted = self.pixels[:classes]
        return counted / max(1, counted.sum())

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that are ignored."""
        return float(self.pixels[IGNORE] / max(1, self.pixels.sum()))


@dataclass(frozen=True)
class Report:
    """What was found."""

    classes: ClassSet
    domains: tuple[DomainReport, ...]
    overlays: tuple[Path, ...]

    @property
    def mistakes(self) -> list[str]:
        """One sentence for everything that a run would stumble over or learn wrongly."""
        said = []
        for domain in self.domains:
            said += domain.problems
            for raw, files in sorted(domain.unmapped.items()):
                shown = f"colour #{raw:06x}" if domain.colours else f"id {raw}"
                said.append(
                    f"{domain.name}: {shown} occurs in {files} label files and belongs to no class, first in "
                    f"{domain.examples[raw]}; add it to a class or to ignore"
                )
        return said


def check(options: DataOptions, out: Path, progress: Callable[[str, int, int], None]) -> Report:
    """Read every image and label of a benchmark once.

    Args:
        options: which data.
        out: folder for four overlays.
        progress: told (domain, files done, files in all).

    Raises:
        DataError: the data are not laid out as expected, so that there is nothing to read.
        RunError: the overlays cannot be written.
    """
    pair, open_data = choose_pair(options)
    domains = open_data()
    scored = domains.validation
    apart = scored is not None and not set(scored.image_paths) <= set(domains.target.image_paths)
    known = [domains.target_labelled, None if apart else scored]
    splits: dict[str, tuple[Split, list[Split]]] = {
        "source": (domains.source, [domains.source]),
        "target": (domains.target, [split for split in known if split is not None]),
    }
    if scored is not None and apart:
        splits["validation"] = (scored, [scored])
    reports = tuple(_check_split(name, *split, progress) for name, split in splits.items())
    with_labels = [labelled for _, several in splits.values() for labelled in several]
    try:
        overlays = tuple(_write_overlays(with_labels, pair.classes, out))
    except OSError as error:
        raise RunError(f"the overlays cannot be written to {out}: {error.strerror or error}") from error
    return Report(pair.classes, reports, overlays)


def look(image_path: str, label_path: str | None, encoding: LabelEncoding | None) -> Seen:
    """Decode one image and its label."""
    try:
        image = read_image(image_path)
    except UnreadableImage as error:
        return Seen(None, None, {}, str(error))
    size = image.shape[1], image.shape[0]
    if label_path is None or encoding is None:
        return Seen(size, None, {}, None)
    try:
        raw = encoding.raw(label_path)
    except UnreadableImage as error:
        return Seen(size, None, {}, str(error))
    unmapped: dict[int, int] = {}
    if encoding.complete:
        ids, counts = np.unique(raw, return_counts=True)
        unknown = ~np.isin(ids, encoding.raw_ids)
        unmapped = dict(zip(ids[unknown].tolist(), counts[unknown].tolist(), strict=True))
    problem = None
    if raw.shape != image.shape[:2]:
        problem = (
            f"{label_path} is {raw.shape[1]}×{raw.shape[0]} and its image {image_path} {size[0]}×{size[1]}; "
            "both need the same size"
        )
    pixels = np.bincount(encoding.meaning_of(raw).reshape(-1), minlength=256)
    return Seen(size, pixels, unmapped, problem)


def _check_split(
    name: str, split: Split, labelled: list[Split], progress: Callable[[str, int, int], None]
) -> DomainReport:
    """Read all images of a split, and the labels of those that have one."""
    labels = {
        image: (label, some.label_encoding)
        for some in labelled
        for image, label in zip(some.image_paths, some.label_paths or (), strict=True)
    }
    colours = any(some.label_encoding is not None and some.label_encoding.channel == "colour" for some in labelled)
    report = DomainReport(name, len(labels), colours)
    jobs = iter([(path, *labels.get(path, (None, None))) for path in split.image_paths])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while chunk := list(islice(jobs, IN_FLIGHT)):
            seen = pool.map(lambda job: look(*job), chunk)
            for (image, label, _), found in zip(chunk, seen, strict=True):
                report.add(label or image, found)
            progress(name, report.images, len(split))
    return report


def _write_overlays(splits: list[Split], classes: ClassSet, out: Path) -> Iterator[Path]:
    """Overlays of images spread over the labelled splits, in turns."""
    for number in range(OVERLAYS):
        split = splits[number % len(splits)]
        turn, turns = number // len(splits), -(-OVERLAYS // len(splits))
        index = turn * len(split) // turns
        try:
            image, label = split.image(index), split.label(index)
        except UnreadableImage:
            continue
        if image.shape[:2] != label.shape:
            continue
        size = pictures.fitted(label.shape, OVERLAY_SIDE)
        image, label = split.image(index, size), split.label(index, size)
        both = pictures.side_by_side([image, pictures.overlay(image, label, classes)])
        shown = [train_id for train_id in np.unique(label).tolist() if train_id != IGNORE]
        path = out / f"{number}-{split.name.replace('/', '-')}.png"
        pictures.save(pictures.with_key(both, classes, shown, split.image_ids[index]), path)
        yield path
