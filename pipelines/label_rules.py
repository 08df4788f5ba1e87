"""Label rules: what a teacher does with a network and target images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from actors.prior_estimate import CELLS, Adjustment, Evidence
from actors.protocols import Labelled
from actors.records import RecordLayout
from models.label_shift import adjusted_logits, log_mean_exp, sampled_posteriors
from models.losses import IGNORE
from models.median import CAP, MedianLabels, median_labels
from models.networks.backbone import grid_size
from models.networks.proda import Proda
from models.networks.segmenter import Segmenter, upsample
from models.prototypes import class_distances, class_means, prototype_weights, rectify
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
SOFT, ASSIGNMENTS, MEANS = "soft", "assignments", "means"
PUBLISHED_FEWEST, PUBLISHED_CELLS = 10, 257 * 129
"""Pixels that a class needs in an image to have a mean feature, of so many (methods §5.1)."""
MIN_PROB, DEVIATION = "min_prob", "deviation"
DEVIATION_STEPS = 510
"""Steps of 1/510 reach the largest deviation that probabilities can have, ½."""


@dataclass(frozen=True)
class MonteCarloRule:
    """Monte-Carlo dropout over test-time views (methods §4.1); the EPLC generator.

    Attributes:
        num_classes: C.
        sizes: image sizes (width, height).
        label_size: (width, height) of the label.
        mirrored: whether each size is seen mirrored, too.
        passes: dropout passes; the trunk runs once per view whatever their number. All passes of a network without
            dropout are alike, so it is asked for one.
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
    mirrored: bool = True

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

    def label(
        self,
        network: nn.Module,
        views: Sequence[Tensor],
        seeds: Sequence[int],
        adjustment: Adjustment | None = None,
    ) -> list[Labelled]:
        """See :class:`actors.protocols.LabelRule`."""
        assert isinstance(network, Segmenter)
        inputs = [network_input(view, network.config.pixels) for view in views]
        features = trunk_views(network, inputs, mirror=self.mirrored)
        masks = None
        if network.heads():
            masks = draw_masks(
                [torch.Generator().manual_seed(seed) for seed in seeds],
                views=len(features),
                passes=self.passes,
                channels=network.config.bottleneck_channels,
                rate=self.dropout,
                heads=len(network.heads()),
                device=views[0].device,
            )
        if self.keep == "all":
            rule = UncertaintyRule("mean", min_confidence=0.0)
        else:
            rule = UncertaintyRule(
                self.keep, min_confidence=self.threshold, max_std=self.max_std, published_min=self.published_min
            )
        size = self.label_size[1], self.label_size[0]
        offset = offset_of(adjustment, views[0].device)
        made = monte_carlo_labels(network, features, masks, size, rule, statistics=self.statistics, offset=offset)
        labels, winners = made.label.cpu().numpy(), made.argmax.cpu().numpy()
        confidences = made.quantised().cpu().numpy()
        first = self.label_size[1] - round(self.ignore_bottom * self.label_size[1])
        labels[:, first:], winners[:, first:] = IGNORE, IGNORE
        more: list[dict[str, np.ndarray]] = [{} for _ in labels]
        if self.negative:
            bits = negative_labels(network, features, masks, size, offset=offset).cpu().numpy()
            bits[:, :, first:] = False
            for columns, image in zip(more, bits, strict=True):
                columns[NEGATIVE] = np.packbits(image, axis=0, bitorder="little")
        if self.statistics and made.min_prob is not None and made.std is not None:
            steps = quantise(made.min_prob).cpu().numpy(), quantise(made.std * (DEVIATION_STEPS / 255)).cpu().numpy()
            for columns, min_prob, deviation in zip(more, *steps, strict=True):
                columns |= {MIN_PROB: min_prob, DEVIATION: deviation}
        # The first view is plain: the classifiers see it once more, without dropout.
        seen = evidence_of(
            adjustment, lambda: network.classify(features[0].features).fused(), seeds, self.ignore_bottom
        )
        return [
            Labelled(
                {"label": label, "confidence": confidence, **columns},
                np.bincount(label.reshape(-1), minlength=256)[: self.num_classes],
                confidence_histogram(winner, confidence, self.num_classes),
                evidence,
            )
            for label, winner, confidence, columns, evidence in zip(
                labels, winners, confidences, more, seen, strict=True
            )
        ]


def offset_of(adjustment: Adjustment | None, device: torch.device) -> Tensor | None:
    """What is added to class scores, float32 C on a device; None for nothing."""
    return None if adjustment is None else torch.from_numpy(np.array(adjustment.offset)).to(device)


