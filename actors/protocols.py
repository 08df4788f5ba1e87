"""What the actors know of the rest of the house.

A recipe describes a run as a tuple of :class:`StagePlan`; a pipeline turns it into streams, readers and rules. The
actors see only the protocols and plain dataclasses of this file, so a new recipe never needs a change here unless it
needs a new *kind* of thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from actors.prior_estimate import Adjustment, Evidence, PriorPlan, SourceSight
from actors.records import RecordLayout
from actors.staleness import StalenessPolicy

if TYPE_CHECKING:  # the boards import this module and must start without torch
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class RawBatch:
    """One rank's share of a global batch, as the stream delivers it, on the host.

    Attributes:
        images: uint8 N×H×W×3, RGB, at the stream's base size.
        labels: uint8 N×H×W train ids (255 = ignore), or None where the stream has no labels.
        positions: int64 N, the global position of every sample; all randomness of its view derives from it.
        indices: int64 N, the image's index in its split.
        skipped: paths of unreadable files that were replaced by the sample after them.
    """

    images: Tensor
    labels: Tensor | None
    positions: np.ndarray
    indices: np.ndarray
    skipped: tuple[str, ...] = ()


class View(Protocol):
    """A deterministic augmentation: the same positions give the same crops, flips and colours."""

    def __call__(
        self, images: Tensor, labels: Sequence[Tensor], positions: np.ndarray
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Augment images and every label map together.

        Args:
            images: uint8 N×H×W×3 on the student's device.
            labels: maps N×h×w that share the image's field of view; the first one is the class map that crop rules
                look at. Sampled to the nearest.
            positions: int64 N, global sample positions.

        Returns:
            float32 N×3×h'×w' network input and the maps, N×h'×w'.
        """
        ...


class Stream(Protocol):
    """An endless, reproducible sequence of samples whose whole state is one integer, the global position."""

    view: View

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image index at every position: a pure function of (seed, position)."""
        ...

    def batches(self, position: int, steps: int, batch: int, rank: int, world: int) -> Iterator[RawBatch]:
        """``steps`` batches of ``batch // world`` samples for one rank, beginning at a global position."""
        ...


class ImageReader(Protocol):
    """What a teacher knows of the target images. There is no label path here."""

    @property
    def image_ids(self) -> Sequence[str]:
        """Stable ids, in order."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """One image, uint8 H×W×3 RGB, at size (width, height)."""
        ...


@dataclass
class Labelled:
    """What a label rule makes of one image.

    Attributes:
        columns: the record's columns, uint8, shapes as declared by the rule's layout.
        class_pixels: int64 C, pixels of each class that the record offers.
        histogram: int64 C×256, quantised confidence of each predicted class, before any threshold.
        evidence: of how frequent classes are, of one image, where it was asked for.
    """

    columns: dict[str, np.ndarray]
    class_pixels: np.ndarray
    histogram: np.ndarray
    evidence: Evidence | None = None


class LabelRule(Protocol):
    """Turns a network and target images into pseudo-label records; runs at the teacher."""

    @property
    def layout(self) -> RecordLayout:
        """The columns of its records."""
        ...

    @property
    def num_classes(self) -> int:
        """C."""
        ...

    @property
    def view_sizes(self) -> tuple[tuple[int, int], ...]:
        """The image sizes (width, height) that the rule wants to see."""
        ...

    def label(
        self,
        network: nn.Module,
        views: Sequence[Tensor],
        seeds: Sequence[int],
        adjustment: Adjustment | None = None,
    ) -> list[Labelled]:
        """Label N images.

        Args:
            network: in eval mode, on the device of the views.
            views: one uint8 N×H×W×3 tensor for each of ``view_sizes``.
            seeds: one seed an image; the labels depend on nothing else that is random.
            adjustment: to the target's class frequencies; None for none.
        """
        ...


class Selection(Protocol):
    """The part of a label rule that needs the whole set: thresholds from the histograms of all live records."""

    def thresholds(self, histogram: np.ndarray) -> np.ndarray:
        """uint8 C from int64 C×256; applied when a record is read."""
        ...

    def apply(self, record: Mapping[str, np.ndarray], thresholds: np.ndarray) -> np.ndarray:
        """uint8 H×W label with 255 where the record's confidence stays below its class's threshold."""
        ...


@dataclass(frozen=True)
class LabelPlan:
    """How a stage gets its pseudo labels."""

    rule: LabelRule
    policy: StalenessPolicy
    selection: Selection | None = None
    label_column: str = "label"
    extra_column: str | None = None
    """A column of maps that goes to the objective beside the label, or None."""
    raw_columns: tuple[str, ...] = ()
    """Columns that the objective gets as they were recorded, in the geometry of the whole image."""
    prior: PriorPlan | None = None
    """How labels are adjusted to the target's class frequencies; None leaves them."""
    source: SourceSight | None = None
    """Labelled source images, where these frequencies are estimated from what is taken for what; None where not."""

    def for_bank(self) -> LabelPlan:
        """The same plan without the rule's code and the images."""
        return replace(self, rule=RuleShape(self.rule.layout, self.rule.num_classes), source=None)


