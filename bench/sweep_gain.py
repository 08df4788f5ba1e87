"""Does the best of a sweep beat the recipe's defaults on seeds that the sweep has not seen?

    python -m bench.sweep_gain
    python -m bench.sweep_gain --page

Trains stage I for every seed, runs ``run.py tune`` on the first seed, then the sweep's best and the recipe's defaults
on the others, all with the same steps and the same source images held out. The sweep looks at no target label; they
score what came out. Raw results in ``docs/results/sweep-gain.json``, the table in ``docs/sweeps.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.label_free_scores import correlations
from bench.marked import write_between
from pipelines.results import versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/sweep-gain.json"
PAGE = ROOT / "docs/sweeps.md"
HELD_OUT = "32"


def run(arguments: list[str], folder: Path, done: str) -> Path:
    """One command, unless what it leaves is there already; its folder."""
    if not (folder / done).is_file():
        place = ["--runs", str(folder.parent), "--name", folder.name]
        subprocess.run([sys.executable, "run.py", *arguments, *place], cwd=ROOT, check=True)
    return folder


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Stage I of every seed, the sweep, and both configurations on the seeds that it has not seen."""
    runs = given.runs.absolute()
    plain = ["--benchmark", given.benchmark, "--data", str(given.data), "--held-out", HELD_OUT]
    starts = {
        seed: run(
            [*plain, "--to-stage", "1", "--references", "never", "--seed", str(seed)],
            runs / f"one-s{seed}",
            "results.json",
        )
        for seed in [given.sweep_seed, *given.seeds]
    }

    def second(seed: int) -> list[str]:
        return ["--init", str(starts[seed]), "--from-stage", "2", "--steps", str(given.steps), "--seed", str(seed)]

    samples = ["--num-samples", str(given.num_samples)]
    folder = run(["tune", *plain, *second(given.sweep_seed), *samples], runs / "sweep", "best.toml")
    sweep = json.loads((folder / "sweep.json").read_text())
    best = ["--config", str(folder / "best.toml"), "--references", "never"]
    scores: dict[str, list[float]] = {"best": [], "defaults": []}
    for seed in given.seeds:
        for name, arguments in (("best", best), ("defaults", [*plain, "--references", "never"])):
            done = run([*arguments, *second(seed)], runs / f"{name}-s{seed}", "results.json")
            scores[name].append(json.loads((done / "results.json").read_text())["scores"]["adapted"]["miou"])
    trials = [
        {key: t[key] for key in ("number", "id", "point", "status", "score", "miou", "signals", "seconds")}
        for t in sweep["trials"]
    ]
    return {
        "benchmark": given.benchmark,
        "steps": given.steps,
        "sweep_seed": given.sweep_seed,
        "seeds": given.seeds,
        "metric": sweep["metric"],
        "best": sweep["best"],
        "trials": trials,
        "scores": scores,
        "versions": versions(),
    }


def table(found: dict[str, Any]) -> str:
    """Held-out seeds, and how the score ranked the sweep's own trials."""
    trials = [t for t in found["trials"] if t["status"] == "finished"]
    best = next(t for t in trials if t["id"] == found["best"])
    defaults = trials[1]
    rows = {"the sweep's best": ("best", best["miou"]), "the recipe's defaults": ("defaults", defaults["miou"])}
    heads = "".join(f" seed {seed} |" for seed in found["seeds"])
    lines = [
        f"| mIoU | seed {found['sweep_seed']} (the sweep's) |{heads} mean of the held-out seeds |",
        "|---|---|" + "---|" * (len(found["seeds"]) + 1),
    ]
    for name, (key, own) in rows.items():
        scores = found["scores"][key]
        spread = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"
        lines.append(f"| {name} | {own:.1f} | {' | '.join(f'{s:.1f}' for s in scores)} | {spread} |")
    gains = [a - b for a, b in zip(found["scores"]["best"], found["scores"]["defaults"], strict=True)]
    score, miou = (np.array([t[key] for t in trials]) for key in ("score", "miou"))
    rho, low, high = correlations(score, miou)
    share = (best["miou"] - defaults["miou"]) / (miou.max() - defaults["miou"])
    values = ", ".join(
        f"`{name}` {value:.3g}" if isinstance(value, float) else f"`{name}` {value}"
        for name, value in best["point"].items()
    )
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    lines += [
        "",
        f"Gain on the held-out seeds {statistics.mean(gains):+.1f} ({each}). In the sweep itself `{found['metric']}` "
        f"ranked {len(trials)} trials as target mIoU does with {rho:.2f} ({low:.2f} to {high:.2f}); the best trial by "
        f"target mIoU had {miou.max():.1f}, so the pick has {100 * share:.0f} % of what an oracle would have gained "
        f"over the defaults. The pick, trial {best['number']}: {values}.",
    ]
    return "\n".join(lines).replace("| -", "| −").replace("(-", "(−").replace(", -", ", −")


def main() -> None:
    """Measure what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--sweep-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=440, help="of both stages; the trials run nine elevenths of them")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/sweep-gain")
    parser.add_argument("--page", action="store_true", help="write the table from the results")
    given = parser.parse_args()
    if given.page:
        write_between(PAGE, "sweep-gain", table(json.loads(RESULTS.read_text())))
        return
    found = measure(given)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
