"""What students, teachers and the evaluator need on this machine, alone and beside each other: seconds, without Ray.

Every process of a run that computes is here a plain process with the same object in it: :class:`actors.student.Student`
with its streams, publications and checkpoints, :class:`actors.labeller.Labeller`, scorer and watcher. Samples are read
by processes of their own. What Ray adds (transport, bookkeeping) is not here. Networks are random: what a step or a
label costs does not depend on the weights.

Processes are started one set after the other, told to work or to rest, and watched for some seconds at a time.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
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
from pipelines import placement
from pipelines.blocks import FIRST_BLOCKS, read_block
from pipelines.capacity import Course, Measured, Pace, StageShape, StreamShape
from pipelines.placement import Capacity
from pipelines.setup import WATCHED_IMAGES, Setup
from pipelines.streams import QUEUE_BATCHES, SampleStream, collate

WINDOW_SECONDS = 1.0
"""How long processes are watched together at a time."""
WINDOWS = 2
"""How often students and helpers are, in turns, so that a machine that becomes slower does so for all sets of them."""
PUBLISH_EVERY = 4
"""Steps between publications here, so that one is seen in every window."""
WARM_STEPS = 2
"""Of a student, before it is watched."""
MOST_HELPERS = 4
"""Teachers that are tried unless more are asked for."""
MOST_LABELLERS = 16
"""Teachers that are started to see how fast all devices label while nothing trains."""
EVALUATED = 4
"""Images that the evaluator looks at, and scores, at a time here."""
NICENESS = 15
"""Of Ray's worker processes, its default: on a machine that others use, too, they wait like those of a run."""
START_SECONDS = 300.0
"""In which a process must have begun, and a student have taken its first steps."""


# --- the processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """Something that a process did: when (``time.perf_counter``), and for how many images."""

    began: float
    ended: float
    images: int = 0
    kind: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes at most: of the process, and of its tensors on a GPU."""

    process: int = 0
    gpu: int = 0


def own_memory() -> Memory:
    """Of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
    return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, gpu)


