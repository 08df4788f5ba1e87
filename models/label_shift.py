"""Label shift: what other class frequencies do to scores and probabilities, and what a network tells of them.

Notation (methods 7): z are logits (N, C, ...), p = softmax(z), δ = ln π_T - ln π_S of ``models.priors.log_ratio``.
With aligned class-conditionals softmax(z + δ) are the posteriors under π_T. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import IGNORE, check_same_pixels

Over = Literal["all", "labelled"]
OVER: tuple[Over, ...] = get_args(Over)


def adjusted_logits(logits: Tensor, offset: Tensor) -> Tensor:
    """The inference adjustment z + δ (methods 7.4).

    Args:
        logits: float (N, C, ...).
        offset: δ, (C,), of any float type and on any device.

    Raises:
        ValueError: if the number of classes differs.
    """
    return logits + _along(offset, logits, 1)


def adjusted_probabilities(probabilities: Tensor, offset: Tensor, dim: int = 1) -> Tensor:
    """Softmax(z + δ) from softmax(z): p exp(δ) made to sum to 1 over the classes (methods 7.2).

    Args:
        probabilities: float, any shape, summing to 1 along ``dim``.
        offset: δ, (C,), of any float type and on any device.
        dim: where the classes are.

    Raises:
        ValueError: if the number of classes differs.
    """
    weighted = probabilities * _along(offset, probabilities, dim).exp()
    return weighted / weighted.sum(dim, keepdim=True)


def log_mean_exp(probabilities: Tensor) -> Tensor:
    """How much of each image every class has: g = ln(mean over the cells of exp p) (methods 7.3).

    The exponential is taken of probabilities, as published (Q-UL-3); so g = ln(1 + 1.718 area) for a hard mask.

    Args:
        probabilities: float (N, C, h, w).

    Returns:
        float (N, C).
    """
    return probabilities.expm1().mean(dim=(2, 3)).log1p()  # g of a rare class is smaller than the rounding of 1 + g


def sampled_posteriors(probabilities: Tensor, cells: int, seeds: Sequence[int]) -> Tensor:
    """Probabilities of some cells of every image, encoded as ``models.priors.encode_posteriors`` does.

    Cells are drawn without replacement; an image that has no more than are wanted gives all of them, evenly repeated.

    Args:
        probabilities: float (N, C, h, w).
        cells: how many cells of each image.
        seeds: one an image; what is drawn is the same on every device.

    Returns:
        uint8 (N, cells, C).

    Raises:
        ValueError: if there is not one seed for each image.
    """
    flat = probabilities.flatten(2)
    if len(seeds) != len(flat):
        raise ValueError(f"{len(seeds)} seeds for {len(flat)} images; give one for each")
    grid = flat.shape[2]
    if grid <= cells:
        drawn = [torch.arange(cells) * grid // cells for _ in seeds]
    else:
        drawn = [torch.randperm(grid, generator=torch.Generator().manual_seed(seed))[:cells] for seed in seeds]
    indices = torch.stack(drawn).to(flat.device)[:, None]
    chosen = flat.gather(2, indices.expand(-1, flat.shape[1], -1)).transpose(1, 2)
    return chosen.clamp(0.0, 1.0).sqrt().mul(255.0).round().to(torch.uint8)


def refinement_loss(logits: Tensor, labels: Tensor, offset: Tensor, *, over: Over = "all") -> Tensor:
    """CE(z - δ, y) of classifier refinement on source images (methods 7.5).

    The plain logits of a classifier that learns so are already those of the target's class frequencies.

    Args:
        logits: float (N, C, H, W).
        labels: integer (N, H, W), 255 ignored.
        offset: δ, (C,).
        over: ``all`` divides by the number of all pixels, ignored ones included, as published (Q-UL-5);
            ``labelled`` by that of the labelled ones.

    Returns:
        A scalar, exactly zero and with zero gradient if nothing is labelled.

    Raises:
        ValueError: for other values of ``over``, labels of another grid, or another number of classes.
    """
    if over not in OVER:
        raise ValueError(f"over is {over!r}; choose one of {', '.join(OVER)}")
    check_same_pixels(logits, labels)
    total = F.cross_entropy(adjusted_logits(logits, -offset), labels.long(), ignore_index=IGNORE, reduction="sum")
    if over == "all":
        return total / labels.numel()
    return total / (labels != IGNORE).sum().clamp(min=1)


def _along(offset: Tensor, values: Tensor, dim: int) -> Tensor:
    """The offset in the values' type and place, shaped to be broadcast along a dimension."""
    if offset.shape != (values.shape[dim],):
        raise ValueError(
            f"offset {tuple(offset.shape)} and class scores {tuple(values.shape)} do not fit; give one offset for each "
            f"of the {values.shape[dim]} classes along dimension {dim}"
        )
    shape = [1] * values.dim()
    shape[dim] = -1
    return offset.to(values).view(shape)
