"""Where it lies what teachers and evaluator now work on. It knows neither of them, so it starts without torch."""

from __future__ import annotations

from typing import Any, ClassVar

import ray


class Desk:
    """The arguments of every role, for those that begin, or begin again. Plain object; runs as an actor."""

    def __init__(self) -> None:
        self.briefs: dict[str, list[Any]] = {}

    def write(self, role: str, brief: list[Any]) -> None:
        """Arguments of a role, as a reference in a list: the desk does not open it."""
        self.briefs[role] = brief

    def read(self, role: str) -> list[Any]:
        """What was written last."""
        return self.briefs[role]


class Lasting:
    """Makes an actor work for one run after another; stands before its class. See :class:`actors.crew.LastingCrew`."""

    role: ClassVar[str]

    def __init__(self, desk: Any) -> None:
        self.desk = desk
        self.begin()

    def begin(self) -> None:
        """Work for the run whose arguments lie on the desk."""
        super().__init__(*ray.get(ray.get(self.desk.read.remote(self.role))[0]))
