"""The board on which the student hangs its newest weights for teachers and evaluator to take.

A version is the student step at which its weights were published. At most two versions are alive: the newest, and the
one a teacher may just be fetching. References travel inside lists, because a bare reference is resolved in transit.
"""

from __future__ import annotations

from typing import Any


class VersionGoneError(LookupError):
    """The board holds neither these weights any more nor can it get them again."""


class WeightBoard:
    """Newest weights by version. Plain object; ``ray.remote`` makes it an actor."""

    ALIVE = 2

    def __init__(self) -> None:
        self._alive: dict[int, list[Any]] = {}
        self._pinned: int | None = None

    def publish(self, version: int, references: list[Any], pin: bool = False) -> None:
        """Hang up a version; the oldest unpinned one comes down when more than two hang.

        Args:
            version: student step of these weights.
            references: of the teaching weights and, if it is published, too, of the student's own.
            pin: keep this version for as long as no other is pinned (a round of ``refresh="once"`` needs the weights
                of its stage's start until its last chunk is labelled).
        """
        self._alive[version] = references
        if pin:
            self._pinned = version
        spare = [v for v in sorted(self._alive) if v != self._pinned]
        while len(self._alive) > self.ALIVE and spare:
            del self._alive[spare.pop(0)]

    def newest_version(self) -> int | None:
        """Version of the newest weights, or None before the first are published."""
        return max(self._alive) if self._alive else None

    def nearest_version(self, wanted: int) -> int | None:
        """``wanted`` while it is alive, else the newest; None before the first are published."""
        return wanted if wanted in self._alive else self.newest_version()

    def take(self, version: int) -> list[Any]:
        """The references of a version.

        Raises:
            VersionGoneError: it has come down already.
        """
        if version not in self._alive:
            raise VersionGoneError(f"weights of step {version} are gone; alive are {sorted(self._alive)}")
        return self._alive[version]

    def rewind(self, step: int) -> None:
        """A student came back at an earlier step: what it published after that step is not its future any more."""
        self._alive = {v: ref for v, ref in self._alive.items() if v <= step}
