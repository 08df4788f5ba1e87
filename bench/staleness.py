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
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.protocols import ImageReader, LabelPlan, RawBatch, Stream, View
from actors.student import Student
from actors.teacher import label_seed, load_weights
from pipelines.blocks import read_block
from pipelines.options import AdaptOptions
from pipelines.results import versions
from pipelines.setup import Setup, resolve
from pipelines.streams import SampleStream, collate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/staleness.json"
PAGE = ROOT / "docs/staleness.md"
PLOT = ROOT / "docs/pictures/staleness.svg"
AGES = ("0", "8", "32", "128", "stage")
KEEP_EVERY = 4
"""Steps between two weights that are kept for labelling."""

Weights = dict[str, np.ndarray]


class DirectStream:
    """A sample stream that is read in this process, when a batch is asked for."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream
        self.view: View = stream.view

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Of the stream."""
        return self.stream.indices(positions)

    def batches(self, position: int, steps: int, batch: int, rank: int, world: int) -> Iterator[RawBatch]:
        """One student's batches."""
        for step in range(steps):
            (files,) = self.stream.blocks(position + step * batch + np.arange(batch), batch)
            table = read_block(files, self.stream.size, self.stream.split.label_encoding, self.stream.cache)
            yield collate(table, self.stream.size)


class Shelf:
    """Takes what the student publishes, and keeps as much as the forced age needs."""

    def __init__(self, age: int | None) -> None:
        self.age = age
        self.versions: deque[tuple[int, Weights]] = deque()
        self.newest: Weights = {}

    def publish(self, version: int, network: nn.Module, *, pin: bool, student: nn.Module | None = None) -> None:
        """Keep a copy."""
        self.newest = {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}
        if self.age is not None or not self.versions:
            self.versions.append((version, self.newest))

    def rewind(self, step: int) -> None:
        """Nothing was published before."""

    def flush(self) -> None:
        """Everything is here at once."""

    def at(self, step: int) -> tuple[int, Weights]:
        """The newest weights that are at least as old as the age; before there are any, the oldest."""
        while self.age is not None and len(self.versions) > 1 and self.versions[1][0] <= step - self.age:
            self.versions.popleft()
        return self.versions[0]


class LabelsOfAge:
    """What a student reads instead of :class:`actors.label_view.LabelView`."""

    def __init__(
        self,
        plan: LabelPlan,
        network: Callable[[], nn.Module],
        reader: ImageReader,
        shelf: Shelf,
        seed: int,
        batch: int,
    ) -> None:
        self.plan, self.reader, self.shelf, self.seed, self.batch = plan, reader, shelf, seed, batch
        self.network = network().eval().requires_grad_(False)
        self.version: int | None = None
        self.histograms = np.zeros((len(reader), plan.rule.num_classes, 256), np.int32)
        self.records: dict[int, dict[str, np.ndarray]] = {}
        self.thresholds: np.ndarray | None = None
        self.ages: Counter[int] = Counter()
        self.hits = self.misses = 0
        self.wait_seconds = 0.0
        for first in range(0, len(reader), batch):
            self._label(range(first, min(first + batch, len(reader))), 0)

    def poll(self, step: int, upcoming: np.ndarray) -> None:
        """Label the images of the coming batch."""
        began = time.perf_counter()
        if self.shelf.age is not None:
            self._label([int(index) for index in upcoming[: self.batch]], step)
        self.wait_seconds += time.perf_counter() - began

    def get(self, index: int, step: int) -> tuple[np.ndarray, float]:
        """See :meth:`actors.label_view.LabelView.get`."""
        assert self.version is not None
        self.hits += 1
        self.ages[step - self.version] += 1
        record = self.records[index]
        if self.plan.selection is None or self.thresholds is None:
            return record[self.plan.label_column], 1.0
        return self.plan.selection.apply(record, self.thresholds), 1.0

    def _label(self, indices: range | list[int], step: int) -> None:
        version, weights = self.shelf.at(step)
        if version != self.version:
            load_weights(self.network, weights)
            self.version = version
        images = [[self.reader.read(index, size) for index in indices] for size in self.plan.rule.view_sizes]
        seeds = [label_seed(self.seed, self.reader.image_ids[index], version) for index in indices]
        made = self.plan.rule.label(self.network, [torch.from_numpy(np.stack(view)) for view in images], seeds)
        for index, item in zip(indices, made, strict=True):
            self.histograms[index] = item.histogram
            self.records[index] = item.columns
        if self.plan.selection is not None:
            self.thresholds = self.plan.selection.thresholds(self.histograms.sum(0, dtype=np.int64))


class AloneLink:
    """The student's link without a cluster."""

    def __init__(self, setup: Setup, age: int | None) -> None:
        self.setup = setup
        self.publisher: Any = Shelf(age)
        self.made: LabelsOfAge | None = None

    def view(self, stage: int, stage_version: int) -> Any:
        """Labels of one age; the stage is self-training."""
        plan = self.setup.labels[stage]
        batch = self.setup.plan.stages[stage].batch
        network, reader = self.setup.plan.network, self.setup.target_reader
        self.made = LabelsOfAge(plan, network, reader, self.publisher, self.setup.plan.seed, batch)
        return self.made

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Nobody reads it."""

    def say(self, message: str, step: int) -> None:
        """To the terminal."""
        print(f"step {step}: {message}", flush=True)

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def bank_index(self) -> dict[str, Any]:
        """There is no bank."""
        return {}

    def report(self, numbers: dict[str, Any]) -> None:
        """Nobody waits."""


def measure(start: str, seed: int, age: int | None, benchmark: str, data: str) -> dict[str, Any]:
    """Self-training with labels of one age; its score and the ages that its labels really had."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        setup = resolve(
            AdaptOptions(
                benchmark=benchmark, seed=seed, init=start, from_stage=2, data=data, runs=folder, references="never"
            )
        )
        (stage,) = setup.plan.stages
        streams: dict[str, Stream] = {
            name: DirectStream(stream) for name, stream in stage.streams.items() if isinstance(stream, SampleStream)
        }
        plan = replace(
            setup.plan,
            stages=(replace(stage, streams=streams),),
            publish_every=KEEP_EVERY,
            evaluate_every=0,
            checkpoint_every=0,
        )
        link = AloneLink(setup, age)
        Student(plan, link, 0, 1, torch.device("cpu")).run()
        assert link.made is not None
        score = setup.make_scorer()(torch.device("cpu")).score(link.publisher.newest)
    score.pop("confusion")
    ages = link.made.ages
    return {
        "age": "stage" if age is None else str(age),
        "benchmark": benchmark,
        "seed": seed,
        "score": score,
        "mean_age": sum(k * n for k, n in ages.items()) / ages.total(),
        "labels_read": ages.total(),
        "steps": stage.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }


def add(path: Path, entry: dict[str, Any]) -> None:
    """Write a result beside the others, unless another process has written it meanwhile."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        if not any(all(e[key] == entry[key] for key in ("age", "seed", "benchmark")) for e in known):
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
    figure.savefig(path, metadata={"Date": None})


def write_page(benchmark: str) -> None:
    """The plot, and the table between the lines of the page that mark it."""
    entries = [e for e in json.loads(RESULTS.read_text()) if e["benchmark"] == benchmark]
    plot(entries, PLOT)
    begin, end = "<!-- staleness -->", "<!-- staleness:end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    PAGE.write_text(f"{before}{begin}\n{table(entries)}\n{end}{rest.split(end)[1]}", encoding="utf-8")


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
