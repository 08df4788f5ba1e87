"""``sweep.html``: the trials of a sweep on one page that opens offline, from the files in its folder alone."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from actors.storage import write_whole
from models.label_free import SCORES
from pipelines.report.charts import curves
from pipelines.report.page import render
from tune_spaces.charts import importance_bars, importances, parallel_coordinates
from tune_spaces.record import TrialRecord, ranks, read_sweep
from tune_spaces.space import Space

FILE = "sweep.html"
MOST_CURVES = 8
"""Trials whose curves are drawn: the best ones; more cannot be told apart."""
ORACLE_NOTE = "oracle: looks at target labels"


def write_page(folder: Path, space: Space) -> Path:
    """Write the page of a sweep, finished or not.

    Returns:
        Where it is.

    Raises:
        RunError: the folder is no sweep.
        OSError: the disk is full or the folder cannot be written.
    """
    about = read_sweep(folder)
    trials = [TrialRecord(**item) for item in about["trials"]]
    order = sorted(trials, key=lambda t: (not ranks(t.score), -(t.score or 0.0) if ranks(t.score) else 0.0, t.number))
    shares = importances(trials, space)
    metric = f"{about['metric']} ({ORACLE_NOTE})" if about["oracle_metric"] else about["metric"]
    lines = {
        f"trial {t.number}": [(int(point["step"]), point["score"]) for point in t.curve] for t in order[:MOST_CURVES]
    }
    page = render(
        resources.files(__package__).joinpath("sweep.html.j2").read_text(encoding="utf-8"),
        name=folder.name,
        about=about,
        metric=metric,
        meaning="mIoU on target labels" if about["oracle_metric"] else SCORES[about["metric"]][0],
        trials=order,
        best=next((t for t in trials if t.id == about["best"]), None),
        names=space.names,
        scored=any(t.miou is not None for t in trials),
        signals=sorted({name for t in trials for name in t.signals}),
        charts={
            "coordinates": _drawn(parallel_coordinates(trials, space, about["metric"])),
            "importance": _drawn(importance_bars(shares)),
            "curves": _drawn(curves(lines, metric)),
        },
        drawn=min(MOST_CURVES, len(order)),
        command=shlex.join(["python", "run.py", "--config", str(folder / "best.toml")]),
        counts=_counts(trials),
    )
    write_whole(folder / FILE, page)
    return folder / FILE


def _drawn(chart: str | None) -> Markup | None:
    return None if chart is None else Markup(chart)  # our own, not a user's text


def _counts(trials: list[TrialRecord]) -> list[tuple[str, Any]]:
    words = {"finished": "finished", "stopped": "ended early", "failed": "failed", "open": "open", "running": "running"}
    counted = [(words[s], sum(t.status == s for t in trials)) for s in words]
    return [(word, count) for word, count in counted if count]
