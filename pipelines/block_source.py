"""Blocks of samples as a Ray Data source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.blocks import SampleFile, Size, read_block
from pipelines.datasets.dataset import LabelEncoding
from pipelines.decode_cache import DecodeCache


class BlockSource(Datasource):
    """One read task a block. A task carries the files of its block and nothing else, so it stays small."""

    def __init__(
        self, blocks: list[list[SampleFile]], size: Size, encoding: LabelEncoding | None, cache: DecodeCache
    ) -> None:
        super().__init__()
        self.blocks, self.size, self.encoding, self.cache = blocks, size, encoding, cache

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks."""
        rows = sum(not file.spare for block in self.blocks for file in block)
        return rows * self.size[0] * self.size[1] * (3 if self.encoding is None else 4)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a block, whatever the parallelism."""
        size, encoding, cache = self.size, self.encoding, self.cache
        tasks = []
        for files in self.blocks:
            rows = sum(not file.spare for file in files)
            metadata = BlockMetadata(
                num_rows=rows,
                size_bytes=rows * size[0] * size[1] * (3 if encoding is None else 4),
                input_files=None,
                exec_stats=None,
            )
            tasks.append(ReadTask(_Reader(files, size, encoding, cache), metadata))
        return tasks


@dataclass(frozen=True)
class _Reader:
    files: list[SampleFile]
    size: Size
    encoding: LabelEncoding | None
    cache: DecodeCache

    def __call__(self) -> Iterator[pa.Table]:
        yield read_block(self.files, self.size, self.encoding, self.cache)
