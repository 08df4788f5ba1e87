"""BiSeNet with median pseudo labels and meta pseudo labels (methods §6): a fast student, and a teacher that learns.

Three stages: adversarial training (§6.1), the same with class-wise median labels of the network before (§6.2), and meta
pseudo labels (§6.3), where the teacher is trained by how well the student does. What they learn from stands in
:mod:`pipelines.recipes.meta_objectives`. The default differs from the published system where that presumes pretrained
weights or is a mistake; ``faithful`` brings the published behaviour back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

from actors.errors import RunError
from actors.protocols import LabelPlan, StagePlan
from actors.staleness import StalenessPolicy
from models.networks.bisenet import BiSeNetConfig
from models.networks.build import Build, named_config
from models.networks.segmenter import Pixels
from pipelines.benchmarks import Benchmark
from pipelines.choices import check_choices, decided
from pipelines.label_rules import MedianRule
from pipelines.recipes.meta_objectives import (
    REWARD,
    AdversarialObjective,
    AlternatingObjective,
    OwnLabels,
    TeacherObjective,
)
from pipelines.recipes.optimisation import Rate, Sgd, sgd
from pipelines.recipes.recipe import Ingredients, Preset, Recipe, StageSchedule
from pipelines.recipes.supervised import segmentation_term, training_view
from pipelines.views import RandomCrop, Whole

EPOCHS, EPOCH = 50, 125
"""Of every published stage, and iterations of one: 500 images in batches of four."""
RATES = (2.5e-2, 1.25e-2, 2.5e-4)
"""Published rates of the three stages; of the last one the student's."""
TEACHER_RATE = 1.25e-2
SMALL_TEACHER_SHARE = 0.1
"""Of the student's rate on small presets, where the student learns as fast as in every other stage."""
WEIGHT_DECAY = 1e-4
SMALL_SHARES = (0.4, 0.3, 0.3)
"""Of the steps of a small preset. Published stages are equally long, but a random network has all to learn first."""


