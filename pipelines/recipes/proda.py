"""ProDA: prototypes, denoising on the fly, structure learning, distillation (methods §5; Zhang et al., CVPR 2021).

Four stages: warm-up (§5.0), denoising (§5.1 and §5.2, the paper's stage 1) and two of distillation (§5.3, its stages 2
and 3); what they learn from stands in :mod:`pipelines.recipes.proda_objectives`. The default differs from the published
system where that presumes pretrained weights or takes time from the student; ``faithful`` brings the published
behaviour back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

import torch

from actors.errors import RunError
from actors.protocols import LabelPlan, StagePlan
from actors.staleness import StalenessPolicy
from actors.storage import place
from models.denoising import (
    Regulariser,
)
from models.networks.build import Build
from models.networks.deeplab import DeepLabConfig
from models.networks.proda import Proda
from pipelines.benchmarks import Benchmark
from pipelines.choices import check_choices, decided
from pipelines.label_rules import ASSIGNMENTS, MEANS, SOFT, MonteCarloRule, PrototypeRule
from pipelines.recipes.optimisation import Rate, Sgd, sgd
from pipelines.recipes.proda_objectives import (
    DenoisingObjective,
    DistillationObjective,
    TargetViews,
    WarmUpObjective,
    given_prototypes,
)
from pipelines.recipes.recipe import Ingredients, Preset, Recipe, StageSchedule
from pipelines.recipes.supervised import segmentation_term
from pipelines.strong_view import StrongView
from pipelines.views import RandomCrop, Whole
from pipelines.weights import check_pretrained_backbone, load_pretrained_backbone

STEPS, HORIZON = 62_412, 90_000
"""Of every published stage: 84 epochs, and where its rate would have reached zero (Q-PD-5)."""
RATES = (2.5e-4, 1e-4, 6e-4, 6e-4)
"""Published base rates of the four stages."""
RESIZED_WIDTH = 2200 / 2048
"""Mean width to which training images of both domains are resized, of a whole target image's."""
RESIZED = (0.5, 1.5)
"""Bounds of the factor on that width."""
CROP = (896 / 2048, 512 / 1024)
"""Crop, of a whole target image."""
WEIGHT_DECAY = 2e-4
SMALL_SHARES = (0.5, 0.25, 0.125, 0.125)
"""Of the steps of a small preset. Published stages are equally long, but a random network has all to learn first."""
PROTOTYPE_MOMENTUM, LARGEST_MOMENTUM = 1e-4, 0.1
CHANNELS = 256


