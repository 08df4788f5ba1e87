"""MRNet's second stage: pseudo labels of stage I, then plain or rectified self-training (methods §3.2 and §3.3).

Labels are the winner of the fused views, without Monte-Carlo dropout. The default differs from the published system
where that fails on target data in general; ``faithful`` brings it back. Each difference stands in
:class:`pipelines.recipes.self_training.SelfTrainingOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.errors import RunError
from actors.protocols import StagePlan
from pipelines.recipes.mrnet import alignment_stage
from pipelines.recipes.recipe import Ingredients, Recipe
from pipelines.recipes.self_training import SelfTrainingOptions, self_training_stages, winner_rule


@dataclass(frozen=True)
class RectifiedOptions(SelfTrainingOptions):
    """What decides MRNet's second stage beyond schedule and size."""

    threshold: float | None = None
    """Probability that a label must reach; 0 withholds nothing. Default: as published, 0.9 from SYNTHIA and 0
    otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= (self.threshold or 0.0) <= 1:
            raise RunError(f"threshold is {self.threshold}; give a probability in [0, 1]")


def stages(ingredients: Ingredients, options: RectifiedOptions) -> tuple[StagePlan, ...]:
    """Stage I of MRNet, then self-training on its labels."""
    options = options.resolved(ingredients.faithful)
    rule = winner_rule(ingredients, options, ingredients.sure if options.threshold is None else options.threshold)
    return alignment_stage(ingredients), *self_training_stages(ingredients, options, rule)


RECIPE = Recipe(
    name="rectified",
    summary="MRNet stage I, then its pseudo labels with the rectified loss, or the plain one",
    stages=stages,
    begins_with=("mrnet",),
)
