"""Meta pseudo labels as methods 6.3 has them: how much the teacher learns from labels that a student learns from.

The coefficient is a heuristic of that system. It is no derivative of the student's loss, as in Meta Pseudo Labels
(Pham et al., CVPR 2021), whose name it bears.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPOCHS = 50
"""Epochs of the published runs, in which the schedule below is written."""
RISING = 25
"""The last epoch in which alpha rises."""


def meta_alpha(epoch: int) -> float | None:
    """Alpha of an epoch, counted from 0: none in the first, exp(e / 40) - 1 up to the 25th, 1 after it.

    Raises:
        ValueError: the epoch is negative.
    """
    if epoch < 0:
        raise ValueError(f"the epoch is {epoch}; they are counted from 0")
    if epoch == 0:
        return None
    return math.exp(epoch / 40) - 1 if epoch <= RISING else 1.0


def meta_epoch(step: int, steps: int) -> int:
    """Epoch of the published runs at a step of a stage of any length."""
    return min(EPOCHS - 1, EPOCHS * step // max(1, steps))


def meta_coefficient(epoch: int, rate: float, source_loss: Tensor, pseudo_loss: Tensor) -> Tensor:
    """H = alpha * eta_S * A * B without gradient; 1 in the first epoch, where alpha is 1 / (eta_S A B).

    Args:
        epoch: of the published schedule.
        rate: eta_S, the student's learning rate.
        source_loss: A, the student's loss on source labels before its step, a 0-d tensor.
        pseudo_loss: B, its loss on pseudo labels before its step, a 0-d tensor.
    """
    alpha = meta_alpha(epoch)
    if alpha is None:
        return torch.ones_like(source_loss.detach())
    return alpha * rate * source_loss.detach() * pseudo_loss.detach()


def noisy_rectangle(images: Tensor, deviation: Tensor | float, seed: int) -> Tensor:
    """Adds N(0, deviation^2) inside one random rectangle of every image.

    A rectangle lies between two rows and two columns, drawn uniformly.

    Args:
        images: float (N, 3, H, W).
        deviation: in the images' units; may differ from channel to channel, (3, 1, 1).
        seed: decides rectangles and noise, the same on every device.
    """
    n, _, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n, 4, generator=generator)
    sides = torch.tensor([height, height, width, width])
    edges = (drawn * sides).long()
    top, bottom = edges[:, :2].min(1).values, edges[:, :2].max(1).values
    left, right = edges[:, 2:].min(1).values, edges[:, 2:].max(1).values
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top[:, None]) & (rows <= bottom[:, None]))[:, None, :, None] & (
        (columns >= left[:, None]) & (columns <= right[:, None])
    )[:, None, None, :]
    noise = torch.randn(images.shape, generator=generator)
    return images + (noise * inside).to(images) * deviation