@dataclass(frozen=True)
class MetaPseudoLabelsOptions:
    """What decides BiSeNet's systems beyond schedule and size."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {
        "teaching": ("asynchronous", "alternating"),
        "thresholds": ("class", "published"),
        "pixels": ("imagenet", "published"),
        "restart": ("changed", "always"),
        "labels_by": ("average", "teacher"),
        "teacher_adversarial": (0.001, 1.0),
        "teacher_discriminator": ("teacher", "student"),
        "noise": (25.0, 1.0),
        "noise_share": (0.05, 0.5),
        "scored": ("average", "student"),
        "statistics": ("target", "running"),
        "ignore_bottom": (None, 0.0),
    }
    """What an option that is left open stands for: in our default, and in the published system."""

    teaching: Literal["auto", "asynchronous", "alternating"] = "auto"
    """How the teacher of the last stage learns. alternating: inside the student's step, on the same batch, which it has
    just labelled, as published. asynchronous: in a process of its own, beside the student, whose losses it hears of;
    other teachers label with its newest weights. auto: asynchronous, and alternating where labels are made once
    (--refresh once, --faithful)."""
    discriminator: Literal["dsc", "fcd"] = "dsc"
    """dsc: depth-wise separable, 0.19 million weights. fcd: fully convolutional, 2.78 million."""
    adversarial: float = 0.001
    """Weight of the discriminator's loss."""
    discriminator_rate: float = 1e-4
    """Learning rate of the discriminators' Adam."""
    cap: float = 0.9
    """Confidence above which a pixel keeps its label whatever its class's median."""
    thresholds: Literal["auto", "class", "published"] = "auto"
    """How a class finds its median (Q-BI-1). published: at its place in a list that grows with every absent class.
    auto: class, and published with --faithful."""
    pixels: Literal["auto", "imagenet", "published"] = "auto"
    """What the network reads (Q-BI-4). imagenet: RGB, normalised as the backbone's pretraining was. published: BGR
    minus Cityscapes' RGB mean, and minus 128 on the source. auto: imagenet, and published with --faithful."""
    restart: Literal["auto", "changed", "always"] = "auto"
    """Whether the second and the third stage begin with a fresh network (on the backbone of --init). changed: only a
    network of another kind than the one before. auto: changed, and always with --faithful, which presumes a pretrained
    backbone."""
    teacher_rate: float | None = None
    """Learning rate of the teacher in the last stage. Default: 0.0125 at full size, as published, and a tenth of the
    student's on small presets."""
    labels_by: Literal["auto", "average", "teacher"] = "auto"
    """Whose labels student and teacher learn from in the last stage: the teacher's exponential moving average, or the
    teacher itself, as published. auto: average, and teacher with --faithful."""
    teacher_adversarial: float | None = None
    """Weight of the teacher's adversarial loss (Q-BI-8). Default: 0.001, and 1 with --faithful."""
    teacher_discriminator: Literal["auto", "teacher", "student"] = "auto"
    """Whose maps the teacher's discriminator learns from (Q-BI-8). auto: the teacher's, and the student's with
    --faithful."""
    noise: float | None = None
    """Standard deviation of the noise under which the teacher shall say the same, in gray levels of 255 (Q-BI-8).
    Default: 25, and 1 with --faithful."""
    noise_share: float | None = None
    """Share of the teacher's steps with noise. Default: 0.05, and 0.5 with --faithful: on a miniature half of the steps
    cost a teacher that is not pretrained ten points of mIoU, a twentieth one."""
    scored: Literal["auto", "average", "student"] = "auto"
    """Which weights are scored and label for the stage after: the exponential moving average, or the network itself.
    auto: average, and student with --faithful."""
    statistics: Literal["auto", "target", "running"] = "auto"
    """Their batch-norm statistics: of target images alone, or as training left them. auto: target, and running with
    --faithful."""
    ignore_bottom: float | None = None
    """Share of the image's height, from below, without pseudo labels, where the camera's own bonnet is. Default: 0.23
    on the street benchmarks, 0 on images of your own and with --faithful."""
    max_label_age: int | None = None
    """Steps after which a label of the asynchronous stage is not used any more, until a teacher has made it anew."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("adversarial", "discriminator_rate", "teacher_rate", "teacher_adversarial", "noise"):
            if (getattr(self, name) or 0.0) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; a weight, rate or deviation is not negative")
        for name in ("cap", "noise_share"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a number in [0, 1]")
        if not 0 <= (self.ignore_bottom or 0.0) < 1:
            raise RunError(f"ignore_bottom is {self.ignore_bottom}; give a share in [0, 1)")
        if self.max_label_age is not None and self.max_label_age < 1:
            raise RunError(f"max_label_age is {self.max_label_age}; give at least 1")

    def resolved(self, faithful: bool) -> MetaPseudoLabelsOptions:
        """The same with everything decided that the user left open."""
        return decided(self, faithful)


def decide(options: MetaPseudoLabelsOptions, ingredients: Ingredients) -> MetaPseudoLabelsOptions:
    """The same with everything decided that the user left open, as far as the run decides it.

    Raises:
        RunError: what was asked for does not go together.
    """
    once = ingredients.refresh == "once"
    if once and options.teaching == "asynchronous":
        raise RunError(
            "teaching is asynchronous and labels are made once (--refresh once, --faithful, --pseudo-labels): a "
            "teacher that learns labels anew all the time; add --refresh continuous, or let them alternate"
        )
    if once and options.teaching == "auto":
        options = replace(options, teaching="alternating")
    options = options.resolved(ingredients.faithful)
    if options.teaching == "alternating" and options.max_label_age is not None:
        raise RunError(
            f"max_label_age is {options.max_label_age}, but alternating teachers label the very batch that is learned "
            "from; leave it out"
        )
    if options.teaching == "asynchronous" and options.teacher_discriminator == "student":
        raise RunError(
            "teacher_discriminator is student, but an asynchronous teacher sees its own maps alone; leave it out, or "
            "let them alternate"
        )
    preset = ingredients.preset
    full = preset.name == "full"
    rate = TEACHER_RATE if full else SMALL_TEACHER_SHARE * preset.stages[2].learning_rate
    found: dict[str, Any] = {"teacher_rate": rate, "ignore_bottom": ingredients.bonnet}
    return replace(options, **{name: value for name, value in found.items() if getattr(options, name) is None})


def stages(ingredients: Ingredients, options: MetaPseudoLabelsOptions) -> tuple[StagePlan, ...]:
    """Adversarial training, median labels, meta pseudo labels."""
    options = decide(options, ingredients)
    return (
        _stage(ingredients, options, 0, name="adversarial"),
        _median(ingredients, options),
        _meta(ingredients, options),
    )


def _median(ingredients: Ingredients, options: MetaPseudoLabelsOptions) -> StagePlan:
    policy = StalenessPolicy("once")
    return _stage(
        ingredients,
        options,
        1,
        name="median labels",
        labels=LabelPlan(rule=_rule(ingredients, options), policy=policy),
        labelled_by="before",
        keeps_before=True,
        **_network(ingredients, options, changed=False),
    )


def _meta(ingredients: Ingredients, options: MetaPseudoLabelsOptions) -> StagePlan:
    preset = ingredients.preset
    student = ingredients.student
    seen = ingredients if student is None else ingredients.seen_by_student()
    more = _network(seen, options, changed=student is not None and student != preset.network)
    rule, view = _rule(ingredients, options), _view(ingredients, options, 2, "target")
    assert options.teacher_rate is not None
    schedule, full = preset.stages[2], preset.name == "full"
    # H is made of the student's rate; a random network's would make it a thousand times as large as it ever was.
    student_rate = _rate(schedule if full else replace(schedule, learning_rate=RATES[2]), full)
    teacher_rate = _rate(replace(schedule, learning_rate=options.teacher_rate), full)
    term, width = segmentation_term(ingredients), _width(preset)
    decay = preset.ema_decay if options.labels_by == "average" else None
    if ingredients.given:
        labels = LabelPlan(rule=rule, policy=StalenessPolicy("once"))
        return _stage(seen, options, 2, name="meta pseudo labels", labels=labels, **more)
    if options.teaching == "alternating":
        objective = partial(
            AlternatingObjective,
            term,
            options,
            width,
            _constant(options.discriminator_rate),
            OwnLabels(rule, view),
            (_pixels(seen.preset), _pixels(preset)),
            _sgd(ingredients),
            (student_rate, teacher_rate),
            preset.clip_norm,
            decay,
        )
        return _stage(seen, options, 2, name="meta pseudo labels", objective=objective, keeps_before=True, **more)
    teacher = _stage(
        ingredients,
        options,
        2,
        name="teacher",
        objective=partial(TeacherObjective, term, options, width, OwnLabels(rule, view), student_rate, schedule.steps),
        learning_rate=teacher_rate,
        ema_decay=decay,
    )
    return _stage(
        seen,
        options,
        2,
        name="meta pseudo labels",
        labels=LabelPlan(rule=rule, policy=StalenessPolicy(ingredients.refresh, options.max_label_age)),
        labelled_by="teacher",
        keeps_before=True,
        teacher=teacher,
        reward=REWARD,
        **more,
    )


def _network(ingredients: Ingredients, options: MetaPseudoLabelsOptions, *, changed: bool) -> dict[str, Any]:
    """A fresh network at a stage's beginning, where it has one."""
    if not changed and options.restart == "changed":
        return {}
    return {"network": Build(ingredients.preset.network), "initial": ingredients.backbone}


