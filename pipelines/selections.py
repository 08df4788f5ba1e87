"""Selections: what a reader of a record keeps of it. No torch here: the label bank imports this, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.selection import apply_thresholds, percentile_thresholds


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
