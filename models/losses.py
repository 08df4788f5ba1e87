"""Loss terms of the recipes: pure functions of tensors, formula and origin in each docstring.

Notation (methods 2.6): z are logits already at label size, p = softmax(z) over classes, N x H x W is the
pixel grid Omega, ignored pixels carry 255. Where no pixel is labelled a cross-entropy is exactly zero and
its gradients are zero and finite, so an empty pseudo-label costs nothing and breaks nothing.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.deeplab import AUX_WEIGHT, Logits

IGNORE = 255
Divergence = Literal["published", "main_to_aux", "aux_to_main", "squared"]
DIVERGENCES: tuple[Divergence, ...] = ("published", "main_to_aux", "aux_to_main", "squared")


class ClassBalance(nn.Module):
    """Running class weights w_c = small_c * o_c (methods 3.1, step 1).

    small_c = max_value where the batch holds fewer than ``small_class_pixels`` pixels of c per image, else 1.
    absent_c = max_value where it holds none, else 1; o_c <- 0.9 o_c + 0.1 absent_c, starting at 1. So the
    weights lie between 1 and max_value^2. The only state is o, a buffer, which travels in checkpoints.

    Args:
        num_classes: C.
        small_class_pixels: pixels per image below which a class counts as small; scale it with the crop.
        max_value: weight of a small and of an absent class.
        often_balance: without it o stays 1.
        momentum: share of o kept per batch.
        total: sums a tensor over all processes that share the batch; None where one process has it all.
    """

    often: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        small_class_pixels: int = 4096,
        max_value: float = 7.0,
        often_balance: bool = True,
        momentum: float = 0.9,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.total = total
        self.num_classes = num_classes
        self.small_class_pixels = small_class_pixels
        self.max_value = max_value
        self.often_balance = often_balance
        self.momentum = momentum
        self.register_buffer("often", torch.ones(num_classes))

    @torch.no_grad()
    def forward(self, labels: Tensor) -> Tensor:
        """Takes one batch into account and returns the weights to use for it.

        Args:
            labels: integer (N, H, W), classes 0..C-1, anything from C to 255 ignored.

        Returns:
            float32 (C,) on the labels' device.
        """
        counts = class_counts(labels, self.num_classes)
        images = torch.full_like(counts[:1], labels.shape[0])
        if self.total is not None:
            counts, images = self.total(torch.cat([counts, images])).split([self.num_classes, 1])
        one = torch.ones_like(self.often)
        if self.often_balance:
            absent = torch.where(counts == 0, self.max_value * one, one)
            self.often.mul_(self.momentum).add_(absent, alpha=1.0 - self.momentum)
        small = torch.where(counts < self.small_class_pixels * images, self.max_value * one, one)
        return small * self.often


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class, int64 (C,), of an integer label of any shape with values 0..255."""
    flat = labels.flatten().long()
    table = torch.zeros(IGNORE + 1, dtype=torch.int64, device=labels.device)
    return table.scatter_add_(0, flat, torch.ones_like(flat))[:num_classes]


