"""EPLC: pseudo labels corrected by Monte-Carlo dropout, then rectified training (methods §4).

The default differs from the published system where that fails on target data in general; ``faithful`` brings the
published behaviour back. Each difference stands in :class:`EplcOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.protocols import Batch, LabelPlan, ObjectiveContext, StagePlan, StepInfo
from actors.staleness import StalenessPolicy
from models.losses import IGNORE, rectified_terms
from models.networks.deeplab import Logits, upsample_logits
from pipelines.choices import check_choices
from pipelines.label_rules import MonteCarloRule
from pipelines.recipes.mrnet import MrnetOptions, alignment_stage
from pipelines.recipes.optimisation import Rate, sgd
from pipelines.recipes.recipe import Ingredients, Recipe
from pipelines.recipes.supervised import SegmentationTerm, segmentation_term, training_view
from pipelines.selections import PercentileSelection
from pipelines.views import Whole, class_mix

PSEUDO_CROP_VALUES = 10
"""A crop is drawn again until its pseudo label shows more than this many distinct values (methods §2.4)."""
FEW_PIXELS = 288
"""A class with fewer pixels in all labels than this part of one label has too few for a percentile."""


@dataclass(frozen=True)
class EplcOptions:
    """What decides EPLC beyond schedule and size."""

    selection: Literal["percentile", "mean", "min", "std"] = "percentile"
    """Which pixels a pseudo label keeps. mean, min, std: fixed thresholds on Monte-Carlo statistics, as published.
    percentile: the most confident share of every class, so that no class starves."""
    keep_share: float = 0.6
    """Share of every class that percentile selection keeps, in (0, 1]."""
    sure: float = 0.9
    """Mean probability above which percentile selection keeps a pixel whatever its class's share."""
    threshold: float = 0.8
    """Probability that the mean (or every pass, for min) must reach."""
    max_std: float = 0.05
    """Standard deviation over the passes that std selection allows."""
    passes: int = 5
    """Monte-Carlo dropout passes."""
    label_dropout: float = 0.1
    """Channel dropout rate of the labelling passes, whatever the training rate."""
    ignore_bottom: float | None = None
    """Share of the image's height, from below, without pseudo labels. The camera's own bonnet is no class: whatever a
    network takes it for spreads upwards over the road, round by round. Default: 0.23 on the street benchmarks, 0 on
    images of your own and as published."""
    mixing: Literal["classes", "none"] = "classes"
    """classes: paste half of the classes of a source image onto each target image. none: target images alone."""
    source_weight: float = 1.0
    """Weight of the supervised source loss in stage II; 0 leaves source images out."""
    teacher: Literal["average", "student"] = "average"
    """Which weights label: the exponential moving average, or the student itself."""
    statistics: Literal["target", "running"] = "target"
    """Batch-norm statistics of the teaching network: of target images alone, or of both domains as training left
    them."""
    normalise_weights: bool = True
    """Divide the class weights of a batch by their mean over its labelled pixels. As published they are not, so the
    loss of a batch with rare classes counts up to 49 times; a network that starts from random weights diverges."""
    dropout: float = 0.2
    """Channel dropout rate of the student in stage II."""
    colour: float = 0.3
    """Strength of the colour jitter on what the student sees in stage II."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.keep_share <= 1:
            raise RunError(f"keep_share is {self.keep_share}; give a share in (0, 1]")
        for name in ("sure", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a probability in [0, 1]")
        for name in ("max_std", "source_weight", "colour"):
            if getattr(self, name) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.passes < 1:
            raise RunError(f"passes is {self.passes}; labelling needs at least one pass")
        for name in ("label_dropout", "dropout", "ignore_bottom"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a rate in [0, 1)")
        if self.mixing == "classes" and self.source_weight == 0:
            raise RunError("mixing='classes' pastes source images, so source_weight must not be 0")

    def published(self) -> EplcOptions:
        """The same with every choice of the published system that the default departs from."""
        selection = "mean" if self.selection == "percentile" else self.selection
        return replace(
            self,
            selection=selection,
            mixing="none",
            source_weight=0.0,
            teacher="student",
            statistics="running",
            normalise_weights=False,
            colour=0.0,
            ignore_bottom=0.0,
        )


class RectifiedObjective:
    """Rectified cross-entropy on pseudo labels, on mixed images where asked, beside the supervised source loss."""

    def __init__(
        self, term: SegmentationTerm, crop: tuple[int, int], options: EplcOptions, context: ObjectiveContext
    ) -> None:
        self.term, self.options = term, options
        self.source_balance = term.balance(crop, context)
        self.target_balance = term.balance(crop, context)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`; methods §3.3 and §4.2."""
        assert batch.target is not None
        assert batch.pseudo_label is not None
        assert batch.pseudo_weight is not None
        images, labels = batch.target, batch.pseudo_label
        weights = batch.pseudo_weight[:, None, None].expand(labels.shape)
        terms: dict[str, Tensor] = {}
        if batch.source is None or batch.source_label is None:
            logits = network(images)
        else:
            if self.options.mixing == "classes":
                images, labels, pasted = class_mix(
                    batch.source, batch.source_label, images, labels, self.term.num_classes, info.seed
                )
                weights = weights.masked_fill(pasted, 1.0)
            # One pass: both are normalised by the same batch statistics, those the running ones record.
            source, logits = _halves(network(torch.cat((batch.source, images))))
            supervised = self.term.of_logits(source, batch.source_label, self.source_balance)
            terms["loss/segmentation"] = self.options.source_weight * supervised
        logits = upsample_logits(logits, (labels.shape[-2], labels.shape[-1]))
        class_weights = self.target_balance(labels)
        if self.options.normalise_weights:
            class_weights = class_weights / _mean_weight(class_weights, labels)
        rectified = rectified_terms(logits, labels, class_weights, pixel_weights=weights)
        terms["loss/rectified_main"] = rectified.main_ce
        terms["loss/rectified_aux"] = 0.5 * rectified.aux_ce
        terms["loss/divergence"] = rectified.main_divergence + 0.5 * rectified.aux_divergence
        return terms

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Nothing of its own learns."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights."""
        return {"source": self.source_balance.state_dict(), "target": self.target_balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.source_balance.load_state_dict(state["source"])
        self.target_balance.load_state_dict(state["target"])


def _halves(logits: Logits) -> tuple[Logits, Logits]:
    """The first and the second half of a batch."""
    (aux_one, aux_two), (main_one, main_two) = logits.aux.chunk(2), logits.main.chunk(2)
    return Logits(aux_one, main_one), Logits(aux_two, main_two)


def _mean_weight(class_weights: Tensor, labels: Tensor) -> Tensor:
    """Mean class weight over the labelled pixels of int64 N×H×W labels; 1 where nothing is labelled."""
    valid = labels != IGNORE
    total = (class_weights[labels.clamp(max=len(class_weights) - 1)] * valid).sum()
    return torch.where(valid.any(), total / valid.sum().clamp(min=1), torch.ones_like(total))


def self_training_stage(ingredients: Ingredients, options: EplcOptions) -> StagePlan:
    """Stage II of EPLC."""
    preset, schedule = ingredients.preset, ingredients.preset.stages[1]
    # As published: more than 10 values of 19 classes, more than 4 of 9.
    values = PSEUDO_CROP_VALUES if ingredients.num_classes > 9 else ingredients.num_classes // 2
    # A pseudo label that is still all-255 shows one value: it takes its last draw, as a real one may have to.
    view = replace(training_view(ingredients, schedule, more_than_values=values), colour=options.colour)
    streams = {"target": ingredients.target(schedule.target_size, view)}
    if options.source_weight > 0:
        streams["source"] = ingredients.source(schedule.source_size, replace(view, seed=view.seed + 1))
    selection = None
    if options.selection == "percentile":
        pixels = preset.label_size[0] * preset.label_size[1]
        selection = PercentileSelection(options.keep_share, options.sure, min_pixels=max(1, pixels // FEW_PIXELS))
    rule = MonteCarloRule(
        num_classes=ingredients.num_classes,
        sizes=preset.label_views,
        label_size=preset.label_size,
        passes=options.passes,
        dropout=options.label_dropout,
        keep="all" if options.selection == "percentile" else options.selection,
        threshold=options.threshold,
        max_std=options.max_std,
        ignore_bottom=ingredients.bonnet if options.ignore_bottom is None else options.ignore_bottom,
    )
    return StagePlan(
        name="self-training",
        steps=schedule.steps,
        batch=schedule.batch,
        streams=streams,
        objective=partial(RectifiedObjective, segmentation_term(ingredients), schedule.crop, options),
        optimiser=sgd(preset, train_norm_affine=True),
        learning_rate=Rate(schedule.learning_rate, schedule.warmup, schedule.horizon),
        labels=LabelPlan(
            rule=rule,
            policy=StalenessPolicy(refresh=ingredients.refresh),
            selection=selection,
        ),
        ema_decay=preset.ema_decay if options.teacher == "average" else None,
        statistics=options.statistics,
        dropout=options.dropout,
        clip_norm=preset.clip_norm,
        plain_view=Whole(),
    )


def stages(ingredients: Ingredients, options: EplcOptions) -> tuple[StagePlan, ...]:
    """Stage I of MRNet, then self-training."""
    options = options.published() if ingredients.faithful else options
    return alignment_stage(ingredients, MrnetOptions()), self_training_stage(ingredients, options)


RECIPE = Recipe(
    name="eplc",
    summary="MRNet stage I, then pseudo labels corrected by Monte-Carlo dropout and rectified training (default)",
    schedules=2,
    stages=stages,
)
