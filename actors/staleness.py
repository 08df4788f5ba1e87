"""How old a label may be: one object that teachers, bank and students ask.

A label's age is counted in student steps: the student's step now minus the step at which the weights that made the
label were published. ``refresh="once"`` is the turn-taking of the published systems, so that a synchronous and an
asynchronous run differ in this one field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class StalenessPolicy:
    """The whole contract about old labels, for both ends.

    Attributes:
        refresh: ``continuous``: teachers re-label with the newest weights, without end. ``once``: one complete round
            with the weights of the stage's start; no target loss before it is complete, no label made after it.
        max_age_steps: an older label is not used; None keeps labels of any age.
        half_life_steps: a label of this age weighs half; None weighs all alike.
    """

    refresh: Literal["once", "continuous"] = "continuous"
    max_age_steps: int | None = None
    half_life_steps: float | None = None

    def __post_init__(self) -> None:
        if self.refresh not in ("once", "continuous"):
            raise ValueError(f"refresh must be 'once' or 'continuous', not {self.refresh!r}")
        if self.max_age_steps is not None and self.max_age_steps <= 0:
            raise ValueError(f"max_age_steps must be positive, not {self.max_age_steps}")
        if self.half_life_steps is not None and self.half_life_steps <= 0:
            raise ValueError(f"half_life_steps must be positive, not {self.half_life_steps}")
        if self.refresh == "once" and (self.max_age_steps or self.half_life_steps):
            raise ValueError(
                "with refresh='once' labels grow old by design: leave max_age_steps and half_life_steps None"
            )

    def admit(self, newest: int | None, held: int | None, blocked: Collection[int] = ()) -> bool:
        """May a teacher start on a chunk?

        Args:
            newest: version of the weights it would use; None when none are published.
            held: version of the chunk's live record; None when it has none.
            blocked: versions whose labels were found to have collapsed.
        """
        if newest is None or newest in blocked:
            return False
        if held is None:
            return True
        return self.refresh == "continuous" and newest > held

    def select(self, age_steps: int, round_complete: bool) -> bool:
        """May the student use a record of this age?"""
        if self.refresh == "once":
            return round_complete
        return self.max_age_steps is None or age_steps <= self.max_age_steps

    def weigh(self, age_steps: int) -> float:
        """Weight of the target loss of a record of this age, in (0, 1]."""
        if self.half_life_steps is None:
            return 1.0
        return float(0.5 ** (max(0, age_steps) / self.half_life_steps))


def age_statistics(ages: Counter[int]) -> dict[str, int | None]:
    """p50, p95 and maximum of label ages in steps; None each where no label was read."""
    if not ages:
        return {"p50": None, "p95": None, "max": None}
    values = np.array(sorted(ages))
    cumulative = np.cumsum([ages[int(v)] for v in values])
    pick = {
        name: int(values[np.searchsorted(cumulative, q * cumulative[-1])]) for name, q in (("p50", 0.5), ("p95", 0.95))
    }
    return {**pick, "max": int(values[-1])}