def check_same_pixels(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits (N, C, H, W) and labels (N, H, W) of different grids.

    Raises:
        ValueError: says both shapes.
    """
    if logits.shape[0] != labels.shape[0] or logits.shape[2:] != labels.shape[1:]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not cover the same pixels; "
            "upsample the logits to the label size first"
        )


def mean_weight(class_weights: Tensor, labels: Tensor) -> Tensor:
    """Mean class weight over the labelled pixels of int64 (N, H, W) labels, a 0-d tensor; 1 where there is none."""
    valid = labels != IGNORE
    total = (class_weights[labels.clamp(max=len(class_weights) - 1)] * valid).sum()
    return torch.where(valid.any(), total / valid.sum().clamp(min=1), torch.ones_like(total))


def pixel_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """l_i = w_{y_i} * CE(z_i, y_i), zero on ignored pixels (methods 3.1, step 2).

    Args:
        logits: float (N, C, H, W).
        labels: integer (N, H, W), 255 ignored.
        class_weights: float (C,), or None for ones.

    Returns:
        float (N, H, W).

    Raises:
        ValueError: if logits and labels have different grids.
    """
    check_same_pixels(logits, labels)
    return F.cross_entropy(logits, labels.long(), weight=class_weights, ignore_index=IGNORE, reduction="none")


def percentile(values: Tensor, percent: float) -> Tensor:
    """The percentile of all values with linear interpolation, a 0-d tensor; any number of values."""
    if not 0.0 <= percent <= 100.0:
        raise ValueError(f"percentile is {percent}; it lies in [0, 100]")
    flat = values.flatten()
    position = percent / 100.0 * (flat.numel() - 1)
    below = int(position)
    lower = flat.kthvalue(below + 1).values
    if below == position:
        return lower
    upper = flat.kthvalue(below + 2).values
    return torch.lerp(lower, upper, position - below)


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    *,
    hard_percentile: float = 0.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """L_h = sum_i w_{y_i} CE_i / sum_i w_{y_i} over the hardest labelled pixels (methods 3.1, steps 2 and 3).

    The threshold is the percentile of l_i = w_{y_i} CE_i over *all* pixels of the batch, ignored zeros
    included; pixels strictly below it drop out.

    Args:
        logits: float (N, C, H, W).
        labels: integer (N, H, W), 255 ignored.
        class_weights: float (C,), or None for ones.
        hard_percentile: 80 in the published runs; 0 keeps every labelled pixel.
        pixel_weights: optional float, broadcastable to (N, H, W), that multiplies CE_i but not the
            normaliser, so a doubted pixel weighs less instead of making the others weigh more.

    Returns:
        A scalar, exactly zero if nothing is labelled.
    """
    losses = pixel_cross_entropy(logits, labels, class_weights)
    valid = labels != IGNORE
    if hard_percentile > 0.0:
        with torch.no_grad():
            kept = valid & (losses >= percentile(losses, hard_percentile))
    else:
        kept = valid
    kept_float = kept.to(losses.dtype)
    if class_weights is None:
        norm = kept_float.sum()
    else:
        norm = (class_weights[labels.long().clamp(max=class_weights.numel() - 1)] * kept_float).sum()
    if pixel_weights is not None:
        losses = losses * pixel_weights
    return (losses * kept_float).sum() / torch.where(norm > 0, norm, torch.ones_like(norm))


def memory_regularisation(logits: Logits) -> Tensor:
    """L_mr = mean over Omega of KL(m || p_P) + KL(m || p_A), with m = sg[p_F] (methods 3.1, step 6).

    Args:
        logits: both heads, float (N, C, H, W), target images.

    Returns:
        A scalar; its gradient reaches the two heads, not m.
    """
    log_memory = F.log_softmax(logits.fused().detach(), dim=1)
    log_heads = F.log_softmax(logits.main, dim=1) + F.log_softmax(logits.aux, dim=1)
    return (log_memory.exp() * (2.0 * log_memory - log_heads)).sum(dim=1).mean()


def entropy_loss(logits: Logits) -> Tensor:
    """L_me = -mean over Omega of conf * sum_c p_F log p_F, conf = sg[sum_c p_F^2] (methods 3.1, step 7).

    Args:
        logits: both heads, float (N, C, H, W), target images.

    Returns:
        A scalar.
    """
    log_p = F.log_softmax(logits.fused(), dim=1)
    p = log_p.exp()
    confidence = p.detach().square().sum(dim=1)
    return -(confidence * (p * log_p).sum(dim=1)).mean()


class RectifiedTerms(NamedTuple):
    """The four scalars of the rectified loss: mean rectified CE and mean divergence of each head."""

    main_ce: Tensor
    main_divergence: Tensor
    aux_ce: Tensor
    aux_divergence: Tensor

    def total(self, aux_weight: float = AUX_WEIGHT) -> Tensor:
        """L = l_P + aux_weight * l_A, with l_h = CE part + divergence part."""
        return self.main_ce + self.main_divergence + aux_weight * (self.aux_ce + self.aux_divergence)


def rectified_terms(
    logits: Logits,
    labels: Tensor,
    class_weights: Tensor | None = None,
    *,
    divergence: Divergence = "published",
    pixel_weights: Tensor | None = None,
) -> RectifiedTerms:
    """l_h = mean[w_y CE(z_h, y) exp(-D_h)] + mean[D_h] for both heads (methods 3.3).

    Both means run over all pixels: an ignored one adds no CE but does add D_h, and class weights are not
    normalised away. Gradients flow through both heads in D_h and through exp(-D_h).

    Args:
        logits: both heads, float (N, C, H, W).
        labels: pseudo-labels, integer (N, H, W), 255 withheld.
        class_weights: float (C,), or None for ones.
        divergence: D_h per pixel (Q-MR-5): ``published``, the reference code, D_h = KL(p_o || p_h) with o
            the other head; ``main_to_aux``, KL(p_P || p_A) for both; ``aux_to_main``, KL(p_A || p_P) for
            both; ``squared``, sum_c (p_P - p_A)^2 for both.
        pixel_weights: optional float, broadcastable to (N, H, W), that multiplies the CE part.

    Returns:
        The four means, not yet weighted between heads; ``total`` adds them up.

    Raises:
        ValueError: for an unknown divergence, or labels of another grid.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; choose one of {', '.join(DIVERGENCES)}")
    log_main, log_aux = F.log_softmax(logits.main, dim=1), F.log_softmax(logits.aux, dim=1)
    main, aux = log_main.exp(), log_aux.exp()
    if divergence == "squared":
        main_d = aux_d = (main - aux).square().sum(dim=1)
    else:
        difference = log_main - log_aux
        main_d = aux_d = (main * difference).sum(dim=1)  # KL(P || A)
        if divergence != "main_to_aux":
            main_d = -(aux * difference).sum(dim=1)  # KL(A || P)
        if divergence == "aux_to_main":
            aux_d = main_d

    def rectified(head: Tensor, distance: Tensor) -> Tensor:
        losses = pixel_cross_entropy(head, labels, class_weights) * torch.exp(-distance)
        return (losses if pixel_weights is None else losses * pixel_weights).mean()

    return RectifiedTerms(rectified(logits.main, main_d), main_d.mean(), rectified(logits.aux, aux_d), aux_d.mean())


def negative_terms(
    logits: Logits, negative: Tensor, pixel_weights: Tensor | None = None, *, floor: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """Learning from what a pixel is not, for the primary and the auxiliary head (methods 4.2).

    For head h, over the pixels with at least one negative class: mean of −Σ_c neg_c log max(1 − p_{h,c}, floor) / Σ_c
    neg_c. That is the negative cross-entropy of UPS (Rizve et al., ICLR 2021), after NLNL (Kim et al., ICCV 2019). A
    positive label is not needed, so withheld pixels teach something, too.

    Args:
        logits: both heads, float (N, C, H, W).
        negative: bool (N, C, H, W).
        pixel_weights: optional float, broadcastable to (N, H, W), that multiplies a pixel's term.
        floor: bound under 1 − p.

    Returns:
        Both means, not yet weighted between heads; exactly zero where no pixel has a negative class.

    Raises:
        ValueError: for negatives of another shape than the logits.
    """
    if negative.shape != logits.main.shape:
        raise ValueError(f"negatives {tuple(negative.shape)} do not fit logits {tuple(logits.main.shape)}")
    counts = negative.sum(dim=1)
    having = (counts > 0).to(logits.main.dtype)

    def mean(head: Tensor) -> Tensor:
        impossible = (1.0 - head.softmax(dim=1)).clamp(min=floor).log()
        losses = -(impossible * negative).sum(dim=1) / counts.clamp(min=1)
        return (losses if pixel_weights is None else losses * pixel_weights).sum() / having.sum().clamp(min=1)

    return mean(logits.main), mean(logits.aux)


def generator_loss(scores: Sequence[Tensor]) -> Tensor:
    """G = 2 * sum over scales of mean[(D_k(p) - 1)^2] (methods 3.1, step 5).

    Args:
        scores: the discriminator's maps for target probabilities.

    Returns:
        A scalar.
    """
    return 2.0 * torch.stack([(score - 1.0).square().mean() for score in scores]).sum()


def domain_loss(scores: Tensor, *, target: bool) -> Tensor:
    """BCE(D, y) with y = 0 for the source and 1 for the target domain, averaged over all cells (methods 6.1).

    Args:
        scores: logits of a discriminator, float of any shape.
        target: the domain that they shall name: its own where the discriminator learns, the other where it is fooled.

    Returns:
        A 0-d tensor.
    """
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(target)))


