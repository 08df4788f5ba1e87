"""What running students and teachers at the same time buys, and when it costs.

    python -m bench.asynchrony real --start RUN        two cores: turn-taking against side by side, to equal mIoU
    python -m bench.asynchrony simulated               two devices that sleep instead of computing
    python -m bench.asynchrony page                    docs/asynchrony.md from the results

**real** runs the engine from one stage I. *Side by side*: one thread for the student and one for the teacher, which
labels without end. *Turn-taking*: training and labelling have both cores, one after the other; self-training is divided
into rounds, each on labels of its own. Both have the same steps. Scores are those of the engine's evaluator, which has
as many threads as the student and gives way to it. A time is counted from the start of the student's process to the
step that was scored, linear between two scores, the first of which is stage I's at the start.

**simulated** runs board, bank, view and two devices for a fixed number of steps. A step takes s and an image's labels
ℓ on one device. Side by side, one device takes every step and the other labels. Turn-taking either uses one device at a
time, as the published scripts do, or both in each phase, where a step on two devices takes s / 2e (e: how well the step
scales). The clock starts with the first weights; all wait for the first round of labels, so that all N steps have some.
The computed time is what the devices alone would need:

    side by side                n ℓ + N s
    turn-taking, one at a time  R n ℓ + N s
    turn-taking, both           R n ℓ / 2 + N s / 2e

for N steps, R rounds and n images. ρ = R n ℓ / N s, the teaching device's load in turn-taking rounds, decides who wins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own, for the length of the measurement

import numpy as np  # noqa: E402
import ray  # noqa: E402

from actors.label_bank import LabelBank  # noqa: E402
from actors.label_view import LabelView, Transport  # noqa: E402
from actors.protocols import LabelPlan, RuleShape  # noqa: E402
from actors.staleness import StalenessPolicy  # noqa: E402
from actors.weight_board import WeightBoard  # noqa: E402
from bench.label_path import Load, SleepingTeacher, simulated_nodes  # noqa: E402
from bench.marked import write_between  # noqa: E402
from pipelines.report.history import read_history  # noqa: E402

ROOT = Path(__file__).parent.parent
REAL = ROOT / "docs/results/asynchrony-real.json"
SIMULATED = ROOT / "docs/results/asynchrony-simulated.json"
PAGE = ROOT / "docs/asynchrony.md"

SCALING = 0.9
"""e: a batch split over two devices that exchange gradients after every step; between boxes it is less."""
STEP_SECONDS = 0.02
STEPS = 600
ROUNDS = 6
LOADS = (0.05, 0.25, 1.0)
"""ρ. A published round (2,975 images, five passes over four views) costs as much as about 2,300 of its 50,000 training
steps of nine crops, in multiplications: 0.05."""


# --- simulated devices ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(Load):
    """Two devices: how long a teacher sleeps for an image is given, not derived."""

    nodes: int = 1
    images: int = 64
    height: int = 32
    width: int = 64
    label_seconds: float = 0.0
    refresh_steps: int = STEPS // ROUNDS

    @property
    def image_seconds(self) -> float:
        """ℓ, of one teacher."""
        return self.label_seconds

    @property
    def refresh(self) -> int:
        """Steps between two published weights."""
        return self.refresh_steps


class SleepingLearner:
    """Takes N steps, either in rounds that wait for their labels, or without waiting after the first."""

    def __init__(self, load: Pair, board: Any, bank: Any, rounds: int) -> None:
        self.load, self.board, self.bank, self.rounds = load, board, bank, rounds

    def run(self, steps: int) -> float:
        """Seconds for all steps, from the first publication on."""
        load, shape = self.load, (self.load.height, self.load.width)
        rng, began = np.random.default_rng(0), time.perf_counter()
        for number in range(self.rounds):
            first, end = steps * number // self.rounds, steps * (number + 1) // self.rounds
            self._publish(first, pin=True)
            policy = StalenessPolicy("once" if self.rounds > 1 else "continuous")
            view = LabelView(plan(load, policy), shape, load.rows, number, first, Transport(self.bank))
            view.wait_for_round(first, lambda: False, poll_seconds=0.002)
            for step in range(first, end):
                if self.rounds == 1 and step and step % load.refresh == 0:
                    self._publish(step)
                batch = rng.integers(0, load.images, load.batch)
                view.poll(step, batch)
                for index in batch:
                    view.get(int(index), step)
                time.sleep(load.step_seconds)
        return time.perf_counter() - began

    def _publish(self, version: int, pin: bool = False) -> None:
        ray.get(self.board.publish.remote(version, [ray.put(np.full(1000, version))], pin))


def plan(load: Load, policy: StalenessPolicy) -> LabelPlan:
    """For bank and view."""
    return LabelPlan(RuleShape(load.layout, load.layout.num_classes), policy)


def simulate(load: Pair, rounds: int) -> tuple[float, int]:
    """Seconds for all steps and labels made, in ``rounds`` rounds of turn-taking; one round is side by side."""
    policy = StalenessPolicy("once" if rounds > 1 else "continuous")
    with simulated_nodes(load):
        board = ray.remote(num_cpus=0)(WeightBoard).remote()
        plans = {number: plan(load, policy) for number in range(rounds)}
        bank = ray.remote(num_cpus=0, max_concurrency=64)(LabelBank).remote(
            plans, load.images, dict.fromkeys(plans, load.rows), board
        )
        teacher = ray.remote(num_cpus=0)(SleepingTeacher)
        teachers = [teacher.remote(load, board) for _ in range(load.teachers)]
        ray.get(bank.status.remote(teachers))
        learner = ray.remote(num_cpus=0)(SleepingLearner).remote(load, board, bank, rounds)
        seconds = ray.get(learner.run.remote(STEPS))
        return seconds, ray.get(bank.status.remote())["labels_made"]


def simulated(share: float) -> dict[str, Any]:
    """All three arrangements at one ρ."""
    label = share * STEPS * STEP_SECONDS / (ROUNDS * Pair().images)
    training, labelling = STEPS * STEP_SECONDS, ROUNDS * Pair().images * label
    side, made = simulate(Pair(teachers=1, step_seconds=STEP_SECONDS, label_seconds=label), 1)
    one, _ = simulate(Pair(teachers=1, step_seconds=STEP_SECONDS, label_seconds=label), ROUNDS)
    both_step = STEP_SECONDS / (2 * SCALING)
    both, _ = simulate(Pair(teachers=2, step_seconds=both_step, label_seconds=label), ROUNDS)
    return {
        "rho": share,
        "label_seconds": label,
        "rounds_made_side_by_side": made / Pair().images - 1,
        "measured": {"side_by_side": side, "one_at_a_time": one, "both": both},
        "computed": {
            "side_by_side": labelling / ROUNDS + training,
            "one_at_a_time": training + labelling,
            "both": training / (2 * SCALING) + labelling / 2,
        },
    }


def simulated_table(rows: Sequence[dict[str, Any]]) -> str:
    """How many times as fast side by side is; measured, and computed in brackets."""
    lines = [
        f"| ρ | rounds meanwhile (turn-taking: {ROUNDS}) | against one device at a time | against both in each phase |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name in ("one_at_a_time", "both"):
            real, ideal = (row[kind][name] / row[kind]["side_by_side"] for kind in ("measured", "computed"))
            cells.append(f"{real:.2f} ({ideal:.2f})")
        lines.append(f"| {row['rho']:g} | {row['rounds_made_side_by_side']:.1f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


# --- two real cores ------------------------------------------------------------------------------------------------


def arrangements(rounds: Sequence[int], threads: int) -> dict[str, list[str]]:
    """Name → arguments of run.py; ``threads`` are those of either phase of turn-taking."""
    found = {"side by side": ["--threads", "1"]}
    for number in rounds:
        name = f"turn-taking, {number} round{'s' if number > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"
        found[name] = ["--threads", str(threads), "--refresh", "once", "--eplc.rounds", str(number)]
    return found


def run_real(start: str, benchmark: str, seed: int, chosen: dict[str, list[str]], runs: Path, path: Path) -> None:
    """Every arrangement that is not there yet, one after the other."""
    for name, arguments in chosen.items():
        known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        if any((e["arrangement"], e["benchmark"], e["seed"]) == (name, benchmark, seed) for e in known):
            continue
        begun = json.loads((Path(start) / "results.json").read_text())["scores"]["adapted"]["miou"]
        folder = runs / f"asynchrony-{benchmark}-{name.replace(', ', '-').replace(' ', '-')}-s{seed}"
        command = [sys.executable, "run.py", "--benchmark", benchmark, "--seed", str(seed), "--references", "never"]
        command += ["--init", start, "--from-stage", "2", "--no-dashboard", "--runs", str(runs), "--name", folder.name]
        if not (folder / "results.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # a run that was cut off has no whole time
            subprocess.run([*command, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        results = json.loads((folder / "results.json").read_text())
        entry = {
            "arrangement": name,
            "benchmark": benchmark,
            "seed": seed,
            "arguments": arguments,
            "curve": [(0, 0.0, begun), *curve(folder, results)],
            "miou": results["scores"]["adapted"]["miou"],
            "label_age_steps": results["label_age_steps"],
            "labels_made": results["teachers"]["labels_made"],
            "versions": results["versions"],
        }
        path.write_text(json.dumps([*known, entry], indent=1) + "\n")
        print(f"{name}, seed {seed}: {entry['curve'][-1][1]:.0f} s, mIoU {entry['miou']:.1f}", flush=True)


def curve(folder: Path, results: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(step, seconds from the student's start to the step, mIoU of its weights)."""
    history = read_history(folder / "metrics.jsonl")
    began = history.of("student")[0]["time"]
    times = [(line["step"], line["time"] - began) for line in history.of("train")]
    steps, seconds = zip(*times, strict=True)
    scored = [*history.curve("score", "miou"), (results["steps"], results["scores"]["adapted"]["miou"])]
    return [(step, float(np.interp(step, steps, seconds)), miou) for step, miou in scored]


