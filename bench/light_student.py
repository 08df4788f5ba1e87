"""What helps a small, fast student most: BiSeNet-18 on a miniature, row by row, all of the same number of steps.

    python -m bench.light_student rows --seeds 0 1 2     every row for every seed, with source-only, AdaBN and oracle
    python -m bench.light_student page                   the table in docs/bisenet.md, from the results

Rows are runs of their own, of 600 steps of the scored network. Meta pseudo labels start both ways of teaching from
the same second stage. The heavy teacher is EPLC's network, which is trained for 600 steps before its student is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from actors.checkpoints import kept_stages
from bench.command_runs import ROOT, keep, run
from bench.marked import write_between

RESULTS = ROOT / "docs/results/light-student.json"
PAGE = ROOT / "docs/bisenet.md"
MPL = ["--recipe", "meta_pseudo_labels"]
STEPS = 600
ADVERSARIAL = ["--to-stage", "1", "--steps", str(round(STEPS / 0.4))]
MEDIAN = ["--to-stage", "2", "--steps", str(round(STEPS / 0.7))]
WHOLE = [*MPL, "--steps", str(STEPS)]
ROWS: dict[str, list[str]] = {
    "adversarial, FCD": [*MPL, *ADVERSARIAL, "--meta-pseudo-labels.discriminator", "fcd"],
    "adversarial, DSC": [*MPL, *ADVERSARIAL, "--references", "always"],
    "+ median labels": [*MPL, *MEDIAN],
    "+ meta pseudo labels, alternating": [*WHOLE, "--meta-pseudo-labels.teaching", "alternating"],
    "+ meta pseudo labels, asynchronous": [
        *WHOLE,
        "--meta-pseudo-labels.teaching",
        "asynchronous",
        "--from-stage",
        "3",
    ],
    "labels of a heavy EPLC teacher": ["--recipe", "eplc", "--student-network", "bisenet18", "--steps", str(STEPS)],
}
ALTERNATING, ASYNCHRONOUS = list(ROWS)[3:5]


def rows(benchmark: str, seeds: list[int], runs: Path, only: list[str]) -> None:
    """Every row for every seed."""
    for seed in seeds:
        for name, arguments in ROWS.items():
            if only and name not in only:
                continue
            common = ["--benchmark", benchmark, "--seed", str(seed), *arguments]
            told = common = common if "--references" in common else [*common, "--references", "never"]
            if name == ASYNCHRONOUS:
                _, start = kept_stages(runs / _slug(benchmark, seed, ALTERNATING))[-1]
                common, told = [*common, "--init", str(start)], [*common, "--init", start.name]
            folder = run(_slug(benchmark, seed, name), runs, common)
            keep(RESULTS, f"{name}, {benchmark}, seed {seed}", folder, told, teacher=_teacher(folder))
            print(f"{benchmark}, seed {seed}, {name}: done", flush=True)


def _slug(benchmark: str, seed: int, name: str) -> str:
    letters = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return f"{benchmark}-s{seed}-{letters.strip('- ')}"


def _teacher(folder: Path) -> dict[str, Any] | None:
    """The last line of a teacher that learned beside its student."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if line["kind"] == "trainable_teacher"]
    return {key: found[-1][key] for key in ("step", "steps", "reward_age_steps") if key in found[-1]} if found else None


def table(results: dict[str, Any], benchmark: str) -> str:
    """Scores of every row, seed by seed, and their mean beside source-only's."""
    first = [value for key, value in results.items() if key.startswith(f"adversarial, DSC, {benchmark}")]
    shown: dict[str, list[float]] = {
        "source-only": [row["scores"]["source_only"] for row in first],
        "source-only, AdaBN": [row["scores"]["adabn"] for row in first],
    }
    for name in ROWS:
        found = [value for key, value in results.items() if key.startswith(f"{name}, {benchmark}, seed ")]
        if found:
            shown[name] = [row["scores"]["adapted"] for row in sorted(found, key=lambda row: row["seed"])]
    shown["supervised on target labels"] = [row["scores"]["oracle"] for row in first]
    source, oracle = (statistics.mean(shown[name]) for name in ("source-only", "supervised on target labels"))
    lines = ["| BiSeNet-18 | mIoU, seed by seed | mean | spread | gap closed |", "|---|---|---|---|---|"]
    for name, scores in shown.items():
        mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else float("nan")
        each = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {name} | {each} | {mean:.1f} | {spread:.1f} | {(mean - source) / (oracle - source):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "page"))
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=tuple(ROWS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    if given.what == "rows":
        rows(given.benchmark, given.seeds, given.runs.absolute(), given.only)
    else:
        write_between(PAGE, "rows", table(json.loads(RESULTS.read_text()), given.benchmark))


if __name__ == "__main__":
    main()
