"""Learning-rate schedules as factors of the base rate: plain functions of the step (methods 2.6)."""

from __future__ import annotations

from torch.optim import Optimizer


def poly(step: int, *, horizon: int, power: float = 0.9) -> float:
    """(1 - step / horizon)^power, zero from the horizon on; the discriminators' schedule.

    Raises:
        ValueError: if the step is negative or the horizon is not positive.
    """
    if step < 0 or horizon <= 0:
        raise ValueError(f"step is {step} and horizon is {horizon}; a schedule runs from 0 to a positive horizon")
    return max(0.0, 1.0 - step / horizon) ** power


def warmup_poly(step: int, *, warmup: int, horizon: int, power: float = 0.9) -> float:
    """0.1 + 0.9 step / warmup before ``warmup``, then ``poly`` of the step itself (MRNet, methods 2.6).

    The two do not meet: where the warm-up ends the factor drops from nearly 1 to poly(warmup).

    Raises:
        ValueError: if the step is negative or the horizon is not positive.
    """
    if 0 <= step < warmup:
        return 0.1 + 0.9 * step / warmup
    return poly(step, horizon=horizon, power=power)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets every group's ``lr`` to ``rate`` times its ``lr_scale`` (1 where a group has none)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
