"""Pseudo labels that a user gives a run, instead of teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.errors import RunError
from actors.label_rounds import write_blocks
from actors.protocols import LabelPlan, StagePlan
from actors.records import encode
from actors.staleness import StalenessPolicy
from models.selection import confidence_histogram
from pipelines.datasets.classes import IGNORE
from pipelines.datasets.dataset import Split
from pipelines.pictures import shrunk
from pipelines.pseudo_labels.table import Table

COLUMNS = {"label", "confidence"}
BEFORE_THE_RUN = 0
"""The weights version of a given label: none of this run's."""


@dataclass(frozen=True)
class Round:
    """A round of labels as the bank takes it."""

    path: str
    missing: int
    """Target images without a label."""


def with_given_labels(stages: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
    """The stages of a recipe with their labels taken as they are given: one round, and no selection after the user's.

    Raises:
        RunError: the recipe takes no pseudo labels, or more of a label than a file holds.
    """
    labelled = [stage.labels for stage in stages if stage.labels is not None]
    if not labelled:
        raise RunError("this recipe takes no pseudo labels; leave --pseudo-labels out, or choose another --recipe")
    if len(labelled) > 1:
        raise RunError(
            f"--pseudo-labels are one round of labels, and the recipe is to run {len(labelled)}; leave rounds out, or "
            "run one stage alone (--from-stage, --to-stage)"
        )
    for plan in labelled:
        wanted = {name for name, _ in plan.rule.layout.columns}
        if wanted != COLUMNS:
            raise RunError(
                f"the pseudo labels of this stage have {', '.join(sorted(wanted))}, and files hold label and "
                "confidence; leave --pseudo-labels out, or run a stage that needs no more of them (--from-stage)"
            )
    return tuple(_as_given(stage) for stage in stages)


def _as_given(stage: StagePlan) -> StagePlan:
    if stage.labels is None:
        return stage
    labels = replace(stage.labels, policy=StalenessPolicy(refresh="once"), selection=None)
    return replace(stage, labels=labels)


def check_given(path: str, target: Split, classes: tuple[str, ...]) -> Table:
    """Open a file of pseudo labels for a run.

    Raises:
        RunError: it cannot be read, is of other classes, or names none of the target images.
    """
    table = Table(path)
    if table.classes != classes:
        raise RunError(f"{path} has the classes {', '.join(table.classes)}, this run {', '.join(classes)}")
    if not set(table.image_ids) & set(target.image_ids):
        example = repr(table.image_ids[0]) if table.image_ids else "no image at all"
        raise RunError(
            f"{path} labels none of the {len(target)} images of {target.name}: it has for example {example}, they are "
            f"called like {target.image_ids[0]!r}"
        )
    return table


def write_given_round(table: Table, target: Split, plan: LabelPlan, rows: int, folder: str) -> Round:
    """Write the labels of a file as a round of a stage, at its size and in its blocks.

    An image without a label gets one that is withheld everywhere.

    Args:
        table: see :func:`check_given`.
        target: the target images.
        plan: of the stage.
        rows: images in a block.
        folder: where the round is written.

    Raises:
        RunError: a label is damaged, or the disk is full.
    """
    layout = plan.rule.layout
    height, width = dict(layout.columns)["label"]
    histogram = np.zeros((layout.num_classes, 256), np.int64)

    def blocks() -> Iterator[pa.Table]:
        for start in range(0, len(target), rows):
            ids, columns, pixels = target.image_ids[start : start + rows], [], []
            for image_id in ids:
                label, confidence = _sized(table, image_id, (width, height))
                columns.append({"label": label, "confidence": confidence})
                pixels.append(np.bincount(label.reshape(-1), minlength=256)[: layout.num_classes])
                np.add(histogram, confidence_histogram(label, confidence, layout.num_classes), out=histogram)
            yield encode(layout, ids, columns, pixels, weights_version=BEFORE_THE_RUN, made_at_step=BEFORE_THE_RUN)

    missing = sum(image_id not in table for image_id in target.image_ids)
    try:
        return Round(write_blocks(folder, blocks(), lambda: histogram), missing)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"the given labels cannot be written to {folder}: {error}") from error


def _sized(table: Table, image_id: str, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Label and confidence at (width, height), nearest; where no confidence is known, full."""
    found = table.get(image_id)
    if found is None:
        shape = size[::-1]
        return np.full(shape, IGNORE, np.uint8), np.zeros(shape, np.uint8)
    sure = found.confidence if found.confidence is not None else np.full_like(found.label, 255)
    return shrunk(found.label, size), shrunk(sure, size)
