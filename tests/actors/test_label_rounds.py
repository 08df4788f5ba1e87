import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import CLASSES, SHAPE, FakeRule

from actors.label_rounds import read_round, write_round
from actors.records import decode, encode


def block(first, rows, version=7, seed=0):
    rng = np.random.default_rng([seed, first])
    columns = [
        {"label": rng.integers(0, 3, SHAPE, dtype=np.uint8), "confidence": rng.integers(0, 256, SHAPE, dtype=np.uint8)}
        for _ in range(rows)
    ]
    counts = [np.bincount(c["label"].reshape(-1), minlength=CLASSES) for c in columns]
    ids = [f"image{first + i}" for i in range(rows)]
    return encode(FakeRule().layout, ids, columns, counts, weights_version=version, made_at_step=9)


BLOCKS = [block(0, 3), block(3, 3), block(6, 1)]
HISTOGRAM = np.arange(CLASSES * 256).reshape(CLASSES, 256)


def test_a_round_is_read_as_it_was_written(tmp_path):
    path = write_round(str(tmp_path / "labels"), HISTOGRAM, *BLOCKS)
    headers, *blocks = read_round(path, 3)
    for written, read in zip(BLOCKS, blocks, strict=True):
        assert written.num_rows == read.num_rows
        assert written.column("image_id").to_pylist() == read.column("image_id").to_pylist()
        for row in range(written.num_rows):
            for name, array in decode(written, row).items():
                np.testing.assert_array_equal(decode(read, row)[name], array)
    assert [(h.chunk, h.version, h.images) for h in headers] == [(0, 7, 3), (1, 7, 3), (2, 7, 1)]
    np.testing.assert_array_equal(sum(h.histogram for h in headers), HISTOGRAM)
    for header, written in zip(headers, BLOCKS, strict=True):
        np.testing.assert_array_equal(header.class_pixels, np.sum(written.column("class_pixels").to_pylist(), 0))


def test_a_round_is_named_by_its_content(tmp_path):
    first = write_round(str(tmp_path), HISTOGRAM, *BLOCKS)
    assert write_round(str(tmp_path), HISTOGRAM, *BLOCKS) == first
    other = write_round(str(tmp_path), HISTOGRAM, block(0, 3, seed=1), *BLOCKS[1:])
    assert other != first
    assert {p.name for p in tmp_path.iterdir()} == {Path(first).name, Path(other).name}
    assert os.path.isabs(first)


def test_another_number_of_blocks_is_refused(tmp_path):
    path = write_round(str(tmp_path), HISTOGRAM, *BLOCKS)
    with pytest.raises(ValueError, match="holds 3 blocks of labels, this run needs 4"):
        read_round(path, 4)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, table, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_round(str(tmp_path), HISTOGRAM, *BLOCKS)
    assert list(tmp_path.iterdir()) == []


def test_a_round_in_a_store_is_the_one_in_a_folder(store, tmp_path):
    near = write_round(str(tmp_path), HISTOGRAM, *BLOCKS)
    path = write_round(store.uri("bucket/run/labels"), HISTOGRAM, *BLOCKS)
    assert store.files() == [f"run/labels/{Path(near).name}"]
    _, *blocks = read_round(path, 3)
    for written, read in zip(BLOCKS, blocks, strict=True):
        assert written.equals(read.cast(written.schema))
