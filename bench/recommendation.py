"""Does the label-free recommendation pick a good step? Compares it with the best of the steps that were scored.

    python -m bench.recommendation runs/A runs/B … --json docs/results/recommendation.json

Reads finished runs on data with target labels. The best step is chosen with those labels, so it is an oracle's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def compare(run: Path) -> dict[str, Any]:
    """What the signals chose in a finished run, what labels would have chosen, and how well the two rank its steps."""
    results = json.loads((run / "results.json").read_text())
    miou: dict[int, float] = {}
    free: dict[int, float] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "score":
            miou[line["step"]] = line["miou"]
        elif line["kind"] == "signals":
            free[line["step"]] = line["label_free_score"]
    miou[results["steps"]] = results["scores"]["adapted"]["miou"]
    steps = sorted(miou.keys() & free.keys())
    best = max(steps, key=miou.__getitem__)
    chosen = results["label_free"]["recommended"]
    return {
        "benchmark": results["benchmark"],
        "seed": results["seed"],
        "steps_scored": len(steps),
        "last": {"step": steps[-1], "miou": miou[steps[-1]]},
        "best": {"step": best, "miou": miou[best]},
        "recommended": {"step": chosen, "miou": miou[chosen]},
        "below_best": miou[best] - miou[chosen],
        "rank_correlation": rank_correlation([free[s] for s in steps], [miou[s] for s in steps]),
    }


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's rho of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [compare(run) for run in given.runs]
    for row in rows:
        parts = " · ".join(f"{name} {row[name]['miou']:.1f} (step {row[name]['step']})" for name in ("last", "best"))
        chosen = row["recommended"]
        print(
            f"{row['benchmark']} seed {row['seed']}: recommended {chosen['miou']:.1f} (step {chosen['step']}) · {parts}"
            f" · {row['below_best']:.1f} below the best · rank correlation {row['rank_correlation']:.2f}"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
