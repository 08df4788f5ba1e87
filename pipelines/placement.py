"""Who gets what of a cluster: students, teachers and boards each on the nodes that are theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ray

from actors.errors import RunError
from pipelines.options import AdaptOptions

DATA_CPUS = 0.5
TEACHER_CPUS = 0.5
EVALUATOR_CPUS = 0.1
HEAD = {"node:__internal_head__": 0.001}
"""Pins the boards to the head node: an actor without CPUs may land anywhere, and labels die with their owner's node."""


@dataclass(frozen=True)
class Shares:
    """What every process asks Ray for."""

    student: dict[str, float]
    teacher: dict[str, float]
    evaluator: dict[str, float]

    @property
    def on_gpu(self) -> bool:
        """Whether students get a GPU."""
        return self.student.get("GPU", 0.0) > 0


def shares(options: AdaptOptions, resources: dict[str, float], learners: int = 0) -> Shares:
    """Divide a cluster's resources.

    Args:
        options: how many students and teachers there shall be.
        resources: what the cluster has in all, or can grow to.
        learners: teachers that learn, beside those that label.

    Raises:
        RunError: they can never fit, whatever else ends.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    teachers = options.teachers + learners
    needed = options.students * options.threads + teachers * TEACHER_CPUS + DATA_CPUS + EVALUATOR_CPUS
    if needed > cpus:
        raise RunError(
            f"{options.students} students with {options.threads} threads and {teachers} teachers need "
            f"{needed:g} CPUs, and this cluster has {cpus:g} and will never have more. "
            "Use fewer --students, --teachers or --threads, or a larger cluster (--address)."
        )
    teacher, evaluator = {"CPU": TEACHER_CPUS}, {"CPU": EVALUATOR_CPUS}
    student: dict[str, float] = {"CPU": float(options.threads)}
    if gpus >= 1:
        on_one = -(-(options.students + teachers) // int(gpus))
        part = 1.0 if on_one == 1 else math.floor(900 / on_one) / 1000
        if on_one > 8:
            raise RunError(
                f"{options.students} students and {teachers} teachers would be {on_one} to a GPU on "
                f"{int(gpus)} GPUs; use fewer of them, or a larger cluster (--address)"
            )
        student["GPU"], teacher["GPU"] = part, part
        if on_one > 1 or gpus > options.students + teachers:
            evaluator["GPU"] = 0.1
    return Shares(student, teacher, evaluator)


def total_resources() -> dict[str, float]:
    """What the cluster has, or what its autoscaler may grow it to."""
    now = dict(ray.cluster_resources())
    try:
        from ray._private.state import state

        most: Any = state.get_max_resources_from_cluster_config()
    except (ImportError, AttributeError, RuntimeError):
        most = None
    return now if not most else {name: max(now.get(name, 0.0), most.get(name, 0.0)) for name in {*now, *most}}


def actor_options(share: dict[str, float]) -> dict[str, Any]:
    """Ray actor options from a share."""
    return {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0.0)}
