"""The engine's student in this process, without Ray: samples, weights and labels come when they are asked for.

What a run of the engine computes depends on when teachers label. Here every label is of one age that is given, so the
numbers of a run are the same every time, and a short run takes seconds.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.labeller import Networks, label_seed
from actors.prior_estimate import Adjustment, PriorEstimate, source_looks
from actors.protocols import ImageReader, LabelPlan, RawBatch, Reward, RunPlan, StagePlan, Stream, View
from actors.reward_board import Standing
from actors.student import Student
from pipelines.blocks import read_block
from pipelines.setup import Setup
from pipelines.streams import SampleStream, collate

Weights = dict[str, np.ndarray]


class DirectStream:
    """A sample stream that is read in this process, when a batch is asked for."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream
        self.view: View = stream.view

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Of the stream."""
        return self.stream.indices(positions)

    def batches(self, position: int, steps: int, batch: int, rank: int, world: int) -> Iterator[RawBatch]:
        """One student's batches."""
        for step in range(steps):
            (files,) = self.stream.blocks(position + step * batch + np.arange(batch), batch)
            table = read_block(files, self.stream.size, self.stream.split.label_encoding, self.stream.cache)
            yield collate(table, self.stream.size)


class Shelf:
    """Takes what the student publishes, and keeps as much as the age needs; None keeps a stage's first weights."""

    def __init__(self, age: int | None) -> None:
        self.age = age
        self.version: int | None = None
        self.versions: deque[tuple[int, Weights]] = deque()
        self.newest: Weights = {}

    def publish(self, version: int, network: nn.Module, *, pin: bool, **more: Any) -> None:
        """Keep a copy; a pinned version begins a stage, which labels with nothing older."""
        self.version = version
        self.newest = {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}
        if pin:
            self.versions.clear()
        if self.age is not None or not self.versions:
            self.versions.append((version, self.newest))

    def rewind(self, step: int, **more: Any) -> None:
        """Nothing was published before."""

    def flush(self) -> None:
        """Everything is here at once."""

    def at(self, step: int) -> tuple[int, Weights]:
        """The newest weights that are at least as old as the age; before there are any, the oldest."""
        while self.age is not None and len(self.versions) > 1 and self.versions[1][0] <= step - self.age:
            self.versions.popleft()
        return self.versions[0]


class LabelsOfAge:
    """What a student reads instead of :class:`actors.label_view.LabelView`."""

    def __init__(
        self,
        plan: LabelPlan,
        network: Sequence[Callable[[], nn.Module]],
        reader: ImageReader,
        shelf: Shelf,
        seed: int,
        batch: int,
    ) -> None:
        self.plan, self.reader, self.shelf, self.seed, self.batch = plan, reader, shelf, seed, batch
        self.networks = Networks(network, torch.device("cpu"))
        self.network = self.networks.first
        self.version: int | None = None
        self.histograms = np.zeros((len(reader), plan.rule.num_classes, 256), np.int32)
        self.records: dict[int, dict[str, np.ndarray]] = {}
        self.thresholds: np.ndarray | None = None
        self.ages: Counter[int] = Counter()
        self.hits = self.misses = 0
        self.wait_seconds = 0.0
        self.prior: PriorEstimate | None = None
        if plan.prior is not None and plan.prior.target is None:
            self.prior = PriorEstimate(plan.prior, [1] * len(reader), frozen=shelf.age is None)
            if self.prior.surveying:
                self._label_all()
        self._label_all()

    @property
    def adjustment(self) -> Adjustment | None:
        """To the target's class frequencies, as the bank would tell its teachers."""
        plan = self.plan.prior
        if self.prior is not None:
            return self.prior.adjustment
        return None if plan is None or plan.target is None else Adjustment(plan.offset(np.array(plan.target)))

    def wait_for_round(self, step: int, tick: Callable[[], bool]) -> bool:
        """Every image is labelled already."""
        return True

    def poll(self, step: int, upcoming: np.ndarray) -> None:
        """Label the images of the coming batch."""
        began = time.perf_counter()
        if self.shelf.age is not None:
            self._label([int(index) for index in upcoming[: self.batch]], step)
        self.wait_seconds += time.perf_counter() - began

    def get(self, index: int, step: int) -> tuple[np.ndarray, float]:
        """See :meth:`actors.label_view.LabelView.get`."""
        assert self.version is not None
        self.hits += 1
        self.ages[step - self.version] += 1
        record = self.records[index]
        if self.plan.selection is None or self.thresholds is None:
            return record[self.plan.label_column], 1.0
        return self.plan.selection.apply(record, self.thresholds), 1.0

    def column(self, name: str, index: int, step: int) -> np.ndarray:
        """See :meth:`actors.label_view.LabelView.column`."""
        return self.records[index][name]

    def _label_all(self) -> None:
        for first in range(0, len(self.reader), self.batch):
            self._label(range(first, min(first + self.batch, len(self.reader))), 0)

    def _label(self, indices: range | list[int], step: int) -> None:
        version, weights = self.shelf.at(step)
        if version != self.version:
            self.network = self.networks.load(weights)
            self.version = version
        images = [[self.reader.read(index, size) for index in indices] for size in self.plan.rule.view_sizes]
        seeds = [label_seed(self.seed, self.reader.image_ids[index], version) for index in indices]
        views = [torch.from_numpy(np.stack(view)) for view in images]
        adjustment = self.adjustment
        made = self.plan.rule.label(self.network, views, seeds, adjustment)
        for index, seed, item in zip(indices, seeds, made, strict=True):
            if self.prior is not None and not self.prior.settled and item.evidence is not None:
                evidence = item.evidence
                if self.plan.source is not None and adjustment is not None:
                    looks = source_looks([seed], adjustment.source_every, len(self.plan.source))
                    seen = self.plan.source.look(self.network, looks, adjustment.temperature)
                    evidence = replace(evidence, source=seen)
                self.prior.put(index, evidence)
            self.histograms[index] = item.histogram
            self.records[index] = item.columns
        if self.plan.selection is not None:
            self.thresholds = self.plan.selection.thresholds(self.histograms.sum(0, dtype=np.int64))


