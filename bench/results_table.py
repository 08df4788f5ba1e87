"""Write the README's result table from the raw results under ``docs/results/``.

    python -m bench.results_table

Every ``demo-*.json`` there is the ``results.json`` of one run, with the commit and the command that made it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench.marked import write_between

ROOT = Path(__file__).parent.parent
ROWS = ("source_only", "adabn", "adapted", "oracle")


def table(runs: list[dict[str, Any]]) -> str:
    """A line for every run, and for every benchmark with several seeds one of means."""
    lines = [
        "| benchmark (miniature) | seed | source-only | AdaBN | adapted | oracle | gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted({run["benchmark"] for run in runs}, reverse=True):
        same = sorted((run for run in runs if run["benchmark"] == name), key=lambda run: run["seed"])
        for run in same:
            scores = [run["scores"][row]["miou"] for row in ROWS]
            lines.append(_line(f"`{name}`", str(run["seed"]), scores, run["gap_closed"]))
        if len(same) > 1:
            means = [statistics.mean(run["scores"][row]["miou"] for run in same) for row in ROWS]
            lines.append(_line(f"`{name}`", "mean", means, (means[2] - means[0]) / (means[3] - means[0])))
    return "\n".join(lines)


def _line(name: str, seed: str, scores: list[float], closed: float) -> str:
    return f"| {name} | {seed} | " + " | ".join(f"{score:.1f}" for score in scores) + f" | {closed:.2f} |"


def main() -> None:
    """Replace what stands between the markers."""
    runs = [json.loads(path.read_text()) for path in sorted((ROOT / "docs/results").glob("demo-*.json"))]
    write_between(ROOT / "README.md", "results", table(runs))


if __name__ == "__main__":
    main()
