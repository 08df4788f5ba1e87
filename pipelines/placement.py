"""Who gets what of a cluster: students, teachers and boards each on the nodes that are theirs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from actors.errors import RunError
from pipelines.options import AdaptOptions

DATA_CPUS = 0.5
TEACHER_CPUS = 0.5
EVALUATOR_CPUS = 0.1
HEAD = {"node:__internal_head__": 0.001}
"""Pins the boards to the head node: an actor without CPUs may land anywhere, and labels die with their owner's node."""
STUDENT_NODE, TEACHER_NODE = "student_node", "teacher_node"
"""Custom resources of nodes that are there for students, and for teachers: ``resources`` in cluster.yaml."""
PLACE = 0.001
"""What a process asks of its kind of node, so that as many stand on one as its CPUs and GPUs hold."""
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where ``ray up`` leaves its configuration on the head node."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, or can grow to.

    Attributes:
        total: of all nodes.
        students, teachers: of the nodes that are there for them; None where there are none of the kind, and they may
            be anywhere.
    """

    total: Resources
    students: Resources | None = None
    teachers: Resources | None = None

    @staticmethod
    def of(nodes: Iterable[tuple[Resources, float]]) -> Capacity:
        """Of nodes: what one has, and how many of its kind there are."""
        nodes = list(nodes)

        def summed(kind: str | None) -> dict[str, float] | None:
            found = [(node, count) for node, count in nodes if kind is None or node.get(kind, 0.0) > 0]
            names = {name for node, _ in found for name in node}
            return {name: sum(node[name] * count for node, count in found if name in node) for name in names} or None

        return Capacity(summed(None) or {}, summed(STUDENT_NODE), summed(TEACHER_NODE))

    def or_more(self, other: Capacity) -> Capacity:
        """The larger of two, resource by resource."""
        pairs = ((self.students, other.students), (self.teachers, other.teachers))
        return Capacity(_larger(self.total, other.total) or {}, *(_larger(*pair) for pair in pairs))


def _larger(one: Resources | None, other: Resources | None) -> Resources | None:
    names = {*(one or {}), *(other or {})}
    return {name: max((one or {}).get(name, 0.0), (other or {}).get(name, 0.0)) for name in names} or None


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


def shares(options: AdaptOptions, capacity: Capacity, learners: int = 0) -> Shares:
    """Divide a cluster.

    Where nodes are there for students or for teachers (see :class:`Capacity`), each goes to its own kind and the
    evaluator to the teachers'; GPUs are then divided kind by kind, and a teacher that is asked for later gets as large
    a share as the first ones. Elsewhere everybody shares everything: with one GPU, student and teachers run on it side
    by side.

    Args:
        options: how many students and teachers there shall be.
        capacity: of the cluster.
        learners: teachers that learn, beside those that label.

    Raises:
        RunError: they can never fit, whatever else ends.
    """
    apart = options.own_nodes != "never" and (capacity.students is not None or capacity.teachers is not None)
    own, others = (capacity.students, capacity.teachers) if apart else (None, None)
    students, teachers = options.students, (options.teachers if apart else options.most_teachers) + learners
    student: dict[str, float] = {"CPU": float(options.threads)}
    teacher, evaluator = {"CPU": TEACHER_CPUS}, {"CPU": EVALUATOR_CPUS}
    own_cpus, others_cpus = students * options.threads, teachers * TEACHER_CPUS + EVALUATOR_CPUS
    who, helpers = f"{students} students with {options.threads} threads", f"{teachers} teachers"
    _check_cpus(f"{who} and {helpers}", own_cpus + others_cpus + DATA_CPUS, capacity.total)
    if not apart:
        gpus = capacity.total.get("GPU", 0.0)
        part = _part(f"{students} students and {helpers}", students + teachers, gpus)
        if part:
            student["GPU"], teacher["GPU"] = part, part
            if part < 1 or gpus > students + teachers:
                evaluator["GPU"] = 0.1
        return Shares(student, teacher, evaluator)
    if own is not None:
        _check_cpus(who, own_cpus + DATA_CPUS, own, STUDENT_NODE)
        student[STUDENT_NODE] = PLACE
    if others is not None:
        _check_cpus(helpers, others_cpus, others, TEACHER_NODE)
        teacher[TEACHER_NODE] = evaluator[TEACHER_NODE] = PLACE
    part = _part(f"{students} students", students, (own or capacity.total).get("GPU", 0.0))
    if part:
        student["GPU"] = part
    part = _part(helpers, teachers, (others or capacity.total).get("GPU", 0.0))
    if part:
        teacher["GPU"], evaluator["GPU"] = min(part, 0.9), 0.1
    return Shares(student, teacher, evaluator)


def _check_cpus(who: str, needed: float, has: Resources, kind: str | None = None) -> None:
    cpus = has.get("CPU", 0.0)
    if needed > cpus:
        where = "this cluster has" if kind is None else f"the nodes with {kind} have"
        raise RunError(
            f"{who} need {needed:g} CPUs, and {where} {cpus:g} and will never have more. "
            "Use fewer --students, --teachers or --threads, or a larger cluster (--address)."
        )


def _part(who: str, count: int, gpus: float) -> float:
    """Share of a GPU that each gets, and that leaves a tenth of it to the evaluator; 0 without GPUs."""
    if gpus < 1 or not count:
        return 0.0
    on_one = math.ceil(count / math.floor(gpus)) if gpus < count else 1
    if on_one > 8:
        raise RunError(
            f"{who} would be {on_one} to a GPU on {int(gpus)} GPUs; use fewer of them, or a larger cluster (--address)"
        )
    return 1.0 if on_one == 1 else math.floor(900 / on_one) / 1000


def capacity() -> Capacity:
    """What the cluster that this process belongs to has, or what its autoscaler may grow it to."""
    return Capacity.of((node["Resources"], 1) for node in ray.nodes() if node["Alive"]).or_more(_growth())


def wait_for_nodes(say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
    """Ask the autoscaler for a node of each kind, and wait until they are there, or the user stops.

    Args:
        say: told once what is waited for.
        stopped: asked now and then.
    """
    from ray.autoscaler.sdk import request_resources  # 60 ms that other starts can do without

    kinds = (STUDENT_NODE, TEACHER_NODE)
    request_resources(bundles=[{kind: 1} for kind in kinds])
    said = False
    try:
        while not stopped():
            resources = ray.cluster_resources()
            missing = [kind for kind in kinds if kind not in resources]
            if not missing:
                return
            if not said:
                say(f"waiting for a node with {' and one with '.join(missing)} (--own-nodes always)")
                said = True
            time.sleep(1.0)
    finally:
        request_resources(bundles=[])


def _growth() -> Capacity:
    """As many nodes of every type as the autoscaler may start; nothing where that cannot be seen from here."""
    try:
        from ray._private.state import state

        config: Any = state.get_cluster_config()
    except (ImportError, AttributeError, RuntimeError):
        config = None
    if config is None:
        return grown(BOOTSTRAP)
    without_end = -1
    return Capacity.of(
        (dict(group.resources), math.inf if group.max_count == without_end else group.max_count)
        for group in config.node_group_configs
    )


def grown(path: Path) -> Capacity:
    """As many nodes of every type as a file for ``ray up`` allows; nothing where there is none."""
    try:
        config = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        types, at_most = config["available_node_types"], config["max_workers"]
        return Capacity.of(
            (kind["resources"], 1 if name == config["head_node_type"] else min(at_most, kind.get("max_workers", 0)))
            for name, kind in types.items()
        )
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, yaml.YAMLError):
        return Capacity({})


def actor_options(share: Resources) -> dict[str, Any]:
    """Ray actor options from a share."""
    custom = {name: amount for name, amount in share.items() if name not in ("CPU", "GPU")}
    found = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0.0)}
    return {**found, "resources": custom} if custom else found


def in_words(share: Resources) -> str:
    """What a share asks for, for a user."""
    counted = [f"{share[name]:g} {name}" for name in ("CPU", "GPU") if share.get(name)]
    return " and ".join([*counted, *(f"a node with {name}" for name in share if name not in ("CPU", "GPU"))])
