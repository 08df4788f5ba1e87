"""Which score without target labels ranks configurations as target mIoU does?

    python -m bench.label_free_scores --benchmark synthia2city --part 0 2 &
    python -m bench.label_free_scores --benchmark synthia2city --part 1 2
    python -m bench.label_free_scores --page

Trains stage I once, with some source images held out, then self-training with the recipe's first points and random ones
of its search space, each with the engine's student in this process on labels of one age, so that the numbers are the
same every time. Five times in a trial the signals are measured; at its end target labels score it. One thread.

Raw results in ``docs/results/label-free-scores.json``, tables and plot in ``docs/sweeps.md`` and ``docs/pictures``. The
correlation is Spearman's; its spread is the interval of 5 to 95 % over 2,000 resamplings of the trials. *Of the gain*:
by how much the configuration that a score picks beats the recipe's defaults, and the median trial, as shares of what
picking by target mIoU gains over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.samplers import RandomSampler
from optuna.study import create_study
from torch import nn

from actors.evaluator import Scorer
from actors.watcher import Watcher
from bench.alone import Shelf, Weights, run_alone
from bench.marked import write_between
from bench.recommendation import rank_correlation
from bench.staleness import add
from models.label_free import SCORES
from pipelines.options import AdaptOptions
from pipelines.results import versions
from pipelines.setup import resolve
from tune_spaces.space import Point, Space, check_space, read_space, shipped, with_point

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/label-free-scores.json"
PAGE = ROOT / "docs/sweeps.md"
PLOT = ROOT / "docs/pictures/label-free-scores.svg"
HELD_OUT = 32
TRIALS = 18
LOOKS = 5
AGE = 16
RESAMPLINGS = 2000
DEFAULT = 1
"""The second of the first points: the recipe's defaults."""
SHOWN = ("combined", "information", "disagreement")


class WatchedShelf(Shelf):
    """Also measures the signals of some of the weights that are published."""

    def __init__(self, age: int, looks: set[int], watcher: Watcher, source: Scorer) -> None:
        super().__init__(age)
        self.looks, self.watcher, self.source = looks, watcher, source
        self.seen: list[dict[str, Any]] = []

    def publish(
        self, version: int, network: nn.Module, *, pin: bool, student: nn.Module | None = None, **more: Any
    ) -> None:
        """See :class:`bench.alone.Shelf`."""
        super().publish(version, network, pin=pin, student=student)
        if version in self.looks:
            own = None if student is None else {name: t.detach().numpy() for name, t in student.state_dict().items()}
            signals = self.watcher.look(self.newest, own)
            signals.pop("class_shares")
            source = self.source.score(self.newest)["miou"] / 100
            self.seen.append({"step": version, **signals, "source_miou": source})


def points_of(space: Space, options: AdaptOptions, count: int) -> list[Point]:
    """The first points, then random ones, the same for every benchmark."""
    points = space.first_points(options)
    study = create_study(sampler=RandomSampler(seed=0))
    while len(points) < count:
        points.append(study.ask({p.name: p.distribution() for p in space.parameters}).params)
    return points


def stage_one(base: AdaptOptions, runs: Path) -> Path:
    """Train stage I, unless it is there."""
    setup = resolve(replace(base, to_stage=1, runs=str(runs), name=f"stage-one-{base.benchmark}-s{base.seed}"))
    folder = Path(setup.plan.folder)
    if not list(folder.glob("checkpoints/*/state.pt")):
        run_alone(setup, 0)
    return folder


