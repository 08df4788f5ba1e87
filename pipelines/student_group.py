"""The students as workers of Ray Train: how many, how long places are waited for, how often they begin again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from actors.errors import last_line
from actors.link import Handles, train_loop
from actors.storage import place
from pipelines.options import AdaptOptions
from pipelines.placement import Shares
from pipelines.setup import Setup

MAX_RESTARTS = 3
"""How often Ray Train starts dead students again before it gives up."""

PLACES_WAITED_FOR = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Read by Ray Train where it starts the students; it has no argument for it."""

DAY = 86400
"""Seconds for a place for every student: a node of a cloud takes minutes, and a spot one longer."""

STALE = 20
"""Seconds for the same where fewer students may do. Ray Train counts places on nodes that it looked at up to as many
seconds ago, and a dead student is noticed before its dead node: it may be waiting for a place that is no more, and has
to count again."""


def is_elastic(options: AdaptOptions) -> bool:
    """Whether the students may be fewer than asked for."""
    return options.min_students is not None and options.min_students < options.students


def patience(options: AdaptOptions) -> tuple[int, int]:
    """Seconds to wait for a place for every student, and how often more: a day in all."""
    return (STALE, DAY // STALE) if is_elastic(options) else (DAY, 2)


def train(setup: Setup, handles: Handles, shares: Shares) -> dict[str, Any]:
    """Train the students to their end; what the first of them returns.

    Raises:
        ray.train.TrainingFailedError: they began again too often.
    """
    options = setup.options
    seconds, again = patience(options)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"plan": setup.plan, "handles": handles, "threads": options.threads},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(options.min_students, options.students) if is_elastic(options) else options.students,
            use_gpu=shares.on_gpu,
            resources_per_worker=shares.student,
        ),
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(place(setup.plan.folder) / "train"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=again),
            callbacks=[Losses(handles.run_log)],
        ),
    )
    with unless_set(PLACES_WAITED_FOR, str(seconds)):
        value: dict[str, Any] = trainer.fit().return_value
    return value


class Losses(ray.train.UserCallback):
    """Tells the run's log of students that died. Ray Train calls it in its controller."""

    def __init__(self, run_log: Any) -> None:
        self.run_log = run_log

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Some have died, by rank; the first sentence of what the first one died of is for the user."""
        ranks = sorted(worker_exceptions)
        why, *_ = last_line(worker_exceptions[ranks[0]]).rstrip(".").split(". ")
        self.run_log.lose_students.remote(ranks, why)


@contextmanager
def unless_set(name: str, value: str) -> Iterator[None]:
    """A variable of the environment that the user has not set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
