"""Class prototypes of ProDA: distances to them, what they say about a soft label, and how they follow the features.

Notation (methods 5): f are features (N, K, h, w), η_k is the prototype of class k, d_k = ‖f − η_k‖₂ is the plain
Euclidean distance, π a soft label. Ignored pixels carry 255. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.losses import IGNORE

COUNT_CAP = 3000
"""Bound of N_k in the initial mean (methods 5.1): no vector ever weighs less than 1/3001."""
FAR = 1e4
"""Distance from a class without a prototype: its weight is exactly zero."""
NOISE = 8.0
"""d² up to this many roundings of 2|f|² is zero; f = η left at most 2.7 of them for K from 8 to 2048."""


class _Distances(torch.autograd.Function):
    """d = √(|f|² + |η|² − 2 f·η) about the prototypes' mean, by one matrix product each way.

    Only features, prototypes and distances are kept for the backward pass, none of the C differences.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            moved, centres = _centred(features, prototypes)
            # The one copy of the features' size: gone on return, and backward needs as much for the gradient anyway.
            length = torch.linalg.vector_norm(moved, dim=1, keepdim=True).square_()
            squared = length + centres.square().sum(dim=1, keepdim=True)
            squared.baddbmm_(centres.expand(len(moved), -1, -1), moved, alpha=-2.0)
            # Below its own rounding d² is noise, and w = g/d would blow the noise up. Where f = η, |η|² is |f|², too.
            noise = length.mul_(2.0 * NOISE * torch.finfo(length.dtype).eps)
            distances = squared.masked_fill_(squared <= noise, 0.0).sqrt_().unflatten(2, features.shape[2:])
        ctx.save_for_backward(features, prototypes, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features, prototypes, distances = ctx.saved_tensors
        of_features = of_prototypes = None
        with torch.autocast(features.device.type, enabled=False):
            moved, centres = _centred(features, prototypes)
            shares = (gradient / distances).masked_fill_(distances == 0, 0.0).flatten(2)  # w_k = g_k / d_k
            if ctx.needs_input_grad[1]:  # Σ w_k (η_k − f)
                products = torch.bmm(shares, moved.transpose(1, 2)).sum(dim=0)
                of_prototypes = (shares.sum(dim=(0, 2))[:, None] * centres - products).to(prototypes.dtype)
            if ctx.needs_input_grad[0]:  # f Σ w_k − Σ w_k η_k, in the memory of the centred features
                moved.mul_(shares.sum(dim=1, keepdim=True))
                moved.baddbmm_(centres.t().expand(len(moved), -1, -1), shares, alpha=-1.0)
                of_features = moved.unflatten(2, features.shape[2:]).to(features.dtype)
        return of_features, of_prototypes


def _centred(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, K, h·w), a copy, and prototypes (C, K), both without the prototypes' mean, float32 at least.

    Distances do not change, but a part that all vectors share no longer cancels in float32.
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, prototypes.dtype), torch.float32)
    prototypes = prototypes.to(dtype)
    mean = prototypes.mean(dim=0)
    return (features - mean[:, None, None]).flatten(2), prototypes - mean


def prototype_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """d_k = ‖f − η_k‖₂, not squared (methods 5.2, step 5).

    Computed in float32, or float64 where an argument is, under autocast as well. The gradient with respect to f is
    Σ_k g_k (f − η_k)/d_k, and nothing from a class with d_k = 0; d_k is 0 where rounding cannot tell f from η_k.

    Args:
        features: float (N, K, h, w).
        prototypes: float (C, K).

    Returns:
        float (N, C, h, w), differentiable once with respect to both arguments.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if features.dim() != 4 or prototypes.dim() != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)} and prototypes {tuple(prototypes.shape)} do not fit; "
            "give (N, K, h, w) and (C, K) with the same K"
        )
    distances: Tensor = _Distances.apply(features, prototypes)
    return distances


def class_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Distances to the prototypes of the classes that have one; :data:`FAR` from those that have none.

    A class that was seen nowhere has a prototype of zeros. It would be near to whatever is unlike all others: every
    doubtful pixel would be taken for it.

    Args:
        features, prototypes: as for :func:`prototype_distances`.

    Returns:
        float (N, C, h, w).
    """
    known = prototypes.any(dim=1)[:, None, None]
    distances = prototype_distances(features, prototypes)
    return torch.where(known, distances, torch.full_like(distances[:1, :1, :1, :1], FAR))


def prototype_weights(distances: Tensor, temperature: float = 1.0) -> Tensor:
    """ω = softmax_k(−τ(d_k − min_j d_j)) (methods 5.2, step 5).

    Args:
        distances: float (N, C, h, w).
        temperature: τ, which multiplies the distances.

    Returns:
        float (N, C, h, w), summing to 1 over the classes.
    """
    return F.softmax(-temperature * distances, dim=1)  # it takes the minimum away itself


