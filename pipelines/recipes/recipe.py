"""What a recipe is, and the presets of schedule and size on which every recipe runs.

A preset holds nothing but schedule and size; thresholds, loss weights and rates of dropout are the recipe's own and
are the same on the miniature as at full size. Pixel counts scale with the crop's area.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from actors.errors import RunError
from actors.protocols import ImageReader, StagePlan, Stream, View
from models.networks.build import Config
from models.networks.deeplab import DeepLabConfig
from models.networks.segmenter import Heads
from pipelines.benchmarks import Benchmark, common_part

if TYPE_CHECKING:  # it builds on this module
    from pipelines.recipes.mrnet import MrnetOptions

Size = tuple[int, int]
PUBLISHED_CROP = (1024, 512)
"""Crop for which the published pixel counts (4 096 pixels make a class large) were chosen."""

PUBLISHED_TERM = (80.0, 7.0)
"""MRNet's percentile of mining and its weight of rare classes (methods §3.1)."""
TERM = (0.0, 2.5)
"""Ours: with class weights up to 49 the hardest fifth is mostly pixels that no network gets right, and a network that
does not start from pretrained weights learns little else; at 7 one that labels for itself sees ever more lights, signs
and poles on façades."""


@dataclass(frozen=True)
class StageSchedule:
    """Schedule and size of one stage.

    Attributes:
        steps: optimiser steps that are run.
        horizon: steps at which the learning rate would reach zero.
        warmup: steps of linear warm-up.
        learning_rate: base rate of the segmentation network.
        batch: samples of each domain.
        source_size, target_size: base sizes (width, height) before jitter and crop.
        crop: network input in training.
        norm_images: images that batch norm saw together in the published runs; None where that is not known.
    """

    steps: int
    horizon: int
    warmup: int
    learning_rate: float
    batch: int
    source_size: Size
    target_size: Size
    crop: Size
    norm_images: int | None = None


