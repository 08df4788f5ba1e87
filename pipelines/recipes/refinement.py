"""Classifier refinement: the classifiers alone learn, on scores that are offset by class frequencies (methods §7.5).

Liu et al., "Undoing the Damage of Label Shift for Cross-domain Semantic Segmentation", BMVC 2021. What inference
adjustment adds to class scores is learned into the classifiers instead, from source images, before labels are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.prior_estimate import Evidence, PriorPlan, estimated
from actors.protocols import Batch, ObjectiveContext, StagePlan, StepInfo
from models.label_shift import refinement_loss
from models.networks.segmenter import Segmenter, upsample
from pipelines.recipes.optimisation import Rate
from pipelines.recipes.recipe import Ingredients
from pipelines.recipes.supervised import training_view
from pipelines.views import Whole

PUBLISHED_HORIZON = 62_500
"""Steps at which the published rate reaches zero."""
FULL_FACTOR, SMALL_FACTOR = 10.0, 0.1
"""Rate, of the stage's before it: as published, and for a random network, whose parts all learn at that one."""


@dataclass(frozen=True)
class ClassifierSgd:
    """SGD on the classifiers alone; whatever else a network has gets no gradient."""

    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __call__(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a network; the student sets its rate before each step."""
        assert isinstance(network, Segmenter)
        network.requires_grad_(False)
        parameters = network.classifier_parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups = [{"name": "classifiers", "params": parameters, "lr": 1.0, "lr_scale": 1.0}]
        return torch.optim.SGD(groups, lr=1.0, momentum=self.momentum, weight_decay=self.weight_decay)


class RefinementObjective:
    """Cross-entropy of offset scores on source images.

    Args:
        prior: the target's class frequencies; where they are to be estimated, the network that the stage finds is asked
            what it sees, once.
        survey: what a network sees of all target images.
        over: what the mean is over (Q-UL-5).
        context: of the student.
    """

    def __init__(
        self,
        prior: PriorPlan,
        survey: Callable[[nn.Module], Evidence],
        over: Literal["all", "labelled"],
        context: ObjectiveContext,
    ) -> None:
        self.prior, self.over, self.device = prior, over, context.device
        self.target = np.array(prior.source if prior.target is None else prior.target)
        if prior.target is None and context.fresh:
            assert context.teaching is not None
            self.target = estimated(prior, survey(context.teaching))
        self._place()

    def _place(self) -> None:
        self.offset = torch.from_numpy(self.prior.offset(self.target)).to(self.device)
        shift = 0.5 * np.abs(self.target - np.array(self.prior.source)).sum()
        self.shift = torch.tensor(shift, dtype=torch.float32, device=self.device)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`."""
        assert batch.source is not None
        assert batch.source_label is not None
        labels = batch.source_label
        scores = upsample(network(batch.source).fused(), (labels.shape[-2], labels.shape[-1]))
        return {"loss/refinement": refinement_loss(scores, labels, self.offset, over=self.over)}

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Nothing of its own learns; how far the prior is from the source's is recorded."""
        return {"prior_shift": self.shift}

    def state_dict(self) -> dict[str, Any]:
        """The target prior."""
        return {"target": torch.from_numpy(self.target)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.target = state["target"].cpu().numpy()
        self._place()


def refinement(
    stages: tuple[StagePlan, ...],
    ingredients: Ingredients,
    prior: PriorPlan,
    survey: Callable[[nn.Module], Evidence],
    steps: int,
    rate: float | None,
    over: Literal["all", "labelled"],
) -> tuple[int, StagePlan]:
    """A stage of refinement and its place among a recipe's: before the first that has labels; at the end if none has.

    It has size and batch of the stage before it, and source images that are sampled by class, as published. Whoever
    labels next does so with the refined classifiers.

    Args:
        stages: all of the recipe's.
        ingredients: of the run.
        prior, survey, over: see :class:`RefinementObjective`.
        steps: of refinement.
        rate: learning rate; None for the preset's.
    """
    preset = ingredients.preset
    at = next((number for number, stage in enumerate(stages) if stage.labels is not None), len(stages))
    before, schedule = stages[max(0, at - 1)], preset.stages[max(0, at - 1)]
    full = preset.name == "full"
    if rate is None:
        rate = schedule.learning_rate * (FULL_FACTOR if full else SMALL_FACTOR)
    return at, StagePlan(
        name="refinement",
        steps=steps,
        batch=schedule.batch,
        streams={"source": ingredients.by_class(schedule.source_size, training_view(ingredients, schedule))},
        objective=partial(RefinementObjective, prior, survey, over),
        optimiser=ClassifierSgd(),
        learning_rate=Rate(rate, 0, max(steps, PUBLISHED_HORIZON) if full else steps),
        starts_from="teacher",
        statistics=before.statistics,
        clip_norm=preset.clip_norm,
        plain_view=before.plain_view or Whole(preset.network.pixels),
        frozen_norms=ingredients.faithful,
    )