class Orders:
    """A worker's end of its connection: what it does goes up, and it works or rests as it is told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.working = False

    def obey(self) -> None:
        """Take new orders, and wait while they are to rest.

        Raises:
            EOFError: whoever gives orders is gone.
        """
        while not self.working or self.connection.poll():
            self.working = self.connection.recv()
            self.connection.send(self.working)

    def tell(self, what: Any) -> None:
        """Send a picklable thing up."""
        self.connection.send(what)


class Worker:
    """A process that works or rests, and what it has told.

    Args:
        work: called in the process with its :class:`Orders` and the arguments.
        arguments: for cloudpickle.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = _context()
        self.connection, other = context.Pipe()
        payload = cloudpickle.dumps((work, arguments))
        self.process = context.Process(target=_begin, args=(other, payload))
        self.process.start()
        other.close()
        self.told: list[Any] = []
        self.memory = Memory()
        self.acknowledged: bool | None = None
        self.first: Any = None
        self.kinds = 1
        """Kinds of things that it does in turn."""

    def end(self) -> None:
        """Kill it; there is nothing that it must save."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def take(self) -> None:
        """Read one message; only when there is one.

        Raises:
            RunError: the process failed.
        """
        try:
            what = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join(1)
            raise RunError(
                f"a process of the measurement died (exit code {self.process.exitcode}); that is mostly a lack of "
                "memory: plan fewer --teachers or --students, or a smaller --batch"
            ) from error
        if isinstance(what, bool):
            self.acknowledged = what
        elif isinstance(what, Memory):
            self.memory = what
        elif isinstance(what, str):
            raise RunError(what)
        elif isinstance(what, Spent):
            self.told.append(what)
        else:
            self.first = what


def _context() -> Any:
    """Processes come from a server that has imported this module, and has neither threads nor a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _begin(connection: Connection, payload: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.nice(max(0, NICENESS - os.nice(0)))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            work, arguments = cloudpickle.loads(payload)
            work(Orders(connection), *arguments)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            connection.send(lines[-1] if isinstance(error, RunError) and lines else f"{type(error).__name__}: {error}")


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
        context = _context()
        connection, other = context.Pipe(duplex=False)
        payload = cloudpickle.dumps((_read, (self.stream, position, rows, batch, rank, world)))
        context.Process(target=_begin, args=(other, payload)).start()
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
    before = plan_of(setup, number).labelled_by == "before"
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
    student = weights if plan_of(setup, number).ema_decay is not None else None
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


# --- the trial -----------------------------------------------------------------------------------------------------


def plan_of(setup: Setup, number: int) -> StagePlan:
    """A stage of a run."""
    return setup.plan.stages[number]


def planned_stage(setup: Setup) -> int:
    """The longest stage with labels that teachers make.

    Raises:
        RunError: there is none, or what labels also learns.
    """
    if setup.options.address is not None:
        raise RunError("plan measures this machine and joins no cluster; leave out --address, and run it on a node")
    if setup.options.pseudo_labels is not None:
        raise RunError("--pseudo-labels are there already, so no teacher is needed; leave them out to plan teachers")
    if setup.learners:
        raise RunError(
            f"in recipe {setup.options.recipe} a teacher learns beside its student, which plan cannot measure; plan "
            "another recipe, or make it take turns with --refresh once"
        )
    numbers = [number for number in setup.labels if plan_of(setup, number).steps]
    if not numbers:
        raise RunError(
            f"no stage of this run has pseudo labels (recipe {setup.options.recipe}), so there are no teachers to plan"
        )
    return max(numbers, key=lambda number: plan_of(setup, number).steps)


def trial_plan(setup: Setup, number: int, folder: str) -> RunPlan:
    """One stage of a run, made endless, that publishes often and writes nothing else."""
    stage = plan_of(setup, number)
    labels = stage.labels
    if labels is not None:
        policy = replace(labels.policy, refresh="continuous", max_age_steps=None)
        labels = replace(labels, policy=policy)
    rate = stage.learning_rate(0)
    stage = replace(stage, labels=labels, steps=10**9, learning_rate=lambda step: rate)
    return replace(
        setup.plan,
        network=setup.plan.network_of(number - 1),
        stages=(stage,),
        initial=None,
        folder=folder,
        publish_every=PUBLISH_EVERY,
        checkpoint_every=0,
    )


def course_of(setup: Setup, number: int, teachers: Sequence[int], row_bytes: float) -> Course:
    """What is known of a run without running it.

    Args:
        setup: of the run.
        number: of the planned stage.
        teachers: numbers of teachers.
        row_bytes: of a record.
    """
    plan, students = setup.plan, setup.options.students
    images, layout = len(setup.domains.target), setup.labels[number].rule.layout
    with torch.device("meta"):
        network = plan.network_of(number)()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    compared = bool(plan.evaluate_every) and plan_of(setup, number).ema_decay is not None
    return Course(
        images=images,
        stages=tuple(_shape(stage, students) for stage in plan.stages),
        labelled=number,
        publish_every=plan.publish_every,
        evaluate_every=plan.evaluate_every,
        checkpoint_every=plan.checkpoint_every,
        block_rows={count: layout.rows_per_block(images, 4 * count) for count in teachers},
        row_bytes=row_bytes,
        version_bytes=weights * (1 + compared),
        watched=min(WATCHED_IMAGES, images),
        scored=0 if setup.domains.validation is None else len(setup.domains.validation),
        students=students,
    )


def _shape(stage: StagePlan, students: int) -> StageShape:
    streams = []
    for stream in stage.streams.values():
        assert isinstance(stream, SampleStream)
        share = stage.batch // students
        batches = max(1, stream.block_rows // share)
        sample = stream.size[0] * stream.size[1] * (4 if stream.split.labelled else 3)
        streams.append(StreamShape(batches * share * sample, batches, stream.segment_blocks, FIRST_BLOCKS))
    labelled = stage.labels is not None and stage.labels.policy.refresh == "continuous"
    return StageShape(stage.name, stage.steps, stage.batch, tuple(streams), labelled)


@dataclass(frozen=True)
class Findings:
    """What a trial came to.

    Attributes:
        course: of the run.
        measured: on this machine.
        teachers: numbers of teachers that were tried.
        memory: bytes of a process by what it is.
        load: share of the cores that were busy before anything was started.
        devices: what there is, in words.
        shared: whether students and teachers share GPUs.
        seconds: that the measurement took.
    """

    course: Course
    measured: Measured
    teachers: tuple[int, ...]
    memory: Mapping[str, Memory]
    load: float
    devices: str
    shared: bool
    seconds: float


def measure(setup: Setup, watch: Callable[[str], None] = lambda text: None) -> Findings:
    """Measure what a run's processes need on this machine.

    Args:
        setup: of the run.
        watch: told what is measured.

    Raises:
        RunError: there is nothing to plan, or students and teachers do not fit.
    """
    began = time.monotonic()
    number = planned_stage(setup)
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    placement.shares(setup.options, Capacity({"CPU": float(max(4, 2 * cores)), "GPU": float(gpus)}))
    load = min(1.0, os.getloadavg()[0] / cores)
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="plan")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        trial = Trial(setup, number, folder, gpus, cores, stack, watch)
        measured, row_bytes = trial.run()
    course = course_of(setup, number, trial.tried, row_bytes)
    devices = f"{gpus} GPUs" if gpus > 1 else "1 GPU" if gpus else f"{cores} CPU cores"
    shared = 0 < gpus < setup.options.students + setup.options.teachers
    seconds = time.monotonic() - began
    return Findings(course, measured, trial.tried, trial.memory, load, devices, shared, seconds)


class Trial:
    """The measurement: who works beside whom, and for how long."""

    def __init__(
        self,
        setup: Setup,
        number: int,
        folder: str,
        gpus: int,
        cores: int,
        stack: ExitStack,
        watch: Callable[[str], None],
    ) -> None:
        self.setup, self.number, self.folder = setup, number, folder
        self.gpus, self.cores, self.stack, self.watch = gpus, cores, stack, watch
        options = setup.options
        self.students, self.threads = options.students, options.threads
        free = gpus - self.students if gpus else cores // self.threads - self.students
        self.tried = tuple(range(1, max(options.teachers, min(MOST_HELPERS, max(2, free))) + 1))
        if len(self.tried) > MOST_HELPERS:  # the ends, and some between
            between = np.unique(np.geomspace(1, self.tried[-1], MOST_HELPERS).round().astype(int))
            self.tried = tuple(int(count) for count in between)
        self.devices = gpus or max(1, cores // self.threads)
        self.memory: dict[str, Memory] = {}
        self.workers: list[Worker] = []
        """All that live."""

    def run(self) -> tuple[Measured, float]:
        """Measure everything.

        Returns:
            What was found, and the bytes of a label record.
        """
        count = max(self.tried[-1], min(self.devices, MOST_LABELLERS))
        self.watch("teachers")
        teachers = [self._start(teach, self.setup, self.number, self._gpu(self.students + n)) for n in range(count)]
        evaluator = self._start(evaluate, self.setup, self.number, self._gpu(self.students + count))
        evaluator.kinds = 1 + (self.setup.domains.validation is not None)
        helpers = [*teachers, evaluator]
        self._pump(lambda: all(helper.first is not None for helper in helpers), START_SECONDS)
        labels = self._labels(teachers[0])
        row_bytes = labels.block.nbytes / labels.block.num_rows
        labellers = teachers[: self.devices]
        alone = self._in_turns({0: (labellers, [])}, windows=1)[0]
        label_seconds = 1 / sum(1 / _image_seconds(told) for told in alone.helpers)
        self._end(teachers[self.tried[-1] :])
        teachers = teachers[: self.tried[-1]]
        group = self._train(self.number, labels, self.students, self.threads)
        most = self.tried[-1] + 1
        self.watch("students beside teachers and evaluator")
        sets = {helping: teachers[:helping] for helping in (0, *self.tried)} | {most: [*teachers, evaluator]}
        seen = self._in_turns({helping: (helpers, group) for helping, helpers in sets.items()})
        beside = {helping: pace_of(each.steps) for helping, each in seen.items()}
        image_seconds = {
            helping: statistics.mean(_image_seconds(told) for told in each.helpers[:count])
            for helping, each in seen.items()
            if (count := min(helping, self.tried[-1]))
        }
        looks = seen[most].helpers[-1]
        watch_seconds, score_seconds = (_image_seconds(looks, kind) for kind in ("watch", "score"))
        self.memory = {
            "student": group[0].memory,
            "teacher": max((teacher.memory for teacher in teachers), key=lambda memory: memory.process),
            "evaluator": evaluator.memory,
        }
        self._end(group)
        self._end(teachers)
        whole, words = None, ""
        students, threads = self._all_devices()
        if (students, threads) != (self.students, self.threads):
            words = f"{threads} threads" if not self.gpus else f"{students} GPUs"
            self.watch(f"student on all devices ({words})")
            group = self._train(self.number, labels, students, threads, spread=True)
            both = self._in_turns({0: ([], group), 1: ([evaluator], group)}, windows=1)
            whole = pace_of(both[0].steps), pace_of(both[1].steps)
            self._end(group)
        self._end([evaluator])
        paces = []
        for number, stage in enumerate(self.setup.plan.stages):
            if number == self.number:
                paces.append(beside[0])
                continue
            self.watch(f"stage {stage.name}")
            given = None if stage.labels is None else self._labels_of(number)
            group = self._train(number, given, self.students, self.threads)
            paces.append(pace_of(self._in_turns({0: ([], group)}, windows=1)[0].steps))
            self._end(group)
        measured = Measured(
            beside,
            image_seconds,
            watch_seconds,
            score_seconds,
            tuple(paces),
            label_seconds,
            len(labellers),
            whole,
            words,
        )
        return measured, row_bytes

    def _labels_of(self, number: int) -> OneBlock:
        """Labels of another stage, from a teacher that makes one block."""
        teacher = self._start(teach, self.setup, number, self._gpu(self.students))
        self._pump(lambda: teacher.first is not None, START_SECONDS)
        labels = self._labels(teacher)
        self._end([teacher])
        return labels

    def _labels(self, teacher: Worker) -> OneBlock:
        """What a student reads: the first block of a teacher, for all images."""
        block, thresholds = teacher.first
        return OneBlock(block, -(-len(self.setup.domains.target) // block.num_rows), thresholds)

    def _all_devices(self) -> tuple[int, int]:
        """Students and threads of each that take all devices."""
        if not self.gpus:
            return self.students, max(self.threads, self.cores // self.students)
        batch = plan_of(self.setup, self.number).batch
        return max(n for n in range(1, max(self.gpus, self.students) + 1) if batch % n == 0), self.threads

    def _gpu(self, process: int) -> int | None:
        """The GPU of a process, as Ray packs them: as many on one as there must be."""
        if not self.gpus:
            return None
        on_one = -(-(self.students + self.setup.options.teachers) // self.gpus)
        return process // on_one % self.gpus

    def _start(self, work: Callable[..., None], *arguments: Any) -> Worker:
        worker = Worker(work, *arguments)
        self.workers.append(worker)
        self.stack.callback(self._end, [worker])
        return worker

    def _end(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            if worker in self.workers:
                self.workers.remove(worker)
                worker.end()

    def _train(
        self, number: int, labels: OneBlock | None, students: int, threads: int, *, spread: bool = False
    ) -> list[Worker]:
        """Students of a stage, warmed up and at rest; where they are to be spread, on as many GPUs as there are."""
        folder = tempfile.mkdtemp(dir=self.folder)
        plan, meeting = trial_plan(self.setup, number, folder), f"{folder}/meeting"
        rows = 1 if labels is None else labels.block.num_rows
        gpus = [rank % self.gpus if spread and self.gpus else self._gpu(rank) for rank in range(students)]
        group = [
            self._start(train, plan, labels, rows, rank, students, meeting, threads, gpu)
            for rank, gpu in enumerate(gpus)
        ]
        self._order(group, True)
        self._pump(lambda: len(group[0].told) > WARM_STEPS, START_SECONDS)
        self._order(group[:1], False)  # the others wait for its gradients; each told for itself, they would never meet
        return group

    def _in_turns(
        self, sets: Mapping[int, tuple[Sequence[Worker], Sequence[Worker]]], windows: int = WINDOWS
    ) -> dict[int, Together]:
        """Watch sets of helpers and students, each side by side, in turns."""
        seen = {name: Together([[] for _ in helpers], []) for name, (helpers, _) in sets.items()}
        for _ in range(windows):
            for name, (helpers, group) in sets.items():
                self._together(helpers, group, seen[name])
        return seen

    def _together(self, helpers: Sequence[Worker], group: Sequence[Worker], seen: Together) -> None:
        """Watch helpers and students work side by side for a while; what began and ended in it counts."""
        self._order([*helpers, *group[:1]], True)
        began = time.perf_counter()
        kinds = 1 + any(worker.kinds > 1 for worker in helpers)

        def enough() -> bool:
            if time.perf_counter() - began < WINDOW_SECONDS:
                return False
            units = all(len(_since(helper, began)) >= kinds for helper in helpers)
            return units and (not group or len(_since(group[0], began)) >= PUBLISH_EVERY)

        self._pump(enough, math.inf)
        ended = time.perf_counter()
        for told, helper in zip(seen.helpers, helpers, strict=True):
            told += _since(helper, began)
        if group:
            numbered = enumerate(group[0].told)
            seen.steps.append([(n, each) for n, each in numbered if each.began >= began and each.ended <= ended])
        self._order([*helpers, *group[:1]], False)

    def _order(self, workers: Sequence[Worker], work: bool) -> None:
        for worker in workers:
            worker.acknowledged = None
            worker.connection.send(work)
        self._pump(lambda: all(worker.acknowledged is work for worker in workers), START_SECONDS)

    def _pump(self, enough: Callable[[], bool], seconds: float) -> None:
        """Take what the processes tell until it is enough.

        Raises:
            RunError: it takes too long, or one fails.
        """
        deadline = time.monotonic() + seconds
        while not enough():
            if time.monotonic() > deadline:
                raise RunError(
                    f"a process of the measurement has not answered for {seconds:.0f} s; plan a smaller --preset, "
                    "--batch or --scale, or on a machine with a GPU"
                )
            ready = set(wait([worker.connection for worker in self.workers], timeout=0.05))
            for worker in list(self.workers):
                while worker.connection in ready and worker.connection.poll():
                    worker.take()


@dataclass(frozen=True)
class Together:
    """What was seen of processes side by side: what each helper did, and the students' numbered steps by window."""

    helpers: list[list[Spent]]
    steps: list[list[tuple[int, Spent]]]


def _since(worker: Worker, began: float) -> list[Spent]:
    return [spent for spent in worker.told if spent.began >= began]


def _image_seconds(told: Sequence[Spent], kind: str | None = None) -> float:
    """Seconds of a helper for an image, over all that it did of a kind; 0 where it did nothing."""
    seen = [spent for spent in told if kind is None or spent.kind == kind]
    images = sum(spent.images for spent in seen)
    return sum(spent.ended - spent.began for spent in seen) / images if images else 0.0


def pace_of(windows: Sequence[Sequence[tuple[int, Spent]]]) -> Pace:
    """The pace of a student from its steps, numbered from 1, by window.

    What is told of a step spans the publication at its end.
    """
    plain = [[each.ended - each.began for n, each in window if n % PUBLISH_EVERY] for window in windows]
    published = [each.ended - each.began for window in windows for n, each in window if n % PUBLISH_EVERY == 0]
    mean = statistics.mean(second for window in plain for second in window)
    means = [statistics.mean(window) for window in plain if window]
    more = max(0.0, statistics.mean(published) - mean) if published else 0.0
    return Pace(mean, more, (max(means) - min(means)) / mean)
