"""The target's class frequencies in the stages of a run: labels adjusted to them, classifiers refined by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actors.errors import RunError
from actors.prior_estimate import PriorPlan
from actors.protocols import StagePlan
from pipelines.benchmarks import Benchmark, Domains
from pipelines.decode_cache import DecodeCache
from pipelines.options import AdaptOptions
from pipelines.prior_estimation import SourceImages, Survey, prior_plan
from pipelines.recipes.recipe import Ingredients, Preset
from pipelines.recipes.refinement import refinement
from pipelines.streams import SplitReader


def statistics_folder(options: AdaptOptions) -> Path | None:
    """Where counts of labels are kept."""
    return Path(options.data).absolute() if options.cache else None


def target_prior(
    options: AdaptOptions, pair: Benchmark, domains: Domains, stages: tuple[StagePlan, ...]
) -> PriorPlan | None:
    """The class frequencies of the target that labels, or classifiers, are adjusted to; None where nothing is.

    Raises:
        RunError: there is nothing to adjust, or no such table or file.
    """
    wanted = options.resolved_adjust_prior
    if wanted is None:
        return None
    if not options.prior.refine_steps:
        first = next((number for number, stage in enumerate(stages, 1) if stage.labels is not None), None)
        nothing = None
        if options.pseudo_labels is not None:
            nothing = "--pseudo-labels are taken as they are"
        elif first is None:
            nothing = f"recipe {options.recipe} makes no pseudo labels; run.py evaluate and predict adjust without any"
        elif first < options.from_stage:
            nothing = f"of the stages with pseudo labels the first is adjusted, {first}, and the run begins after it"
        if nothing is not None and options.adjust_prior == "auto":
            return None
        if nothing is not None:
            raise RunError(f"--adjust-prior {wanted} would change nothing: {nothing}. Leave it out")
    folder, bottom = statistics_folder(options), unseen(pair, stages)
    return prior_plan(wanted, options.prior, pair.classes, domains.source, folder, bottom)


def unseen(pair: Benchmark, stages: tuple[StagePlan, ...]) -> float:
    """Share of the images' height, from below, that tells nothing of class frequencies: where there are no labels."""
    labels = next((stage.labels for stage in stages if stage.labels is not None), None)
    return pair.bonnet if labels is None else getattr(labels.rule, "ignore_bottom", 0.0)


def sight_of(
    prior: PriorPlan, domains: Domains, size: Preset, cache: DecodeCache, ignore_bottom: float
) -> SourceImages | None:
    """Labelled source images, where an estimate needs to see what is taken for what on them."""
    if prior.target is not None or prior.method != "confusion":
        return None
    return source_images(domains, size, cache, ignore_bottom)


def source_images(domains: Domains, size: Preset, cache: DecodeCache, ignore_bottom: float) -> SourceImages:
    """Labelled source images at the last stage's size."""
    return SourceImages(SplitReader(domains.source, cache), size.stages[-1].source_size, ignore_bottom)


def with_adjusted_labels(
    stages: tuple[StagePlan, ...], prior: PriorPlan, sight: SourceImages | None
) -> tuple[StagePlan, ...]:
    """The stages of a recipe with the first labels adjusted to the target's class frequencies.

    Labels after the first are made by networks that have learned from adjusted ones: to adjust them, too, would count
    the same frequencies twice.
    """
    first = next(number for number, stage in enumerate(stages) if stage.labels is not None)
    labels = stages[first].labels
    assert labels is not None
    return (
        *stages[:first],
        replace(stages[first], labels=replace(labels, prior=prior, source=sight)),
        *stages[first + 1 :],
    )


def with_refined_classifiers(
    options: AdaptOptions,
    every: tuple[StagePlan, ...],
    run: tuple[StagePlan, ...],
    ingredients: Ingredients,
    prior: PriorPlan,
    sight: SourceImages | None,
    bottom: float,
) -> tuple[StagePlan, ...]:
    """Of all stages of a recipe those that are run, and refinement before the first that has labels.

    Raises:
        RunError: that one lies before those that are run.
    """
    reader, asked = ingredients.reader, options.prior
    assert reader is not None
    survey = Survey(reader, ingredients.preset.label_views[-1], options.seed, bottom, prior.temperature, sight)
    at, stage = refinement(every, ingredients, prior, survey, asked.refine_steps, asked.refine_rate, asked.refine_over)
    place = at - (options.from_stage - 1)
    if place > len(run):  # the run ends before it
        return run
    if place < 0:
        raise RunError(
            f"refinement comes before stage {at + 1}, and --from-stage {options.from_stage} is after that; leave "
            "--prior.refine-steps out, or begin earlier"
        )
    return (*run[:place], stage, *run[place:])
