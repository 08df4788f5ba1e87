"""What a run does when nodes of its cluster are lost and join: how soon it notices, how soon it is whole again.

    python -m bench.cluster_life --json docs/results/cluster-life.json
    python -m bench.cluster_life --elastic --json docs/results/cluster-elastic.json
    python -m bench.cluster_life --preset tiny --steps 300        # to try it

A head, a node for the student and two for teachers run on this machine as Ray nodes of their own
(:mod:`bench.simulated_cluster`), and `run.py` on them as on any cluster. In the middle of self-training

1. a teacher's node is killed (every process of it at once),
2. a node for a teacher joins, as when a cloud has replaced the lost one,
3. the student's node is killed, and a new one joins at once.

With `--elastic` two students run on nodes of their own and may go on as one (`--min-students 1`): one node is killed,
and the run goes on with the other; a node joins, and there are two again.

**Noticed** is when the run says so or a number of it shows it; **whole again** when as many teachers label as before,
and for the student when it has taken a step that it had not taken before. Both are counted from the kill or from the
join, in seconds. What a teacher's loss costs the student is looked at in its own lines: steps that it took twice, the
longest time between two lines, and its share of time spent waiting for labels, before and after. Ray's health checks
find a dead node after about three seconds here; with Ray's own settings they need about half a minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()
os.environ["RAY_AUTH_MODE"] = "disabled"  # a cluster of our own, for the length of the measurement

from bench.simulated_cluster import Nodes, SimulatedCluster, simulated  # noqa: E402
from pipelines.placement import STUDENT_NODE, TEACHER_NODE  # noqa: E402
from pipelines.results import commit  # noqa: E402

TEACHERS = 2


class WatchedRun:
    """`run.py` on a cluster, and what its metrics say."""

    def __init__(self, cluster: SimulatedCluster, folder: Path, arguments: list[str]) -> None:
        self.folder = folder / "run"
        self._lines: list[dict[str, Any]] = []
        self._read = 0
        self.log = folder / "run.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "run.py", "--address", cluster.address, "--teachers", str(TEACHERS)),
                    *("--references", "never", "--runs", str(folder), "--name", "run", *arguments),
                ],
                env=cluster.environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Those of a kind so far."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
            self._read += len(whole + end)
            self._lines += [json.loads(line) for line in whole.splitlines()]
        return [line for line in self._lines if line["kind"] == kind]

    def step(self) -> int:
        """The student's."""
        return max((line["step"] for line in self.lines("train")), default=0)

    def ended(self) -> bool:
        """Whether the process has."""
        return self.process.poll() is not None

    def reaches(self, step: int) -> None:
        """Wait for a step.

        Raises:
            RuntimeError: the run ended before.
        """
        while self.step() < step:
            if self.ended():
                raise RuntimeError(f"the run ended before step {step}: {self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def students(self) -> int:
        """How many there are, by the newest word of one."""
        told = [line["students"] for line in self.lines("student") if "students" in line]  # by the first of them alone
        return int(told[-1]) if told else 0

    def told_after(self, moment: float, words: str) -> float | None:
        """Seconds from a moment to the first message with these words."""
        found = [line["time"] for line in self.lines("event") if line["time"] > moment and words in line["message"]]
        return round(found[0] - moment, 1) if found else None

    def labelling_again(self, lost: float) -> float | None:
        """When all teachers label again, by the bank's words, after fewer did since one was lost at a time of day."""
        told = [line for line in self.lines("teachers") if line["time"] > lost]
        since = list(itertools.dropwhile(lambda line: line["teachers"] == TEACHERS, told))
        return next((float(line["time"]) for line in since if line["teachers"] == TEACHERS), None)


Events = Callable[[SimulatedCluster, WatchedRun, list[int]], dict[str, Any]]


def measure(
    arguments: list[str], folder: Path, events: Events, at: list[int], nodes: dict[str, Nodes]
) -> dict[str, Any]:
    """The run, what happened to it and when.

    Args:
        arguments: of `run.py`.
        folder: for the run.
        events: make it happen.
        at: the steps at which it does.
        nodes: of the cluster, where they are not the simulated cluster's own.
    """
    with simulated(**nodes) as cluster:
        run = WatchedRun(cluster, folder, arguments)
        try:
            return {"nodes": nodes_of(cluster), **events(cluster, run, at)}
        finally:
            run.process.kill()


def nodes_of(cluster: SimulatedCluster) -> dict[str, int]:
    """How many of each kind are alive."""
    every, students, teachers = (len(cluster.alive(kind)) for kind in (None, STUDENT_NODE, TEACHER_NODE))
    return {"head": every - students - teachers, "student": students, "teacher": teachers}


def life(cluster: SimulatedCluster, run: WatchedRun, at: list[int]) -> dict[str, Any]:
    """A teacher's node is lost, another joins, the student's is lost and replaced at once."""
    run.reaches(at[0])
    before = run.lines("train")[-1]
    killed = cluster.kill_node(cluster.alive(TEACHER_NODE)[0])
    cluster.until(lambda: run.told_after(killed, "a teacher died") is not None, 120)
    run.reaches(at[1])
    after = run.lines("train")[-1]
    joined = time.time()
    cluster.add_node(TEACHER_NODE, cluster.teachers)
    cluster.until(lambda: run.labelling_again(killed) is not None, 180)
    whole = run.labelling_again(killed)
    assert whole is not None, "it was waited for"
    run.reaches(at[2])
    stopped_at, students = run.step(), len(run.lines("student"))
    lost = cluster.kill_node(cluster.alive(STUDENT_NODE)[0])
    cluster.add_node(STUDENT_NODE, cluster.students)
    cluster.until(lambda: len(run.lines("student")) > students, 300)
    began = run.lines("student")[-1]["time"]
    cluster.until(lambda: run.step() > stopped_at, 300)
    first = next(line for line in run.lines("train") if line["time"] > began)
    ahead = next(line for line in run.lines("train") if line["time"] > began and line["step"] > stopped_at)
    cluster.until(run.ended, 1800)
    results = json.loads((run.folder / "results.json").read_text())
    between = [line for line in run.lines("train") if before["time"] <= line["time"] <= after["time"]]
    steady = [
        line for line in run.lines("train") if line["time"] <= before["time"] and line["stage"] == before["stage"]
    ]
    return {
        "exit_code": run.process.returncode,
        "teacher_lost": {
            "at_step": before["step"],
            "noticed_s": run.told_after(killed, "a teacher died"),
            "labelling_again_after_s": round(whole - killed, 1),
            "steps_taken_twice": len(between) - len({line["step"] for line in between}),
            "student_restarts": len([line for line in run.lines("student") if killed < line["time"] < lost]),
            "longest_between_lines_s": _longest(between),
            "longest_between_lines_before_s": _longest(steady),
            "wait_share_before": before["wait_share"],
            "wait_share_after": after["wait_share"],
            "steps_per_s_before": _rate(steady[-10:]),
            "steps_per_s_after": _rate(between),
        },
        "teacher_joined": {
            # None where the new teacher had found room on the other node before.
            "labelling_after_s": round(whole - joined, 1) if whole > joined else None,
        },
        "student_lost": {
            "at_step": stopped_at,
            "noticed_s": run.told_after(lost, " failed: "),
            "back_after_s": round(began - lost, 1),
            "from_step": first["step"],
            "ahead_after_s": round(ahead["time"] - lost, 1),
        },
        "miou": results["scores"]["adapted"]["miou"],
        "steps": results["steps"],
        "labels": results["labels"],
        "teachers": {name: results["teachers"].get(name) for name in ("labels_made", "teacher_failures", "idle_share")},
        "student": results["student"],
    }


def elastic(cluster: SimulatedCluster, run: WatchedRun, at: list[int]) -> dict[str, Any]:
    """One of two students' nodes is lost, and a node joins later."""
    run.reaches(at[0])
    lost_at, lost = run.step(), cluster.kill_node(cluster.alive(STUDENT_NODE)[0])
    cluster.until(lambda: run.students() == 1, 300)
    alone = run.lines("student")[-1]["time"]
    cluster.until(lambda: run.step() > max(lost_at, at[1]), 600)
    ahead = next(line for line in run.lines("train") if line["time"] > alone and line["step"] > lost_at)
    first = next(line for line in run.lines("train") if line["time"] > alone)
    joined_at, joined = run.step(), time.time()
    cluster.add_node(STUDENT_NODE, cluster.students)
    cluster.until(lambda: run.students() == 2 or run.ended(), 600)
    both = run.lines("student")[-1]["time"]
    cluster.until(run.ended, 1800)
    results = json.loads((run.folder / "results.json").read_text())
    grown = next((line for line in run.lines("train") if line["time"] > both), None)
    return {
        "exit_code": run.process.returncode,
        "shrunk": {
            "at_step": lost_at,
            "noticed_s": run.told_after(lost, " failed: "),
            "alone_after_s": round(alone - lost, 1),
            "from_step": first["step"],
            "ahead_after_s": round(ahead["time"] - lost, 1),
        },
        "grown": {
            "at_step": joined_at,
            "both_after_s": round(both - joined, 1) if grown else None,
            "from_step": grown["step"] if grown else None,
        },
        "miou": results["scores"]["adapted"]["miou"],
        "steps": results["steps"],
    }


def _longest(lines: list[dict[str, Any]]) -> float:
    times = [line["time"] for line in lines]
    return round(max((b - a for a, b in itertools.pairwise(times)), default=0.0), 2)


def _rate(lines: list[dict[str, Any]]) -> float:
    return round((lines[-1]["step"] - lines[0]["step"]) / max(1e-9, lines[-1]["time"] - lines[0]["time"]), 3)


def _stop(number: int, frame: Any) -> None:
    """A cluster must not outlive whoever started it, however often that is asked to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100, help="the demo's")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--seed", type=int, default=0)
    when = "parts of the run (--elastic: the first two)"
    parser.add_argument("--at", type=float, nargs=3, default=(0.6, 0.72, 0.8), help=when)
    parser.add_argument("--elastic", action="store_true", help="two students that may be one")
    parser.add_argument("--json", default=None)
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="r"))
    wanted = ["--preset", given.preset, "--steps", str(given.steps), "--seed", str(given.seed)]
    events: Events = elastic if given.elastic else life
    nodes: dict[str, Nodes] = {}
    if given.elastic:
        wanted += ["--students", "2", "--min-students", "1", "--threads", "2"]  # two have no place on one node
        nodes = {"students": Nodes(cpus=3, least=2, most=2), "teachers": Nodes(cpus=2, least=1, most=2)}
    try:
        found = measure(wanted, folder, events, [round(part * given.steps) for part in given.at], nodes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"command": "python -m bench.cluster_life " + " ".join(arguments), "commit": commit(), **found}
    print(json.dumps(found, indent=1))
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