@dataclass(frozen=True)
class RuleShape:
    """What the bank needs to know of a rule. It starts without torch, which most rules import."""

    layout: RecordLayout
    num_classes: int

    @property
    def view_sizes(self) -> tuple[tuple[int, int], ...]:
        """None: it labels nothing."""
        return ()

    def label(
        self,
        network: nn.Module,
        views: Sequence[Tensor],
        seeds: Sequence[int],
        adjustment: Adjustment | None = None,
    ) -> list[Labelled]:
        """Never called at the bank."""
        raise NotImplementedError("this is the shape of a label rule, not the rule")


@dataclass(frozen=True)
class Batch:
    """What an objective sees: float32 network inputs and int64 labels on the student's device.

    ``pseudo_weight`` is float32 N (one weight a label, from its age); all-255 pseudo labels are the way a missing
    record looks, so every rank runs the same forwards whatever it has. ``labelled`` are target images with labels of
    their own, in a semi-supervised run. ``extra`` is uint8 N×P×h×w, the label plan's extra column in the geometry of
    the target view, zeros where there is no record. ``records`` holds the plan's raw columns, uint8 N×shape, zeros
    where there is no record. ``whole`` are the target images that ``target`` is a view of, uint8 N×H×W×3, and
    ``positions`` the global sample positions of every stream, from which all geometry of a view can be had again.
    """

    source: Tensor | None
    source_label: Tensor | None
    target: Tensor | None
    pseudo_label: Tensor | None
    pseudo_weight: Tensor | None
    labelled: Tensor | None = None
    labelled_label: Tensor | None = None
    extra: Tensor | None = None
    records: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Tensor | None = None
    positions: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class StepInfo:
    """Where the run stands. ``generator_seed`` is a function of (seed, step, rank)."""

    stage_step: int
    stage_steps: int
    seed: int


@dataclass(frozen=True)
class Reward:
    """How well a student fared with the labels of a teacher that learns.

    Attributes:
        step: the student's step.
        stage_step: of its stage.
        version: of the weights that made the labels it learned from, in the student's steps: their median.
        terms: means of the loss terms that the stage sends back, over the steps since the last reward.
    """

    step: int
    stage_step: int
    version: int
    terms: Mapping[str, float]


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may know of the process it runs in."""

    device: torch.device
    sum_over_students: Callable[[Tensor], Tensor]
    """Sums a tensor over the students, for statistics of the global batch; returns it as it is with one."""
    average_gradients: Callable[[Sequence[nn.Parameter]], None]
    """Averages .grad over the students; does nothing with one."""
    gather: Callable[[Tensor], Tensor] = lambda value: value
    """The tensors of all students, of one shape, one behind the other; with one student its own."""
    rank: int = 0
    world: int = 1
    network: nn.Module | None = None
    """The student's network."""
    teaching: nn.Module | None = None
    """The network that is published: the student's average, where the stage has one."""
    before: nn.Module | None = None
    """The published network of the stage before, frozen, where the stage keeps it."""
    as_student: Callable[[nn.Module], nn.Module] = lambda network: network
    """A network that computes as the student's does: in its precision, and normalising as many images at a time."""
    fresh: bool = True
    """Whether the stage begins; False where a checkpoint of it is about to be loaded."""
    reward: Callable[[], Reward | None] = lambda: None
    """For a teacher that learns: what it last heard of its student; None before it hears anything."""