@dataclass(frozen=True)
class ProdaOptions:
    """What decides ProDA beyond schedule and size."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {
        "denoise": ("teacher", "student"),
        "kd": ("fixed", "published"),
        "translation": ("exact", "published"),
        "replay": ("ordered", "published"),
        "warmup_norms": ("train", "frozen"),
        "teacher": ("average", "student"),
        "statistics": ("target", "running"),
        "ignore_bottom": (None, 0.0),
    }
    """What an option that is left open stands for: in our default, and in the published system."""

    denoise: Literal["auto", "student", "teacher"] = "auto"
    """Who denoises soft labels with the prototypes. student: the student's step, by a forward pass of its average over
    the whole image, as published. teacher: whoever makes the labels, with the prototypes that come with the weights.
    auto: teacher, and student where labels are made once (--refresh once, --faithful)."""
    adversarial: float = 0.01
    """Weight of the discriminator's loss in the warm-up."""
    discriminator_rate: float = 1e-4
    """Learning rate of the discriminator."""
    strong_source: float = 0.0
    """Above 0, the warm-up learns from strongly augmented source images with this weight instead of from plain ones."""
    temperature: float | None = None
    """Multiplies distances to prototypes. Default: 1 for features of 256 channels, as published, and for others what
    makes up for distances that grow with the root of the channels."""
    momentum: float | None = None
    """Share of a new vector in a prototype. Default: as much as prototypes take over in a stage of published length
    with 1e-4, which it is there."""
    threshold: float = 0.0
    """Share of its class's probability that a denoised label must reach; 0 withholds none, as published."""
    cross_entropy: float = 0.1
    """Weight of cross-entropy in the symmetric one."""
    reverse: float = 1.0
    """Weight of reverse cross-entropy in the symmetric one."""
    regulariser: Regulariser = "mrkld"
    """mrkld: minus the mean logarithm of all probabilities. mrent: their negative entropy."""
    regular: float | None = None
    """Weight of the regulariser. Default: as published, 0 from SYNTHIA and 0.1 otherwise."""
    structure: float = 10.0
    """Weight of the structure loss between what prototypes say of the weak view and of the strong one."""
    average_mode: Literal["train", "eval"] = "train"
    """Mode of the average where the student denoises (Q-PD-3). train: it drops channels and normalises by its batch,
    as published. eval: neither."""
    prototypes: str | None = None
    """File with initial prototypes, a tensor C×256. Default: computed from all target images."""
    simclr: str | None = None
    """SimCLR backbone with which the first distillation begins, under a fresh head and an extra batch norm. Without
    one it goes on from the network of the stage before."""
    extra_norm: Literal["auto", "on", "off"] = "auto"
    """Whether the networks of distillation have a batch norm between backbone and head. auto: with --proda.simclr.
    on, without it: for weights in --init that have one."""
    sure: float = 0.95
    """Confidence that a hard label of a distillation stage must reach."""
    distillation: float = 1.0
    """Weight of the divergence from the network of the stage before."""
    kd: Literal["auto", "fixed", "published"] = "auto"
    """How it is measured (Q-PD-1). fixed: Kullback-Leibler. published: with a probability where its logarithm is meant.
    auto: fixed, and published with --faithful."""
    translation: Literal["auto", "exact", "published"] = "auto"
    """How maps follow a strong view that is moved sideways (Q-PD-6). published: too far by width over height. auto:
    exact, and published with --faithful."""
    replay: Literal["auto", "ordered", "published"] = "auto"
    """In which order maps follow a strong view that is moved twice (Q-PD-7). auto: that of the image, and a fixed one
    with --faithful."""
    grid: int | None = None
    """Pixels of the crop from one point of the target losses to the next. Default: 4 at full size, as published, and
    1 on small pictures."""
    warmup_norms: Literal["auto", "train", "frozen"] = "auto"
    """Batch norms in the warm-up. frozen, as published, presumes a pretrained backbone. auto: train, and frozen with
    --faithful."""
    teacher: Literal["auto", "average", "student"] = "auto"
    """Which weights are scored and label for the stage after: the exponential moving average, or the student itself.
    auto: average, and with --faithful the student, but for the denoising stage, which always has its average."""
    statistics: Literal["auto", "target", "running"] = "auto"
    """Their batch-norm statistics: of target images alone, or as training left them. auto: target, and running with
    --faithful."""
    ignore_bottom: float | None = None
    """Share of the image's height, from below, without pseudo labels, where the camera's own bonnet is. Default: 0.23
    on the street benchmarks, 0 on images of your own and with --faithful."""
    dropout: float = 0.1
    """Channel dropout rate."""
    max_label_age: int | None = None
    """Steps after which a label of the denoising stage is not used any more, until a teacher has made it anew."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            *("adversarial", "discriminator_rate", "strong_source", "cross_entropy", "reverse", "structure"),
            *("distillation", "regular"),
        ):
            if (getattr(self, name) or 0.0) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; a weight or rate is not negative")
        for name in ("threshold", "sure", "momentum"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a number in [0, 1]")
        for name in ("dropout", "ignore_bottom"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a rate in [0, 1)")
        if self.temperature is not None and not self.temperature > 0:
            raise RunError(f"temperature is {self.temperature}; give a number above 0")
        for name in ("grid", "max_label_age"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("prototypes", "simclr"):  # a run can be resumed from anywhere
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(place(getattr(self, name)).absolute()))
        if self.extra_norm == "off" and self.simclr is not None:
            raise RunError("extra_norm is off, but a SimCLR backbone needs it; leave one of them out")

    def resolved(self, faithful: bool) -> ProdaOptions:
        """The same with everything decided that the user left open."""
        return decided(self, faithful)


def stages(ingredients: Ingredients, options: ProdaOptions) -> tuple[StagePlan, ...]:
    """Warm-up, denoising, and distillation twice."""
    options = decide(options, ingredients)
    if options.extra_norm == "on" and options.simclr is None and ingredients.from_stage < 4:
        raise RunError(
            "extra_norm is on without a SimCLR backbone to put it behind; give --proda.simclr, or --from-stage 4 with "
            "weights that have one"
        )
    if ingredients.to_train:
        _check_files(options, ingredients)
    return (
        _warm_up(ingredients, options),
        _denoising(ingredients, options),
        _distillation(ingredients, options, 2),
        _distillation(ingredients, options, 3),
    )


def _check_files(options: ProdaOptions, ingredients: Ingredients) -> None:
    """Refuse a wrong file before anything starts, if a stage that is run reads it.

    Raises:
        RunError: it cannot be read or does not fit.
    """
    with torch.device("meta"):
        network = Build(ingredients.preset.network)()
    assert isinstance(network, Proda)
    if options.prototypes is not None and ingredients.from_stage <= 2:
        given_prototypes(options.prototypes, network)
    if options.simclr is not None and ingredients.from_stage <= 3:
        check_pretrained_backbone(options.simclr, network)


def decide(options: ProdaOptions, ingredients: Ingredients) -> ProdaOptions:
    """The same with everything decided that the user left open, as far as the run decides it.

    Raises:
        RunError: what was asked for does not go together.
    """
    preset, once = ingredients.preset, ingredients.refresh == "once"
    if once and options.denoise == "teacher":
        raise RunError(
            "denoise is teacher and labels are made once: they would stay what the first prototypes made of them; "
            "leave --refresh once out, or let the student denoise"
        )
    if once and options.max_label_age is not None:
        raise RunError(
            f"max_label_age is {options.max_label_age}, but labels of one round grow old by design; leave it or "
            "--refresh once out"
        )
    if once and options.denoise == "auto":
        options = replace(options, denoise="student")
    options = options.resolved(ingredients.faithful)
    momentum = PROTOTYPE_MOMENTUM * max(1.0, STEPS / preset.stages[1].steps)
    found = {
        "momentum": min(momentum, LARGEST_MOMENTUM),
        "temperature": (CHANNELS / preset.network.bottleneck_channels) ** 0.5,
        "regular": ingredients.regular,
        "grid": 4 if preset.name == "full" else 1,
        "ignore_bottom": ingredients.bonnet,
    }
    return replace(options, **{name: value for name, value in found.items() if getattr(options, name) is None})


def _views(ingredients: Ingredients, options: ProdaOptions, stage: int, domain: str = "target") -> TargetViews:
    """The views of a domain in a stage, counted from 0."""
    preset, schedule = ingredients.preset, ingredients.preset.stages[stage]
    assert options.translation != "auto"
    assert options.replay != "auto"
    assert options.grid is not None
    target = domain == "target"
    weak = RandomCrop(
        ingredients.seed + (1 if target else 0),
        schedule.crop,
        jitter=preset.jitter if target else preset.source_jitter,
        pixels=preset.network.pixels,
    )
    return TargetViews(
        weak,
        StrongView(ingredients.seed, options.translation, options.replay),
        schedule.target_size if target else schedule.source_size,
        (max(2, schedule.crop[0] // options.grid), max(2, schedule.crop[1] // options.grid)),
    )


def _stage(ingredients: Ingredients, options: ProdaOptions, stage: int, **more: Any) -> StagePlan:
    """What the stages share; ``more`` is a stage's own."""
    preset, schedule = ingredients.preset, ingredients.preset.stages[stage]
    views = _views(ingredients, options, stage), _views(ingredients, options, stage, "source")
    return StagePlan(
        steps=schedule.steps,
        batch=schedule.batch,
        streams={
            "source": ingredients.source(schedule.source_size, views[1].weak),
            "target": ingredients.target(schedule.target_size, views[0].weak),
        },
        learning_rate=Rate(schedule.learning_rate, schedule.warmup, schedule.horizon),
        starts_from="teacher",
        statistics="running" if options.statistics == "running" else "target",
        dropout=options.dropout,
        clip_norm=preset.clip_norm,
        plain_view=Whole(preset.network.pixels),
        norm_images=ingredients.norm_images_of(schedule),
        **{"ema_decay": preset.ema_decay if options.teacher == "average" else None, **more},
    )