def rectify(soft: Tensor, weights: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """ŷ = argmax_k ω_k π_k and its share max_k ω_k π_k / Σ_k ω_k π_k (methods 5.2, step 5).

    Where every product is zero no class wins: the pixel is withheld with confidence 0 at any threshold.

    Args:
        soft: soft label π, float (N, C, h, w).
        weights: ω, float (N, C, h, w).
        threshold: pixels less confident than this are withheld; 0 as published, which withholds none.

    Returns:
        Labels int64 (N, h, w), 255 where withheld, and confidences float (N, h, w), not differentiable.

    Raises:
        ValueError: if the shapes differ.
    """
    if soft.shape != weights.shape:
        raise ValueError(
            f"soft label {tuple(soft.shape)} and weights {tuple(weights.shape)} differ; "
            "bring both to one grid (N, C, h, w) and the same classes"
        )
    with torch.no_grad():
        product = soft * weights
        best, labels = product.max(dim=1)
        total = product.sum(dim=1)
        confidence = torch.where(total > 0, best / total, torch.zeros_like(total))
        return labels.masked_fill_(~(total > 0) | (confidence < threshold), IGNORE), confidence


@torch.no_grad()
def class_means(features: Tensor, winners: Tensor, num_classes: int, min_pixels: int = 10) -> tuple[Tensor, Tensor]:
    """v_k = mean of f over the pixels where class k wins, image by image (methods 5.1 and 5.2, step 10).

    Args:
        features: float (N, K, h, w).
        winners: integer (N, h, w), the argmax of the logits; 255, or anything else outside 0..C-1, belongs to no class.
        num_classes: C.
        min_pixels: fewer pixels than this are too few.

    Returns:
        Means, float32 (float64 for such features) (N, C, K), and bool (N, C): whether the class has a mean, which it
        has not with too few pixels or where the mean sums to exactly 0. Not differentiable.

    Raises:
        ValueError: if features and winners have different grids.
    """
    if features.shape[:1] + features.shape[2:] != winners.shape:
        raise ValueError(
            f"features {tuple(features.shape)} and winners {tuple(winners.shape)} do not cover the same pixels; "
            "take the argmax of logits at the features' size"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    classes = torch.arange(num_classes, device=winners.device)
    members = (winners.flatten(1)[:, None] == classes[:, None]).to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.bmm(members, features.to(dtype).flatten(2).transpose(1, 2))
    counts = members.sum(dim=2)
    means = sums / counts.clamp(min=1.0)[..., None]
    return means, (counts >= min_pixels) & (means.sum(dim=2) != 0)


class PrototypeMean:
    """Initial prototypes: η_k ← (η_k N_k + v)/(N_k + 1), N_k ← min(N_k + 1, cap), from N_k = 0 (methods 5.1).

    Args:
        num_classes: C.
        channels: K.
        cap: bound of N_k, after which the mean forgets at the rate 1/(cap + 1).
        device: where the prototypes lie.
    """

    def __init__(
        self, num_classes: int, channels: int, cap: int = COUNT_CAP, device: torch.device | str | None = None
    ) -> None:
        self.cap = cap
        self.prototypes = torch.zeros(num_classes, channels, device=device)
        """float32 (C, K), zero for a class without a vector so far."""
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        """int64 (C,): N_k, at most ``cap``."""

    @torch.no_grad()
    def add(self, means: Tensor, present: Tensor) -> None:
        """Takes the vectors of some images into account, one image after the other.

        Args:
            means: float (N, C, K), from :func:`class_means`.
            present: bool (N, C); other vectors are passed over.
        """
        _check_vectors(self.prototypes, means, present)
        for vectors, here in zip(means.to(self.prototypes.dtype), present, strict=True):
            moved = self.prototypes + (vectors - self.prototypes) / (self.counts + 1)[:, None]
            self.prototypes = torch.where(here[:, None], moved, self.prototypes)
            self.counts = torch.where(here, (self.counts + 1).clamp(max=self.cap), self.counts)


@torch.no_grad()
def momentum_update(prototypes: Tensor, means: Tensor, present: Tensor, momentum: float = 1e-4) -> None:
    """η_k ← (1 − m) η_k + m v in place, one image after the other (methods 5.2, step 10).

    A class without a prototype (zeros) takes the first vector that it gets whole.

    Args:
        prototypes: float32 or float64 (C, K); half precision would round every update away.
        means: float (N, C, K), from :func:`class_means`.
        present: bool (N, C); other vectors are passed over.
        momentum: m, the weight of a new vector.

    Raises:
        ValueError: if the shapes do not fit, or for prototypes in half precision.
    """
    _check_vectors(prototypes, means, present)
    if torch.finfo(prototypes.dtype).bits < 32:
        raise ValueError(f"prototypes are {prototypes.dtype}, which rounds updates of {momentum:g} away; keep float32")
    for vectors, here in zip(means.to(prototypes.dtype), present, strict=True):
        moved = torch.where(prototypes.any(dim=1)[:, None], prototypes.lerp(vectors, momentum), vectors)
        prototypes.copy_(torch.where(here[:, None], moved, prototypes))


def _check_vectors(prototypes: Tensor, means: Tensor, present: Tensor) -> None:
    if means.shape[1:] != prototypes.shape or present.shape != means.shape[:2]:
        raise ValueError(
            f"means {tuple(means.shape)} and present {tuple(present.shape)} do not fit prototypes "
            f"{tuple(prototypes.shape)}; give (N, C, K) and (N, C), as class_means returns them"
        )
