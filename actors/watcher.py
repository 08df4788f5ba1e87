"""Looks at the same few unlabelled target images again and again, with ever newer weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.errors import UnreadableImage
from actors.labeller import Networks
from actors.protocols import ImageReader
from models.label_free import TargetSignals

Size = tuple[int, int]


class Watcher:
    """Measures label-free signals. Plain object.

    Args:
        network: builds the network; several builders where stages have networks of their own.
        reader: target images without labels.
        prepare: uint8 N×H×W×3 RGB and a network → what it reads.
        view: size (width, height) at which images are seen.
        images: how many, spread evenly.
        num_classes: C.
        device: where it runs.
        batch: images in one forward pass.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]],
        reader: ImageReader,
        prepare: Callable[[Tensor, nn.Module], Tensor],
        view: Size,
        images: int,
        num_classes: int,
        device: torch.device,
        batch: int = 4,
    ) -> None:
        self.teaching, self.student = (Networks(network, device) for _ in range(2))
        self.reader, self.prepare, self.view = reader, prepare, view
        self.num_classes, self.device, self.batch = num_classes, device, batch
        count = min(images, len(reader))
        self.indices = [i * len(reader) // count for i in range(count)]
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def look(
        self, teaching: Mapping[str, np.ndarray], student: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """Measure one set of weights.

        Args:
            teaching: weights that teach and are scored.
            student: the student's own at the same step; None leaves ``agreement`` out.

        Returns:
            What :class:`models.label_free.TargetSignals` measures, ``consistency``, with what the network sees in the
            mirrored image, and ``class_shares``; ``stability`` from the second time on. Empty when none of the images
            can be read.
        """
        average = self.teaching.load(teaching)
        other = None if student is None else self.student.load(student)
        signals, seen = TargetSignals(self.num_classes), []
        for number, inputs in enumerate(self._inputs(average)):
            others = {"consistency": self._classes(average, inputs.flip(-1)).flip(-1)}
            if other is not None:
                others["agreement"] = self._classes(other, inputs)
            found = average(inputs)
            before = None if self._before is None or number >= len(self._before) else self._before[number]
            # Another stage's network may answer on another grid.
            if before is not None and before.shape[1:] == found.fused().shape[2:]:
                others["stability"] = before
            seen.append(signals.update(found, others))
        self._before = seen
        return {**signals.values(), "class_shares": signals.class_shares()} if seen else {}

    @staticmethod
    def _classes(network: nn.Module, inputs: Tensor) -> Tensor:
        classes: Tensor = network(inputs).fused().argmax(1)
        return classes

    def _inputs(self, network: nn.Module) -> list[Tensor]:
        """What a network reads, in batches; an image that cannot be read is left out."""
        images = []
        for index in self.indices:
            try:
                images.append(np.array(self.reader.read(index, self.view)))
            except UnreadableImage:
                continue
        stacked: Sequence[np.ndarray] = [
            np.stack(images[start : start + self.batch]) for start in range(0, len(images), self.batch)
        ]
        return [self.prepare(torch.from_numpy(part).to(self.device), network) for part in stacked]
