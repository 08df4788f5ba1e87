"""What everybody tells and the driver watches: one writer for all metrics, and the request to stop.

The names of the numbers are the same in the terminal, in ``metrics.jsonl``, in TensorBoard, in Prometheus and in
``results.json``: :mod:`actors.metrics` has the rule. Nothing can be appended to what lies in an object store, so there
the files are written on this machine and copied.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.metrics import Export
from actors.storage import RemotePath, place, remove_tree

METRICS = "metrics.jsonl"
COPY_SECONDS = 5.0
"""How often files are copied to a store, at most."""
COPY_SHARE = 0.05
"""Of the time, that copying may take: the files of a long run are copied less often."""


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events, and keeps the newest value of everything.

    Args:
        folder: where they go.
        events: whether there are TensorBoard events; importing their writer takes seconds of a core.
        export: tells Prometheus the numbers; None where nobody fetches them.
    """

    def __init__(self, folder: str, events: bool = True, export: Export | None = None) -> None:
        self.export = export
        target = place(folder)
        self.copies: Copies | None = None
        if isinstance(target, RemotePath):
            self.copies = Copies(Path(tempfile.mkdtemp(prefix="metrics-")), target)
            target = self.copies.source
        self.folder, self.events = target, events
        self.folder.mkdir(parents=True, exist_ok=True)
        self.newest: dict[str, Any] = {}
        self.messages: list[str] = []
        self.stop_requested = self.students_lost = False
        self.failure: str | None = None
        self._events: Any = None
        self.dropped_lines = 0

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Record one line.

        A disk that is full costs lines, never the run: what could not be written is counted.

        Args:
            kind: ``student``, ``train``, ``score``, ``teachers`` or ``event``.
            step: the student's step.
            numbers: JSON values; scalars also become TensorBoard curves.
        """
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **numbers}
        self.students_lost = self.students_lost and kind != "student"
        self.newest.setdefault(kind, {}).update(line)
        if self.export is not None and (sentence := self.export.write(kind, line)):
            self.say(sentence, step)
        try:
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._write_events(kind, step, numbers)
        except OSError:
            self.dropped_lines += 1

    def end(self, *kinds: str) -> None:
        """Nobody works on some kinds any more: their numbers stay in the files and are exported no longer."""
        if self.export is not None:
            self.export.end(kinds)

    def say(self, message: str, step: int = 0) -> None:
        """A sentence for the user; the driver prints it once."""
        self.messages.append(message)
        self.write("event", step, {"message": message})

    def students_failed(self, ranks: Sequence[int], why: str, restarts: int) -> None:
        """Some cannot go on: until one says that it has begun again, none is at work.

        Args:
            ranks: theirs.
            why: for the user, without a full stop.
            restarts: how often students begin again in a run.
        """
        if self.students_lost or self.failure is not None:  # it has been said
            return
        self.students_lost = True
        which = f"student {ranks[0]}" if len(ranks) == 1 else f"students {', '.join(map(str, ranks))}"
        step = self.newest.get("train", {}).get("step", 0)
        self.say(
            f"{which} failed: {why}. All begin again from the newest checkpoint, up to {restarts} times in a run", step
        )

    def fail(self, message: str) -> None:
        """Something that no restart mends: the driver ends the run with this sentence."""
        self.failure = message

    def watch(self, seen: int = 0) -> dict[str, Any]:
        """What is new: numbers, messages after the first ``seen``, students that failed, a fatal error.

        ``students_lost`` stays true until a student says that it has begun again.

        The driver asks about every second, which also keeps the exported numbers alive.
        """
        if self.export is not None and (sentence := self.export.refresh()):
            self.say(sentence)
        return {
            "newest": self.newest,
            "messages": self.messages[seen:],
            "students_lost": self.students_lost,
            "failure": self.failure,
            "dropped_lines": self.dropped_lines,
        }

    def flush(self) -> str | None:
        """Write down everything that was heard so far, where the run's files are.

        Returns:
            None, or the sentence that says why it could not be done.
        """
        if self._events is not None:
            self._events.flush()
        return None if self.copies is None else self.copies.make()

    def close(self) -> str | None:
        """The last call: :meth:`flush`, and what was kept on this machine for a store goes."""
        if self._events is not None:
            self._events.close()  # waits for curves that flushing does not
        self.events, self._events = False, None
        sentence = self.flush()
        if self.copies is not None and sentence is None:
            remove_tree(self.copies.source)
        return sentence

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


class Copies:
    """Keeps copies of a folder's files in a store, in a thread, from now on until the process ends.

    Args:
        source: on this machine.
        target: there; its metrics are continued.
    """

    def __init__(self, source: Path, target: RemotePath) -> None:
        self.source, self.target = source, target
        self._lock = threading.Lock()
        self._copied: dict[Path, tuple[int, int]] = {}
        before = target / METRICS
        if before.exists():
            lines = before.read_bytes()
            cut_off = lines and not lines.endswith(b"\n")  # by whoever died while it wrote
            (source / METRICS).write_bytes(lines + (b"\n" if cut_off else b""))
        threading.Thread(target=self._go_on, name="copies", daemon=True).start()

    def make(self) -> str | None:
        """Copy what has changed since the last time.

        Returns:
            None, or the sentence that says why it could not be done; it is tried again the next time.
        """
        with self._lock:
            try:
                for file in sorted(item for item in self.source.rglob("*") if item.is_file()):
                    content = file.stat()
                    state = content.st_size, content.st_mtime_ns
                    if self._copied.get(file) != state:
                        (self.target / file.relative_to(self.source).as_posix()).write_bytes(file.read_bytes())
                        self._copied[file] = state
                return None
            except OSError as error:
                return f"metrics could not be copied: {error}; they are in {self.source} of the head node"

    def _go_on(self) -> None:
        took = 0.0
        while True:
            time.sleep(max(COPY_SECONDS, took / COPY_SHARE))
            began = time.monotonic()
            self.make()
            took = time.monotonic() - began
