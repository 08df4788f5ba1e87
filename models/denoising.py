"""Loss terms of ProDA: learning from noisy labels, from assignments to prototypes and from a teacher's logits.

Notation (methods 5): z are logits already at label size, p = softmax(z) over C classes, Ω are the labelled pixels,
ignored ones carry 255. A term without a single pixel to learn from is exactly zero and its gradients are zero and
finite. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import IGNORE, check_same_pixels, segmentation_loss

Regulariser = Literal["mrkld", "mrent"]
REGULARISERS: tuple[Regulariser, ...] = get_args(Regulariser)
P_FLOOR = 1e-7
LABEL_FLOOR = 1e-4
"""What a one-hot label's zeros count as: −log of it, 9.2103, is the price of all probability put elsewhere."""


def reverse_cross_entropy(logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> Tensor:
    """L_rce = −Σ_Ω Σ_k clamp(p_k, 1e-7, 1) log clamp(onehot_k(ŷ), 1e-4, 1) / (|Ω| + 1e-6) (methods 5.2, step 6).

    Args:
        logits: float (N, C, H, W).
        labels: integer (N, H, W), 255 ignored.
        pixel_weights: optional float, broadcastable to (N, H, W), that multiplies a pixel's term.

    Returns:
        A scalar, exactly zero if nothing is labelled.

    Raises:
        ValueError: if logits and labels have different grids.
    """
    check_same_pixels(logits, labels)
    valid = labels != IGNORE
    p = logits.softmax(dim=1).clamp(P_FLOOR, 1.0)
    # log 1 = 0 at the label's class, log 1e-4 at every other: what counts is the probability put elsewhere.
    elsewhere = p.scatter(1, labels.long().masked_fill(~valid, 0)[:, None], 0.0).sum(dim=1)
    losses = -math.log(LABEL_FLOOR) * elsewhere * valid
    if pixel_weights is not None:
        losses = losses * pixel_weights
    return losses.sum() / (valid.sum() + 1e-6)


class SymmetricTerms(NamedTuple):
    """The two scalars of the symmetric cross-entropy, weighted; their sum is the loss."""

    ce: Tensor
    rce: Tensor


def symmetric_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    pixel_weights: Tensor | None = None,
) -> SymmetricTerms:
    """L_t = α · mean over Ω of CE(z, ŷ) + β · L_rce (methods 5.2, step 6).

    Args:
        logits: float (N, C, H, W).
        labels: integer (N, H, W), 255 ignored.
        alpha: weight of the cross-entropy.
        beta: weight of the reverse cross-entropy.
        pixel_weights: optional float, broadcastable to (N, H, W), that multiplies both terms of a pixel but not
            the normalisers.

    Returns:
        Both weighted terms, exactly zero if nothing is labelled.

    Raises:
        ValueError: if logits and labels have different grids.
    """
    return SymmetricTerms(
        alpha * segmentation_loss(logits, labels, pixel_weights=pixel_weights),
        beta * reverse_cross_entropy(logits, labels, pixel_weights),
    )


def regulariser(logits: Tensor, kind: Regulariser = "mrkld") -> Tensor:
    """Keeps predictions from collapsing on noisy labels (methods 5.2, step 7).

    Args:
        logits: float (N, C, H, W).
        kind: ``mrkld``, −mean over batch, classes and pixels of log p, as published; ``mrent``, mean over batch and
            pixels of Σ_k p_k log p_k, the negative entropy.

    Returns:
        A scalar, not yet weighted.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in REGULARISERS:
        raise ValueError(f"regulariser is {kind!r}; choose one of {', '.join(REGULARISERS)}")
    log_p = F.log_softmax(logits, dim=1)
    return -log_p.mean() if kind == "mrkld" else (log_p.exp() * log_p).sum(dim=1).mean()


def assignment_loss(assignments: Tensor, student_distances: Tensor, seen: Tensor, temperature: float = 1.0) -> Tensor:
    """L_str = Σ mask · t (log t − s) / Σ mask, s = log-softmax_k(−τ d_k), from given t (methods 5.2, step 8).

    The mask has C channels, so this is the mean KL(t || s) of the seen pixels *divided by C* (Q-PD-2). t log t is 0
    at t = 0, and what ``assignments`` holds at pixels that are not seen does not matter, NaN included.

    Args:
        assignments: t, the teacher's probabilities of the prototypes, float (N, C, h, w); gets no gradient.
        student_distances: d of the student's features, float (N, C, h, w).
        seen: bool (N, h, w) or (N, 1, h, w), False outside the student's view.
        temperature: τ, which multiplies the distances.

    Returns:
        A scalar, not yet weighted, exactly zero if nothing is seen.

    Raises:
        ValueError: if the shapes do not fit or ``seen`` is not bool.
    """
    if seen.dim() == 3:
        seen = seen[:, None]
    shape = student_distances.shape
    if assignments.shape != shape or seen.shape != (shape[0], 1, *shape[2:]):
        raise ValueError(
            f"teacher's part {tuple(assignments.shape)}, student's distances {tuple(shape)} and seen "
            f"{tuple(seen.shape)} do not cover the same classes and pixels; warp the teacher's to the student's view"
        )
    if seen.dtype != torch.bool:
        raise ValueError(f"seen is {seen.dtype}, which may be a weight as well as a mask; give bool")
    s = F.log_softmax(-temperature * student_distances, dim=1)
    # With t = 0 a pixel adds 0 and its gradient is 0, whatever the teacher held there.
    t = assignments.detach().to(s.dtype).masked_fill(~seen, 0.0)
    return F.kl_div(s, t, reduction="sum") / (shape[1] * seen.sum()).clamp(min=1)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, published: bool = False) -> Tensor:
    """L_kd = mean over all N·C·h·w elements of t (log t − log p), t = softmax(teacher) (methods 5.3).

    That is KL(t || p) divided by C (Q-PD-2).

    Args:
        student_logits: float (N, C, h, w).
        teacher_logits: float (N, C, h, w); gets no gradient.
        published: subtract p instead of log p, as the published code does by mistake (Q-PD-1).

    Returns:
        A scalar; without ``published`` zero for equal logits.

    Raises:
        ValueError: if the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student's logits {tuple(student_logits.shape)} and teacher's {tuple(teacher_logits.shape)} differ; "
            "resize one of them to the other's grid"
        )
    log_t = F.log_softmax(teacher_logits.detach(), dim=1)
    of_student = F.softmax(student_logits, dim=1) if published else F.log_softmax(student_logits, dim=1)
    return (log_t.exp() * (log_t - of_student)).mean()
