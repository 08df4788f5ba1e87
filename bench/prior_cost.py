"""What adjusting labels costs a teacher, and estimating the target's class frequencies the label bank.

    python -m bench.prior_cost

A teacher labels images of the demo with EPLC's rule in three ways, in turns: as they are, adjusted (IA), and adjusted
while it tells what it sees (live estimation; a source image for every sixteenth target image). The bank takes the
headers of rounds of labels at full size (2,975 images, three to a block of 1024×512), with and without what the
estimate needs: unpickling a header and accepting it is all that it does with a label's content. Medians over rounds in
turns.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipelines import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from actors.label_bank import LabelBook  # noqa: E402
from actors.label_rounds import Header  # noqa: E402
from actors.labeller import Labeller  # noqa: E402
from actors.prior_estimate import CELLS, METHODS, SOURCE_EVERY, Adjustment, Evidence, PriorPlan  # noqa: E402
from actors.protocols import LabelPlan, RuleShape  # noqa: E402
from actors.records import RecordLayout  # noqa: E402
from actors.staleness import StalenessPolicy  # noqa: E402
from bench.command_runs import ROOT  # noqa: E402
from pipelines.options import AdaptOptions  # noqa: E402
from pipelines.results import versions  # noqa: E402
from pipelines.setup import resolve  # noqa: E402

RESULTS = ROOT / "docs/results/prior-cost.json"
CLASSES, IMAGES, ROWS = 19, 2_975, 3
RATE = 1_000
"""Records a second."""
LABELLED = 32


def teacher(data: str, rounds: int) -> dict[str, list[float]]:
    """Seconds an image of labelling in the three ways."""
    options = AdaptOptions(adjust_prior="estimated", refresh="continuous", references="never", name="cost", data=data)
    setup = resolve(options)
    ((stage, plan),) = setup.labels.items()
    made = Labeller(setup.plan.networks, setup.target_reader, {stage: plan}, 0, torch.device("cpu"))
    made.version = 1
    offset = np.linspace(-1.0, 1.0, CLASSES).astype(np.float32)
    ways = {"as they are": None, "adjusted": Adjustment(offset), "adjusted, and told of": Adjustment(offset, True)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, adjustment in ways.items():
            began = time.perf_counter()
            made.label(stage, 0, 0, LABELLED, 1, adjustment)
            if number:  # the first one fills caches
                found[name].append((time.perf_counter() - began) / LABELLED)
    return found


def headers(plan: PriorPlan | None) -> list[bytes]:
    """A round of headers as they come over the wire."""
    rng = np.random.default_rng(0)
    made = []
    for chunk, start in enumerate(range(0, IMAGES, ROWS)):
        rows = min(ROWS, IMAGES - start)
        histogram = rng.integers(0, 1_000, (CLASSES, 256))
        told = None
        if plan is not None:
            probabilities = rng.dirichlet(np.ones(CLASSES), rows).astype(np.float32)
            cells = rng.integers(0, 256, (rows, CELLS, CLASSES), np.uint8)
            source = rng.random((CLASSES, CLASSES)) + 10 * np.eye(CLASSES) if start % SOURCE_EVERY < ROWS else None
            told = plan.part(Evidence(np.log1p(probabilities), cells, probabilities, source), np.array(plan.source))
        made.append(pickle.dumps(Header(chunk, 1, rows, 0.1, histogram.sum(1), histogram, (), told)))
    return made


def bank(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the bank for 1,000 records, without an estimate and with each method's."""
    shape = RuleShape(RecordLayout((("label", (512, 1024)), ("confidence", (512, 1024))), CLASSES), CLASSES)
    flat = tuple([1 / CLASSES] * CLASSES)

    plans: dict[str, PriorPlan | None] = {"none": None}
    for method in METHODS:
        plans[method] = PriorPlan(flat, method=method, presence=flat)
    coming = {name: headers(plan) for name, plan in plans.items()}
    books = {
        name: LabelBook(IMAGES, ROWS, LabelPlan(shape, StalenessPolicy("continuous"), prior=plan))
        for name, plan in plans.items()
    }
    found: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(rounds + 1):
        for name, seconds in found.items():
            seconds_of_round = _cpu(partial(_accept, books[name], coming[name]))
            if number:
                seconds.append(seconds_of_round * RATE / IMAGES)
    return found


def _accept(book: LabelBook, coming: list[bytes]) -> None:
    for item in coming:
        book.accept(pickle.loads(item), None)


def _cpu(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--data", default="data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    labelling, accepting = teacher(given.data, given.rounds), bank(given.rounds)
    plain = labelling["as they are"]
    ratios = {
        name: summary([a / b for a, b in zip(values, plain, strict=True)])
        for name, values in labelling.items()
        if name != "as they are"
    }
    cores = {
        name: summary([a - b for a, b in zip(values, accepting["none"], strict=True)])
        for name, values in accepting.items()
        if name != "none"
    }
    found = {
        "labelling, seconds an image": {name: summary(values) for name, values in labelling.items()},
        "labelling, ratio": ratios,
        f"bank, CPU seconds a second at {RATE} records/s": {n: summary(v) for n, v in accepting.items()},
        "bank, added share of a core": cores,
        "rounds": given.rounds,
        "versions": versions(),
    }
    given.results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "versions"}, indent=1))


if __name__ == "__main__":
    main()
