"""One factor at a time, from a stage I that all rows of a seed share.

    python -m bench.ablation --rows plain rectified eplc-mean --seeds 0 1 2
    python -m bench.ablation --table

Trains stage I once a seed, then every row's self-training from its weights, each in a process of its own, and keeps
what came out in ``docs/results/ablation.json``: a row that is there already is not run again. ``shared`` is stage I
itself, ``stage-one`` is stage I trained for as many steps as all others have in both stages. The table goes into
``docs/ablation.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.marked import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/ablation.json"
PAGE = ROOT / "docs/ablation.md"
STEPS = 1100
"""Steps of both stages of the mini preset."""

ROWS: dict[str, tuple[str, ...]] = {
    "plain": ("--recipe", "rectified", "--rectified.loss", "plain"),
    "rectified": ("--recipe", "rectified"),
    "eplc-mean": ("--eplc.selection", "mean"),
    "eplc": (),
    "eplc-min": ("--eplc.selection", "min"),
    "eplc-std": ("--eplc.selection", "std"),
    "dropout-0": ("--eplc.dropout", "0"),
    "dropout-0.1": ("--eplc.dropout", "0.1"),
    "passes-1": ("--eplc.passes", "1"),
    "passes-20": ("--eplc.passes", "20"),
    "once": ("--refresh", "once"),
    "no-mixing": ("--eplc.mixing", "none"),
    "negative": ("--eplc.negative", "1"),
}
NAMES = {
    "shared": "stage I (200 steps), where all rows of self-training start",
    "stage-one": "stage I alone, equal steps",
    "plain": "+ MRNet's labels, plain loss",
    "rectified": "+ MRNet's labels, rectified loss",
    "eplc-mean": "EPLC, mean ≥ 0.8",
    "eplc": "EPLC, percentile (default: dropout 0.2, 5 passes, continuous)",
    "eplc-min": "EPLC, min ≥ 0.8",
    "eplc-std": "EPLC, std ≤ 0.05",
    "dropout-0": "EPLC, student's dropout 0",
    "dropout-0.1": "EPLC, student's dropout 0.1",
    "passes-1": "EPLC, 1 pass",
    "passes-20": "EPLC, 20 passes",
    "once": "EPLC, one round of labels",
    "no-mixing": "EPLC, no class mixing",
    "negative": "EPLC, negative labels, too (weight 1)",
}


def train(arguments: list[str], name: str, runs: Path, benchmark: str, seed: int) -> Path:
    """One run, if it is not there yet; its directory."""
    folder = runs / name
    if not (folder / "results.json").is_file():
        command = [sys.executable, "run.py", "--benchmark", benchmark, "--seed", str(seed), "--references", "never"]
        place = ["--no-dashboard", "--runs", str(runs), "--name", name]
        subprocess.run([*command, *place, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def keep(row: str, folder: Path, arguments: list[str], path: Path = RESULTS) -> None:
    """Add what a run came to."""
    results = json.loads((folder / "results.json").read_text())
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    entry = {
        "row": row,
        "benchmark": results["benchmark"],
        "seed": results["seed"],
        "arguments": arguments,
        "score": results["scores"]["adapted"],
        "label_age_steps": results["label_age_steps"],
        "seconds": results["seconds"],
        "versions": results["versions"],
    }
    path.write_text(json.dumps([*known, entry], indent=1) + "\n")


def done(row: str, benchmark: str, seed: int, path: Path = RESULTS) -> bool:
    """Whether a row has been measured."""
    known = json.loads(path.read_text()) if path.is_file() else []
    return any((e["row"], e["benchmark"], e["seed"]) == (row, benchmark, seed) for e in known)


def table(entries: list[dict[str, Any]], references: list[dict[str, Any]]) -> str:
    """Rows of mean and spread, in the order of :data:`NAMES`.

    Args:
        entries: of ``ablation.json``.
        references: ``results.json`` of the demo's runs on the same benchmark: source-only, AdaBN, oracle.
    """
    lines = ["| | mIoU (each seed) | mean ± deviation |", "|---|---|---|"]
    for key, name in (("source_only", "source-only"), ("adabn", "AdaBN")):
        lines.append(_line(name, [run["scores"][key]["miou"] for run in references]))
    for row, name in NAMES.items():
        scores = [e["score"]["miou"] for e in sorted(entries, key=lambda e: e["seed"]) if e["row"] == row]
        if scores:
            lines.append(_line(name, scores))
    lines.append(_line("oracle", [run["scores"]["oracle"]["miou"] for run in references]))
    return "\n".join(lines)


def _line(name: str, scores: list[float]) -> str:
    spread = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else "one seed"
    return f"| {name} | {', '.join(f'{score:.1f}' for score in scores)} | {spread} |"


def write_page(benchmark: str) -> None:
    """The table, between the lines of ``docs/ablation.md`` that mark it."""
    entries = [e for e in json.loads(RESULTS.read_text()) if e["benchmark"] == benchmark]
    references = [json.loads(p.read_text()) for p in sorted((ROOT / "docs/results").glob(f"demo-{benchmark}-s*.json"))]
    write_between(PAGE, "ablation", table(entries, references))


def main() -> None:
    """Run rows, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="synthia2city")
    parser.add_argument("--rows", nargs="+", default=[], choices=["shared", "stage-one", *ROWS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    for seed in given.seeds:
        for row in given.rows:
            if done(row, given.benchmark, seed):
                continue
            name = f"ablation-{given.benchmark}-{row}-s{seed}"
            arguments, start = ["--recipe", "mrnet"], []
            if row == "stage-one":
                arguments += ["--steps", str(STEPS)]
            elif row != "shared":
                shared = f"ablation-{given.benchmark}-shared-s{seed}"
                start = ["--init", str(train(arguments, shared, given.runs, given.benchmark, seed))]
                arguments = ["--from-stage", "2", *ROWS[row]]
            folder = train([*start, *arguments], name, given.runs, given.benchmark, seed)
            keep(row, folder, arguments)
            print(f"{name}: {json.loads((folder / 'results.json').read_text())['scores']['adapted']['miou']:.1f}")
    if given.table:
        write_page(given.benchmark)


if __name__ == "__main__":
    main()
