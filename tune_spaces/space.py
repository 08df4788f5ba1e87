"""A search space: options of a run and the values that a sweep may give them, as a TOML file says.

Every table whose header is the name of an option, as in ``config.toml``, is a parameter; ``eplc.toml`` explains what
stands in it.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import sys
import types
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from actors.errors import RunError
from pipelines.choices import decided
from pipelines.options import GROUPS, RECIPE_OPTIONS, AdaptOptions, DataOptions
from pipelines.recipes import recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value = str | int | float | bool | None
Point = dict[str, Value]
"""Values by the dotted names of their options."""

KEYS = {"values", "low", "high", "step", "log", "published"}
NONE = "none"
"""How TOML, which has no word for it, spells None."""
FIXED = {item.name for item in dataclasses.fields(DataOptions)} | {
    *GROUPS,
    *(
        "recipe",
        "faithful",
        "seed",
        "steps",
        "init",
        "from_stage",
        "to_stage",
        "held_out",
        "pseudo_labels",
        "target_labels",
    ),
    *("students", "teachers", "threads", "references", "name", "runs", "cache", "address", "dashboard"),
}
"""Options that all trials share: which data, where things stand, and what decides how many trials fit at a time."""


@dataclass(frozen=True)
class Parameter:
    """An option and the values that it may take: a list, or a range.

    Attributes:
        name: dotted name of the option.
        values: of a list; empty for a range.
        low, high: ends of a range, both included.
        step: between two values of a range; None for any.
        log: whether a range is searched by factors.
        published: a value that is always tried; ``...`` where the recipe's default is.
        whole: whether the values of a range are whole numbers.
    """

    name: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    published: Any = ...
    whole: bool = False

    def grid(self) -> list[Value]:
        """Its values for a grid search; of a range without steps the ends and the middle."""
        if self.values:
            return list(self.values)
        if self.step is not None:
            count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
            return [self._number(self.low + k * self.step) for k in range(count)]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [self._number(self.low), self._number(middle), self._number(self.high)]

    def distribution(self) -> BaseDistribution:
        """For Optuna."""
        if self.values:
            return CategoricalDistribution(self.values)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def nearest(self, value: Value) -> Value:
        """A value itself, or what stands for one that lies outside."""
        if self.contains(value):
            return value
        if self.values or not isinstance(value, int | float):
            return self.grid()[0]
        return self._number(min(max(value, self.low), self.high))

    def contains(self, value: Value) -> bool:
        """Whether a search may draw a value."""
        if self.values:
            return value in self.values
        return isinstance(value, int | float) and self.low <= value <= self.high

    def examples(self) -> list[Value]:
        """Values that stand for all when it is checked that the option takes them."""
        numbers = list(self.values) or [self._number(self.low), self._number(self.high)]
        return numbers if self.published is ... else [*numbers, self.published]

    def _number(self, value: float) -> Value:
        return round(value) if self.whole else float(f"{value:.6g}")


@dataclass(frozen=True)
class Space:
    """Parameters, by whose names a point gives values, and the file that says so."""

    parameters: tuple[Parameter, ...]
    path: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    def only(self, names: tuple[str, ...]) -> Space:
        """The same space with some of its parameters; all where no name is given.

        Raises:
            RunError: it has no parameter of such a name.
        """
        wanted = [name.replace("-", "_") for name in names]
        for name in wanted:
            if name not in self.names:
                raise RunError(f"{self.path} has no parameter {name!r}; it has {', '.join(self.names)}")
        return dataclasses.replace(self, parameters=tuple(p for p in self.parameters if not names or p.name in wanted))

    def first_points(self, options: AdaptOptions) -> list[Point]:
        """What is tried before anything else: the published values, then, if the space has them, a plain run's."""
        default = {name: value_of(options, name) for name in self.names}
        published = {p.name: p.nearest(default[p.name]) if p.published is ... else p.published for p in self.parameters}
        fits = all(p.contains(default[p.name]) for p in self.parameters)
        return [published, default] if fits and default != published else [published]

    def grid(self, options: AdaptOptions) -> list[Point]:
        """Every combination, the last parameter changing fastest, after :meth:`first_points`."""
        first = self.first_points(options)
        every = itertools.product(*(parameter.grid() for parameter in self.parameters))
        points = (dict(zip(self.names, values, strict=True)) for values in every)
        return [*first, *(point for point in points if point not in first)]

    def combinations(self) -> int:
        """How many there are of them, without building any."""
        return math.prod(len(parameter.grid()) for parameter in self.parameters)