def measure(base: AdaptOptions, start: Path, point: Point, steps: int) -> tuple[list[dict[str, Any]], Weights]:
    """Self-training with the values of a point: the signals of every look, and the last weights."""
    with tempfile.TemporaryDirectory() as folder:
        options = replace(base, init=str(start), from_stage=2, steps=steps, runs=folder, name="trial")
        setup = resolve(with_point(options, point))
        cpu, total = torch.device("cpu"), setup.plan.total_steps
        source = setup.make_source_scorer()
        assert source is not None
        publish_every = 8
        looks = {total * k // LOOKS // publish_every * publish_every for k in range(1, LOOKS)} | {total}
        shelf = WatchedShelf(AGE, looks, setup.make_watcher()(cpu), source(cpu))
        run_alone(setup, AGE, shelf=shelf, publish_every=publish_every, evaluate_every=total)
        return shelf.seen, shelf.newest


def run_trials(given: argparse.Namespace) -> None:
    """Every trial of this part that has not been measured."""
    base = AdaptOptions(
        benchmark=given.benchmark, seed=given.seed, data=given.data, references="never", held_out=HELD_OUT
    )
    start = stage_one(base, given.runs)
    known_options = replace(base, init=str(start), from_stage=2)
    space = read_space(shipped(base.recipe))
    check_space(space, known_options)
    part, parts = given.part
    for index, point in enumerate(points_of(space, known_options, given.trials)):
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
        key = {"benchmark": given.benchmark, "seed": given.seed, "trial": index}
        if index % parts != part or any(all(e[k] == v for k, v in key.items()) for e in known):
            continue
        began = time.perf_counter()
        looks, weights = measure(base, start, point, given.steps)
        setup = resolve(replace(base, runs=str(given.runs), name="score"))
        score = setup.make_scorer()(torch.device("cpu")).score(weights)
        score.pop("confusion")
        seconds = round(time.perf_counter() - began, 1)
        entry = {**key, "point": point, "looks": looks, "score": score, "seconds": seconds, "versions": versions()}
        add(RESULTS, entry, tuple(key))
        print(f"{given.benchmark} trial {index}: {score['miou']:.1f}, {seconds:.0f} s", flush=True)


def correlations(scores: np.ndarray, miou: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rho of two float arrays (trials,), and its interval of 5 to 95 % over resamplings of the trials."""
    draws = np.random.default_rng(seed).integers(0, len(miou), (RESAMPLINGS, len(miou)))
    found = [rank_correlation(list(scores[d]), list(miou[d])) for d in draws if len(set(d)) > 2]
    low, high = np.nanquantile(found, [0.05, 0.95])
    return rank_correlation(list(scores), list(miou)), float(low), float(high)


def share_of_gain(scores: np.ndarray, miou: np.ndarray, instead: float) -> float:
    """By how much the trial that a score picks beats something, as a share of by how much the best trial does."""
    return float((miou[scores.argmax()] - instead) / (miou.max() - instead))


def arrays(entries: list[dict[str, Any]], benchmark: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every score at the last look, and target mIoU, of a benchmark's trials in their order."""
    rows = sorted((e for e in entries if e["benchmark"] == benchmark), key=lambda e: e["trial"])
    miou = np.array([row["score"]["miou"] for row in rows])
    return {name: np.array([of(row["looks"][-1]) for row in rows]) for name, (_, of) in SCORES.items()}, miou


def ranking(entries: list[dict[str, Any]], benchmarks: list[str]) -> str:
    """A row a score: rank correlation with its spread, what it picks, and the share of the oracle's gain."""
    data = {name: arrays(entries, name) for name in benchmarks}
    mean = {name: statistics.mean(correlations(s[name], miou)[0] for s, miou in data.values()) for name in SCORES}
    heads = "".join(f" {name}: rank correlation | picks | of the gain |" for name in benchmarks)
    lines = [f"| score |{heads}", "|---|" + "---|---|---|" * len(benchmarks)]
    for score in sorted(SCORES, key=lambda name: -mean[name]):
        cells = []
        for scores, miou in data.values():
            rho, low, high = correlations(scores[score], miou)
            shares = [share_of_gain(scores[score], miou, float(base)) for base in (miou[DEFAULT], np.median(miou))]
            gain = " / ".join(f"{100 * share:.0f} %" for share in shares)
            cells += [f"{rho:.2f} ({low:.2f} to {high:.2f})", f"{miou[scores[score].argmax()]:.1f}", gain]
        lines.append(f"| `{score}` | {' | '.join(cells).replace('-', '−')} |")
    best = [f"{miou.max():.1f} | 100 %" for _, miou in data.values()]
    lines.append(f"| `miou` (oracle) | 1 | {' | 1 | '.join(best)} |")
    facts = "; ".join(
        f"{name}: defaults {miou[DEFAULT]:.1f}, median {np.median(miou):.1f}, {len(miou)} trials"
        for name, (_, miou) in data.items()
    )
    return "\n".join([*lines, "", f"{facts}.", *chosen_elsewhere(data)])


def chosen_elsewhere(data: Mapping[str, tuple[dict[str, np.ndarray], np.ndarray]]) -> list[str]:
    """The score that ranks best on one benchmark, on the other one: what choosing among scores flatters."""
    found = []
    for here in data:
        scores, miou = data[here]
        best = max(SCORES, key=lambda name: correlations(scores[name], miou)[0])
        for there in data:
            if there != here:
                rho, low, high = correlations(data[there][0][best], data[there][1])
                found.append(f"Best on {here} is `{best}`; on {there} it has {rho:.2f} ({low:.2f} to {high:.2f}).")
    return ["", " ".join(found)]


def plot(entries: list[dict[str, Any]], benchmarks: list[str], path: Path) -> None:
    """Target mIoU over three scores; a point a trial."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.4 * len(benchmarks)), layout="constrained")
    axes = figure.subplots(len(benchmarks), len(SHOWN), squeeze=False, sharey="row")
    for row, name in zip(axes, benchmarks, strict=True):
        scores, miou = arrays(entries, name)
        for cell, score in zip(row, SHOWN, strict=True):
            cell.plot(scores[score], miou, "o", color="#0b6e99", markersize=4)
            cell.plot(scores[score][DEFAULT], miou[DEFAULT], "o", color="#ea7317", markersize=5)
            cell.set_xlabel(score)
            cell.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{name}: mIoU, %")
    with matplotlib.rc_context({"svg.hashsalt": "label-free-scores"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--steps", type=int, default=440, help="of both stages; the trials run nine elevenths of them")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every N-th trial from K")
    parser.add_argument("--data", default=str(ROOT / "data"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/label-free-scores")
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    given = parser.parse_args()
    if given.page:
        entries = json.loads(RESULTS.read_text())
        benchmarks = list(dict.fromkeys(entry["benchmark"] for entry in entries))
        plot(entries, benchmarks, PLOT)
        write_between(PAGE, "label-free-scores", ranking(entries, benchmarks))
        return
    torch.set_num_threads(1)
    run_trials(given)


if __name__ == "__main__":
    main()
