"""EPLC: pseudo labels corrected by Monte-Carlo dropout, then rectified training (methods §4).

The default differs from the published system where that fails on target data in general; ``faithful`` brings the
published behaviour back. Each difference stands in :class:`EplcOptions` or
:class:`pipelines.recipes.self_training.SelfTrainingOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from actors.errors import RunError
from actors.protocols import StagePlan
from pipelines.benchmarks import Benchmark
from pipelines.label_rules import MonteCarloRule
from pipelines.recipes.mrnet import alignment_stage
from pipelines.recipes.recipe import Ingredients, Preset, Recipe
from pipelines.recipes.self_training import SelfTrainingOptions, bottom, self_training_stages
from pipelines.selections import PercentileSelection

FULL_STEPS = 100_000
FEW_PIXELS = 288
"""A class with fewer pixels in all labels than this part of one label has too few for a percentile."""


@dataclass(frozen=True)
class EplcOptions(SelfTrainingOptions):
    """What decides EPLC beyond schedule and size."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {
        **SelfTrainingOptions.OPEN,
        "selection": ("percentile", "mean"),
        "min_class": ("tested", "lowest"),
    }

    selection: Literal["auto", "percentile", "mean", "min", "std"] = "auto"
    """Which pixels a pseudo label keeps. mean, min, std: fixed thresholds on Monte-Carlo statistics, as published.
    percentile: the most confident share of every class, so that no class starves. auto: percentile, and mean with
    --faithful."""
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
    min_class: Literal["auto", "tested", "lowest"] = "auto"
    """Which class min selection stores (Q-EP-3). tested: the one whose lowest pass it tests. lowest: the one whose
    lowest pass is highest. auto: tested, and lowest with --faithful."""
    negative: float = 0.0
    """Weight of a loss on negative labels: classes that a pixel surely is not, made by the teachers beside the others.
    The published system makes them and does not use them. They more than double a label's size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_share <= 1:
            raise RunError(f"keep_share is {self.keep_share}; give a share in (0, 1]")
        for name in ("sure", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a probability in [0, 1]")
        for name in ("max_std", "negative"):
            if getattr(self, name) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.passes < 1:
            raise RunError(f"passes is {self.passes}; labelling needs at least one pass")
        if not 0 <= self.label_dropout < 1:
            raise RunError(f"label_dropout is {self.label_dropout}; give a rate in [0, 1)")


def labels_of(ingredients: Ingredients, options: EplcOptions) -> tuple[MonteCarloRule, PercentileSelection | None]:
    """How labels are made, and what is kept of them at reading."""
    assert options.selection != "auto"
    preset, selection = ingredients.preset, None
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
        ignore_bottom=bottom(ingredients, options),
        published_min=options.min_class == "lowest",
        negative=options.negative > 0,
    )
    return rule, selection


def stages(ingredients: Ingredients, options: EplcOptions) -> tuple[StagePlan, ...]:
    """Stage I of MRNet, then self-training."""
    options = options.resolved(ingredients.faithful)
    rounds = self_training_stages(ingredients, options, *labels_of(ingredients, options), negative=options.negative)
    return alignment_stage(ingredients), *rounds


def fitted(preset: Preset, benchmark: Benchmark, own: EplcOptions | None = None, faithful: bool = False) -> Preset:
    """At full size the published system trains its second stage for 100 000 steps."""
    one, two = preset.stages
    return replace(preset, stages=(one, replace(two, steps=FULL_STEPS))) if preset.name == "full" else preset


RECIPE = Recipe(
    name="eplc",
    summary="MRNet stage I, then pseudo labels corrected by Monte-Carlo dropout and rectified training (default)",
    stages=stages,
    begins_with=("mrnet",),
    fitted=fitted,
)
