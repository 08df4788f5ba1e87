"""Which score without target labels ranks configurations as target mIoU does?

    python -m bench.label_free_scores --benchmark synthia2city --part 0 2 &
    python -m bench.label_free_scores --benchmark synthia2city --part 1 2
    python -m bench.label_free_scores --page

Trains stage I once, with some source images held out, then self-training with the recipe's first points and random ones
of its search space, each with the engine's student in this process on labels of one age, so that the numbers are the
same every time. Five times in a trial the signals are measured; at its end target labels score it. One thread.

Raw results in ``docs/results/label-free-scores.json``, tables and plot in ``docs/sweeps.md`` and ``docs/pictures``. The
correlation is Spearman's; its spread is the interval of 5 to 95 % over 2,000 resamplings of the trials. *Share of the
oracle's gain*: by how much the configuration that a score picks is better than the recipe's defaults, as a share of
what picking by target mIoU gains.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
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
from bench.recommendation import rank_correlation
from bench.staleness import add
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


class WatchedShelf(Shelf):
    """Also measures the signals of some of the weights that are published."""

    def __init__(self, age: int, looks: set[int], watcher: Watcher, source: Scorer) -> None:
        super().__init__(age)
        self.looks, self.watcher, self.source = looks, watcher, source
        self.seen: list[dict[str, Any]] = []

    def publish(self, version: int, network: nn.Module, *, pin: bool, student: nn.Module | None = None) -> None:
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


def share_of_gain(scores: np.ndarray, miou: np.ndarray, default: int) -> float:
    """Gain over the default's trial of the one that a score picks, as a share of the best one's."""
    return float((miou[scores.argmax()] - miou[default]) / (miou.max() - miou[default]))


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
    torch.set_num_threads(1)
    run_trials(given)


if __name__ == "__main__":
    main()
