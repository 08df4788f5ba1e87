"""Write docs/published.md: published results beside ours on the same real data, from docs/published.toml.

    python -m bench.published_table

Ours are ``docs/results/real-<benchmark>-<ours>-s<seed>.json``, each the ``results.json`` of a run on real data, where
``ours`` is what a row of the TOML file says. A row whose run nobody has made yet has an empty cell; a run that is not
faithful, of another preset or from random weights is refused.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
TITLES = {
    "gta2city": "GTA5 to Cityscapes",
    "synthia2city": "SYNTHIA to Cityscapes",
    "city2robot": "Cityscapes to Oxford RobotCar",
}
INTRODUCTION = """# Published results, and ours beside them

Mean IoU in %, of `docs/published.toml` (per class there), written by `python -m bench.published_table`. An empty cell
is a run on real data that nobody has made yet: scores on the rendered miniatures stand in the README and do not belong
here. "Recalled" figures were not looked up, "leaderboard" ones come from a public list.
"""


def read(path: Path = ROOT / "docs/published.toml") -> dict[str, Any]:
    """Classes by benchmark, and the rows."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def measured(benchmark: str, ours: str | None, folder: Path) -> list[dict[str, Any]]:
    """Results of our own runs that belong beside a row."""
    if ours is None:
        return []
    found = []
    for path in sorted(folder.glob(f"real-{benchmark}-{ours}-s*.json")):
        result = json.loads(path.read_text())
        run = result["run"]
        if result["data"] != "real" or not run["faithful"] or run["init"] is None or run["preset"] != "full":
            raise SystemExit(
                f"{path.name} does not belong beside a published result: it is of {result['data']} data, preset "
                f"{run['preset']}, {'' if run['faithful'] else 'not '}faithful, from {run['init'] or 'random weights'}"
            )
        found.append(result)
    return found


def page(published: dict[str, Any], folder: Path = ROOT / "docs/results") -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION]
    for benchmark, title in TITLES.items():
        second = any("miou13" in row for row in published["row"] if row["benchmark"] == benchmark)
        parts += ["", f"## {title}", ""]
        parts.append(f"| system | evidence | {'mIoU16 / mIoU13' if second else 'mIoU'} | ours (seeds) |")
        parts.append("|---|---|---|---|")
        for row in published["row"]:
            if row["benchmark"] == benchmark:
                score = f"{row['miou']} / {row['miou13']}" if second else f"{row['miou']}"
                parts.append(f"| {_name(row)} | {row['evidence']} | {score} | {_ours(row, folder)} |")
    return "\n".join(parts) + "\n"


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']} ({row['protocol']})" if "protocol" in row else str(row["model"])


def _ours(row: dict[str, Any], folder: Path) -> str:
    key = "source_only" if row.get("ours") == "source_only" else "adapted"
    scores = [run["scores"][key]["miou"] for run in measured(row["benchmark"], row.get("ours"), folder)]
    if not scores:
        return ""
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread} ({len(scores)})"


def main() -> None:
    """Write the page."""
    (ROOT / "docs/published.md").write_text(page(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