@dataclass(frozen=True)
class Preset:
    """Schedule and size of a run, for one benchmark.

    Attributes:
        name: ``full``, ``mini`` or ``tiny``.
        network: the segmentation network that the recipe trains.
        discriminator_width: channels of the discriminators' first layers.
        stages: schedules of the stages: of a recipe of its own number of them, or of stage I (alignment) and stage II
            (self-training), which most share.
        label_size: (width, height) of pseudo labels.
        label_views: image sizes that a teacher looks at, each plain and mirrored.
        score_views: image sizes that are fused when a network is scored.
        score_mirrored: whether every scored view is also mirrored.
        score_labels: size (width, height) to which labels are brought, to the nearest, before scoring; None: their own.
        rates: ``published`` gives heads, blocks and projections the multiplied rates of the published runs (Q-SH-1),
            which suit a pretrained backbone; ``flat`` lets every part of a random one learn alike.
        clip_norm: bound on the norm of the gradient; None for none.
        jitter: bounds of the scale jitter.
        source_jitter: the same for source images in stage I; a real city as source is not jittered.
        ema_decay: of the teaching average.
        publish_every, evaluate_every, checkpoint_every: steps.
    """

    name: str
    network: Config
    discriminator_width: int
    stages: tuple[StageSchedule, ...]
    label_size: Size
    label_views: tuple[Size, ...]
    score_views: tuple[Size, ...]
    score_mirrored: bool
    rates: Literal["published", "flat"]
    clip_norm: float | None
    jitter: tuple[float, float]
    source_jitter: tuple[float, float]
    ema_decay: float
    publish_every: int
    evaluate_every: int
    checkpoint_every: int
    score_labels: Size | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all stages: what the reference runs get, too."""
        return sum(stage.steps for stage in self.stages)

    def with_steps(self, total: int, stages: int = 2) -> Preset:
        """The same preset at another length; every part of the schedule keeps its share.

        Args:
            total: optimiser steps of the first ``stages`` stages together.
            stages: how many of the stages the recipe runs.

        Raises:
            RunError: fewer steps than stages.
        """
        if total < stages:
            raise RunError(f"--steps {total} leaves no step for one of the {stages} stages; give at least {stages}")
        factor = total / sum(stage.steps for stage in self.stages[:stages])
        before, lengths = 0, list[int]()
        for number in range(1, len(self.stages) + 1):
            end = round(sum(stage.steps for stage in self.stages[:number]) * factor)
            if number <= stages:  # whatever is rounded, every stage has a step and together they have the total
                end = min(max(end, number), total - (stages - number))
            lengths.append(max(1, end - before))
            before += lengths[-1]
        return self._with_stages(
            lambda number, stage: replace(
                stage,
                steps=lengths[number],
                horizon=max(lengths[number], round(stage.horizon * factor)),
                warmup=round(stage.warmup * factor),
            )
        )

    def _with_stages(self, changed: Callable[[int, StageSchedule], StageSchedule]) -> Preset:
        return replace(self, stages=tuple(changed(number, stage) for number, stage in enumerate(self.stages)))

    def with_batch(self, batch: int) -> Preset:
        """The same preset with batches of another size."""
        return self._with_stages(lambda _, stage: replace(stage, batch=batch))

    def with_rates(self, factor: float) -> Preset:
        """The same preset with every learning rate of the network multiplied."""
        return self._with_stages(lambda _, stage: replace(stage, learning_rate=factor * stage.learning_rate))

    def with_label_scale(self, factor: float) -> Preset:
        """The same preset with pseudo labels of another size."""
        return replace(self, label_size=_scaled(self.label_size, factor))

    def with_scale(self, factor: float) -> Preset:
        """The same preset at another image size; every width and height is multiplied."""

        def sized(stage: StageSchedule) -> StageSchedule:
            source, target = _scaled(stage.source_size, factor), _scaled(stage.target_size, factor)
            return replace(stage, source_size=source, target_size=target, crop=_scaled(stage.crop, factor))

        return replace(
            self,
            stages=tuple(sized(stage) for stage in self.stages),
            label_size=_scaled(self.label_size, factor),
            label_views=tuple(_scaled(view, factor) for view in self.label_views),
            score_views=tuple(_scaled(view, factor) for view in self.score_views),
            score_labels=None if self.score_labels is None else _scaled(self.score_labels, factor),
        )


@dataclass(frozen=True)
class Ingredients:
    """What a pipeline hands a recipe to build its stages from.

    Attributes:
        preset: schedule and size.
        num_classes: outputs of the network.
        seed: of the run.
        bonnet: share of a target image's height, from below, that shows the camera's own car.
        sure: probability that a pseudo label of the published MRNet runs must reach.
        faithful: reproduce the published behaviour where the default differs.
        refresh: ``once`` or ``continuous``.
        source: opens the labelled source stream at a base size with a view.
        by_class: the same, of images drawn so that rare classes occur more often (methods §7.1); classes are counted in
            all labels on first use.
        target: opens the unlabelled target stream.
        target_labelled: opens the labelled target stream; only the oracle may, and None on data without labels.
        few: opens the stream of those few target images whose labels the user lets a run learn from, or None.
        hard_pixels: percentile below which the supervised loss leaves pixels out; None for the recipe's own.
        rare_weight: weight of small and of absent classes; None for the recipe's own.
        norm_affine: whether the backbone's batch-norm affine parameters learn in stage I; auto as ``faithful`` says.
        norm_images: images that batch norm sees together in training; None as ``faithful`` says.
        alignment: options of stage I, for the recipes that begin with it; None for their defaults.
        term: percentile of mining and weight of rare classes in the supervised loss of the recipe's default.
        published_term: the same of the published system.
        reader: target images without labels, for what a stage needs to know of all of them when it begins.
        from_stage: the first stage that is run.
        to_train: False where only a run's data and network are wanted.
        regular: weight of ProDA's regulariser in the published runs.
        student: the network that learns from the recipe's, where it is another one; None where they are one.
        backbone: fills the backbone of a fresh network of the recipe; None leaves it random.
        student_backbone: the same for the student's.
        given: whether the user gives the pseudo labels, so that nobody makes any.
    """

    preset: Preset
    num_classes: int
    seed: int
    bonnet: float
    sure: float
    faithful: bool
    refresh: Literal["once", "continuous"]
    source: Callable[[Size, View], Stream]
    by_class: Callable[[Size, View], Stream]
    target: Callable[[Size, View], Stream]
    target_labelled: Callable[[Size, View], Stream] | None
    few: Callable[[Size, View], Stream] | None = None
    hard_pixels: float | None = None
    rare_weight: float | None = None
    norm_affine: Literal["auto", "train", "freeze"] = "auto"
    norm_images: int | None = None
    alignment: MrnetOptions | None = None
    term: tuple[float, float] = TERM
    published_term: tuple[float, float] = PUBLISHED_TERM
    reader: ImageReader | None = None
    from_stage: int = 1
    to_train: bool = True
    regular: float = 0.1
    student: Config | None = None
    backbone: Callable[[nn.Module], None] | None = None
    student_backbone: Callable[[nn.Module], None] | None = None
    given: bool = False

    def seen_by_student(self) -> Ingredients:
        """The same for stages that train the student's network, where it is another one."""
        if self.student is None:
            return self
        return replace(
            self, preset=replace(self.preset, network=self.student), backbone=self.student_backbone, student=None
        )

    def norm_images_of(self, schedule: StageSchedule) -> int | None:
        """Images that batch norm sees together in a stage; None for all of a student's."""
        return schedule.norm_images if self.norm_images is None and self.faithful else self.norm_images


