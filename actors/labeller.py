"""Labels chunks of target images with the weights of a version: the work of a :class:`actors.teacher.Teacher`.

A label depends on (seed, image id, weights version) and nothing else that is random, so it does not matter which
teacher made it, or when.
"""

from __future__ import annotations

import functools
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import nn

from actors.errors import UnreadableImage
from actors.label_rounds import Header
from actors.prior_estimate import Adjustment, Evidence, Part, source_looks
from actors.protocols import ImageReader, LabelPlan
from actors.records import encode

YIELDING = 4
"""Added to the niceness of teachers and evaluator where they share cores with a student: it must not wait for them."""


def label_seed(seed: int, image_id: str, version: int) -> int:
    """63-bit seed of one image's labels with one version of the weights."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(image_id.encode()), max(0, version)])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_weights(network: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copy published weights (numpy, possibly read-only views) into a network."""
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=False).items():
            tensor.copy_(torch.from_numpy(np.array(weights[name])))


class Networks:
    """The networks of a run, told apart by their weights: a stage may have one of its own. Built when first needed.

    Args:
        factories: one builder, or several.
        device: where they run.
    """

    def __init__(
        self, factories: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]], device: torch.device
    ) -> None:
        self.factories = [factories] if callable(factories) else list(factories)
        self.device = device
        self.built: list[nn.Module] = []

    @property
    def first(self) -> nn.Module:
        """The first of them."""
        return self._at(0)

    def load(self, weights: Mapping[str, np.ndarray]) -> nn.Module:
        """The network that some weights belong to, with them.

        Raises:
            ValueError: they belong to none.
        """
        shapes = {name: array.shape for name, array in weights.items()}
        for number in range(len(self.factories)):
            network = self._at(number)
            if {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == shapes:
                load_weights(network, weights)
                return network
        raise ValueError(f"weights of {len(shapes)} tensors belong to none of the run's networks")

    def _at(self, number: int) -> nn.Module:
        for factory in self.factories[len(self.built) : number + 1]:
            self.built.append(factory().to(self.device).eval().requires_grad_(False))
        return self.built[number]


def prepare_torch(threads: int) -> None:
    """Threads of this process; and float32 is float32 on a GPU, too, whose convolutions would round to TF32."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False


def own_device() -> torch.device:
    """The GPU that Ray gave this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes of a GPU's memory that this process holds for its tensors, now; nothing on a CPU.

    What CUDA itself takes, some hundred MB a process, is not counted.
    """
    return {"gpu_memory_bytes": torch.cuda.memory_reserved(device)} if device.type == "cuda" else {}


def helper_device(threads: int) -> torch.device:
    """Make this process a helper of the student's: the GPU that Ray gave it, or the CPU, where it yields to others."""
    prepare_torch(threads)
    device = own_device()
    if device.type == "cpu":
        _yield_cores()
    return device


@functools.cache
def _yield_cores() -> None:
    """Once in a process."""
    os.nice(YIELDING)


class Labeller:
    """Makes blocks of pseudo-label records. Plain object.

    Args:
        network: builds the teaching network; several builders where stages have networks of their own.
        reader: the target images; it knows no labels.
        plans: label plan by stage index.
        seed: the run's seed.
        device: where the network runs.
        batch: images in one call of the rule.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]],
        reader: ImageReader,
        plans: Mapping[int, LabelPlan],
        seed: int,
        device: torch.device,
        batch: int = 4,
    ) -> None:
        self.networks = Networks(network, device)
        self.network = self.networks.first
        self.reader, self.plans, self.seed, self.device, self.batch = reader, plans, seed, device, batch
        self.version: int | None = None

    def load(self, version: int, weights: Mapping[str, np.ndarray]) -> None:
        """Swap the weights, between two batches."""
        self.network = self.networks.load(weights)
        self.version = version

    def label(
        self, stage: int, chunk: int, start: int, stop: int, step: int, adjustment: Adjustment | None = None
    ) -> tuple[Header, pa.Table]:
        """Label images ``start`` to ``stop``, adjusted to the target's class frequencies where that is wanted.

        An unreadable image is labelled all 255 and named in the header: the student skips it too.
        """
        if self.version is None:
            raise RuntimeError("a teacher was asked to label before it had weights")
        began = time.perf_counter()
        rule = self.plans[stage].rule
        ids = [self.reader.image_ids[i] for i in range(start, stop)]
        columns, pixels, skipped, evidence = [], [], list[str](), list[Evidence]()
        every = [label_seed(self.seed, image_id, self.version) for image_id in ids]
        histogram = np.zeros((rule.num_classes, 256), np.int64)
        for first in range(start, stop, self.batch):
            indices = range(first, min(first + self.batch, stop))
            views, unreadable = self._read(indices, rule.view_sizes)
            seeds = every[first - start : first - start + len(indices)]
            for index, made in zip(indices, rule.label(self.network, views, seeds, adjustment), strict=True):
                if index in unreadable:
                    skipped.append(unreadable[index])
                    column = self.plans[stage].label_column
                    made.columns[column] = np.full_like(made.columns[column], 255)
                    made.class_pixels = np.zeros_like(made.class_pixels)
                else:
                    histogram += made.histogram
                    evidence += [] if made.evidence is None else [made.evidence]
                columns.append(made.columns)
                pixels.append(made.class_pixels)
        block = encode(
            rule.layout,
            ids,
            columns,
            pixels,
            weights_version=self.version,
            made_at_step=max(step, self.version),
        )
        seconds = time.perf_counter() - began
        counts = np.stack(pixels).sum(0, dtype=np.int64)
        told = self._told(evidence, stage, every, adjustment) if evidence else None
        held = gpu_memory(self.device).get("gpu_memory_bytes", 0)
        return Header(chunk, self.version, stop - start, seconds, counts, histogram, tuple(skipped), told, held), block

    def _told(
        self, evidence: Sequence[Evidence], stage: int, seeds: Sequence[int], adjustment: Adjustment | None
    ) -> Evidence | Part | None:
        """What the bank is told of what was seen on target images, and on source images where the estimate needs it."""
        plan = self.plans[stage]
        if adjustment is None or plan.prior is None:
            return None
        seen = Evidence.joined(evidence)
        if plan.source is not None:
            looks = source_looks(seeds, adjustment.source_every, len(plan.source))
            seen = replace(seen, source=plan.source.look(self.network, looks, adjustment.temperature))
        return seen if adjustment.target is None else plan.prior.part(seen, adjustment.target)

    def _read(self, indices: range, sizes: tuple[tuple[int, int], ...]) -> tuple[list[torch.Tensor], dict[int, str]]:
        views: list[list[np.ndarray]] = [[] for _ in sizes]
        unreadable: dict[int, str] = {}
        for index in indices:
            try:
                images = [self.reader.read(index, size) for size in sizes]
            except UnreadableImage as error:
                unreadable[index] = error.path
                images = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
            for view, image in zip(views, images, strict=True):
                view.append(image)
        return [torch.from_numpy(np.stack(view)).to(self.device) for view in views], unreadable
