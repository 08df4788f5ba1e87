"""What the age of pseudo labels costs: mIoU against an age that is forced on every label.

    python -m bench.staleness --start runs/stage-one-s{seed} --seeds 0 1 2
    python -m bench.staleness --page

It computes with one thread: on two cores, two of these with other ages or seeds fit side by side.

The student of the engine runs in this process, from a stage I that all ages share, without Ray. Every image of a batch
is labelled at the moment when it is read, with the weights that taught K steps before, so that all its labels are of
one age. Weights are kept every four steps, so an age is K to K + 3 steps; before step K of the stage the labels are of
the weights that it started from; ``stage`` keeps those to the end. Thresholds come, as in the engine, from the last
label of every image.

Raw results in ``docs/results/staleness.json``, table and plot in ``docs/staleness.md`` and ``docs/pictures``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.alone import run_alone
from bench.marked import write_between
from pipelines.options import AdaptOptions
from pipelines.results import versions
from pipelines.setup import resolve

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/staleness.json"
PAGE = ROOT / "docs/staleness.md"
PLOT = ROOT / "docs/pictures/staleness.svg"
AGES = ("0", "8", "32", "128", "stage")
KEEP_EVERY = 4
"""Steps between two weights that are kept for labelling."""


def measure(start: str, seed: int, age: int | None, benchmark: str, data: str) -> dict[str, Any]:
    """Self-training with labels of one age; its score and the ages that its labels really had."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        setup = resolve(
            AdaptOptions(
                benchmark=benchmark, seed=seed, init=start, from_stage=2, data=data, runs=folder, references="never"
            )
        )
        link = run_alone(setup, age, publish_every=KEEP_EVERY)
        score = setup.make_scorer()(torch.device("cpu")).score(link.publisher.newest)
    assert link.made is not None
    score.pop("confusion")
    ages = link.made.ages
    return {
        "age": "stage" if age is None else str(age),
        "benchmark": benchmark,
        "seed": seed,
        "score": score,
        "mean_age": sum(k * n for k, n in ages.items()) / ages.total(),
        "labels_read": ages.total(),
        "steps": setup.plan.total_steps,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }


def add(path: Path, entry: dict[str, Any], keys: tuple[str, ...] = ("age", "seed", "benchmark")) -> None:
    """Write a result beside the others, unless another process has written one of the same keys meanwhile."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        if not any(all(e[key] == entry[key] for key in keys) for e in known):
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps([*known, entry], indent=1) + "\n")
            partial.rename(path)
    path.with_suffix(".lock").unlink(missing_ok=True)


def table(entries: list[dict[str, Any]]) -> str:
    """A row an age: every seed's score, mean and deviation, and the mean age of the labels that were read."""
    lines = ["| forced age K (steps) | mean age read | mIoU (each seed) | mean ± deviation |", "|---|---|---|---|"]
    for age in AGES:
        rows = sorted((e for e in entries if e["age"] == age), key=lambda e: e["seed"])
        if rows:
            scores = [e["score"]["miou"] for e in rows]
            spread = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}" if len(rows) > 1 else "one seed"
            mean_age = statistics.mean(e["mean_age"] for e in rows)
            name = "whole stage" if age == "stage" else age
            lines.append(f"| {name} | {mean_age:.0f} | {', '.join(f'{s:.1f}' for s in scores)} | {spread} |")
    return "\n".join(lines)


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Seeds as points, their mean as a line, an age beside the other."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    by_age = [[e for e in entries if e["age"] == age] for age in AGES]
    by_age = [rows for rows in by_age if rows]
    places = range(len(by_age))
    for place, rows in zip(places, by_age, strict=True):
        axes.plot([place] * len(rows), [e["score"]["miou"] for e in rows], "o", color="#7a8699", markersize=4)
    axes.plot(places, [statistics.mean(e["score"]["miou"] for e in rows) for rows in by_age], color="#0b6e99")
    axes.set_xticks(list(places), ["whole stage" if rows[0]["age"] == "stage" else rows[0]["age"] for rows in by_age])
    axes.set_xlabel("forced age of the labels, steps")
    axes.set_ylabel("mIoU, %")
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "staleness"}):  # or every drawing of the same data differs
        figure.savefig(path, metadata={"Date": None})


def write_page(benchmark: str) -> None:
    """The plot, and the table between the lines of the page that mark it."""
    entries = [e for e in json.loads(RESULTS.read_text()) if e["benchmark"] == benchmark]
    plot(entries, PLOT)
    write_between(PAGE, "staleness", table(entries))


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--start", help="run directory of stage I; {seed} stands for the seed")
    parser.add_argument("--ages", nargs="+", default=list(AGES), choices=AGES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", default=str(ROOT / "data"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds if given.start else ():
        for age in given.ages:
            known = json.loads(given.out.read_text()) if given.out.is_file() else []
            if any((e["age"], e["seed"], e["benchmark"]) == (age, seed, given.benchmark) for e in known):
                continue
            forced = None if age == "stage" else int(age)
            found = measure(given.start.format(seed=seed), seed, forced, given.benchmark, given.data)
            add(given.out, found)
            print(f"age {age}, seed {seed}: {found['score']['miou']:.1f}, {found['seconds']:.0f} s", flush=True)
    if given.page:
        write_page(given.benchmark)


if __name__ == "__main__":
    main()