@torch.no_grad()
def evidence_of(
    adjustment: Adjustment | None, scores: Tensor | Callable[[], Tensor], seeds: Sequence[int], ignore_bottom: float
) -> list[Evidence | None]:
    """What images tell of the classes' frequencies, one an image, where a teacher is asked for it.

    Args:
        adjustment: what the teacher is told.
        scores: unadjusted class scores, N×C×h×w, or what computes them if they are wanted.
        seeds: one an image; they decide which cells are told of.
        ignore_bottom: share of the image's height, from below, that tells nothing.
    """
    if adjustment is None or not adjustment.witness:
        return [None] * len(seeds)
    found = (scores if isinstance(scores, Tensor) else scores()).float()
    height = found.shape[2]
    probabilities = (found[:, :, : height - round(ignore_bottom * height)] / adjustment.temperature).softmax(1)
    log_means = log_mean_exp(probabilities).cpu().numpy().astype(np.float32)
    cells = sampled_posteriors(probabilities, CELLS, seeds).cpu().numpy()
    means = probabilities.mean((2, 3)).cpu().numpy()
    return [Evidence(log_means[n : n + 1], cells[n : n + 1], means[n : n + 1]) for n in range(len(seeds))]


def fewest_pixels(winners: Tensor) -> int:
    """Pixels that a class needs on a map (N, h, w) to have a mean feature there.

    Ten as published, also on the larger map of stage 1; on the maps of small pictures as large a share.
    """
    cells = winners.shape[-2] * winners.shape[-1]
    return max(1, round(PUBLISHED_FEWEST * min(1.0, cells / PUBLISHED_CELLS)))


@dataclass(frozen=True)
class PrototypeRule:
    """ProDA's soft labels, or labels that prototypes have already denoised (methods §5.1 and §5.2).

    Records hold probabilities in steps of 1/255 on the network's own grid.

    Attributes:
        num_classes: C.
        size: (width, height) of the image that is seen, once, not mirrored.
        label_size: (width, height) of a denoised label; a soft one has the network's own grid.
        feature_channels: K of the network's feature map.
        denoised: False records σ(z) (column :data:`SOFT`) and labels with its winner. True weighs it with the
            prototypes that came with the weights, labels with the winner of that, and records the prototypes' own
            assignments (:data:`ASSIGNMENTS`) and the mean feature of each class (:data:`MEANS`, float32 as bytes,
            zeros without), from which the prototypes go on.
        temperature: τ of the assignments.
        threshold: share of the winner below which a denoised pixel is withheld.
        ignore_bottom: share of the label's height, from below, that is always withheld and never counted.
    """

    num_classes: int
    size: Size
    label_size: Size
    feature_channels: int
    denoised: bool = False
    temperature: float = 1.0
    threshold: float = 0.0
    ignore_bottom: float = 0.0

    @property
    def layout(self) -> RecordLayout:
        """Label, confidence, and probabilities of all classes on the network's grid."""
        shape, grid = self._label_shape, (self.num_classes, *self._grid)
        columns: tuple[tuple[str, tuple[int, ...]], ...] = (("label", shape), ("confidence", shape))
        if self.denoised:
            columns += ((ASSIGNMENTS, grid), (MEANS, (self.num_classes, 4 * self.feature_channels)))
        else:
            columns += ((SOFT, grid),)
        return RecordLayout(columns, self.num_classes)

    @property
    def _grid(self) -> tuple[int, int]:
        """(height, width) of the network's own grid."""
        return grid_size(self.size[1], self.size[0])

    @property
    def _label_shape(self) -> tuple[int, int]:
        """(height, width) of the label; of a soft one it says no more than on the network's grid."""
        return (self.label_size[1], self.label_size[0]) if self.denoised else self._grid

    @property
    def view_sizes(self) -> tuple[Size, ...]:
        """See :class:`actors.protocols.LabelRule`."""
        return (self.size,)

    @torch.no_grad()
    def label(
        self,
        network: nn.Module,
        views: Sequence[Tensor],
        seeds: Sequence[int],
        adjustment: Adjustment | None = None,
    ) -> list[Labelled]:
        """See :class:`actors.protocols.LabelRule`; nothing of it is random."""
        assert isinstance(network, Proda)
        outputs = network(network_input(views[0], network.config.pixels))
        offset, size = offset_of(adjustment, views[0].device), self._label_shape
        scores = outputs.main if offset is None else adjusted_logits(outputs.main, offset)
        soft = scores.softmax(1)
        if self.denoised:
            features = upsample(outputs.feature, size)
            distances = class_distances(features, network.prototypes)
            winner, confidence = rectify(upsample(soft, size), prototype_weights(distances, self.temperature))
            near = prototype_weights(class_distances(outputs.feature, network.prototypes), self.temperature)
            plain = upsample(scores, size).argmax(1)
            means, present = class_means(features, plain, self.num_classes, fewest_pixels(plain))
            means = torch.where(present[..., None], means, torch.zeros_like(means))
            vectors = means.float().cpu().numpy().view(np.uint8)
            more = [
                {ASSIGNMENTS: near_image, MEANS: vector}
                for near_image, vector in zip(quantise(near).cpu().numpy(), vectors, strict=True)
            ]
        else:
            confidence, winner = soft.max(1)
            more = [{SOFT: image} for image in quantise(soft).cpu().numpy()]
        first = size[0] - round(self.ignore_bottom * size[0])
        winner[:, first:] = IGNORE
        withheld = (confidence < self.threshold) & self.denoised
        made = winner.masked_fill(withheld, IGNORE).to(torch.uint8).cpu().numpy()
        winners = winner.to(torch.uint8).cpu().numpy()
        return [
            Labelled(
                {"label": label, "confidence": sure, **columns},
                np.bincount(label.reshape(-1), minlength=256)[: self.num_classes],
                confidence_histogram(best, sure, self.num_classes),
                evidence,
            )
            for label, best, sure, columns, evidence in zip(
                made,
                winners,
                quantise(confidence).cpu().numpy(),
                more,
                evidence_of(adjustment, outputs.main, seeds, self.ignore_bottom),
                strict=True,
            )
        ]


