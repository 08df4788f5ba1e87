"""The network that teaches: an average of the student, or the student itself, with the statistics of its choice.

The average is the student's business, because it owns the optimiser step; teachers and evaluator only read what is
published here, so they all agree.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import Tensor, nn

from actors.protocols import View
from models.networks.statistics import adapt_batch_norm, ema_update

STATISTICS_BATCHES = 4
"""Recent target batches from which batch-norm statistics are estimated."""


class TeachingNetwork:
    """The published network of one stage.

    Args:
        network: a network of the student's architecture, on its device; becomes this object's own.
        student: the student, whose weights it starts from.
        decay: of the exponential moving average; None follows the student exactly.
        statistics: ``running`` takes the student's batch-norm statistics as they are, ``target`` estimates them on
            the target batches seen last.
        view: turns remembered raw target batches into network input again, as a teacher would see them.
        before: the stage before; an average goes on from its average, not from the raw student.
    """

    def __init__(
        self,
        network: nn.Module,
        student: nn.Module,
        decay: float | None,
        statistics: Literal["running", "target"],
        view: View | None,
        before: TeachingNetwork | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.decay: float | None = decay
        goes_on = before is not None and decay is not None and before.decay is not None
        self.network.load_state_dict(before.network.state_dict() if before and goes_on else student.state_dict())
        self.state = dict(self.network.state_dict())
        self.statistics, self.view = statistics, view
        self.recent: deque[tuple[Tensor, np.ndarray]] = deque(maxlen=STATISTICS_BATCHES)
        if before is not None:
            self.recent.extend(before.recent)

    def remember(self, images: Tensor, positions: np.ndarray) -> None:
        """Keep a raw target batch, uint8 N×H×W×3, for the statistics."""
        if self.statistics == "target":
            self.recent.append((images, positions))

    def follow(self, student: nn.Module) -> None:
        """After every step: move the average. Without one there is nothing to do until publication."""
        if self.decay is not None:
            ema_update(self.state, student, self.decay, buffers="copy")

    def settle(self, student: nn.Module) -> nn.Module:
        """Bring weights and statistics up to date and return the network."""
        if self.decay is None:
            ema_update(self.state, student, 0.0, buffers="copy")
        if self.statistics == "target" and self.recent and self.view is not None:
            view, device = self.view, next(self.network.parameters()).device
            inputs = (view(images.to(device), (), positions)[0] for images, positions in self.recent)
            adapt_batch_norm(self.network, inputs)
        return self.network

    def state_dict(self) -> dict[str, Any]:
        """Weights and remembered batches."""
        recent = [{"images": images, "positions": torch.from_numpy(p)} for images, p in self.recent]
        return {"network": self.state, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.network.load_state_dict(state["network"])
        self.recent.clear()
        self.recent.extend((item["images"], item["positions"].numpy()) for item in state["recent"])


class Publisher:
    """Puts weights into the object store in a thread and hangs them on the board; rank 0 only."""

    def __init__(self, board: Any, bank: Any | None, labelling: Any | None = None) -> None:
        self.board, self.bank = board, bank
        self._labelling = labelling
        self.version: int | None = None
        self.failures = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._pending: Future[None] | None = None

    @property
    def labelling(self) -> Any:
        """The board from which labels are made; another one where a teacher that learns publishes, too."""
        return self.board if self._labelling is None else self._labelling

    def publish(
        self,
        version: int,
        network: nn.Module,
        *,
        pin: bool,
        student: nn.Module | None = None,
        shown: bool = True,
        labels: bool = True,
    ) -> None:
        """Publish a network as it is now; returns at once.

        Args:
            version: the student's step.
            network: read before this returns.
            pin: keep the version alive until another is pinned.
            student: published beside it, for whoever compares the two.
            shown: hang it where the evaluator looks.
            labels: hang it where labels are made from.
        """
        weights = [_on_host(module) for module in (network, student) if module is not None]
        self.flush()
        self.version = version
        wanted = ((self.board, shown), (self.labelling, labels))
        boards = list(dict.fromkeys(board for board, here in wanted if here))
        self._pending = self._pool.submit(self._put, boards, version, weights, pin)

    def rewind(self, step: int, *, labels: bool = True) -> None:
        """Tell boards and bank that the student stands at an earlier step than they may have seen.

        Args:
            step: where it stands.
            labels: False where a teacher writes the board from which labels are made: its weights are as good as ever.
        """
        for board in dict.fromkeys((self.board, self.labelling if labels else self.board, self.bank)):
            try:
                if board is not None:
                    ray.get(board.rewind.remote(step))
            except ray.exceptions.RayActorError:  # it is just restarting, and so remembers nothing
                self.failures += 1

    def flush(self) -> None:
        """Wait until the last publication hangs on the board."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except ray.exceptions.RayError:  # a board that is just restarting: the next version will hang there
            self.failures += 1

    def _put(self, boards: list[Any], version: int, weights: list[dict[str, np.ndarray]], pin: bool) -> None:
        references = [ray.put(item) for item in weights]
        ray.get([board.publish.remote(version, references, pin) for board in boards])


def _on_host(module: nn.Module) -> dict[str, np.ndarray]:
    """A copy of a module's weights in numpy."""
    return {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in module.state_dict().items()}