@dataclass(frozen=True)
class Recipe:
    """A published system, or one of ours, as stages on the engine.

    Attributes:
        name: what ``--recipe`` takes.
        summary: one line for ``--help``.
        stages: builds the stages from the ingredients and the recipe's own options.
        schedules: how many of the preset's stage schedules it runs; None for all.
        begins_with: recipes whose stages it begins with, and whose options count for them.
        fitted: the preset of a benchmark as this recipe runs it with its own options, faithfully or not.
        decide: the recipe's options with everything decided that the user left open.
        term: percentile of mining and weight of rare classes in the supervised loss, of our default.
        published_term: the same of the published system.
        adjusts: whether its labels are adjusted to the target's class frequencies unless somebody says otherwise.
        system: the family of networks whose published files are scored as this recipe scores.
        networks: families of networks that it can train.
        own_student: whether one of its stages has a student beside its teacher; where not, a student of another network
            than the recipe's learns in a stage after the recipe's own.
        large_labels: whether the published system's pseudo labels are as large as the original target images.
        smallest_crop: pixels of a crop's shorter side that its networks and discriminators need.
    """

    name: str
    summary: str
    stages: Callable[[Ingredients, Any], tuple[StagePlan, ...]]
    schedules: int | None = None
    begins_with: tuple[str, ...] = ()
    fitted: Callable[..., Preset] = lambda preset, benchmark, own, faithful: preset
    decide: Callable[[Any, Ingredients], Any] = lambda options, ingredients: options.resolved(ingredients.faithful)
    term: tuple[float, float] = TERM
    published_term: tuple[float, float] = PUBLISHED_TERM
    adjusts: bool = False
    system: Heads | None = None
    networks: tuple[Heads, ...] = ("mrnet",)
    own_student: bool = False
    smallest_crop: int = 16
    large_labels: bool = True


def preset(name: str, benchmark: Benchmark) -> Preset:
    """The preset of a name for a benchmark.

    Raises:
        RunError: there is no such preset.
    """
    makers = {"full": _full, "mini": _mini, "tiny": _tiny}
    if name not in makers:
        raise RunError(f"there is no preset {name!r}; known are {', '.join(sorted(makers))}")
    return makers[name](benchmark)


