"""The pseudo-label record: one row of an Arrow table for one target image.

Every record has the same head (image, weights version, step, what was accepted) and the columns that the label rule
declares. Pixel columns are fixed-size binary: decoding a row is a view into the object store, not a copy, and such a
view is read-only and pins its block, so the reader copies what it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import pyarrow as pa

BLOCK_BYTES = 4_000_000
"""A block holds as many rows as fit in about this many bytes: large enough for the object store to keep it out of the
owner's heap, small enough that one lost block is soon made again."""


@dataclass(frozen=True)
class RecordLayout:
    """The pixel columns of a record.

    Attributes:
        columns: name and uint8 shape of every pixel column, e.g. ``(("label", (512, 1024)),)``.
        num_classes: length of the per-class pixel counts.
    """

    columns: tuple[tuple[str, tuple[int, ...]], ...]
    num_classes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one record's pixel columns."""
        return sum(prod(shape) for _, shape in self.columns)

    def rows_per_block(self, images: int, at_least_blocks: int = 1) -> int:
        """Rows of a block: about 4 MB, at least one, and few enough that ``at_least_blocks`` blocks exist.

        Args:
            images: records in all.
            at_least_blocks: teachers need several blocks each, or they label in lock-step.
        """
        fitting = max(1, BLOCK_BYTES // max(1, self.row_bytes))
        return max(1, min(fitting, images // max(1, at_least_blocks)))

    def schema(self) -> pa.Schema:
        """The Arrow schema; pixel shapes stand in its metadata."""
        head = [
            pa.field("image_id", pa.string()),
            pa.field("weights_version", pa.int64()),
            pa.field("made_at_step", pa.int64()),
            pa.field("accepted_share", pa.float32()),
            pa.field("class_pixels", pa.list_(pa.int64(), self.num_classes)),
        ]
        pixels = [pa.field(name, pa.binary(prod(shape))) for name, shape in self.columns]
        shapes = json.dumps({name: list(shape) for name, shape in self.columns})
        return pa.schema(head + pixels, metadata={"shapes": shapes, "num_classes": str(self.num_classes)})


def encode(
    layout: RecordLayout,
    image_ids: Sequence[str],
    columns: Sequence[Mapping[str, np.ndarray]],
    class_pixels: Sequence[np.ndarray],
    *,
    weights_version: int,
    made_at_step: int,
) -> pa.Table:
    """Build a block of records.

    Args:
        layout: the columns that every row must have.
        image_ids: one a row.
        columns: one mapping a row, name → uint8 array of the declared shape.
        class_pixels: one int64 C a row.
        weights_version: student step at which the weights that made the labels were published.
        made_at_step: the student's step, as far as was known, when the labels were made.

    Raises:
        ValueError: a column is missing or has another shape or dtype than declared.
    """
    for name, shape in layout.columns:
        for image_id, row in zip(image_ids, columns, strict=True):
            array = row.get(name)
            if array is None or array.dtype != np.uint8 or array.shape != shape:
                given = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(f"record of {image_id}: column {name!r} must be uint8 {shape}, got {given}")
    pixels = prod(layout.columns[0][1][-2:]) if layout.columns else 1
    arrays: list[pa.Array] = [
        pa.array(list(image_ids), pa.string()),
        pa.array([weights_version] * len(image_ids), pa.int64()),
        pa.array([made_at_step] * len(image_ids), pa.int64()),
        pa.array([float(counts.sum()) / pixels for counts in class_pixels], pa.float32()),
        pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate([np.asarray(c, np.int64) for c in class_pixels])), layout.num_classes
        ),
    ]
    for name, shape in layout.columns:
        data = np.stack([np.ascontiguousarray(row[name]) for row in columns])
        arrays.append(
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(prod(shape)), len(columns), [None, pa.py_buffer(data.reshape(-1))]
            )
        )
    return pa.Table.from_arrays(arrays, schema=layout.schema())


def decode(table: pa.Table, row: int) -> dict[str, np.ndarray]:
    """The pixel columns of one row as read-only uint8 views of the declared shapes.

    Raises:
        IndexError: there is no such row.
        ValueError: the table does not carry the shapes that :func:`encode` wrote.
    """
    if not 0 <= row < table.num_rows:
        raise IndexError(f"row {row} of a block of {table.num_rows} records")
    metadata = table.schema.metadata or {}
    if b"shapes" not in metadata:
        raise ValueError("this table is no pseudo-label block: its schema names no column shapes")
    shapes: dict[str, list[int]] = json.loads(metadata[b"shapes"])
    result = {}
    for name, shape in shapes.items():
        column = table.column(name)
        offset = row
        for chunk in column.chunks:
            if offset < len(chunk):
                break
            offset -= len(chunk)
        size = prod(shape)
        view = np.frombuffer(chunk.buffers()[1], np.uint8, count=size, offset=(chunk.offset + offset) * size)
        view.flags.writeable = False
        result[name] = view.reshape(shape)
    return result
