"""The runs that involve no adaptation: source-only and oracle. They measure the gap that a recipe may close."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actors.protocols import Batch, ObjectiveContext, StagePlan, StepInfo
from models.losses import ClassBalance, segmentation_loss
from models.networks.segmenter import Outputs, upsample
from pipelines.recipes.optimisation import Rate, sgd
from pipelines.recipes.recipe import PUBLISHED_CROP, TERM, Ingredients, StageSchedule
from pipelines.views import RandomCrop


@dataclass(frozen=True)
class SegmentationTerm:
    """MRNet's supervised loss (methods §3.1, steps 1 to 3): class balance, hard pixels, both heads.

    Attributes:
        num_classes: C.
        hard_percentile: pixels whose loss stays below this percentile are left out; 80 as published.
        max_value: weight of small and absent classes; 7 as published.
        small_class_pixels: a class with fewer pixels an image of the batch is small.
    """

    num_classes: int
    hard_percentile: float = TERM[0]
    max_value: float = TERM[1]
    small_class_pixels: int = 4096

    def balance(self, context: ObjectiveContext) -> ClassBalance:
        """Running class weights of the global batch."""
        return ClassBalance(
            self.num_classes,
            small_class_pixels=self.small_class_pixels,
            max_value=self.max_value,
            total=context.sum_over_students,
        ).to(context.device)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor, balance: ClassBalance) -> Tensor:
        """Sum over the heads, L_P + ½ L_A of two, of a labelled batch; images N×3×h×w, labels int64 N×h×w."""
        return self.of_logits(network(images), labels, balance)

    def of_logits(self, outputs: Outputs, labels: Tensor, balance: ClassBalance) -> Tensor:
        """The same for what the network answered, at its resolution."""
        weights, size = balance(labels), (labels.shape[-2], labels.shape[-1])
        losses = [
            share * segmentation_loss(upsample(logits, size), labels, weights, hard_percentile=self.hard_percentile)
            for share, logits in outputs.heads()
        ]
        return torch.stack(losses).sum()


PUBLISHED_SMALL_PIXELS = 4096


def segmentation_term(ingredients: Ingredients) -> SegmentationTerm:
    """The supervised loss of a run, the same in its recipe and in its reference runs.

    The pixel count of a small class scales with the area of stage I's crop, and is the same in stage II, whose
    published crops are a quarter as large.
    """
    width, height = ingredients.preset.stages[0].crop
    share = width * height / (PUBLISHED_CROP[0] * PUBLISHED_CROP[1])
    small = max(1, round(PUBLISHED_SMALL_PIXELS * share))
    hard, rare = ingredients.published_term if ingredients.faithful else ingredients.term
    term = SegmentationTerm(ingredients.num_classes, hard, rare, small)
    if ingredients.hard_pixels is not None:
        term = replace(term, hard_percentile=ingredients.hard_pixels)
    if ingredients.rare_weight is not None:
        term = replace(term, max_value=ingredients.rare_weight)
    return term


class SupervisedObjective:
    """The supervised term alone, on whichever labelled stream the stage has."""

    def __init__(self, term: SegmentationTerm, context: ObjectiveContext) -> None:
        self.term = term
        self.balance = term.balance(context)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`."""
        if batch.source is not None and batch.source_label is not None:
            images, labels = batch.source, batch.source_label
        else:
            assert batch.target is not None
            assert batch.pseudo_label is not None
            images, labels = batch.target, batch.pseudo_label
        return {"loss/segmentation": self.term(network, images, labels, self.balance)}

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Nothing of its own learns."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights."""
        return {"balance": self.balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["balance"])


def training_view(ingredients: Ingredients, schedule: StageSchedule, *, more_than_values: int = 0) -> RandomCrop:
    """Jitter, crop and mirror at a stage's size."""
    preset = ingredients.preset
    return RandomCrop(
        ingredients.seed,
        schedule.crop,
        jitter=preset.jitter,
        more_than_values=more_than_values,
        pixels=preset.network.pixels,
    )


def reference_stages(ingredients: Ingredients, domain: str, total: int) -> tuple[StagePlan, ...]:
    """One supervised stage as long as all stages of the adapted run, with its batch and its last decay.

    Args:
        ingredients: as for every recipe.
        domain: ``source``, or ``target`` for the oracle, which alone may see target labels.
        total: steps of the adapted run.
    """
    schedule, last = ingredients.preset.stages[0], ingredients.preset.stages[-1]
    view = training_view(ingredients, schedule)
    if domain == "source":
        streams = {"source": ingredients.source(schedule.source_size, view)}
    else:
        assert ingredients.target_labelled is not None
        streams = {"target": ingredients.target_labelled(schedule.target_size, view)}
    term = segmentation_term(ingredients)
    return (
        StagePlan(
            name="source-only" if domain == "source" else "oracle",
            steps=total,
            batch=schedule.batch,
            streams=streams,
            objective=partial(SupervisedObjective, term),
            optimiser=sgd(ingredients.preset, train_norm_affine=True),
            learning_rate=Rate(schedule.learning_rate, schedule.warmup, round(total * last.horizon / last.steps)),
            clip_norm=ingredients.preset.clip_norm,
        ),
    )
