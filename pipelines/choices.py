"""Values of options: refused where a class does not list them, decided where a user left them open."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from actors.errors import RunError


class Open(Protocol):
    """A dataclass some of whose fields a user may leave open: None or ``auto``."""

    @property
    def OPEN(self) -> dict[str, tuple[Any, Any]]:  # noqa: N802
        """What each of them stands for: in our default, and in the published system."""
        ...

    __dataclass_fields__: ClassVar[dict[str, Any]]


Options = TypeVar("Options", bound=Open)


def decided(options: Options, faithful: bool) -> Options:
    """The same options with every open field decided: as published, or as we hold better."""
    left = {name: values for name, values in options.OPEN.items() if getattr(options, name) in (None, "auto")}
    return dataclasses.replace(options, **{name: values[faithful] for name, values in left.items()})


def check_choices(options: Any) -> None:
    """Check every ``Literal`` field of a dataclass instance.

    The command line checks them itself; a ``config.toml`` that somebody edited comes in without.

    Raises:
        RunError: a field has a value that its type does not list.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        given, hint = getattr(options, field.name), hints[field.name]
        if get_origin(hint) is Literal and given not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise RunError(f"{field.name} is {given!r}; choose one of {allowed}")
