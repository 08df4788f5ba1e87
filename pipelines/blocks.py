"""Blocks of decoded samples: the reading side of a stream, in processes of its own.

Neither torch nor Ray Data is imported here: the reader delivers its first blocks sooner without them.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import RunError, UnreadableImage
from pipelines.datasets.dataset import LabelEncoding, read_image, read_label
from pipelines.decode_cache import DecodeCache

if TYPE_CHECKING:
    from ray.data import Dataset

Size = tuple[int, int]
SPARES = 4
"""An unreadable sample is replaced by the one at the next position, up to this many positions further."""
FIRST_BLOCKS = 3
"""Blocks of a segment that are read without Ray Data. The stream asks for two more than the student has begun."""


@dataclass(frozen=True)
class SampleFile:
    """Where one sample of a block is read from. A spare is read only in place of an unreadable sample."""

    position: int
    index: int
    image: str
    label: str | None
    spare: bool = False


def read_block(files: Sequence[SampleFile], size: Size, encoding: LabelEncoding | None, cache: DecodeCache) -> pa.Table:
    """Decode a block; an unreadable sample is replaced by the one at the next position, and named.

    What replaces it is a function of its position, so a resumed run, whose blocks begin elsewhere, sees the same.

    Args:
        files: the block's samples and their spares.
        size: (width, height).
        encoding: of the labels; None reads images only.
        cache: the decode cache.

    Raises:
        RunError: a sample and all that could replace it are unreadable.
    """
    wanted = [file for file in files if not file.spare]
    by_position = {file.position: file for file in files}
    width, height = size
    images = np.empty((len(wanted), height, width, 3), np.uint8)
    labels = np.empty((len(wanted), height, width), np.uint8)
    indices, skipped = [], []
    for row, file in enumerate(wanted):
        broken: list[str] = []
        while True:
            try:
                images[row] = decode_image(cache, file.image, size)
                if encoding is not None and file.label is not None:
                    labels[row] = decode_label(cache, file.label, size, encoding)
                break
            except UnreadableImage as error:
                broken.append(error.path)
                if len(broken) > SPARES:
                    raise RunError(
                        f"more than {SPARES} images of one block of {len(wanted)} cannot be read, among them "
                        f"{', '.join(broken)}. Repair or remove them."
                    ) from error
                file = by_position[file.position + 1]
        indices.append(file.index)
        skipped.append("\n".join(broken))
    columns = {
        "position": pa.array([file.position for file in wanted], pa.int64()),
        "index": pa.array(indices, pa.int64()),
        "skipped": pa.array(skipped, pa.string()),
        "image": _binary(images),
    }
    if encoding is not None:
        columns["label"] = _binary(labels)
    return pa.table(columns)


def decode_image(cache: DecodeCache, path: str, size: Size) -> np.ndarray:
    """One image through the cache, uint8 H×W×3 RGB."""
    return cache.get(path, size, "image", lambda: read_image(path, size))


def decode_label(cache: DecodeCache, path: str, size: Size, encoding: LabelEncoding) -> np.ndarray:
    """One label through the cache, uint8 H×W train ids."""
    table = ",".join(map(str, (*encoding.raw_ids, *encoding.train_ids)))
    kind = f"{encoding.name}|{encoding.channel}|{zlib.crc32(table.encode()):08x}"
    return cache.get(path, size, kind, lambda: read_label(path, encoding, size))


def _binary(rows: np.ndarray) -> pa.Array:
    data = np.ascontiguousarray(rows).reshape(len(rows), -1)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(data.shape[1]), len(rows), [None, pa.py_buffer(data.reshape(-1))]
    )


@dataclass(frozen=True)
class ReadPlan:
    """How blocks are read; small enough to travel with every call.

    Attributes:
        size: base size (width, height).
        encoding: of the labels, or None to read images only.
        cache: the decode cache.
        cpus: what a read task asks Ray for; a fraction, or it waits in silence on a full machine.
    """

    size: Size
    encoding: LabelEncoding | None
    cache: DecodeCache
    cpus: float

    def dataset(self, blocks: list[list[SampleFile]]) -> Dataset:
        """Blocks of samples as a Ray Dataset in that order."""
        import ray.data  # takes a second of a core, which the first blocks need not wait for

        from pipelines.block_source import BlockSource

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.scheduling_strategy = on_this_node(or_elsewhere=True)
        source = BlockSource(blocks, self.size, self.encoding, self.cache)
        return ray.data.read_datasource(source, num_cpus=self.cpus, override_num_blocks=len(blocks), concurrency=2)


def on_this_node(*, or_elsewhere: bool = False) -> NodeAffinitySchedulingStrategy:
    """Where this process is: what a student reads must not be lost with the node of a teacher.

    Args:
        or_elsewhere: for a task that asks for a CPU, when none is free here.
    """
    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(here, soft=or_elsewhere, _spill_on_unavailable=or_elsewhere)


class SegmentReader:
    """Runs the Ray Data executions of one student, in a process of its own.

    The executor is Python that is always awake: in the student's process it would fight the training step for the
    interpreter lock (seen: a step three times as long).
    """

    def __init__(self) -> None:
        self.running = False

    def read(self, plan: ReadPlan, blocks: list[list[SampleFile]]) -> Iterator[pa.Table]:
        """The blocks of one segment, in order. Returned by value: they then belong to the student that asked.

        The first blocks are read right here: Ray Data needs seconds to start, and the student would wait for them. In
        the first segment of a run it is not even started before the student has taken some of them, because its
        processes would start beside the student's first step and slow that down (seen on two cores: 3.3 s for 0.3 s).
        """
        direct, rest = blocks[:FIRST_BLOCKS], blocks[FIRST_BLOCKS:]
        # Drained as fast as it comes: an execution that waits for its consumer burns a sixth of a core in its
        # scheduling loop. A segment is small enough to lie here until the student asks for it.
        ready: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
        rows = sum(not file.spare for file in blocks[0])

        def drain() -> None:
            try:
                if rest:
                    data = plan.dataset(rest)
                    for table in data.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=1):
                        ready.put(table)
                ready.put(None)
            except BaseException as error:  # raised where the student asks
                ready.put(error)

        thread = threading.Thread(target=drain, name="drain", daemon=True)
        if self.running:
            thread.start()
        for block in direct:
            yield read_block(block, plan.size, plan.encoding, plan.cache)
        if not self.running:
            thread.start()
        self.running = True
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
