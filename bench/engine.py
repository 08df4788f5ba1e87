"""The student through the whole engine against a bare torch loop over tensors in memory.

    python -m bench.engine --rounds 6 --json engine.json

Both run in the same process, in turns: same network, objective, optimiser, batch, torch threads and affinity. The
engine's step reads through Ray Data, joins pseudo labels from the bank, augments and keeps the average; the bare one
runs objective and optimiser on one batch that lies in memory. Teachers have labelled one round and are idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own, for the length of the measurement

import ray  # noqa: E402
import torch  # noqa: E402

from actors.label_bank import LabelBank  # noqa: E402
from actors.link import ClusterLink, Handles  # noqa: E402
from actors.protocols import StepInfo  # noqa: E402
from actors.student import StageState, Student  # noqa: E402
from actors.teacher import Teacher  # noqa: E402
from actors.weight_board import WeightBoard  # noqa: E402
from pipelines.options import AdaptOptions  # noqa: E402
from pipelines.placement import HEAD  # noqa: E402
from pipelines.setup import Setup, resolve  # noqa: E402


def measure(setup: Setup, handles: Handles, rounds: int, steps: int) -> list[dict[str, float]]:
    """In one process: engine steps and bare steps in turns.

    Returns:
        One row a round: seconds per step of both, and of the engine's parts.
    """
    torch.set_num_threads(setup.options.threads)
    link = ClusterLink(setup.plan, handles, 0, inside_train=False)
    student = Student(setup.plan, link, 0, 1, torch.device("cpu"))
    student.step = setup.plan.stages[0].steps  # straight into self-training
    stage = student._begin(1, None, None)
    assert stage.view is not None
    stage.view.wait_for_round(student.step, lambda: False)
    for _ in range(5):
        student._train_step(stage)
        student.step += 1
    memory = student._batch(stage)
    rows = []
    for _ in range(rounds):
        row = _engine_steps(student, stage, steps)
        began = time.perf_counter()
        for _ in range(steps):
            terms = stage.objective.losses(stage.network, memory, StepInfo(10, 100, 5))
            stage.optimiser.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            stage.optimiser.step()
        row["bare"] = (time.perf_counter() - began) / steps
        row["ratio"] = row["bare"] / row["engine"]
        rows.append(row)
    return rows


def _engine_steps(student: Student, stage: StageState, steps: int) -> dict[str, float]:
    """Whole steps, and what of them went into waiting for data, join and augmentation."""
    before = (student.tally.data_wait, student.tally.join)
    views = {name: stream.view for name, stream in stage.plan.streams.items()}
    spent = {"augment": 0.0}
    for name, stream in stage.plan.streams.items():
        stream.view = _timed(views[name], spent)
    began = time.perf_counter()
    for _ in range(steps):
        student._train_step(stage)
        student.step += 1
    seconds = time.perf_counter() - began
    for name, stream in stage.plan.streams.items():
        stream.view = views[name]
    data, join = student.tally.data_wait - before[0], student.tally.join - before[1]
    return {
        "engine": seconds / steps,
        "data_wait": data / steps,
        "join": join / steps,
        "augment": spent["augment"] / steps,
        "step": (seconds - data - join - spent["augment"]) / steps,
    }


def _timed(view: Any, spent: dict[str, float]) -> Any:
    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = view(*arguments)
        spent["augment"] += time.perf_counter() - began
        return result

    return call


def decode_seconds(setup: Setup, images: int = 20) -> dict[str, float]:
    """Seconds to decode and resize one labelled source image: from its files, and from the cache."""
    split, size = setup.domains.source, setup.preset.stages[1].source_size
    began = time.perf_counter()
    for index in range(images):
        split.image(index, size)
        split.label(index, size)
    files = (time.perf_counter() - began) / images
    for _ in range(2):  # the first pass fills the cache
        began = time.perf_counter()
        for index in range(images):
            setup.cache.get(split.image_paths[index], size, "image", partial(split.image, index, size))
        cached = (time.perf_counter() - began) / images
    return {"files": files, "cache": cached}


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind in a round")
    parser.add_argument("--data", default="data")
    parser.add_argument("--json", default=None)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        setup = resolve(AdaptOptions(refresh="once", data=given.data, runs=folder, name="bench", references="never"))
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, object_store_memory=600_000_000, log_to_driver=False
        )
        board = ray.remote(num_cpus=0)(WeightBoard).remote()
        teacher = ray.remote(num_cpus=0.5)(Teacher).remote(
            setup.plan.network, setup.target_reader, setup.labels, setup.plan.seed, board
        )
        bank = ray.remote(num_cpus=0, max_concurrency=64, resources=HEAD)(LabelBank).remote(
            {stage: plan.for_bank() for stage, plan in setup.labels.items()},
            len(setup.domains.target),
            setup.label_rows(),
            board,
        )
        ray.get(bank.status.remote([teacher]))
        handles = Handles(board, bank, label_rows=setup.label_rows())
        rows = ray.get(ray.remote(num_cpus=1)(measure).remote(setup, handles, given.rounds, given.steps))
        ray.shutdown()
    parts = ("engine", "bare", "data_wait", "join", "augment", "step")
    summary = {name: statistics.median(row[name] for row in rows) for name in parts}
    ratios = sorted(row["ratio"] for row in rows)
    print("milliseconds a step, median of rounds: " + ", ".join(f"{k} {1000 * v:.1f}" for k, v in summary.items()))
    decoding = decode_seconds(setup) if Path(given.data).exists() else {}
    print("decode, ms an image: " + ", ".join(f"{k} {1000 * v:.2f}" for k, v in decoding.items()))
    print(
        f"engine / bare images per second: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )
    if given.json:
        Path(given.json).write_text(json.dumps({"rows": rows, "decode": decoding}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
