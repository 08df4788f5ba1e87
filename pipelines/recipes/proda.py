"""ProDA: prototypes, denoising on the fly, structure learning, distillation (methods §5; Zhang et al., CVPR 2021).

Four stages: warm-up (§5.0), denoising (§5.1 and §5.2, the paper's stage 1) and two of distillation (§5.3, its stages 2
and 3). Target losses are computed on a grid of points, every fourth pixel of the crop as published (``U4``); the first
and the last point are the crop's first and last pixel (corners aligned). The default differs from the published system
where that presumes pretrained weights or takes time from the student; ``faithful`` brings the published behaviour back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.errors import RunError, UnreadableImage
from actors.protocols import Batch, ImageReader, LabelPlan, ObjectiveContext, StagePlan, StepInfo
from actors.staleness import StalenessPolicy
from models.denoising import (
    Regulariser,
    assignment_loss,
    distillation_loss,
    regulariser,
    symmetric_cross_entropy,
)
from models.losses import IGNORE, ClassBalance, segmentation_loss
from models.networks.build import Build
from models.networks.deeplab import norm_statistics, upsample
from models.networks.discriminators import PatchDiscriminator
from models.networks.proda import Proda, ProdaOutputs
from models.prototypes import (
    PrototypeMean,
    class_distances,
    class_means,
    momentum_update,
    prototype_weights,
    rectify,
)
from models.schedule import poly, set_rate
from pipelines.benchmarks import Benchmark
from pipelines.choices import check_choices, decided
from pipelines.label_rules import ASSIGNMENTS, MEANS, SOFT, MonteCarloRule, PrototypeRule, fewest_pixels
from pipelines.recipes.optimisation import Rate, Sgd, sgd
from pipelines.recipes.recipe import Ingredients, Preset, Recipe, Size, StageSchedule
from pipelines.recipes.supervised import SegmentationTerm, segmentation_term
from pipelines.strong_view import StrongView
from pipelines.views import RandomCrop, Whole, network_input, normalised, rgb
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
INITIAL_PASSES = 4
"""Times that the initial prototypes see every target image."""


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
                object.__setattr__(self, name, str(Path(getattr(self, name)).absolute()))
        if self.extra_norm == "off" and self.simclr is not None:
            raise RunError("extra_norm is off, but a SimCLR backbone needs it; leave one of them out")

    def resolved(self, faithful: bool) -> ProdaOptions:
        """The same with everything decided that the user left open."""
        return decided(self, faithful)


@dataclass(frozen=True)
class TargetViews:
    """The weak and the strong view of a target image, and the grid of points on which they are compared.

    Attributes:
        weak: the crop.
        strong: what is done to it.
        base: (width, height) of the images that it is cut from.
        points: (across, down) of the grid.
    """

    weak: RandomCrop
    strong: StrongView
    base: Size
    points: Size

    def on_grid(self, maps: Tensor) -> Tensor:
        """U4: maps of the crop, N×K×h×w from the network, at the grid's points."""
        return upsample(maps, (self.points[1], self.points[0]))

    def of_whole(self, maps: Tensor, positions: np.ndarray) -> Tensor:
        """Maps of the whole images, N×K×h×w, at the grid's points of their crops (W of methods §5.2, step 5)."""
        return self.weak.sample(maps, positions, self.base, self.points)

    def labels_on_grid(self, labels: Tensor) -> Tensor:
        """Labels N×h×w of the crops at the grid's points, nearest."""
        rows, columns = (
            torch.linspace(0, size - 1, count, device=labels.device).round().long()
            for size, count in zip(labels.shape[-2:], (self.points[1], self.points[0]), strict=True)
        )
        return labels[:, rows[:, None], columns]

    def of_grid(self, term: SegmentationTerm) -> SegmentationTerm:
        """A supervised loss whose small classes are as small on the grid as they are in the crop."""
        share = self.points[0] * self.points[1] / (self.weak.crop[0] * self.weak.crop[1])
        return replace(term, small_class_pixels=max(1, round(share * term.small_class_pixels)))

    def strongly(self, weak: Tensor, positions: np.ndarray) -> tuple[Tensor, Callable[[Tensor, float], Any]]:
        """The strong view of network inputs, and what warps maps on the grid after it: (maps, fill) → (maps, seen)."""
        pixels = self.weak.pixels
        images, geometry = self.strong(rgb(weak, pixels), positions)
        return normalised(images, pixels), partial(geometry.warp, crop=self.weak.crop)


