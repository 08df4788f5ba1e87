"""Who starts teachers and evaluators, and when they go.

For one run they come and go with it. A process that carries out one run after another keeps them: starting a process
that imports torch costs seconds of a core, which a short run would spend again and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import ray

from actors.desk import Desk
from actors.evaluator import Evaluator, LastingEvaluator
from actors.teacher import LastingTeacher, Teacher

EVALUATOR_RETRIES = 3
"""How often an evaluator that died is asked again for what it was doing; one that always dies of it ends the run."""


class Crew:
    """Starts teachers and evaluators for one run."""

    def teachers(self, count: int, options: dict[str, Any], *arguments: Any) -> list[Any]:
        """Teachers of a run.

        Args:
            count: how many.
            options: what each asks Ray for.
            arguments: of :class:`actors.teacher.Teacher`.
        """
        kind = ray.remote(Teacher).options(max_restarts=-1, max_task_retries=0, **options)
        return [kind.remote(*arguments) for _ in range(count)]

    def evaluator(self, options: dict[str, Any], *arguments: Any) -> Any:
        """The evaluator of a run; see :meth:`teachers`."""
        # What it is asked for can be asked again, wherever it starts again: the scores at the end are worth a wait.
        kind = ray.remote(Evaluator).options(max_restarts=-1, max_task_retries=EVALUATOR_RETRIES, **options)
        return kind.remote(*arguments)

    def dismiss(self, actors: Sequence[Any]) -> None:
        """The run needs them no more."""
        for actor in actors:
            ray.kill(actor)


class LastingCrew(Crew):
    """Keeps teachers and evaluator from run to run; all runs must ask Ray for the same.

    A kept one that died starts again by itself, with what now lies on the desk.

    Args:
        desk_options: what the desk asks Ray for.
    """

    def __init__(self, desk_options: dict[str, Any]) -> None:
        self.desk = ray.remote(Desk).options(num_cpus=0, max_restarts=0, **desk_options).remote()
        self.kept: dict[str, list[Any]] = {"teacher": [], "evaluator": []}
        self._asked: dict[str, dict[str, Any]] = {}

    def teachers(self, count: int, options: dict[str, Any], *arguments: Any) -> list[Any]:
        """See :class:`Crew`."""
        return self._hire("teacher", LastingTeacher, count, {"max_task_retries": 0, **options}, arguments)

    def evaluator(self, options: dict[str, Any], *arguments: Any) -> Any:
        """See :class:`Crew`."""
        return self._hire("evaluator", LastingEvaluator, 1, options, arguments)[0]

    def dismiss(self, actors: Sequence[Any]) -> None:
        """They stay, and wait for the next run."""

    def end(self) -> None:
        """Send everybody home."""
        for actor in [*self.kept["teacher"], *self.kept["evaluator"], self.desk]:
            ray.kill(actor)
        self.kept = {"teacher": [], "evaluator": []}

    def _hire(
        self, role: str, kind: type[Any], count: int, options: dict[str, Any], arguments: tuple[Any, ...]
    ) -> list[Any]:
        ray.get(self.desk.write.remote(role, [ray.put(arguments)]))
        if self._asked.setdefault(role, options) != options:
            raise ValueError(f"a kept {role} asked Ray for {self._asked[role]}, and this run asks for {options}")
        kept = self.kept[role]
        for begun in [actor.begin.remote() for actor in kept]:
            # One that died meanwhile starts again by itself, with what lies on the desk.
            with contextlib.suppress(ray.exceptions.RayActorError):
                ray.get(begun)
        remote = ray.remote(kind).options(max_restarts=-1, **options)
        kept += [remote.remote(self.desk) for _ in range(count - len(kept))]
        return kept[:count]
