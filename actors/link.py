"""The student's cords to the rest of the cluster, and the loop that Ray Train runs in every worker."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from actors.errors import RunError, last_line
from actors.label_view import LabelView, Transport
from actors.labeller import own_device, prepare_torch
from actors.protocols import Reward, RunPlan
from actors.publisher import Publisher
from actors.reward_board import Standing
from actors.student import Student


@dataclass(frozen=True)
class Handles:
    """Actor handles that a student gets; all may be missing (reference runs)."""

    board: Any = None
    bank: Any = None
    run_log: Any = None
    labelling: Any = None
    """The board from which labels are made, where it is another one than the evaluator's."""
    rewards: Any = None
    """The reward board, where a teacher learns."""
    label_rows: Mapping[int, int] = field(default_factory=dict)
    """Images in a label block, by stage."""


class ClusterLink:
    """The real :class:`actors.student.Link`: every call on the training path returns at once."""

    ASK_AGAIN_SECONDS = 0.25

    def __init__(self, plan: RunPlan, handles: Handles, rank: int, inside_train: bool, name: str = "") -> None:
        self.plan, self.handles, self.rank = plan, handles, rank
        self.inside_train, self.suffix = inside_train, f":{name}" if name else ""
        lead = rank == 0 and handles.board is not None
        self.publisher = Publisher(handles.board, handles.bank, handles.labelling) if lead else None
        self._stop = False
        self._asked: Any = None
        self._asked_at = 0.0

    def view(self, stage: int, stage_version: int) -> LabelView:
        """The label view of a stage."""
        labels = self.plan.stages[stage].labels
        assert labels is not None
        layout = labels.rule.layout
        shape = dict(layout.columns)[labels.label_column]
        rows = self.handles.label_rows[stage]
        return LabelView(labels, (shape[-2], shape[-1]), rows, stage, stage_version, Transport(self.handles.bank))

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Record a line of metrics."""
        if self.handles.run_log is not None:
            self.handles.run_log.write.remote(f"{kind}{self.suffix}", step, numbers)

    def say(self, message: str, step: int) -> None:
        """A sentence for the user."""
        if self.handles.run_log is not None:
            self.handles.run_log.say.remote(message, step)

    def stop_requested(self) -> bool:
        """Whether the user asked to stop, as of the last answer that has arrived."""
        if self._stop or self.handles.run_log is None:
            return self._stop
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            try:
                self._stop = bool(ray.get(self._asked))
            except ray.exceptions.RayError:
                self._stop = False
            self._asked = None
        if self._asked is None and time.monotonic() - self._asked_at > self.ASK_AGAIN_SECONDS:
            self._asked, self._asked_at = self.handles.run_log.should_stop.remote(), time.monotonic()
        return self._stop

    def bank_index(self) -> dict[str, Any]:
        """The bank's index, or nothing when the bank does not answer."""
        try:
            return dict(ray.get(self.handles.bank.index.remote(), timeout=10))
        except ray.exceptions.RayError:
            return {}

    def begin_teaching(self, stage: int, first_step: int, step: int) -> None:
        """Tell the reward board."""
        if self.handles.rewards is not None:
            self.handles.rewards.begin.remote(stage, first_step, step)

    def tell(self, standing: Standing) -> None:
        """Hang it on the reward board."""
        if self.handles.rewards is not None:
            self.handles.rewards.post.remote(standing)

    def reward(self) -> Reward | None:
        """A student is not rewarded."""
        return None

    def report(self, numbers: dict[str, Any]) -> None:
        """Report to Ray Train, where this runs inside it."""
        if self.inside_train:
            ray.train.report(numbers)


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in every worker; ``config`` holds ``plan``, ``handles`` and ``threads``."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    prepare_torch(config["threads"])
    link = ClusterLink(config["plan"], config["handles"], rank, inside_train=True)
    before = ray.get(config["handles"].run_log.watch.remote())
    if before["failure"]:
        # What ended the run is no matter for a restart, and Train goes on restarting until the driver's process ends.
        return {"step": 0, "stopped": True}
    try:
        restarts = before["newest"].get("student", {}).get("restarts", -1) + 1
        return _student(config["plan"], link, rank, world, ray.train.torch.get_device(), restarts).run()
    except (RunError, ray.exceptions.RayTaskError) as error:
        # Ray Train would start the same mistake again; the driver hears of it here and ends the run.
        ray.get(config["handles"].run_log.fail.remote(last_line(error)))
        raise


def train_here(plan: RunPlan, handles: Handles, threads: int) -> dict[str, Any]:
    """The one student of a run in this process, without Ray Train: nobody starts it again when it fails.

    Returns:
        See :meth:`actors.student.Student.run`.
    """
    prepare_torch(threads)
    link = ClusterLink(plan, handles, 0, inside_train=False)
    return _student(plan, link, 0, 1, own_device()).run()


def _student(
    plan: RunPlan, link: ClusterLink, rank: int, world: int, device: torch.device, restarts: int = 0
) -> Student:
    """A student that has told the run that it is there; the first one also what is true of all."""
    all_of_them = {"students": world, "restarts": restarts} if rank == 0 else {}
    link.write("student", 0, {"rank": rank, "pid": os.getpid(), "device": str(device), **all_of_them})
    return Student(plan, link, rank, world, device)


def train_alone(plan: RunPlan, handles: Handles, threads: int, name: str) -> dict[str, Any]:
    """A run without teachers in one process: the reference runs. Its metrics carry ``name``.

    Returns:
        Student's summary and, under ``weights``, the final network as numpy.
    """
    prepare_torch(threads)
    student = Student(plan, ClusterLink(plan, handles, 0, inside_train=False, name=name), 0, 1, own_device())
    summary = student.run()
    weights = {name: tensor.cpu().numpy() for name, tensor in student.network.state_dict().items()}
    return {**summary, "weights": weights}
