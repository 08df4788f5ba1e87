"""Score the newest checkpoint of a run, or weights in a file, in this process, without Ray, image by image."""

from __future__ import annotations

import csv
import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.errors import RunError
from actors.evaluator import Scorer
from models.networks.build import Build, Config
from models.networks.layouts import described, is_whole_network
from models.scores import ConfusionMatrix, mean_iou
from pipelines import pictures
from pipelines.benchmarks import benchmark
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.datasets.dataset import Split
from pipelines.options import AdaptOptions
from pipelines.recipes import RECIPES
from pipelines.results import CONFUSION, ROW_NAMES, protocol, write_confusion
from pipelines.setup import Setup, resolve
from pipelines.trained import check_fits, check_same_classes
from pipelines.weights import check_initial, load_initial, newest_weights, read_weights

WORST = 10
WORST_SIDE = 480
"""Longer side of a picture in the row of an overlay, in pixels."""
COLUMNS = ("image", "class", "iou", "label_pixels", "predicted_pixels", "shared_pixels")


def rescore(options: AdaptOptions) -> dict[str, Any]:
    """Score a run's newest checkpoint; rows that the run measured itself are taken from its ``results.json``.

    Beside the scores it writes ``per_image.csv``, ``confusion.csv`` and ``worst/`` into the folder ``evaluation``; the
    last are overlays of the images with the lowest mean IoU over the classes that their labels hold.

    Raises:
        RunError: the run has no checkpoint, or one of another network than its options say, or there is nothing to
            score on; or the results cannot be written.
    """
    setup = resolve(options, to_train=False)
    folder = options.folder()
    check_same_classes(setup)
    step, weights = newest_weights(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = setup.make_scorer()(device)
    check_fits(setup.network_with(weights), weights, folder)
    path = folder / "results.json"
    known: dict[str, Any] = json.loads(path.read_text())["scores"] if path.is_file() else {}
    scores = {row: known.get(row) for row in ROW_NAMES}
    scores["adapted"] = _scored(setup, scorer, weights, folder / "evaluation")
    return {
        "benchmark": setup.benchmark.name,
        "recipe": options.recipe,
        "data": setup.data,
        "seed": options.seed,
        "protocol": protocol(setup),
        "class_names": list(setup.benchmark.classes.names),
        "scores": scores,
        "step": step,
    }


def score_file(path: str, data: Mapping[str, Any], out: str) -> dict[str, Any]:
    """Score a whole network in a published layout, in the published protocol of its system and of a benchmark.

    What is in the file decides: a network with one head is ProDA's, which sees whole images once; the outputs of its
    classifier are the classes.

    Args:
        path: of the file; see :func:`pipelines.weights.read_weights`.
        data: fields of :class:`pipelines.options.DataOptions`.
        out: folder for what :func:`rescore` writes beside the scores.

    Raises:
        RunError: it cannot be read, is of another network, of classes that the benchmark does not have, or a backbone
            alone; or the results cannot be written.
        DataError: the data are not where or what they should be.
    """
    state = read_weights(path)
    if not is_whole_network(state):
        raise RunError(
            f"{path} has no classifier layer5.head: it is a backbone alone, which cannot be scored, or of another "
            "system; give a whole network of MRNet, EPLC or ProDA"
        )
    options = AdaptOptions(**data, init=path, name="file", references="never")
    setup = resolve(_scored_as(options, described(state)), to_train=False)
    network = Build(described(state, setup.preset.network))  # perhaps with a norm that the recipe's own has not
    setup = replace(setup, plan=replace(setup.plan, network=network))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = setup.make_scorer()(device)
    check_initial(path, scorer.network)
    load_initial(path, scorer.network)
    weights = {name: tensor.cpu().numpy() for name, tensor in scorer.network.state_dict().items()}
    return {
        "benchmark": setup.benchmark.name,
        "weights": Path(path).name,
        "data": setup.data,
        "protocol": {**protocol(setup), "network": Path(path).name},
        "class_names": list(setup.benchmark.classes.names),
        "scores": {"adapted": _scored(setup, scorer, weights, Path(out).absolute())},
    }


def _scored_as(options: AdaptOptions, found: Config) -> AdaptOptions:
    """The options of a run whose network a file's is: of the system that its heads are called after.

    Raises:
        RunError: the benchmark has not as many classes as the network has outputs.
    """
    known = benchmark(options.benchmark).class_counts
    if found.num_classes not in known:
        raise RunError(
            f"{options.init} has a classifier of {found.num_classes} outputs, and {options.benchmark} has "
            f"{' or '.join(map(str, known))} classes; give the --benchmark that it was trained for"
        )
    system = next(recipe.name for recipe in RECIPES.values() if recipe.system == found.heads)
    return replace(options, recipe=system, classes=found.num_classes)


def _scored(setup: Setup, scorer: Scorer, weights: Mapping[str, np.ndarray], folder: Path) -> dict[str, Any]:
    """The score, and what goes with it on disk."""
    assert setup.domains.validation is not None
    images = PerImage(setup.domains.validation, setup.benchmark.classes)
    found = scorer.score(weights, images.see)
    confusion = found.pop("confusion")
    try:
        images.write(folder)
        write_confusion(folder / CONFUSION, setup.benchmark.classes.names, confusion)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    return found


class PerImage:
    """Scores of every image, and the worst of them.

    Args:
        split: the labelled images.
        classes: names and colours.
    """

    def __init__(self, split: Split, classes: ClassSet) -> None:
        self.split, self.classes = split, classes
        self.rows: list[tuple[Any, ...]] = []
        self.worst: list[tuple[float, int, np.ndarray]] = []

    def see(self, index: int, prediction: Tensor, label: Tensor) -> None:
        """Count one image; (H, W) classes and (H, W) train ids."""
        matrix = ConfusionMatrix(len(self.classes))
        matrix.update(prediction, label)
        iou = matrix.iou()
        wanted, given, shared = matrix.matrix.sum(1), matrix.matrix.sum(0), matrix.matrix.diagonal()
        present = torch.nonzero(wanted)[:, 0].tolist()
        mean = mean_iou(iou, present) if present else float("nan")
        name = self.split.image_ids[index]
        self.rows.append((name, "mean", _cell(mean), int(wanted.sum()), int(given.sum()), int(shared.sum())))
        for train_id in torch.nonzero(wanted + given)[:, 0].tolist():
            counts = (int(column[train_id]) for column in (wanted, given, shared))
            self.rows.append((name, self.classes.names[train_id], _cell(float(iou[train_id])), *counts))
        if present:
            heapq.heappush(self.worst, (-mean, -index, prediction.numpy().astype(np.uint8)))
            if len(self.worst) > WORST:
                heapq.heappop(self.worst)

    def write(self, folder: Path) -> None:
        """Write ``per_image.csv`` and ``worst/01-….jpg``, the worst first.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".per_image.partial"
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(self.rows)
        partial.rename(folder / "per_image.csv")
        for old in (folder / "worst").glob("*.jpg"):
            old.unlink()
        for place, (negative, index, prediction) in enumerate(sorted(self.worst, reverse=True), 1):
            name = self.split.image_ids[-index].replace("/", "_")
            picture = self._compare(-index, prediction, f"{name}: mIoU {-100 * negative:.1f}; image, label, prediction")
            pictures.save(picture, folder / "worst" / f"{place:02d}-{name}.jpg")

    def _compare(self, index: int, prediction: np.ndarray, title: str) -> Any:
        size = pictures.fitted(prediction.shape, WORST_SIDE)
        image, label = self.split.image(index, size), self.split.label(index, size)
        guess = pictures.shrunk(prediction, size)
        row = [image, pictures.overlay(image, label, self.classes), pictures.overlay(image, guess, self.classes)]
        shown = sorted({*np.unique(label).tolist(), *np.unique(guess).tolist()} - {IGNORE})
        return pictures.with_key(pictures.side_by_side(row), self.classes, shown, title)


def _cell(iou: float) -> str:
    """IoU in percent; empty where neither side has the class."""
    return "" if math.isnan(iou) else f"{100 * iou:.2f}"
