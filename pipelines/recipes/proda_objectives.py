"""What ProDA's stages learn from: the objectives of warm-up, denoising and distillation (methods §5), and their views.

Target losses are computed on a grid of points, every fourth pixel of the crop as published (``U4``); the first and the
last point are the crop's first and last pixel (corners aligned).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.errors import RunError, UnreadableImage
from actors.protocols import Batch, ImageReader, ObjectiveContext, StepInfo
from actors.storage import readable
from models.denoising import assignment_loss, distillation_loss, regulariser, symmetric_cross_entropy
from models.losses import IGNORE, ClassBalance, mean_weight, segmentation_loss
from models.networks.discriminators import PatchDiscriminator
from models.networks.proda import Proda, ProdaOutputs
from models.networks.segmenter import upsample
from models.networks.statistics import norm_statistics
from models.prototypes import (
    PrototypeMean,
    class_distances,
    class_means,
    momentum_update,
    prototype_weights,
    rectify,
)
from models.schedule import poly, set_rate
from pipelines.label_rules import ASSIGNMENTS, MEANS, SOFT, fewest_pixels
from pipelines.recipes.recipe import Size
from pipelines.recipes.supervised import SegmentationTerm
from pipelines.strong_view import StrongView
from pipelines.views import RandomCrop, network_input, normalised, rgb

if TYPE_CHECKING:  # it builds on this module
    from pipelines.recipes.proda import ProdaOptions

INITIAL_PASSES = 4
"""Times that the initial prototypes see every target image."""


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
    weights = weights / mean_weight(weights, labels)
    return torch.where(labels != IGNORE, weights[labels.clamp(max=len(weights) - 1)], torch.ones_like(weights[:1]))


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
        loaded = torch.load(readable(path), map_location="cpu", weights_only=True)
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
