"""From options to everything a run needs: data, streams, plan. No process is started here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.evaluator import Scorer
from actors.prior_estimate import SourceSight
from actors.protocols import LabelPlan, RunPlan, StagePlan, Stream, View
from actors.showcase import Showcase
from actors.storage import Place, place
from actors.watcher import Watcher
from models.networks.build import NETWORKS, PUBLISHED, Build, Config, named_config
from models.networks.segmenter import Heads
from pipelines.benchmarks import Benchmark, Domains, Published, benchmark, own_benchmark
from pipelines.class_frequencies import (
    sight_of,
    source_images,
    statistics_folder,
    target_prior,
    unseen,
    with_adjusted_labels,
    with_refined_classifiers,
)
from pipelines.datasets.dataset import Split
from pipelines.decode_cache import DecodeCache
from pipelines.options import AdaptOptions, DataOptions
from pipelines.prior_estimation import SourceImages, Survey
from pipelines.priors import published_names
from pipelines.pseudo_labels.given import check_given, with_given_labels
from pipelines.pseudo_labels.table import Table
from pipelines.recipes import recipe
from pipelines.recipes.few_labels import with_few_labels
from pipelines.recipes.light_student import with_light_student
from pipelines.recipes.recipe import Ingredients, Preset, Recipe, Size, preset
from pipelines.recipes.supervised import reference_stages
from pipelines.source_statistics import class_pixels
from pipelines.streams import ClassAwareOrder, SampleOrder, SampleStream, SplitReader
from pipelines.views import input_of
from pipelines.weights import check_initial, load_initial

WATCHED_IMAGES = 32
"""Target images on which label-free signals are measured."""


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
        makes: how the recipe makes pseudo labels, whether or not this run is given others; None where it makes none.
        decided: options of the recipe and of those it begins with, with everything decided that the user left open.
    """

    options: AdaptOptions
    benchmark: Benchmark
    domains: Domains
    preset: Preset
    plan: RunPlan
    references: dict[str, RunPlan]
    cache: DecodeCache
    makes: LabelPlan | None = None
    decided: Mapping[str, Any] = field(default_factory=dict)

    def open_given(self) -> Table | None:
        """The pseudo labels that the user gives instead of having teachers make them, or None.

        Raises:
            RunError: they cannot be read, or are of other classes or images.
        """
        path = self.options.pseudo_labels
        return None if path is None else check_given(path, self.domains.target, self.benchmark.classes.names)

    @property
    def labels(self) -> dict[int, LabelPlan]:
        """Label plans by stage index."""
        return {i: stage.labels for i, stage in enumerate(self.plan.stages) if stage.labels is not None}

    @property
    def learners(self) -> int:
        """Teachers that learn beside the student: one serves all stages."""
        return int(any(stage.teacher is not None for stage in self.plan.stages))

    @property
    def target_reader(self) -> SplitReader:
        """Target images without labels, for teachers and AdaBN."""
        return SplitReader(self.domains.target, self.cache)

    @property
    def prepare(self) -> Callable[[Tensor, nn.Module], Tensor]:
        """uint8 N×H×W×3 RGB and a network → what it reads; picklable."""
        return input_of

    @property
    def data(self) -> str:
        """``real`` or ``miniature``, wherever a score stands."""
        return "miniature" if self.options.on_miniature else "real"

    def source_sight(self, ignore_bottom: float) -> SourceImages:
        """Labelled source images, for estimates of what is taken for what; without their lowest rows."""
        return source_images(self.domains, self.preset, self.cache, ignore_bottom)

    def survey(self, ignore_bottom: float, source: SourceSight | None) -> Survey:
        """What asks a network how frequent classes look on the target images; without their lowest rows."""
        view, temperature = self.preset.label_views[-1], self.options.prior.temperature
        return Survey(self.target_reader, view, self.options.seed, ignore_bottom, temperature, source)

    def network_with(self, names: Iterable[str]) -> nn.Module:
        """That of the run's networks whose tensors have these names, on the ``meta`` device; the last if none has."""
        wanted = set(names)
        with torch.device("meta"):
            networks = [build() for build in self.plan.networks]
        return next((network for network in networks if network.state_dict().keys() == wanted), networks[-1])

    def label_rows(self) -> dict[int, int]:
        """Images in a label block, by stage: several blocks a teacher, or they label in lock-step."""
        images, teachers = len(self.domains.target), self.options.most_teachers
        return {i: plan.rule.layout.rows_per_block(images, 4 * teachers) for i, plan in self.labels.items()}

    @property
    def label_age(self) -> int | None:
        """Steps that labels may be old before more teachers are asked for; None where nothing is labelled."""
        if not self.labels:
            return None
        batch = self.plan.stages[min(self.labels)].batch
        return self.options.label_age or -(-len(self.domains.target) // batch)

    def make_scorer(self) -> Callable[[torch.device], Scorer]:
        """Builds the scorer of the validation split; picklable.

        Raises:
            RunError: there are no labels to score on.
        """
        if self.domains.validation is None:
            raise RunError(f"{self.options.target} has no labels, so there is nothing to score on; give --validation")
        return self._scorer_of(
            self.domains.validation, self.preset.score_views, self.preset.score_mirrored, self.preset.score_labels
        )

    def make_source_scorer(self) -> Callable[[torch.device], Scorer] | None:
        """Builds the scorer of the source images that are held out, in one view; picklable. None without any."""
        held_out = self.domains.held_out
        return None if held_out is None else self._scorer_of(held_out, (self.preset.stages[-1].source_size,), False)

    def _scorer_of(
        self, split: Split, views: tuple[Size, ...], mirrored: bool, label_size: Size | None = None
    ) -> Callable[[torch.device], Scorer]:
        reader = SplitReader(split, self.cache)
        return partial(_scorer, self.plan.networks, reader, self.prepare, views, mirrored, self.benchmark, label_size)

    def make_watcher(self) -> Callable[[torch.device], Watcher]:
        """Builds the watcher of target images; picklable."""
        classes = len(self.benchmark.classes)
        return partial(
            _watcher, self.plan.networks, self.target_reader, self.prepare, self.preset.score_views[0], classes
        )

    def make_showcase(self) -> Callable[[torch.device], Showcase]:
        """Builds the showcase; picklable. It shows images that are scored on, or target images where there are none."""
        scored = self.domains.validation
        reader = self.target_reader if scored is None else SplitReader(scored, self.cache)
        return partial(
            _showcase,
            self.plan.networks,
            reader,
            self.prepare,
            scored is not None,
            self.preset,
            None if self.options.pseudo_labels is not None else self.makes,
            self.options.seed,
        )


def resolve(options: AdaptOptions, *, to_train: bool = True) -> Setup:
    """Check the options and build the run; renders the miniature if it is not there yet.

    Args:
        options: of the run.
        to_train: False where only its data and network are wanted: weights to start from need not be there any more.

    Raises:
        RunError: an option names something that does not exist or cannot work.
        DataError: the data are not where or what they should be.
    """
    chosen = recipe(options.recipe)
    pair, open_data = choose_pair(options)
    size, student = sized_preset(options, pair, chosen), student_config(options, pair, chosen)
    domains = open_data()
    if options.target_labels is not None:
        domains = domains.with_target_labels(options.target_labels)
    if options.held_out:
        domains = domains.with_held_out(options.held_out)
    named = replace(
        options,
        name=options.name or _default_name(options, pair),
        source=_absolute(options.source),  # a run can be resumed from anywhere
        target=_absolute(options.target),
        validation=_absolute(options.validation),
        target_labels=_absolute(options.target_labels),
        init=_absolute(options.init),
        student_init=_absolute(options.student_init),
        pseudo_labels=_absolute(options.pseudo_labels),
        adjust_prior=_absolute_file(options.adjust_prior),
    )
    cache = DecodeCache(str(Path(options.data).absolute() / "decoded") if options.cache else None)
    ingredients = _ingredients(named, chosen, pair, size, domains, cache, to_train, student)
    stages = chosen.stages(ingredients, getattr(options, options.recipe))
    if ingredients.student is not None and not chosen.own_student:
        stages = with_light_student(stages, ingredients)
    for name in ("from_stage", "to_stage"):
        number = getattr(options, name)
        if number is not None and number > len(stages):
            flag = f"--{name.replace('_', '-')}"
            raise RunError(f"{flag} is {number}, but recipe {chosen.name} has {len(stages)} stages")
    own = (stage.network for stage in reversed(stages[: options.from_stage - 1]))
    network: Callable[[], nn.Module] = next((build for build in own if build is not None), Build(size.network))
    whole = False
    if to_train:
        with torch.device("meta"):
            whole = options.init is not None and check_initial(options.init, network())
            if options.student_init is not None:
                check_initial(options.student_init, Build(student or size.network)())
    if options.from_stage > 1 and to_train and not whole:
        raise RunError(f"--from-stage {options.from_stage} needs a whole network; {options.init} is a backbone alone")
    if whole and options.references == "always":
        raise RunError(
            "--references always trains source-only and oracle from the same start, and a whole network that has been "
            "trained before would make neither of them what it is called; leave it out, or start from a backbone"
        )
    prior = target_prior(named, pair, domains, stages)
    if prior is not None and not options.prior.refine_steps:
        stages = with_adjusted_labels(stages, prior, sight_of(prior, domains, size, cache, unseen(pair, stages)))
    makes = next((stage.labels for stage in reversed(stages) if stage.labels is not None), None)
    if domains.few is not None:
        stages = with_few_labels(stages, ingredients)
    every, stages = stages, stages[options.from_stage - 1 : options.to_stage]
    if prior is not None and options.prior.refine_steps:
        bottom = unseen(pair, every)
        sight = sight_of(prior, domains, size, cache, bottom)
        stages = with_refined_classifiers(named, every, stages, ingredients, prior, sight, bottom)
    if options.pseudo_labels is not None:
        stages = with_given_labels(stages)
    _check_batches(options, network, stages)
    if whole and options.student_init is None and any(_begins_on(stage, options.init) for stage in stages):
        raise RunError(
            f"{options.init} is a whole network, and stages after it begin anew: they would have random weights; give "
            "the backbone that they begin with as --student-init"
        )
    folder = named.folder()
    plan = _plan(named, size, network, stages, folder)
    if options.references == "always" and domains.validation is None:
        raise RunError("--references always trains runs to be scored, and there are no labels to score on")
    references = _references(named, size, ingredients, plan) if wants_references(options) and not whole else {}
    decided = {
        name: recipe(name).decide(getattr(options, name), ingredients) for name in (chosen.name, *chosen.begins_with)
    }
    return Setup(named, pair, domains, size, plan, references, cache, makes, decided)


def _ingredients(
    options: AdaptOptions,
    chosen: Recipe,
    pair: Benchmark,
    size: Preset,
    domains: Domains,
    cache: DecodeCache,
    to_train: bool,
    student: Config | None,
) -> Ingredients:
    """What a recipe builds its stages from."""
    # Stages that begin anew take the backbone of --init, but where that is another stage's network.
    backbone = options.init if student is not None or options.student_init is None else options.student_init
    return Ingredients(
        preset=size,
        num_classes=len(pair.classes.names),
        seed=options.seed,
        bonnet=pair.bonnet,
        sure=pair.sure,
        faithful=options.faithful,
        refresh=options.resolved_refresh,
        hard_pixels=options.hard_pixels,
        rare_weight=options.rare_weight,
        norm_affine=options.norm_affine,
        norm_images=options.norm_images,
        alignment=options.mrnet,
        term=chosen.term,
        published_term=chosen.published_term,
        reader=SplitReader(domains.target, cache),
        from_stage=options.from_stage,
        to_train=to_train,
        regular=pair.regular,
        student=student,
        backbone=None if backbone is None else partial(load_initial, backbone),
        student_backbone=None if options.student_init is None else partial(load_initial, options.student_init),
        given=options.pseudo_labels is not None,
        source=_opener(domains.source, options.seed, "source", cache),
        by_class=_by_class(domains.source, options, cache),
        target=_opener(domains.target, options.seed, "target", cache),
        target_labelled=None
        if domains.target_labelled is None
        else _opener(domains.target_labelled, options.seed, "target", cache),
        few=None if domains.few is None else _opener(domains.few, options.seed, "few", cache),
    )


def choose_pair(options: DataOptions) -> tuple[Benchmark, Callable[[], Domains]]:
    """What is adapted to what, and what opens (or renders) it; a wrong option should not cost a rendering.

    Raises:
        DataError: there is no such benchmark, or it cannot have so many classes.
    """
    if options.source is not None and options.target is not None:
        own, domains = own_benchmark(options.source, options.target, options.validation)
        return own, lambda: domains
    pair = benchmark(options.benchmark)
    if options.classes is not None:
        pair = pair.narrowed(options.classes)
    return pair, lambda: open_domains(options, pair)


def open_domains(options: DataOptions, pair: Published) -> Domains:
    """The published datasets, or the miniature of the preset's size."""
    if options.data_root is not None:
        return pair.open(options.data_root)
    size = "tiny" if options.resolved_preset == "tiny" else "mini"
    return pair.miniature(size, Path(options.data).absolute() / "miniature")


def sized_preset(options: AdaptOptions, pair: Benchmark, chosen: Recipe) -> Preset:
    """The preset of the options for a recipe, with the length, batch and image size that they ask for.

    Raises:
        RunError: there is no such preset, or what is asked for leaves too few steps or pixels.
    """
    size = _fitted(options, pair, chosen)
    if options.teacher_network is not None:
        size = replace(size, network=_named_network("teacher", options.teacher_network, size, chosen.networks))
    if options.label_scale is not None:
        size = size.with_label_scale(options.label_scale)
    elif size.name == "full" and options.faithful and chosen.large_labels and pair.shapes.published_labels is not None:
        size = replace(size, label_size=pair.shapes.published_labels)
    if options.steps is not None:
        size = size.with_steps(options.steps, chosen.schedules or len(size.stages))
    if options.batch is not None:
        size = size.with_batch(options.batch)
    if options.rate_scale != 1:
        size = size.with_rates(options.rate_scale)
    if options.rates != "auto":
        size = replace(size, rates=options.rates)
    if options.scale != 1:
        size = size.with_scale(options.scale)
        smallest = min(min(stage.crop) for stage in size.stages)
        if smallest < chosen.smallest_crop:
            raise RunError(
                f"--scale {options.scale:g} leaves crops {smallest} pixels wide or high; the networks of recipe "
                f"{chosen.name} need {chosen.smallest_crop}. Give a larger scale."
            )
    return size


def _fitted(options: AdaptOptions, pair: Benchmark, chosen: Recipe) -> Preset:
    """The preset of the options as a recipe runs it."""
    own = getattr(options, options.recipe)
    return chosen.fitted(preset(options.resolved_preset, pair), pair, own, options.faithful)


def student_config(options: AdaptOptions, pair: Benchmark, chosen: Recipe) -> Config | None:
    """The network of ``--student-network``; None where the recipe's own is all there is.

    Raises:
        RunError: there is no such network.
    """
    if options.student_network is None:
        return None
    return _named_network("student", options.student_network, _fitted(options, pair, chosen), tuple(NETWORKS))


def _named_network(role: str, name: str, size: Preset, families: tuple[Heads, ...]) -> Config:
    """A network by its name, in the size of a preset; one of the recipe's own family reads the same pixels.

    Raises:
        RunError: there is none, or it is of a family that the recipe cannot train.
    """
    try:
        found = named_config(name, size.network.num_classes, small=size.name != "full")
    except ValueError as error:
        raise RunError(f"--{role}-network: {error}") from error
    if found.heads not in families:
        able = [known for known, config in PUBLISHED.items() if config.heads in families]
        raise RunError(f"--{role}-network {name} is of a family that the recipe cannot train; give {' or '.join(able)}")
    backbones = {getattr(config, "backbone", None) for config in (found, size.network)}
    alike = found.heads == size.network.heads and len(backbones) == 1  # a VGG-16 reads what no ResNet does
    return replace(found, pixels=size.network.pixels) if alike else found


def _check_batches(options: AdaptOptions, network: Callable[[], nn.Module], stages: tuple[StagePlan, ...]) -> None:
    """Refuse batches that students cannot share, or that leave one fewer images than its network needs at a time.

    Raises:
        RunError: says which.
    """
    fewest = options.students if options.min_students is None else options.min_students
    for stage in stages:
        odd = next((count for count in range(options.students, fewest - 1, -1) if stage.batch % count), None)
        if odd is not None:
            elastic = "" if fewest == options.students else f" and whose every number from --min-students {fewest} on"
            raise RunError(
                f"stage {stage.name} has batches of {stage.batch}, which {odd} students cannot share "
                f"evenly; use a number of --students that divides {stage.batch}{elastic}"
            )
        network = stage.network or network
        needed = network.config.smallest_batch if isinstance(network, Build) else 1
        share = stage.batch // options.students
        if min(share, stage.norm_images or share) < needed:
            raise RunError(
                f"stage {stage.name} gives a student {share} images at a time and normalises "
                f"{stage.norm_images or share} together, and its network's batch norms need {needed}; give a larger "
                "--batch or --norm-images, or fewer --students"
            )


def _begins_on(stage: StagePlan, path: str | None) -> bool:
    """Whether a stage fills a fresh network from a file."""
    return isinstance(stage.initial, partial) and path is not None and path in stage.initial.args


def wants_references(options: AdaptOptions) -> bool:
    """Whether source-only and oracle are trained, too."""
    return options.references == "always" or (options.references == "auto" and options.on_miniature)


def _plan(
    options: AdaptOptions,
    size: Preset,
    network: Callable[[], nn.Module],
    stages: tuple[StagePlan, ...],
    folder: Place,
) -> RunPlan:
    return RunPlan(
        network=network,
        stages=stages,
        seed=options.seed,
        folder=str(folder),
        publish_every=size.publish_every,
        evaluate_every=size.evaluate_every,
        checkpoint_every=size.checkpoint_every,
        initial=None if options.init is None else partial(load_initial, options.init),
        precision=options.resolved_precision,
    )


def _references(options: AdaptOptions, size: Preset, ingredients: Ingredients, plan: RunPlan) -> dict[str, RunPlan]:
    """Source-only and, where target labels exist, the oracle: same network, steps and batch.

    A student of another network than its teacher's is compared with runs as long as its own stage.
    """
    seen, steps, start = ingredients, plan.total_steps, options.init
    last = plan.network_of(len(plan.stages) - 1)
    if ingredients.student is not None and last == Build(ingredients.student):
        begun = max(index for index, stage in enumerate(plan.stages) if stage.network is not None or index == 0)
        seen, steps = ingredients.seen_by_student(), sum(stage.steps for stage in plan.stages[begun:])
        start = options.student_init if plan.stages[begun].network is not None else options.init
    network = Build(seen.preset.network)
    domains = {"source_only": "source"}
    if ingredients.target_labelled is not None:
        domains["oracle"] = "target"
    return {
        name: _plan(
            replace(options, init=start),
            size,
            network,
            reference_stages(seen, domain, steps),
            place(plan.folder) / "references" / name,
        )
        for name, domain in domains.items()
    }


def _opener(split: Split, seed: int, name: str, cache: DecodeCache) -> Callable[[Size, View], Stream]:
    order = SampleOrder(len(split), seed, name)

    def open_stream(size: Size, view: View) -> Stream:
        return SampleStream(split=split, size=size, order=order, view=view, cache=cache)

    return open_stream


def _by_class(split: Split, options: AdaptOptions, cache: DecodeCache) -> Callable[[Size, View], Stream]:
    """Opens a stream whose images are drawn by class; their labels are counted when one is opened."""

    def open_stream(size: Size, view: View) -> Stream:
        order = ClassAwareOrder.of(class_pixels(split, statistics_folder(options)).presence, options.seed, "source")
        return SampleStream(split=split, size=size, order=order, view=view, cache=cache)

    return open_stream


def _scorer(
    networks: tuple[Callable[[], nn.Module], ...],
    reader: SplitReader,
    prepare: Callable[[Tensor, nn.Module], Tensor],
    views: tuple[Size, ...],
    mirrored: bool,
    pair: Benchmark,
    label_size: Size | None,
    device: torch.device,
) -> Scorer:
    return Scorer(
        networks,
        reader,
        prepare,
        views,
        mirrored,
        len(pair.classes.names),
        pair.protocols,
        device,
        label_size,
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(place(path).absolute())


def _absolute_file(name: str) -> str:
    """A file's absolute path; what is no file, such as the name of a published table, stays."""
    return str(place(name).absolute()) if name not in published_names() and place(name).is_file() else name


def _watcher(
    networks: tuple[Callable[[], nn.Module], ...],
    reader: SplitReader,
    prepare: Callable[[Tensor, nn.Module], Tensor],
    view: Size,
    num_classes: int,
    device: torch.device,
) -> Watcher:
    return Watcher(networks, reader, prepare, view, WATCHED_IMAGES, num_classes, device)


def _showcase(
    networks: tuple[Callable[[], nn.Module], ...],
    reader: SplitReader,
    prepare: Callable[[Tensor, nn.Module], Tensor],
    labelled: bool,
    size: Preset,
    plan: LabelPlan | None,
    seed: int,
    device: torch.device,
) -> Showcase:
    return Showcase(networks, reader, labelled, prepare, size.score_views, size.score_mirrored, plan, seed, device)


def _default_name(options: AdaptOptions, pair: Benchmark) -> str:
    name = re.sub(r"[^\w.-]+", "-", pair.name)
    return f"{name}-{options.recipe}-s{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
