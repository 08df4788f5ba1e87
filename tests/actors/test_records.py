import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.records import RecordLayout, decode, encode

CLASSES = 5


def rows_of(layout, count, seed=0):
    rng = np.random.default_rng(seed)
    columns = [
        {name: rng.integers(0, 256, shape, dtype=np.uint8) for name, shape in layout.columns} for _ in range(count)
    ]
    counts = [rng.integers(0, 9, layout.num_classes) for _ in range(count)]
    return columns, counts


def block(layout, count, seed=0):
    columns, counts = rows_of(layout, count, seed)
    ids = [f"city/{i}" for i in range(count)]
    return encode(layout, ids, columns, counts, weights_version=40, made_at_step=52), columns, counts


SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 5), st.data())
def test_what_was_encoded_is_decoded_from_whole_sliced_and_joined_tables(shapes, count, data):
    layout = RecordLayout(tuple((f"column{i}", shape) for i, shape in enumerate(shapes)), CLASSES)
    table, columns, _ = block(layout, count)
    start = data.draw(st.integers(0, count - 1))
    variants = {
        "whole": (table, 0),
        "sliced": (table.slice(start), start),
        "joined": (pa.concat_tables([table, table]), 0),
    }
    for given_table, first in variants.values():
        for row in range(given_table.num_rows):
            decoded = decode(given_table, row)
            expected = columns[(first + row) % count]
            assert decoded.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(decoded[name], array)


def test_a_record_survives_parquet(tmp_path):
    layout = RecordLayout((("label", (3, 4)), ("soft", (2, 3, 4))), CLASSES)
    table, columns, counts = block(layout, 3)
    pq.write_table(table, tmp_path / "x.parquet")
    again = pq.read_table(tmp_path / "x.parquet")
    np.testing.assert_array_equal(decode(again, 2)["soft"], columns[2]["soft"])
    assert again.column("class_pixels").to_pylist() == [c.tolist() for c in counts]


def test_the_head_of_a_record_says_who_made_it_and_how_much_it_offers():
    layout = RecordLayout((("label", (3, 4)), ("confidence", (3, 4))), CLASSES)
    table, _, counts = block(layout, 2)
    assert table.column("image_id").to_pylist() == ["city/0", "city/1"]
    assert set(table.column("weights_version").to_pylist()) == {40}
    assert set(table.column("made_at_step").to_pylist()) == {52}
    np.testing.assert_allclose(table.column("accepted_share").to_numpy(), [c.sum() / 12 for c in counts], rtol=1e-6)


def test_the_schema_declares_every_column():
    schema = RecordLayout((("label", (3, 4)),), CLASSES).schema()
    assert schema.names == ["image_id", "weights_version", "made_at_step", "accepted_share", "class_pixels", "label"]
    assert schema.field("label").type == pa.binary(12)
    assert schema.field("class_pixels").type == pa.list_(pa.int64(), CLASSES)
    assert json.loads(schema.metadata[b"shapes"]) == {"label": [3, 4]}


@pytest.mark.parametrize(
    ("row", "given_text"),
    [
        ({"label": np.zeros((3, 4), np.int64)}, r"int64 \(3, 4\)"),
        ({"label": np.zeros((4, 3), np.uint8)}, r"uint8 \(4, 3\)"),
        ({}, "nothing"),
    ],
)
def test_a_column_that_is_not_as_declared_is_refused_with_what_was_given(row, given_text):
    layout = RecordLayout((("label", (3, 4)),), CLASSES)
    with pytest.raises(ValueError, match=rf"record of city/0: column 'label' must be uint8 \(3, 4\), got {given_text}"):
        encode(layout, ["city/0"], [row], [np.zeros(CLASSES)], weights_version=0, made_at_step=0)


def test_a_row_that_does_not_exist_is_an_index_error():
    table, _, _ = block(RecordLayout((("label", (3, 4)),), CLASSES), 2)
    for row in (-1, 2):
        with pytest.raises(IndexError, match="2 records"):
            decode(table, row)


def test_another_table_is_no_label_block():
    with pytest.raises(ValueError, match="no pseudo-label block"):
        decode(pa.table({"x": [1]}), 0)


def test_a_decoded_row_is_a_read_only_view():
    table, _, _ = block(RecordLayout((("label", (3, 4)),), CLASSES), 1)
    assert not decode(table, 0)["label"].flags.writeable


def test_a_label_with_confidence_at_full_size_takes_one_megabyte_and_three_fit_in_a_block():
    layout = RecordLayout((("label", (512, 1024)), ("confidence", (512, 1024))), 19)
    assert layout.row_bytes == 1_048_576
    assert layout.rows_per_block(2975) == 3
    assert RecordLayout((("soft", (19, 129, 257)),), 19).rows_per_block(2975) == 6


@pytest.mark.parametrize(("images", "blocks", "rows"), [(24, 4, 6), (24, 5, 4), (3, 8, 1), (1, 1, 1), (10_000, 4, 500)])
def test_a_block_is_small_enough_that_every_teacher_has_several(images, blocks, rows):
    layout = RecordLayout((("label", (80, 100)),), 19)  # 500 rows in 4 MB
    assert layout.rows_per_block(images, blocks) == rows


def test_a_record_larger_than_a_block_still_gets_one():
    assert RecordLayout((("label", (4000, 4000)),), 19).rows_per_block(10) == 1