class Objective(Protocol):
    """Turns network outputs and a batch into named loss terms, and owns whatever else it needs to do so."""

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """Weighted scalar terms; the student minimises their sum."""
        ...

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Update the objective's own modules after the network's step; returns scalars to record."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, tensors included."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ...


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe, ready to run.

    Attributes:
        name: shown in the progress line and in the metrics.
        steps: optimiser steps.
        batch: samples of each domain in a global batch.
        streams: ``source`` and/or ``target``, and ``labelled`` where a few target images come with labels.
        objective: builds the objective; called once in every student.
        optimiser: builds the optimiser of a network, deciding which parameters train; every group carries
            ``lr_scale``.
        learning_rate: base learning rate at a stage step.
        labels: how target images get their labels, or None.
        starts_from: ``previous`` (the student as it stands) or ``teacher`` (the published weights as they stand).
        ema_decay: decay of the exponential moving average that teaches and is scored, or None to publish the student.
        statistics: ``running`` keeps the batch-norm statistics that training left behind (both domains mixed);
            ``target`` estimates them anew on recent target images before weights are published.
        dropout: channel dropout rate of the student in this stage; None leaves the network's own.
        clip_norm: bound on the norm of the student's gradient; None for none.
        plain_view: how target images look without augmentation, for ``statistics="target"``.
        norm_images: images that are normalised together in training; None for all that pass the network at once.
        frozen_norms: whether batch norms keep their statistics and normalise by them in training, too.
        network: builds the network of this stage and of those after it, freshly initialised, whatever the student was;
            None goes on with the one there is.
        initial: fills that fresh network, or part of it; None leaves it random.
        labelled_by: whose weights make the labels: those that this stage publishes; with ``refresh="once"`` perhaps the
            ones that the stage before published; or those of ``teacher``.
        keeps_before: whether the published network of the stage before is kept, in checkpoints, too.
        teacher: how the network that labels goes on learning meanwhile, in an actor of its own; it begins as the one
            that the stage before published, and takes no more steps than the student.
        reward: loss terms whose means are sent back to that teacher.
    """

    name: str
    steps: int
    batch: int
    streams: Mapping[str, Stream]
    objective: Callable[[ObjectiveContext], Objective]
    optimiser: Callable[[nn.Module], torch.optim.Optimizer]
    learning_rate: Callable[[int], float]
    labels: LabelPlan | None = None
    starts_from: Literal["previous", "teacher"] = "previous"
    ema_decay: float | None = None
    statistics: Literal["running", "target"] = "running"
    dropout: float | None = None
    clip_norm: float | None = None
    plain_view: View | None = None
    norm_images: int | None = None
    frozen_norms: bool = False
    network: Callable[[], nn.Module] | None = None
    initial: Callable[[nn.Module], None] | None = None
    labelled_by: Literal["teaching", "before", "teacher"] = "teaching"
    keeps_before: bool = False
    teacher: StagePlan | None = None
    reward: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labelled_by == "before" and not self.keeps_before:
            raise ValueError(f"stage {self.name} is labelled by the network before it, so it must keep that")
        if self.labelled_by == "before" and (self.labels is None or self.labels.policy.refresh != "once"):
            raise ValueError(f"stage {self.name} is labelled by a network that does not change: once")
        if (self.labelled_by == "teacher") != (self.teacher is not None):
            raise ValueError(f"stage {self.name} is labelled by a teacher that learns if, and only if, it has one")
        if self.teacher is not None and not (self.keeps_before and self.labels is not None):
            raise ValueError(f"stage {self.name} has a teacher that begins as the network before and makes labels")


@dataclass(frozen=True)
class RunPlan:
    """Everything a student needs to run a recipe from its first step to its last.

    Attributes:
        network: builds a freshly initialised network, that which the first stage finds.
        stages: in order.
        seed: decides initialisation, sample order, views, dropout.
        folder: the run directory, absolute, visible to every student.
        publish_every: steps between two published weights.
        evaluate_every: steps between two scored weights, a multiple of ``publish_every``; 0 scores only the end.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two lines of metrics.
        max_skipped_share: the share of unreadable images of a split above which the run ends.
        initial: fills a fresh network, or part of it, before the first step; None leaves it random.
        precision: what the student's network computes in; ``auto`` is bfloat16 on a GPU that has it, else float32.
            Weights, losses and everything that is published are float32 whatever it is.
    """

    network: Callable[[], nn.Module]
    stages: tuple[StagePlan, ...]
    seed: int
    folder: str
    publish_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 200
    log_every: int = 10
    max_skipped_share: float = 0.01
    initial: Callable[[nn.Module], None] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def network_of(self, stage: int) -> Callable[[], nn.Module]:
        """Builds the network that a stage trains; of stage -1, the one that the first stage finds."""
        own = (plan.network for plan in reversed(self.stages[: stage + 1]))
        return next((network for network in own if network is not None), self.network)

    @property
    def networks(self) -> tuple[Callable[[], nn.Module], ...]:
        """Builders of every network whose weights may be published, in order."""
        return self.network, *(plan.network for plan in self.stages if plan.network is not None)

    @property
    def total_steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(stage.steps for stage in self.stages)
