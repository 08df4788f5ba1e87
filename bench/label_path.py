"""The label path alone: how old the labels are that a student reads, and what the object store holds meanwhile.

    python -m bench.label_path --json label_path.json

Bank, board and view are the engine's own, on two simulated nodes: boards and student on the first, teachers on the
second. Teachers and student only sleep where they would compute. The student publishes weights every *refresh* steps
and in between visits every image once in a new random order; the teachers label every image once with each version.

**How age is counted.** A label's age is the student's step minus the version that made it. Teachers need time, so the
labels of a version cannot all exist when it is published, but only a *round* later: images × measured seconds of a
teacher's work on one image ÷ teachers ÷ measured seconds of a step. The path (bank, store, other node, view) gets no
allowance at all. A read is **fresh** when the age, counted from the step at which all labels of that version could
exist, is at most one refresh:

    step − (version + round) ≤ refresh,

which says that the student read the newest version whose round could be complete, or a newer one. Beside it stand
the plain ages, and the share of reads that are no older than one refresh from publication on. The latter cannot
exceed 1 − round / (2 · refresh), however fast the path is.

**The object store** is sampled, node by node, against the number of blocks that were labelled again, in units of one
round of labels (eight times the images, so that many blocks make a round, as at full size). It holds what the bank
believes live, what the view still serves, and what nobody refers to any more but Ray has not removed yet: it does so
once in ``free_ms``, so labels made faster than a round in a few seconds stand beside their forerunners.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines import environment

environment.prepare()
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own, for the length of the measurement

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import ray  # noqa: E402
from ray._private.internal_api import node_stats  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from actors.label_bank import LabelBank  # noqa: E402
from actors.label_rounds import Header  # noqa: E402
from actors.label_view import LabelView, Transport  # noqa: E402
from actors.prior_estimate import Adjustment  # noqa
from actors.protocols import LabelPlan, RuleShape  # noqa: E402
from actors.records import RecordLayout, encode  # noqa: E402
from actors.staleness import StalenessPolicy, age_statistics  # noqa: E402
from actors.weight_board import WeightBoard  # noqa: E402

HEAD = {"node:__internal_head__": 0.001}
LOOK_AHEAD_BATCHES = 8
CLASSES = 8
MEMORY_SAMPLE_SECONDS = 0.05
STORE_STEP_SECONDS = 0.009


@dataclass(frozen=True)
class Load:
    """What is simulated.

    Attributes:
        nodes: 1, or 2 with the teachers on a node of their own.
        images: in the target split.
        height, width: of a label; a record is a label and a confidence, so twice as many bytes.
        batch: images in a step.
        refreshes: how often weights are published.
        step_seconds: of a student's step.
        round_share: part of a refresh that the teachers need for one round.
        teachers: their number.
        free_ms: how often a node removes blocks that nobody refers to any more; 1000 is Ray's default.
    """

    nodes: int = 2
    images: int = 256
    height: int = 128
    width: int = 256
    batch: int = 4
    refreshes: int = 12
    step_seconds: float = 0.03
    round_share: float = 0.75
    teachers: int = 2
    free_ms: int = 1000

    @property
    def layout(self) -> RecordLayout:
        """Of the records."""
        shape = (self.height, self.width)
        return RecordLayout((("label", shape), ("confidence", shape)), CLASSES)

    @property
    def rows(self) -> int:
        """Images in a block, as the engine chooses them."""
        return self.layout.rows_per_block(self.images, 4 * self.teachers)

    @property
    def blocks(self) -> int:
        """Blocks in a round."""
        return -(-self.images // self.rows)

    @property
    def refresh(self) -> int:
        """Steps between two published weights: every image is visited once."""
        return -(-self.images // self.batch)

    @property
    def round_bytes(self) -> int:
        """Bytes of one round of labels."""
        return self.images * self.layout.row_bytes

    @property
    def image_seconds(self) -> float:
        """What a teacher sleeps for one image."""
        return self.round_share * self.refresh * self.step_seconds * self.teachers / self.images

    def plan(self) -> LabelPlan:
        """For bank and view."""
        return LabelPlan(RuleShape(self.layout, CLASSES), StalenessPolicy("continuous"))

    def mark(self, version: int) -> int:
        """The class at the first pixel of every label of a version."""
        return (version // self.refresh) % CLASSES


class SleepingTeacher:
    """Answers the bank as :class:`actors.teacher.Teacher` does; its labels show nothing but their version."""

    def __init__(self, load: Load, board: Any) -> None:
        self.load, self.board = load, board
        self.version: int | None = None

    def label(
        self,
        stage: int,
        chunk: int,
        start: int,
        stop: int,
        version: int,
        step: int,
        adjustment: Adjustment | None = None,
    ) -> tuple[Header, pa.Table]:
        """Label one chunk with one version of the weights."""
        if version != self.version:
            reference = ray.get(self.board.take.remote(version))[0]
            self.version = int(ray.get(reference)[0])
            assert self.version == version
        began, load, rows = time.perf_counter(), self.load, stop - start
        time.sleep(load.image_seconds * rows)
        stripes = (np.arange(load.height * load.width) + load.mark(version)) % CLASSES
        label = stripes.astype(np.uint8).reshape(load.height, load.width)
        columns = {"label": label, "confidence": np.full_like(label, 200)}
        pixels = np.bincount(label.reshape(-1), minlength=CLASSES)
        block = encode(
            load.layout,
            [f"image_{i}" for i in range(start, stop)],
            [columns] * rows,
            [pixels] * rows,
            weights_version=version,
            made_at_step=max(step, version),
        )
        histogram = np.zeros((CLASSES, 256), np.int64)
        histogram[:, 200] = rows * pixels
        return Header(chunk, version, rows, time.perf_counter() - began, rows * pixels, histogram), block


@dataclass
class Reads:
    """What a student saw from the second refresh on. Arrays hold one value a read.

    Attributes:
        steps, versions: when, and which version; -1 where there was no label.
        step_seconds: mean over all steps.
        poll_seconds: one value a step.
        wrong: reads whose pixels were not of the version that the view believed them to be.
        lost: blocks that could not be read.
    """

    steps: np.ndarray
    versions: np.ndarray
    step_seconds: float
    poll_seconds: np.ndarray
    wrong: int
    lost: int


class SleepingStudent:
    """Publishes, polls and reads as :class:`actors.student.Student` does, and sleeps instead of training."""

    def __init__(self, load: Load, board: Any, bank: Any) -> None:
        self.load, self.board = load, board
        shape = (load.height, load.width)
        self.view = LabelView(load.plan(), shape, load.rows, 0, 0, Transport(bank))

    def run(self, seed: int = 0) -> Reads:
        """All refreshes, from the first complete round on."""
        load, view = self.load, self.view
        self._publish(0)
        view.wait_for_round(0, lambda: False)
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(load.images) for _ in range(load.refreshes + 1)])
        steps: list[int] = []
        versions: list[int] = []
        polls: list[float] = []
        wrong, began = 0, time.perf_counter()
        for step in range(load.refresh * load.refreshes):
            if step and step % load.refresh == 0:
                self._publish(step)
            position = step * load.batch
            asked = time.perf_counter()
            view.poll(step, order[position : position + LOOK_AHEAD_BATCHES * load.batch])
            polls.append(time.perf_counter() - asked)
            batch = order[position : position + load.batch]
            labels = np.stack([view.get(int(index), step)[0] for index in batch])
            for index, label in zip(batch, labels, strict=True):
                held = view.local.get(int(index) // load.rows)
                version = -1 if held is None else held.version
                wrong += int(label[0, 0] != (255 if held is None else load.mark(version)))
                if step >= load.refresh:
                    steps.append(step)
                    versions.append(version)
            time.sleep(load.step_seconds)
        seconds = (time.perf_counter() - began) / (load.refresh * load.refreshes)
        return Reads(np.array(steps), np.array(versions), seconds, np.array(polls), wrong, view.lost)

    def _publish(self, version: int) -> None:
        self.board.publish.remote(version, [ray.put(np.full(10_000, version))])


@contextmanager
def simulated_nodes(load: Load) -> Iterator[None]:
    """One or two nodes on this machine, each with an object store of its own; nothing else on it hears of them."""
    folder = tempfile.mkdtemp(prefix="n")  # short: the paths of Ray's sockets are limited
    store = max(100_000_000, 4 * load.round_bytes)
    # Else every ray.init() on this machine would join this cluster.
    alone = mock.patch("ray._private.utils.write_ray_address")
    settings = mock.patch.dict(os.environ, {"RAY_free_objects_period_milliseconds": str(load.free_ms)})
    with alone, settings:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "object_store_memory": store,
                "include_dashboard": False,
                "temp_dir": folder,
                "resources": {} if load.nodes > 1 else {"teaching": 100},
            },
        )
        try:
            if load.nodes > 1:
                cluster.add_node(num_cpus=4, object_store_memory=store, temp_dir=folder, resources={"teaching": 100})
            ray.init(address=cluster.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def store_bytes() -> dict[str, int]:
    """Bytes that the object store of every node holds, pinned or not."""
    used = {}
    for node in ray.nodes():
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        name = "student" if "node:__internal_head__" in node["Resources"] else "teachers"
        used[name] = int(stats.store_stats.object_store_bytes_used)
    return used


def measure(load: Load) -> dict[str, Any]:
    """Run one load on nodes of its own.

    Returns:
        Figures of the reads, of the path, and of the stores (in rounds of labels).
    """
    with simulated_nodes(load):
        board = ray.remote(num_cpus=0, resources=HEAD)(WeightBoard).remote()
        bank = ray.remote(num_cpus=0, max_concurrency=64, resources=HEAD)(LabelBank).remote(
            {0: load.plan()}, load.images, {0: load.rows}, board
        )
        teacher = ray.remote(num_cpus=0, max_task_retries=0, resources={"teaching": 1})(SleepingTeacher)
        teachers = [teacher.remote(load, board) for _ in range(load.teachers)]
        ray.get(bank.status.remote(teachers))
        student = ray.remote(num_cpus=0, resources=HEAD)(SleepingStudent).remote(load, board, bank)
        running = student.run.remote()
        samples: list[tuple[int, dict[str, int]]] = []
        while not ray.wait([running], timeout=MEMORY_SAMPLE_SECONDS)[0]:
            status = ray.get(bank.status.remote())
            if status and status["coverage"] == 1.0:
                samples.append((status["labels_made"] // load.rows, store_bytes()))
        reads: Reads = ray.get(running)
        status = ray.get(bank.status.remote())
    busy = (1 - status["idle_share"]) * load.teachers / status["images_per_s"]  # seconds of one teacher for an image
    return {
        "load": {**asdict(load), "refresh": load.refresh, "rows": load.rows, "round_bytes": load.round_bytes},
        **freshness(reads, load, busy),
        "failed_calls": status["teacher_failures"],
        "store": store_figures(samples, load),
    }


def freshness(reads: Reads, load: Load, image_seconds: float) -> dict[str, Any]:
    """Shares of fresh reads and the distribution of ages; see the module's docstring for the definitions.

    Args:
        reads: of the student.
        load: that was simulated.
        image_seconds: measured seconds of a teacher's work on one image.
    """
    round_steps = load.images * image_seconds / load.teachers / reads.step_seconds
    found = reads.versions >= 0
    ages = reads.steps - reads.versions
    fresh = found & (ages - round_steps <= load.refresh)
    return {
        "reads": len(ages),
        "fresh_share": float(fresh.mean()),
        "no_older_than_a_refresh_from_publication": float((found & (ages <= load.refresh)).mean()),
        "at_most": 1 - round_steps / load.refresh * (1 + load.teachers / load.blocks) / 2,
        "missing": int((~found).sum()),
        "wrong": reads.wrong,
        "lost": reads.lost,
        "age_steps": age_statistics(Counter(ages[found].tolist())),
        "age_refreshes_percentiles": {
            str(q): round(float(np.percentile(ages[found] / load.refresh, q)), 3) for q in (5, 25, 50, 75, 95, 99, 100)
        },
        "round_steps": round_steps,
        "round_share": round_steps / load.refresh,
        "step_ms": 1000 * reads.step_seconds,
        "poll_ms": {str(q): round(1000 * float(np.percentile(reads.poll_seconds, q)), 3) for q in (50, 95, 99, 100)},
        "poll_share": float(reads.poll_seconds.mean()) / reads.step_seconds,
    }


def store_figures(samples: list[tuple[int, dict[str, int]]], load: Load) -> dict[str, Any]:
    """By node: rounds of labels that its store held, at most and along the way."""
    again = [blocks - load.blocks for blocks, _ in samples]
    marks = [n for n in (0, 100, 200, 500, 750, 1000) if again and n <= again[-1]]
    result: dict[str, Any] = {"samples": len(samples), "blocks_labelled_again": again[-1] if again else 0}
    for node in samples[0][1] if samples else ():
        rounds = np.array([used[node] for _, used in samples]) / load.round_bytes
        result[node] = {
            "max": round(float(rounds.max()), 3),
            "p95": round(float(np.percentile(rounds, 95)), 3),
            "median": round(float(np.median(rounds)), 3),
            "first_half_median": round(float(np.median(rounds[: -(-len(rounds) // 2)])), 3),
            "second_half_median": round(float(np.median(rounds[len(rounds) // 2 :])), 3),
            "after": {str(n): round(float(rounds[int(np.searchsorted(again, n))]), 3) for n in marks},
        }
    return result


def show(name: str, found: dict[str, Any]) -> None:
    """Print the figures of one load."""
    load, store = found["load"], found["store"]
    print(
        f"{name}: {load['nodes']} node(s), {load['images']} images in blocks of {load['rows']}, {load['teachers']} "
        f"teachers, a round takes {found['round_share']:.2f} of a refresh of {load['refresh']} steps of "
        f"{found['step_ms']:.1f} ms"
    )
    print(
        f"  fresh {found['fresh_share']:.2%} of {found['reads']} reads; no older than a refresh from publication "
        f"{found['no_older_than_a_refresh_from_publication']:.2%} (at most {found['at_most']:.2%}); "
        f"missing {found['missing']}, wrong {found['wrong']}, lost {found['lost']}"
    )
    print(f"  age in steps {found['age_steps']}; in refreshes, by percentile {found['age_refreshes_percentiles']}")
    print(f"  poll, ms, by percentile {found['poll_ms']}; {found['poll_share']:.2%} of the time")
    print(f"  store, rounds of labels, over {store['blocks_labelled_again']} blocks labelled again:")
    for node in ("student", "teachers"):
        if node in store:
            where = "all" if load["nodes"] == 1 else node
            print(f"    {where}: {store[node]}")


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--teachers", type=int, default=2)
    parser.add_argument("--refreshes", type=int, default=12, help="of the freshness measurement")
    parser.add_argument(
        "--round-share", type=float, default=0.75, help="part of a refresh that a round of labels takes"
    )
    parser.add_argument("--relabellings", type=int, default=1000, help="blocks of the object-store measurement")
    parser.add_argument("--free-ms", type=int, default=1000, help="see Load; of the object-store measurement")
    parser.add_argument("--only", choices=("freshness", "store"), default=None)
    parser.add_argument("--json", default=None)
    given = parser.parse_args(arguments)
    load = Load(images=given.images, teachers=given.teachers, refreshes=given.refreshes, round_share=given.round_share)
    loads = {} if given.only == "store" else {"freshness": load}
    if given.only != "freshness":
        large = replace(load, images=8 * given.images, step_seconds=STORE_STEP_SECONDS, free_ms=given.free_ms)
        large = replace(large, refreshes=2 + -(-given.relabellings // large.blocks))
        loads |= {"store, one node": replace(large, nodes=1), "store, two nodes": large}
    results = {}
    for name, wanted in loads.items():
        results[name] = measure(wanted)
        show(name, results[name])
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
