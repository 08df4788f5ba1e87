"""The student: one process of the learning side, the loop of the run.

:class:`Student` is an ordinary object and runs the same in a Ray Train worker, in a plain Ray task (the reference
runs) and in a unit test. All its randomness is a function of (seed, step, rank) or of a sample's global position, so
a resumed run needs no random state: it continues with the numbers the uninterrupted one would have drawn.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.checkpoints import CheckpointStore, keep_stage, snapshot
from actors.errors import RunError
from actors.label_view import LabelView
from actors.labeller import gpu_memory
from actors.protocols import (
    Batch,
    Objective,
    ObjectiveContext,
    RawBatch,
    Reward,
    RunPlan,
    StagePlan,
    StepInfo,
)
from actors.publisher import Publisher, TeachingNetwork
from actors.reward_board import Standing
from actors.staleness import age_statistics
from actors.storage import place
from models.networks.statistics import norm_statistics
from models.schedule import set_rate

LOOK_AHEAD_BATCHES = 8
"""Batches ahead of the step for which the view starts to pull labels."""
STOP_CHECK_SECONDS = 0.5
MAX_RECOVERIES = 3
"""How often a run goes back to its last good weights because the loss was no finite number."""


class Link(Protocol):
    """What a student needs of the cluster. :class:`actors.link.ClusterLink` is the real one."""

    publisher: Publisher | None

    def view(self, stage: int, stage_version: int) -> LabelView:
        """The label view of a stage."""
        ...

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Record a line of metrics; never blocks."""
        ...

    def say(self, message: str, step: int) -> None:
        """A sentence for the user."""
        ...

    def stop_requested(self) -> bool:
        """Whether the user asked to stop; never blocks."""
        ...

    def bank_index(self) -> dict[str, Any]:
        """The bank's index for a checkpoint."""
        ...

    def report(self, numbers: dict[str, Any]) -> None:
        """Report to Ray Train: a barrier, so every rank calls it at the same steps."""
        ...

    def begin_teaching(self, stage: int, first_step: int, step: int) -> None:
        """Tell a teacher that learns that its stage begins, or goes on; never blocks."""
        ...

    def tell(self, standing: Standing) -> None:
        """Tell that teacher where its student stands and how it fares; never blocks."""
        ...

    def reward(self) -> Reward | None:
        """What such a teacher last heard; never blocks."""
        ...


@dataclass
class Tally:
    """What a student counts over the whole run; part of its checkpoint."""

    samples: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    label_wait: float = 0.0
    labelled_seconds: float = 0.0
    join: float = 0.0
    hits: int = 0
    misses: int = 0
    ages: Counter[int] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**self.__dict__, "ages": dict(self.ages), "skipped": list(self.skipped)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """The inverse of :meth:`state_dict`."""
        return cls(**{**state, "ages": Counter(state["ages"])})

    def summary(self) -> dict[str, Any]:
        """The student's part of ``results.json``."""
        return {
            "images_per_s": self.samples / max(1e-9, self.seconds),
            "seconds": self.seconds,
            "wait_share": self.label_wait / max(1e-9, self.labelled_seconds),
            "data_wait_share": self.data_wait / max(1e-9, self.seconds),
            "join_share": self.join / max(1e-9, self.seconds),
            "labels_read": self.hits,
            "labels_missing": self.misses,
            "label_age_steps": age_statistics(self.ages),
            "skipped": list(self.skipped),
        }


@dataclass
class StageState:
    """What lives as long as a stage."""

    plan: StagePlan
    index: int
    first_step: int
    network: nn.Module
    optimiser: torch.optim.Optimizer
    objective: Objective
    teaching: TeachingNetwork
    before: nn.Module | None = None
    """The published network of the stage before, where the plan keeps it."""
    before_saved: dict[str, Any] = field(default_factory=dict)
    """Its weights on the host, for checkpoints: they do not change."""
    view: LabelView | None = None
    streams: dict[str, Iterator[RawBatch]] = field(default_factory=dict)


