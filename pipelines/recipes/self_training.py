"""Self-training on pseudo labels: the second stage of MRNet, Rectifying and EPLC (methods §3.3 and §4.2).

The recipes differ in how labels are made and which of them count; how a network learns from them stands here. The
defaults differ from the published systems where those fail on target data in general; ``published`` brings them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.protocols import Batch, LabelPlan, ObjectiveContext, Selection, StagePlan, StepInfo
from actors.staleness import StalenessPolicy
from models.losses import IGNORE, Divergence, mean_weight, memory_regularisation, negative_terms, rectified_terms
from models.networks.deeplab import AUX_WEIGHT, Logits, upsample_logits
from pipelines.choices import check_choices, decided
from pipelines.label_rules import NEGATIVE, MonteCarloRule
from pipelines.recipes.optimisation import Rate, sgd
from pipelines.recipes.recipe import Ingredients
from pipelines.recipes.supervised import SegmentationTerm, segmentation_term, training_view
from pipelines.views import Whole, class_mix

PSEUDO_CROP_VALUES = 10
"""A crop is drawn again until its pseudo label shows more than this many distinct values, of 19 (methods §2.4)."""

Options = TypeVar("Options", bound="SelfTrainingOptions")


@dataclass(frozen=True)
class SelfTrainingOptions:
    """What decides how a network learns from pseudo labels, beyond schedule and size."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {
        "mixing": ("classes", "none"),
        "source_weight": (1.0, 0.0),
        "teacher": ("average", "student"),
        "statistics": ("target", "running"),
        "class_weights": ("normalised", "published"),
        "colour": (0.3, 0.0),
        "ignore_bottom": (None, 0.0),
    }
    """What an option that is left open stands for: in our default, and in the published systems."""

    loss: Literal["rectified", "plain"] = "rectified"
    """rectified: cross-entropy that counts less where the heads disagree, and their disagreement. plain:
    cross-entropy, and memory regularisation."""
    divergence: Divergence = "published"
    """How the rectified loss measures disagreement (Q-MR-5). published: of each head from the other, as the code of
    the paper does. main_to_aux, aux_to_main: one direction for both heads. squared: squared difference."""
    memory: float = 0.1
    """Weight of memory regularisation beside the plain loss."""
    ignore_bottom: float | None = None
    """Share of the image's height, from below, without pseudo labels. The camera's own bonnet is no class: whatever a
    network takes it for spreads upwards over the road, round by round. Default: 0.23 on the street benchmarks, 0 on
    images of your own and with --faithful."""
    mixing: Literal["auto", "classes", "none"] = "auto"
    """classes: paste half of the classes of a source image onto each target image. none: target images alone. auto:
    classes, and none with --faithful."""
    source_weight: float | None = None
    """Weight of the supervised source loss in stage II; 0 leaves source images out. Default: 1, 0 with --faithful."""
    teacher: Literal["auto", "average", "student"] = "auto"
    """Which weights label: the exponential moving average, or the student itself. auto: average, and student with
    --faithful."""
    statistics: Literal["auto", "target", "running"] = "auto"
    """Batch-norm statistics of the teaching network: of target images alone, or of both domains as training left
    them. auto: target, and running with --faithful."""
    class_weights: Literal["auto", "normalised", "published"] = "auto"
    """normalised: the class weights of a batch of pseudo labels are divided by their mean over its labelled pixels.
    published: they are not, so the loss of a batch with rare classes counts up to 49 times; a network that starts from
    random weights diverges. auto: normalised, and published with --faithful."""
    dropout: float = 0.2
    """Channel dropout rate of the student in stage II."""
    colour: float | None = None
    """Strength of the colour jitter on what the student sees in stage II. Default: 0.3, and 0 with --faithful."""
    rounds: int = 1
    """Rounds that share the steps of stage II, each on labels that the network as it then stands has made, and nothing
    is learned meanwhile (with --refresh once). A published round begins at stage I again: export the labels of a run,
    then --init STAGE_ONE --from-stage 2 --pseudo-labels FILE."""
    max_label_age: int | None = None
    """Steps after which a label is not used any more, until a teacher has made it anew; for labels made without end."""
    label_half_life: float | None = None
    """Steps after which a label's loss counts half, after twice as many a quarter; for labels made without end."""
    autoaugment: bool = False
    """MRNet's part of AutoAugment on what the student sees in stage II. Off by default and as published, though the
    published command turns it on by accident (Q-MR-1)."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("source_weight", "colour", "memory"):
            if (getattr(self, name) or 0.0) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("dropout", "ignore_bottom"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; give a rate in [0, 1)")
        for name in ("max_label_age", "label_half_life"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RunError(f"{name} is {value}; give a number of steps above 0")
        if self.rounds < 1:
            raise RunError(f"rounds is {self.rounds}; self-training needs at least one")
        if self.mixing == "classes" and self.source_weight == 0:
            raise RunError("mixing='classes' pastes source images, so source_weight must not be 0")

    def check_refresh(self, refresh: str) -> None:
        """Refuse what belongs to the other way of making labels.

        Raises:
            RunError: rounds of labels that are made without end, or bounds on the age of a round's.
        """
        if refresh == "continuous" and self.rounds > 1:
            raise RunError(
                f"rounds is {self.rounds}, but labels are made without end; add --refresh once, or leave rounds out"
            )
        for name in ("max_label_age", "label_half_life"):
            value = getattr(self, name)
            if refresh == "once" and value is not None:
                raise RunError(
                    f"{name} is {value}, but labels of one round grow old by design; leave it or --refresh once out"
                )

    def resolved(self: Options, faithful: bool) -> Options:
        """The same with everything decided that the user left open."""
        return decided(self, faithful)


class SelfTrainingObjective:
    """A loss on pseudo labels, on mixed images where asked, beside the supervised source loss."""

    def __init__(
        self,
        term: SegmentationTerm,
        options: SelfTrainingOptions,
        negative: float,
        context: ObjectiveContext,
    ) -> None:
        self.term, self.options, self.negative = term, options, negative
        self.source_balance = term.balance(context)
        self.target_balance = term.balance(context)

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`; methods §3.3 and §4.2."""
        assert batch.target is not None
        assert batch.pseudo_label is not None
        assert batch.pseudo_weight is not None
        images, labels = batch.target, batch.pseudo_label
        weights = batch.pseudo_weight[:, None, None].expand(labels.shape)
        terms: dict[str, Tensor] = {}
        pasted = torch.zeros_like(labels, dtype=torch.bool)
        if batch.source is None or batch.source_label is None:
            logits = network(images)
        else:
            if self.options.mixing == "classes":
                images, labels, pasted = class_mix(
                    batch.source, batch.source_label, images, labels, self.term.num_classes, info.seed
                )
                weights = weights.masked_fill(pasted, 1.0)
            # One pass: both are normalised by the same batch statistics, those the running ones record.
            source, logits = _halves(network(torch.cat((batch.source, images))))
            supervised = self.term.of_logits(source, batch.source_label, self.source_balance)
            assert self.options.source_weight is not None
            terms["loss/segmentation"] = self.options.source_weight * supervised
        more = self._plain if self.options.loss == "plain" else self._rectified
        terms |= more(logits, labels, weights)
        if batch.extra is not None and self.negative:
            known = _unpacked(batch.extra, self.term.num_classes) & ~pasted[:, None]
            enlarged = upsample_logits(logits, (labels.shape[-2], labels.shape[-1]))
            main, aux = negative_terms(enlarged, known, weights)
            terms["loss/negative"] = self.negative * (main + AUX_WEIGHT * aux)
        return terms

    def _plain(self, logits: Any, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Steps 1 to 3 and 6 of stage I, on pseudo labels (methods §3.3, "MRNet+Pseudo"); weight 0 means no label."""
        labels = labels.masked_fill(weights == 0, IGNORE)
        terms = {"loss/pseudo": self.term.of_logits(logits, labels, self.target_balance)}
        if self.options.memory:
            enlarged = upsample_logits(logits, (labels.shape[-2], labels.shape[-1]))
            terms["loss/memory"] = self.options.memory * memory_regularisation(enlarged)
        return terms

    def _rectified(self, logits: Logits, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Methods §3.3."""
        logits = upsample_logits(logits, (labels.shape[-2], labels.shape[-1]))
        class_weights = self.target_balance(labels)
        if self.options.class_weights == "normalised":
            class_weights = class_weights / mean_weight(class_weights, labels)
        found = rectified_terms(
            logits, labels, class_weights, divergence=self.options.divergence, pixel_weights=weights
        )
        return {
            "loss/rectified_main": found.main_ce,
            "loss/rectified_aux": AUX_WEIGHT * found.aux_ce,
            "loss/divergence": found.main_divergence + AUX_WEIGHT * found.aux_divergence,
        }

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Nothing of its own learns."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights."""
        return {"source": self.source_balance.state_dict(), "target": self.target_balance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.source_balance.load_state_dict(state["source"])
        self.target_balance.load_state_dict(state["target"])


def _unpacked(planes: Tensor, num_classes: int) -> Tensor:
    """Bits of uint8 N×P×H×W, the lowest first, as bool N×C×H×W."""
    bits = torch.arange(8, device=planes.device, dtype=torch.uint8).view(1, 1, 8, 1, 1)
    return ((planes[:, :, None] >> bits) & 1).flatten(1, 2)[:, :num_classes].bool()


def _halves(outputs: Any) -> tuple[Any, Any]:
    """The first and the second half of a batch, of a named tuple of maps."""
    one, two = zip(*(part.chunk(2) for part in outputs), strict=True)
    return type(outputs)(*one), type(outputs)(*two)


def self_training_stages(
    ingredients: Ingredients,
    options: SelfTrainingOptions,
    rule: MonteCarloRule,
    selection: Selection | None = None,
    negative: float = 0.0,
) -> tuple[StagePlan, ...]:
    """Stage II, in as many rounds as the options say.

    Args:
        ingredients: of the run.
        options: how the network learns.
        rule: how labels are made.
        selection: what a reader keeps of them, where that needs the whole set.
        negative: weight of the loss on negative labels, which the rule then makes.

    Raises:
        RunError: there are fewer steps than rounds, or labels are made without end and so in no rounds.
    """
    options.check_refresh(ingredients.refresh)
    stage, rounds = _self_training_stage(ingredients, options, rule, selection, negative), options.rounds
    if rounds == 1:
        return (stage,)
    if stage.steps < rounds:
        raise RunError(f"{stage.steps} steps of self-training cannot be {rounds} rounds; give more --steps")
    begins = [stage.steps * k // rounds for k in range(rounds + 1)]
    return tuple(
        replace(
            stage,
            name=f"{stage.name}, round {k + 1}",
            steps=begins[k + 1] - begins[k],
            learning_rate=partial(_later, stage.learning_rate, begins[k]),
        )
        for k in range(rounds)
    )


def _later(rate: Callable[[int], float], begun: int, step: int) -> float:
    """A learning rate whose schedule began earlier."""
    return rate(begun + step)


def _self_training_stage(
    ingredients: Ingredients,
    options: SelfTrainingOptions,
    rule: MonteCarloRule,
    selection: Selection | None,
    negative: float,
) -> StagePlan:
    preset, schedule = ingredients.preset, ingredients.preset.stages[1]
    # As published: more than 10 values of 19 classes, more than 4 of 9; the same share of any other number up to 19.
    values = PSEUDO_CROP_VALUES * min(ingredients.num_classes, 19) // 19
    # A pseudo label that is still all-255 shows one value: it takes its last draw, as a real one may have to.
    view = replace(
        training_view(ingredients, schedule, more_than_values=values),
        colour=options.colour or 0.0,
        autoaugment=options.autoaugment,
    )
    streams = {"target": ingredients.target(schedule.target_size, view)}
    if options.source_weight:
        streams["source"] = ingredients.source(schedule.source_size, replace(view, seed=view.seed + 1))
    return StagePlan(
        name="self-training",
        steps=schedule.steps,
        batch=schedule.batch,
        streams=streams,
        objective=partial(SelfTrainingObjective, segmentation_term(ingredients), options, negative),
        optimiser=sgd(preset, train_norm_affine=True),
        learning_rate=Rate(schedule.learning_rate, schedule.warmup, schedule.horizon),
        labels=LabelPlan(
            rule=rule,
            policy=StalenessPolicy(ingredients.refresh, options.max_label_age, options.label_half_life),
            selection=selection,
            extra_column=NEGATIVE if rule.negative else None,
        ),
        ema_decay=preset.ema_decay if options.teacher == "average" else None,
        statistics="running" if options.statistics == "running" else "target",
        dropout=options.dropout,
        clip_norm=preset.clip_norm,
        plain_view=Whole(preset.network.pixels),
        norm_images=ingredients.norm_images_of(schedule),
    )


def bottom(ingredients: Ingredients, options: SelfTrainingOptions) -> float:
    """Share of the label's height, from below, that is withheld."""
    return ingredients.bonnet if options.ignore_bottom is None else options.ignore_bottom


def winner_rule(ingredients: Ingredients, options: SelfTrainingOptions, threshold: float) -> MonteCarloRule:
    """Labels that are the winner of the fused views, without dropout, where it reaches a probability (methods §3.2)."""
    return MonteCarloRule(
        num_classes=ingredients.num_classes,
        sizes=ingredients.preset.label_views,
        label_size=ingredients.preset.label_size,
        passes=1,
        dropout=0.0,
        keep="mean",
        threshold=threshold,
        max_std=0.0,
        ignore_bottom=bottom(ingredients, options),
    )
