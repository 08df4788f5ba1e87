"""A complete round of labels as a Parquet file: what ``refresh="once"`` needs to continue exactly.

One row group a block, the records as the teachers made them; the summed confidence histogram stands in the file's
metadata. The file is named by the digest of its pixels, so a checkpoint that names it cannot mean another one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.prior_estimate import Evidence, Part
from actors.storage import RemotePath, place


@dataclass
class Header:
    """What a teacher tells of a block it made. Small: it is all that the bank reads."""

    chunk: int
    version: int
    images: int
    seconds: float
    class_pixels: np.ndarray
    histogram: np.ndarray
    skipped: tuple[str, ...] = ()
    evidence: Evidence | Part | None = None
    """Of how frequent classes are on the images that could be read, where it was asked for."""
    gpu_bytes: int = 0
    """GPU memory that the teacher's process holds; 0 on a CPU."""


def write_round(folder: str, histogram: np.ndarray, *blocks: pa.Table) -> str:
    """Write blocks in chunk order; see :func:`write_blocks`."""
    return write_blocks(folder, blocks, lambda: histogram)


def write_blocks(folder: str, blocks: Iterable[pa.Table], histogram: Callable[[], np.ndarray]) -> str:
    """Write blocks in chunk order, one after the other as they come.

    Args:
        folder: where the file shall be. Of a store, the file waits on this machine until its name is known.
        blocks: at least one.
        histogram: summed over all blocks; asked for after the last one.

    Returns:
        The file's absolute path, ``<folder>/<digest>.parquet``. It appears by rename: complete or not at all.
    """
    where = place(folder)
    if isinstance(where, RemotePath):
        with tempfile.TemporaryDirectory() as here:
            made = Path(write_blocks(here, blocks, histogram))
            with pa.memory_map(str(made)) as file:
                (where / made.name).write_bytes(memoryview(file.read_buffer()))
        return str(where / made.name)
    digest, waiting = hashlib.sha256(), iter(blocks)
    where.mkdir(parents=True, exist_ok=True)
    partial = where.absolute() / f".{os.getpid()}.partial"
    try:
        first = next(waiting)
        with pq.ParquetWriter(partial, first.schema, compression="zstd") as writer:
            for block in itertools.chain((first,), waiting):
                for column in block.columns:
                    for part in column.chunks:
                        digest.update(memoryview(part.buffers()[-1]))
                writer.write_table(block, row_group_size=max(1, block.num_rows))
            writer.add_key_value_metadata({"histogram": json.dumps(histogram().tolist())})
        final = partial.with_name(f"{digest.hexdigest()[:16]}.parquet")
        partial.rename(final)
    finally:
        partial.unlink(missing_ok=True)
    return str(final)


def read_round(path: str, blocks: int) -> tuple[Any, ...]:
    """The inverse of :func:`write_round`.

    Returns:
        The list of headers, then one table a block. The summed histogram is given to the first header.

    Raises:
        ValueError: the file holds another number of blocks than this run has.
    """
    where = place(path)
    file = pq.ParquetFile(where.open_seekable() if isinstance(where, RemotePath) else where)
    if file.num_row_groups != blocks:
        raise ValueError(
            f"{path} holds {file.num_row_groups} blocks of labels, this run needs {blocks}: "
            "it was written by a run with other data or another number of teachers"
        )
    summed = np.array(json.loads(file.metadata.metadata[b"histogram"]), np.int64)
    headers, tables = [], []
    for chunk in range(blocks):
        table = file.read_row_group(chunk).combine_chunks()
        counts = np.array(table.column("class_pixels").to_pylist(), np.int64).sum(0)
        histogram = summed if chunk == 0 else np.zeros_like(summed)
        version = table.column("weights_version")[0].as_py()
        headers.append(Header(chunk, version, table.num_rows, 0.0, counts, histogram))
        tables.append(table)
    return (headers, *tables)