def shipped(recipe_name: str) -> Path:
    """The file of a recipe's own space.

    Raises:
        RunError: there is no such recipe, or none is shipped for it.
    """
    path = Path(str(resources.files(__package__).joinpath(f"{recipe(recipe_name).name}.toml")))
    if not path.is_file():
        raise RunError(f"no search space comes with recipe {recipe_name}; give one of your own with --space FILE")
    return path


def read_space(path: str | Path) -> Space:
    """Read a space; whether a run has its options, :func:`check_space` tells.

    Raises:
        RunError: there is no such file, or something in it is no parameter; says what and what to write.
    """
    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"the search space {path} cannot be read: {error}") from error
    return parse_space(plain, str(path))


def parse_space(plain: dict[str, Any], path: str) -> Space:
    """A space from the tables of its file; see :func:`read_space`."""
    parameters = tuple(_parameter(name, table, path) for name, table in _tables(plain, path))
    if not parameters:
        raise RunError(f"{path} names no parameter; write for example [rate_scale], and low = 0.3, high = 3.0 below it")
    return Space(parameters, path)


def _tables(plain: dict[str, Any], path: str, prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for key, value in plain.items():
        name = f"{prefix}{key}".replace("-", "_")
        if not isinstance(value, dict):
            raise RunError(
                f"{path}: {name} = {value!r} gives no values to search; write [{name}] and below it values = [...], "
                "or low and high. An option that every trial shall have goes on the command line."
            )
        inner = [item for item in value.values() if isinstance(item, dict)]
        if inner and len(inner) == len(value) and not prefix:
            found += _tables(value, path, f"{name}.")
        else:
            found.append((name, value))
    return found


def _parameter(name: str, table: dict[str, Any], path: str) -> Parameter:
    def wrong(what: str) -> RunError:
        return RunError(f"{path}: [{name}] {what}")

    unknown = sorted(set(table) - KEYS)
    if unknown:
        raise wrong(f"has the unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    optional = _takes_none(name)
    published = _value(table["published"], optional) if "published" in table else ...
    if "values" in table:
        values = table["values"]
        if set(table) & {"low", "high", "step", "log"}:
            raise wrong("has values and a range; leave one of them out")
        if not isinstance(values, list) or not values:
            raise wrong(f"has values = {values!r}; give a list of at least one")
        listed = tuple(_value(value, optional) for value in values)
        if not all(value is None or isinstance(value, str | int | float | bool) for value in listed):
            raise wrong("has a value that is no number, word or truth value")
        if published is not ... and published not in listed:
            listed = (*listed, published)
        return Parameter(name, listed, published=published)
    if not {"low", "high"} <= set(table):
        raise wrong("needs values = [...], or low and high")
    low, high, step, log = table["low"], table["high"], table.get("step"), table.get("log", False)
    for key, value in (("low", low), ("high", high), ("step", step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise wrong(f"has {key} = {value!r}, which is no number")
    if not isinstance(log, bool):
        raise wrong(f"has log = {log!r}; give true or false")
    if not low < high:
        raise wrong(f"goes from {low} to {high}; low must be less than high")
    if log and (low <= 0 or step is not None):
        raise wrong("is searched by factors, so low must be above 0, and step left out")
    if step is not None and not 0 < step <= high - low:
        raise wrong(f"has step = {step}, which does not fit between {low} and {high}")
    if published is not ... and not (isinstance(published, int | float) and low <= published <= high):
        raise wrong(f"has published = {published!r}, which is not between {low} and {high}")
    if step is not None:  # a range that its steps do not end on would be cut by Optuna, with a warning
        high = low + math.floor((high - low) / step + 1e-9) * step
    whole = all(isinstance(value, int) for value in (low, high, step) if value is not None)
    return Parameter(name, (), low, high, step, log, published, whole)


def _value(value: Any, optional: bool) -> Any:
    """What a value in a file stands for; ``none`` may also be a word that an option lists."""
    return None if value == NONE and optional else value


def _takes_none(name: str) -> bool:
    group, _, field = name.rpartition(".")
    kind = get_type_hints(GROUPS.get(group, AdaptOptions)).get(field)
    return type(None) in get_args(kind)


def check_space(space: Space, options: AdaptOptions) -> None:
    """Refuse a space that does not fit the options of a run, before anything starts.

    Raises:
        RunError: an option that the recipe does not have, that trials share, or that does not take such a value.
    """
    allowed = searchable(options)
    for parameter in space.parameters:
        name = parameter.name
        if name not in allowed:
            raise RunError(f"{space.path}: {_why_not(name, allowed, options)}")
        kind = allowed[name]
        whole = parameter.whole and not parameter.values
        for value in parameter.examples():
            if not _fits(value, kind):
                what = "whole numbers" if kind is int else str(kind).replace("typing.", "")
                raise RunError(f"{space.path}: [{name}] would be {value!r}, but {name} takes {what}")
            try:
                with_point(options, {name: value})
            except RunError as error:
                raise RunError(f"{space.path}: [{name}] would be {value!r}: {error}") from error
        if not parameter.values and not whole and not _fits(0.5, kind):
            raise RunError(f"{space.path}: [{name}] takes whole numbers; write low, high and step without a point")


def fitting(space: Space, options: AdaptOptions) -> tuple[Space, list[str]]:
    """What of a recipe's own space goes with the options of a run, and why the rest does not."""
    kept, why = [], []
    for parameter in space.parameters:
        try:
            check_space(dataclasses.replace(space, parameters=(parameter,)), options)
            kept.append(parameter)
        except RunError as error:
            why.append(str(error).removeprefix(f"{space.path}: "))
    return dataclasses.replace(space, parameters=tuple(kept)), why


def searchable(options: AdaptOptions) -> dict[str, Any]:
    """Names and types of the options that a sweep may search with these options."""
    found = {name: kind for name, kind in get_type_hints(AdaptOptions).items() if name not in FIXED}
    before = recipe(options.recipe).begins_with
    groups = set() if options.to_stage is not None and options.to_stage <= len(before) else {options.recipe}
    if options.from_stage == 1:
        groups |= set(before)
    groups |= set(GROUPS) - set(RECIPE_OPTIONS)  # those of every recipe
    for group in sorted(groups & set(GROUPS)):
        hints = get_type_hints(GROUPS[group])
        for item in dataclasses.fields(GROUPS[group]):
            found[f"{group}.{item.name}"] = hints[item.name]
    return found


def _why_not(name: str, allowed: dict[str, Any], options: AdaptOptions) -> str:
    if name in FIXED:
        return f"[{name}] is the same in all trials of a sweep; give it on the command line"
    if name.split(".")[0] in recipe(options.recipe).begins_with and options.from_stage > 1:
        return (
            f"[{name}] decides a stage that all trials share; leave it out, or let every trial train all stages: "
            "--from-stage 1"
        )
    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    same = [known for known in allowed if known.split(".")[-1] == name.split(".")[-1]]
    meant = list(dict.fromkeys([*same, *close]))
    hint = f"; did you mean {' or '.join(meant)}?" if meant else f"; it has {', '.join(sorted(allowed))}"
    return f"recipe {options.recipe} has no option {name!r}{hint}"


def _fits(value: Value, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if kind is type(None) else isinstance(value, kind)


def value_of(options: AdaptOptions, name: str) -> Value:
    """The value of an option by its dotted name, decided where the user left it open."""
    group, _, field = name.rpartition(".")
    value: Value = getattr(decided(getattr(options, group) if group else options, options.faithful), field)
    return value


def with_point(options: AdaptOptions, point: Point) -> AdaptOptions:
    """The options with the values of a point.

    Raises:
        RunError: they cannot go together.
    """
    groups: dict[str, Point] = {}
    for name, value in point.items():
        group, _, field = name.rpartition(".")
        groups.setdefault(group, {})[field] = value
    own: dict[str, Any] = groups.pop("", {})
    for group, values in groups.items():
        own[group] = dataclasses.replace(getattr(options, group), **values)
    return dataclasses.replace(options, **own)