def _stage(ingredients: Ingredients, options: MetaPseudoLabelsOptions, number: int, **more: Any) -> StagePlan:
    """What the stages share; ``more`` is a stage's own."""
    preset, schedule = ingredients.preset, ingredients.preset.stages[number]
    full = preset.name == "full"
    # The discriminators' rate follows the schedule but for the last stage (methods §6.1, §6.3).
    critic: Callable[[int], float] = _constant(options.discriminator_rate)
    if number < 2:
        critic = _rate(replace(schedule, learning_rate=options.discriminator_rate, warmup=0), full)
    shared: dict[str, Any] = {
        "steps": schedule.steps,
        "batch": schedule.batch,
        "streams": {
            "source": ingredients.source(schedule.source_size, _view(ingredients, options, number, "source")),
            "target": ingredients.target(schedule.target_size, _view(ingredients, options, number, "target")),
        },
        "objective": partial(AdversarialObjective, segmentation_term(ingredients), options, _width(preset), critic),
        "optimiser": _sgd(ingredients),
        "learning_rate": _rate(schedule, full),
        "starts_from": "teacher",
        "ema_decay": preset.ema_decay if options.scored == "average" else None,
        "statistics": "running" if options.statistics == "running" else "target",
        "clip_norm": preset.clip_norm,
        "plain_view": Whole(preset.network.pixels),
        "norm_images": ingredients.norm_images_of(schedule),
    }
    return StagePlan(**{**shared, **more})


