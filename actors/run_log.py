"""What everybody tells and the driver watches: one writer for all metrics, and the request to stop.

The names of the numbers are the same in the terminal, in ``metrics.jsonl``, in TensorBoard and in ``results.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events, and keeps the newest value of everything.

    Args:
        folder: where they go.
        events: whether there are TensorBoard events; importing their writer takes seconds of a core.
    """

    def __init__(self, folder: str, events: bool = True) -> None:
        self.folder, self.events = Path(folder), events
        self.folder.mkdir(parents=True, exist_ok=True)
        self.newest: dict[str, Any] = {}
        self.messages: list[str] = []
        self.stop_requested = False
        self.failure: str | None = None
        self._events: Any = None
        self.dropped_lines = 0

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Record one line.

        A disk that is full costs lines, never the run: what could not be written is counted.

        Args:
            kind: ``train``, ``score``, ``teachers`` or ``event``.
            step: the student's step.
            numbers: JSON values; scalars also become TensorBoard curves.
        """
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **numbers}
        self.newest.setdefault(kind, {}).update(line)
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._write_events(kind, step, numbers)
        except OSError:
            self.dropped_lines += 1

    def say(self, message: str, step: int = 0) -> None:
        """A sentence for the user; the driver prints it once."""
        self.messages.append(message)
        self.write("event", step, {"message": message})

    def fail(self, message: str) -> None:
        """Something that no restart mends: the driver ends the run with this sentence."""
        self.failure = message

    def watch(self, seen: int = 0) -> dict[str, Any]:
        """Newest numbers of every kind, the messages after the first ``seen``, and a fatal error if there is one."""
        return {
            "newest": self.newest,
            "messages": self.messages[seen:],
            "failure": self.failure,
            "dropped_lines": self.dropped_lines,
        }

    def request_stop(self) -> None:
        """Ask the students to save and return; they poll :meth:`should_stop`."""
        self.stop_requested = True

    def should_stop(self) -> bool:
        """Whether a stop was asked for."""
        return self.stop_requested

    def _write_events(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        scalars = {k: v for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if not scalars or not self.events:
            return
        if self._events is None:
            from tensorboardX import SummaryWriter  # 0.5 s that no start should wait for

            self._events = SummaryWriter(str(self.folder / "events"), flush_secs=5)
        for name, value in scalars.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)
