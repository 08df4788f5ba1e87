"""What students, teachers and the evaluator need on this machine, alone and beside each other: seconds, without Ray.

Every process of a run that computes is here a plain process with the same object in it (:mod:`pipelines.trial_roles`).
They are started one set after the other, told to work or to rest, and watched for some seconds at a time.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch

from actors.errors import RunError
from actors.protocols import RunPlan, StagePlan
from pipelines import placement
from pipelines.blocks import FIRST_BLOCKS
from pipelines.capacity import Course, Measured, Pace, StageShape, StreamShape
from pipelines.placement import Capacity
from pipelines.setup import WATCHED_IMAGES, Setup
from pipelines.streams import SampleStream
from pipelines.trial_roles import OneBlock, evaluate, teach, train
from pipelines.workers import Memory, Spent, Worker

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
START_SECONDS = 300.0
"""In which a process must have begun, and a student have taken its first steps."""


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
        teachers, evaluator = self._start_helpers()
        labels = self._labels(teachers[0])
        labellers = teachers[: self.devices]
        alone = self._in_turns({0: (labellers, [])}, windows=1)[0]
        label_seconds = 1 / sum(1 / _image_seconds(told) for told in alone.helpers)
        self._end(teachers[self.tried[-1] :])
        seen = self._side_by_side(teachers[: self.tried[-1]], evaluator, labels)
        beside = {helping: pace_of(each.steps) for helping, each in seen.items()}
        image_seconds = {
            helping: statistics.mean(_image_seconds(told) for told in each.helpers[:count])
            for helping, each in seen.items()
            if (count := min(helping, self.tried[-1]))
        }
        looks = seen[self.tried[-1] + 1].helpers[-1]
        watch_seconds, score_seconds = (_image_seconds(looks, kind) for kind in ("watch", "score"))
        whole, words = self._on_all_devices(evaluator, labels)
        self._end([evaluator])
        measured = Measured(
            beside,
            image_seconds,
            watch_seconds,
            score_seconds,
            self._alone(beside[0]),
            label_seconds,
            len(labellers),
            whole,
            words,
        )
        return measured, labels.block.nbytes / labels.block.num_rows

    def _start_helpers(self) -> tuple[list[Worker], Worker]:
        """Teachers, as many as are watched at once at any time, and the evaluator."""
        count = max(self.tried[-1], min(self.devices, MOST_LABELLERS))
        self.watch("teachers")
        teachers = [self._start(teach, self.setup, self.number, self._gpu(self.students + n)) for n in range(count)]
        evaluator = self._start(evaluate, self.setup, self.number, self._gpu(self.students + count))
        evaluator.kinds = 1 + (self.setup.domains.validation is not None)
        helpers = [*teachers, evaluator]
        self._pump(lambda: all(helper.first is not None for helper in helpers), START_SECONDS)
        return teachers, evaluator

    def _side_by_side(self, teachers: list[Worker], evaluator: Worker, labels: OneBlock) -> dict[int, Together]:
        """Students beside each number of teachers that is tried, and last beside all and the evaluator."""
        group = self._train(self.number, labels, self.students, self.threads)
        self.watch("students beside teachers and evaluator")
        sets = {helping: teachers[:helping] for helping in (0, *self.tried)}
        sets[self.tried[-1] + 1] = [*teachers, evaluator]
        seen = self._in_turns({helping: (helpers, group) for helping, helpers in sets.items()})
        self.memory = {
            "student": group[0].memory,
            "teacher": max((teacher.memory for teacher in teachers), key=lambda memory: memory.process),
            "evaluator": evaluator.memory,
        }
        self._end(group)
        self._end(teachers)
        return seen

    def _on_all_devices(self, evaluator: Worker, labels: OneBlock) -> tuple[tuple[Pace, Pace] | None, str]:
        """Students that take what teachers would, alone and beside the evaluator, and what that is in words."""
        students, threads = self._all_devices()
        if (students, threads) == (self.students, self.threads):
            return None, ""
        words = f"{threads} threads" if not self.gpus else f"{students} GPUs"
        self.watch(f"student on all devices ({words})")
        group = self._train(self.number, labels, students, threads, spread=True)
        both = self._in_turns({0: ([], group), 1: ([evaluator], group)}, windows=1)
        self._end(group)
        return (pace_of(both[0].steps), pace_of(both[1].steps)), words

    def _alone(self, planned: Pace) -> tuple[Pace, ...]:
        """Students without helpers in every stage; in the planned one, that has been seen."""
        paces = []
        for number, stage in enumerate(self.setup.plan.stages):
            if number == self.number:
                paces.append(planned)
                continue
            self.watch(f"stage {stage.name}")
            given = None if stage.labels is None else self._labels_of(number)
            group = self._train(number, given, self.students, self.threads)
            paces.append(pace_of(self._in_turns({0: ([], group)}, windows=1)[0].steps))
            self._end(group)
        return tuple(paces)

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
