"""Refuse a value that an options class does not list, wherever it comes from."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from actors.errors import RunError


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
