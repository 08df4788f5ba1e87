"""``report.html``: everything a run directory tells, on one page that opens offline."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from actors.storage import Place, place, write_whole
from pipelines.datasets.classes import ClassSet
from pipelines.options import command_line, read_config
from pipelines.report import charts
from pipelines.report.gallery import FOLDER, Gallery, read_gallery
from pipelines.report.history import History, read_history
from pipelines.results import CONFUSION, ROW_NAMES, protocol_sentence, read_confusion
from pipelines.trained import read_description

FILE = "report.html"
TEMPLATE = "report.html.j2"
PICTURE_NAMES = {
    "image": "image",
    "truth": "label",
    **ROW_NAMES,
    "pseudo_label": "pseudo label",
    "confidence": "confidence",
}
MOST_MESSAGES = 30
SIGNALS = ("entropy", "diversity", "disagreement", "agreement", "consistency", "stability", "source_miou")


@dataclass(frozen=True)
class ScoreRow:
    """A row of the score table."""

    key: str
    name: str
    miou: float
    per_class: list[float | None]


def write_report(folder: str | Place) -> Place:
    """Write the report of a run, finished or not, from the files in its directory.

    Returns:
        Where it is. It appears complete or not at all.

    Raises:
        RunError: the folder is no run.
        OSError: the disk is full or the folder cannot be written.
    """
    folder = place(folder).absolute()
    options, description = read_config(folder), read_description(folder)
    history, results = read_history(folder / "metrics.jsonl"), _results(folder)
    gallery = read_gallery(folder)
    rows = score_rows(results)
    page = render(
        resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        name=folder.name,
        data="miniature" if options.on_miniature else "your own" if options.source is not None else "real",
        benchmark=results.get("benchmark") or options.target or options.benchmark,
        recipe=options.recipe,
        seed=options.seed,
        target_labels=results.get("target_labels", 0),
        finished=bool(results),
        last_step=history.last_step,
        steps=results.get("steps"),
        stages=results.get("stages", []),
        rows=rows,
        gap=results.get("gap_closed"),
        protocol=protocol_sentence(results["protocol"]) if rows else "",
        others=_other_protocols(results),
        classes=_class_table(rows, description.classes),
        pictures=_pictures(folder, gallery),
        legend=[(description.classes.names[i], _hex(description.classes, i)) for i in gallery.classes],
        charts={
            name: svg and Markup(svg)  # our own, not a user's text
            for name, svg in _charts(folder, history, results, description.classes, options.pseudo_labels).items()
        },
        label_free=results.get("label_free") or {},
        signals=SIGNALS,
        labels=_label_facts(results, history, given=options.pseudo_labels),
        messages=history.messages[:MOST_MESSAGES],
        more_messages=max(0, len(history.messages) - MOST_MESSAGES),
        command=command_line(options),
        config=(folder / "config.toml").read_text(encoding="utf-8"),
        versions=results.get("versions", {}),
        seconds=results.get("seconds", {}),
    )
    write_whole(folder / FILE, page)
    return folder / FILE


def render(template: str, **values: Any) -> str:
    """A page of a template, with the look that all pages have."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"))
    return environment.from_string(template).render(style=style, **values)


def score_rows(results: dict[str, Any]) -> list[ScoreRow]:
    """The rows that were scored, in the order of the table; none for a run without labels or without an end."""
    scores = results.get("scores", {})
    return [
        ScoreRow(key, name, scores[key]["miou"], scores[key]["per_class"])
        for key, name in ROW_NAMES.items()
        if scores.get(key)
    ]


def _results(folder: Place) -> dict[str, Any]:
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return results


def _other_protocols(results: dict[str, Any]) -> list[tuple[str, float]]:
    adapted = results.get("scores", {}).get("adapted")
    return [] if not adapted else list(adapted["protocols"].items())[1:]


def _class_table(rows: Sequence[ScoreRow], classes: ClassSet) -> list[dict[str, Any]]:
    """A line for every class that some row has a number for."""
    by_key = {row.key: row.per_class for row in rows}
    table = []
    for index, name in enumerate(classes.names):
        cells = {key: values[index] for key, values in by_key.items()}
        before, after = cells.get("source_only"), cells.get("adapted")
        if any(cell is not None for cell in cells.values()):
            change = None if before is None or after is None else after - before
            table.append({"name": name, "colour": _hex(classes, index), "cells": cells, "change": change})
    return table


