"""Pseudo labels as one Parquet file, a row an image: what every other form is made from and read into.

Columns: ``image_id`` (string), ``width`` and ``height`` (int32), ``label`` (binary, height × width bytes, train ids,
255 = withheld), ``confidence`` (binary of the same shape in steps of 1/255, or null). The names of the classes stand in
the file's metadata under ``classes``, as JSON.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.errors import RunError
from actors.storage import Place, RemotePath, place

GROUP_BYTES = 16_000_000
"""Bytes of a row group before compression."""
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("label", pa.binary()),
        pa.field("confidence", pa.binary()),
    ]
)


@dataclass(frozen=True)
class PseudoLabel:
    """The pseudo label of one image.

    Attributes:
        image_id: as its split calls it.
        label: uint8 (H, W) train ids, 255 = withheld.
        confidence: uint8 (H, W) in steps of 1/255, or None where it is not known.
    """

    image_id: str
    label: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None


class TableWriter:
    """Writes rows; see :func:`open_table`."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._rows: list[PseudoLabel] = []
        self._bytes = 0

    def add(self, item: PseudoLabel) -> None:
        """Write one image."""
        self._rows.append(item)
        self._bytes += 2 * item.label.size
        if self._bytes >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a row group."""
        if self._rows:
            columns = [
                [item.image_id for item in self._rows],
                [item.label.shape[1] for item in self._rows],
                [item.label.shape[0] for item in self._rows],
                [item.label.tobytes() for item in self._rows],
                [None if item.confidence is None else item.confidence.tobytes() for item in self._rows],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._writer.schema))
            self._rows, self._bytes = [], 0


@contextmanager
def open_table(path: Path, classes: Sequence[str]) -> Iterator[TableWriter]:
    """A file to write rows to; it appears by rename when the block ends well, and not at all otherwise.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "it is a folder; give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        schema = SCHEMA.with_metadata({"classes": json.dumps(list(classes))})
        with pq.ParquetWriter(partial, schema, compression="zstd") as file:
            writer = TableWriter(file)
            yield writer
            writer.flush()
        partial.rename(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


class Table:
    """Random access to a file of pseudo labels; cheap when rows are asked for in their order.

    Raises:
        RunError: it is missing or no such file.
    """

    def __init__(self, path: str | Place) -> None:
        self.path = place(path)
        try:
            source = self.path
            self._file = pq.ParquetFile(source.open_seekable() if isinstance(source, RemotePath) else source)
            missing = set(SCHEMA.names) - set(self._file.schema_arrow.names)
            if missing:
                raise RunError(f"{path} holds no pseudo labels: it has no column {min(missing)!r}")
            self.classes = tuple(json.loads((self._file.schema_arrow.metadata or {})[b"classes"]))
            self._places: dict[str, tuple[int, int]] = {}
            for group in range(self._file.num_row_groups):
                ids = self._file.read_row_group(group, columns=["image_id"]).column(0).to_pylist()
                self._places |= {image_id: (group, row) for row, image_id in enumerate(ids)}
        except KeyError as error:
            raise RunError(f"{path} does not name its classes; write it with run.py labels export or import") from error
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise RunError(f"{path} cannot be read as a Parquet file of pseudo labels: {error}") from error
        self._held: tuple[int, pa.Table] | None = None

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._places

    @property
    def image_ids(self) -> tuple[str, ...]:
        """In the order of the file."""
        return tuple(self._places)

    def get(self, image_id: str) -> PseudoLabel | None:
        """The label of an image; None where the file has none.

        Raises:
            RunError: its bytes do not fit its size, or it holds a number that is no class.
        """
        place = self._places.get(image_id)
        if place is None:
            return None
        if self._held is None or self._held[0] != place[0]:
            try:
                self._held = place[0], self._file.read_row_group(place[0])
            except (OSError, ValueError, pa.ArrowException) as error:
                raise RunError(f"{self.path} is damaged where the label of {image_id} is: {error}") from error
        row = self._held[1].slice(place[1], 1).to_pylist()[0]
        shape = row["height"], row["width"]
        try:
            label = np.frombuffer(row["label"], np.uint8).reshape(shape)
            sure = row["confidence"]
            confidence = None if sure is None else np.frombuffer(sure, np.uint8).reshape(shape)
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.path}: the label of {image_id} does not have {shape[1]}×{shape[0]} bytes") from error
        odd = label[(label >= len(self.classes)) & (label != 255)]
        if odd.size:
            raise RunError(
                f"{self.path}: the label of {image_id} holds {odd[0]}, but the classes are 0 to {len(self.classes) - 1}"
            )
        return PseudoLabel(image_id, label, confidence)
