import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import RunError
from pipelines.pseudo_labels import table as table_module
from pipelines.pseudo_labels.table import SCHEMA, PseudoLabel, Table, open_table

CLASSES = ("water", "boat", "shore")


def item(number, size=(6, 4), confidence=True):
    rng = np.random.default_rng(number)
    label = rng.choice(np.array([0, 1, 2, 255], np.uint8), size[::-1])
    return PseudoLabel(f"image {number}", label, rng.integers(0, 256, size[::-1], np.uint8) if confidence else None)


def written(path, items):
    with open_table(path, CLASSES) as table:
        for one in items:
            table.add(one)
    return Table(path)


def test_labels_of_any_size_come_back_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "GROUP_BYTES", 100)
    items = [item(i, size=(3 + i, 9 - i), confidence=i % 3 > 0) for i in range(8)]
    table = written(tmp_path / "labels.parquet", items)
    assert table.image_ids == tuple(f"image {i}" for i in range(8))
    assert table.classes == CLASSES
    assert pq.ParquetFile(tmp_path / "labels.parquet").num_row_groups > 2
    for one in (items[5], items[0], items[7], items[3]):
        found = table.get(one.image_id)
        np.testing.assert_array_equal(found.label, one.label)
        assert (found.confidence is None) == (one.confidence is None)
        if one.confidence is not None:
            np.testing.assert_array_equal(found.confidence, one.confidence)
    assert "image 4" in table
    assert table.get("another") is None


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    def interrupted():
        yield item(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "labels.parquet", interrupted())
    assert list(tmp_path.iterdir()) == []


def test_any_library_can_read_it(tmp_path):
    one = item(0)
    written(tmp_path / "labels.parquet", [one])
    (row,) = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    np.testing.assert_array_equal(np.frombuffer(row["label"], np.uint8).reshape(row["height"], row["width"]), one.label)


def raw(tmp_path, schema=SCHEMA, metadata=None, **changes):
    row = {"image_id": "a", "width": 2, "height": 1, "label": b"\0\1", "confidence": None, **changes}
    arrays = [pa.array([row[field.name]], field.type) for field in schema]
    metadata = {"classes": '["water", "boat"]'} if metadata is None else metadata
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata)), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": b"\0"}, "the label of a does not have 2×1 bytes"),
        ({"label": None}, "the label of a does not have 2×1 bytes"),
        ({"confidence": b"\0"}, "the label of a does not have 2×1 bytes"),
        ({"label": b"\0\7"}, "the label of a holds 7, but the classes are 0 to 1"),
    ],
)
def test_a_damaged_label_is_named(tmp_path, changes, message):
    with pytest.raises(RunError, match=message):
        Table(raw(tmp_path, **changes)).get("a")


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"no parquet at all" * 10])
def test_what_is_no_parquet_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(RunError, match=r"x\.parquet cannot be read as a Parquet file of pseudo labels"):
        Table(tmp_path / "x.parquet")


def test_another_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(RunError, match="it has no column 'confidence'"):
        Table(tmp_path / "x.parquet")
    with pytest.raises(RunError, match="does not name its classes"):
        Table(raw(tmp_path, metadata={"other": "x"}))
    for classes in ("{[", "7"):
        with pytest.raises(RunError, match="cannot be read"):
            Table(raw(tmp_path, metadata={"classes": classes}))


def test_a_damaged_page_is_a_sentence(tmp_path):
    written(tmp_path / "labels.parquet", [item(i, size=(60, 40)) for i in range(3)])
    content = bytearray((tmp_path / "labels.parquet").read_bytes())
    for place in range(200, len(content) // 2, 97):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        (tmp_path / "x.parquet").write_bytes(damaged)
        with contextlib.suppress(RunError):
            table = Table(tmp_path / "x.parquet")
            for image_id in table.image_ids:
                table.get(image_id)


def test_a_folder_is_no_file_to_write_to(tmp_path):
    with pytest.raises(IsADirectoryError), open_table(tmp_path, CLASSES):
        pass


def test_labels_in_a_store_are_read_where_they_are(tmp_path, store):
    items = [item(number) for number in range(5)]
    written(tmp_path / "labels.parquet", items)
    store.upload_folder(tmp_path, "given")
    table = Table(store.uri("bucket/given/labels.parquet"))
    np.testing.assert_array_equal(table.get("image 3").label, items[3].label)
    with pytest.raises(RunError, match="cannot be read as a Parquet file"):
        Table(store.uri("bucket/given/missing.parquet"))
