"""Student, teacher and evaluator in plain processes of :mod:`pipelines.workers`, with a run's own objects in them.

Samples are read by processes of their own. What Ray adds (transport, bookkeeping) is not here. Networks are random:
what a step or a label costs does not depend on the weights.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from ray import cloudpickle
from torch import nn

from actors.errors import RunError
from actors.label_bank import Delta, LabelBook
from actors.label_view import LabelView
from actors.labeller import YIELDING, Labeller, prepare_torch
from actors.protocols import RawBatch, RunPlan, StagePlan, Stream, View
from actors.student import Student
from pipelines.blocks import read_block
from pipelines.setup import Setup
from pipelines.streams import QUEUE_BATCHES, SampleStream, collate
from pipelines.workers import Orders, Spent, begin, forked, own_memory

EVALUATED = 4
"""Images that the evaluator looks at, and scores, at a time here."""


# --- the student ---------------------------------------------------------------------------------------------------


class PipedStream:
    """A sample stream whose blocks are read in a process of their own, one block ahead.

    Args:
        stream: whose samples.
        told: called before every batch, where this is the first stream of a step.
    """

    def __init__(self, stream: SampleStream, told: Callable[[], None] | None = None) -> None:
        self.stream, self.told = stream, told
        self.view: View = stream.view
        self.images = stream.images

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Of the stream."""
        return self.stream.indices(positions)

    def batches(self, position: int, steps: int, batch: int, rank: int, world: int) -> Iterator[RawBatch]:
        """See :class:`actors.protocols.Stream`."""
        share = batch // world
        rows = max(share, self.stream.block_rows // share * share)
        context = forked(__name__)
        connection, other = context.Pipe(duplex=False)
        payload = cloudpickle.dumps((_read, (self.stream, position, rows, batch, rank, world)))
        context.Process(target=begin, args=(other, payload)).start()
        other.close()
        ready: queue.Queue[RawBatch | str] = queue.Queue(QUEUE_BATCHES)
        threading.Thread(target=self._fill, args=(connection, ready, share), daemon=True).start()
        for _ in range(steps):
            if self.told is not None:
                self.told()
            item = ready.get()
            if isinstance(item, str):
                raise RunError(item)
            yield item

    def _fill(self, connection: Connection, ready: queue.Queue[RawBatch | str], share: int) -> None:
        try:
            while not isinstance(table := connection.recv(), str):
                for start in range(0, table.num_rows, share):
                    ready.put(collate(table.slice(start, share), self.stream.size))
            ready.put(table)
        except (EOFError, ConnectionResetError):
            ready.put("a process that reads samples died; that is mostly a lack of memory")


def _read(orders: Orders, stream: SampleStream, position: int, rows: int, batch: int, rank: int, world: int) -> None:
    """Read blocks of one rank's samples until nobody wants them any more."""
    share = batch // world
    while True:
        steps = rows // share
        first = position + np.arange(steps)[:, None] * batch + rank * share
        (files,) = stream.blocks((first + np.arange(share)).reshape(-1), rows)
        orders.tell(read_block(files, stream.size, stream.split.label_encoding, stream.cache))
        position += steps * batch


class OneBlock:
    """The three questions of a label view, answered from one block that stands for all: see ``Transport``.

    References are numbers; a new version of every block appears with each publication.
    """

    def __init__(self, block: pa.Table, chunks: int, thresholds: np.ndarray | None = None) -> None:
        self.block, self.chunks, self.thresholds = block, chunks, thresholds
        self.version = 0

    def ask(self, stage: int, stage_version: int, since: int, step: int) -> Any:
        """The newest version of all blocks."""
        return self.version, stage, since

    def ready(self, references: Sequence[Any], timeout: float = 0.0) -> set[Any]:
        """Everything is here."""
        return set(references)

    def get(self, reference: Any) -> Any:
        """A delta, or the block."""
        if not isinstance(reference, tuple):
            return self.block
        version, stage, since = reference
        new = [(chunk, [chunk], version) for chunk in range(self.chunks)] if version >= since else []
        return Delta(stage, version + 1, new, self.thresholds, True)

    def report_lost(self, chunk: int, version: int) -> None:
        """Nothing is."""


class TrialLink:
    """The student's link: it publishes copies that nobody reads, and reads labels that are always the same."""

    def __init__(self, plan: StagePlan, labels: OneBlock | None, rows: int) -> None:
        self.plan, self.labels, self.rows = plan, labels, rows
        self.publisher: Any = self
        self.version: int | None = None

    def publish(self, version: int, network: nn.Module, *, student: nn.Module | None = None, **more: Any) -> None:
        """Copy to the host as :class:`actors.publisher.Publisher` does."""
        for module in (network, student):
            if module is not None:
                for tensor in module.state_dict().values():
                    tensor.detach().to("cpu", copy=True)
        self.version = version
        if self.labels is not None:
            self.labels.version = version

    def flush(self) -> None:
        """Nothing is under way."""

    def rewind(self, step: int, **more: Any) -> None:
        """Nothing was published before."""

    def view(self, stage: int, stage_version: int) -> LabelView:
        """The label view of the stage."""
        assert self.plan.labels is not None
        assert self.labels is not None
        shape = dict(self.plan.labels.rule.layout.columns)[self.plan.labels.label_column]
        size = shape[-2], shape[-1]
        transport: Any = self.labels
        return LabelView(self.plan.labels, size, self.rows, stage, stage_version, transport)

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Nobody reads metrics."""

    def say(self, message: str, step: int) -> None:
        """Nor this."""

    def stop_requested(self) -> bool:
        """It is killed."""
        return False

    def bank_index(self) -> dict[str, Any]:
        """There is no bank."""
        return {}

    def report(self, numbers: dict[str, Any]) -> None:
        """There is no Ray Train."""

    def begin_teaching(self, stage: int, first_step: int, step: int) -> None:
        """No teacher learns."""

    def tell(self, standing: Any) -> None:
        """Nor hears of it."""

    def reward(self) -> None:
        """Nor answers."""


def train(
    orders: Orders,
    plan: RunPlan,
    labels: OneBlock | None,
    rows: int,
    rank: int,
    world: int,
    meeting: str,
    threads: int,
    gpu: int | None,
) -> None:
    """Be a student of a plan with one stage, without end; tells when each step began."""
    prepare_torch(threads)
    device = _device(gpu)
    if world > 1:
        backend = "nccl" if gpu is not None else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    (stage,) = plan.stages
    began = [time.perf_counter()]

    def told() -> None:
        now = time.perf_counter()
        orders.tell(Spent(began[0], now))
        orders.tell(own_memory())
        orders.obey()
        began[0] = time.perf_counter()

    streams: dict[str, Stream] = {}
    for name, stream in stage.streams.items():
        assert isinstance(stream, SampleStream)
        streams[name] = PipedStream(stream, None if streams else told)
    stage = replace(stage, streams=streams)
    link: Any = TrialLink(stage, labels, rows)
    Student(replace(plan, stages=(stage,)), link, rank, world, device).run()


def _device(gpu: int | None) -> torch.device:
    if gpu is None:
        return torch.device("cpu")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


# --- the helpers ---------------------------------------------------------------------------------------------------


def teach(orders: Orders, setup: Setup, number: int, gpu: int | None) -> None:
    """Be a teacher, without end; tells its first block, and then what every few images took."""
    device = _helper_device(setup.options.threads, gpu)
    plan = setup.labels[number]
    before = setup.plan.stages[number].labelled_by == "before"
    builder = setup.plan.network_of(number - 1 if before else number)
    labeller = Labeller(builder, setup.target_reader, {number: plan}, setup.plan.seed, device)
    labeller.load(0, {name: tensor.cpu().numpy() for name, tensor in labeller.network.state_dict().items()})
    rows, images = setup.label_rows()[number], len(setup.domains.target)
    adjustment = LabelBook(images, rows, plan.for_bank()).adjustment
    at, batch = 0, min(labeller.batch, images)

    def label() -> tuple[Any, pa.Table, int]:
        nonlocal at
        start = at if at + batch <= images else 0
        header, block = labeller.label(number, 0, start, start + batch, 0, adjustment)
        at = start + batch
        return header, block, batch

    header, block, _ = label()
    thresholds = None if plan.selection is None else plan.selection.thresholds(header.histogram)
    orders.tell((block, thresholds))
    _work(orders, lambda: (label()[2], "label"))


def evaluate(orders: Orders, setup: Setup, number: int, gpu: int | None) -> None:
    """Be the evaluator, without end: look at a few images, score a few."""
    device = _helper_device(setup.options.threads, gpu)
    network = setup.plan.network_of(number)()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    watcher = setup.make_watcher()(device)
    watcher.indices = watcher.indices[:EVALUATED]
    student = weights if setup.plan.stages[number].ema_decay is not None else None
    scorer = None if setup.domains.validation is None else setup.make_scorer()(device)
    if scorer is not None:
        scorer.reader = FewImages(scorer.reader, EVALUATED)
    turn = 0

    def look() -> tuple[int, str]:
        nonlocal turn
        turn += 1
        if scorer is None or turn % 2:
            watcher.look(weights, student)
            return len(watcher.indices), "watch"
        scorer.score(weights)
        return len(scorer.reader), "score"

    for _ in range(2):
        look()
    orders.tell(("ready",))
    _work(orders, look)


class FewImages:
    """The first images of a labelled reader."""

    def __init__(self, reader: Any, images: int) -> None:
        self.reader, self.images = reader, min(images, len(reader))

    def __len__(self) -> int:
        return self.images

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Of the reader."""
        image: np.ndarray = self.reader.read(index, size)
        return image

    def label(self, index: int) -> np.ndarray:
        """Of the reader."""
        label: np.ndarray = self.reader.label(index)
        return label


def _helper_device(threads: int, gpu: int | None) -> torch.device:
    """As :func:`actors.labeller.helper_device`, for a process that Ray did not start."""
    prepare_torch(threads)
    if gpu is None:
        os.nice(YIELDING)
    return _device(gpu)


def _work(orders: Orders, unit: Callable[[], tuple[int, str]]) -> None:
    """Repeat something while told to work."""
    orders.tell(own_memory())
    while True:
        orders.obey()
        began = time.perf_counter()
        images, kind = unit()
        orders.tell(Spent(began, time.perf_counter(), images, kind))
        orders.tell(own_memory())
