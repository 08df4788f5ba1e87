"""What ``run.py plan`` predicts against real runs.

    python -m bench.plan_check --teachers 1 --seeds 0 1 2      three times: a run through the whole engine, then plan
    python -m bench.plan_check --show                          the table

Compared are, of the stage that plan plans: seconds of a step, from the hundredth step of the run on (by then all
processes have started) to the last; the median age of the labels that were read in the whole run, as ``results.json``
has it; and the bytes in Ray's object store, which is sampled while that stage lasts, on average and at most. What
stands in the results file already is not measured again. Everything needs a machine that does nothing else: the load
before each measurement is kept beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own, for the length of a run

RESULTS = Path(__file__).parent.parent / "docs/results/plan.json"
WARM_STEPS = 100
LIMITS = {"step_seconds": 1.25, "store_mean": 1.25, "store_most": 1.25, "age_p50": 2.0}
"""How many times as much or as little as the median of the runs a prediction may be."""


def predicted(options: Any) -> dict[str, Any]:
    """What plan says of a run."""
    from pipelines.capacity import side_by_side
    from pipelines.load_trial import measure
    from pipelines.setup import resolve

    load = os.getloadavg()[0]
    found = measure(resolve(options))
    row = side_by_side(found.course, found.measured, options.teachers)
    return {
        "step_seconds": row.step_seconds,
        "age_p50": row.ages.p50,
        "age_p95": row.ages.p95,
        "store_mean": row.store.mean,
        "store_most": row.store.most,
        "seconds": found.seconds,
        "spread": found.measured.spread,
        "load": load,
        "measured": asdict(found.measured),
    }


def ran(options: Any) -> dict[str, Any]:
    """What a run comes to."""
    import ray
    from ray._private.internal_api import node_stats

    from pipelines.adapt import adapt
    from pipelines.report.history import read_history

    load, samples = os.getloadavg()[0], list[tuple[str, int]]()

    def watch(kind: str, what: dict[str, Any]) -> None:
        if kind == "progress" and "train" in what:
            (node,) = ray.nodes()
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
            samples.append((what["train"]["stage"], int(stats.store_stats.object_store_bytes_used)))

    outcome = adapt(options, watch)
    ray.shutdown()
    assert outcome.results is not None
    lines = read_history(outcome.folder / "metrics.jsonl").of("train")
    stage = lines[-1]["stage"]
    warm = [line for line in lines if line["stage"] == stage and line["step"] >= WARM_STEPS]
    store = [used for name, used in samples if name == stage]
    ages = outcome.results["label_age_steps"]
    return {
        "step_seconds": (warm[-1]["time"] - warm[0]["time"]) / (warm[-1]["step"] - warm[0]["step"]),
        "age_p50": ages["p50"],
        "age_p95": ages["p95"],
        "store_mean": statistics.mean(store),
        "store_most": max(store),
        "images_per_s": outcome.results["teachers"]["images_per_s"],
        "adapt_seconds": outcome.seconds["adapt"],
        "load": load,
        "load_after": os.getloadavg()[0],
    }


def show(entries: list[dict[str, Any]]) -> bool:
    """Print ratios of predictions to the median of the runs; whether all are within their limits."""
    fine = True
    for teachers in sorted({entry["teachers"] for entry in entries}):
        rows = [entry for entry in entries if entry["teachers"] == teachers]
        for name, limit in LIMITS.items():
            runs = [row["ran"][name] for row in rows if "ran" in row]
            median = statistics.median(runs)
            ratios = [row["predicted"][name] / median for row in rows if "predicted" in row]
            fine = fine and all(1 / limit <= ratio <= limit for ratio in ratios)
            print(
                f"{teachers} teachers, {name}: median of {len(runs)} runs {median:,.4g}; predicted / median "
                f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} (within {1 / limit:.2f} to {limit:.2f})"
            )
    return fine


def main(arguments: list[str]) -> None:
    """Measure what is missing, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    entries: list[dict[str, Any]] = json.loads(given.json.read_text()) if given.json.is_file() else []
    for seed in () if given.show else given.seeds:
        same = (entry for entry in entries if (entry["teachers"], entry["seed"]) == (given.teachers, seed))
        entry = next(same, None)
        if entry is None:
            entry = {"teachers": given.teachers, "seed": seed, "cores": os.cpu_count()}
            entries.append(entry)
        for part, find in (("ran", ran), ("predicted", predicted)):
            if part not in entry:
                entry |= _found(part, find, seed, given.teachers, given.steps)
                given.json.write_text(json.dumps(entries, indent=1) + "\n")
    if not show(entries):
        raise SystemExit("a prediction is outside its limits")


def _found(part: str, find: Callable[[Any], dict[str, Any]], seed: int, teachers: int, steps: int) -> dict[str, Any]:
    """A part of an entry, and what it is of."""
    from pipelines.options import AdaptOptions, command_line
    from pipelines.results import commit

    with tempfile.TemporaryDirectory(prefix="t") as folder:
        options = AdaptOptions(
            steps=steps, seed=seed, teachers=teachers, references="never", dashboard=False, runs=folder, name="run"
        )
        return {"command": command_line(options), part: {"commit": commit(), **find(options)}}


if __name__ == "__main__":
    main(sys.argv[1:])
