"""Pseudo labels out of a run, and from a folder into the file that a run takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from actors.errors import RunError, UnreadableImage
from actors.labeller import Labeller
from actors.prior_estimate import Adjustment, estimated
from actors.protocols import LabelPlan
from actors.records import decode
from actors.storage import LOCAL_OUT, local, place
from models.networks.segmenter import Segmenter
from models.uncertainty import mean_probabilities, trunk_views
from pipelines.benchmarks import Benchmark, Published
from pipelines.label_rules import MonteCarloRule, offset_of
from pipelines.options import DataOptions, read_config
from pipelines.pseudo_labels.layouts import LAYOUTS, FileLayout, FolderLayout, Ids, Layout
from pipelines.pseudo_labels.table import PseudoLabel, open_table
from pipelines.setup import Setup, choose_pair, resolve
from pipelines.trained import check_fits, check_same_classes
from pipelines.views import network_input
from pipelines.weights import Weights, newest_weights

Progress = Callable[[int, int], None]


@dataclass
class Exchanged:
    """What was written."""

    out: Path
    images: int = 0
    step: int | None = None
    """Of the weights that labelled."""
    kept: float = 0.0
    """Mean share of pixels that are not withheld."""
    skipped: list[str] = field(default_factory=list)
    """A sentence for every image without a label."""

    def add(self, label: np.ndarray) -> None:
        """Count one."""
        share = float((label != 255).mean())
        self.kept += (share - self.kept) / (self.images + 1)
        self.images += 1


def export_labels(
    run: str, out: str, layout: FileLayout, progress: Progress, *, weights: Weights = "last", threads: int | None = None
) -> Exchanged:
    """Label the target images of a run as its teachers would now, and write the labels.

    Thresholds that need the whole set come from these labels themselves.

    Args:
        run: run directory.
        out: folder, or for ``parquet`` a file.
        layout: one of :data:`pipelines.pseudo_labels.layouts.LAYOUTS`, or ``parquet``.
        progress: told (images done, images in all); every image is labelled first and written afterwards.
        weights: see :func:`pipelines.trained.load_trained`.
        threads: CPU threads; None for all cores.

    Raises:
        RunError: the folder is no run, makes no pseudo labels, has no checkpoint; or the labels cannot be written.
    """
    target_file = local(out, "--out", LOCAL_OUT).absolute()
    setup = resolve(read_config(run), to_train=False)
    folder = place(setup.plan.folder)
    check_same_classes(setup)
    plan = setup.makes  # also where the run itself was given others
    if plan is None:
        raise RunError(f"recipe {setup.options.recipe} of {folder} makes no pseudo labels; export those of another run")
    target = setup.domains.target
    step, arrays = newest_weights(folder, weights)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if layout != "parquet" and LAYOUTS[layout].probability and isinstance(plan.rule, MonteCarloRule):
        # One pass deviates by nothing and doubts nothing, and all passes of a network without a dropout are one.
        dropped = isinstance(network := setup.network_with(arrays), Segmenter) and bool(network.heads())
        several = plan.rule.passes > 1 and plan.rule.dropout > 0 and dropped
        plan = replace(plan, rule=replace(plan.rule, negative=several, statistics=several))
    labeller = Labeller(setup.plan.networks, setup.target_reader, {0: plan}, setup.options.seed, device)
    check_fits(setup.network_with(arrays), arrays, folder)
    labeller.load(step, arrays)
    adjustment = _adjustment(setup, plan, labeller.network)
    done = Exchanged(target_file, step=step)
    with _readable_write_errors(done.out):
        if layout == "parquet":
            with open_table(done.out, setup.benchmark.classes.names) as table:
                for item, *_ in _labelled(setup, labeller, plan, adjustment, done, progress):
                    table.add(item)
            return done
        chosen = LAYOUTS[layout]
        _refuse_clash(chosen, layout, target.image_paths)
        ids = _ids(chosen, setup.benchmark)
        if chosen.soft:
            for image_path, probabilities in _soft(setup, labeller, plan, adjustment, done, progress):
                chosen.write_soft(done.out, image_path, probabilities, ids)
            return done
        for item, image_path, record in _labelled(setup, labeller, plan, adjustment, done, progress):
            assert item.confidence is not None
            chosen.write(done.out, image_path, item.label, item.confidence, ids, setup.benchmark.classes, record)
    return done


def _adjustment(setup: Setup, plan: LabelPlan, network: nn.Module) -> Adjustment | None:
    """To the target's class frequencies, where a run's labels are adjusted: what this network says they are."""
    prior = plan.prior
    if prior is None:
        return None
    if prior.target is not None:
        return Adjustment(prior.offset(np.array(prior.target)))
    survey = setup.survey(getattr(plan.rule, "ignore_bottom", 0.0), plan.source)
    return Adjustment(prior.offset(estimated(prior, survey(network))))


def _labelled(
    setup: Setup,
    labeller: Labeller,
    plan: LabelPlan,
    adjustment: Adjustment | None,
    done: Exchanged,
    progress: Progress,
) -> Iterator[tuple[PseudoLabel, str, dict[str, np.ndarray]]]:
    """Every image that can be read, labelled and selected, with its path and its record."""
    target, rows = setup.domains.target, plan.rule.layout.rows_per_block(len(setup.domains.target))
    histogram = np.zeros((plan.rule.num_classes, 256), np.int64)
    assert done.step is not None
    with tempfile.TemporaryDirectory(dir=_existing(done.out)) as waiting:
        blocks = []
        for chunk, start in enumerate(range(0, len(target), rows)):
            stop = min(start + rows, len(target))
            header, block = labeller.label(0, chunk, start, stop, done.step, adjustment)
            histogram += header.histogram
            done.skipped += [f"cannot read {path}" for path in header.skipped]
            blocks.append(Path(waiting) / f"{chunk}.arrow")
            with pa.OSFile(str(blocks[-1]), "wb") as sink, pa.ipc.new_file(sink, block.schema) as writer:
                writer.write_table(block)
            progress(stop, len(target))
        thresholds = None if plan.selection is None else plan.selection.thresholds(histogram)
        broken = {sentence.removeprefix("cannot read ") for sentence in done.skipped}
        paths = iter(target.image_paths)
        for file in blocks:
            with pa.memory_map(str(file)) as source:
                block = pa.ipc.open_file(source).read_all()
                for row, image_id in enumerate(block.column("image_id").to_pylist()):
                    image_path, record = next(paths), decode(block, row)
                    label = record[plan.label_column]
                    if plan.selection is not None and thresholds is not None:
                        label = plan.selection.apply(record, thresholds)
                    if image_path not in broken:
                        done.add(label)
                        yield PseudoLabel(image_id, np.array(label), np.array(record["confidence"])), image_path, record


def _soft(
    setup: Setup,
    labeller: Labeller,
    plan: LabelPlan,
    adjustment: Adjustment | None,
    done: Exchanged,
    progress: Progress,
) -> Iterator[tuple[str, Any]]:
    """Path and probabilities, float32 C×h×w, of every image that can be read."""
    height, width = plan.rule.layout.columns[0][1]
    network, preset, target = labeller.network, setup.preset, setup.domains.target
    assert isinstance(network, Segmenter)
    device = labeller.device
    offset = offset_of(adjustment, device)
    for index, image_path in enumerate(target.image_paths):
        try:
            images = [setup.target_reader.read(index, view) for view in preset.score_views]
        except UnreadableImage as error:
            done.skipped.append(str(error))
            continue
        inputs = [
            network_input(torch.from_numpy(np.array(image))[None].to(device), network.config.pixels) for image in images
        ]
        views = trunk_views(network, inputs, mirror=preset.score_mirrored)
        found = mean_probabilities(network, views, None, (height // 4 + 1, width // 4 + 1), offset)[0]
        done.add(np.zeros((1, 1), np.uint8))
        yield image_path, found.float().cpu().numpy()
        progress(index + 1, len(target))


def import_labels(options: DataOptions, folder: str, layout: FolderLayout, out: str, progress: Progress) -> Exchanged:
    """Read a folder of pseudo labels for the target images of a benchmark into a Parquet file.

    Args:
        options: which benchmark.
        folder: where the layout begins; a ``train`` folder inside is found, too.
        layout: one of :data:`pipelines.pseudo_labels.layouts.LAYOUTS`.
        out: the Parquet file.
        progress: told (images done, images in all).

    Raises:
        RunError: no target image has a label there, or the file cannot be written.
        DataError: the benchmark's data are not as expected.
    """
    root = local(folder, "the folder of labels", "its files are looked for one by one")
    target_file = local(out, "--out", LOCAL_OUT).absolute()
    pair, open_data = choose_pair(options)
    target, chosen = open_data().target, LAYOUTS[layout]
    _refuse_clash(chosen, layout, target.image_paths)
    ids = _ids(chosen, pair)
    places = [root / part for part in ("", "train") if (root / part).is_dir()]
    if not places:
        raise RunError(f"{folder} is no folder; give the one that holds the labels")
    first = chosen.path(root, target.image_paths[0])
    if not any(chosen.path(place, path).is_file() for place in places for path in target.image_paths):
        raise RunError(
            f"{folder} holds no label of {target.name} in the layout {layout}: that of {target.image_paths[0]} "
            f"would be {first}"
        )
    done = Exchanged(target_file)
    with _readable_write_errors(done.out), open_table(done.out, pair.classes.names) as table:
        for number, (image_id, image_path) in enumerate(zip(target.image_ids, target.image_paths, strict=True), 1):
            try:
                found = next((item for place in places if (item := chosen.read(place, image_path, ids))), None)
            except UnreadableImage as error:
                done.skipped.append(str(error))
            else:
                if found is None:
                    done.skipped.append(f"{image_id} has no label there")
                else:
                    table.add(PseudoLabel(image_id, *found))
                    done.add(found[0])
            progress(number, len(target))
        if not done.images:
            raise RunError(f"none of the labels in {folder} can be read: {done.skipped[0]}")
    return done


def _ids(layout: Layout, pair: Benchmark) -> Ids:
    """A layout's numbers for a benchmark."""
    kept = pair.kept if isinstance(pair, Published) else None
    return layout.ids(len(pair.classes), pair.protocols[pair.primary_protocol], kept)


def _refuse_clash(layout: Layout, name: str, image_paths: tuple[str, ...]) -> None:
    clash = layout.clash(image_paths)
    if clash is not None:
        raise RunError(f"{clash[0]} and {clash[1]} would have one label file in the layout {name}; use parquet")


def _existing(path: Path) -> Path:
    """The nearest folder above that is there: temporary files lie on the disk of what they become."""
    return next(folder for folder in path.parents if folder.is_dir())


@contextmanager
def _readable_write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"the labels cannot be written to {out}: {error.strerror or error}") from error