class AloneLink:
    """The student's link without a cluster; remembers what it is told."""

    def __init__(self, setup: Setup, shelf: Shelf) -> None:
        self.setup = setup
        self.lines: list[tuple[str, int, dict[str, Any]]] = []
        self.publisher: Any = shelf
        self.made: LabelsOfAge | None = None

    def view(self, stage: int, stage_version: int) -> Any:
        """Labels of one age."""
        plan = self.setup.labels[stage]
        batch = self.setup.plan.stages[stage].batch
        network, reader = self.setup.plan.networks, self.setup.target_reader
        self.made = LabelsOfAge(plan, network, reader, self.publisher, self.setup.plan.seed, batch)
        return self.made

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Remember a line of metrics."""
        self.lines.append((kind, step, numbers))

    def say(self, message: str, step: int) -> None:
        """To the terminal."""
        print(f"step {step}: {message}", flush=True)

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def bank_index(self) -> dict[str, Any]:
        """There is no bank."""
        return {}

    def begin_teaching(self, stage: int, first_step: int, step: int) -> None:
        """No teacher learns."""

    def tell(self, standing: Standing) -> None:
        """Nobody hears of it."""

    def reward(self) -> Reward | None:
        """None comes."""
        return None

    def report(self, numbers: dict[str, Any]) -> None:
        """Nobody waits."""


def run_alone(setup: Setup, age: int | None, shelf: Shelf | None = None, **changes: Any) -> AloneLink:
    """Run the stages of a plan on labels of one age, in steps; None labels once, at a stage's start.

    Args:
        setup: of the run.
        age: of the labels, as far as weights are kept: ``publish_every`` decides how exactly it is met.
        shelf: that takes what is published; default: a new one.
        changes: of the plan.

    Returns:
        The link, with what the student wrote, published and read.
    """
    stages = tuple(_direct(stage) for stage in setup.plan.stages)
    plan: RunPlan = replace(setup.plan, **{"stages": stages, "evaluate_every": 0, "checkpoint_every": 0, **changes})
    link = AloneLink(setup, Shelf(age) if shelf is None else shelf)
    Student(plan, link, 0, 1, torch.device("cpu")).run()
    return link


def _direct(stage: StagePlan) -> StagePlan:
    streams: dict[str, Stream] = {
        name: DirectStream(stream) for name, stream in stage.streams.items() if isinstance(stream, SampleStream)
    }
    return replace(stage, streams=streams)
