"""The errors that end a run with one sentence instead of a traceback, and the one that never ends it."""

from __future__ import annotations


class RunError(Exception):
    """Something the user gave cannot work; the message says what, why, and what to change.

    ``run.py`` prints the message and exits with code 2.
    """


class UnreadableImage(ValueError):  # noqa: N818 - named for what it is: a fact about a file, counted, not a failure
    """One file cannot be decoded; the message names it and the cause. Streams and teachers skip and count it."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(path, cause)
        self.path = path.encode("utf-8", "backslashreplace").decode()  # can be printed and stored, whatever its bytes
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.cause}"


def last_line(error: BaseException) -> str:
    """The sentence of an error: a RunError's own, else the last line of what Ray wrapped round it."""
    cause = getattr(error, "cause", None)
    lines = str(cause if isinstance(cause, RunError) else error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
