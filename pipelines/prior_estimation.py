"""The class frequencies of a target: what an estimate begins from, and estimates with a network that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from actors.errors import RunError, UnreadableImage
from actors.labeller import label_seed
from actors.prior_estimate import Adjustment, Evidence, Method, PriorPlan, SourceSight
from actors.protocols import ImageReader
from models.networks.segmenter import Segmenter
from models.priors import shares
from models.scores import nearest
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.datasets.dataset import Split
from pipelines.label_rules import evidence_of
from pipelines.options import PriorOptions
from pipelines.priors import read_prior
from pipelines.source_statistics import class_pixels
from pipelines.streams import SplitReader
from pipelines.views import input_of

Size = tuple[int, int]
BATCH = 4
SOURCE_IMAGES = 256
"""Source images on which it is looked what a network takes for what, spread evenly."""


@dataclass(frozen=True)
class SourceImages:
    """Labelled source images as :class:`actors.prior_estimate.SourceSight`; picklable.

    Attributes:
        reader: of the images and their labels.
        size: (width, height) at which they are seen.
        ignore_bottom: share of the images' height, from below, that tells nothing: the same part of the scene is
            compared on both domains.
    """

    reader: SplitReader
    size: Size
    ignore_bottom: float = 0.0

    def __len__(self) -> int:
        return len(self.reader)

    @torch.no_grad()
    def look(self, network: nn.Module, indices: Sequence[int], temperature: float) -> np.ndarray:
        """See :class:`actors.prior_estimate.SourceSight`; on the network's own grid, the labels' nearest pixels."""
        assert isinstance(network, Segmenter)
        classes, device = network.config.num_classes, next(network.parameters()).device
        sums = torch.zeros(IGNORE + 1, classes, dtype=torch.float64)
        for index in indices:
            try:
                image, label = np.array(self.reader.read(index, self.size)), self.reader.label(index)
            except UnreadableImage:
                continue
            scores = network(input_of(torch.from_numpy(image)[None].to(device), network)).fused().float()
            grid = (scores.shape[-2], scores.shape[-1])
            kept = grid[0] - round(self.ignore_bottom * grid[0])
            probabilities = (scores / temperature).softmax(1)[0, :, :kept].flatten(1).t().double().cpu()
            classes_of = nearest(torch.from_numpy(np.array(label)), grid)[:kept].flatten().long()
            sums.index_add_(0, classes_of, probabilities)
        return sums[:classes].numpy()


@dataclass(frozen=True)
class Survey:
    """Asks a network what it sees of all images of a reader, once, plain; picklable.

    Attributes:
        reader: target images.
        size: (width, height) at which they are seen.
        seed: of the run; decides which cells are told of.
        ignore_bottom: share of the images' height, from below, that tells nothing.
        temperature: of the probabilities.
        source: labelled source images, where the estimate needs them.
    """

    reader: ImageReader
    size: Size
    seed: int
    ignore_bottom: float = 0.0
    temperature: float = 1.0
    source: SourceSight | None = None

    @torch.no_grad()
    def __call__(self, network: nn.Module, progress: Callable[[int], None] = lambda done: None) -> Evidence:
        """What it sees; images that cannot be read are left out.

        Args:
            network: is left in evaluation mode.
            progress: told how many target images are done.

        Raises:
            RunError: none can be read.
        """
        assert isinstance(network, Segmenter)
        network.eval()
        device = next(network.parameters()).device
        witness = Adjustment(np.zeros(network.config.num_classes, np.float32), True, self.temperature)
        found: list[Evidence] = []
        for first in range(0, len(self.reader), BATCH):
            indices, images = [], []
            for index in range(first, min(first + BATCH, len(self.reader))):
                try:
                    images.append(np.array(self.reader.read(index, self.size)))
                    indices.append(index)
                except UnreadableImage:
                    continue
            if images:
                inputs = input_of(torch.from_numpy(np.stack(images)).to(device), network)
                seeds = [label_seed(self.seed, self.reader.image_ids[index], 0) for index in indices]
                parts = evidence_of(witness, network(inputs).fused(), seeds, self.ignore_bottom)
                found += [part for part in parts if part is not None]
            progress(min(first + BATCH, len(self.reader)))
        if not found:
            raise RunError("none of the target images can be read, so nothing can be estimated from them")
        seen = Evidence.joined(found)
        if self.source is None:
            return seen
        looks = spread(SOURCE_IMAGES, len(self.source))
        return replace(seen, source=self.source.look(network, looks, self.temperature))


def prior_plan(
    wanted: str,
    options: PriorOptions,
    classes: ClassSet,
    source: Split,
    folder: Path | None,
    ignore_bottom: float = 0.0,
) -> PriorPlan:
    """What ``--adjust-prior`` stands for.

    Args:
        wanted: ``estimated``, a published table or a TOML file.
        options: of the run.
        classes: that the network scores.
        source: labelled images, whose classes are counted on first use where the prior is to be estimated.
        folder: where such counts are kept; None for nowhere.
        ignore_bottom: share of the labels' height, from below, that is not counted, as on the target.

    Raises:
        RunError: there is no such table or file, or it does not fit the classes.
    """
    if wanted != "estimated":
        given = read_prior(wanted, classes.names)
        return PriorPlan(given.source, given.target, temperature=options.temperature)
    of_source, presence = source_prior(source, len(classes.names), options.method, folder, ignore_bottom)
    return PriorPlan(
        tuple(of_source.tolist()),
        method=options.method,
        presence=tuple(presence.tolist()),
        damping=options.damping,
        floor=options.floor,
        temperature=options.temperature,
    )


def source_prior(
    source: Split, num_classes: int, method: Method, folder: Path | None, ignore_bottom: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Class frequencies of labelled images as an estimator compares with them, and shares of pixels, float64 C.

    Both are of the part of the images that is looked at on the target, too: a street's classes differ from row to row.

    Raises:
        RunError: none of the labels shows a class.
    """
    counted = class_pixels(source, folder, ignore_bottom=ignore_bottom)
    if not counted.presence.any():
        raise RunError(
            f"{source.name}: none of the {len(source)} labels has a pixel of any class, so there are no class "
            "frequencies to adjust; look at the labels with `data check`, or give --adjust-prior none"
        )
    pixels = _shares(counted.pixel_counts, num_classes)
    return (_shares(counted.image_counts(), num_classes) if method == "counts" else pixels), pixels


def _shares(counts: np.ndarray, num_classes: int) -> np.ndarray:
    """Shares of C classes, the last of which the labels may know nothing of."""
    return shares(np.pad(counts, (0, num_classes - len(counts))))


def spread(count: int, images: int) -> Sequence[int]:
    """Indices of at most so many of the images, spread evenly."""
    kept = min(count, images)
    return [k * images // kept for k in range(kept)]
