"""A teacher that learns: beside the student, from source images and from how its student fares with its labels.

It is a student itself: the same loop runs its plan, with its own streams, optimiser and checkpoints, and what it
publishes goes to the board from which labels are made. It alone writes its weights; the teachers that label read them.
A killed one starts again from its own newest checkpoint, and the student notices no more than labels that grow older.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
from torch import nn

from actors.label_view import LabelView
from actors.labeller import helper_device, load_weights
from actors.protocols import RawBatch, Reward, RunPlan, Stream, View
from actors.publisher import Publisher
from actors.reward_board import Standing
from actors.storage import place
from actors.student import Student

LOOK_SECONDS = 0.25
"""How often the reward board is asked for news."""
WAIT_SECONDS = 0.02


class StoppedBeforeError(Exception):
    """A teacher was stopped before it had weights; there is nothing of it to save."""


class News:
    """The newest standing of the student, as of the last answer that has arrived. Nothing of it blocks.

    Args:
        ask: returns a reference to the standing.
        ready: whether such a reference has its value.
        get: the value; raises ``RayError`` when the board is just restarting.
    """

    def __init__(
        self,
        ask: Callable[[], Any],
        ready: Callable[[Any], bool] = lambda reference: bool(ray.wait([reference], timeout=0)[0]),
        get: Callable[[Any], Standing] = ray.get,
    ) -> None:
        self._ask, self._ready, self._get = ask, ready, get
        self._asked: Any = None
        self._asked_at = -LOOK_SECONDS
        self._last = Standing()

    def newest(self) -> Standing:
        """Take what has arrived, and ask again if that is some time ago."""
        if self._asked is not None and self._ready(self._asked):
            with contextlib.suppress(ray.exceptions.RayError):  # a board that starts again hears the next word
                self._last = self._get(self._asked)
            self._asked = None
        if self._asked is None and time.monotonic() - self._asked_at >= LOOK_SECONDS:
            self._asked, self._asked_at = self._ask(), time.monotonic()
        return self._last


class PacedStream:
    """A stream that gives a batch when its turn has come.

    Args:
        stream: whose batches.
        may_step: whether the step of a number may be taken; asked again and again.
    """

    def __init__(self, stream: Stream, may_step: Callable[[int], bool]) -> None:
        self.stream, self.may_step = stream, may_step
        self.view: View = stream.view
        self.images = getattr(stream, "images", np.inf)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Of the stream."""
        return self.stream.indices(positions)

    def batches(self, position: int, steps: int, batch: int, rank: int, world: int) -> Iterator[RawBatch]:
        """See :class:`actors.protocols.Stream`."""
        inner = self.stream.batches(position, steps, batch, rank, world)
        try:
            for step, item in enumerate(inner, position // batch):
                while not self.may_step(step):
                    time.sleep(WAIT_SECONDS)
                yield item
        finally:
            close = getattr(inner, "close", None)
            if close is not None:
                close()


class TeachersPublisher(Publisher):
    """Publishes a teacher's weights under the step at which its student stands: ages are counted in its steps.

    Args:
        board: from which labels are made.
        student_step: the student's newest.
    """

    def __init__(self, board: Any, student_step: Callable[[], int]) -> None:
        super().__init__(board, None)
        self.student_step = student_step

    def publish(self, version: int, network: nn.Module, *, pin: bool, **more: Any) -> None:
        """See :class:`actors.publisher.Publisher`; none is pinned: the first version of a stage is, by the student."""
        # A student that came back stands before versions that hang there: later ones must not look older than they.
        step = self.student_step()
        if self.version is not None and step < self.version:
            step = self.version + 1
        super().publish(step, network, pin=False)

    def rewind(self, step: int, *, labels: bool = True) -> None:
        """Labels of weights that this teacher has lost are as good as they were."""


class TeacherLink:
    """The :class:`actors.student.Link` of a teacher that learns.

    Args:
        news: of the student.
        board: from which labels are made.
        run_log: where metrics go, in the student's steps.
        stop: set when the teacher shall save and return.
    """

    def __init__(self, news: News, board: Any, run_log: Any, stop: threading.Event) -> None:
        self.news, self.run_log, self.stop = news, run_log, stop
        self.publisher: Publisher | None = TeachersPublisher(board, lambda: news.newest().step)

    def view(self, stage: int, stage_version: int) -> LabelView:
        """It labels for itself what it learns from."""
        raise NotImplementedError("a teacher that learns reads no labels")

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Its losses, how far it has come, and how old its newest reward is."""
        standing = self.news.newest()
        reward = standing.reward
        more = {"steps": step}
        if reward is not None:
            more["reward_age_steps"] = standing.step - reward.version
        self.run_log.write.remote("trainable_teacher", standing.step, {**numbers, **more})

    def say(self, message: str, step: int) -> None:
        """A sentence for the user."""
        self.run_log.say.remote(f"the teacher that learns: {message}", self.news.newest().step)

    def stop_requested(self) -> bool:
        """Whether it shall save and return."""
        return self.stop.is_set()

    def bank_index(self) -> dict[str, Any]:
        """The bank is the student's."""
        return {}

    def report(self, numbers: dict[str, Any]) -> None:
        """Nobody waits."""

    def reward(self) -> Reward | None:
        """What it last heard of its student."""
        return self.news.newest().reward

    def begin_teaching(self, stage: int, first_step: int, step: int) -> None:
        """It has no teacher."""

    def tell(self, standing: Standing) -> None:
        """It has no teacher."""


def teachers_plan(
    plan: RunPlan, stage: int, may_step: Callable[[int], bool], initial: Callable[[nn.Module], None]
) -> RunPlan:
    """What the teacher of a stage runs: one stage, the network that the student's stage before published.

    Args:
        plan: the student's.
        stage: index of the student's stage.
        may_step: see :class:`PacedStream`.
        initial: gives a fresh network the weights with which teaching begins.
    """
    teacher = plan.stages[stage].teacher
    assert teacher is not None
    streams = {name: PacedStream(stream, may_step) for name, stream in teacher.streams.items()}
    return replace(
        plan,
        network=plan.network_of(stage - 1),
        stages=(replace(teacher, streams=streams),),
        folder=str(place(plan.folder) / "teacher" / str(stage + 1)),
        evaluate_every=0,
        initial=initial,
    )


class TrainableTeacher:
    """Runs the teachers of a plan's stages, one after the other. The shell; its one method that lasts is :meth:`run`.

    Args:
        plan: the student's.
        board: from which labels are made.
        rewards: the reward board.
        run_log: where metrics go.
        threads: CPU threads.
    """

    def __init__(self, plan: RunPlan, board: Any, rewards: Any, run_log: Any, threads: int = 1) -> None:
        self.plan, self.board, self.run_log, self.threads = plan, board, run_log, threads
        self.news = News(rewards.look.remote)
        self.stopping = threading.Event()

    def run(self) -> dict[str, Any]:
        """Learn until the last stage with such a teacher is done, or :meth:`stop`.

        Returns:
            ``{"steps": optimiser steps of the last stage}``.
        """
        device = helper_device(self.threads)  # of this thread: not every setting of torch is the process's
        steps = 0
        for stage in (index for index, plan in enumerate(self.plan.stages) if plan.teacher is not None):
            if not self._wait(partial(self._begun, stage)):
                break
            if self.news.newest().stage > stage:
                continue
            plan = teachers_plan(self.plan, stage, self._may_step, self._first_weights)
            link = TeacherLink(self.news, self.board, self.run_log, self.stopping)
            try:
                steps = Student(plan, link, 0, 1, device).run()["step"]
            except StoppedBeforeError:
                break
        return {"steps": steps}

    def stop(self) -> None:
        """Save and return."""
        self.stopping.set()

    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return os.getpid()

    def _begun(self, stage: int) -> bool:
        return self.news.newest().stage >= stage

    def _may_step(self, step: int) -> bool:
        """Never more steps than the student has taken."""
        standing = self.news.newest()
        return self.stopping.is_set() or step < standing.step - standing.first_step

    def _first_weights(self, network: nn.Module) -> None:
        """Those that the student hung up when its stage began.

        Raises:
            StoppedBeforeError: :meth:`stop` came before they hung there.
        """
        first, found = self.news.newest().first_step, list[Mapping[str, np.ndarray]]()

        def taken() -> bool:
            try:
                newest = ray.get(self.board.newest_version.remote())
                if newest is None or newest < first:
                    return False
                version = ray.get(self.board.nearest_version.remote(first))
                references: Sequence[Any] = ray.get(self.board.take.remote(version))
                found.append(ray.get(references[0]))
            except (ray.exceptions.RayError, LookupError):  # a board that starts again, or a version just replaced
                return False
            return True

        if not self._wait(taken):
            raise StoppedBeforeError
        load_weights(network, found[0])

    def _wait(self, until: Callable[[], bool]) -> bool:
        """Wait for something; False when :meth:`stop` came first."""
        while not until():
            if self.stopping.wait(10 * WAIT_SECONDS):
                return False
        return True
