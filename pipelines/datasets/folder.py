"""Your own images: a short TOML file that says where they are, and what the numbers in the label files mean.

::

    images = "photos/*.jpg"         # relative to this file, or an s3:// address; ** means any folders in between
    labels = "masks/*.png"          # what the stars stand for pairs a label with its image; leave out without labels
    classes = ["water", "boat"]     # ids 0 and 1; or, with ids and colours of your own:

    [[classes]]
    name = "water"
    ids = [3, 4]
    colour = "#1f77b4"

``encoding = "colours"`` reads label files painted in the classes' colours. ``ignore`` lists what is never learned or
scored (default 255). A target file without labels needs no classes.
"""

from __future__ import annotations

import colorsys
import os
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.errors import RunError
from actors.storage import Place, RemotePath, StorageError, is_remote, listed, place
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.datasets.dataset import DataError, LabelEncoding, Split

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Colour = tuple[int, int, int]
MAX_CLASSES = 255
KEYS = {"name", "images", "labels", "classes", "encoding", "ignore"}
CLASS_KEYS = {"name", "ids", "colour"}


@dataclass(frozen=True)
class Folder:
    """A dataset as its TOML file describes it; nothing has been opened but the folders' listings."""

    path: Place
    name: str
    classes: ClassSet | None
    """None where the file names no classes."""
    encoding: LabelEncoding | None
    """Of its label files; None where the file names no classes."""
    images: Split
    """All images, without labels."""
    labelled: Split | None
    """Those images that have a label; None where the file names no labels."""
    unlabelled: tuple[str, ...]
    """Images for which the label pattern finds no file; empty where the file names no labels."""


def read_folder(path: str | Place, *, source: Folder | None = None) -> Folder:
    """Open the dataset that a TOML file describes.

    Args:
        path: the TOML file.
        source: the source domain, for a target file. Its classes are the target's; a target that lists them itself
            may do so in another order and with other ids, one that does not has label files like the source's.

    Raises:
        DataError: the file is missing, no TOML, has an unknown or missing key, names no images, or has classes that
            cannot be told apart; in a sentence that names the file and what to write. Or the store that they are in
            cannot be reached.
    """
    try:
        return _read(place(path), source)
    except StorageError as error:
        raise DataError(f"{path}: the images cannot be listed: {error}") from error


def _read(path: Place, source: Folder | None) -> Folder:
    plain = _parse(path)
    name = _text(path, plain, "name") or path.stem
    images = _matches(path, _required(path, plain, "images"), "images")
    if not images:
        raise DataError(f"{path}: no file matches images = {plain['images']!r} in {path.absolute().parent}")
    own, encoding = _classes(path, name, plain)
    if source is not None and source.classes is not None:
        encoding = source.encoding if encoding is None else _in_order_of(path, own, encoding, source.classes)
        own = source.classes
    keys = sorted(images)
    ids = tuple(_image_id(path, images[key]) for key in keys)
    split = Split(name, ids, tuple(str(images[key]) for key in keys))
    labels = _labels(path, plain, name)
    if labels is None:
        return Folder(path, name, own, encoding, split, None, ())
    if encoding is None:
        raise DataError(f'{path}: it names labels but no classes; add classes = ["…", "…"]')
    _refuse_same_files(path, images, labels)
    known = [i for i, key in enumerate(keys) if key in labels]
    if not known:
        example = _image_id(path, images[keys[0]])
        raise DataError(
            f"{path}: none of the {len(keys)} images has a label: what the stars of images = {plain['images']!r} stand "
            f"for must be the same in labels = {plain['labels']!r}; the first image is {example}"
        )
    labelled = Split(
        name,
        tuple(ids[i] for i in known),
        tuple(split.image_paths[i] for i in known),
        tuple(str(labels[keys[i]]) for i in known),
        encoding,
    )
    missing = tuple(split.image_paths[i] for i, key in enumerate(keys) if key not in labels)
    return Folder(path, name, own, encoding, split, labelled, missing)


