"""The board on which a student tells a teacher that learns where it stands and how it fares with the labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from actors.protocols import Reward


@dataclass(frozen=True)
class Standing:
    """What hangs on the board.

    Attributes:
        stage: of the student; -1 before its first stage with such a teacher.
        first_step: the student's step at which that stage began.
        step: the student's newest.
        reward: the newest; None before the first.
    """

    stage: int = -1
    first_step: int = 0
    step: int = 0
    reward: Reward | None = None


class RewardBoard:
    """The newest standing. Plain object; ``ray.remote`` makes it an actor."""

    def __init__(self) -> None:
        self.standing = Standing()

    def begin(self, stage: int, first_step: int, step: int) -> None:
        """A stage begins, or goes on after a resume: what was said before it is of another time."""
        self.standing = Standing(stage, first_step, step)

    def post(self, standing: Standing) -> None:
        """Where the student stands now; without a new reward the last one of its stage stays.

        Every word names the stage, so a board that starts again knows all that it needs with the next one.
        """
        last = self.standing.reward if standing.stage == self.standing.stage else None
        self.standing = standing if standing.reward is not None else replace(standing, reward=last)

    def look(self) -> Standing:
        """What hangs there."""
        return self.standing
