"""What is known of a sweep and its trials, in ``sweep.json``."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actors.errors import RunError
from pipelines.results import write_json
from tune_spaces.space import Point

FILE = "sweep.json"
Status = Literal["running", "finished", "stopped", "failed", "open"]
"""stopped: ended early by the scheduler. open: the sweep was interrupted; a resume continues it."""


@dataclass
class TrialRecord:
    """A trial.

    Attributes:
        id: of Ray Tune; its run directory has the same name.
        number: from 1, in the order of their starts.
        point: values by the names of the options.
        status: see :data:`Status`.
        step: of the last look.
        score: by which trials are ranked, at the last look; None before.
        miou: of the last step with target labels, in percent; None where it was not scored.
        signals: at the last look.
        curve: ``{"step", "score"}`` of every look.
        seconds: wall clock by phase, of the trial that finished.
        attempts: how often it was started.
        began, ended: when it was started last, and when it last came to an end, in seconds of the clock; 0 before.
        error: of the last failure.
    """

    id: str
    number: int
    point: Point
    status: Status = "running"
    step: int = 0
    score: float | None = None
    miou: float | None = None
    signals: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    began: float = 0.0
    ended: float = 0.0
    error: str | None = None


class SweepRecord:
    """All trials of a sweep; every change is on the disk when the method returns.

    Args:
        folder: of the sweep.
        about: what stands above the trials in the file.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.trials: dict[str, TrialRecord] = {}
        if (folder / FILE).is_file():
            for item in read_sweep(folder)["trials"]:
                self.trials[item["id"]] = TrialRecord(**item)

    def started(self, trial: str, point: Point) -> TrialRecord:
        """A trial starts, for the first time or again."""
        found = self.trials.setdefault(trial, TrialRecord(trial, len(self.trials) + 1, dict(point)))
        found.status, found.attempts, found.began = "running", found.attempts + 1, round(time.time(), 3)
        return self._saved(found)

    def looked(self, trial: str, result: dict[str, Any]) -> TrialRecord:
        """A trial reports a look; see :meth:`tune_spaces.trial.TrialRun.next`."""
        found = self.trials[trial]
        found.step, found.score, found.signals = result["step"], result["score"], result["signals"]
        found.miou = result.get("miou", found.miou)
        found.began = round(result.get("began", found.began), 3)
        found.seconds = result.get("seconds", found.seconds)
        found.curve = [point for point in found.curve if point["step"] < found.step]
        if found.score is not None:
            found.curve.append({"step": found.step, "score": found.score})
        if result["finished"]:
            found.status, found.error = "finished", None
        return self._saved(found)

    def ended(self, trial: str) -> TrialRecord:
        """A trial ended without a failure: by itself, or early."""
        found = self.trials[trial]
        found.ended = round(time.time(), 3)
        if found.status != "finished":
            found.status = "stopped"
        return self._saved(found)

    def failed(self, trial: str, error: str, *, again: bool) -> TrialRecord:
        """A trial failed; ``again`` says whether it gets another chance."""
        found = self.trials[trial]
        found.error, found.ended = error, round(time.time(), 3)
        found.status = "running" if again else "failed"
        return self._saved(found)

    def interrupted(self) -> None:
        """What runs now is open."""
        for found in self.trials.values():
            if found.status == "running":
                found.status = "open"
        self.save()

    def forget_all_but(self, known: set[str]) -> None:
        """Leave out what is open and unknown to Ray Tune: after a crash it may have started others instead."""
        gone = [t.id for t in self.trials.values() if t.status in ("running", "open") and t.id not in known]
        for trial in gone:
            del self.trials[trial]

    def forget_weights(self) -> None:
        """Remove the checkpoints of trials that have ended and are not the best; open and failed ones need theirs."""
        best = self.best()
        for trial in self.trials.values():
            if trial.status in ("finished", "stopped") and trial is not best:
                for name in ("checkpoints", "recommended", "stages", "teacher"):
                    shutil.rmtree(self.folder / "trials" / trial.id / name, ignore_errors=True)

    def best(self) -> TrialRecord | None:
        """The finished trial with the highest score; None before the first."""
        found = [t for t in self.trials.values() if t.status == "finished" and ranks(t.score)]
        return max(found, key=lambda t: (t.score, -t.number), default=None)

    def _saved(self, trial: TrialRecord) -> TrialRecord:
        self.save()
        return trial

    def save(self) -> None:
        """Write the file by rename: complete or not at all."""
        best = self.best()
        trials = [dataclasses.asdict(trial) for trial in self.trials.values()]
        write_json(self.folder / FILE, {**self.about, "best": None if best is None else best.id, "trials": trials})


def ranks(score: float | None) -> bool:
    """Whether a score can be compared."""
    return score is not None and math.isfinite(score)


def read_sweep(folder: str | Path) -> dict[str, Any]:
    """What ``sweep.json`` says.

    Raises:
        RunError: the folder is no sweep.
    """
    path = Path(folder) / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} is no sweep: its {FILE} cannot be read ({error}). Give a folder that a sweep printed."
        ) from error
    return found
