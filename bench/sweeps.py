"""Does a sweep end with nothing left behind, and what does a trial cost beyond its training?

    python -m bench.sweeps
    python -m bench.sweeps --page

Runs sweeps of twelve trials on the tiny miniature in one Ray cluster, three in a row and one more in which a trial's
process is killed in the middle; after each it asks Ray's State API for actors, placement groups and objects that are
still there. From the trials of the first three comes the overhead: the time from one trial's start to the next one's,
less the student's steps, and where it goes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()

import ray  # noqa: E402
from ray.util.state import list_actors, list_objects, list_placement_groups  # noqa: E402

from bench.marked import write_between  # noqa: E402
from pipelines import cluster  # noqa: E402
from pipelines.adapt import Manner, adapt  # noqa: E402
from pipelines.options import AdaptOptions  # noqa: E402
from pipelines.results import versions  # noqa: E402
from tune_spaces.options import SweepOptions  # noqa: E402
from tune_spaces.record import SweepRecord, TrialRecord, read_sweep  # noqa: E402
from tune_spaces.sweep import SweepOutcome, sweep  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/sweeps.json"
PAGE = ROOT / "docs/sweeps.md"
TRIALS = 12
PARTS = {
    "between": "between two trials: Ray Tune, the process that is used again",
    "start": "options, data, network of the run",
    "boards": "the run's actors, boards, readers, first batch",
    "training": "the student's steps",
    "save": "last checkpoint and the driver's next look, less the start of the run's actors, which counts above, too",
    "score": "signals and, here, target mIoU",
    "rest": "results, and the trial's report to Ray Tune",
}


def left_over(dashboard: str | None, seconds: float = 20.0) -> dict[str, int]:
    """What Ray still knows after a moment to clear away; its dashboard answers."""
    gc.collect()  # futures in Ray Tune's cycles
    found: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = {
            "actors": len(list_actors(address=dashboard, filters=[("state", "!=", "DEAD")])),
            "placement groups": sum(group.state != "REMOVED" for group in list_placement_groups(address=dashboard)),
            "objects": len(list_objects(address=dashboard)),
        }
        if not any(found.values()):
            break
        time.sleep(0.5)
    return found


def parts_of(folder: Path, trial: TrialRecord, before: TrialRecord | None) -> dict[str, float]:
    """Where the seconds of a trial went."""
    run = folder / "trials" / trial.id
    student = json.loads((run / "results.json").read_text())["student"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    waited = student["seconds"] * student["data_wait_share"]
    training = student["seconds"] - waited
    seconds, stop = trial.seconds, max(line["time"] for line in lines if line["kind"] == "train")
    begun = trial.began + seconds["start"]
    found = {
        "start": seconds["start"],
        "boards": stop - begun - training,
        "training": training,
        "save": begun + seconds["adapt"] - stop,
        "score": seconds["score"],
        "rest": trial.ended - trial.began - seconds["start"] - seconds["adapt"] - seconds["score"],
    }
    return found if before is None else {"between": trial.began - before.ended, **found}


def one_sweep(name: str, given: dict[str, Any], *, kill: bool = False) -> tuple[SweepOutcome, float]:
    """A sweep, and how long it took; with ``kill`` the fourth trial's process dies in its middle."""
    killed: list[int] = []
    runs = Path(given["runs"])

    def watch(kind: str, what: dict[str, Any]) -> None:
        if not kill or killed or kind != "trials" or what["trial"].number != 4:
            return
        lines = runs / name / "trials" / what["trial"].id / "metrics.jsonl"
        while not killed:
            found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
            killed.extend(line["pid"] for line in found if line["kind"] == "student")
            time.sleep(0.05)
        os.kill(killed[0], signal.SIGKILL)

    began = time.monotonic()
    outcome = sweep(SweepOptions(name=name, **given), watch)
    return outcome, time.monotonic() - began


def measure(trials: int, sweeps: int, data: str) -> dict[str, Any]:
    """Every sweep, and the medians of where a trial's seconds go."""
    with tempfile.TemporaryDirectory(prefix="sweeps") as folder:
        common: dict[str, Any] = {"preset": "tiny", "data": data, "runs": folder}
        dashboard = cluster.start(AdaptOptions(**common)).dashboard
        first = AdaptOptions(**common, to_stage=1, references="never", name="one")
        start = adapt(first, lambda *_: None, manner=Manner(student_here=True, brief=True)).folder
        given = {**common, "init": str(start), "from_stage": 2, "num_samples": trials, "search": "random"}
        rows, parts = [], []
        for number in range(sweeps + 1):
            kill = number == sweeps
            outcome, seconds = one_sweep(f"sweep{number}", given, kill=kill)
            found = read_sweep(outcome.folder)["trials"]
            rows.append(
                {
                    "killed": kill,
                    "seconds": round(seconds, 1),
                    "finished": sum(t["status"] == "finished" for t in found),
                    "attempts": sum(t["attempts"] for t in found),
                    "left": left_over(dashboard),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            if not kill:
                record = list(SweepRecord(outcome.folder, {}).trials.values())
                pairs = zip(record[1:], record, strict=False)
                parts += [parts_of(outcome.folder, trial, before) for trial, before in pairs]
        ray.shutdown()
    medians = {name: round(statistics.median(part[name] for part in parts), 2) for name in PARTS}
    overhead = sorted(sum(value for name, value in part.items() if name != "training") for part in parts)
    return {
        "sweeps": rows,
        "parts": medians,
        "overhead": {
            "median": round(statistics.median(overhead), 2),
            "lowest": round(overhead[0], 2),
            "highest": round(overhead[-1], 2),
        },
        "trials": len(parts),
        "versions": versions(),
    }


def table(found: dict[str, Any]) -> str:
    """Where the seconds of a trial go."""
    lines = ["| seconds of a tiny trial (median) | |", "|---|---|"]
    lines += [f"| {PARTS[name]} | {value:.2f} |" for name, value in found["parts"].items()]
    overhead, of = found["overhead"], f"all but the steps; lowest to highest of {found['trials']}"
    spread = f"{overhead['lowest']:.1f} to {overhead['highest']:.1f}"
    lines.append(f"| **overhead** ({of}) | **{overhead['median']:.1f}** ({spread}) |")
    return "\n".join(lines)


def main() -> int:
    """Measure; the exit code says whether anything was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--sweeps", type=int, default=3, help="in a row, before the one with a killed trial")
    parser.add_argument("--data", default=str(ROOT / "data"))
    parser.add_argument("--page", action="store_true", help="write the table from the results")
    given = parser.parse_args()
    if given.page:
        write_between(PAGE, "sweeps", table(json.loads(RESULTS.read_text())))
        return 0
    found = measure(given.trials, given.sweeps, given.data)
    print(table(found))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    clean = all(not any(row["left"].values()) and row["finished"] == given.trials for row in found["sweeps"])
    print("nothing is left" if clean else "SOMETHING IS LEFT, or a trial did not finish")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
