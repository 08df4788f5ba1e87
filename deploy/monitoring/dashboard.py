"""Makes ``grafana-dashboard.json``: the two loops of a run at a glance. ``python -m deploy.monitoring.dashboard``.

Names, units and descriptions come from the table of our metrics: a panel cannot ask for a number that nobody exports.
On the left stands what the student does, on the right what teachers and labels do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.metrics import Metric, Unit, find

FILE = Path(__file__).with_name("grafana-dashboard.json")
GRAFANA, SCHEMA = "11.6.0", 41
"""The version of Grafana whose panels these are, and of its dashboards' schema; newer ones read older schemas."""
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OWN, REFERENCES = 'run="$run",reference=""', 'run="$run",reference!=""'
"""A run's own numbers, and those of its reference runs."""
UNITS: dict[Unit, str] = {
    "": "short",
    "share": "percentunit",
    "percent": "percent",
    "seconds": "s",
    "per second": "suffix:/s",
    "steps": "suffix: steps",
    "bytes": "bytes",
    "moment": "dateTimeAsIso",
}
FAILURES = (
    "teachers/teacher_failures",
    "teachers/blocks_lost",
    "student/restarts",
    "train/recoveries",
)
SIGNALS = ("label_free_score", "entropy", "diversity", "agreement", "consistency", "disagreement", "stability")


def metric(name: str) -> Metric:
    """A row of the table, by ``kind/name``.

    Raises:
        KeyError: there is none.
    """
    kind, _, rest = name.partition("/")
    found = find(kind, rest)
    if found is None:
        raise KeyError(name)
    return found


def newest(name: str, which: str = OWN, by: str = "") -> str:
    """The query for a number: of a run log that began anew, the greater of the two it then has for some seconds."""
    asked = metric(name)
    labels = ", ".join(label for label in (asked.tag, by) if label)
    return f"max{f' by ({labels})' if labels else ''} ({asked.prometheus}{{{which}}})"


def rate(name: str) -> str:
    """The query for what a sum grows by in a second."""
    return f"max (rate({metric(name).prometheus}{{{OWN}}}[$__rate_interval]))"


def target(number: int, expression: str, legend: str) -> dict[str, Any]:
    """One query of a panel."""
    return {
        "datasource": SOURCE,
        "refId": chr(ord("A") + number),
        "expr": expression,
        "legendFormat": legend,
        "range": True,
        "instant": False,
    }


def panel(
    kind: str,
    title: str,
    place: tuple[int, int, int, int],
    queries: Sequence[tuple[str, str]],
    description: str,
    unit: Unit = "",
    options: dict[str, Any] | None = None,
    **defaults: Any,
) -> dict[str, Any]:
    """A panel.

    Args:
        kind: Grafana's plugin.
        title: what it shows.
        place: x, y, width, height, in columns and rows of Grafana's grid.
        queries: with their legends.
        description: of the panel.
        unit: of its numbers.
        options: of the plugin.
        **defaults: of its fields.
    """
    x, y, width, height = place
    return {
        "type": kind,
        "title": title,
        "description": description,
        "pluginVersion": GRAFANA,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "targets": [target(number, expression, legend) for number, (expression, legend) in enumerate(queries)],
        "options": options or {},
        "fieldConfig": {"defaults": {"unit": UNITS[unit], **defaults}, "overrides": []},
    }


def stat(
    title: str, x: int, query: str, description: str, unit: Unit, steps: Sequence[tuple[float | None, str]]
) -> dict[str, Any]:
    """One number in the top row, coloured from the thresholds on."""
    thresholds = {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}
    return panel(
        "stat",
        title,
        (x, 0, 4, 4),
        [(query, title)],
        description,
        unit,
        {"graphMode": "area", "colorMode": "value", "reduceOptions": {"calcs": ["lastNotNull"]}},
        thresholds=thresholds,
        noValue="–",
    )


