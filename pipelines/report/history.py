"""``metrics.jsonl`` as curves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from actors.storage import Place

Curve = list[tuple[int, float]]


@dataclass
class History:
    """The lines of a run by kind, in the order of their steps.

    A run that was resumed goes back to its last checkpoint: lines that it wrote after that are overtaken and left out.
    Messages all stay.
    """

    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    messages: list[tuple[int, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Lines of a kind; none is no error."""
        return self.lines.get(kind, [])

    def curve(self, kind: str, name: str) -> Curve:
        """(step, value) of every line of a kind that has a number of that name."""
        values = [(line["step"], line.get(name)) for line in self.of(kind)]
        return [(step, float(value)) for step, value in values if isinstance(value, int | float)]

    def names(self, kind: str, prefix: str) -> list[str]:
        """Names of the numbers of a kind that begin with a prefix, sorted."""
        return sorted({name for line in self.of(kind) for name in line if name.startswith(prefix)})

    def rows(self, kind: str, name: str) -> tuple[list[int], list[list[float | None]]]:
        """Steps, and the list of numbers of that name at each."""
        found = [(line["step"], line[name]) for line in self.of(kind) if isinstance(line.get(name), list)]
        return [step for step, _ in found], [values for _, values in found]

    @property
    def last_step(self) -> int:
        """The last step that trained and was written down; 0 before the first."""
        return max((line["step"] for line in self.of("train")), default=0)

    def stages(self) -> list[tuple[str, int]]:
        """Names of the stages and the step of each one's first line."""
        found: list[tuple[str, int]] = []
        for line in self.of("train"):
            if not found or found[-1][0] != line["stage"]:
                found.append((line["stage"], line["step"]))
        return found


def read_history(path: Place) -> History:
    """Read a run's metrics; a line that a crash cut off is left out, a missing file is an empty history."""
    history = History()
    if not path.is_file():
        return history
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            kind, step = line["kind"], line["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if kind == "event":
            history.messages.append((step, line.get("message", "")))
            continue
        before = history.lines.setdefault(kind, [])
        if kind == "train" and before and step <= before[-1]["step"]:
            _go_back(history, step)
        while before and before[-1]["step"] >= step:
            before.pop()
        before.append(line)
    return history


def _go_back(history: History, step: int) -> None:
    """Forget what was written at a step or later, by the run that was resumed before it."""
    for kind, lines in history.lines.items():
        if ":" not in kind:  # reference runs have steps of their own
            lines[:] = [line for line in lines if line["step"] < step]