def _full(benchmark: Benchmark) -> Preset:
    """The published schedule and sizes (methods §2.4, §2.6, §3)."""
    shapes = benchmark.shapes
    return Preset(
        name="full",
        network=DeepLabConfig(num_classes=len(benchmark.classes.names)),
        discriminator_width=32,
        stages=(
            StageSchedule(
                steps=25_000,
                horizon=100_000,
                warmup=5_000,
                learning_rate=benchmark.rates[0],
                batch=benchmark.batches[0],
                source_size=shapes.source,
                target_size=shapes.target,
                crop=shapes.crops[0],
                norm_images=benchmark.norm_images[0],
            ),
            StageSchedule(
                steps=50_000,
                horizon=100_000,
                warmup=5_000,
                learning_rate=benchmark.rates[1],
                batch=benchmark.batches[1],
                source_size=shapes.source,
                target_size=shapes.target_again,
                crop=shapes.crops[1],
                norm_images=benchmark.norm_images[1],
            ),
        ),
        label_size=shapes.target,
        label_views=shapes.label_views,
        score_views=shapes.score_views,
        score_mirrored=True,
        rates="published",
        clip_norm=None,
        jitter=(0.8, 1.2),
        source_jitter=shapes.source_jitter,
        ema_decay=0.999,
        publish_every=200,
        evaluate_every=5_000,
        checkpoint_every=1_000,
    )


def _mini(benchmark: Benchmark) -> Preset:
    """Schedule and size for two cores: the demo on a rendered miniature, or a first run on images of one's own."""
    source, target = benchmark.shapes.small(240)
    crop = common_part(source, target, 0.8, 0.8)
    common: dict[str, Any] = {"batch": 4, "source_size": source, "target_size": target, "crop": crop}
    return Preset(
        name="mini",
        network=DeepLabConfig.small(len(benchmark.classes.names)),
        discriminator_width=4,
        stages=(
            StageSchedule(steps=200, horizon=1150, warmup=50, learning_rate=0.4, **common),
            StageSchedule(steps=900, horizon=960, warmup=20, learning_rate=0.3, **common),
        ),
        label_size=target,
        label_views=(_scaled(target, 0.8), target),
        score_views=(target,),
        score_mirrored=False,
        rates="flat",
        clip_norm=2.0,
        jitter=(0.8, 1.2),
        source_jitter=benchmark.shapes.source_jitter,
        ema_decay=0.98,
        publish_every=25,
        evaluate_every=100,
        checkpoint_every=100,
    )


def _tiny(benchmark: Benchmark) -> Preset:
    """Seconds: for tests of the whole engine. Its scores mean nothing."""
    source, target = benchmark.shapes.small(128)
    crop = common_part(source, target, 0.5, 0.75)
    common: dict[str, Any] = {"batch": 2, "source_size": source, "target_size": target, "crop": crop}
    small = DeepLabConfig(
        num_classes=len(benchmark.classes.names),
        layers=(1, 1, 1, 1),
        width=4,
        branch_channels=8,
        bottleneck_channels=16,
        groups=4,
    )
    return Preset(
        name="tiny",
        network=small,
        discriminator_width=2,
        stages=(
            StageSchedule(steps=20, horizon=80, warmup=4, learning_rate=2e-3, **common),
            StageSchedule(steps=20, horizon=80, warmup=4, learning_rate=2e-3, **common),
        ),
        label_size=target,
        label_views=(target, _scaled(target, 1.25)),
        score_views=(target,),
        score_mirrored=False,
        rates="published",
        clip_norm=None,
        jitter=(0.8, 1.2),
        source_jitter=benchmark.shapes.source_jitter,
        ema_decay=0.9,
        publish_every=5,
        evaluate_every=0,
        checkpoint_every=10,
    )


def _scaled(size: Size, factor: float) -> Size:
    return round(size[0] * factor), round(size[1] * factor)