def default_colours(count: int) -> tuple[Colour, ...]:
    """Colours for classes that name none: hues a golden angle apart, in three rounds of lightness."""
    colours = []
    for index in range(count):
        lightness = (0.45, 0.65, 0.3)[index // 12 % 3]
        red, green, blue = colorsys.hls_to_rgb(index * 0.381966 % 1.0, lightness, 0.65)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return tuple(colours)


def _parse(path: Place) -> dict[str, Any]:
    try:
        if not path.is_file():
            state = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(f'{path} {state}; give a TOML file with at least images = "photos/*.jpg"')
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is no TOML file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    unknown = sorted(set(plain) - KEYS)
    if unknown:
        raise DataError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    return plain


def _text(path: Place, plain: dict[str, Any], key: str) -> str | None:
    value = plain.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise DataError(f"{path}: {key} is {value!r}; give a text")
    return value


def _required(path: Place, plain: dict[str, Any], key: str) -> str:
    value = _text(path, plain, key)
    if value is None:
        raise DataError(f'{path}: the key {key} is missing; write for example {key} = "photos/*.jpg"')
    return value


def _image_id(path: Place, image: Place) -> str:
    """The image's path as seen from the TOML file: the same wherever the folder is moved to.

    Where only one of them is in a store, the whole path.
    """
    if isinstance(image, RemotePath):
        if isinstance(path, RemotePath) and path.bucket == image.bucket:
            return posixpath.relpath(image.key, path.parent.key)
        return image.key
    if isinstance(path, RemotePath):
        return image.as_posix()
    name = os.path.relpath(image, path.absolute().parent).replace(os.sep, "/")
    return name.encode("utf-8", "backslashreplace").decode()


def _labels(path: Place, plain: dict[str, Any], name: str) -> dict[tuple[str, ...], Place] | None:
    pattern = _text(path, plain, "labels")
    if pattern is None:
        return None
    stars, wanted = _stars(pattern), _stars(plain["images"])
    if stars != wanted:
        raise DataError(
            f"{path}: images = {plain['images']!r} has {wanted} stars and labels = {pattern!r} has {stars}; "
            "what a star stands for pairs a label with its image, so both need the same number"
        )
    labels = _matches(path, pattern, "labels")
    if not labels:
        raise DataError(f"{path}: no file matches labels = {pattern!r} in {path.absolute().parent}")
    return labels


def _stars(pattern: str) -> int:
    return len(re.findall(r"\*+", pattern))


def _matches(path: Place, pattern: str, key: str) -> dict[tuple[str, ...], Place]:
    """Files that match a pattern, by what its stars stand for."""
    root = _from(path.absolute().parent, pattern)
    parts = root.parts
    fixed = next((i for i, part in enumerate(parts) if "*" in part), None)
    if fixed is None:
        raise DataError(
            f"{path}: {key} = {pattern!r} names a single file; use * or **, the only wildcards, for example "
            f'"{pattern}/*.png"'
        )
    if isinstance(root, RemotePath) and not fixed:
        raise DataError(f"{path}: {key} = {pattern!r} has a star for its bucket; name one")
    expression = re.compile(_regular_expression("/".join(parts[fixed:])))
    found: dict[tuple[str, ...], Place] = {}
    if isinstance(root, RemotePath):
        base = listed(replace(root, key="/".join(parts[:fixed])))
        assert isinstance(base, RemotePath)
        if not base.is_dir():
            raise DataError(f"{path}: {key} = {pattern!r}, but there is nothing in {base}")
        candidates: Iterable[tuple[str, Place]] = (
            (file.key.removeprefix(f"{base.key}/"), file) for file in base.files()
        )
    else:
        folder = Path(*parts[:fixed])
        if not folder.is_dir():
            raise DataError(f"{path}: {key} = {pattern!r}, but the folder {folder} does not exist")
        deepest = None if "**" in pattern else len(parts) - fixed - 1
        candidates = ((file.relative_to(folder).as_posix(), file) for file in _files(folder, deepest))
    for name, file in candidates:
        match = expression.fullmatch(name)
        if match is not None:
            found[tuple(group or "" for group in match.groups())] = file
    return found


def _from(folder: Place, pattern: str) -> Place:
    """A pattern as it is meant in the folder of its TOML file."""
    try:
        if is_remote(pattern):
            return place(pattern)
    except RunError as error:
        raise DataError(str(error)) from error
    if isinstance(folder, RemotePath) and not os.path.isabs(pattern):
        return replace(folder, key=posixpath.normpath(f"/{folder.key}/{pattern}").lstrip("/"))
    return Path(os.path.normpath(pattern if isinstance(folder, RemotePath) else folder / pattern))


def _files(base: Path, deepest: int | None) -> Iterator[Path]:
    """All files of a folder, and of those in it down to a depth; links are followed."""
    for here, folders, files in os.walk(base, followlinks=True):
        ancestors = (folder for folder in (Path(here), *Path(here).parents) if folder.is_relative_to(base))
        above = {os.path.realpath(folder) for folder in ancestors}
        # A link may lead back to where it was reached from.
        folders[:] = sorted(folder for folder in folders if os.path.realpath(os.path.join(here, folder)) not in above)
        yield from (Path(here) / file for file in sorted(files))
        if deepest is not None and len(Path(here).relative_to(base).parts) >= deepest:
            folders.clear()


def _regular_expression(pattern: str) -> str:
    """A glob as a regular expression; every star becomes a group."""
    pieces = re.split(r"(\*\*/|\*+)", pattern)
    known = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)"}
    return "".join(known.get(piece, "(.*)") if "*" in piece else re.escape(piece) for piece in pieces)


def _refuse_same_files(path: Place, images: dict[Any, Place], labels: dict[Any, Place]) -> None:
    both = set(images.values()) & set(labels.values())
    if both:
        raise DataError(
            f"{path}: {min(both).name} matches both images and labels; make one of the patterns narrower, for example "
            'images = "photos/*.jpg"'
        )


