"""From options to everything a run needs: data, streams, plan. No process is started here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from actors.errors import RunError
from actors.evaluator import Scorer
from actors.protocols import LabelPlan, RunPlan, StagePlan, Stream, View
from models.networks.deeplab import DeepLab, DeepLabConfig
from pipelines.benchmarks import Benchmark, Domains, benchmark
from pipelines.datasets.dataset import Split
from pipelines.decode_cache import DecodeCache
from pipelines.options import AdaptOptions
from pipelines.recipes import recipe
from pipelines.recipes.recipe import Ingredients, Preset, Size, preset
from pipelines.recipes.supervised import reference_stages
from pipelines.streams import SampleOrder, SampleStream, SplitReader
from pipelines.views import network_input

REFERENCES = ("source_only", "oracle")


@dataclass(frozen=True)
class Setup:
    """A run, resolved.

    Attributes:
        options: as given, with a name.
        benchmark: classes and protocols.
        domains: the splits.
        preset: schedule and size.
        plan: what the students run.
        references: plans of the runs that involve no method, by name; empty when none are wanted.
        cache: decoded images.
    """

    options: AdaptOptions
    benchmark: Benchmark
    domains: Domains
    preset: Preset
    plan: RunPlan
    references: dict[str, RunPlan]
    cache: DecodeCache

    @property
    def labels(self) -> dict[int, LabelPlan]:
        """Label plans by stage index."""
        return {i: stage.labels for i, stage in enumerate(self.plan.stages) if stage.labels is not None}

    @property
    def target_reader(self) -> SplitReader:
        """Target images without labels, for teachers and AdaBN."""
        return SplitReader(self.domains.target, self.cache)

    @property
    def data(self) -> str:
        """``real`` or ``miniature``, wherever a score stands."""
        return "real" if self.options.data_root else "miniature"

    def label_rows(self) -> dict[int, int]:
        """Images in a label block, by stage: several blocks a teacher, or they label in lock-step."""
        images, teachers = len(self.domains.target), self.options.teachers
        return {i: plan.rule.layout.rows_per_block(images, 4 * teachers) for i, plan in self.labels.items()}

    def make_scorer(self) -> Callable[[torch.device], Scorer]:
        """Builds the scorer of the validation split; picklable."""
        return partial(
            _scorer,
            self.plan.network,
            SplitReader(self.domains.validation, self.cache),
            self.preset,
            self.benchmark,
        )


def resolve(options: AdaptOptions) -> Setup:
    """Check the options and build the run; renders the miniature if it is not there yet.

    Raises:
        RunError: an option names something that does not exist or cannot work.
        DataError: the data are not where or what they should be.
    """
    chosen = recipe(options.recipe)
    pair = benchmark(options.benchmark)
    size = preset(options.resolved_preset, pair)
    if options.steps is not None:
        size = size.with_steps(options.steps, chosen.schedules)
    domains = open_domains(options, pair)
    named = options if options.name else replace(options, name=_default_name(options))
    cache = DecodeCache(str(Path(options.data).absolute() / "decoded") if options.cache else None)
    ingredients = Ingredients(
        preset=size,
        num_classes=len(pair.classes.names),
        seed=options.seed,
        faithful=options.faithful,
        refresh=options.resolved_refresh,
        source=_opener(domains.source, options.seed, "source", cache),
        target=_opener(domains.target, options.seed, "target", cache),
        target_labelled=None
        if domains.target_labelled is None
        else _opener(domains.target_labelled, options.seed, "target", cache),
    )
    stages = chosen.stages(ingredients, getattr(options, options.recipe))
    for stage in stages:
        if stage.batch % options.students:
            raise RunError(
                f"stage {stage.name} has batches of {stage.batch}, which {options.students} students cannot share "
                f"evenly; use a number of --students that divides {stage.batch}"
            )
    folder = named.folder()
    plan = _plan(named, size, stages, folder)
    references = _references(named, size, ingredients, plan) if wants_references(options) else {}
    return Setup(named, pair, domains, size, plan, references, cache)


def open_domains(options: AdaptOptions, pair: Benchmark) -> Domains:
    """The real datasets, or the miniature of the preset's size."""
    if options.data_root is not None:
        return pair.open(options.data_root)
    size = "tiny" if options.resolved_preset == "tiny" else "mini"
    return pair.miniature(size, Path(options.data).absolute() / "miniature")


def wants_references(options: AdaptOptions) -> bool:
    """Whether source-only and oracle are trained, too."""
    return options.references == "always" or (options.references == "auto" and options.data_root is None)


def _plan(options: AdaptOptions, size: Preset, stages: tuple[StagePlan, ...], folder: Path) -> RunPlan:
    return RunPlan(
        network=partial(build_network, size.network),
        stages=stages,
        seed=options.seed,
        folder=str(folder),
        publish_every=size.publish_every,
        evaluate_every=size.evaluate_every,
        checkpoint_every=size.checkpoint_every,
    )


def _references(options: AdaptOptions, size: Preset, ingredients: Ingredients, plan: RunPlan) -> dict[str, RunPlan]:
    """Source-only and, where target labels exist, the oracle: same network, steps and batch."""
    domains = {"source_only": "source"}
    if ingredients.target_labelled is not None:
        domains["oracle"] = "target"
    return {
        name: _plan(
            options,
            size,
            reference_stages(ingredients, domain, plan.total_steps),
            Path(plan.folder) / "references" / name,
        )
        for name, domain in domains.items()
    }


def build_network(config: DeepLabConfig) -> nn.Module:
    """A freshly initialised network."""
    return DeepLab(config)


def _opener(split: Split, seed: int, name: str, cache: DecodeCache) -> Callable[[Size, View], Stream]:
    order = SampleOrder(len(split), seed, name)

    def open_stream(size: Size, view: View) -> Stream:
        return SampleStream(split=split, size=size, order=order, view=view, cache=cache)

    return open_stream


def _scorer(
    network: Callable[[], nn.Module],
    reader: SplitReader,
    size: Preset,
    pair: Benchmark,
    device: torch.device,
) -> Scorer:
    return Scorer(
        network,
        reader,
        network_input,
        size.score_views,
        size.score_mirrored,
        len(pair.classes.names),
        pair.protocols,
        device,
    )


def _default_name(options: AdaptOptions) -> str:
    return f"{options.benchmark}-{options.recipe}-s{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
