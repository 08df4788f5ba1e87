"""Whole runs of the tiny preset inside the test's own Ray, with something happening to them at a step."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import ray

from pipelines import adapt as adapt_module
from pipelines import placement
from pipelines.adapt import Interrupt, Run
from pipelines.options import AdaptOptions, write_config
from pipelines.setup import resolve
from pipelines.trained import describe

TERMS = ("loss", "discriminator")


class StartedRun:
    """A run and what a test may do to it."""

    def __init__(self, options):
        setup = resolve(options)
        # Every step is logged and every fifth one saved, so that a kill loses some steps and their losses show.
        plan = dataclasses.replace(setup.plan, log_every=1, checkpoint_every=5)
        self.setup = dataclasses.replace(setup, plan=plan)
        write_config(self.setup.options)
        describe(self.setup)
        self.newest = {}
        self.stop = Interrupt()
        self.run = None
        self.messages = []

    def go(self, at_step=None, do=None):
        shares = placement.shares(self.setup.options, placement.capacity())
        done = []

        def watch(kind, what):
            if kind == "message":
                self.messages.append(what["text"])
            if kind != "progress":
                return
            self.newest = what
            if at_step is not None and not done and what.get("train", {}).get("step", 0) >= at_step:
                done.append(True)
                do(self)

        before, adapt_module.WATCH_SECONDS = adapt_module.WATCH_SECONDS, 0.1
        try:
            self.run = Run(self.setup, shares, watch, {}, self.setup.open_given())
            outcome = self.run.execute(self.stop)
        finally:
            adapt_module.WATCH_SECONDS = before
        assert at_step is None or done, f"the run never reached step {at_step}"
        return outcome

    def interrupt(self):
        self.stop(2, None)

    def student_pids(self):
        lines = [json.loads(line) for line in Path(self.setup.plan.folder, "metrics.jsonl").read_text().splitlines()]
        return [line["pid"] for line in lines if line["kind"] == "student"]


def start_run(folder, data, **given):
    options = {
        "preset": "tiny",
        "steps": 40,
        "name": "run",
        "runs": str(folder),
        "data": str(data),
        "references": "never",
        "teachers": 1,
    }
    return StartedRun(AdaptOptions(**{**options, **given}))


def losses(folder):
    """Step → its loss terms; a step that was run twice counts as it was run last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: value for name, value in line.items() if name.split("/")[0] in TERMS and "/" in name}
        for line in lines
        if line["kind"] == "train"
    }


def lines(folder, kind):
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def until(answer, seconds=90):
    """Ask until the answer is true; an actor that is just restarting is asked again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if answer():
                return
        except ray.exceptions.RayError:
            pass
        time.sleep(0.1)
    pytest.fail(f"nothing came back within {seconds} s")
