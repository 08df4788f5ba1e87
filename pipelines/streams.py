"""From files to batches: an endless sample sequence whose whole state is one integer.

The image at a position is a pure function of (seed, position). Every student opens its own share of the positions as
Ray Data segments of bounded length, so the same ids reach the same rank after a kill inside a segment or across its
edge, and a schedule of published length starts as fast as a short one. Read tasks run in other processes; pixels come
through the object store.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from actors.protocols import RawBatch, View
from pipelines.blocks import SPARES, ReadPlan, SampleFile, SegmentReader, decode_image, on_this_node
from pipelines.datasets.dataset import DataError, Split
from pipelines.decode_cache import DecodeCache

Size = tuple[int, int]
BLOCK_BYTES = 8_000_000
SEGMENT_BLOCKS = 16
QUEUE_BATCHES = 4
DRAWS = 3000
"""Positions of a block of class-aware sampling (methods §7.1)."""


@lru_cache(maxsize=8)
def _permutation(images: int, seed: int, name: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), epoch]).permutation(images)


@dataclass(frozen=True)
class SampleOrder:
    """A fresh shuffle of all images for every epoch, addressed by position."""

    images: int
    seed: int
    name: str

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image index at each global position, int64; a pure function of (seed, name, position)."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.images)
        result = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            result[inside] = _permutation(self.images, self.seed, self.name, int(epoch))[offsets[inside]]
        return result


@dataclass(frozen=True)
class ClassAwareOrder:
    """FADA's sampling of the source, by position: a class is drawn, then an image that shows it (methods §7.1).

    In blocks of 3000 positions, class c has probability ∝ 1/ln(1.01 + share_c), where share_c is its share of the class
    occurrences (an image counts once for every class that it shows) in the images drawn so far in the block. Its images
    take turns, shuffled anew whenever all had theirs. The block is then shuffled.

    The published runs go on with the turns of a class from block to block. Here every block begins anew, so that any
    position can be had without those before it. A class that no image shows is never drawn, nor is an image without a
    class.

    Attributes:
        present: which classes an image shows, images × classes bits, packed: it travels to students.
        images: in the split.
        classes: C.
        seed: of the run.
        name: of the stream.
    """

    present: bytes
    images: int
    classes: int
    seed: int
    name: str

    @staticmethod
    def of(presence: np.ndarray, seed: int, name: str) -> ClassAwareOrder:
        """An order of images by the classes that they show, bool images × C.

        Raises:
            DataError: no image shows any class.
        """
        if not presence.any():
            raise DataError(
                f"{name}: none of the {len(presence)} labels has a pixel of any class, so no image can be drawn for "
                "one. Look at the labels with `data check`, or sample without regard to classes."
            )
        images, classes = presence.shape
        return ClassAwareOrder(np.packbits(presence).tobytes(), images, classes, seed, name)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The image index at each global position, int64; a pure function of (presence, seed, name, position)."""
        blocks, offsets = np.divmod(np.asarray(positions, np.int64), DRAWS)
        result = np.empty_like(offsets)
        for block in np.unique(blocks):
            inside = blocks == block
            result[inside] = _class_aware_block(self, int(block))[offsets[inside]]
        return result


@lru_cache(maxsize=8)
def _class_aware_block(order: ClassAwareOrder, block: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(order.present, np.uint8), count=order.images * order.classes)
    presence = bits.reshape(order.images, order.classes).astype(bool)
    rng = np.random.default_rng([order.seed, zlib.crc32(order.name.encode()), block])
    queues = [rng.permutation(np.flatnonzero(shown)) for shown in presence.T]
    turns = [0] * order.classes
    drawable = presence.any(0)
    occurrences = np.zeros(order.classes)
    drawn = np.empty(DRAWS, np.int64)
    for draw, uniform in enumerate(rng.random(DRAWS)):
        weights = drawable / np.log(1.01 + occurrences / max(1.0, occurrences.sum()))
        limits = weights.cumsum()
        chosen = int(np.searchsorted(limits, uniform * limits[-1], side="right"))
        if turns[chosen] == len(queues[chosen]):
            queues[chosen], turns[chosen] = rng.permutation(queues[chosen]), 0
        drawn[draw] = queues[chosen][turns[chosen]]
        turns[chosen] += 1
        occurrences += presence[drawn[draw]]
    return rng.permutation(drawn)