def _pictures(folder: Place, gallery: Gallery) -> list[dict[str, Any]]:
    """Rows of (caption, data URI)."""
    return [
        {
            "image_id": row.image_id,
            "cells": [(PICTURE_NAMES[kind], _data_uri(folder / FOLDER / file)) for kind, file in row.files.items()],
        }
        for row in gallery.rows
    ]


def _data_uri(path: Place) -> str:
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _charts(
    folder: Place, history: History, results: dict[str, Any], classes: ClassSet, given: str | None
) -> dict[str, str | None]:
    names, stages = classes.names, history.stages()
    made = given is None  # labels from before the run have no age, and nobody selects among them
    drawn = {
        "loss": charts.curves(
            {name.removeprefix("loss/"): history.curve("train", name) for name in history.names("train", "loss/")},
            "loss terms",
            stages=stages,
        ),
        "score": _score_chart(history, results),
        "signals": charts.curves({name: history.curve("signals", name) for name in SIGNALS}, "share", stages=stages),
        "age": charts.curves(
            {name: history.curve("train", f"label_age_steps_{name}") for name in ("p50", "p95") if made}, "steps"
        ),
        "acceptance": charts.class_heat(
            *(history.rows("teachers", "acceptance") if made else ([], [])),
            names,
            "accepted share of the pixels taken for each class",
        ),
        "shares": charts.class_heat(
            *history.rows("teachers", "class_shares"), names, "share of each class among accepted pixels", gamma=0.4
        ),
        "prior": _prior_chart(history, names),
    }
    path = folder / CONFUSION
    drawn["confusion"] = charts.confusion_matrix(read_confusion(path), names) if path.is_file() else None
    return drawn


def _prior_chart(history: History, names: tuple[str, ...]) -> str | None:
    """Of the classes whose frequencies are said to differ most between source and target, how the estimate moved."""
    steps, rows = history.rows("teachers", "prior_offset")
    if not steps:
        return None
    last = rows[-1]
    most = sorted(range(len(last)), key=lambda i: -abs(last[i] or 0.0))[: len(charts.COLOURS)]
    return charts.curves(
        {names[i]: [(step, float(row[i] or 0.0)) for step, row in zip(steps, rows, strict=True)] for i in most},
        "added to class scores, at most",
    )


def _score_chart(history: History, results: dict[str, Any]) -> str | None:
    """The score over the steps; its last point is the result."""
    curve, rows = history.curve("score", "miou"), {row.key: row for row in score_rows(results)}
    if "adapted" in rows:
        curve = [*(point for point in curve if point[0] < results["steps"]), (results["steps"], rows["adapted"].miou)]
    levels = {row.name: row.miou for row in rows.values() if row.key != "adapted"}
    recommended = (results.get("label_free") or {}).get("recommended")
    marks = {} if recommended is None else {"best without labels": recommended}
    return charts.curves({"adapted": curve}, "target mIoU, %", levels=levels, marks=marks if curve else {})


def _label_facts(results: dict[str, Any], history: History, given: str | None) -> list[tuple[str, str]]:
    """What the two loops did to each other, in words."""
    ages, teachers = results.get("label_age_steps") or {}, results.get("teachers") or {}
    if ages.get("p50") is None:
        return []
    read, missing, student = results["labels"]["read"], results["labels"]["missing"], results["student"]
    facts = [
        ("waiting for labels", f"{student['wait_share']:.2%} of the student's time"),
        ("labels read", f"{read:,}, and {missing:,} times there was none yet"),
    ]
    if given is not None:
        return [*facts, ("given by the user", given)]
    facts.insert(0, ("label age, steps", f"p50 {ages['p50']}, p95 {ages['p95']}, max {ages['max']}"))
    if teachers.get("labels_made") is not None:
        facts += [
            ("labels made", f"{teachers['labels_made']:,}"),
            ("speed", f"teachers {teachers['images_per_s']:.1f}, student {student['images_per_s']:.1f} images/s"),
            ("teachers idle", f"{teachers['idle_share']:.0%}"),
            ("teacher failures", str(teachers["teacher_failures"])),
        ]
    last = history.of("teachers")[-1] if history.of("teachers") else {}
    if last.get("blocks_collapsed"):
        facts.append(("refused, classes collapsed", f"{last['blocks_collapsed']} blocks of labels"))
    return facts


def _hex(classes: ClassSet, index: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*classes.palette[index])
