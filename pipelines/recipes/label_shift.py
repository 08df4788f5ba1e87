"""FADA and what undoes label shift (methods §7): class-level alignment, labels at the target's class frequencies.

Wang et al., "Classes Matter: A Fine-grained Adversarial Approach to Cross-domain Semantic Segmentation", ECCV 2020; Liu
et al., "Undoing the Damage of Label Shift for Cross-domain Semantic Segmentation", BMVC 2021. Three stages: source,
adversarial, self-distillation. Labels of the third are adjusted unless ``--adjust-prior none`` says FADA alone;
``--prior.refine-steps`` refines the classifier before them instead. Both are any recipe's, so neither stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.protocols import Batch, LabelPlan, ObjectiveContext, StagePlan, StepInfo
from actors.staleness import StalenessPolicy
from models.class_alignment import alignment_loss, soft_encodings
from models.losses import ClassBalance
from models.networks.build import Build
from models.networks.deeplab import DeepLabConfig
from models.networks.discriminators import PixelDiscriminator
from models.networks.fada import FadaConfig, FadaOutputs
from models.networks.segmenter import upsample
from models.schedule import poly, set_rate
from pipelines.benchmarks import Benchmark
from pipelines.choices import check_choices, decided
from pipelines.label_rules import MonteCarloRule
from pipelines.recipes.optimisation import Rate, Sgd, sgd
from pipelines.recipes.recipe import Ingredients, Preset, Recipe, StageSchedule
from pipelines.recipes.self_training import SelfTrainingObjective, SelfTrainingOptions
from pipelines.recipes.supervised import SegmentationTerm, SupervisedObjective, segmentation_term, training_view
from pipelines.selections import InstanceAdaptiveSelection
from pipelines.views import RandomCrop, Whole

STEPS, HORIZONS = (20_000, 40_000, 20_000), (31_250, 62_500, 31_250)
"""Of the published stages, and where their rates would have reached zero."""
RATES, BATCHES = (5e-4, 2.5e-4, 5e-4), (8, 4, 8)
SMALL_SHARES, SMALL_HORIZON = (0.5, 0.25, 0.25), 1.07
"""Of the steps of a small preset, and where a stage's rate would reach zero, of its steps: a random network has all to
learn first, and settles where its rate falls."""
COLOUR, HUE = 0.5, 0.2
"""Colour jitter of the published runs: of source images in the adversarial stage, of target images in distillation."""
DISTILLED = (0.5, 1.5)
"""Bounds of the factor on a whole target image in distillation."""


@dataclass(frozen=True)
class LabelShiftOptions:
    """What decides FADA beyond schedule and size; class frequencies have options of their own, ``--prior``."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {
        "begin": ("adapted", "anew"),
        "labeller": ("student", "before"),
        "teacher": ("average", "student"),
        "statistics": ("target", "running"),
        "norms": ("batch", "frozen"),
        "mixing": ("classes", "none"),
        "source_weight": (1.0, 0.0),
        "ignore_bottom": (None, 0.0),
        "colour": (0.3, COLOUR),
    }
    """What an option that is left open stands for: in our default, and in the published system."""

    backbone: Literal["resnet", "vgg16"] = "resnet"
    """resnet: ResNet-101 in torchvision's layout. vgg16: VGG-16."""
    aspp: Literal["original", "modified"] = "original"
    """The classifier. original: FADA's sum of four dilated convolutions. modified: ProDA's head, as the label-shift
    system also has it."""
    norms: Literal["auto", "batch", "frozen"] = "auto"
    """Batch norms of the backbone. frozen: constants of a pretrained file, without an epsilon, as published. auto:
    batch, and frozen with --faithful."""
    temperature: float = 1.8
    """Divides class scores in the adversarial stage, in the supervised loss and in what the discriminator is told."""
    clip: float = 0.9
    """Probability above which the discriminator is told no more of a class."""
    adversarial: float = 0.001
    """Weight of the alignment loss."""
    discriminator_rate: float = 1e-4
    """Learning rate of the discriminator."""
    begin: Literal["auto", "adapted", "anew"] = "auto"
    """What self-distillation begins with. adapted: the network of the adversarial stage. anew: a fresh one, behind the
    backbone of --init, as published. auto: adapted, and anew with --faithful."""
    distilled_norms: Literal["batch", "frozen"] = "batch"
    """Batch norms of a network that self-distillation begins anew with. batch: trained, as published from GTA5. frozen:
    as published from SYNTHIA."""
    labeller: Literal["auto", "student", "before"] = "auto"
    """Who labels for it. student: the network that learns (or its average), again and again. before: the network of the
    adversarial stage, once, as published. auto: student, and before where labels are made once (--refresh once,
    --faithful)."""
    mixing: Literal["auto", "classes", "none"] = "auto"
    """classes: in self-distillation, paste half of the classes of a source image onto each target image. none: target
    images alone, as published. auto: classes, and none with --faithful."""
    source_weight: float | None = None
    """Weight of the supervised source loss in self-distillation; 0 leaves source images out. Default: 1, and 0 with
    --faithful."""
    selection: Literal["none", "instance"] = "none"
    """Which pixels a label keeps. none: all, as published. instance: those above instance-adaptive thresholds (IAST,
    Mei et al., ECCV 2020)."""
    teacher: Literal["auto", "average", "student"] = "auto"
    """Which weights are published: the exponential moving average, or the student itself. auto: average, and student
    with --faithful."""
    statistics: Literal["auto", "target", "running"] = "auto"
    """Their batch-norm statistics: of target images alone, or as training left them. auto: target, and running with
    --faithful."""
    colour: float | None = None
    """Strength of the colour jitter, of source images in the adversarial stage and of target images in distillation.
    Default: 0.3, and 0.5 with --faithful; hue moves by two fifths of it."""
    ignore_bottom: float | None = None
    """Share of the image's height, from below, without pseudo labels, where the camera's own bonnet is. Default: 0.23
    on the street benchmarks, 0 on images of your own and with --faithful."""
    dropout: float = 0.1
    """Channel dropout rate of the modified classifier."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("adversarial", "discriminator_rate", "colour", "source_weight"):
            if (getattr(self, name) or 0.0) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; a weight or rate is not negative")
        for name in ("dropout", "ignore_bottom"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a rate in [0, 1)")
        if self.mixing == "classes" and self.source_weight == 0:
            raise RunError("mixing='classes' pastes source images, so source_weight must not be 0")
        if not self.temperature > 0:
            raise RunError(f"temperature is {self.temperature}; give a number above 0")
        if not 0 < self.clip <= 1:
            raise RunError(f"clip is {self.clip}; give a probability above 0")

    def resolved(self, faithful: bool) -> LabelShiftOptions:
        """The same with everything decided that the user left open."""
        return decided(self, faithful)


class ClassAlignmentObjective:
    """The adversarial stage (methods §7.1): supervised loss and class-level alignment; owns the discriminator."""

    def __init__(
        self,
        term: SegmentationTerm,
        options: LabelShiftOptions,
        channels: int,
        width: int,
        horizon: int,
        context: ObjectiveContext,
    ) -> None:
        self.term, self.options, self.horizon, self.context = term, options, horizon, context
        self.balance: ClassBalance = term.balance(context)
        self.discriminator = PixelDiscriminator(term.num_classes, channels, width).to(context.device)
        self.optimiser = torch.optim.Adam(
            self.discriminator.parameters(), lr=options.discriminator_rate, betas=(0.9, 0.99)
        )
        self._seen: dict[Literal["source", "target"], tuple[Tensor, Tensor]] = {}
        """Features and encodings of this step, as they were before the network moved."""

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`; steps 1 to 3 of methods §7.1."""
        assert batch.source is not None
        assert batch.source_label is not None
        assert batch.target is not None
        temperature = self.options.temperature
        source: FadaOutputs = network(batch.source)
        softened = FadaOutputs(source.main / temperature, source.feature)
        terms = {"loss/segmentation": self.term.of_logits(softened, batch.source_label, self.balance)}
        target: FadaOutputs = network(batch.target)
        self._seen = {
            "source": (source.feature.detach().float(), self._encodings(source, batch.source)),
            "target": (target.feature.detach().float(), self._encodings(target, batch.target)),
        }
        self.discriminator.requires_grad_(False)
        # A target image shall look like a source image of the same classes.
        looks = self._looks(target.feature.float(), self._seen["target"][1])
        terms["loss/alignment"] = self.options.adversarial * alignment_loss(looks, self._seen["target"][1], "source")
        return terms

    def _encodings(self, outputs: FadaOutputs, images: Tensor) -> Tensor:
        """What the discriminator is told of the classes, N×C×H×W at the images' size."""
        scores = upsample(outputs.main.detach().float(), (images.shape[-2], images.shape[-1]))
        return soft_encodings(scores, self.options.temperature, self.options.clip)

    def _looks(self, features: Tensor, encodings: Tensor) -> Tensor:
        """The discriminator's scores, N×2C×H×W at the images' size."""
        return upsample(self.discriminator(features), (encodings.shape[-2], encodings.shape[-1]))

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Step 4 of methods §7.1: the discriminator, on features from before the network's step."""
        self.discriminator.requires_grad_(True)
        losses = [
            0.5 * alignment_loss(self._looks(features, encodings), encodings, half)
            for half, (features, encodings) in self._seen.items()
        ]
        set_rate(self.optimiser, self.options.discriminator_rate * poly(info.stage_step, horizon=self.horizon))
        self.optimiser.zero_grad(set_to_none=True)
        loss = torch.stack(losses).sum()
        loss.backward()
        self.context.average_gradients(list(self.discriminator.parameters()))
        self.optimiser.step()
        return {"discriminator/pixels": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights, discriminator and its optimiser."""
        return {
            "balance": self.balance.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["balance"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimiser.load_state_dict(state["optimiser"])


def stages(ingredients: Ingredients, options: LabelShiftOptions) -> tuple[StagePlan, ...]:
    """Source, adversarial, self-distillation."""
    options = decide(options, ingredients)
    return _source(ingredients, options), _adversarial(ingredients, options), _distillation(ingredients, options)


def decide(options: LabelShiftOptions, ingredients: Ingredients) -> LabelShiftOptions:
    """The same with everything decided that the user left open, as far as the run decides it.

    Raises:
        RunError: what was asked for does not go together.
    """
    once = ingredients.refresh == "once"
    if options.labeller == "auto" and once:
        options = replace(options, labeller="before")
    options = options.resolved(ingredients.faithful)
    if options.labeller == "before" and not once:
        raise RunError("labeller is before, a network that does not change: it labels once; add --refresh once")
    if options.labeller == "student" and options.begin == "anew":
        raise RunError(
            "begin is anew and labeller is student, which then labels with random weights; give --refresh once, or let "
            "distillation begin with the adapted network"
        )
    if options.ignore_bottom is None:
        options = replace(options, ignore_bottom=ingredients.bonnet)
    return options


def _stage(ingredients: Ingredients, options: LabelShiftOptions, number: int, **more: Any) -> StagePlan:
    """What the stages share; ``more`` is a stage's own."""
    preset, schedule = ingredients.preset, ingredients.preset.stages[number]
    return StagePlan(
        steps=schedule.steps,
        batch=schedule.batch,
        optimiser=_sgd(ingredients),
        learning_rate=Rate(schedule.learning_rate, schedule.warmup, schedule.horizon),
        ema_decay=preset.ema_decay if options.teacher == "average" else None,
        statistics="running" if options.statistics == "running" else "target",
        dropout=options.dropout,
        clip_norm=preset.clip_norm,
        plain_view=Whole(preset.network.pixels),
        norm_images=ingredients.norm_images_of(schedule),
        **more,
    )


def _sgd(ingredients: Ingredients) -> Sgd:
    made = sgd(ingredients.preset, train_norm_affine=True)
    if ingredients.preset.name != "full":  # a random network has settings of its own
        return made
    return replace(made, duplicates="once", nesterov=False)


def _source_view(ingredients: Ingredients, number: int, colour: float) -> RandomCrop:
    """A source image: whole as published, jittered and cropped like everywhere else on small presets."""
    schedule = ingredients.preset.stages[number]
    view = replace(
        training_view(ingredients, schedule),
        jitter=ingredients.preset.source_jitter,
        colour=colour,
        hue=colour * HUE / COLOUR,
    )
    return replace(view, crop=schedule.source_size, flip=0.0) if ingredients.preset.name == "full" else view


def _source(ingredients: Ingredients, options: LabelShiftOptions) -> StagePlan:
    size = ingredients.preset.stages[0].source_size
    return _stage(
        ingredients,
        options,
        0,
        name="source",
        streams={"source": ingredients.by_class(size, _source_view(ingredients, 0, 0.0))},
        objective=partial(SupervisedObjective, segmentation_term(ingredients)),
    )


def _adversarial(ingredients: Ingredients, options: LabelShiftOptions) -> StagePlan:
    preset, schedule = ingredients.preset, ingredients.preset.stages[1]
    assert isinstance(preset.network, FadaConfig)
    assert options.colour is not None
    whole = preset.name == "full"
    target = replace(
        training_view(ingredients, schedule),
        seed=ingredients.seed + 1,
        crop=schedule.target_size if whole else schedule.crop,
        jitter=(1.0, 1.0),
        flip=0.0,
    )
    return _stage(
        ingredients,
        options,
        1,
        name="adversarial",
        streams={
            "source": ingredients.by_class(schedule.source_size, _source_view(ingredients, 1, options.colour)),
            "target": ingredients.target(schedule.target_size, target),
        },
        objective=partial(
            ClassAlignmentObjective,
            segmentation_term(ingredients),
            options,
            preset.network.feature_channels,
            8 * preset.discriminator_width,
            schedule.horizon,
        ),
    )


def _distillation(ingredients: Ingredients, options: LabelShiftOptions) -> StagePlan:
    preset, schedule = ingredients.preset, ingredients.preset.stages[2]
    assert options.ignore_bottom is not None
    assert options.colour is not None
    once, instance = options.labeller == "before", options.selection == "instance"
    rule = MonteCarloRule(
        num_classes=ingredients.num_classes,
        sizes=(preset.label_views[-1],),
        label_size=preset.label_size,
        passes=1,
        dropout=0.0,
        keep="all" if instance else "mean",
        threshold=0.0,
        max_std=0.0,
        ignore_bottom=options.ignore_bottom,
        mirrored=False,
    )
    view = replace(
        training_view(ingredients, schedule),
        jitter=DISTILLED if preset.name == "full" else preset.jitter,
        colour=options.colour,
        hue=options.colour * HUE / COLOUR,
    )
    assert isinstance(preset.network, FadaConfig)
    assert options.mixing != "auto"
    anew = options.begin == "anew"
    learned = SelfTrainingOptions(loss="plain", memory=0.0, mixing=options.mixing, source_weight=options.source_weight)
    streams = {"target": ingredients.target(schedule.target_size, view)}
    if options.source_weight:
        streams["source"] = ingredients.source(schedule.source_size, replace(view, seed=view.seed + 1))
    norms = options.distilled_norms if options.backbone == "resnet" else preset.network.norms
    return _stage(
        ingredients,
        options,
        2,
        name="self-distillation",
        streams=streams,
        objective=partial(SelfTrainingObjective, segmentation_term(ingredients), learned, 0.0),
        labels=LabelPlan(
            rule=rule,
            policy=StalenessPolicy(ingredients.refresh),
            selection=InstanceAdaptiveSelection() if instance else None,
        ),
        starts_from="teacher",
        network=Build(replace(preset.network, norms=norms)) if anew else None,
        initial=ingredients.backbone if anew else None,
        labelled_by="before" if once else "teaching",
        keeps_before=once,
    )


def fitted(
    preset: Preset, benchmark: Benchmark, own: LabelShiftOptions | None = None, faithful: bool = False
) -> Preset:
    """Three stages and FADA's network; whole images at full size (methods §2.4, §2.6 and A.3)."""
    options = (own or LabelShiftOptions()).resolved(faithful)
    full, like = preset.name == "full", preset.network
    assert options.norms != "auto"
    assert isinstance(like, DeepLabConfig)
    network = FadaConfig(  # as deep, wide and far-seeing as every other recipe's
        num_classes=len(benchmark.classes.names),
        layers=like.layers,
        width=like.width,
        dilations=like.dilations,
        branch_channels=like.branch_channels,
        head_channels=min(256, like.bottleneck_channels),
        groups=like.groups,
        backbone=options.backbone,
        aspp=options.aspp,
        norms=options.norms,
        dropout=options.dropout,
        pixels="bgr_vgg" if options.backbone == "vgg16" else "rgb_imagenet",
    )
    if not full:
        one, two = preset.stages
        ends = [0, *(round(share * preset.total_steps) for share in accumulate(SMALL_SHARES))]
        lengths = [end - begin for begin, end in pairwise(ends)]
        schedules = tuple(
            replace(stage, steps=steps, horizon=round(steps * SMALL_HORIZON))
            for stage, steps in zip((one, two, two), lengths, strict=True)
        )
        return replace(preset, network=network, stages=schedules, label_views=(preset.stages[1].target_size,))
    shapes = benchmark.shapes
    source, whole = shapes.whole or (shapes.source, shapes.target)
    if source[0] > shapes.source[0]:
        source = shapes.source
    schedules = tuple(
        StageSchedule(
            steps=steps,
            horizon=horizon,
            warmup=0,
            learning_rate=rate,
            batch=batch,
            source_size=source,
            target_size=whole if number == 2 else shapes.target,
            crop=shapes.target,
        )
        for number, (steps, horizon, rate, batch) in enumerate(zip(STEPS, HORIZONS, RATES, BATCHES, strict=True))
    )
    return replace(
        preset,
        network=network,
        stages=schedules,
        label_views=(shapes.target,),
        score_views=(whole,),
        score_mirrored=False,
        source_jitter=(1.0, 1.0),
    )


RECIPE = Recipe(
    name="label_shift",
    summary="FADA's class-level alignment, then self-distillation on labels at the target's class frequencies",
    stages=stages,
    fitted=fitted,
    decide=decide,
    system="fada",
    networks=("fada",),
    term=(0.0, 1.0),
    published_term=(0.0, 1.0),
    adjusts=True,
)