def rank_positions(position: int, steps: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Positions of one rank's samples, int64 steps × (batch // world); step k takes the k-th global batch.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    if batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared evenly by {world} students")
    share = batch // world
    first = position + np.arange(steps, dtype=np.int64)[:, None] * batch + rank * share
    return first + np.arange(share, dtype=np.int64)


@dataclass(frozen=True)
class SplitReader:
    """Cached access to one split at one size: what read tasks and teachers use."""

    split: Split
    cache: DecodeCache

    @property
    def image_ids(self) -> Sequence[str]:
        """Ids in order."""
        return self.split.image_ids

    def __len__(self) -> int:
        return len(self.split)

    def read(self, index: int, size: Size) -> np.ndarray:
        """Image, uint8 H×W×3 RGB, at size (width, height)."""
        return decode_image(self.cache, self.split.image_paths[index], size)

    def label(self, index: int) -> np.ndarray:
        """Class map at its own size, uint8 H×W train ids."""
        return self.split.label(index)


@dataclass
class SampleStream:
    """The samples of one split for students (the :class:`actors.protocols.Stream` of the design).

    Attributes:
        split: images, with labels or without.
        size: base size (width, height) to which images and labels are resized when they are decoded.
        order: which image stands at which position.
        view: the augmentation, applied on the student's device.
        cache: the decode cache.
        read_cpus: what a read task asks Ray for; a fraction, or it waits in silence on a full machine.
    """

    split: Split
    size: Size
    order: SampleOrder | ClassAwareOrder
    view: View
    cache: DecodeCache
    read_cpus: float = 0.25
    segment_blocks: int = SEGMENT_BLOCKS
    block_rows: int = field(default=0)

    def __post_init__(self) -> None:
        if not self.block_rows:
            channels = 4 if self.split.labelled else 3
            self.block_rows = int(np.clip(BLOCK_BYTES // (self.size[0] * self.size[1] * channels), 1, 32))

    @property
    def images(self) -> int:
        """Images in the split."""
        return len(self.split)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """See :class:`actors.protocols.Stream`."""
        return self.order.indices(positions)

    def batches(self, position: int, steps: int, batch: int, rank: int, world: int) -> Iterator[RawBatch]:
        """See :class:`actors.protocols.Stream`. The first segment starts to read when this is called."""
        positions = rank_positions(position, steps, batch, rank, world).reshape(-1)
        share = batch // world
        rows = max(share, self.block_rows // share * share)
        length = rows * self.segment_blocks
        segments = [positions[start : start + length] for start in range(0, len(positions), length)]
        return _Segments(self, segments, rows, share)

    def blocks(self, positions: np.ndarray, rows: int) -> list[list[SampleFile]]:
        """The files of the samples at some positions, ``rows`` samples to a block."""
        return [self._files(positions[start : start + rows]) for start in range(0, len(positions), rows)]

    def _files(self, positions: np.ndarray) -> list[SampleFile]:
        """Files of a block, and behind them those of the next positions that are not in it themselves."""
        next_ones = (positions[:, None] + np.arange(1, SPARES + 1)).reshape(-1)
        spares = np.setdiff1d(next_ones, positions)
        every = np.concatenate([positions, spares])
        labels = self.split.label_paths
        return [
            SampleFile(
                int(p), int(i), self.split.image_paths[i], None if labels is None else labels[i], k >= len(positions)
            )
            for k, (p, i) in enumerate(zip(every, self.indices(every), strict=True))
        ]


def collate(table: pa.Table, size: Size) -> RawBatch:
    """Arrow rows to tensors; pinned where a GPU will take them."""
    width, height = size
    rows = table.num_rows
    images = torch.from_numpy(_pixels(table, "image").reshape(rows, height, width, 3))
    labels = None
    if "label" in table.column_names:
        labels = torch.from_numpy(_pixels(table, "label").reshape(rows, height, width))
    if torch.cuda.is_available():
        images = images.pin_memory()
        labels = None if labels is None else labels.pin_memory()
    skipped = [path for cell in table.column("skipped").to_pylist() if cell for path in cell.split("\n")]
    return RawBatch(
        images,
        labels,
        table.column("position").to_numpy().copy(),
        table.column("index").to_numpy().copy(),
        tuple(skipped),
    )


def _pixels(table: pa.Table, name: str) -> np.ndarray:
    """A copy of a pixel column, so that no batch pins its block."""
    parts = []
    for chunk in table.column(name).chunks:
        width = chunk.type.byte_width
        parts.append(np.frombuffer(chunk.buffers()[1], np.uint8, count=len(chunk) * width, offset=chunk.offset * width))
    return np.concatenate(parts)


class _Segments(Iterator[RawBatch]):
    """Plays one segment after the other; the next one opens while the last batches of this one are consumed."""

    def __init__(self, stream: SampleStream, segments: list[np.ndarray], rows: int, share: int) -> None:
        self.stream, self.segments, self.rows, self.share = stream, segments, rows, share
        self.current = 0
        self.delivered = 0
        self.open: dict[int, _Segment] = {}
        reader = ray.remote(SegmentReader).options(num_cpus=0, max_concurrency=2, scheduling_strategy=on_this_node())
        self.reader = reader.remote() if segments else None
        self._open(0)

    def __next__(self) -> RawBatch:
        if self.current >= len(self.segments):
            raise StopIteration
        total = len(self.segments[self.current]) // self.share
        if self.delivered >= total // 2:
            self._open(self.current + 1)
        item = self.open[self.current].next()
        self.delivered += 1
        if self.delivered == total:
            del self.open[self.current]
            self.current, self.delivered = self.current + 1, 0
        return item

    def close(self) -> None:
        """End the reading, wherever it stands; nothing can be taken any more."""
        if self.reader is not None:
            ray.kill(self.reader)
        for segment in self.open.values():
            segment.close()
        self.open, self.segments = {}, []

    def _open(self, number: int) -> None:
        if number < len(self.segments) and number not in self.open:
            blocks = self.stream.blocks(self.segments[number], self.rows)
            self.open[number] = _Segment(self.reader, self.stream, blocks, self.share)


class _Segment:
    """The batches of one segment behind a small queue, filled by a thread that mostly waits."""

    def __init__(self, reader: Any, stream: SampleStream, blocks: list[list[SampleFile]], share: int) -> None:
        self.queue: queue.Queue[RawBatch | BaseException | None] = queue.Queue(QUEUE_BATCHES)
        self.closed = False
        self.thread = threading.Thread(
            target=self._fill, args=(reader, stream, blocks, share), name="segment", daemon=True
        )
        self.thread.start()

    def next(self) -> RawBatch:
        """The next batch; errors of the reading side are raised here."""
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            raise RuntimeError("a Ray Data segment ended before its last batch")
        return item

    def close(self) -> None:
        """End the thread, which may be waiting for room in the queue."""
        self.closed = True
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.queue.get(timeout=0.05)

    def _fill(self, reader: Any, stream: SampleStream, blocks: list[list[SampleFile]], share: int) -> None:
        try:
            plan = ReadPlan(stream.size, stream.split.label_encoding, stream.cache, stream.read_cpus)
            read = reader.read.options(num_returns="streaming", _generator_backpressure_num_objects=2)
            for reference in read.remote(plan, blocks):
                table = ray.get(reference)
                for start in range(0, table.num_rows, share):
                    if self.closed:
                        return
                    self.queue.put(collate(table.slice(start, share), stream.size))
            self.queue.put(None)
        except BaseException as error:  # the student, not this thread, decides what an error means
            self.queue.put(error)
