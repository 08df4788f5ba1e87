"""A student of another network than the recipe's: it learns from their labels, after the recipe's own stages.

A heavy network that labels for a light one is what student and teachers are two for. It labels all target images with
the recipe's own label rule, once, and does not change any more.
"""

from __future__ import annotations

from dataclasses import replace

from actors.protocols import StagePlan
from models.networks.build import Build
from pipelines.label_rules import MonteCarloRule
from pipelines.recipes.recipe import Ingredients
from pipelines.recipes.self_training import SelfTrainingOptions, self_training_stages, winner_rule


def with_light_student(stages: tuple[StagePlan, ...], ingredients: Ingredients) -> tuple[StagePlan, ...]:
    """The stages of a recipe, and one as long as all of them, in which the student's network learns from theirs.

    It learns like the second stage of a recipe that trains itself: cross-entropy on labels, on images into which
    classes of source images are pasted, beside the supervised source loss.

    Args:
        stages: the recipe's; the last one with labels decides how labels are made. Without any they are the winner of
            the fused views.
        ingredients: with a student.
    """
    assert ingredients.student is not None
    seen, preset = ingredients.seen_by_student(), ingredients.preset
    options = SelfTrainingOptions(loss="plain", memory=0.0).resolved(ingredients.faithful)
    made = next((stage.labels for stage in reversed(stages) if stage.labels is not None), None)
    rule = made.rule if made is not None and isinstance(made.rule, MonteCarloRule) else None
    if rule is None:
        rule = winner_rule(ingredients, options, ingredients.sure)
    first, last = preset.stages[0], preset.stages[-1]
    steps = sum(stage.steps for stage in stages)
    schedule = replace(
        last,
        steps=steps,
        horizon=round(steps * last.horizon / last.steps),
        warmup=first.warmup,
        learning_rate=first.learning_rate,
    )
    alike = replace(seen, refresh="once", preset=replace(seen.preset, stages=(first, schedule)))
    selection = None if made is None or rule is not made.rule else made.selection
    (stage,) = self_training_stages(alike, options, replace(rule, negative=False), selection)
    return (
        *stages,
        replace(
            stage,
            name="light student",
            network=Build(ingredients.student),
            initial=ingredients.student_backbone,
            labelled_by="before",
            keeps_before=True,
        ),
    )