def _sgd(ingredients: Ingredients, *, train_norm_affine: bool = True) -> Sgd:
    made = sgd(ingredients.preset, train_norm_affine=train_norm_affine)
    if ingredients.preset.name != "full":  # a random network has settings of its own
        return made
    return replace(made, weight_decay=WEIGHT_DECAY, nesterov=False)


def _warm_up(ingredients: Ingredients, options: ProdaOptions) -> StagePlan:
    preset, frozen = ingredients.preset, options.warmup_norms == "frozen"
    return _stage(
        ingredients,
        options,
        0,
        name="warm-up",
        objective=partial(
            WarmUpObjective,
            segmentation_term(ingredients),
            options,
            _views(ingredients, options, 0, "source"),
            2 * preset.discriminator_width,
            preset.stages[0].horizon,
        ),
        optimiser=_sgd(ingredients, train_norm_affine=not frozen),
        frozen_norms=frozen,
    )


def _denoising(ingredients: Ingredients, options: ProdaOptions) -> StagePlan:
    preset, views = ingredients.preset, _views(ingredients, options, 1)
    denoised = options.denoise == "teacher"
    assert options.temperature is not None
    assert options.grid is not None
    assert options.regular is not None
    assert options.ignore_bottom is not None
    width, height = preset.stages[1].target_size
    rule = PrototypeRule(
        num_classes=ingredients.num_classes,
        size=(width, height),
        label_size=(max(2, width // options.grid), max(2, height // options.grid)),
        feature_channels=preset.network.bottleneck_channels,
        denoised=denoised,
        temperature=options.temperature,
        threshold=options.threshold,
        ignore_bottom=options.ignore_bottom,
    )
    assert ingredients.reader is not None
    return _stage(
        ingredients,
        options,
        1,
        name="denoising",
        objective=partial(DenoisingObjective, segmentation_term(ingredients), options, views, ingredients.reader),
        # One group: no part of the network learns faster than another (Q-SH-1 does not apply).
        optimiser=replace(_sgd(ingredients), duplicates="once", head_multiplier=1.0),
        labels=LabelPlan(
            rule=rule,
            policy=StalenessPolicy(ingredients.refresh, options.max_label_age),
            raw_columns=(ASSIGNMENTS, MEANS) if denoised else (SOFT,),
        ),
        ema_decay=preset.ema_decay,
    )


def _distillation(ingredients: Ingredients, options: ProdaOptions, number: int) -> StagePlan:
    preset = ingredients.preset
    assert isinstance(preset.network, DeepLabConfig)
    begins_anew = number == 2 and (options.simclr is not None or options.extra_norm == "on")
    network = Build(replace(preset.network, extra_norm=True)) if begins_anew else None
    assert options.ignore_bottom is not None
    rule = MonteCarloRule(
        num_classes=ingredients.num_classes,
        sizes=(preset.stages[number].target_size,),
        label_size=preset.label_size,
        passes=1,
        dropout=0.0,
        keep="mean",
        threshold=options.sure,
        max_std=0.0,
        ignore_bottom=options.ignore_bottom,
    )
    return _stage(
        ingredients,
        options,
        number,
        name=f"distillation {number - 1}",
        objective=partial(
            DistillationObjective, segmentation_term(ingredients), options, _views(ingredients, options, number)
        ),
        optimiser=_sgd(ingredients),
        labels=LabelPlan(rule=rule, policy=StalenessPolicy("once")),
        network=network,
        initial=None
        if options.simclr is None or network is None
        else partial(load_pretrained_backbone, options.simclr),
        labelled_by="before",
        keeps_before=True,
    )


def fitted(preset: Preset, benchmark: Benchmark, own: ProdaOptions | None = None, faithful: bool = False) -> Preset:
    """Four stages, one head that reads RGB, whole images at full size (methods §2.4 to §2.6)."""
    assert isinstance(preset.network, DeepLabConfig)
    network = replace(
        preset.network,
        heads="proda",
        bottleneck_channels=min(CHANNELS, preset.network.bottleneck_channels),
        pixels="rgb_unit",
        conv_std=0.01 if preset.name == "full" else None,
    )
    if preset.name != "full":
        one, two = preset.stages
        ends = [0, *(round(share * preset.total_steps) for share in accumulate(SMALL_SHARES))]
        lengths = [end - begin for begin, end in pairwise(ends)]
        schedules = tuple(
            replace(stage, steps=steps, horizon=round(steps * HORIZON / STEPS))
            for stage, steps in zip((one, two, two, two), lengths, strict=True)
        )
        return replace(preset, network=network, stages=schedules, label_views=(preset.stages[1].target_size,))
    source, target = benchmark.shapes.whole or (benchmark.shapes.source, benchmark.shapes.target)
    width = RESIZED_WIDTH * target[0]
    schedule = StageSchedule(
        steps=STEPS,
        horizon=HORIZON,
        warmup=0,
        learning_rate=0.0,
        batch=4,
        source_size=source,
        target_size=target,
        crop=(round(CROP[0] * target[0]), round(CROP[1] * target[1])),
    )
    return replace(
        preset,
        network=network,
        stages=tuple(replace(schedule, learning_rate=rate) for rate in RATES),
        label_views=(target,),
        score_views=(target,),
        score_mirrored=False,
        jitter=(RESIZED[0] * width / target[0], RESIZED[1] * width / target[0]),
        source_jitter=(RESIZED[0] * width / source[0], RESIZED[1] * width / source[0]),
    )


RECIPE = Recipe(
    name="proda",
    summary="ProDA: warm-up, labels denoised by prototypes, and distillation twice",
    stages=stages,
    fitted=fitted,
    decide=decide,
    system="proda",
    networks=("proda",),
    published_term=(0.0, 1.0),
)
