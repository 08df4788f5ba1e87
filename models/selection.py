"""Selection rules that need statistics of the whole target set: NumPy only, no torch.

An actor that owns the statistics imports this file and must stay light. Confidences are uint8: 0 is zero
and 255 is one. A pixel is kept when its confidence is *at least* the threshold of its class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE = 255
LEVELS = 256
U8 = npt.NDArray[np.uint8]


def quantise_confidence(confidence: npt.NDArray[Any]) -> U8:
    """Rounds confidences in [0, 1] to 255 steps, uint8 of the same shape; values outside are clipped."""
    return np.rint(np.clip(confidence, 0.0, 1.0) * 255.0).astype(np.uint8)


def confidence_histogram(label: npt.NDArray[Any], confidence: U8, num_classes: int) -> npt.NDArray[np.int64]:
    """Counts the pixels of every class at every confidence.

    Args:
        label: integer array of classes; anything outside 0..C-1 is left out.
        confidence: uint8 of the same shape.
        num_classes: C.

    Returns:
        int64 (C, 256). Histograms of several images add up.

    Raises:
        ValueError: if the shapes differ or the confidence is not uint8.
    """
    _check(label, confidence)
    inside = (label >= 0) & (label < num_classes)
    flat = label[inside].astype(np.int64) * LEVELS + confidence[inside]
    return np.bincount(flat, minlength=num_classes * LEVELS).reshape(num_classes, LEVELS).astype(np.int64)


def percentile_thresholds(
    histogram: npt.NDArray[np.int64],
    keep_share: float,
    *,
    min_pixels: int = 1,
    floor: int = 0,
    cap: int = 255,
) -> U8:
    """Per-class thresholds that keep the most confident share of each class.

    The threshold of a class is the largest t with at least ``keep_share`` of its pixels at confidence t or
    more, so at least that share is kept, more where pixels tie. ``keep_share=0.5, cap=230`` is the rule
    min(median, 0.9).

    Args:
        histogram: int64 (C, 256) of ``confidence_histogram``.
        keep_share: share of each class to keep, in (0, 1].
        min_pixels: a class with fewer pixels has no percentile worth the name and gets ``floor``.
        floor: no threshold is lower.
        cap: no threshold is higher, so a pixel this sure is never withheld.

    Returns:
        uint8 (C,).

    Raises:
        ValueError: if an argument is out of range.
    """
    if histogram.ndim != 2 or histogram.shape[1] != LEVELS:
        raise ValueError(f"the histogram has shape {histogram.shape}; it must be (classes, {LEVELS})")
    if not 0.0 < keep_share <= 1.0:
        raise ValueError(f"keep_share is {keep_share}; it lies in (0, 1]")
    if not 0 <= floor <= cap <= 255:
        raise ValueError(f"floor is {floor} and cap is {cap}; they must satisfy 0 <= floor <= cap <= 255")
    pixels = histogram.sum(axis=1)
    at_least = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]  # pixels with confidence t or more
    # An integer count to reach, so that 0.1 * 30 (a hair above 3 in floating point) means three pixels.
    wanted = np.maximum(np.ceil(keep_share * pixels - 1e-9 * np.maximum(pixels, 1)), 1)
    thresholds = (at_least >= wanted[:, None]).sum(axis=1) - 1
    known = pixels >= max(min_pixels, 1)
    return np.where(known, np.clip(thresholds, floor, cap), floor).astype(np.uint8)


def apply_thresholds(label: npt.NDArray[Any], confidence: U8, thresholds: U8) -> U8:
    """Withholds every pixel less confident than its class's threshold.

    Args:
        label: integer array of classes 0..C-1, other values (255) stay withheld.
        confidence: uint8 of the same shape.
        thresholds: uint8 (C,).

    Returns:
        uint8 of the same shape with 255 where withheld.

    Raises:
        ValueError: if the shapes differ or the confidence is not uint8.
    """
    _check(label, confidence)
    table = np.zeros(LEVELS, np.uint8)
    table[: len(thresholds)] = thresholds
    values = label.astype(np.uint8, copy=False)
    kept = (values < len(thresholds)) & (confidence >= table[values])
    return np.where(kept, values, np.uint8(IGNORE))


def _check(label: npt.NDArray[Any], confidence: npt.NDArray[Any]) -> None:
    if label.shape != confidence.shape:
        raise ValueError(f"label {label.shape} and confidence {confidence.shape} have different shapes")
    if confidence.dtype != np.uint8:
        raise ValueError(f"the confidence is {confidence.dtype}; quantise it to uint8 first")
