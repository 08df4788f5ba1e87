"""Where files lie: in a folder of this machine (or NFS), or at ``s3://…`` and ``gs://…`` by pyarrow's file systems.

A run's files and a dataset's images are named by strings. :func:`place` turns such a string into a ``pathlib.Path``,
with which everything is as it would be without this module, or into a :class:`RemotePath`, which has as much of a
path's interface as is used here. An address may end in settings of its file system, as pyarrow reads them
(``s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http``); they stay with every path that is made from it.
Credentials never stand in an address, which is written to config.toml and to logs: every node finds its own, as the AWS
and Google libraries do.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import io
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote

from actors.errors import RunError

SETTINGS = {
    "s3": {"region", "scheme", "endpoint_override"},
    "gs": {"scheme", "endpoint_override", "default_bucket_location", "retry_limit_seconds", "project_id"},
}
"""Schemes, and the settings that an address may end in. An upload to these appears when it is complete, or not at all;
that of another store would be seen half written."""
UPLOADED_AT_ONCE = 16 * 2**20
"""Bytes handed to the file system in one call."""
CAUSES = {
    "NO_SUCH_BUCKET": "the bucket {bucket} does not exist",
    "ACCESS_DENIED": "access to the bucket {bucket} is denied to the credentials of this machine",
    "INVALID_ACCESS_KEY_ID": "the credentials of this machine are not known there",
    "SIGNATURE_DOES_NOT_MATCH": "the credentials of this machine are wrong",
    "NETWORK_CONNECTION": "the store cannot be reached",
}
"""What a file system's error says, in words. pyarrow names S3's errors so in its messages."""


LOCAL_OUT = "what is written there is made of files of this machine"


class StorageError(OSError):
    """A store refused or could not be reached; the message names the address and the cause in a sentence."""


@dataclass(frozen=True)
class Status:
    """Of a file, under the names of ``os.stat_result``."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        """Seconds since 1970."""
        return self.st_mtime_ns / 1e9


@functools.total_ordering
@dataclass(frozen=True, eq=False)
class RemotePath:
    """A file or folder of an object store. Picklable; nothing is open and nothing was asked.

    Object stores have no folders: one is there as long as a file is in it.

    Attributes:
        scheme: of :data:`SETTINGS`.
        key: ``bucket/folder/file``.
        settings: what stands after the ``?`` of the address.
        listing: what lies below the folder that :func:`listed` looked into, by key; ``exists``, ``is_file``, ``is_dir``
            and ``glob`` then ask nobody. None for a path that always looks. It is not pickled.
    """

    scheme: str
    key: str
    settings: str = ""
    listing: Mapping[str, Status | None] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        shown = self.key.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
        return f"{self.scheme}://{shown}{'?' if self.settings else ''}{self.settings}"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.scheme, self.key, self.settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __lt__(self, other: RemotePath) -> bool:
        return self._identity < other._identity

    def __truediv__(self, name: str) -> RemotePath:
        return self._at("/".join(part for part in (self.key, *name.split("/")) if part not in ("", ".")))

    @property
    def bucket(self) -> str:
        """First part of the key."""
        return self.key.partition("/")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket, folders, name."""
        return tuple(self.key.split("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Of the name, with its dot; empty where it has none."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder; a bucket is its own."""
        return self._at(self.key.rpartition("/")[0] or self.key)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """All folders above, the nearest first."""
        parts = self.parts
        return tuple(self._at("/".join(parts[:end])) for end in range(len(parts) - 1, 0, -1))

    def absolute(self) -> RemotePath:
        """Itself: an address holds everywhere."""
        return self

    def with_name(self, name: str) -> RemotePath:
        """Another file in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same with another ending."""
        return self.with_name(f"{self.stem}{suffix}")

    def is_relative_to(self, other: RemotePath | Path) -> bool:
        """Whether it is another one or lies in it."""
        return isinstance(other, RemotePath) and f"{self.key}/".startswith(f"{other.key}/")

    def exists(self) -> bool:
        """Whether there is such a file, or one in such a folder."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is something in it."""
        return self._kind() == "folder"

    def stat(self) -> Status:
        """Size and time of the last change.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with self._told():
            found = self._system.get_file_info(self.key)
        if not found.is_file:
            raise self._missing()
        return Status(found.size, found.mtime_ns)

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in it, sorted; nothing where there is no such folder."""
        depth = len(self.parts) + 1
        if self.listing is not None:
            below = (key.split("/") for key in self.listing if key.startswith(f"{self.key}/"))
            found = {"/".join(parts[:depth]) for parts in below}
        else:
            found = set(self._below(recursive=False))
        return (self._at(key) for key in sorted(found))

    def files(self) -> Iterator[RemotePath]:
        """All files below it, however deep, sorted."""
        found = self.listing if self.listing is not None else self._below(recursive=True)
        keys = (key for key, status in found.items() if status is not None and key.startswith(f"{self.key}/"))
        return (self._at(key) for key in sorted(keys))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies below it and matches, sorted; a star stays within a folder's or file's name."""
        first, _, rest = pattern.partition("/")
        if not set(first) & set("*?["):
            found = iter((self / first,)) if rest or (self / first).exists() else iter(())
        else:
            found = (item for item in self.iterdir() if fnmatch.fnmatchcase(item.name, first))
        return found if not rest else (deeper for item in found for deeper in item.glob(rest))

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: the store refuses, or cannot be reached.
        """
        with self.open_seekable() as file, self._told():
            return bytes(file.read())

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The whole file, decoded; line ends become newlines, as in a local one."""
        return re.sub("\r\n?", "\n", self.read_bytes().decode(encoding, errors))

    def open_seekable(self) -> Any:
        """The file for reading in pieces; every piece is a request."""
        with self._told():
            return self._system.open_input_file(self.key)

    def write_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Write the file; it appears when it is complete, and one of that name stays until then.

        Raises:
            StorageError: the store refuses, or cannot be reached.
        """
        whole = memoryview(data)
        with self._told(), self._system.open_output_stream(self.key) as stream:
            # A part that could not be sent is an error that stays: closing the stream then raises and shows nothing.
            for start in range(0, len(whole), UPLOADED_AT_ONCE):
                stream.write(whole[start : start + UPLOADED_AT_ONCE])

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Write the file; see :meth:`write_bytes`."""
        self.write_bytes(text.encode(encoding))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with its first file."""

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            with self._told():
                self._system.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove everything in the folder."""
        with self._told():
            self._system.delete_dir(self.key)

    @property
    def _identity(self) -> tuple[str, tuple[str, ...], str]:
        return self.scheme, self.parts, self.settings

    @property
    def _system(self) -> Any:
        return _file_system(self.scheme, self.bucket, self.settings)

    def _at(self, key: str) -> RemotePath:
        return RemotePath(self.scheme, key, self.settings, self.listing)

    def _below(self, *, recursive: bool) -> dict[str, Status | None]:
        from pyarrow.fs import FileSelector

        with self._told():
            selector = FileSelector(self.key, allow_not_found=True, recursive=recursive)
            found = self._system.get_file_info(selector)
        return {item.path: Status(item.size, item.mtime_ns) if item.is_file else None for item in found}

    def _kind(self) -> str | None:
        """``file``, ``folder`` or None."""
        if self.listing is not None:
            if self.key in self.listing:
                return "folder" if self.listing[self.key] is None else "file"
            return "folder" if any(key.startswith(f"{self.key}/") for key in self.listing) else None
        from pyarrow.fs import FileType

        with self._told():
            found = self._system.get_file_info(self.key).type
        return {FileType.File: "file", FileType.Directory: "folder"}.get(found)

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "there is no such file", str(self))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn a file system's error into a sentence."""
        try:
            yield
        except FileNotFoundError as error:
            raise self._missing() from error
        except OSError as error:
            said = str(error).strip().splitlines()[0]
            cause = next((text for name, text in CAUSES.items() if name in said), said)
            raise StorageError(f"{self}: {cause.format(bucket=self.bucket) if cause != said else said}") from error


Place: TypeAlias = Path | RemotePath


def is_remote(text: str) -> bool:
    """Whether a string names a place in an object store."""
    return "://" in text and not text.startswith("file://")


def place(text: str | Place) -> Place:
    """What a string names: a path of this machine, as it is (``file://`` is one, too), or an address of a store.

    Raises:
        RunError: the address has a scheme or a setting that is not known, no bucket, or credentials in it. The message
            does not repeat what might be secret.
    """
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme == "file":
        return Path(unquote(rest))
    if scheme not in SETTINGS:
        raise RunError(
            f"{scheme}://… is no address that can be read and written; give a folder, also one of NFS, or "
            f"{' or '.join(f'{known}://bucket/folder' for known in SETTINGS)}"
        )
    rest, _, settings = rest.partition("?")
    host, slash, path = rest.partition("/")
    if "@" in host:
        raise RunError(
            f"{scheme}://…@{host.rpartition('@')[2]}{slash}{path} holds credentials, and an address is written to "
            "config.toml and to logs; leave them out: every node finds its own, in the environment (AWS_ACCESS_KEY_ID, "
            "GOOGLE_APPLICATION_CREDENTIALS), in a file of its user or by its role"
        )
    unknown = sorted({name for name, _ in parse_qsl(settings, keep_blank_values=True)} - SETTINGS[scheme])
    if unknown:
        raise RunError(
            f"{scheme}://{rest}?{unknown[0]}=… has a setting that is not known; known are "
            f"{', '.join(sorted(SETTINGS[scheme]))}"
        )
    key = "/".join(part for part in unquote(rest).split("/") if part not in ("", "."))
    if not host:
        raise RunError(f"{text} names no bucket; give {scheme}://bucket/folder")
    return RemotePath(scheme, key, settings)


def local(text: str, what: str, why: str) -> Path:
    """A place that has to be on this machine.

    Args:
        text: as the user gave it.
        what: the option, ``--out`` for example.
        why: a clause that says what needs it.

    Raises:
        RunError: it is the address of a store.
    """
    if is_remote(text):
        raise RunError(f"{what} is {text.partition('://')[0]}://…, and {why}; give a folder of this machine, or of NFS")
    found = place(text)
    assert isinstance(found, Path)
    return found


def listed(folder: Place) -> Place:
    """The same folder, having looked once at all that lies in it.

    Paths made from it then know whether they are there: thousands of images cost some requests and not one each.
    """
    if isinstance(folder, Path):
        return folder
    found = folder._below(recursive=True)
    return RemotePath(folder.scheme, folder.key, folder.settings, found)


def matching(folder: Place, pattern: str) -> list[Place]:
    """What lies below a folder and matches, sorted."""
    found: list[Place] = [*folder.glob(pattern)]
    return sorted(found, key=lambda item: item.parts)


def readable(path: str | Place) -> Any:
    """What Pillow, NumPy, torch and pyarrow read a whole file from: the path, or the bytes of a remote one."""
    found = path if isinstance(path, RemotePath) else place(path) if is_remote(str(path)) else path
    return io.BytesIO(found.read_bytes()) if isinstance(found, RemotePath) else found


@contextmanager
def whole(path: Place, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that appears when the block ends well, or not at all; one of that name stays until then.

    A remote one waits in memory: a stream cannot be taken back, and would show what was written until it failed.

    Args:
        path: in a folder that is there.
        durable: whether the disk shall have it before it appears.

    Raises:
        OSError: the disk is full, or the store cannot be written.
    """
    if isinstance(path, RemotePath):
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getbuffer())
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Place, content: str | bytes) -> None:
    """Write a file that appears complete or not at all; see :func:`whole`."""
    with whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def remove_tree(folder: Place) -> None:
    """Remove a folder and all that is in it, as far as that can be done."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        folder.remove_tree()


class Statuses:
    """Size and time of files, for keys of caches.

    A remote folder is looked into once, by every process: an image whose object is replaced while a process lives keeps
    its old key there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folders: dict[RemotePath, Mapping[str, Status | None]] = {}

    def of(self, path: str) -> os.stat_result | Status:
        """Of a file.

        Raises:
            OSError: there is none, or it cannot be asked for.
        """
        if not is_remote(path):
            return os.stat(path)
        found = place(path)
        assert isinstance(found, RemotePath)
        folder = found.parent
        with self._lock:
            if folder not in self._folders:
                self._folders[folder] = folder._below(recursive=False)
            status = self._folders[folder].get(found.key)
        if status is None:
            raise found._missing()
        return status


status_of = Statuses().of

Result = TypeVar("Result")


def tried(what: str, work: Callable[[], Result]) -> Result:
    """The result of some work; a store that refuses or cannot be reached ends the run with one sentence.

    Args:
        what: that is wanted, for example ``the run directory cannot be used``.
        work: called once.

    Raises:
        RunError: the store said no.
    """
    try:
        return work()
    except StorageError as error:
        raise RunError(f"{what}: {error}") from error


@functools.lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, settings: str) -> Any:
    from pyarrow.fs import FileSystem  # costs the first import of it, which a run on this machine does without

    system, _ = FileSystem.from_uri(f"{scheme}://{bucket}{'?' if settings else ''}{settings}")
    return system
