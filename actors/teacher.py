"""A teacher fetches weights from the board and answers the bank.

Whoever receives the handle of an actor imports the module of its class, and the bank receives the teachers': so torch
is imported when a teacher begins, and not with this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from actors.desk import Lasting
from actors.weight_board import VersionGoneError

if TYPE_CHECKING:
    import pyarrow as pa

    from actors.label_rounds import Header
    from actors.prior_estimate import Adjustment
    from actors.protocols import ImageReader, LabelPlan


class Teacher:
    """Shell of :class:`actors.labeller.Labeller`.

    The bank makes one call after the other; a killed teacher starts again by itself.
    """

    def __init__(
        self,
        network: Callable[[], Any] | Sequence[Callable[[], Any]],
        reader: ImageReader,
        plans: Mapping[int, LabelPlan],
        seed: int,
        board: Any,
        threads: int = 1,
    ) -> None:
        from actors.labeller import Labeller, helper_device

        self.labeller = Labeller(network, reader, plans, seed, helper_device(threads))
        self.board = board

    def label(
        self,
        stage: int,
        chunk: int,
        start: int,
        stop: int,
        version: int,
        step: int,
        adjustment: Adjustment | None = None,
    ) -> tuple[Header, pa.Table]:
        """Label one chunk with one version of the weights; two return values, the small one first.

        When the asked-for version cannot be had any more (its student died), a teacher that has weights goes on with
        those: the header tells the version that was used.

        Raises:
            VersionGoneError: it has none yet either.
        """
        if version != self.labeller.version:
            try:
                reference = ray.get(self.board.take.remote(version))[0]
                self.labeller.load(version, ray.get(reference))
            except (ray.exceptions.RayError, LookupError) as error:
                if self.labeller.version is None:
                    raise VersionGoneError(f"weights of step {version} died with who published them") from error
        return self.labeller.label(stage, chunk, start, stop, step, adjustment)

    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return os.getpid()


class LastingTeacher(Lasting, Teacher):
    """A teacher that works for one run after another."""

    role = "teacher"
