"""Class frequencies of a source and a target as files: published tables, which are shipped, and a user's own.

::

    classes = ["road", "car", "person"]     # those of the run, in any order
    source = [90, 9, 1]                     # in the order of the classes; shares or counts of any kind
    target = [60, 25, 15]
    method = "counts"                       # optional, how they were found
    about = "counted by hand"               # optional, where they come from

The shipped tables also have ``source_pixels``, the source's shares of pixels. No torch here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from actors.errors import RunError
from actors.storage import Place, place, write_whole
from models.priors import log_ratio, shares

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUIRED = ("classes", "source", "target")
KEYS = {*REQUIRED, "source_pixels", "method", "about"}


@dataclass(frozen=True)
class Prior:
    """How frequent classes are on source and target.

    Attributes:
        classes: names.
        source, target: shares in their order, summing to 1 each. A class may have none on both.
        method: how they were found, in a word.
        about: where they come from.
    """

    classes: tuple[str, ...]
    source: tuple[float, ...]
    target: tuple[float, ...]
    method: str = ""
    about: str = ""

    @property
    def offset(self) -> np.ndarray:
        """The offset of scores, ln π_T - ln π_S (methods §7.4), float64 C; 0 for a class that neither has."""
        source, target = np.array(self.source), np.array(self.target)
        found = np.zeros(len(source))
        known = (source != 0) | (target != 0)
        found[known] = log_ratio(target[known], source[known])
        return found


def published_names() -> tuple[str, ...]:
    """Names of the shipped tables."""
    return tuple(sorted(path.stem for path in _tables().glob("*.toml")))


def published_pixel_shares(name: str) -> np.ndarray:
    """ρ, shares of the source's pixels in the order of a shipped table's classes, float64 C (methods §7.3).

    Raises:
        RunError: no table has that name.
    """
    if name not in published_names():
        raise RunError(f"there is no published table {name}; there are {', '.join(published_names())}")
    return np.array(_plain(_tables() / f"{name}.toml")["source_pixels"], np.float64)


def read_prior(path_or_name: str | Place, class_names: Sequence[str]) -> Prior:
    """Read the class frequencies for a run.

    Args:
        path_or_name: a TOML file, or the name of a shipped table.
        class_names: of the run, whose order the result has.

    Raises:
        RunError: there is no such file or table, something in it is missing or no frequency, or its classes are not
            the run's; in a sentence that says what to write.
    """
    name = str(path_or_name)
    path = _tables() / f"{name}.toml" if name in published_names() else place(name)
    plain = _plain(path)
    classes = _classes(path, plain["classes"])
    wanted = tuple(class_names)
    if set(classes) != set(wanted):
        more, less = [c for c in classes if c not in wanted], [c for c in wanted if c not in classes]
        differences = [f"it does not have {', '.join(less)}"] if less else []
        differences += [f"the run does not have {', '.join(more)}"] if more else []
        raise RunError(
            f"the classes of {name} are not those of the run: {'; '.join(differences)}. List the run's own, all of them"
        )
    order = [classes.index(c) for c in wanted]
    source, target = (_shares(path, plain, key, len(classes))[order] for key in ("source", "target"))
    alone = [c for c, s, t in zip(wanted, source, target, strict=True) if (s == 0) != (t == 0)]
    if alone:
        raise RunError(
            f"{path}: {', '.join(alone)} has a share on one side and none on the other, so there is no ratio to adjust "
            "scores by; give it a small share instead, a hundredth of the other side's, say, or none on both"
        )
    return Prior(
        wanted,
        tuple(source.tolist()),
        tuple(target.tolist()),
        _text(path, plain, "method"),
        _text(path, plain, "about"),
    )


def write_prior(path: Place, prior: Prior) -> None:
    """Write class frequencies as :func:`read_prior` reads them; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, tomli_w.dumps(asdict(prior)))


def _tables() -> Path:
    return Path(str(resources.files(__package__).joinpath("published_priors")))


def _plain(path: Place) -> dict[str, Any]:
    """The keys of a file, all there and none unknown."""
    try:
        if not path.is_file():
            raise RunError(
                f"there is no file {path} with class frequencies, and no published table of that name; the tables are "
                f"{', '.join(published_names())}"
            )
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RunError(f"{path} is no TOML file: {error}") from error
    unknown = sorted(set(plain) - KEYS)
    if unknown:
        raise RunError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    missing = [key for key in REQUIRED if key not in plain]
    if missing:
        raise RunError(
            f"{path}: the key {missing[0]} is missing; it needs classes = [names], and source and target = [one number "
            "for each of them]"
        )
    return plain


def _classes(path: Place, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise RunError(f"{path}: classes is {value!r}; give a list of names")
    twice = [name for name in value if value.count(name) > 1]
    if twice:
        raise RunError(f"{path}: classes names {twice[0]} twice; name every class once")
    return tuple(value)


def _shares(path: Place, plain: dict[str, Any], key: str, count: int) -> np.ndarray:
    """Shares of a list of shares or counts."""
    value = plain[key]
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers:
        raise RunError(f"{path}: {key} is {value!r}; give a list of numbers, one for each class")
    if len(value) != count:
        raise RunError(f"{path}: {key} has {len(value)} numbers for {count} classes; give one for each")
    try:
        return shares(value)
    except ValueError as error:
        raise RunError(f"{path}: {key} has no class frequencies: {error}") from error


def _text(path: Place, plain: dict[str, Any], key: str) -> str:
    value = plain.get(key, "")
    if not isinstance(value, str):
        raise RunError(f"{path}: {key} is {value!r}; give a text")
    return value
