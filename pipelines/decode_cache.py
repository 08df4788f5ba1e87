"""The decode cache: every image decoded and resized once, then mapped into memory.

Decoding a 2048×1024 PNG costs tens of milliseconds of a core, reading its pixels from a mapped Arrow file well under
one. An entry is one small Arrow file, named by a hash of what it was made from: the file's path, size and time of
change, the requested size, and the decoder. A changed file is a new name, so nothing is ever stale; entries appear by
rename, so two processes may fill the same cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.storage import status_of

Size = tuple[int, int]
DECODER_VERSION = 2


class DecodeCache:
    """Decoded pixels by file and size.

    Args:
        folder: where entries are kept; None keeps nothing and decodes every time.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else str(folder)
        self.problem: str | None = None
        """Why the last entry that could not be written was not."""

    def get(self, path: str, size: Size, kind: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The pixels of a file.

        Args:
            path: the encoded file.
            size: (width, height) that ``decode`` delivers.
            kind: names the decoder, e.g. ``image`` or the label encoding.
            decode: makes the uint8 array when there is no entry yet; its errors pass through.

        Returns:
            uint8 array, read-only when it comes from the cache.
        """
        if self.folder is None:
            return decode()
        try:
            status = status_of(path)
        except OSError:
            return decode()  # says better than we could why it cannot be read
        key = f"{DECODER_VERSION}|{path}|{status.st_size}|{status.st_mtime_ns}|{size}|{kind}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        entry = Path(self.folder) / name[:2] / f"{name[2:24]}.arrow"
        try:
            return _read(entry)
        except (OSError, pa.ArrowInvalid, IndexError):
            array = decode()
            self._write(entry, array)
            return array

    def _write(self, entry: Path, array: np.ndarray) -> None:
        partial = entry.with_suffix(f".{os.getpid()}.partial")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            data = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(array.size), 1, [None, pa.py_buffer(np.ascontiguousarray(array).reshape(-1))]
            )
            schema = pa.schema([pa.field("pixels", data.type)], metadata={"shape": ",".join(map(str, array.shape))})
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.record_batch([data], schema=schema))
            partial.rename(entry)
        except OSError as error:  # a full or read-only disk costs speed, not the run
            self.problem = error.strerror or str(error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _read(entry: Path) -> np.ndarray:
    with pa.memory_map(str(entry)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    shape = tuple(int(n) for n in batch.schema.metadata[b"shape"].split(b","))
    return np.frombuffer(batch.column(0).buffers()[1], np.uint8).reshape(shape)