@dataclass(frozen=True)
class MedianRule:
    """Class-wise median thresholds, image by image (methods §6.2).

    Attributes:
        num_classes: C.
        size: (width, height) of the image that is seen, once, not mirrored, and of the label.
        cap: confidence that is always enough.
        published: thresholds are read as the published code reads them (Q-BI-1).
        ignore_bottom: share of the label's height, from below, that is always withheld and never counted.
    """

    num_classes: int
    size: Size
    cap: float = CAP
    published: bool = False
    ignore_bottom: float = 0.0

    @property
    def layout(self) -> RecordLayout:
        """Label and quantised confidence."""
        shape = (self.size[1], self.size[0])
        return RecordLayout((("label", shape), ("confidence", shape)), self.num_classes)

    @property
    def view_sizes(self) -> tuple[Size, ...]:
        """See :class:`actors.protocols.LabelRule`."""
        return (self.size,)

    @torch.no_grad()
    def made(self, network: nn.Module, images: Tensor) -> MedianLabels:
        """Labels of images, uint8 N×H×W×3, at the rule's size, by a network in eval mode."""
        assert isinstance(network, Segmenter)
        return self._of_scores(network(network_input(images, network.config.pixels)).fused())

    def _of_scores(self, scores: Tensor) -> MedianLabels:
        """Labels of class scores N×C×h×w."""
        width, height = self.size
        first = height - round(self.ignore_bottom * height)
        probabilities = upsample(scores, (height, width)).float().softmax(1)[:, :, :first]
        found = median_labels(probabilities, self.cap, published=self.published)
        below = (0, 0, 0, height - first)
        return MedianLabels(
            functional.pad(found.label, below, value=IGNORE),
            functional.pad(found.winner, below, value=IGNORE),
            functional.pad(found.confidence, below),
            found.thresholds,
        )

    def label(
        self,
        network: nn.Module,
        views: Sequence[Tensor],
        seeds: Sequence[int],
        adjustment: Adjustment | None = None,
    ) -> list[Labelled]:
        """See :class:`actors.protocols.LabelRule`; nothing of it is random."""
        assert isinstance(network, Segmenter)
        plain = network(network_input(views[0], network.config.pixels)).fused()
        offset = offset_of(adjustment, views[0].device)
        found = self._of_scores(plain if offset is None else adjusted_logits(plain, offset))
        labels, sure = found.label.cpu().numpy(), quantise(found.confidence).cpu().numpy()
        winners = found.winner.to(torch.uint8).cpu().numpy()
        return [
            Labelled(
                {"label": label, "confidence": confidence},
                np.bincount(label.reshape(-1), minlength=256)[: self.num_classes],
                confidence_histogram(winner, confidence, self.num_classes),
                evidence,
            )
            for label, confidence, winner, evidence in zip(
                labels, sure, winners, evidence_of(adjustment, plain, seeds, self.ignore_bottom), strict=True
            )
        ]
