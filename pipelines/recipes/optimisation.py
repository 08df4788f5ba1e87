"""Optimiser and learning rate (methods §2.6), as picklable factories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.networks.segmenter import Segmenter
from models.schedule import warmup_poly
from pipelines.recipes.recipe import Preset


@dataclass(frozen=True)
class Sgd:
    """SGD, heads ×10, residual blocks ×3 and projections ×4 (Q-SH-1).

    Attributes:
        train_norm_affine: whether the backbone's batch-norm affine parameters learn (stage II) or not (stage I).
        duplicates: ``published`` multiplies block and projection rates as the published runs did by accident,
            ``once`` does not.
        head_multiplier: rate of the heads relative to the backbone's.
        momentum, weight_decay, nesterov: of SGD.
    """

    train_norm_affine: bool
    duplicates: Literal["published", "once"] = "published"
    head_multiplier: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True

    def __call__(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a network; the student sets every group's rate before each step."""
        assert isinstance(network, Segmenter)
        network.requires_grad_(True)  # the stage before may have trained a part alone
        groups = network.parameter_groups(
            lr=1.0,
            head_multiplier=self.head_multiplier,
            duplicates=self.duplicates,
            train_norm_affine=self.train_norm_affine,
        )
        return torch.optim.SGD(
            groups, lr=1.0, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


def sgd(preset: Preset, *, train_norm_affine: bool) -> Sgd:
    """The optimiser of a preset."""
    if preset.rates == "flat":
        return Sgd(train_norm_affine=train_norm_affine, duplicates="once", head_multiplier=1.0)
    return Sgd(train_norm_affine=train_norm_affine)


@dataclass(frozen=True)
class Rate:
    """Warm-up, then polynomial decay.

    Attributes:
        base: learning rate.
        warmup: steps of linear warm-up from a tenth of the base rate.
        horizon: step at which the rate would reach zero.
        held: steps for which a rate is held, where it changes once an epoch.
    """

    base: float
    warmup: int
    horizon: int
    held: int = 1

    def __call__(self, step: int) -> float:
        """Learning rate at a stage step."""
        return self.base * warmup_poly(step - step % self.held, warmup=self.warmup, horizon=self.horizon)
