"""How many teachers a run has: when more are asked for, when one goes, and whom the bank may call.

A teacher that waits for a place is what a cluster's autoscaler sees: it starts a node for it, and takes the node away
again some time after the teacher has gone. :class:`Demand` decides; :class:`Team` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.errors import RunError, last_line

SECONDS_TO_MENTION = 20.0
"""How long teachers may wait for a place before the user hears of it."""


@dataclass
class Demand:
    """How many teachers labels need.

    More are asked for while labels are missing or too old for a while: as many as bring the age down to what is wanted,
    since the age of labels is inversely proportional to the number of those who make them. One goes when those who
    stay would keep labels fresh enough with room to spare.

    Attributes:
        least, most: bounds.
        age: steps that 19 of 20 labels shall not exceed.
        patience: seconds for which labels must be too old, or four times as long fresh enough, before anything changes.
    """

    least: int
    most: int
    age: int
    patience: float = 15.0
    wanted: int = field(init=False)
    _since: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wanted = self.least

    def look(self, now: float, present: int, status: Mapping[str, Any]) -> int:
        """The number that is wanted now.

        Args:
            now: seconds of a clock that only advances.
            present: teachers that label.
            status: of the bank (:meth:`actors.label_bank.LabelBank.status`); empty while no stage has labels.
        """
        if not status or self.least == self.most or present < self.wanted:
            self._since.clear()  # those that were asked for last have not shown what they can do
            return self.wanted
        oldest, missing = status["live_age_steps_p95"] or 0, status["coverage"] < 1
        remade = status["refresh"] != "once"
        behind = missing or (remade and oldest > self.age)
        others = present - 1
        idle = not missing and (not remade or (others > 0 and oldest * present / others < 0.8 * self.age))
        if self._lasts("behind", behind, now, self.patience):
            enough = present + 1 if missing else math.ceil(present * oldest / self.age)
            self._change(min(self.most, max(enough, present)))
        elif self._lasts("idle", idle, now, 4 * self.patience):
            self._change(max(self.least, others))
        return self.wanted

    def _lasts(self, what: str, now_so: bool, now: float, seconds: float) -> bool:
        """Whether something has been so for as long."""
        if not now_so:
            self._since.pop(what, None)
            return False
        return now - self._since.setdefault(what, now) >= seconds

    def _change(self, wanted: int) -> None:
        self.wanted = wanted
        self._since.clear()


class Team:
    """The teachers of a run, in the driver.

    Args:
        hire: starts as many teachers and returns their handles.
        dismiss: ends some.
        demand: how many there shall be; the least are hired at once.
        needs: what one asks of the cluster, for the user.
        now: seconds of a clock that only advances.
    """

    def __init__(
        self,
        hire: Callable[[int], list[Any]],
        dismiss: Callable[[Sequence[Any]], None],
        demand: Demand,
        needs: str,
        now: float,
    ) -> None:
        self.hire, self.dismiss, self.demand, self.needs = hire, dismiss, demand, needs
        self.hired: list[Any] = []
        self.present: list[Any] = []
        """Those that have answered, and so have a place; the bank may call them."""
        self._asked: dict[Any, tuple[Any, float]] = {}
        """The question to each that has not, and since when it has been hired."""
        self._leaving: list[Any] = []
        self._mentioned = False
        self._take(demand.least, now)

    def look(self, now: float, status: Mapping[str, Any]) -> list[str]:
        """Hire and dismiss as needed, and see who has arrived.

        Args:
            now: see :class:`Team`.
            status: see :meth:`Demand.look`.

        Returns:
            Sentences for the user.

        Raises:
            RunError: a teacher cannot start.
        """
        # The bank has heard since the last look that it must not call them.
        self.dismiss(self._leaving)
        self._leaving, said = [], []
        wanted = self.demand.look(now, status.get("teachers", len(self.present)), status)
        if wanted > len(self.hired):
            more = wanted - len(self.hired)
            said.append(f"labels are missing or too old: {len(self.hired)} teachers become {wanted}")
            self._take(more, now)
        elif wanted < len(self.hired):
            self._leaving = self.hired[wanted:]
            self.hired = self.hired[:wanted]
            self.present = [teacher for teacher in self.present if teacher not in self._leaving]
            said.append(f"labels are fresh enough for fewer teachers: {wanted + len(self._leaving)} become {wanted}")
        return [*said, *self._arrivals(now)]

    def end(self) -> None:
        """Send everybody home."""
        self.dismiss([*self.hired, *self._leaving])
        self.hired, self.present, self._leaving, self._asked = [], [], [], {}

    def _take(self, count: int, now: float) -> None:
        more = self.hire(count)
        self.hired += more
        self._asked |= {teacher: (teacher.pid.remote(), now) for teacher in more}

    def _arrivals(self, now: float) -> list[str]:
        self._asked = {teacher: asked for teacher, asked in self._asked.items() if teacher in self.hired}
        for teacher, (question, since) in list(self._asked.items()):
            if not ray.wait([question], timeout=0)[0]:
                continue
            try:
                ray.get(question)
            except ray.exceptions.ActorDiedError as error:
                raise RunError(f"a teacher cannot start: {last_line(error)}") from error
            except ray.exceptions.RayActorError:  # its node went before it began; Ray starts it elsewhere
                self._asked[teacher] = teacher.pid.remote(), since
                continue
            del self._asked[teacher]
            self.present.append(teacher)
        waiting = [since for _, since in self._asked.values()]
        if waiting and not self._mentioned and now - min(waiting) > SECONDS_TO_MENTION:
            self._mentioned = True
            return [
                f"{len(waiting)} of {len(self.hired)} teachers wait for a place ({self.needs} each); "
                "they begin when the cluster has one"
            ]
        if not waiting and self._mentioned:
            self._mentioned = False
            return [f"all {len(self.hired)} teachers have a place now"]
        return []