class DiscriminatorLoss(NamedTuple):
    """The whole discriminator loss, penalty included, and the penalty R alone."""

    total: Tensor
    penalty: Tensor


def discriminator_loss(
    discriminator: Callable[[Tensor], Sequence[Tensor]],
    fake: Tensor,
    real: Tensor,
    *,
    penalty_weight: float = 0.01,
) -> DiscriminatorLoss:
    """L_D = sum_k {mean[D_k(fake)^2] + mean[(D_k(real) - 1)^2]} + R (methods 3.1, step 9).

    R = penalty_weight * sum_k mean over the batch of || d sum(D_k(real)) / d real ||^2, summed over C, H, W
    and differentiable. Both inputs are detached here.

    Args:
        discriminator: maps probabilities (N, C, H, W) to score maps, one per scale.
        fake: target probabilities (N, C, H, W).
        real: source probabilities (N, C, H, W).
        penalty_weight: 0 leaves the penalty (and its second backward pass) out.

    Returns:
        The loss and its penalty part.
    """
    fake = fake.detach()
    real = real.detach().requires_grad_(penalty_weight > 0.0)
    fake_scores, real_scores = discriminator(fake), discriminator(real)
    total = torch.stack(
        [score.square().mean() for score in fake_scores] + [(score - 1.0).square().mean() for score in real_scores]
    ).sum()
    penalty = torch.zeros_like(total)
    if penalty_weight > 0.0:
        for score in real_scores:
            (gradient,) = torch.autograd.grad(score.sum(), real, create_graph=True)
            penalty = penalty + gradient.square().sum() / real.shape[0]
        penalty = penalty_weight * penalty
    return DiscriminatorLoss(total + penalty, penalty)
