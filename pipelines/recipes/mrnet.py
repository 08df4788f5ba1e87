"""MRNet, stage I: adversarial alignment with memory regularisation (methods §3.1; Zheng & Yang, IJCAI 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.protocols import Batch, ObjectiveContext, StagePlan, StepInfo
from models.losses import discriminator_loss, generator_loss, memory_regularisation
from models.networks.deeplab import Logits, upsample_logits
from models.networks.discriminators import MultiScaleDiscriminator
from models.schedule import poly, set_rate
from pipelines.choices import check_choices, decided
from pipelines.recipes.optimisation import Rate, sgd
from pipelines.recipes.recipe import Ingredients, Recipe
from pipelines.recipes.supervised import SegmentationTerm, segmentation_term, training_view
from pipelines.views import RandomCrop, Whole

SOURCE_CROP_VALUES = 10
"""A source crop is drawn again until its label shows more than this many distinct values (methods §2.4)."""
MEMORY_FROM = 15_000 / 25_000
"""Share of stage I after which memory regularisation sets in: iteration 15 000 of 25 000 (Q-MR-4)."""


@dataclass(frozen=True)
class MrnetOptions:
    """What decides stage I beyond schedule and size; the defaults are those of the published runs."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {
        "teacher": ("average", "student"),
        "statistics": ("target", "running"),
    }
    """What an option that is left open stands for: in our default, and in the published system."""

    adversarial_aux: float = 2e-4
    """Weight of the generator loss on the auxiliary head."""
    adversarial_main: float = 1e-3
    """Weight of the generator loss on the primary head."""
    memory: float = 0.1
    """Weight of memory regularisation."""
    gradient_penalty: float = 0.01
    """Weight of the discriminators' penalty on real inputs."""
    discriminator_rate: float = 1e-4
    """Learning rate of the discriminators' Adam."""
    dropout: float = 0.1
    """Channel dropout rate of the student."""
    teacher: Literal["auto", "average", "student"] = "auto"
    """Which weights are published: the exponential moving average, or the student itself. auto: average, and student
    with --faithful."""
    statistics: Literal["auto", "target", "running"] = "auto"
    """Their batch-norm statistics: of target images alone, or of both domains as training left them. auto: target, and
    running with --faithful."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.dropout < 1:
            raise RunError(f"dropout is {self.dropout}; give a rate in [0, 1)")
        for name in ("adversarial_aux", "adversarial_main", "memory", "gradient_penalty", "discriminator_rate"):
            if getattr(self, name) < 0:
                raise RunError(f"{name} is {getattr(self, name)}; a weight or rate is not negative")

    def resolved(self, faithful: bool) -> MrnetOptions:
        """The same with everything decided that the user left open."""
        return decided(self, faithful)


class AlignmentObjective:
    """Supervised source loss, generator loss and memory regularisation; owns both discriminators."""

    def __init__(
        self,
        term: SegmentationTerm,
        options: MrnetOptions,
        discriminator_width: int,
        horizon: int,
        context: ObjectiveContext,
    ) -> None:
        self.term, self.options, self.horizon, self.context = term, options, horizon, context
        self.balance = term.balance(context)
        self.discriminators = nn.ModuleDict(
            {head: MultiScaleDiscriminator(term.num_classes, width=discriminator_width) for head in ("aux", "main")}
        ).to(context.device)
        self.optimiser = torch.optim.Adam(
            self.discriminators.parameters(), lr=options.discriminator_rate, betas=(0.9, 0.99)
        )
        self._real: Tensor | None = None
        self._fake: dict[str, Tensor] = {}

    def losses(self, network: nn.Module, batch: Batch, info: StepInfo) -> dict[str, Tensor]:
        """See :class:`actors.protocols.Objective`; steps 1 to 8 of methods §3.1."""
        assert batch.source is not None
        assert batch.source_label is not None
        assert batch.target is not None
        size = (batch.source.shape[-2], batch.source.shape[-1])
        source = network(batch.source)
        segmentation = self.term.of_logits(source, batch.source_label, self.balance)
        target = upsample_logits(network(batch.target), size)
        terms = {"loss/segmentation": segmentation}
        heads = {
            "aux": (target.aux, self.options.adversarial_aux),
            "main": (target.main, self.options.adversarial_main),
        }
        # In float32 whatever the network computed in: the discriminators' own step has no autocast.
        self._real = upsample_logits(_detached(source), size).fused().float().softmax(1)
        self.discriminators.requires_grad_(False)
        for name, (logits, weight) in heads.items():
            probabilities = logits.softmax(1)
            self._fake[name] = probabilities.detach().float()
            terms[f"loss/adversarial_{name}"] = weight * generator_loss(self.discriminators[name](probabilities))
        memory = memory_regularisation(target)
        active = float(info.stage_step >= MEMORY_FROM * info.stage_steps)
        terms["loss/memory"] = self.options.memory * active * memory
        return terms

    def learn(self, info: StepInfo) -> dict[str, Tensor]:
        """Step 9 of methods §3.1: both discriminators, one backward pass."""
        assert self._real is not None
        self.discriminators.requires_grad_(True)
        losses = {
            name: discriminator_loss(
                self.discriminators[name], fake, self._real, penalty_weight=self.options.gradient_penalty
            ).total
            for name, fake in self._fake.items()
        }
        set_rate(self.optimiser, self.options.discriminator_rate * poly(info.stage_step, horizon=self.horizon))
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.context.average_gradients(list(self.discriminators.parameters()))
        self.optimiser.step()
        return {f"discriminator/{name}": value.detach() for name, value in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """Running class weights, discriminators and their optimiser."""
        return {
            "balance": self.balance.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.balance.load_state_dict(state["balance"])
        self.discriminators.load_state_dict(state["discriminators"])
        self.optimiser.load_state_dict(state["optimiser"])


def alignment_stage(ingredients: Ingredients) -> StagePlan:
    """Stage I of MRNet, which is also stage I of Rectifying and EPLC."""
    options = (ingredients.alignment or MrnetOptions()).resolved(ingredients.faithful)
    preset, schedule = ingredients.preset, ingredients.preset.stages[0]
    source_view = replace(
        training_view(ingredients, schedule, more_than_values=SOURCE_CROP_VALUES), jitter=preset.source_jitter
    )
    pixels = preset.network.pixels
    target_view = RandomCrop(ingredients.seed + 1, schedule.crop, jitter=(1.0, 1.0), flip=0.0, pixels=pixels)
    return StagePlan(
        name="alignment",
        steps=schedule.steps,
        batch=schedule.batch,
        streams={
            "source": ingredients.source(schedule.source_size, source_view),
            "target": ingredients.target(schedule.target_size, target_view),
        },
        objective=partial(
            AlignmentObjective,
            segmentation_term(ingredients),
            options,
            preset.discriminator_width,
            schedule.horizon,
        ),
        optimiser=sgd(preset, train_norm_affine=_train_norm_affine(ingredients)),
        learning_rate=Rate(schedule.learning_rate, schedule.warmup, schedule.horizon),
        ema_decay=preset.ema_decay if options.teacher == "average" else None,
        statistics="running" if options.statistics == "running" else "target",
        dropout=options.dropout,
        clip_norm=preset.clip_norm,
        plain_view=Whole(pixels),
        norm_images=ingredients.norm_images_of(schedule),
    )


def _train_norm_affine(ingredients: Ingredients) -> bool:
    """As published they stay frozen, which presumes a pretrained backbone."""
    return ingredients.norm_affine == "train" or (ingredients.norm_affine == "auto" and not ingredients.faithful)


def _detached(logits: Logits) -> Logits:
    return Logits(logits.aux.detach(), logits.main.detach())


RECIPE = Recipe(
    name="mrnet",
    summary="stage I of MRNet: adversarial alignment and memory regularisation",
    schedules=1,
    system="mrnet",
    stages=lambda ingredients, options: (alignment_stage(replace(ingredients, alignment=options)),),
)
