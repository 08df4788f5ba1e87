"""How frequent classes are, and what is made of it where source and target differ: NumPy only, no torch.

An actor that owns the statistics imports this file and must stay light. Notation (methods 7.2): π_S and π_T are the
shares of the C classes on source and target, p the network's posteriors under π_S, w = π_T / π_S. With aligned
class-conditionals the posteriors under π_T are p w / Σ p w. Arrays are float64 (C,) where nothing else is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

ROWS_AT_ONCE = 8192
"""Rows that a sum over posteriors takes at a time: they stay in the cache, and their partial sum is exact enough."""
ROW_TOLERANCE = 1e-3
"""How far from 1 a row of posteriors may sum: half precision is that coarse."""
PULL = 0.01
"""Weight of the source's shares in :func:`confusion_prior`: one hundredth of what is predicted."""


def shares(counts: npt.ArrayLike) -> F64:
    """Counts, or weights of any scale, divided by their sum.

    Raises:
        ValueError: if one is negative or no number, or all are zero.
    """
    given = _per_class("counts", counts)
    total = given.sum()
    if not (np.isfinite(total) and (given >= 0).all()):
        raise ValueError(f"the counts {given.tolist()} are no counts: give finite numbers that are not negative")
    if total == 0:
        raise ValueError(f"all {len(given)} counts are zero, so no class has a share; count something first")
    return given / total


def log_ratio(target: npt.ArrayLike, source: npt.ArrayLike) -> F64:
    """δ = ln π_T - ln π_S, the offset of inference adjustment (methods 7.4).

    Raises:
        ValueError: if the lengths differ, or a share is not positive; names the classes by their index.
    """
    target, source = _per_class("target", target), _per_class("source", source)
    _check_same_length(target=target, source=source)
    for name, prior in (("target", target), ("source", source)):
        if not (prior > 0).all():
            raise ValueError(
                f"the {name} shares of classes {_indices(~(prior > 0))} are not positive, so their logarithm is no "
                "number; give every class a share, with_floor does, or leave these classes out"
            )
    return np.log(target) - np.log(source)


def with_floor(prior: npt.ArrayLike, floor: npt.ArrayLike) -> F64:
    """The nearest prior, in relative entropy, in which every share is at least its floor.

    Shares below are raised to their floor, the others scaled so that the sum is 1, until all hold.

    Args:
        prior: shares; normalised here.
        floor: a number for all classes, or one for each.

    Raises:
        ValueError: if a floor is negative, or the floors leave no room: they sum to more than 1.
    """
    prior = shares(prior)
    floors = np.asarray(floor, np.float64)
    if floors.shape not in ((), prior.shape):
        raise ValueError(
            f"the floor has shape {floors.shape}; give one number, or one for each of {len(prior)} classes"
        )
    floors = np.broadcast_to(floors, prior.shape)
    if not (floors >= 0).all() or floors.sum() > 1.0 + 1e-9:
        raise ValueError(
            f"floors from {floors.min():g} to {floors.max():g}, which sum to {floors.sum():g}, leave no room for "
            f"{len(prior)} shares that sum to 1; give floors that are not negative and sum to at most 1"
        )
    raised = prior < floors
    while True:
        kept = prior[~raised].sum()
        if kept == 0:  # nothing above a floor is left to scale
            return shares(floors)
        scaled = np.where(raised, floors, prior * max(1.0 - floors[raised].sum(), 0.0) / kept)
        below = ~raised & (scaled < floors)
        if not below.any():
            return scaled
        raised |= below


def damped(prior: npt.ArrayLike, estimate: npt.ArrayLike, damping: float) -> F64:
    """How far a running prior follows a new estimate: damping * prior + (1 - damping) * estimate.

    Raises:
        ValueError: if the lengths differ, or the damping is not in [0, 1).
    """
    prior, estimate = _per_class("prior", prior), _per_class("estimate", estimate)
    _check_same_length(prior=prior, estimate=estimate)
    if not 0.0 <= damping < 1.0:
        raise ValueError(f"damping is {damping}; it lies in [0, 1), and 0 takes the new estimate whole")
    return damping * prior + (1.0 - damping) * estimate