def balanced(balance: ClassBalance, labels: Tensor) -> Tensor:
    """Weight of every pixel of int64 N×h×w labels: more in a class with few, 1 on average and without a label."""
    weights = balance(labels)
    valid = labels != IGNORE
    picked = torch.where(valid, weights[labels.clamp(max=len(weights) - 1)], torch.zeros_like(weights[:1]))
    mean = picked.sum() / valid.sum().clamp(min=1)
    return torch.where(valid, picked / torch.where(mean > 0, mean, torch.ones_like(mean)), torch.ones_like(mean))


class WarmUpObjective:
    """Supervised source loss and an output-space adversary (methods §5.0); owns the discriminator."""

    def __init__(
        self,
        term: SegmentationTerm,
        options: ProdaOptions,
        source_views: TargetViews,
        discriminator_width: int,
        horizon: int,
        context: ObjectiveContext,
    ) -> None:
        self.term, self.options, self.horizon, self.context = term, options, horizon, context
        self.source_views = source_views
        self.balance, self.grid_balance = term.balance(context), source_views.of_grid(term).balance(context)
        self.discriminator = PatchDiscriminator(term.num_classes, discriminator_width).to(context.device)
        self.optimiser = torch.optim.Adam(
            self.discriminator.parameters(), lr=options.discriminator_rate, betas=(0.9, 0.99)
        )
        self._source: Tensor | None = None
        self._target: Tensor | None = None

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`."""
        assert batch.source is not None
        assert batch.source_label is not None
        assert batch.target is not None
        size = (batch.source.shape[-2], batch.source.shape[-1])
        source: ProdaOutputs
        if self.options.strong_source:
            views = self.source_views
            strong, warp = views.strongly(batch.source, batch.positions["source"])
            label, _ = warp(views.labels_on_grid(batch.source_label)[:, None], IGNORE)
            source = network(strong)
            on_grid = segmentation_loss(views.on_grid(source.main), label[:, 0], self.grid_balance(label[:, 0]))
            terms = {"loss/segmentation": self.options.strong_source * on_grid}
        else:
            source = network(batch.source)
            terms = {"loss/segmentation": self.term.of_logits(source, batch.source_label, self.balance)}
        target: ProdaOutputs = network(batch.target)
        probabilities = upsample(target.main, size).softmax(1)
        # As published, it learns at the network's own resolution and judges at the crop's. In float32: its own step has
        # no autocast.
        self._source, self._target = (found.main.detach().float().softmax(1) for found in (source, target))
        self.discriminator.requires_grad_(False)
        terms["loss/adversarial"] = self.options.adversarial * self.discriminator(probabilities).square().mean()
        return terms

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Source is 0, target is 1, both without a half."""
        assert self._source is not None
        assert self._target is not None
        self.discriminator.requires_grad_(True)
        loss = self.discriminator(self._source).square().mean() + (self.discriminator(self._target) - 1).square().mean()
        set_rate(self.optimiser, self.options.discriminator_rate * poly(info.stage_step, horizon=self.horizon))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.context.average_gradients(list(self.discriminator.parameters()))
        self.optimiser.step()
        return {"discriminator/main": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights, discriminator and its optimiser."""
        return {
            "balance": self.balance.state_dict(),
            "grid_balance": self.grid_balance.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["balance"])
        self.grid_balance.load_state_dict(state["grid_balance"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimiser.load_state_dict(state["optimiser"])


class DenoisingObjective:
    """Stage 1: labels weighted by prototypes, symmetric cross-entropy, structure (methods §5.2).

    The prototypes are a buffer of the student's network, so that they are published and saved with its weights; this
    object moves them.
    """

    def __init__(
        self,
        term: SegmentationTerm,
        options: ProdaOptions,
        views: TargetViews,
        reader: ImageReader,
        context: ObjectiveContext,
    ) -> None:
        assert options.momentum is not None
        assert options.temperature is not None
        assert options.regular is not None
        self.term, self.options, self.views, self.regular, self.context = term, options, views, options.regular, context
        self.momentum, self.temperature = options.momentum, options.temperature
        self.balance, self.target_balance = term.balance(context), views.of_grid(term).balance(context)
        assert isinstance(context.network, Proda)
        assert isinstance(context.teaching, Proda)
        self.network, self.average = context.network, context.teaching
        self.average_forward = context.as_student(self.average)
        self._vectors: tuple[Tensor, Tensor] | None = None
        if context.fresh:
            made = given_prototypes(options.prototypes, self.network) if options.prototypes else None
            if made is None:
                made = initial_prototypes(self.average, reader, views.base, context)
            for network in (self.network, self.average):
                network.prototypes.copy_(made)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`; the numbers are the steps of methods §5.2."""
        assert batch.source is not None
        assert batch.source_label is not None
        assert batch.target is not None
        assert batch.pseudo_weight is not None
        positions, options, prototypes = batch.positions["target"], self.options, self.network.prototypes
        terms = {"loss/segmentation": self.term.of_logits(network(batch.source), batch.source_label, self.balance)}  # 1
        labels, assignments = self._denoised(batch)  # 2, 3 and 5
        weak: ProdaOutputs = network(batch.target)  # 4
        logits = self.views.on_grid(weak.main)
        weights = batch.pseudo_weight[:, None, None] * balanced(self.target_balance, labels)
        symmetric = symmetric_cross_entropy(
            logits, labels, alpha=options.cross_entropy, beta=options.reverse, pixel_weights=weights
        )  # 6
        terms |= {"loss/cross_entropy": symmetric.ce, "loss/reverse": symmetric.rce}
        if self.regular:
            terms["loss/regulariser"] = self.regular * regulariser(logits, options.regulariser)  # 7
        if options.structure:
            images, warp = self.views.strongly(batch.target, positions)  # 8
            strong: ProdaOutputs = network(images)
            assigned, seen = warp(assignments, 0.0)
            seen = seen & (batch.pseudo_weight > 0)[:, None, None]
            distances = class_distances(self.views.on_grid(strong.feature), prototypes)
            structure = assignment_loss(assigned, distances, seen, self.temperature)
            terms["loss/structure"] = options.structure * structure
        return terms

    def _denoised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels int64 (N, h, w) and assignments float (N, C, h, w), on the grid; notes the features' class means."""
        assert batch.pseudo_label is not None
        positions, given = batch.positions["target"], self.views.labels_on_grid(batch.pseudo_label)
        if self.options.denoise == "teacher":
            vectors = batch.records[MEANS].view(torch.float32)
            self._vectors = vectors, vectors.sum(2) != 0
            return given, self.views.of_whole(batch.records[ASSIGNMENTS].float() / 255, positions)
        assert batch.whole is not None
        with torch.no_grad(), norm_statistics(self.average, update=False):
            self.average_forward.train(self.options.average_mode == "train")
            found: ProdaOutputs = self.average_forward(network_input(batch.whole, self.network.config.pixels))
            self.average_forward.eval()
            self._vectors = self._class_means(found)
            soft = self.views.of_whole(batch.records[SOFT].float() / 255, positions)
            distances = class_distances(self.views.of_whole(found.feature, positions), self.network.prototypes)
            assignments = prototype_weights(distances, self.temperature)
            labels, _ = rectify(soft, assignments, self.options.threshold)
        return labels.masked_fill(given == IGNORE, IGNORE), assignments

    def _class_means(self, found: ProdaOutputs) -> tuple[Tensor, Tensor]:
        """V of every image and class, on the quarter of the whole image."""
        (width, height), crop, points = self.views.base, self.views.weak.crop, self.views.points
        size = round(height * points[1] / crop[1]), round(width * points[0] / crop[0])
        winners = upsample(found.main, size).argmax(1)
        return class_means(upsample(found.feature, size), winners, self.term.num_classes, fewest_pixels(winners))

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Step 10: the prototypes follow the features, of all students alike."""
        assert self._vectors is not None
        means, present = (self.context.gather(part.contiguous()) for part in self._vectors)
        momentum_update(self.network.prototypes, means, present.bool(), self.momentum)
        return {"labels/classes": present.float().sum(1).mean()}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights; the prototypes are the network's."""
        return {"source": self.balance.state_dict(), "target": self.target_balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["source"])
        self.target_balance.load_state_dict(state["target"])