class InBfloat16(nn.Module):
    """A network that computes in bfloat16 where autocast holds that safe; its outputs are float32 again."""

    def __init__(self, network: nn.Module, device_type: str) -> None:
        super().__init__()
        self.network, self.device_type = network, device_type

    def forward(self, images: Tensor) -> Any:
        """A tensor, or a named tuple of tensors, as the network returns it."""
        with torch.autocast(self.device_type, torch.bfloat16):
            found = self.network(images)
        return found.float() if isinstance(found, Tensor) else type(found)(*(part.float() for part in found))


class InChunks(nn.Module):
    """A network whose batch norms see a few images at a time, as those of published runs on several devices did.

    In training, every chunk is normalised by its own statistics, and the first alone moves the running ones: what
    ``torch.nn.DataParallel`` does. In evaluation mode nothing changes.
    """

    def __init__(self, network: nn.Module, images: int) -> None:
        super().__init__()
        self.network, self.images = network, images

    def forward(self, images: Tensor) -> Any:
        """A tensor, or a named tuple of tensors, as the network returns it."""
        if not self.training or len(images) <= self.images:
            return self.network(images)
        found = []
        for number, chunk in enumerate(images.split(self.images)):
            with norm_statistics(self.network, update=number == 0):
                found.append(self.network(chunk))
        first = found[0]
        return torch.cat(found) if isinstance(first, Tensor) else type(first)(*map(torch.cat, zip(*found, strict=True)))


