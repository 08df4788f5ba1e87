"""Selections: what a reader of a record keeps of it. No torch here: the label bank imports this, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.selection import (
    apply_thresholds,
    blended_thresholds,
    confidence_histogram,
    instance_thresholds,
    percentile_thresholds,
    stationary_thresholds,
)


@dataclass(frozen=True)
class PercentileSelection:
    """Keeps the most confident share of every class over the whole target set, and whatever is sure anyway.

    Attributes:
        keep_share: share of each class's pixels that is kept, in (0, 1].
        sure: probability above which a pixel is kept whatever its class's share.
        min_pixels: a class with fewer predicted pixels in all has no percentile worth the name: all are kept.
    """

    keep_share: float
    sure: float = 0.9
    min_pixels: int = 1

    def thresholds(self, histogram: np.ndarray) -> np.ndarray:
        """See :class:`actors.protocols.Selection`."""
        return percentile_thresholds(histogram, self.keep_share, min_pixels=self.min_pixels, cap=round(255 * self.sure))

    def apply(self, record: Mapping[str, np.ndarray], thresholds: np.ndarray) -> np.ndarray:
        """See :class:`actors.protocols.Selection`."""
        return apply_thresholds(record["label"], record["confidence"], thresholds)


@dataclass(frozen=True)
class InstanceAdaptiveSelection:
    """IAST's thresholds: of every image its own, drawn towards what has been asked of the class so far.

    Mei, Zhu, Zou & Zhang, Instance Adaptive Self-Training for Unsupervised Domain Adaptation, ECCV 2020:
    θ <- β θ + (1 - β) Ψ(x, θ), an image after the other, and x keeps the pixels that reach the new θ. There a label
    depends on the images before it. Here labels come in any order and are made again, so what comes before is the θ at
    which that recursion rests under the whole set's confidences, those of all live records (:meth:`thresholds`), and an
    image takes its one step from there when it is read (:meth:`apply`). Where images differ in kind, the paper's θ is
    a mean over images, and this one a quantile over their pixels.

    The values are the published ones, as the released code's defaults and SYNTHIA runs and a summary of the paper give
    them; the paper itself could not be looked up. θ begins at 0.9 there, as a class without a pixel does here; and that
    code takes one Ψ of each batch (two images a device), not of each image.

    Attributes:
        alpha: share that is kept of a class of which the network is entirely sure, in (0, 1].
        beta: weight of what has been asked of the class so far, in [0, 1].
        gamma: how much less is kept of a class the less sure the network is of it, 0 or more.
    """

    alpha: float = 0.2
    beta: float = 0.9
    gamma: float = 8.0

    def thresholds(self, histogram: np.ndarray) -> np.ndarray:
        """See :class:`actors.protocols.Selection`."""
        return stationary_thresholds(histogram, self.alpha, self.gamma)

    def apply(self, record: Mapping[str, np.ndarray], thresholds: np.ndarray) -> np.ndarray:
        """See :class:`actors.protocols.Selection`."""
        label, confidence = record["label"], record["confidence"]
        histogram = confidence_histogram(label, confidence, len(thresholds))
        own = instance_thresholds(histogram, thresholds, self.alpha, self.gamma)
        return apply_thresholds(label, confidence, blended_thresholds(thresholds, own, self.beta))
