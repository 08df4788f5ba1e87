"""A trial: one run of a sweep. :class:`TrialRun` is an ordinary object; :class:`Trial` is its shell for Ray Tune."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import queue
import threading
import time
from pathlib import Path
from typing import Any

import ray.tune

from actors.crew import Crew, LastingCrew
from actors.errors import RunError
from models.label_free import SCORES
from pipelines import placement
from pipelines.adapt import Interrupt, Manner, Run
from pipelines.options import write_config
from pipelines.placement import HEAD
from pipelines.setup import Setup, resolve
from pipelines.trained import describe
from tune_spaces.options import ORACLE, SweepOptions, read_sweep_options
from tune_spaces.space import Point, with_point

STOPPING = "stopping"
"""File in the folder of a sweep that is being interrupted: Ray Tune cannot reach a process that waits for a look."""
POLL_SECONDS = 0.5
SETTLE_SECONDS = 1.0
"""By then Ray Tune has left its loop: a result that it still took would count as the end of the trial."""
SECONDS_TO_STOP = 60.0
NOT_SIGNALS = ("class_shares", "recommended", "recommended_score", "kind", "step", "time")
"""What stands beside the signals in a line of metrics."""


class TrialRun:
    """A run in a thread, whose looks are taken one by one.

    Args:
        sweep: options of the sweep.
        trial: its id, and the name of its run directory: one that is there already is continued.
        point: its values.
        crew: who brings teachers and evaluator.
    """

    def __init__(self, sweep: SweepOptions, trial: str, point: Point, crew: Crew) -> None:
        self.sweep, self.crew = sweep, crew
        self.options = dataclasses.replace(with_point(sweep.trial_options(), point), name=trial)
        self.began, self.clock = time.monotonic(), time.time()
        self.looks: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self.interrupt = Interrupt()
        self._looked, self.steps = -1, 1
        self.thread = threading.Thread(target=self._work, name=f"trial {trial}", daemon=True)
        self.thread.start()

    def next(self) -> dict[str, Any] | None:
        """Wait for the next look, or until the sweep is being interrupted: the run has then saved a checkpoint.

        Returns:
            None when it was interrupted; else ``{"step", "look", "score", "signals", "finished"}``, and of the last
            one ``miou`` where target labels score it, ``began`` (seconds of the clock) and ``seconds`` by phase.

        Raises:
            RunError: the run cannot go on; so with whatever else ended it.
        """
        while True:
            try:
                item = self.looks.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if (self.sweep.folder() / STOPPING).exists():
                    self.stop()
                    time.sleep(SETTLE_SECONDS)
                    return None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def stop(self) -> None:
        """End the run, wherever it stands: it saves a checkpoint, and its processes go.

        Raises:
            RunError: it does not end in time, and so no other run may begin in this process.
        """
        self.interrupt.asked = True
        self.thread.join(SECONDS_TO_STOP)
        if self.thread.is_alive():
            raise RunError(
                f"the trial before did not end within {SECONDS_TO_STOP:g} seconds; this one needs a process of its own"
            )

    def _work(self) -> None:
        try:
            found = self._run()
        except BaseException as error:  # the process that waits for the next look decides what it means
            self.looks.put(error)
            return
        if found is not None:
            self.looks.put(found)

    def _run(self) -> dict[str, Any] | None:
        """The last look; None when the run was stopped."""
        setup = self._setup()
        done = Path(setup.plan.folder) / "results.json"
        if done.is_file():  # the sweep ended before it heard of it
            return self._last(json.loads(done.read_text(encoding="utf-8")))
        parts = placement.shares(setup.options, placement.capacity(), setup.learners)
        write_config(setup.options)
        describe(setup)
        manner = Manner(
            student_here=setup.options.students == 1,
            brief=True,
            scored=self.sweep.scores_target,
            score_on_the_way=self.sweep.metric == ORACLE,
        )
        seconds = {"start": time.monotonic() - self.began}
        outcome = Run(setup, parts, self._watch, seconds, setup.open_given(), manner, self.crew).execute(self.interrupt)
        return None if outcome.results is None else self._last(outcome.results)

    def _setup(self) -> Setup:
        setup = resolve(self.options)
        self.steps, publish = setup.plan.total_steps, setup.plan.publish_every
        every = -(-self.steps // (self.sweep.looks * publish)) * publish  # weights are seen when they are published
        plan = dataclasses.replace(setup.plan, evaluate_every=every)
        return dataclasses.replace(setup, plan=plan)

    def _watch(self, kind: str, what: dict[str, Any]) -> None:
        """Told by the run what happens; a look that is complete goes into the queue."""
        line = what.get("signals") if kind == "progress" else None
        if not line or line["step"] <= self._looked:
            return
        oracle = what.get("score", {})
        if self.sweep.metric == ORACLE and oracle.get("step") != line["step"]:
            return
        self._looked = line["step"]
        self.looks.put(self._look(line["step"], line, oracle.get("miou")))

    def _last(self, results: dict[str, Any]) -> dict[str, Any]:
        adapted = results["scores"]["adapted"]
        miou = None if adapted is None else adapted["miou"]
        look = self._look(results["steps"], results["label_free"], miou)
        seconds = {**results["seconds"], "whole": round(time.monotonic() - self.began, 2)}
        return {
            **look,
            "finished": True,
            "began": self.clock,
            "seconds": seconds,
            **({} if miou is None else {"miou": miou}),
        }

    def _look(self, step: int, line: dict[str, Any], miou: float | None) -> dict[str, Any]:
        signals = {name: value for name, value in line.items() if name not in NOT_SIGNALS}
        score = score_of(self.sweep.metric, signals, miou)
        # Schedulers compare trials by the number of a look: its step depends on when the evaluator had time.
        number = max(1, round(step * self.sweep.looks / self.steps))
        return {"step": step, "look": number, "score": score, "signals": signals, "finished": False}


def score_of(metric: str, signals: dict[str, float], miou: float | None) -> float | None:
    """The score of a look; None where what it is made of is missing or no finite number."""
    if metric == ORACLE:
        return miou
    try:
        found = SCORES[metric][1](signals)
    except KeyError:
        return None
    return found if math.isfinite(found) else None


WORST = -1e9
"""What Ray Tune hears of a look without a score: it must hear a number."""


class Trial(ray.tune.Trainable):
    """The shell. One process may serve several trials, one after the other, and keeps what it has imported."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin; see :class:`ray.tune.Trainable`."""
        self.run: TrialRun | None = None
        self.crew = LastingCrew({"resources": HEAD})
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        """Wait for the next look."""
        assert self.run is not None
        look = self.run.next()
        if look is None:
            return {"done": True}  # nobody listens any more
        return {
            "told": look,
            "look": look["look"],
            "score": WORST if look["score"] is None else look["score"],
            "done": look["finished"],
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        self._end_run()
        self.run = TrialRun(read_sweep_options(new_config["sweep"]), self.trial_id, new_config["point"], self.crew)
        return True

    def cleanup(self) -> None:
        """End what runs, and everything that would serve another trial."""
        with contextlib.suppress(RunError):  # this process is about to end
            self._end_run()
        self.crew.end()

    def _end_run(self) -> None:
        if self.run is not None:
            self.run.stop()
        self.run = None
