"""A few target labels in any recipe: every stage also learns from them, with the supervised loss of the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from actors.protocols import Batch, Objective, ObjectiveContext, StagePlan, StepInfo
from models.networks.build import Build
from pipelines.recipes.recipe import Ingredients
from pipelines.recipes.supervised import SegmentationTerm, segmentation_term, training_view

STREAM = "labelled"


class FewLabelsObjective:
    """Another objective, and beside it the supervised term on labelled target images.

    They pass the network on their own: by the batch statistics of target images alone.
    """

    def __init__(
        self,
        inner: Callable[[ObjectiveContext], Objective],
        term: SegmentationTerm,
        context: ObjectiveContext,
    ) -> None:
        self.inner, self.term = inner(context), term
        self.balance = term.balance(context)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`."""
        assert batch.labelled is not None
        assert batch.labelled_label is not None
        terms = self.inner.losses(network, batch, info)  # first: its dropout draws are those of a run without labels
        return {**terms, "loss/target_labels": self.term(network, batch.labelled, batch.labelled_label, self.balance)}

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """What the other objective learns."""
        return self.inner.learn(info)

    def state_dict(self) -> dict[str, Any]:
        """Of the other objective, and the running class weights."""
        return {"inner": self.inner.state_dict(), "balance": self.balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.inner.load_state_dict(state["inner"])
        self.balance.load_state_dict(state["balance"])


def with_few_labels(stages: tuple[StagePlan, ...], ingredients: Ingredients) -> tuple[StagePlan, ...]:
    """The stages of a recipe, each with a batch of labelled target images in every step.

    However few they are, they are seen as often as the other domains: their stream begins again when it has ended.
    """
    assert ingredients.few is not None
    term, changed, network = segmentation_term(ingredients), [], ingredients.preset.network
    for index, stage in enumerate(stages):
        network = stage.network.config if isinstance(stage.network, Build) else network
        schedules = ingredients.preset.stages
        schedule = schedules[min(index, len(schedules) - 1)]  # rounds share the last
        view = replace(training_view(ingredients, schedule), pixels=network.pixels)
        stream = ingredients.few(schedule.target_size, replace(view, seed=view.seed + 2))
        changed.append(
            replace(
                stage,
                streams={**stage.streams, STREAM: stream},
                objective=partial(FewLabelsObjective, stage.objective, term),
            )
        )
    return tuple(changed)
