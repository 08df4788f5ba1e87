"""How the label path scales with its teachers, and where it stops.

    python -m bench.label_scaling --json docs/results/label-scaling.json

Bank, board and view are the engine's own; teachers sleep where they would compute, and a student that only sleeps reads
all the while and publishes weights so often that no teacher ever waits for new ones.

**Efficiency** of M teachers is labels/s ÷ (M × labels/s of one), within one round of measurements; rounds repeat all M
in turn. A sleeping teacher still encodes its labels and writes them to the object store, so what is lost at many
teachers is lost to the bank, to Ray, or to the cores of the machine; the processor time of each is given beside. Few
teachers are watched for longer, since a block more or less would show in them. On a virtual machine a measurement in
which the host took more than a twentieth of its cores away (``stolen_cores``) is made again, three times at most.

**Where it stops**: teachers that do not sleep at all, at three sizes of record. ``bank_ms_a_call`` is processor time of
the bank's process for one block: its event loop is full at 1000 ÷ that many blocks a second, whatever else is idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own, for the length of the measurement

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import ray  # noqa: E402

from actors.label_bank import LabelBank  # noqa: E402
from actors.label_rounds import Header  # noqa: E402
from actors.label_view import LabelView, Transport  # noqa: E402
from actors.prior_estimate import Adjustment  # noqa: E402
from actors.protocols import LabelPlan, RuleShape  # noqa: E402
from actors.records import RecordLayout, encode  # noqa: E402
from actors.staleness import StalenessPolicy  # noqa: E402
from actors.weight_board import WeightBoard  # noqa: E402
from pipelines.results import commit  # noqa: E402

TEACHERS = (1, 2, 4, 8, 16)
CLASSES = 19
LOOK_AHEAD_BATCHES = 8
WARM_SECONDS = 1.5
STORE_BYTES = 3_000_000_000
STOLEN_SHARE = 0.05
TRIES = 3
"""Of a measurement that the host of a virtual machine disturbs."""


@dataclass(frozen=True)
class Load:
    """What is simulated.

    Attributes:
        height, width: of a label; a record is a label and a confidence, so twice as many bytes.
        images: in the target split.
        image_seconds: what a teacher sleeps for an image.
        batch, step_seconds: of the student that reads.
        publish_seconds: between two published weights; shorter than a round of all teachers takes.
        at_least_blocks: in a round.
    """

    height: int
    width: int
    images: int
    image_seconds: float
    batch: int = 4
    step_seconds: float = 0.1
    publish_seconds: float = 0.5
    at_least_blocks: int = 4 * TEACHERS[-1]

    @property
    def layout(self) -> RecordLayout:
        """Of the records."""
        shape = (self.height, self.width)
        return RecordLayout((("label", shape), ("confidence", shape)), CLASSES)

    @property
    def rows(self) -> int:
        """Images in a block, as the engine chooses them for the largest number of teachers."""
        return self.layout.rows_per_block(self.images, self.at_least_blocks)

    def plan(self) -> LabelPlan:
        """For bank and view."""
        return LabelPlan(RuleShape(self.layout, CLASSES), StalenessPolicy("continuous"))


REALISTIC = {
    "1024×512": Load(512, 1024, 256, image_seconds=0.1),
    "256×128": Load(128, 256, 1024, image_seconds=0.0125, batch=8, step_seconds=0.05),
}
"""0.1 s an image is a fast GPU at 1024×512; 0.0125 s was measured for the demo's network on two cores."""
WITHOUT_COMPUTE = {
    "1024×512": Load(512, 1024, 256, image_seconds=0.0, publish_seconds=0.1),
    "256×128": Load(128, 256, 2048, image_seconds=0.0, batch=8, step_seconds=0.05, publish_seconds=0.1),
    "64×32, a block each": Load(32, 64, 1024, 0.0, step_seconds=0.05, publish_seconds=0.1, at_least_blocks=1024),
}


