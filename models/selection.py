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
    _check_histogram(histogram)
    if not 0.0 < keep_share <= 1.0:
        raise ValueError(f"keep_share is {keep_share}; it lies in (0, 1]")
    if not 0 <= floor <= cap <= 255:
        raise ValueError(f"floor is {floor} and cap is {cap}; they must satisfy 0 <= floor <= cap <= 255")
    thresholds = _kept_levels(histogram, np.full(histogram.shape, keep_share))
    known = histogram.sum(axis=1) >= max(min_pixels, 1)
    return np.where(known, np.clip(thresholds, floor, cap), floor).astype(np.uint8)


def instance_thresholds(histogram: npt.NDArray[np.int64], history: npt.NDArray[Any], alpha: float, gamma: float) -> U8:
    """IAST's Ψ(x, θ): of each class of one image, the confidence down to which a share α θ^γ of its pixels is kept.

    "Hard class weight decay" (Mei, Zhu, Zou & Zhang, Instance Adaptive Self-Training, ECCV 2020): the lower a class's
    threshold θ has been, the fewer of its pixels are kept. As in the released code θ counts as one more pixel of its
    class, so a class that the image does not show keeps its θ. A rank between two pixels means the lower one here, in
    the released code (a percentile of confidences in half precision) what lies between them.

    Args:
        histogram: int64 (C, 256) of ``confidence_histogram``, of one image.
        history: θ in steps of 1/255, integer (C,), 0 to 255.
        alpha: α, share that is kept of a class of which the network has been entirely sure, in (0, 1].
        gamma: γ, 0 or more; 0 keeps the same share of every class.

    Returns:
        uint8 (C,).

    Raises:
        ValueError: if an argument is out of range or the shapes do not fit.
    """
    _check_instance_rule(histogram, alpha, gamma)
    levels = np.asarray(history)
    if levels.shape != histogram.shape[:1] or not ((levels >= 0) & (levels < LEVELS)).all():
        raise ValueError(f"the history is {levels.tolist()}; give each of {len(histogram)} classes a level of 0 to 255")
    extended = histogram.copy()
    extended[np.arange(len(levels)), levels] += 1
    shares = alpha * (levels / 255.0) ** gamma
    return _kept_levels(extended, np.broadcast_to(shares[:, None], histogram.shape)).astype(np.uint8)


def stationary_thresholds(histogram: npt.NDArray[np.int64], alpha: float, gamma: float, *, unseen: int = 230) -> U8:
    """Where IAST's θ <- β θ + (1 - β) Ψ(x, θ) comes to rest if every image is like the whole set: θ = Ψ(all, θ).

    The share of pixels at θ or more falls with θ and α θ^γ rises, so there is one such θ, whatever β and the order of
    the images: the largest level t with a share of at least α (t / 255)^γ at t or more.

    Args:
        histogram: int64 (C, 256), of all images together.
        alpha, gamma: as for :func:`instance_thresholds`.
        unseen: threshold of a class without a pixel, in steps of 1/255; 0.9, where θ begins in the released code.

    Returns:
        uint8 (C,).

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_instance_rule(histogram, alpha, gamma)
    shares = alpha * (np.arange(LEVELS) / 255.0) ** gamma
    found = _kept_levels(histogram, np.broadcast_to(shares, histogram.shape))
    return np.where(histogram.any(axis=1), found, unseen).astype(np.uint8)


def blended_thresholds(history: npt.NDArray[Any], own: npt.NDArray[Any], beta: float) -> U8:
    """β θ + (1 - β) Ψ, rounded up to the level at which a pixel reaches it.

    Args:
        history: θ, integer (C,).
        own: Ψ of an image, integer (C,).
        beta: β, in [0, 1].

    Returns:
        uint8 (C,).

    Raises:
        ValueError: if beta is out of range.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it lies in [0, 1], and 1 leaves the image out")
    blended = beta * np.asarray(history, np.float64) + (1.0 - beta) * np.asarray(own, np.float64)
    return np.ceil(blended - 1e-9).astype(np.uint8)  # 0.9 * 200 + 0.1 * 200 is a hair above 200 in floating point


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


def _kept_levels(histogram: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The largest level t of every class with a share of at least ``shares[:, t]`` of its pixels at t or more."""
    pixels = histogram.sum(axis=1, keepdims=True)
    at_least = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]
    # An integer count to reach, so that 0.1 * 30 (a hair above 3 in floating point) means three pixels.
    wanted = np.maximum(np.ceil(shares * pixels - 1e-9 * np.maximum(pixels, 1)), 1)
    return (at_least >= wanted).sum(axis=1) - 1


def _check_instance_rule(histogram: npt.NDArray[np.int64], alpha: float, gamma: float) -> None:
    _check_histogram(histogram)
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it lies in (0, 1]")
    if not gamma >= 0.0:
        raise ValueError(f"gamma is {gamma}; it is 0 or more")


def _check_histogram(histogram: npt.NDArray[np.int64]) -> None:
    if histogram.ndim != 2 or histogram.shape[1] != LEVELS:
        raise ValueError(f"the histogram has shape {histogram.shape}; it must be (classes, {LEVELS})")
