"""A few target images as different weights and the label rule see them: the pictures of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.errors import UnreadableImage
from actors.labeller import Networks, label_seed
from actors.prior_estimate import Adjustment
from actors.protocols import LabelPlan
from models.networks.segmenter import Segmenter
from models.scores import nearest
from models.uncertainty import mean_probabilities, quantise, trunk_views

Size = tuple[int, int]
LONGER_SIDE = 480
"""Of the pictures, in pixels, unless that is more than twice as large as the first view."""


@dataclass
class Shown:
    """One image, its maps uint8 (H, W) at the image's size."""

    image_id: str
    image: np.ndarray
    """uint8 (H, W, 3) RGB."""
    truth: np.ndarray | None
    """Train ids, 255 = ignore; None where there is no label."""
    predictions: dict[str, np.ndarray]
    """Train ids by the name of the weights."""
    confidence: np.ndarray
    """Mean probability of the last weights' class, in steps of 1/255."""
    pseudo_label: np.ndarray | None
    """What the label rule keeps with the last weights, 255 = withheld; None in a run without pseudo labels."""


class Showcase:
    """Shows evenly spread images. Plain object.

    Args:
        network: builds the network; several builders where stages have networks of their own.
        reader: target images, with ``label`` where ``labelled``.
        labelled: whether the reader has labels.
        prepare: uint8 N×H×W×3 RGB and a network → what it reads.
        views: image sizes (width, height) whose probabilities are averaged.
        mirrored: whether every view is also seen mirrored.
        plan: how pseudo labels are made, or None.
        seed: of the run.
        device: where the network runs.
        images: how many at most.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]],
        reader: Any,
        labelled: bool,
        prepare: Callable[[Tensor, nn.Module], Tensor],
        views: Sequence[Size],
        mirrored: bool,
        plan: LabelPlan | None,
        seed: int,
        device: torch.device,
        images: int = 4,
    ) -> None:
        self.networks = Networks(network, device)
        self.network = self.networks.first
        self.reader, self.labelled, self.prepare = reader, labelled, prepare
        self.views, self.mirrored, self.plan, self.seed, self.device = tuple(views), mirrored, plan, seed, device
        count = min(images, len(reader))
        # The middle of each of `count` equal parts: the first and the last image of a recording are seldom typical.
        self.indices = [(2 * i + 1) * len(reader) // (2 * count) for i in range(count)]
        width, height = self.views[0]
        factor = min(2.0, LONGER_SIDE / max(width, height))
        self.size = max(1, round(width * factor)), max(1, round(height * factor))

    def show(
        self,
        rows: Mapping[str, Mapping[str, np.ndarray]],
        thresholds: np.ndarray | None,
        target_prior: np.ndarray | None = None,
    ) -> list[Shown]:
        """Look at the images.

        Args:
            rows: weights by name; the last ones also give confidence and pseudo label.
            thresholds: uint8 C, what the bank last asked of a pseudo label; None where its rule needs none or there
                are none yet.
            target_prior: float64 C, class frequencies that the bank last adjusted labels to; None where it did not.

        Returns:
            One an image; an image that cannot be read is left out.
        """
        shown: dict[int, Shown] = {}
        for name, weights in rows.items():
            self.network = self.networks.load(weights)
            for index in self.indices:
                try:
                    self._look(index, name, shown)
                except UnreadableImage:
                    shown.pop(index, None)
        for index, item in shown.items():
            item.pseudo_label = self._pseudo_label(index, thresholds, target_prior)
        return list(shown.values())

    def _look(self, index: int, name: str, shown: dict[int, Shown]) -> None:
        if index not in shown:
            truth = _resized(self.reader.label(index), self.size) if self.labelled else None
            image = np.array(self.reader.read(index, self.size))
            empty = np.zeros(image.shape[:2], np.uint8)
            shown[index] = Shown(self.reader.image_ids[index], image, truth, {}, empty, None)
        assert isinstance(self.network, Segmenter)
        inputs = [self.prepare(self._read(index, view), self.network) for view in self.views]
        views = trunk_views(self.network, inputs, mirror=self.mirrored)
        sure, classes = mean_probabilities(self.network, views, None, self.size[::-1])[0].max(0)
        shown[index].predictions[name] = classes.to(torch.uint8).cpu().numpy()
        shown[index].confidence = quantise(sure).cpu().numpy()

    def _pseudo_label(
        self, index: int, thresholds: np.ndarray | None, target_prior: np.ndarray | None
    ) -> np.ndarray | None:
        if self.plan is None or (self.plan.selection is not None and thresholds is None):
            return None
        views = [self._read(index, size) for size in self.plan.rule.view_sizes]
        adjustment = None
        if self.plan.prior is not None and target_prior is not None:
            adjustment = Adjustment(self.plan.prior.offset(target_prior))
        seed = label_seed(self.seed, self.reader.image_ids[index], 0)
        (record,) = self.plan.rule.label(self.network, views, [seed], adjustment)
        if self.plan.selection is None or thresholds is None:
            label = record.columns[self.plan.label_column]
        else:
            label = self.plan.selection.apply(record.columns, thresholds)
        return _resized(label, self.size)

    def _read(self, index: int, size: Size) -> Tensor:
        return torch.from_numpy(np.array(self.reader.read(index, size)))[None].to(self.device)


def _resized(label: np.ndarray, size: Size) -> np.ndarray:
    """A map (H, W) at another size (width, height), nearest."""
    return nearest(torch.from_numpy(np.array(label)), size[::-1]).numpy()