def seconds_to(curve: Sequence[Sequence[float]], wanted: float) -> float | None:
    """Seconds to a mIoU for the first time; None if it is never reached."""
    before: Sequence[float] | None = None
    for point in curve:
        if point[2] >= wanted:
            if before is None:
                return float(point[1])
            share = (wanted - before[2]) / (point[2] - before[2])
            return float(before[1] + share * (point[1] - before[1]))
        before = point
    return None


def real_table(entries: list[dict[str, Any]]) -> str:
    """Per arrangement: time for all steps, score, age, and the time to the score that all of a seed reach."""
    lines = [
        "| | seconds for all steps | mIoU at the end | label age, p50 | seconds to equal mIoU |",
        "|---|---|---|---|---|",
    ]
    reached = {
        seed: min(max(point[2] for point in e["curve"]) for e in entries if e["seed"] == seed)
        for seed in sorted({e["seed"] for e in entries})
    }
    for name in dict.fromkeys(e["arrangement"] for e in entries):
        rows = sorted((e for e in entries if e["arrangement"] == name), key=lambda e: e["seed"])
        to = [seconds_to(e["curve"], reached[e["seed"]]) for e in rows]
        cells = [
            ", ".join(f"{e['curve'][-1][1]:.0f}" for e in rows),
            ", ".join(f"{e['miou']:.1f}" for e in rows),
            f"{statistics.mean(e['label_age_steps']['p50'] for e in rows):.0f}",
            ", ".join(_reached(s, reached[e["seed"]]) for s, e in zip(to, rows, strict=True)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _reached(seconds: float | None, score: float) -> str:
    return "–" if seconds is None else f"{seconds:.0f} (to {score:.1f})"


def write_page(benchmark: str) -> None:
    """Both tables, between the lines of the page that mark them."""
    runs = [e for e in json.loads(REAL.read_text()) if e["benchmark"] == benchmark]
    write_between(PAGE, "real", real_table(runs))
    write_between(PAGE, "simulated", simulated_table(json.loads(SIMULATED.read_text())["rows"]))


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "simulated", "page"))
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--start", help="run directory of stage I; {seed} stands for the seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 3, 9], help="of turn-taking")
    parser.add_argument("--threads", type=int, default=2, help="of either phase of turn-taking")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    given = parser.parse_args()
    if given.what == "page":
        write_page(given.benchmark)
    elif given.what == "simulated":
        rows = [simulated(share) for share in LOADS]
        SIMULATED.write_text(json.dumps({"scaling": SCALING, "steps": STEPS, "rounds": ROUNDS, "rows": rows}, indent=1))
        print(simulated_table(rows))
    elif given.start is None:
        parser.error("real needs --start, the run directory of a stage I")
    else:
        for seed in given.seeds:
            start = str(Path(given.start.format(seed=seed)).absolute())
            run_real(start, given.benchmark, seed, arrangements(given.rounds, given.threads), given.runs, REAL)


if __name__ == "__main__":
    main()
