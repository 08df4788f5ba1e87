"""The students as workers of Ray Train: how many, how long places are waited for, how often they begin again."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from actors.errors import last_line
from actors.link import Handles, train_loop
from actors.storage import place
from pipelines.options import AdaptOptions
from pipelines.placement import Shares
from pipelines.setup import Setup

MAX_RESTARTS = 3
"""How often Ray Train starts failed students again before it gives up."""

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Seconds that Ray Train waits for a place for every student; it has no argument for it."""

USERS_TIMEOUT = os.environ.get(START_TIMEOUT)
"""What the user says of it."""

DAY = 86400
"""A node of a cloud takes minutes, and a spot one longer."""

ELASTIC_TIMEOUT, ELASTIC_RETRIES = 20, 180
"""Where fewer students may do. Ray Train counts places on nodes that it looked at up to as many seconds ago, and a dead
student is noticed before its dead node: it may be waiting for a place that is gone, and has to count again. An hour of
such waits ends the run; where there are too few places by its own count, Ray Train waits without an end."""


def is_elastic(options: AdaptOptions) -> bool:
    """Whether the students may be fewer than asked for."""
    return options.min_students is not None and options.min_students < options.students


def start_timeout_and_retries(options: AdaptOptions) -> tuple[int, int]:
    """Seconds to wait for a place for every student, and how often more in a run."""
    return (ELASTIC_TIMEOUT, ELASTIC_RETRIES) if is_elastic(options) else (DAY, 2)


def train(setup: Setup, handles: Handles, shares: Shares) -> dict[str, Any]:
    """Train the students to their end; what the first of them returns.

    Raises:
        ray.train.TrainingFailedError: they failed too often, or too often there was no place for them.
    """
    options = setup.options
    timeout, retries = start_timeout_and_retries(options)
    os.environ[START_TIMEOUT] = USERS_TIMEOUT or str(timeout)
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
            failure_config=ray.train.FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=retries),
            callbacks=[TellFailures(handles.run_log)],
        ),
    )
    value: dict[str, Any] = trainer.fit().return_value
    return value


class TellFailures(ray.train.UserCallback):
    """Tells the run's log of students that failed. Ray Train calls it in its controller."""

    def __init__(self, run_log: Any) -> None:
        self.run_log = run_log

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """By rank, what students failed of: those that died, where it is known, and not those that missed them."""
        unheard = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
        dead = sorted(rank for rank, error in worker_exceptions.items() if isinstance(error, unheard))
        ranks = dead or sorted(worker_exceptions)
        why = "the process or its node is gone" if dead else last_line(worker_exceptions[ranks[0]]).rstrip(".")
        self.run_log.students_failed.remote(ranks, why, MAX_RESTARTS)
