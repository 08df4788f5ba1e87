"""The student's side of the label path: the freshest label for an image, never waiting for one.

A view knows which samples are coming. It starts to pull their newest blocks some batches ahead and goes on serving the
older block until the newer one is on this node. A label that is not there is served as all-255.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.label_bank import Delta
from actors.protocols import LabelPlan
from actors.records import decode

WITHHELD = 255


@dataclass
class Local:
    """A block that is on this node."""

    table: pa.Table
    version: int


class Transport:
    """The three questions a view asks of the cluster; a test answers them without one."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank

    def ask(self, stage: int, stage_version: int, since: int, step: int) -> Any:
        """Ask the bank for what is new; returns a reference."""
        return self.bank.poll.remote(stage, stage_version, since, step)

    def ready(self, references: Sequence[Any], timeout: float = 0.0) -> set[Any]:
        """Those references whose values are on this node; asking starts to pull the others."""
        if not references:
            return set()
        done, _ = ray.wait(list(references), num_returns=len(references), timeout=timeout, fetch_local=True)
        return set(done)

    def get(self, reference: Any) -> Any:
        """The value of a ready reference.

        Raises:
            ray.exceptions.RayError: it was lost with its node or owner.
        """
        return ray.get(reference)

    def report_lost(self, chunk: int, version: int) -> None:
        """Tell the bank that a block cannot be read."""
        self.bank.lost.remote(chunk, version)


class LabelView:
    """Freshest labels of one stage for one student.

    Args:
        plan: policy and selection of the stage.
        shape: (height, width) of a label.
        rows: images in a block, as the bank counts them.
        stage, stage_version: see :meth:`actors.label_bank.LabelBank.poll`.
        transport: how to reach the bank.
    """

    def __init__(
        self,
        plan: LabelPlan,
        shape: tuple[int, int],
        rows: int,
        stage: int,
        stage_version: int,
        transport: Transport,
    ) -> None:
        self.plan, self.shape, self.rows = plan, shape, rows
        self.stage, self.stage_version = stage, stage_version
        self.transport = transport
        self.newest: dict[int, tuple[Any, int]] = {}
        self.local: dict[int, Local] = {}
        self.thresholds: np.ndarray | None = None
        self.round_complete = False
        self.sequence = 0
        self.ages: Counter[int] = Counter()
        self.hits = self.misses = self.lost = 0
        self.wait_seconds = 0.0
        self.first_label_seconds: float | None = None
        self._asked: Any = None
        self._began = time.monotonic()

    def poll(self, step: int, upcoming: np.ndarray) -> None:
        """Take what has arrived and start to pull what the coming samples will need. Never blocks.

        Args:
            step: the student's step.
            upcoming: indices of the target images of the next batches.
        """
        began = time.perf_counter()
        if self._asked is None:
            self._asked = self.transport.ask(self.stage, self.stage_version, self.sequence, step)
        wanted = {
            int(chunk): self.newest[int(chunk)]
            for chunk in np.unique(upcoming // self.rows)
            if int(chunk) in self.newest and self._behind(int(chunk))
        }
        ready = self.transport.ready([self._asked, *(ref for ref, _ in wanted.values())])
        for chunk, (reference, version) in wanted.items():
            if reference in ready:
                self._fetch(chunk, reference, version)
        if self._asked in ready:
            self._take(self._asked)
            self._asked = None
        if self.hits:
            self.wait_seconds += time.perf_counter() - began

    def wait_for_round(self, step: int, tick: Callable[[], bool], poll_seconds: float = 0.02) -> bool:
        """Block until the round of ``refresh="once"`` is complete: the turn-taking of the published systems.

        Args:
            step: the student's step.
            tick: called between two looks; True ends the wait.

        Returns:
            False when ``tick`` ended it.
        """
        while not self.round_complete:
            self.poll(step, np.empty(0, np.int64))
            if tick():
                return False
            time.sleep(poll_seconds)
        return True

    def get(self, index: int, step: int) -> tuple[np.ndarray, float]:
        """The label of one image and its weight.

        Args:
            index: the image's index in the target split.
            step: the student's step.

        Returns:
            uint8 H×W, possibly read-only, all 255 where there is none; and a weight in [0, 1].
        """
        chunk, row = divmod(int(index), self.rows)
        held = self.local.get(chunk)
        if held is None and self.plan.policy.refresh == "once" and chunk in self.newest:
            # The round is complete: its blocks exist, and turn-taking waits for the transfer by definition.
            reference, version = self.newest[chunk]
            self._fetch(chunk, reference, version)
            held = self.local.get(chunk)
        age = 0 if held is None else max(0, step - held.version)
        if held is None or not self.plan.policy.select(age, self.round_complete):
            self.misses += 1
            return np.full(self.shape, WITHHELD, np.uint8), 0.0
        if self.first_label_seconds is None:
            self.first_label_seconds = time.monotonic() - self._began
        self.hits += 1
        self.ages[age] += 1
        record = decode(held.table, row)
        selection = self.plan.selection
        if selection is None:
            label = record[self.plan.label_column]
        elif self.thresholds is None:
            label = np.full(self.shape, WITHHELD, np.uint8)
        else:
            label = selection.apply(record, self.thresholds)
        return label, self.plan.policy.weigh(age)

    def column(self, name: str, index: int, step: int) -> np.ndarray:
        """Another column of the record that :meth:`get` has just read for an image.

        Returns:
            uint8 of the column's shape, possibly read-only; zeros where there is no record.
        """
        chunk, row = divmod(int(index), self.rows)
        held = self.local.get(chunk)
        if held is None or not self.plan.policy.select(max(0, step - held.version), self.round_complete):
            return np.zeros(dict(self.plan.rule.layout.columns)[name], np.uint8)
        return decode(held.table, row)[name]

    def _behind(self, chunk: int) -> bool:
        return chunk not in self.local or self.local[chunk].version != self.newest[chunk][1]

    def _fetch(self, chunk: int, reference: Any, version: int) -> None:
        try:
            self.local[chunk] = Local(self.transport.get(reference), version)
        except ray.exceptions.RayError:
            self.lost += 1
            self.newest.pop(chunk, None)
            self.transport.report_lost(chunk, version)

    def _take(self, reference: Any) -> None:
        try:
            delta: Delta = self.transport.get(reference)
        except ray.exceptions.RayTaskError:
            raise  # the bank lives and its code failed: no later answer will be better
        except ray.exceptions.RayError:
            return
        if delta.stage != self.stage:
            return
        restarted = delta.sequence < self.sequence
        if restarted:  # the bank counts anew: ask for everything again
            self.newest.clear()
        self.sequence = 0 if restarted else delta.sequence
        self.newest.update({chunk: (block, version) for chunk, (block,), version in delta.entries})
        if delta.thresholds is not None:
            self.thresholds = delta.thresholds
        self.round_complete = self.round_complete or delta.round_complete