class SleepingTeacher:
    """Answers the bank as :class:`actors.teacher.Teacher` does; its labels show nothing but their version."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.version: int | None = None

    def prepare(self, load: Load) -> None:
        """Label for another load from now on."""
        self.load = load
        self.images = [np.full((load.height, load.width), c, np.uint8) for c in range(CLASSES)]
        self.confidence = np.full((load.height, load.width), 200, np.uint8)

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
            try:
                self.version = int(ray.get(ray.get(self.board.take.remote(version))[0])[0])
            except ray.exceptions.RayTaskError:  # gone: a newer one hangs
                self.version = version
        began, load, rows = time.perf_counter(), self.load, stop - start
        if load.image_seconds:
            time.sleep(load.image_seconds * rows)
        mark = version % CLASSES
        pixels = np.zeros(CLASSES, np.int64)
        pixels[mark] = load.height * load.width
        block = encode(
            load.layout,
            [f"image_{i}" for i in range(start, stop)],
            [{"label": self.images[mark], "confidence": self.confidence}] * rows,
            [pixels] * rows,
            weights_version=version,
            made_at_step=max(step, version),
        )
        histogram = np.zeros((CLASSES, 256), np.int64)
        histogram[:, 200] = rows * pixels
        return Header(chunk, version, rows, time.perf_counter() - began, rows * pixels, histogram), block

    def cpu_seconds(self) -> float:
        """Processor time of this process."""
        return time.process_time()


class MeasuredBank(LabelBank):
    """The bank, and what it costs."""

    async def mark(self) -> dict[str, float]:
        """Where it stands."""
        counters = self.counters
        return {
            "seconds": time.monotonic(),
            "labels": counters.images,
            "calls": counters.blocks,
            "cpu": time.process_time(),
            "failures": counters.failures + counters.lost_blocks,
        }


class SleepingStudent:
    """Publishes, polls and reads as :class:`actors.student.Student` does, and sleeps instead of training."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.step = 0

    def run(self, load: Load, bank: Any, seconds: float) -> dict[str, Any]:
        """Read for some seconds, in random order."""
        rng = np.random.default_rng(0)
        first = self.step = self.step + 1
        view = LabelView(load.plan(), (load.height, load.width), load.rows, 0, first, Transport(bank))
        order = np.empty(0, np.int64)
        polls: list[float] = []
        wrong, ends, publishes = 0, time.monotonic() + seconds, 0.0
        cpu = time.process_time()
        while time.monotonic() < ends:
            self.step += 1
            if time.monotonic() >= publishes:
                publishes = time.monotonic() + load.publish_seconds
                self.board.publish.remote(self.step, [ray.put(np.full(10_000, self.step))])
            if len(order) <= LOOK_AHEAD_BATCHES * load.batch:
                order = np.concatenate([order, rng.permutation(load.images)])
            asked = time.perf_counter()
            view.poll(self.step, order[: LOOK_AHEAD_BATCHES * load.batch])
            polls.append(time.perf_counter() - asked)
            batch, order = order[: load.batch], order[load.batch :]
            labels = np.stack([view.get(int(index), self.step)[0] for index in batch])
            for index, label in zip(batch, labels, strict=True):
                held = view.local.get(int(index) // load.rows)
                wrong += int(label[0, 0] != (255 if held is None else held.version % CLASSES))
            time.sleep(load.step_seconds)
        return {
            "wrong": wrong,
            "poll_ms_p95": 1000 * float(np.percentile(polls, 95)),
            "student_cores": (time.process_time() - cpu) / seconds,
        }


class Engine:
    """A cluster of one node with all teachers in it."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="t")  # short: the paths of Ray's sockets are limited
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _temp_dir=self.folder,
            log_to_driver=False,
        )
        self.board = ray.remote(num_cpus=0)(WeightBoard).remote()
        teacher = ray.remote(num_cpus=0, max_task_retries=0)(SleepingTeacher)
        self.teachers = [teacher.remote(self.board) for _ in range(TEACHERS[-1])]
        self.student = ray.remote(num_cpus=0)(SleepingStudent).remote(self.board)
        ray.get([t.cpu_seconds.remote() for t in self.teachers])

    def close(self) -> None:
        """Leave nothing behind."""
        ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def measure(self, load: Load, count: int, seconds: float) -> dict[str, Any]:
        """One load with some of the teachers."""
        ray.get([t.prepare.remote(load) for t in self.teachers])
        bank = ray.remote(num_cpus=0, max_concurrency=64)(MeasuredBank).remote(
            {0: load.plan()}, load.images, {0: load.rows}, self.board
        )
        chosen = self.teachers[:count]
        ray.get(bank.status.remote(chosen))
        reading = self.student.run.remote(load, bank, WARM_SECONDS + seconds)
        time.sleep(WARM_SECONDS)
        machine, stolen = _busy_seconds()
        cpu = sum(ray.get([t.cpu_seconds.remote() for t in chosen])) if load.image_seconds == 0 else 0.0
        begin = ray.get(bank.mark.remote())
        time.sleep(seconds)
        end = ray.get(bank.mark.remote())
        busy_then, stolen_then = _busy_seconds()
        machine, stolen = (busy_then - machine) / seconds, (stolen_then - stolen) / seconds
        read = ray.get(reading)
        ray.kill(bank)
        if load.image_seconds == 0:  # the answer waits behind calls under way, which sleeping teachers would count
            cpu = (sum(ray.get([t.cpu_seconds.remote() for t in chosen])) - cpu) / seconds
        elapsed, calls = end["seconds"] - begin["seconds"], end["calls"] - begin["calls"]
        rate = (end["labels"] - begin["labels"]) / elapsed
        bank_cpu = end["cpu"] - begin["cpu"]
        return {
            "teachers": count,
            "records_per_s": rate,
            "mb_per_s": rate * load.layout.row_bytes / 1e6,
            "calls_per_s": calls / elapsed,
            "bank_cores": bank_cpu / elapsed,
            "bank_ms_a_call": 1000 * bank_cpu / max(1, calls),
            "machine_cores": machine,
            "stolen_cores": stolen,
            **({} if load.image_seconds else {"teacher_cores": cpu}),
            "failures": end["failures"],
            **read,
        }


def _busy_seconds() -> tuple[float, float]:
    """Seconds that all cores have worked, and that the host of a virtual machine has kept from them, by the kernel."""
    fields = [int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, interrupt, soft, stolen = fields[:8]
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupt + soft) / tick, stolen / tick


def undisturbed(engine: Engine, load: Load, count: int, seconds: float) -> dict[str, Any]:
    """A measurement, made again while the machine was not ours; of several tries the least disturbed."""
    tries = []
    for _ in range(TRIES):
        tries.append(engine.measure(load, count, seconds))
        if tries[-1]["stolen_cores"] <= STOLEN_SHARE * (os.cpu_count() or 1):
            break
    return min(tries, key=lambda m: float(m["stolen_cores"])) | {"tries": len(tries)}


def scaling(engine: Engine, load: Load, rounds: int, seconds: float) -> dict[str, Any]:
    """Efficiency by number of teachers: median, smallest and largest over the rounds, each against its own M = 1."""
    found = []
    for number in range(rounds):
        found.append([undisturbed(engine, load, count, seconds * max(1, 4 // count)) for count in TEACHERS])
        print(f"  round {number + 1}: " + ", ".join(f"{m['teachers']}: {m['records_per_s']:.1f}/s" for m in found[-1]))
    efficiency = {}
    for at, count in enumerate(TEACHERS):
        shares = [one[at]["records_per_s"] / (count * one[0]["records_per_s"]) for one in found]
        efficiency[str(count)] = {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}
    return {"load": asdict(load) | {"rows": load.rows}, "efficiency": efficiency, "rounds": found}


def stop(engine: Engine, load: Load, rounds: int, seconds: float) -> dict[str, Any]:
    """Throughput of teachers that do not compute; of every number of them the round with the median rate."""
    found = {}
    for count in TEACHERS:
        measured = sorted(
            (undisturbed(engine, load, count, seconds) for _ in range(rounds)), key=lambda m: float(m["records_per_s"])
        )
        found[str(count)] = measured[len(measured) // 2] | {"all_records_per_s": [m["records_per_s"] for m in measured]}
    return {"load": asdict(load) | {"rows": load.rows}, "by_teachers": found}


def show(name: str, found: dict[str, Any]) -> None:
    """Print the figures of one load."""
    print(name)
    for count, share in found.get("efficiency", {}).items():
        last = found["rounds"][-1][TEACHERS.index(int(count))]
        print(
            f"  {count:>2} teachers: {share['median']:.1%} ({share['min']:.1%} to {share['max']:.1%}); last round "
            f"{last['records_per_s']:.1f} records/s, {last['mb_per_s']:.1f} MB/s; cores: bank "
            f"{last['bank_cores']:.2f}, machine {last['machine_cores']:.2f}, stolen {last['stolen_cores']:.2f}; "
            f"poll p95 {last['poll_ms_p95']:.1f} ms, wrong {last['wrong']}"
        )
    for count, one in found.get("by_teachers", {}).items():
        print(
            f"  {count:>2} teachers: {one['records_per_s']:.0f} records/s, {one['mb_per_s']:.0f} MB/s, "
            f"{one['calls_per_s']:.0f} calls/s; cores: bank {one['bank_cores']:.2f}, teachers "
            f"{one['teacher_cores']:.2f}, machine {one['machine_cores']:.2f}; {one['bank_ms_a_call']:.2f} ms of the "
            f"bank a call; poll p95 {one['poll_ms_p95']:.1f} ms; {one['failures']} failures, {one['wrong']} wrong"
        )


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of one measurement; more with few teachers")
    parser.add_argument("--only", choices=("scaling", "stop"), default=None)
    parser.add_argument("--json", default=None, help="file to write; what it has of the other part stays")
    given = parser.parse_args(arguments)
    engine = Engine()
    results: dict[str, Any] = {}
    try:
        for part, measure, loads in (("scaling", scaling, REALISTIC), ("stop", stop, WITHOUT_COMPUTE)):
            if given.only not in (None, part):
                continue
            results[part] = {"commit": commit(), "cores": os.cpu_count(), "seconds": given.seconds}
            for name, load in loads.items():
                results[part][name] = measure(engine, load, given.rounds, given.seconds)
                show(f"{part}, {name}", results[part][name])
    finally:
        engine.close()
    if given.json:
        path = Path(given.json)
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(before | results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