def given_prototypes(path: str, network: Proda) -> Tensor:
    """Prototypes in a file of the published system, a bare tensor (methods §8.5).

    Raises:
        RunError: it cannot be read, or does not fit the network.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(f"the prototypes {path} cannot be read: {str(error).splitlines()[0]}") from error
    wanted = tuple(network.prototypes.shape)
    if not isinstance(loaded, Tensor) or tuple(loaded.shape) != wanted:
        given = tuple(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
        raise RunError(
            f"{path} holds {given} where prototypes are a tensor of the shape {wanted}; they do not belong here"
        )
    return loaded.float()


@torch.no_grad()
def initial_prototypes(network: Proda, reader: ImageReader, size: Size, context: ObjectiveContext) -> Tensor:
    """Mean features of each class over all target images, un-augmented, in eval mode (methods §5.1).

    The students share the images, and end with the same prototypes.

    Args:
        network: in eval mode.
        reader: the target images; one that cannot be read has no say.
        size: (width, height) at which they are seen.
        context: of the student.

    Returns:
        float32 (C, K), zeros for a class that is seen nowhere.
    """
    classes, channels = network.prototypes.shape
    share = -(-len(reader) // context.world)
    means = torch.zeros(share, classes, channels, device=context.device)
    present = torch.zeros(share, classes, dtype=torch.uint8, device=context.device)
    forward = context.as_student(network)
    for place in range(share):
        index = context.rank * share + place
        if index >= len(reader):
            break
        try:
            image = np.array(reader.read(index, size))
        except UnreadableImage:
            continue
        inputs = network_input(torch.from_numpy(image)[None].to(context.device), network.config.pixels)
        found: ProdaOutputs = forward(inputs)
        winners = found.main.argmax(1)
        vectors, here = class_means(found.feature, winners, classes, fewest_pixels(winners))
        means[place], present[place] = vectors[0], here[0]
    means, present = context.gather(means), context.gather(present)
    mean = PrototypeMean(classes, channels, device=context.device)
    for _ in range(INITIAL_PASSES):
        mean.add(means, present.bool())
    return mean.prototypes


class DistillationObjective:
    """Stages 2 and 3: hard labels and the network of the stage before, on the strong view (methods §5.3)."""

    def __init__(
        self, term: SegmentationTerm, options: ProdaOptions, views: TargetViews, context: ObjectiveContext
    ) -> None:
        self.term, self.options, self.views = term, options, views
        self.balance, self.target_balance = term.balance(context), views.of_grid(term).balance(context)
        assert context.before is not None
        self.teacher = context.as_student(context.before)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`."""
        assert batch.source is not None
        assert batch.source_label is not None
        assert batch.target is not None
        assert batch.pseudo_label is not None
        assert batch.pseudo_weight is not None
        source: ProdaOutputs = network(batch.source)
        images, warp = self.views.strongly(batch.target, batch.positions["target"])
        label, _ = warp(self.views.labels_on_grid(batch.pseudo_label)[:, None], IGNORE)
        student: ProdaOutputs = network(images)
        with torch.no_grad():
            teacher: ProdaOutputs = self.teacher(images)
        weights = batch.pseudo_weight[:, None, None] * balanced(self.target_balance, label[:, 0])
        pseudo = segmentation_loss(self.views.on_grid(student.main), label[:, 0], pixel_weights=weights)
        divergence = distillation_loss(student.main, teacher.main, published=self.options.kd == "published")
        return {
            "loss/segmentation": self.term.of_logits(source, batch.source_label, self.balance),
            "loss/pseudo": pseudo,
            "loss/distillation": self.options.distillation * divergence,
        }

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Nothing of its own learns."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights."""
        return {"source": self.balance.state_dict(), "target": self.target_balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["source"])
        self.target_balance.load_state_dict(state["target"])


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


def fitted(preset: Preset, benchmark: Benchmark) -> Preset:
    """Four stages, one head that reads RGB, whole images at full size (methods §2.4 to §2.6)."""
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
    published_term=(0.0, 1.0),
)