class Student:
    """Runs a plan from its newest checkpoint to its end.

    Args:
        plan: what to run.
        link: the cluster.
        rank, world: this student among all.
        device: where the network lives.
    """

    def __init__(self, plan: RunPlan, link: Link, rank: int, world: int, device: torch.device) -> None:
        for stage in plan.stages:
            if stage.batch % world:
                raise RunError(
                    f"stage {stage.name} has batches of {stage.batch}, which {world} students cannot share evenly; "
                    f"use a number of students that divides {stage.batch}"
                )
        self.plan, self.link, self.rank, self.world, self.device = plan, link, rank, world, device
        self.store = CheckpointStore(place(plan.folder) / "checkpoints")
        torch.manual_seed(plan.seed)
        self.network = self._take(plan.network)
        self.precision = precision_on(device) if plan.precision == "auto" else plan.precision
        self.step = 0
        self.tally = Tally()
        self.stopped = False
        self._stop_checked = 0.0
        self._terms: list[dict[str, Tensor]] = []
        self._good: tuple[int, dict[str, Any]] | None = None
        """Step and state of the last weights whose losses were finite, on the host."""
        self._recoveries = 0
        self._logged_at = (0, time.perf_counter())
        self._ages_logged: Counter[int] = Counter()
        self.lead = rank == 0

    def run(self) -> dict[str, Any]:
        """Run all stages.

        Returns:
            ``{"step", "stopped", "precision", **summary}``.
        """
        state = self.store.newest()
        first = 0
        if state is not None:
            self.network = self._take(self.plan.network_of(state["stage"]))
            self._check_fits(state)
            self.network.load_state_dict(state["student"])
            self.step, first, self.tally = state["step"], state["stage"], Tally.from_state(state["tally"])
            self._ages_logged = Counter(self.tally.ages)
        elif self.plan.initial is not None:
            self.plan.initial(self.network)
        if self.link.publisher is not None:
            self.link.publisher.rewind(self.step, labels=self.plan.stages[first].teacher is None)
        teaching: TeachingNetwork | None = None
        done = self.step >= self.plan.total_steps
        for index in range(first, 0 if done else len(self.plan.stages)):
            stage = self._begin(index, teaching, state)
            state, teaching = None, stage.teaching
            try:
                self._run_stage(stage)
            finally:
                _close(stage.streams)
            if self.stopped:
                break
        self.store.wait()
        return {"step": self.step, "stopped": self.stopped, "precision": self.precision, **self.tally.summary()}

    def _take(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A fresh network on this student's device."""
        network = build().to(self.device)
        self._dropout = {module: module.p for module in _dropouts(network)}
        return network

    def _run_stage(self, stage: StageState) -> None:
        """Take batches, step, publish, log, save, until the stage or the run ends."""
        plan, end = stage.plan, stage.first_step + stage.plan.steps
        once = plan.labels is not None and plan.labels.policy.refresh == "once"
        if stage.view is not None and once and self.step < end:
            began = time.perf_counter()
            complete = stage.view.wait_for_round(self.step, self.link.stop_requested)
            if self.tally.hits:  # a later round: training stood still
                waited = time.perf_counter() - began
                self.tally.seconds += waited
                self.tally.labelled_seconds += waited
                self.tally.label_wait += waited
            self.stopped = self._any_rank(not complete)
            if self.stopped:
                return
        last = time.perf_counter()
        while self.step < end:
            labelled = stage.view is not None and stage.view.hits > 0
            self._train_step(stage)
            self.step += 1
            now = time.perf_counter()
            self.tally.seconds += now - last
            self.tally.labelled_seconds += (now - last) if labelled else 0.0
            last = now
            at_end = self.step == end
            if self.step % self.plan.log_every == 0 or self.step == 1 or at_end:
                self._log(stage)
            # The end of a stage is published and saved by the beginning of the next one.
            finished = self.step == self.plan.total_steps
            if at_end and not finished:
                self._keep_finite(stage)
            if (self._every(self.plan.publish_every) and not at_end) or finished:
                self._publish(stage)
            self.stopped = self._stop_agreed()
            if self.stopped or finished or (self._every(self.plan.checkpoint_every) and not at_end):
                self._checkpoint(stage, now=self.stopped or finished)
            if self.stopped:
                return

    def _train_step(self, stage: StageState) -> None:
        """One optimiser step."""
        plan, stage_step = stage.plan, self.step - stage.first_step
        info = StepInfo(stage_step, plan.steps, _step_seed(self.plan.seed, self.step, self.rank))
        batch = self._batch(stage)
        torch.manual_seed(info.seed)
        set_rate(stage.optimiser, plan.learning_rate(stage_step))
        stage.network.train()
        if plan.frozen_norms:
            _freeze_norms(self.network)
        terms = stage.objective.losses(stage.network, batch, info)
        stage.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        if plan.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), plan.clip_norm)
        stage.optimiser.step()
        more = stage.objective.learn(info)
        stage.teaching.follow(self.network)
        self._terms.append({name: value.detach() for name, value in {**terms, **more}.items()})
        for images in (batch.source, batch.target, batch.labelled):
            self.tally.samples += 0 if images is None else len(images) * self.world

    def _batch(self, stage: StageState) -> Batch:
        """The next sample of every stream, with its label, augmented on the device."""
        began = time.perf_counter()
        raw = {name: next(stream) for name, stream in stage.streams.items()}
        self.tally.data_wait += time.perf_counter() - began
        for item in raw.values():
            self._count_skipped(stage, item)
        target = pseudo = weight = extra = whole = None
        records: dict[str, Tensor] = {}
        source, source_label = self._labelled(stage, "source", raw)
        labelled, labelled_label = self._labelled(stage, "labelled", raw)
        if "target" in raw:
            item, stream = raw["target"], stage.plan.streams["target"]
            stage.teaching.remember(item.images, item.positions)
            whole = item.images.to(self.device, non_blocking=True)
            if stage.view is None and item.labels is None:
                target, _ = stream.view(whole, (), item.positions)
            else:
                joined, weight, more, records = self._join(stage, item)
                target, (pseudo, *planes) = stream.view(whole, (joined, *more), item.positions)
                pseudo = pseudo.long()
                extra = torch.stack(planes, dim=1) if planes else None
        positions = {name: item.positions for name, item in raw.items()}
        return Batch(
            source, source_label, target, pseudo, weight, labelled, labelled_label, extra, records, whole, positions
        )

    def _labelled(
        self, stage: StageState, name: str, raw: dict[str, RawBatch]
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Augmented images and their own labels, of a stream that the stage may have."""
        if name not in raw:
            return None, None
        item = raw[name]
        assert item.labels is not None
        labels = item.labels.to(self.device, non_blocking=True)
        images = item.images.to(self.device, non_blocking=True)
        seen, (label,) = stage.plan.streams[name].view(images, (labels,), item.positions)
        return seen, label.long()

    def _join(self, stage: StageState, item: RawBatch) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
        """Pseudo labels of a target batch, uint8 N×H×W, their weights, float32 N, maps and columns, on the device."""
        if stage.view is None:  # a labelled target stream: only the oracle has one
            assert item.labels is not None
            return item.labels.to(self.device), torch.ones(len(item.indices), device=self.device), [], {}
        began = time.perf_counter()
        before = stage.view.wait_seconds
        stage.view.poll(self.step, self._upcoming(stage))
        labels, weights = zip(*(stage.view.get(int(i), self.step) for i in item.indices), strict=True)
        joined = torch.from_numpy(np.stack(labels)).to(self.device, non_blocking=True)
        plan, more = stage.plan.labels, list[Tensor]()
        assert plan is not None
        if plan.extra_column is not None:
            more = list(self._column(stage.view, plan.extra_column, item).unbind(1))
        records = {name: self._column(stage.view, name, item) for name in plan.raw_columns}
        self.tally.label_wait += stage.view.wait_seconds - before
        self.tally.join += time.perf_counter() - began
        self.tally.hits, self.tally.misses = stage.view.hits, stage.view.misses
        return joined, torch.tensor(weights, dtype=torch.float32).to(self.device, non_blocking=True), more, records

    def _column(self, view: LabelView, name: str, item: RawBatch) -> Tensor:
        """A column of the records of a target batch, uint8 N×shape."""
        rows = np.stack([view.column(name, int(i), self.step) for i in item.indices])
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def _upcoming(self, stage: StageState) -> np.ndarray:
        """Image indices of this rank's target samples in the next batches."""
        batch, share = stage.plan.batch, stage.plan.batch // self.world
        steps = np.arange(self.step, self.step + LOOK_AHEAD_BATCHES) - stage.first_step
        start = self._position(stage.index, stage.first_step)
        first = start + (steps - (self.step - stage.first_step)) * batch + self.rank * share
        positions = (first[:, None] + np.arange(share)).reshape(-1)
        return stage.plan.streams["target"].indices(positions)

    def _begin(self, index: int, previous: TeachingNetwork | None, state: dict[str, Any] | None) -> StageState:
        """Build what a stage needs, from a checkpoint when one is being resumed."""
        plan = self.plan.stages[index]
        first_step = sum(stage.steps for stage in self.plan.stages[:index])
        if previous is not None:
            self._keep_stage(index - 1, previous)
        before = self._before(index, previous, state)
        if state is None and plan.network is not None:
            torch.manual_seed(_step_seed(self.plan.seed, first_step, 1))  # the same network in every student
            self.network = self._take(plan.network)
            if plan.initial is not None:
                plan.initial(self.network)
        elif previous is not None and plan.starts_from == "teacher":
            self.network.load_state_dict(previous.network.state_dict())
        streams = self._open_streams(index, first_step)  # first, so that they read while the rest is built
        for module, rate in self._dropout.items():
            module.p = rate if plan.dropout is None else plan.dropout
        optimiser = plan.optimiser(self.network)
        teaching = TeachingNetwork(
            self.plan.network_of(index)().to(self.device),
            self.network,
            plan.ema_decay,
            plan.statistics,
            plan.plain_view,
            previous if plan.network is None else None,
        )
        for mine, its in zip(_dropouts(self.network), _dropouts(teaching.network), strict=True):
            its.p = mine.p  # an objective may ask the average in training mode
        torch.manual_seed(_step_seed(self.plan.seed, first_step, 0))  # the objective's modules start alike everywhere
        objective = plan.objective(self._context(plan, teaching.network, before, fresh=state is None))
        if state is not None:
            optimiser.load_state_dict(state["optimiser"])
            objective.load_state_dict(state["objective"])
            teaching.load_state_dict(state["teaching"])
        network = self._parallel(plan)
        stage = StageState(plan, index, first_step, network, optimiser, objective, teaching, before, streams=streams)
        if before is not None and self.lead:
            stage.before_saved = snapshot(before.state_dict())
        if state is None and self.step > 0:
            self._checkpoint(stage, now=True)
        else:
            self._good = self.step, snapshot(self._trained(stage))
        if plan.labelled_by in ("before", "teacher"):
            self._publish_before(stage)
        if plan.teacher is not None and self.lead:
            self.link.begin_teaching(index, first_step, self.step)
        if plan.labelled_by != "before" or self.step > first_step:
            self._publish(stage, pin=self.step == first_step)
        if plan.labels is not None:
            stage.view = self.link.view(index, first_step)
            stage.view.ages, stage.view.hits, stage.view.misses = (
                self.tally.ages,
                self.tally.hits,
                self.tally.misses,
            )
        return stage

    def _before(self, index: int, previous: TeachingNetwork | None, state: dict[str, Any] | None) -> nn.Module | None:
        """The published network of the stage before, where a stage keeps it; of the first one, what it finds."""
        if not self.plan.stages[index].keeps_before:
            return None
        if previous is not None:
            return previous.network
        before = self.plan.network_of(index - 1)().to(self.device).eval().requires_grad_(False)
        before.load_state_dict(self.network.state_dict() if state is None else state["before"])
        return before

    def _keep_stage(self, index: int, teaching: TeachingNetwork) -> None:
        """Bring what a stage published up to date with its last step, and write it."""
        network = teaching.settle(self.network)
        if self.world > 1:  # every student has estimated statistics on images of its own, and these are the run's
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, src=0)
        if self.lead:
            sentence = keep_stage(self.plan.folder, self.step, self.plan.stages[index].name, network)
            if sentence is not None:
                self.link.say(sentence, self.step)

    def _context(
        self, plan: StagePlan, teaching: nn.Module, before: nn.Module | None, *, fresh: bool
    ) -> ObjectiveContext:
        """What an objective may know of this student."""
        return ObjectiveContext(
            self.device,
            self._sum_over_students,
            self._average_gradients,
            self._gather,
            self.rank,
            self.world,
            self.network,
            teaching,
            before,
            partial(self._as_student, plan),
            fresh,
            self.link.reward,
        )

    def _position(self, index: int, first_step: int) -> int:
        """Samples of each domain consumed globally before the coming step, of the stage that began at a step."""
        before = sum(plan.steps * plan.batch for plan in self.plan.stages[:index])
        return before + (self.step - first_step) * self.plan.stages[index].batch

    def _open_streams(self, index: int, first_step: int) -> dict[str, Iterator[RawBatch]]:
        """The streams of a stage from the coming step to its end; they begin to read at once."""
        plan, steps = self.plan.stages[index], self.plan.stages[index].steps - (self.step - first_step)
        if steps == 0:
            return {}
        position = self._position(index, first_step)
        return {
            name: stream.batches(position, steps, plan.batch, self.rank, self.world)
            for name, stream in plan.streams.items()
        }

    def _publish(self, stage: StageState, pin: bool = False) -> None:
        if not self.lead or self.link.publisher is None:
            return
        network = stage.teaching.settle(self.network)
        if not _all_finite(network.state_dict()):
            return  # the last good version stays the newest; what is wrong is said when the losses are looked at
        compared = self.network if self.plan.evaluate_every and stage.plan.ema_decay is not None else None
        labels = stage.plan.teacher is None
        self.link.publisher.publish(self.step, network, pin=pin, student=compared, labels=labels)
        if pin:
            self.link.publisher.flush()

    def _publish_before(self, stage: StageState) -> None:
        """Hang out the network of the stage before as the first version of this one that labels, and keep it there."""
        if self.lead and self.link.publisher is not None and stage.before is not None:
            shown = stage.plan.teacher is None
            self.link.publisher.publish(stage.first_step, stage.before, pin=True, shown=shown)
            self.link.publisher.flush()

    def _checkpoint(self, stage: StageState, now: bool) -> None:
        """Save; at the boundaries of stages also report to Train, which is a barrier and waits for one of its polls."""
        self._log(stage)  # or weights might be saved whose losses nobody has looked at
        if self.lead:
            stage.teaching.settle(self.network)
        self._keep_finite(stage)
        good = snapshot(self._trained(stage))
        self._good = self.step, good
        if self.lead:
            state = {
                "stage": stage.index,
                "step": self.step,
                **good,
                "tally": snapshot(self.tally.state_dict()),
                "bank": self._bank_index(stage),
            }
            if stage.before is not None:
                state["before"] = stage.before_saved
            self.store.save_later(self.step, state, lambda sentence: self.link.say(sentence, self.step))
            if now:
                self.store.wait()
        if now:
            self.link.report({"step": self.step, "stage": stage.index})

    def _bank_index(self, stage: StageState) -> dict[str, Any]:
        """The bank's index; with ``refresh="once"`` not before the round is a file that a resume can reopen."""
        if stage.view is None or stage.plan.labels is None:
            return {}
        index = self.link.bank_index()
        once = stage.plan.labels.policy.refresh == "once"
        while once and index.get("stage") == stage.index and index.get("round_file") == "being written":
            time.sleep(0.05)
            index = self.link.bank_index()
        return index

    def _log(self, stage: StageState) -> None:
        """Read the recorded tensors: the one place of the loop that waits for the device."""
        if not self._terms:
            return
        names = sorted({name for terms in self._terms for name in terms})
        rows = [[terms[name] for terms in self._terms if name in terms] for name in names]
        means = torch.stack([torch.stack(row).float().mean() for row in rows]).tolist()
        self._terms.clear()
        step, since = self._logged_at
        now = time.perf_counter()
        self._logged_at = (self.step, now)
        total = sum(value for name, value in zip(names, means, strict=True) if name.startswith("loss/"))
        if self._any_rank(not np.isfinite(means).all()):
            means_by_name = dict(zip(names, means, strict=True))
            self._recover(stage, "the loss is no finite number any more", f" ({means_by_name})")
            return
        if self.lead:
            summary = self.tally.summary()
            for name in ("label_age_steps", "skipped"):
                summary.pop(name)
            ages = age_statistics(self.tally.ages - self._ages_logged)  # of the labels read since the last line
            self._ages_logged = Counter(self.tally.ages)
            numbers = {
                "stage": stage.plan.name,
                "loss": total,
                **dict(zip(names, means, strict=True)),
                "learning_rate": stage.plan.learning_rate(self.step - 1 - stage.first_step),
                "steps_per_s": (self.step - step) / max(1e-9, now - since),
                "step_seconds": (now - since) / max(1, self.step - step),
                **{f"label_age_steps_{name}": value for name, value in ages.items() if value is not None},
                **summary,
                "recoveries": self._recoveries,
                **self._published(),
                **gpu_memory(self.device),
            }
            self.link.write("train", self.step, numbers)
            if stage.plan.teacher is not None:
                reward = self._reward(stage, dict(zip(names, means, strict=True)), ages["p50"])
                self.link.tell(Standing(stage.index, stage.first_step, self.step, reward))

    def _published(self) -> dict[str, int]:
        """The version of the weights that hang on the board; nothing before the first, or where nobody publishes."""
        version = None if self.link.publisher is None else self.link.publisher.version
        return {} if version is None else {"weights_version": version}

    def _reward(self, stage: StageState, means: dict[str, float], age: int | None) -> Reward | None:
        """What the student's losses were on labels of which weights; None without labels."""
        if age is None:
            return None
        terms = {name: means[name] for name in stage.plan.reward}
        return Reward(self.step, self.step - stage.first_step, self.step - age, terms)

    def _keep_finite(self, stage: StageState) -> None:
        """Go back if the weights are broken; their loss was looked at before the step that broke them."""
        if self._any_rank(not _all_finite(self._trained(stage))):
            self._recover(stage, "the weights are no finite numbers any more")

    def _recover(self, stage: StageState, what: str, details: str = "") -> None:
        """Go back to the last good weights and on with the next samples; every rank does so at the same step.

        Raises:
            RunError: it has happened too often.
        """
        self._recoveries += 1
        said = f"{what} at step {self.step}{details}"
        if self._good is None or self._recoveries > MAX_RECOVERIES:
            raise RunError(
                f"{said}; start a run with another --seed; if it happens again, the data or an option of the recipe is "
                "at fault"
            )
        step, state = self._good
        state = copy.deepcopy(state)  # an optimiser goes on working in the tensors it is given
        self.network.load_state_dict(state["student"])
        stage.optimiser.load_state_dict(state["optimiser"])
        stage.objective.load_state_dict(state["objective"])
        stage.teaching.load_state_dict(state["teaching"])
        if self.lead:
            self.link.say(
                f"{said}: student and teacher go back to their weights of step {step} and on with the next pictures",
                self.step,
            )

    def _trained(self, stage: StageState) -> dict[str, Any]:
        """Everything that training changes in a stage."""
        return {
            "student": self.network.state_dict(),
            "optimiser": stage.optimiser.state_dict(),
            "objective": stage.objective.state_dict(),
            "teaching": stage.teaching.state_dict(),
        }

    def _count_skipped(self, stage: StageState, item: RawBatch) -> None:
        for path in item.skipped:
            if path not in self.tally.skipped:
                self.tally.skipped.append(path)
                self.link.say(f"skipped an unreadable image: {path}", self.step)
        # Of a few labelled images a single broken one would be too large a share.
        whole = (stream for name, stream in stage.plan.streams.items() if name != "labelled")
        images = min(getattr(stream, "images", np.inf) for stream in whole)
        if len(self.tally.skipped) > self.plan.max_skipped_share * images:
            raise RunError(
                f"{len(self.tally.skipped)} of {images} images cannot be read, more than "
                f"{self.plan.max_skipped_share:.0%}: {', '.join(self.tally.skipped[:3])}. Repair or remove them."
            )

    def _check_fits(self, state: dict[str, Any]) -> None:
        """A checkpoint of another network is refused before anything is touched."""
        mine = {name: tuple(t.shape) for name, t in self.network.state_dict().items()}
        theirs = {name: tuple(t.shape) for name, t in state["student"].items()}
        if mine != theirs:
            odd = sorted(set(mine.items()) ^ set(theirs.items()))
            raise RunError(
                f"the checkpoint in {self.store.folder} is of another network (for example {odd[0][0]} differs); "
                "resume with the options of that run, or start a run with another --name"
            )

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    def _parallel(self, plan: StagePlan) -> nn.Module:
        """The network as a stage's objective calls it: gradients averaged over the students."""
        network = self._as_student(plan, self.network)
        if self.world == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)

    def _as_student(self, plan: StagePlan, network: nn.Module) -> nn.Module:
        """A network that computes as the student's does in a stage."""
        if plan.norm_images is not None:
            network = InChunks(network, plan.norm_images)
        return InBfloat16(network, self.device.type) if self.precision == "bfloat16" else network

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def _stop_agreed(self) -> bool:
        """Whether to stop after this step; all ranks say the same."""
        if self.world == 1:
            if time.perf_counter() - self._stop_checked < STOP_CHECK_SECONDS:
                return False
            self._stop_checked = time.perf_counter()
            return self.link.stop_requested()
        if self.step % self.plan.log_every:
            return False
        return self._any_rank(self.link.stop_requested())

    def _any_rank(self, mine: bool) -> bool:
        """Whether any student says so; every rank asks at the same place."""
        if self.world == 1:
            return mine
        flag = torch.tensor([float(mine)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _sum_over_students(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def _gather(self, value: Tensor) -> Tensor:
        if self.world == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)


def _close(streams: dict[str, Iterator[RawBatch]]) -> None:
    """End streams that read ahead; in a process that goes on, they would do so for ever."""
    for stream in streams.values():
        close = getattr(stream, "close", None)
        if close is not None:
            close()


def _dropouts(network: nn.Module) -> list[nn.Dropout2d]:
    return [module for module in network.modules() if isinstance(module, nn.Dropout2d)]


def _freeze_norms(network: nn.Module) -> None:
    """Batch norms normalise by the statistics that they have, and leave them as they are."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def precision_on(device: torch.device) -> Literal["float32", "bfloat16"]:
    """What ``auto`` is on a device: bfloat16 where a GPU computes in it itself and does not emulate it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if able else "float32"


def _all_finite(state: Any) -> bool:
    """Whether every tensor in nested dicts and lists holds finite numbers alone."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(_all_finite(item) for item in items)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
