"""``results.json``: the machine-readable result, and the numbers of the final table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from actors.storage import Place, write_whole
from models.scores import gap_closed
from pipelines.setup import Setup

ROW_NAMES = {"source_only": "source-only", "adabn": "AdaBN", "adapted": "adapted", "oracle": "oracle"}
"""The rows of the score table, in order, and what people call them."""
LEARNER = ("steps", "reward_age_steps", "coefficient")
"""What is kept of a teacher that learns: its optimiser steps, the age of its newest reward, what that made of it."""
CONFUSION = "confusion.csv"
"""Confusion matrix of the adapted network at the last step, in a run directory."""


def after_step(step: int) -> str:
    """Key of the score after a stage that ended at a step."""
    return f"after step {step}"


def stage_scores(setup: Setup, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores after each stage, in order; the last one is the adapted network's. Without one where none was scored."""
    ends = accumulate(stage.steps for stage in setup.plan.stages)
    rows = [(stage.name, end, scores.get(after_step(end))) for stage, end in zip(setup.plan.stages, ends, strict=True)]
    name, end, _ = rows[-1]
    rows[-1] = name, end, scores.get("adapted")
    return [{"name": name, "step": end, **score} for name, end, score in rows if score is not None]


def assemble(
    setup: Setup,
    scores: dict[str, Any],
    student: dict[str, Any],
    teachers: dict[str, Any],
    seconds: dict[str, float],
    *,
    label_free: dict[str, Any],
    learner: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the result.

    Args:
        setup: the run.
        scores: by row of the table, and by :func:`after_step` of the stages; rows that were not run are missing.
        student: summary of the lead student.
        teachers: last status of the label bank.
        seconds: wall-clock seconds by phase.
        label_free: signals of the last step, ``recommended`` (the step that looks best without labels) and its
            ``recommended_score``.
        learner: last words of a teacher that learned beside its student; None without one.
    """
    source, oracle = scores.get("source_only"), scores.get("oracle")
    return {
        "benchmark": setup.benchmark.name,
        "recipe": setup.options.recipe,
        "data": setup.data,
        "protocol": protocol(setup),
        "class_names": list(setup.benchmark.classes.names),
        "scores": {row: scores.get(row) for row in ROW_NAMES},
        "gap_closed": None
        if source is None or "adapted" not in scores
        else gap_closed(scores["adapted"]["miou"], source["miou"], None if oracle is None else oracle["miou"]),
        "stages": stage_scores(setup, scores),
        "steps": setup.plan.total_steps,
        "target_labels": 0 if setup.domains.few is None else len(setup.domains.few),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "student": {
            key: student[key] for key in ("images_per_s", "seconds", "wait_share", "data_wait_share", "precision")
        },
        "labels": {
            "read": student["labels_read"],
            "missing": student["labels_missing"],
            "given": setup.options.pseudo_labels is not None,
        },
        "teachers": {
            key: teachers.get(key) for key in ("images_per_s", "idle_share", "labels_made", "teacher_failures")
        },
        "prior": _prior(setup, teachers),
        "trainable_teacher": None if learner is None else {key: learner.get(key) for key in LEARNER},
        "label_age_steps": student["label_age_steps"],
        "label_free": label_free,
        "skipped": student["skipped"],
        "seed": setup.options.seed,
        "run": record(setup),
        "versions": versions(),
    }


def _prior(setup: Setup, teachers: dict[str, Any]) -> dict[str, Any] | None:
    """Class frequencies of source and target that labels were last adjusted to; None where they were not."""
    plan = next((labels.prior for labels in setup.labels.values() if labels.prior is not None), None)
    if plan is None or teachers.get("target_prior") is None:
        return None
    return {
        "method": plan.method if plan.target is None else setup.options.adjust_prior,
        "source": list(plan.source),
        "target": teachers["target_prior"],
        "shift": teachers["prior_shift"],
    }


def record(setup: Setup) -> dict[str, Any]:
    """What the run did, with everything decided that its options left open."""
    options = setup.options
    return {
        "preset": setup.preset.name,
        "faithful": options.faithful,
        "refresh": options.resolved_refresh,
        "init": options.init,
        "label_size": list(setup.preset.label_size),
        "rates": setup.preset.rates,
        # None and auto: as ``faithful`` says.
        "asked": {name: getattr(options, name) for name in ("hard_pixels", "rare_weight", "norm_affine")},
        "stages": [
            {
                "name": stage.name,
                "steps": stage.steps,
                "batch": stage.batch,
                "first_rate": stage.learning_rate(0),
                "dropout": stage.dropout,
                "ema_decay": stage.ema_decay,
                "statistics": stage.statistics,
                "norm_images": stage.norm_images,
                "clip_norm": stage.clip_norm,
            }
            for stage in setup.plan.stages
        ],
        "options": {name: dataclasses.asdict(found) for name, found in sorted(setup.decided.items())},
    }


def protocol(setup: Setup) -> dict[str, Any]:
    """How the scores of a run are made: what must stand beside every one of them."""
    split = setup.domains.validation
    mirrored = [False, True] if setup.preset.score_mirrored else [False]
    return {
        "classes": len(setup.benchmark.protocols[setup.benchmark.primary_protocol]),
        "outputs": len(setup.benchmark.classes),
        "label_size": None if split is None else list(setup.preset.score_labels or split.label(0).shape[::-1]),
        "network": "ema" if setup.plan.stages[-1].ema_decay is not None else "student",
        "views": [[*view, flip] for view in setup.preset.score_views for flip in mirrored],
    }


def protocol_sentence(protocol: dict[str, Any]) -> str:
    """What was scored, for people; :func:`protocol` has the parts.

    Means over 16 classes of 16 outputs and of 19 are different scores (methods §2.3); results of earlier versions do
    not say which they are.
    """
    label = "×".join(map(str, protocol["label_size"]))
    views = ", ".join(f"{w}×{h}{' mirrored' if m else ''}" for w, h, m in protocol["views"])
    of_run = protocol["network"] in ("ema", "student")
    what = f"adapted = {protocol['network']} network at the last step" if of_run else f"weights {protocol['network']}"
    outputs = protocol.get("outputs")
    classes = f"{protocol['classes']} classes" + (f" of {outputs} outputs" if outputs else "")
    return f"{classes}; {what}; views {views}; labels {label}"


def score_lines(results: dict[str, Any]) -> list[str]:
    """The adapted network's score on every protocol of classes, each with network, largest view and label size.

    Args:
        results: ``results.json``, with a score.
    """
    how = results["protocol"]
    (width, height), tta = how["label_size"], " + TTA" if len(how["views"]) > 1 else ""
    largest = "×".join(map(str, max(how["views"])[:2]))
    where = f"({how['network']}, {largest}{tta}, label size {width}×{height})"
    scores = results["scores"]["adapted"]["protocols"]
    return [f"mIoU{name} = {score:.1f} {where}" for name, score in scores.items()]


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    at = commit()
    return {
        **({} if at is None else {"commit": at}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "cores": str(os.cpu_count()),
    }


def commit() -> str | None:
    """The commit of the source tree that runs, with a + if it was changed; None where it is no git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_confusion(path: Place, names: Sequence[str], confusion: Sequence[Sequence[int]]) -> None:
    """Write a confusion matrix as CSV, a row a class of the labels, a column a predicted class, in pixels."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["label \\ prediction", *names])
    writer.writerows([name, *row] for name, row in zip(names, confusion, strict=True))
    write_whole(path, text.getvalue())


def read_confusion(path: Place) -> np.ndarray:
    """What :func:`write_confusion` wrote, int64 C×C."""
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))[1:]
    return np.array([row[1:] for row in rows], np.int64)


def write_json(path: Place, value: Any) -> None:
    """Write JSON; it appears complete or not at all."""
    write_whole(path, json.dumps(value, indent=1))
