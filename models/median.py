"""Class-wise median thresholds: about half of what an image shows of every class keeps its label (methods 6.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255
CAP = 0.9
"""Confidence above which a pixel keeps its label whatever the others of its class have."""


class MedianLabels(NamedTuple):
    """Labels of N images, each field but the last (N, H, W)."""

    label: Tensor
    """uint8: the winner where it is kept, 255 where it is withheld."""
    winner: Tensor
    """int64."""
    confidence: Tensor
    """float: its probability."""
    thresholds: Tensor
    """float (N, C); NaN for a class that wins nowhere."""


def median_thresholds(winner: Tensor, confidence: Tensor, num_classes: int, cap: float = CAP) -> Tensor:
    """min(median, cap) of the confidences with which each class wins, image by image.

    The median of an even count is the lower of the two in the middle. Does not wait for the device.

    Args:
        winner: int64 (N, H, W), classes 0..C-1.
        confidence: float (N, H, W).
        num_classes: C.
        cap: largest threshold.

    Returns:
        float (N, C); NaN for a class that wins nowhere in an image.
    """
    classes, sure = winner.flatten(1), confidence.flatten(1)
    order = sure.argsort(dim=1)
    classes, sure = classes.gather(1, order), sure.gather(1, order)
    order = classes.argsort(dim=1, stable=True)  # classes one after the other, each with rising confidence
    sure = sure.gather(1, order)
    counts = torch.zeros(len(winner), num_classes, dtype=torch.int64, device=winner.device)
    counts.scatter_add_(1, classes, torch.ones_like(classes))
    first = counts.cumsum(1) - counts
    middle = (first + (counts - 1).div(2, rounding_mode="floor")).clamp(0, sure.shape[1] - 1)
    found = sure.gather(1, middle).clamp(max=cap)
    return found.masked_fill(counts == 0, float("nan"))


def published_thresholds(thresholds: Tensor) -> Tensor:
    """What the published code reads in their place (Q-BI-1).

    It keeps a list to which a class that wins nowhere adds two entries, 0 and NaN, and reads entry i for class i.

    Args:
        thresholds: float (N, C), NaN for a class that wins nowhere.

    Returns:
        float (N, C). A confidence is below neither 0 nor NaN.
    """
    rows = []
    for image in thresholds.tolist():
        entries: list[float] = []
        for value in image:
            entries += [0.0, value] if value != value else [value]
        rows.append(entries[: thresholds.shape[1]])
    return torch.tensor(rows, dtype=thresholds.dtype, device=thresholds.device)


@torch.no_grad()
def median_labels(probabilities: Tensor, cap: float = CAP, *, published: bool = False) -> MedianLabels:
    """Label N images by their own medians; an image knows nothing of the others.

    Args:
        probabilities: float (N, C, H, W).
        cap: see :func:`median_thresholds`.
        published: read the thresholds as the published code does.
    """
    confidence, winner = probabilities.max(dim=1)
    thresholds = median_thresholds(winner, confidence, probabilities.shape[1], cap)
    asked = published_thresholds(thresholds) if published else thresholds
    below = confidence < asked.gather(1, winner.flatten(1)).view_as(confidence)
    label = winner.masked_fill(below, IGNORE).to(torch.uint8)
    return MedianLabels(label, winner, confidence, thresholds)
