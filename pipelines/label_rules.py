"""Label rules: what a teacher does with a network and target images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.protocols import Labelled
from actors.records import RecordLayout
from models.losses import IGNORE
from models.networks.deeplab import DeepLab
from models.selection import confidence_histogram
from models.uncertainty import (
    UncertaintyRule,
    draw_masks,
    monte_carlo_labels,
    negative_labels,
    quantise,
    trunk_views,
)
from pipelines.views import network_input

Size = tuple[int, int]
NEGATIVE = "negative"
MIN_PROB, DEVIATION = "min_prob", "deviation"
DEVIATION_STEPS = 510
"""Steps of 1/510 reach the largest deviation that probabilities can have, ½."""


@dataclass(frozen=True)
class MonteCarloRule:
    """Monte-Carlo dropout over test-time views (methods §4.1); the EPLC generator.

    Attributes:
        num_classes: C.
        sizes: image sizes (width, height); each is seen plain and mirrored.
        label_size: (width, height) of the label.
        passes: dropout passes; the trunk runs once per view whatever their number.
        dropout: channel dropout rate of the passes.
        keep: ``mean``, ``min`` and ``std`` withhold pixels here, at the teacher. ``all`` keeps the winner everywhere
            and leaves the choice to a :class:`PercentileSelection` at reading.
        threshold, max_std: of the three fixed rules.
        ignore_bottom: share of the label's height, from below, that is always withheld and never counted.
        published_min: ``min`` stores the class whose lowest pass is highest, and not the one that it tests (Q-EP-3).
        negative: also records which classes a pixel surely is not, a bit a class (column :data:`NEGATIVE`).
        statistics: also records the highest of the classes' lowest passes in steps of 1/255 (:data:`MIN_PROB`) and the
            winner's deviation over the passes in steps of 1/510 (:data:`DEVIATION`).
    """

    num_classes: int
    sizes: tuple[Size, ...]
    label_size: Size
    passes: int
    dropout: float
    keep: Literal["all", "mean", "min", "std"]
    threshold: float
    max_std: float
    ignore_bottom: float = 0.0
    published_min: bool = False
    negative: bool = False
    statistics: bool = False

    @property
    def layout(self) -> RecordLayout:
        """Label and quantised confidence, and where asked the negative classes."""
        shape = (self.label_size[1], self.label_size[0])
        columns: tuple[tuple[str, tuple[int, ...]], ...] = (("label", shape), ("confidence", shape))
        if self.negative:
            columns += ((NEGATIVE, (-(-self.num_classes // 8), *shape)),)
        if self.statistics:
            columns += ((MIN_PROB, shape), (DEVIATION, shape))
        return RecordLayout(columns, self.num_classes)

    @property
    def view_sizes(self) -> tuple[Size, ...]:
        """See :class:`actors.protocols.LabelRule`."""
        return self.sizes

    def label(self, network: nn.Module, views: Sequence[Tensor], seeds: Sequence[int]) -> list[Labelled]:
        """See :class:`actors.protocols.LabelRule`."""
        assert isinstance(network, DeepLab)
        features = trunk_views(network, [network_input(view) for view in views])
        masks = draw_masks(
            [torch.Generator().manual_seed(seed) for seed in seeds],
            views=len(features),
            passes=self.passes,
            channels=network.config.bottleneck_channels,
            rate=self.dropout,
            device=views[0].device,
        )
        if self.keep == "all":
            rule = UncertaintyRule("mean", min_confidence=0.0)
        else:
            rule = UncertaintyRule(
                self.keep, min_confidence=self.threshold, max_std=self.max_std, published_min=self.published_min
            )
        size = self.label_size[1], self.label_size[0]
        made = monte_carlo_labels(network, features, masks, size, rule, statistics=self.statistics)
        labels, winners = made.label.cpu().numpy(), made.argmax.cpu().numpy()
        confidences = made.quantised().cpu().numpy()
        first = self.label_size[1] - round(self.ignore_bottom * self.label_size[1])
        labels[:, first:], winners[:, first:] = IGNORE, IGNORE
        more: list[dict[str, np.ndarray]] = [{} for _ in labels]
        if self.negative:
            bits = negative_labels(network, features, masks, size).cpu().numpy()
            bits[:, :, first:] = False
            for columns, image in zip(more, bits, strict=True):
                columns[NEGATIVE] = np.packbits(image, axis=0, bitorder="little")
        if self.statistics and made.min_prob is not None and made.std is not None:
            steps = quantise(made.min_prob).cpu().numpy(), quantise(made.std * (DEVIATION_STEPS / 255)).cpu().numpy()
            for columns, min_prob, deviation in zip(more, *steps, strict=True):
                columns |= {MIN_PROB: min_prob, DEVIATION: deviation}
        return [
            Labelled(
                {"label": label, "confidence": confidence, **columns},
                np.bincount(label.reshape(-1), minlength=256)[: self.num_classes],
                confidence_histogram(winner, confidence, self.num_classes),
            )
            for label, winner, confidence, columns in zip(labels, winners, confidences, more, strict=True)
        ]