def _classes(path: Place, name: str, plain: dict[str, Any]) -> tuple[ClassSet | None, LabelEncoding | None]:
    """The classes, and how label files become train ids."""
    encoding = plain.get("encoding", "ids")
    if encoding not in ("ids", "colours"):
        raise DataError(f'{path}: encoding is {encoding!r}; write "ids" or "colours"')
    entries = plain.get("classes")
    if entries is None:
        if odd := sorted({"encoding", "ignore"} & set(plain)):
            raise DataError(f"{path}: {odd[0]} says how classes are stored, but there are no classes; list them, too")
        return None, None
    if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
        raise DataError(f"{path}: classes must be a list of names, or [[classes]] tables with name, ids and colour")
    if not 2 <= len(entries) <= MAX_CLASSES:
        raise DataError(f"{path}: {len(entries)} classes; from 2 to {MAX_CLASSES} can be told apart")
    tables = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    palette = list(default_colours(len(tables)))
    names: list[str] = []
    mapping: dict[int, int] = {}
    owners: dict[int, str] = {}
    for index, table in enumerate(tables):
        unknown = sorted(set(table) - CLASS_KEYS)
        if unknown:
            raise DataError(f"{path}: class {index}: unknown key {unknown[0]!r}; known are name, ids, colour")
        title = table.get("name")
        if not isinstance(title, str) or not title or title in names:
            raise DataError(f"{path}: class {index} is called {title!r}; every class needs a name of its own")
        names.append(title)
        if "colour" in table:
            palette[index] = _colour(path, table["colour"], title)
        elif encoding == "colours":
            raise DataError(f'{path}: class {title!r} has no colour, and encoding = "colours" goes by colour; give one')
        for raw in _class_ids(path, table, index, encoding, palette[index]):
            if raw in owners:
                shown = f"colour #{raw:06x}" if encoding == "colours" else f"id {raw}"
                raise DataError(f"{path}: {shown} belongs to {owners[raw]!r} and to {title!r}; a pixel has one class")
            owners[raw], mapping[raw] = title, index
    for raw in _ignored(path, plain, encoding, owners):
        mapping[raw] = IGNORE
    channel: Any = "colour" if encoding == "colours" else "number"
    return ClassSet(name, tuple(names), tuple(palette)), LabelEncoding.of(name, channel, mapping, complete=True)


def _class_ids(path: Place, table: dict[str, Any], index: int, encoding: str, colour: Colour) -> list[int]:
    if encoding == "colours":
        if "ids" in table:
            raise DataError(f'{path}: class {table["name"]!r} has ids, but encoding = "colours" goes by colour')
        return [colour[0] << 16 | colour[1] << 8 | colour[2]]
    ids = table.get("ids", [index])
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(raw) is int and 0 <= raw <= 65535 for raw in ids):
        raise DataError(f"{path}: ids of class {table['name']!r} are {ids!r}; give whole numbers from 0 to 65535")
    return ids


def _ignored(path: Place, plain: dict[str, Any], encoding: str, owners: dict[int, str]) -> list[int]:
    given = plain.get("ignore")
    if given is None:
        return [] if encoding == "colours" or IGNORE in owners else [IGNORE]
    raw_ids = []
    for item in given if isinstance(given, list) and (encoding == "ids" or not _is_triple(given)) else [given]:
        if encoding == "colours":
            red, green, blue = _colour(path, item, "ignore")
            raw_ids.append(red << 16 | green << 8 | blue)
        elif type(item) is int and 0 <= item <= 65535:
            raw_ids.append(item)
        else:
            raise DataError(f"{path}: ignore is {item!r}; give an id from 0 to 65535, or a list of them")
    for raw in raw_ids:
        if raw in owners:
            raise DataError(f"{path}: ignore names {raw}, which belongs to class {owners[raw]!r}; take it out of one")
    return raw_ids


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int for part in value)


def _colour(path: Place, value: Any, title: str) -> Colour:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if _is_triple(value) and all(0 <= part <= 255 for part in value):
        return value[0], value[1], value[2]
    raise DataError(f'{path}: colour of {title!r} is {value!r}; write "#1f77b4" or [31, 119, 180]')


def _in_order_of(path: Place, own: ClassSet | None, encoding: LabelEncoding, classes: ClassSet) -> LabelEncoding:
    """A target's encoding in the source's train ids."""
    names = own.names if own is not None else ()
    if set(names) != set(classes.names):
        odd = sorted(set(names) ^ set(classes.names))
        raise DataError(
            f"{path}: its classes are {', '.join(names)}, those of the source {', '.join(classes.names)} "
            f"({odd[0]!r} is only in one of them); both domains need the same classes"
        )
    order = {index: classes.index(name) for index, name in enumerate(names)}
    mapping = {
        raw: order.get(train_id, IGNORE) for raw, train_id in zip(encoding.raw_ids, encoding.train_ids, strict=True)
    }
    return LabelEncoding.of(encoding.name, encoding.channel, mapping, complete=True)