def curves(
    title: str,
    place: tuple[int, int, int, int],
    names: Sequence[str],
    more: Sequence[tuple[str, str]] = (),
    what: str = "",
    unit: Unit | None = None,
    **defaults: Any,
) -> dict[str, Any]:
    """Numbers over time, each under its own name; what they are stands in the description."""
    rows = [metric(name) for name in names]
    queries = [
        (newest(name), f"{{{{{row.tag}}}}}" if row.tag else row.name) for name, row in zip(names, rows, strict=True)
    ]
    lines = [what] if what else []
    lines += [f"{row.name}: {row.text}." for row in rows]
    units = {row.unit for row in rows} if unit is None else {unit}
    if len(units) != 1:
        raise ValueError(f"{title} shows numbers of several units: {sorted(units)}")
    return panel(
        "timeseries",
        title,
        place,
        [*queries, *more],
        "\n\n".join(lines),
        units.pop(),
        {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        custom={"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "showPoints": "never", "spanNulls": False},
        noValue="–",
        **defaults,
    )


def heading(text: str, place: tuple[int, int, int, int]) -> dict[str, Any]:
    """A line of text above a column."""
    made = panel("text", "", place, [], "", options={"mode": "markdown", "content": f"### {text}"})
    return {**made, "targets": [], "transparent": True}


def stages(place: tuple[int, int, int, int]) -> dict[str, Any]:
    """The stage of the student and of the teacher that learns, as bars."""
    names = ("train/stage", "trainable_teacher/stage")
    return panel(
        "state-timeline",
        "Stages",
        place,
        [(newest(names[0]), "{{stage}}"), (newest(names[1]), "teacher: {{stage}}")],
        "\n\n".join(f"{metric(name).text}." for name in names),
        options={"showValue": "never", "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False}},
        noValue="–",
    )


def panels() -> list[dict[str, Any]]:
    """All panels, each with its number."""
    calm, watch, bad = (None, "green"), "orange", "red"
    failures = "|".join(metric(name).prometheus for name in FAILURES)
    left, right, half, high = 0, 12, 12, 7
    rows = [6 + high * number for number in range(8)]
    found = [
        stat("step", 0, newest("train/step"), f"{metric('train/step').text}.", "", [(None, "text")]),
        stat(
            "label age p95",
            4,
            newest("train/label_age_steps_p95"),
            f"{metric('train/label_age_steps_p95').text}.",
            "steps",
            [(None, "text")],
        ),
        stat("coverage", 8, newest("teachers/coverage"), f"{metric('teachers/coverage').text}.", "share",
             [(None, "text")]),
        stat("wait share", 12, newest("train/wait_share"), f"{metric('train/wait_share').text}.", "share",
             [calm, (0.05, watch), (0.2, bad)]),
        stat("teachers idle", 16, newest("teachers/idle_share"), f"{metric('teachers/idle_share').text}.", "share",
             [(None, "text")]),
        stat("failures", 20, f'sum ({{__name__=~"{failures}",{OWN}}})',
             "\n\n".join(f"{metric(name).text}." for name in FAILURES), "", [calm, (1, watch)]),
        heading("Student", (left, 4, half, 2)),
        heading("Teachers and labels", (right, 4, half, 2)),
        curves("Step time", (left, rows[0], half, high), ["train/step_seconds"], min=0),
        curves("Labels per second", (right, rows[0], half, high), [],
               [(rate("teachers/labels_made"), "labels/s"), (newest("teachers/images_per_s"), "images_per_s")],
               "labels/s: what labels_made grows by now; images_per_s: mean since the first stage with labels.",
               "per second", min=0),
        curves("Waiting", (left, rows[1], half, high),
               ["train/wait_share", "train/data_wait_share", "train/join_share"], min=0),
        curves("Label age", (right, rows[1], half, high),
               [*(f"train/label_age_steps_{which}" for which in ("p50", "p95", "max")),
                *(f"teachers/live_age_steps_{which}" for which in ("p50", "p95", "max"))], min=0),
        curves("Loss", (left, rows[2], half, high), ["train/loss", "train/loss/*"]),
        curves("Teachers and backlog", (right, rows[2], half, high),
               ["teachers/teachers", "teachers/teachers_wanted", "teachers/backlog"], min=0),
        stages((left, rows[3], half, high)),
        curves("Coverage, idle teachers", (right, rows[3], half, high), ["teachers/coverage", "teachers/idle_share"],
               min=0, max=1),
        curves("Signals that need no labels", (left, rows[4], half, high), [f"signals/{name}" for name in SIGNALS],
               min=0, max=1),
        curves("Acceptance per class", (right, rows[4], half, high), ["teachers/acceptance"], min=0, max=1),
        curves("Target mIoU", (left, rows[5], half, high), ["score/miou"], min=0),
        curves("Classes among accepted pixels", (right, rows[5], half, high), ["teachers/class_shares"], min=0),
        curves("GPU memory", (left, rows[6], half, high), [],
               [(newest("train/gpu_memory_bytes"), "student"), (newest("teachers/gpu_memory_bytes"), "teacher"),
                (newest("trainable_teacher/gpu_memory_bytes"), "teacher that learns")],
               f"student: {metric('train/gpu_memory_bytes').text}.\n\n"
               f"teacher: {metric('teachers/gpu_memory_bytes').text}.", "bytes", min=0),
        curves("Versions of the weights", (right, rows[6], half, high),
               ["train/weights_version", "teachers/weights_version_newest", "teachers/weights_version_oldest"], min=0),
        curves("Reference runs", (left, rows[7], half, high), [],
               [(newest("train/loss", REFERENCES, "reference"), "{{reference}} loss")],
               "Loss of source-only and oracle run, which follow the run itself.", ""),
        curves("Failures", (right, rows[7], half, high),
               [*FAILURES, "teachers/blocks_collapsed", "teachers/versions_blocked"], min=0),
    ]  # fmt: skip
    return [{"id": number, **item} for number, item in enumerate(found, 1)]


def variables() -> list[dict[str, Any]]:
    """Where the numbers come from, and whose they are."""
    runs = f'label_values({metric("train/step").prometheus}{{reference=""}}, run)'
    return [
        {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1},
        {
            "type": "query",
            "name": "run",
            "label": "Run",
            "datasource": SOURCE,
            "query": {"query": runs, "refId": "run"},
            "refresh": 2,
            "sort": 2,
            "multi": False,
            "includeAll": False,
        },
    ]


def dashboard() -> dict[str, Any]:
    """The whole of it, as Grafana imports it."""
    return {
        "uid": "tutelage",
        "title": "Tutelage",
        "description": "A student and its teachers, running at the same time. Made by deploy/monitoring/dashboard.py.",
        "tags": ["ray", "tutelage"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "panels": panels(),
    }


def text() -> str:
    """As the file holds it."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