def image_counts(log_means: npt.ArrayLike, thresholds: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """count_i = #{n : g_{n,i} > ρ_i}, the images in which a class is seen (methods 7.3).

    Args:
        log_means: g, float (N, C), of ``models.label_shift.log_mean_exp``.
        thresholds: ρ, the source's pixel shares as published.

    Returns:
        int64 (C,).

    Raises:
        ValueError: if the shapes do not fit.
    """
    g, rho = np.asarray(log_means, np.float64), _per_class("thresholds", thresholds)
    if g.ndim != 2 or g.shape[1] != len(rho):
        raise ValueError(
            f"log_means {g.shape} and {len(rho)} thresholds do not fit; give (images, classes) and (classes,)"
        )
    return (g > rho).sum(axis=0, dtype=np.int64)


def responsibilities(posteriors: npt.ArrayLike, target: npt.ArrayLike, source: npt.ArrayLike) -> F64:
    """Mean over the rows of p w / Σ p w: the E-step averaged, which is the EM update of the target prior.

    Saerens, Latinne & Decaestecker, Neural Computation 2002. A row to which the target gives no probability (a row of
    zeros, too) tells nothing and is left out; without any other the answer is zeros.

    Args:
        posteriors: p, float (M, C), rows that sum to 1; summed in float32 where they are float32.
        target: the present guess of π_T.
        source: π_S, under which the posteriors were learned.

    Raises:
        ValueError: if shapes do not fit, a row is no distribution, or a source share is not positive.
    """
    rows, source = _check_rows(posteriors, source)
    target = _per_class("target", target)
    _check_same_length(target=target, source=source)
    total, counted = _expected(rows, target / source, None)
    return total / max(counted, 1.0)


def em_prior(
    posteriors: npt.ArrayLike,
    source: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    iterations: int = 500,
    tolerance: float = 1e-8,
) -> F64:
    """The target prior of maximum likelihood, by expectation maximisation from π_S (Saerens et al., 2002).

    The likelihood is concave in π_T, so where this begins does not matter. It needs calibrated posteriors.

    Args:
        posteriors: p, float (M, C), rows that sum to 1; rows of zeros are left out. Without any other the answer is
            π_S. Takes 2 ms an iteration for float32 (200 000, 19).
        source: π_S.
        weights: how much every row counts, (M,), not negative; None for one each.
        iterations: at most.
        tolerance: it ends when no share changes by more.

    Raises:
        ValueError: as :func:`responsibilities`, or if the weights do not fit.
    """
    rows, source = _check_rows(posteriors, source)
    source = shares(source)
    if weights is not None:
        weights = np.asarray(weights, rows.dtype)
        if weights.shape != rows.shape[:1] or not (weights >= 0).all():
            raise ValueError(f"weights {weights.shape} for {len(rows)} rows: give one for each, none of them negative")
    target = source
    for _ in range(iterations):
        total, counted = _expected(rows, target / source, weights)
        if counted == 0:
            return source
        before, target = target, total / counted
        if np.abs(target - before).max() < tolerance:
            break
    return shares(target)


def confusion_prior(
    confusion: npt.ArrayLike,
    predicted: npt.ArrayLike,
    source: npt.ArrayLike,
    *,
    pull: float = PULL,
    start: npt.ArrayLike | None = None,
    iterations: int = 2000,
) -> F64:
    """The target prior that explains best how often each class is predicted there: black-box shift estimation.

    Lipton, Wang & Smola, ICML 2018: with p(j | y) the share of class y that the source's labels see predicted as j, the
    target predicts q_j = Σ_y π_y p(j | y), whatever its posteriors are worth. Their matrix inversion gives shares below
    zero where classes are mistaken for each other; here the mixture's likelihood Σ_j q_j ln Σ_y π_y p(j | y) is
    maximised by EM, which weighs rare classes by their own scale. As RLLS (Azizzadenesheli et al., ICLR 2019) it is
    pulled towards no shift, by pull * Σ_y π_S,y ln π_y: a class that is mistaken for others wherever it is says nothing
    of its share.

    Args:
        confusion: (C, C) on the source, row = label, column = what is predicted: counts, or sums of posteriors. A class
            without a label in it is held to be predicted like all others together.
        predicted: (C,) counts of the predictions on the target, or sums of posteriors.
        source: π_S. A class without a share gets none.
        pull: weight of the source; 0 for the plain maximum.
        start: where to begin; None at π_S.
        iterations: steps of EM.

    Raises:
        ValueError: if the shapes do not fit, a count is negative, or all are zero.
    """
    counts, q, source = np.asarray(confusion, np.float64), shares(predicted), shares(source)
    if counts.shape != (len(q), len(q)) or len(source) != len(q):
        raise ValueError(
            f"confusion {counts.shape}, {len(q)} predicted counts and {len(source)} source shares do not fit; give "
            "(C, C), (C,) and (C,)"
        )
    total = shares(counts.ravel()).reshape(counts.shape).sum(axis=0)
    seen = counts.sum(axis=1, keepdims=True)
    likelihood = np.where(seen > 0, counts / np.maximum(seen, 1e-300), total)
    prior = source if start is None else shares(start)
    for _ in range(iterations):
        explained = prior @ likelihood
        ratio = np.divide(q, explained, out=np.zeros_like(q), where=explained > 0)
        prior = (prior * (likelihood @ ratio) + pull * source) / (1.0 + pull)
    return shares(prior)


def encode_posteriors(posteriors: Array) -> U8:
    """round(255 √p), uint8 of the same shape: probabilities of 4e-6 and more survive, small ones rather precisely."""
    return np.rint(255.0 * np.sqrt(np.clip(posteriors, 0.0, 1.0))).astype(np.uint8)


def decode_posteriors(encoded: U8) -> F32:
    """The inverse of :func:`encode_posteriors`, float32, rows (the last axis) made to sum to 1; zeros stay zeros."""
    squares = np.square(encoded.astype(np.float32))
    return squares / np.maximum(squares.sum(axis=-1, keepdims=True), 1.0)


def _expected(rows: Array, ratio: F64, weights: Array | None) -> tuple[F64, float]:
    """Σ over the rows of weight * p w / Σ p w, and the weight of the rows that count."""
    # A product in the rows' own type is fast; of few rows at a time, so that rounding does not add up.
    ratio_of_rows = ratio.astype(rows.dtype)
    tiny = np.finfo(rows.dtype).tiny
    total, counted = np.zeros(len(ratio)), 0.0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[first : first + ROWS_AT_ONCE]
        evidence = chunk @ ratio_of_rows
        share: Array = (evidence > tiny).astype(rows.dtype)
        if weights is not None:
            share *= weights[first : first + ROWS_AT_ONCE]
        total += (share / np.maximum(evidence, tiny)) @ chunk
        counted += float(share.sum(dtype=np.float64))
    return ratio * total, counted


def _check_rows(posteriors: npt.ArrayLike, source: npt.ArrayLike) -> tuple[Array, F64]:
    """Posteriors as float32 or float64 (M, C) and source shares, both fit to be divided by."""
    rows, source = np.asarray(posteriors), _per_class("source", source)
    rows = rows if rows.dtype == np.float32 else rows.astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(source):
        raise ValueError(f"posteriors {rows.shape} and {len(source)} source shares do not fit; give (M, C) and (C,)")
    if not (source > 0).all():
        raise ValueError(
            f"the source shares of classes {_indices(~(source > 0))} are not positive, so nothing can be said of them; "
            "leave these classes out of the posteriors, too"
        )
    sums = rows.sum(axis=1, dtype=np.float64)
    if len(rows) and not ((rows.min() >= 0) and ((np.abs(sums - 1.0) <= ROW_TOLERANCE) | (sums == 0)).all()):
        raise ValueError(
            f"posteriors have rows that are no distributions: sums from {sums.min():g} to {sums.max():g}, least entry "
            f"{rows.min():g}; give probabilities (a softmax), not logits"
        )
    return rows, source


def _per_class(name: str, values: npt.ArrayLike) -> F64:
    given = np.asarray(values, np.float64)
    if given.ndim != 1 or not len(given):
        raise ValueError(f"{name} has shape {given.shape}; give one number for each class")
    return given


def _check_same_length(**arrays: F64) -> None:
    (one, first), (other, second) = arrays.items()
    if len(first) != len(second):
        raise ValueError(f"{one} has {len(first)} classes and {other} has {len(second)}; both must name the same")


def _indices(chosen: npt.NDArray[np.bool_]) -> str:
    return ", ".join(str(i) for i in np.flatnonzero(chosen))