def _view(ingredients: Ingredients, options: MetaPseudoLabelsOptions, number: int, domain: str) -> Whole | RandomCrop:
    """Whole images with --faithful, as published (methods §2.4), else jitter, crop and mirror."""
    preset, schedule = ingredients.preset, ingredients.preset.stages[number]
    pixels, source = _pixels(preset)[domain], domain == "source"
    if ingredients.faithful:
        return Whole(pixels)
    view = replace(training_view(ingredients, schedule), pixels=pixels)
    return replace(view, jitter=preset.source_jitter) if source else replace(view, seed=view.seed + 1)


def _pixels(preset: Preset) -> dict[str, Pixels]:
    """What its network reads of either domain."""
    own = preset.network.pixels
    return PUBLISHED_PIXELS if own == PUBLISHED_PIXELS["target"] else {"source": own, "target": own}


PUBLISHED_PIXELS: dict[str, Pixels] = {"source": "bgr_gray", "target": "bgr_city"}
"""Means that the published code subtracts, each from one of its data sets."""


def _rule(ingredients: Ingredients, options: MetaPseudoLabelsOptions) -> MedianRule:
    assert options.ignore_bottom is not None
    return MedianRule(
        num_classes=ingredients.num_classes,
        size=ingredients.preset.label_size,
        cap=options.cap,
        published=options.thresholds == "published",
        ignore_bottom=options.ignore_bottom,
    )


def _width(preset: Preset) -> int:
    """Channels of a discriminator's first layer: 64 as published."""
    return 2 * preset.discriminator_width


def _rate(schedule: StageSchedule, full: bool) -> Rate:
    """Decay in epochs at full size, as published, and step by step in a short stage."""
    return Rate(schedule.learning_rate, schedule.warmup, schedule.horizon, held=EPOCH if full else 1)


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: int) -> float:
        return self.value


def _constant(value: float) -> _Constant:
    """The same rate at every step."""
    return _Constant(value)


def _sgd(ingredients: Ingredients) -> Sgd:
    made = sgd(ingredients.preset, train_norm_affine=True)
    if ingredients.preset.name != "full":  # a random network has settings of its own
        return made
    return replace(made, weight_decay=WEIGHT_DECAY, nesterov=False)


def fitted(
    preset: Preset, benchmark: Benchmark, own: MetaPseudoLabelsOptions | None = None, faithful: bool = False
) -> Preset:
    """Three stages, a BiSeNet that looks at an image once (methods §2.3, §2.4, §2.6)."""
    network = named_config("bisenet18", preset.network.num_classes, small=preset.name != "full")
    assert isinstance(network, BiSeNetConfig)
    if (own or MetaPseudoLabelsOptions()).resolved(faithful).pixels == "published":
        network = replace(network, pixels=PUBLISHED_PIXELS["target"])
    if preset.name != "full":
        one, two = preset.stages
        ends = [0, *(round(share * preset.total_steps) for share in accumulate(SMALL_SHARES))]
        lengths = [end - begin for begin, end in pairwise(ends)]
        stages = tuple(
            replace(stage, steps=steps, horizon=round(1.1 * steps))
            for stage, steps in zip((one, two, two), lengths, strict=True)
        )
        return replace(preset, network=network, stages=stages, label_views=(preset.label_size,))
    shapes = benchmark.shapes
    schedule = StageSchedule(
        steps=EPOCHS * EPOCH,
        horizon=EPOCHS * EPOCH,
        warmup=0,
        learning_rate=0.0,
        batch=4,
        source_size=shapes.source,
        target_size=shapes.target,
        crop=shapes.crops[0],
    )
    return replace(
        preset,
        network=network,
        stages=tuple(replace(schedule, learning_rate=rate) for rate in RATES),
        label_views=(shapes.target,),
        score_views=(shapes.target,),
        score_mirrored=False,
        score_labels=shapes.target,
        evaluate_every=5 * EPOCH,
        checkpoint_every=5 * EPOCH,
        publish_every=EPOCH,
    )


RECIPE = Recipe(
    name="meta_pseudo_labels",
    summary="BiSeNet: adversarial training, median labels, and a teacher that learns from how its student does",
    stages=stages,
    fitted=fitted,
    decide=decide,
    published_term=(0.0, 1.0),
    system="bisenet",
    networks=("bisenet", "mrnet", "proda"),
    own_student=True,
    large_labels=False,
    smallest_crop=32,  # five strides of a discriminator
)
