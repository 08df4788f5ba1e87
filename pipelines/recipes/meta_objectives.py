"""What BiSeNet's systems learn from: adversarial training, median labels, meta pseudo labels (methods §6).

Every stage plays the same game with a discriminator (:class:`Critic`). In the last one a teacher learns, too
(:class:`TeacherLosses`): inside the student's step where both take strict turns (:class:`AlternatingObjective`), or in
an actor of its own beside it (:class:`TeacherObjective`, with :class:`AdversarialObjective` at the student).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.protocols import Batch, ObjectiveContext, StepInfo
from models.losses import IGNORE, ClassBalance, domain_loss
from models.meta import meta_coefficient, meta_epoch, noisy_rectangle
from models.networks.discriminators import FullyConvDiscriminator, SeparableDiscriminator
from models.networks.segmenter import Outputs, Pixels, Segmenter, upsample
from models.networks.statistics import ema_update, norm_statistics
from models.schedule import set_rate
from pipelines.label_rules import MedianRule
from pipelines.recipes.supervised import SegmentationTerm
from pipelines.views import PIXELS, RandomCrop, Whole, normalised, rgb

if TYPE_CHECKING:  # it builds on this module
    from pipelines.recipes.meta_pseudo_labels import MetaPseudoLabelsOptions

DISCRIMINATORS: dict[Literal["dsc", "fcd"], Callable[[int, int], nn.Module]] = {
    "dsc": SeparableDiscriminator,
    "fcd": FullyConvDiscriminator,
}
Optimiser = Callable[[nn.Module], torch.optim.Optimizer]


class Critic:
    """A discriminator of output maps and its optimiser (methods §6.1, steps 2 and 3): source is 0, target is 1.

    Args:
        kind: which.
        num_classes: C.
        width: channels of its first layer.
        rate: learning rate of its Adam, the same all along.
        context: of the student.
    """

    def __init__(
        self, kind: Literal["dsc", "fcd"], num_classes: int, width: int, rate: float, context: ObjectiveContext
    ) -> None:
        self.network = DISCRIMINATORS[kind](num_classes, width).to(context.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=rate, betas=(0.9, 0.99))
        self.context = context
        self.seen: tuple[Tensor, Tensor] | None = None
        """Class probabilities of both domains that the next step learns from."""

    def fooled(self, target: Tensor) -> Tensor:
        """BCE(D(σ z), 0): what a network minimises so that its target maps look like source maps.

        Args:
            target: logits, float (N, C, H, W); gradients flow into them and not into D.
        """
        self.network.requires_grad_(False)
        return domain_loss(self.network(target.softmax(1)), target=False)

    def show(self, source: Tensor, target: Tensor) -> None:
        """Keep what :meth:`learn` shall learn from: logits (N, C, H, W) of both domains."""
        # In float32 whatever the network computed in: the discriminator's own step has no autocast.
        self.seen = source.detach().float().softmax(1), target.detach().float().softmax(1)

    def learn(self, rate: float) -> Tensor:
        """A step on ½ BCE(D(σ z_s), 0) + ½ BCE(D(σ z_t), 1); returns the loss."""
        assert self.seen is not None
        source, target = self.seen
        self.network.requires_grad_(True)
        loss = 0.5 * domain_loss(self.network(source), target=False)
        loss = loss + 0.5 * domain_loss(self.network(target), target=True)
        set_rate(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.context.average_gradients(list(self.network.parameters()))
        self.optimiser.step()
        self.seen = None
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights, under the name of published checkpoints' exports, and the optimiser."""
        return {"discriminator": self.network.state_dict(), "discriminator_optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.network.load_state_dict(state["discriminator"])
        self.optimiser.load_state_dict(state["discriminator_optimiser"])


def plain_term(term: SegmentationTerm, context: ObjectiveContext) -> tuple[SegmentationTerm, ClassBalance]:
    """The loss on pseudo labels: all pixels and all classes alike, as published, and the weights that say so.

    Weights that favour rare classes make a network that labels for itself see ever more of them: with ours, a teacher
    that learns lost half of its mIoU within a stage, and took its student along.
    """
    plain = replace(term, hard_percentile=0.0, max_value=1.0)
    even = plain.balance(context)
    even.total = None  # ones, whatever the other students count: nobody needs to ask them
    return plain, even


class AdversarialLosses:
    """What a student and a teacher of this system have in common: supervised, adversarial and pseudo-label losses.

    Args:
        term: supervised loss.
        options: of the recipe.
        width: of the discriminator.
        context: of the process it learns in.
    """

    def __init__(
        self, term: SegmentationTerm, options: MetaPseudoLabelsOptions, width: int, context: ObjectiveContext
    ) -> None:
        self.term, self.options = term, options
        self.balance = term.balance(context)
        self.plain, self.even = plain_term(term, context)
        self.critic = Critic(options.discriminator, term.num_classes, width, options.discriminator_rate, context)

    def of(
        self, network: nn.Module, batch: Batch, label: Tensor | None, adversarial: float, *, source_counts: bool = True
    ) -> dict[str, Tensor]:
        """Terms by name, and the critic is shown the maps of both domains.

        Args:
            network: in training mode.
            batch: views of both domains.
            label: int64 (N, H, W) of the target view, or None.
            adversarial: weight of the adversarial term.
            source_counts: whether the source pass moves running statistics.
        """
        assert batch.source is not None
        assert batch.source_label is not None
        assert batch.target is not None
        with norm_statistics(network, update=source_counts):
            source = network(batch.source)
        target = network(batch.target)
        maps = _enlarged(source, batch.source), _enlarged(target, batch.target)
        terms = {
            "segmentation": self.term.of_logits(source, batch.source_label, self.balance),
            "adversarial": adversarial * self.critic.fooled(maps[1]),
        }
        if label is not None:
            terms["pseudo"] = self.plain.of_logits(target, label, self.even)
        self.critic.show(*maps)
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Running class weights, discriminator and its optimiser."""
        return {"balance": self.balance.state_dict(), **self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["balance"])
        self.critic.load_state_dict(state)


class AdversarialObjective(AdversarialLosses):
    """Supervised source loss, adversarial target loss, and where there are pseudo labels the loss on them (§6.1)."""

    def __init__(
        self,
        term: SegmentationTerm,
        options: MetaPseudoLabelsOptions,
        width: int,
        critic_rate: Callable[[int], float],
        context: ObjectiveContext,
    ) -> None:
        super().__init__(term, options, width, context)
        self.critic_rate = critic_rate

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`."""
        label = batch.pseudo_label
        if label is not None and batch.pseudo_weight is not None:
            label = label.masked_fill(batch.pseudo_weight[:, None, None] == 0, IGNORE)
        return self._losses(network, batch, label)

    def _losses(self, network: nn.Module, batch: Batch, label: Tensor | None) -> dict[str, Tensor]:
        """Terms by name, with a target label (N, H, W) or without one."""
        terms = self.of(network, batch, label, self.options.adversarial)
        return {f"loss/{name}": value for name, value in terms.items()}

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """The discriminator's step."""
        return {"discriminator/main": self.critic.learn(self.critic_rate(info.stage_step))}


class TeacherLosses(AdversarialLosses):
    """What the teacher minimises (methods §6.3, step 4), and its discriminator.

    Args:
        pixels: what the teacher reads; noise is measured in gray levels, 0–255.
    """

    def __init__(
        self,
        term: SegmentationTerm,
        options: MetaPseudoLabelsOptions,
        width: int,
        pixels: Pixels,
        context: ObjectiveContext,
    ) -> None:
        super().__init__(term, options, width, context)
        assert options.noise is not None
        self.deviation = options.noise / torch.tensor(PIXELS[pixels].scale, device=context.device).view(3, 1, 1)

    def __call__(
        self, network: nn.Module, batch: Batch, label: Tensor, coefficient: Tensor, info: StepInfo
    ) -> dict[str, Tensor]:
        """L_3(source) + adversarial + H · L_3(target, its own labels) + in some steps the same under noise.

        Args:
            network: the teacher, in training mode.
            batch: views of both domains.
            label: int64 (N, H, W), made by the teacher of the target view.
            coefficient: H, a 0-d tensor.
            info: decides about noise, alike in all students.
        """
        options = self.options
        assert batch.target is not None
        assert options.teacher_adversarial is not None
        assert options.noise_share is not None
        # It labels by running statistics: as published those of all that it sees, or of plain target images alone.
        all_count = options.statistics == "running"
        terms = self.of(network, batch, label, options.teacher_adversarial, source_counts=all_count)
        terms["pseudo"] = coefficient * terms["pseudo"]
        if np.random.default_rng([NOISE, info.stage_step]).random() < options.noise_share:
            with norm_statistics(network, update=all_count):
                noisy = network(noisy_rectangle(batch.target, self.deviation, info.seed))
            terms["noise"] = self.plain.of_logits(noisy, label, self.even)
        return terms


class OwnLabels:
    """Labels of a target batch by a network that is being trained, in the geometry of the batch's view.

    Args:
        rule: how.
        view: of the target stream; its boxes depend on no label.
    """

    def __init__(self, rule: MedianRule, view: Whole | RandomCrop) -> None:
        self.rule, self.view = rule, view

    def of(self, network: Segmenter, batch: Batch) -> Tensor:
        """int64 (N, H, W), 255 where nothing is said; the network's mode is as it was."""
        assert batch.whole is not None
        training = network.training
        made = self.rule.made(network.eval(), batch.whole).label
        network.train(training)
        height, width = batch.whole.shape[1:3]
        (label,) = self.view.maps((made,), batch.positions["target"], (width, height))
        return label.long()


class AlternatingObjective(AdversarialObjective):
    """Meta pseudo labels in strict turns: the teacher is a module of the student's objective (methods §6.3).

    It labels the very batch that the student learns from and then learns itself, by as much as the student's losses on
    that batch say. It begins as the network that the stage before published. With a decay its exponential moving
    average labels in its place.
    """

    def __init__(
        self,
        term: SegmentationTerm,
        options: MetaPseudoLabelsOptions,
        width: int,
        critic_rate: Callable[[int], float],
        labels: OwnLabels,
        pixels: tuple[dict[str, Pixels], dict[str, Pixels]],
        optimiser: Optimiser,
        rates: Sequence[Callable[[int], float]],
        clip_norm: float | None,
        decay: float | None,
        context: ObjectiveContext,
    ) -> None:
        super().__init__(term, options, width, critic_rate, context)
        assert isinstance(context.before, Segmenter)
        self.pixels = pixels
        self.labels, self.context, self.clip_norm, self.decay = labels, context, clip_norm, decay
        self.student_rate, self.teacher_rate = rates
        self.teacher: Segmenter = copy.deepcopy(context.before).requires_grad_(True)
        self.labeller = self.teacher if decay is None else copy.deepcopy(context.before).eval().requires_grad_(False)
        self.forward = context.as_student(self.teacher)
        self.optimiser = optimiser(self.teacher)
        self.teaches = TeacherLosses(term, options, width, self.teacher.config.pixels, context)
        self._kept: tuple[Batch, Tensor, Tensor, Tensor] | None = None

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """Steps 1 and 2."""
        label = self.labels.of(self.labeller, batch)
        terms = self._losses(network, batch, label)
        self._kept = batch, label, terms["loss/segmentation"].detach(), terms["loss/pseudo"].detach()
        return terms

    def _for_teacher(self, batch: Batch) -> Batch:
        """The same views as the teacher reads them."""
        student, own = self.pixels
        if student == own or batch.source is None or batch.target is None:
            return batch
        source = normalised(rgb(batch.source, student["source"]), own["source"])
        target = normalised(rgb(batch.target, student["target"]), own["target"])
        return replace(batch, source=source, target=target)

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """The student's discriminator, and steps 3 to 5."""
        assert self._kept is not None
        maps_of_student = self.critic.seen
        done = super().learn(info)
        batch, label, source_loss, pseudo_loss = self._kept
        step = info.stage_step
        epoch = meta_epoch(step, info.stage_steps)
        coefficient = meta_coefficient(epoch, self.student_rate(step), source_loss, pseudo_loss)
        self.forward.train()
        terms = self.teaches(self.forward, self._for_teacher(batch), label, coefficient, info)
        if self.options.teacher_discriminator == "student":
            self.teaches.critic.seen = maps_of_student
        set_rate(self.optimiser, self.teacher_rate(step))
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        parameters = list(self.teacher.parameters())
        self.context.average_gradients(parameters)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimiser.step()
        if self.decay is not None:
            ema_update(self.labeller.state_dict(), self.teacher, self.decay, buffers="copy")
        self._kept = None
        return {
            **done,
            **{f"teacher/{name}": value.detach() for name, value in terms.items()},
            "teacher/coefficient": coefficient,
            "teacher/discriminator": self.teaches.critic.learn(self.options.discriminator_rate),
            "labels/kept": (label != IGNORE).float().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Of the student's side, and the teacher with everything that learns with it."""
        return {
            **super().state_dict(),
            "teacher": self.teacher.state_dict(),
            "labeller": {} if self.decay is None else self.labeller.state_dict(),
            "teacher_optimiser": self.optimiser.state_dict(),
            "teaches": self.teaches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])
        if self.decay is not None:
            self.labeller.load_state_dict(state["labeller"])
        self.optimiser.load_state_dict(state["teacher_optimiser"])
        self.teaches.load_state_dict(state["teaches"])


class TeacherObjective:
    """Meta pseudo labels at a teacher that learns beside the student: what the student's newest reward makes of it.

    The network that it is given is the teacher; what is published of it labels. Its discriminator sees its own maps:
    the student's are elsewhere.

    Args:
        student_rate: the student's learning rate by stage step.
        stage_steps: of the student.
    """

    def __init__(
        self,
        term: SegmentationTerm,
        options: MetaPseudoLabelsOptions,
        width: int,
        labels: OwnLabels,
        student_rate: Callable[[int], float],
        stage_steps: int,
        context: ObjectiveContext,
    ) -> None:
        assert isinstance(context.network, Segmenter)
        self.options, self.labels, self.context = options, labels, context
        self.student_rate, self.stage_steps = student_rate, stage_steps
        assert isinstance(context.teaching, Segmenter)
        self.teacher = context.network
        self.labeller = context.teaching if options.labels_by == "average" else context.network
        self.teaches = TeacherLosses(term, options, width, self.teacher.config.pixels, context)
        self.coefficient = torch.ones((), device=context.device)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`; until a first reward arrives H is 1, as in the first epoch."""
        label = self.labels.of(self.labeller, batch)
        reward = self.context.reward()
        if reward is not None:
            source_loss, pseudo_loss = (torch.tensor(reward.terms[name], device=self.context.device) for name in REWARD)
            epoch = meta_epoch(reward.stage_step, self.stage_steps)
            rate = self.student_rate(reward.stage_step)
            self.coefficient = meta_coefficient(epoch, rate, source_loss, pseudo_loss)
        terms = self.teaches(network, batch, label, self.coefficient, info)
        return {f"loss/{name}": value for name, value in terms.items()}

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """The discriminator's step."""
        loss = self.teaches.critic.learn(self.options.discriminator_rate)
        return {"discriminator": loss, "coefficient": self.coefficient}

    def state_dict(self) -> dict[str, Any]:
        """The discriminator's side, and the last coefficient."""
        return {**self.teaches.state_dict(), "coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.teaches.load_state_dict(state)
        self.coefficient = state["coefficient"].to(self.context.device)


NOISE = 6
"""Of the stream of random numbers that decides which steps have noise."""

REWARD = ("loss/segmentation", "loss/pseudo")
"""A and B: the student's terms that its teacher is rewarded by."""


def _enlarged(outputs: Outputs, images: Tensor) -> Tensor:
    """Fused logits at the size of the images."""
    return upsample(outputs.fused(), (images.shape[-2], images.shape[-1]))
