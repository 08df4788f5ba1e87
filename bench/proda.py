"""ProDA stage by stage, and who denoises its labels.

    python -m bench.proda stages --seeds 0 1 2               the whole recipe, with its references
    python -m bench.proda arrangements --seeds 0 1 2         the denoising stage, from the warm-up of those runs
    python -m bench.proda page                               docs/proda.md from the results

**arrangements** runs the same stage from the same weights twice: labels made once and denoised in the student's step,
as published; and made again without end and denoised by the teacher. Every run has a process of its own for student and
teacher, on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from actors.checkpoints import kept_stages
from bench.command_runs import keep, run
from bench.marked import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/proda.json"
STEP = ROOT / "docs/results/denoising.json"
PAGE = ROOT / "docs/proda.md"
EPLC = "demo-{benchmark}-s{seed}.json"
"""EPLC's runs of the same length, of ``make demo``."""

ARRANGEMENTS: dict[str, tuple[str, ...]] = {
    "student, once": ("--proda.denoise", "student", "--refresh", "once"),
    "teacher, continuous": ("--proda.denoise", "teacher", "--refresh", "continuous"),
}


def stages(benchmark: str, seeds: list[int], runs: Path) -> None:
    """The whole recipe for every seed."""
    for seed in seeds:
        arguments = ["--recipe", "proda", "--benchmark", benchmark, "--seed", str(seed)]
        folder = run(f"proda-{benchmark}-s{seed}", runs, arguments)
        keep(RESULTS, f"stages, {benchmark}, seed {seed}", folder, arguments)
        print(f"{benchmark}, seed {seed}: done", flush=True)


def arrangements(benchmark: str, seeds: list[int], runs: Path) -> None:
    """The denoising stage in every arrangement, for every seed."""
    for seed in seeds:
        (_, start), *_ = kept_stages(runs / f"proda-{benchmark}-s{seed}")
        common = ["--recipe", "proda", "--benchmark", benchmark, "--seed", str(seed), "--references", "never"]
        only = ["--from-stage", "2", "--to-stage", "2", "--init", str(start)]
        for name, arguments in ARRANGEMENTS.items():
            slug = name.replace(", ", "-")
            folder = run(f"denoising-{benchmark}-s{seed}-{slug}", runs, [*common, *only, *arguments])
            keep(RESULTS, f"{name}, {benchmark}, seed {seed}", folder, [*common, *only[:-1], start.name, *arguments])
            print(f"{benchmark}, seed {seed}, {name}: done", flush=True)


def stage_table(results: dict[str, Any]) -> str:
    """Rows of scores after each stage."""
    rows = [value for key, value in results.items() if key.startswith("stages, ")]
    names = [stage["name"] for stage in rows[0]["stages"]]
    lines = [
        f"| miniature | seed | source-only | AdaBN | {' | '.join(names)} | oracle | gap closed | EPLC's gap closed |",
        "|---|---|---|---|" + "---|" * (len(names) + 3),
    ]
    for row in sorted(rows, key=lambda row: (row["benchmark"] != "synthia2city", row["seed"])):
        scores = row["scores"]
        after = " | ".join(f"{stage['miou']:.1f}" for stage in row["stages"])
        path = RESULTS.parent / EPLC.format(benchmark=row["benchmark"], seed=row["seed"])
        eplc = json.loads(path.read_text())["gap_closed"] if path.is_file() else None
        lines.append(
            f"| `{row['benchmark']}` | {row['seed']} | {scores['source_only']:.1f} | {scores['adabn']:.1f} | {after} "
            f"| {scores['oracle']:.1f} | {row['gap_closed']:.2f} | {'' if eplc is None else f'{eplc:.2f}'} |"
        )
    return "\n".join(lines)


def arrangement_table(results: dict[str, Any]) -> str:
    """Accuracy and pace of every arrangement, over the seeds."""
    lines = [
        "| denoised by, labels made | mIoU after the stage | mean | student's images/s | its time without waiting, s |",
        "|---|---|---|---|---|",
    ]
    for name in ARRANGEMENTS:
        rows = [value for key, value in results.items() if key.startswith(f"{name}, ")]
        if not rows:
            continue
        scores = [row["scores"]["adapted"] for row in rows]
        pace = statistics.mean(row["student"]["images_per_s"] for row in rows)
        seconds = statistics.mean(row["student"]["seconds"] * (1 - row["student"]["wait_share"]) for row in rows)
        shown = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {name} | {shown} | {statistics.mean(scores):.1f} | {pace:.1f} | {seconds:.0f} |")
    return "\n".join(lines)


def step_table(found: dict[str, Any]) -> str:
    """What the forward pass of the average costs a step."""
    lines = [
        "| | with the forward pass | without | ratio (range) | soft label | denoised label |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        step, label = row["step_seconds"], row["label_seconds"]
        low, high = row["ratio_range"]
        lines.append(
            f"| {name}, {row['threads']} thread{'s' if row['threads'] > 1 else ''} | {step['student']:.3g} s "
            f"| {step['teacher']:.3g} s | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {label['student']:.2g} s | {label['teacher']:.2g} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stages", "arrangements", "page"))
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    runs = given.runs.absolute()
    if given.what == "stages":
        stages(given.benchmark, given.seeds, runs)
    elif given.what == "arrangements":
        arrangements(given.benchmark, given.seeds, runs)
    else:
        results = json.loads(RESULTS.read_text())
        write_between(PAGE, "stages", stage_table(results))
        write_between(PAGE, "arrangements", arrangement_table(results))
        write_between(PAGE, "step", step_table(json.loads(STEP.read_text())))


if __name__ == "__main__":
    main()
