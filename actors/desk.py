"""Where it lies what teachers and evaluator now work on. It knows neither of them, so it starts without torch."""

from __future__ import annotations

from typing import Any


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
