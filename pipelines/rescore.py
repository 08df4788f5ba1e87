"""Score the newest checkpoint of a run, or weights in a file, in this process, without Ray, image by image."""

from __future__ import annotations

import csv
import heapq
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.checkpoints import STAGES
from actors.errors import RunError
from actors.evaluator import Scorer
from actors.storage import LOCAL_OUT, Place, local, place, write_whole
from models.networks.build import Build, Config
from models.networks.layouts import BISENET_COPY, described, is_whole_network, strip_parallel
from models.networks.segmenter import Pixels
from models.scores import ConfusionMatrix, mean_iou
from pipelines import pictures
from pipelines.benchmarks import benchmark
from pipelines.datasets.classes import IGNORE, ClassSet
from pipelines.datasets.dataset import Split
from pipelines.options import AdaptOptions
from pipelines.priors import write_prior
from pipelines.recipes import RECIPES
from pipelines.results import CONFUSION, ROW_NAMES, protocol, write_confusion
from pipelines.run_prior import FILE as PRIOR
from pipelines.run_prior import estimate_with, prior_for
from pipelines.setup import Setup, resolve
from pipelines.trained import FILE, check_fits, check_same_classes, read_description
from pipelines.views import PIXELS
from pipelines.weights import check_initial, load_initial, newest_weights, read_weights

WORST = 10
WORST_SIDE = 480
"""Longer side of a picture in the row of an overlay, in pixels."""
PUBLISHED_PIXELS: Pixels = "bgr_city"
"""What published BiSeNets read of Cityscapes (Q-BI-4); its files do not say so."""
MOST_OFFSETS = 5
COLUMNS = ("image", "class", "iou", "label_pixels", "predicted_pixels", "shared_pixels")


def rescore(options: AdaptOptions, adjust_prior: str = "none") -> dict[str, Any]:
    """Score a run's newest checkpoint; rows that the run measured itself are taken from its ``results.json``.

    Beside the scores it writes ``per_image.csv``, ``confusion.csv`` and ``worst/`` into the folder ``evaluation``; the
    last are overlays of the images with the lowest mean IoU over the classes that their labels hold.

    Args:
        options: of the run.
        adjust_prior: class frequencies of the target that scores are adjusted to: ``estimated``, now and with these
            weights, and written to ``prior.toml`` there; a published table; a TOML file; or ``none``.

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
    prior = _adjust(setup, scorer, weights, adjust_prior, folder / "evaluation")
    scores["adapted"], *also = _scored(setup, scorer, weights, folder / "evaluation")
    return {
        "prior": prior,
        "benchmark": setup.benchmark.name,
        "recipe": options.recipe,
        "data": setup.data,
        "seed": options.seed,
        "protocol": protocol(setup),
        "class_names": list(setup.benchmark.classes.names),
        "scores": scores,
        "also": also,
        "step": step,
    }


def score_file(
    path: str, data: Mapping[str, Any], out: str, pixels: Pixels | None = None, adjust_prior: str = "none"
) -> dict[str, Any]:
    """Score a whole network in a published layout, in the published protocol of its system and of a benchmark.

    What is in the file decides: a network with one head is ProDA's, which sees whole images once; the outputs of its
    classifier are the classes. A system that scores on labels of a size of its own (BiSeNet) is scored so, and under
    ``also`` on labels as they are, as the others do (Q-BI-10).

    Args:
        path: of the file; see :func:`pipelines.weights.read_weights`.
        data: fields of :class:`pipelines.options.DataOptions`.
        out: folder for what :func:`rescore` writes beside the scores.
        pixels: what the network reads, of :data:`pipelines.views.PIXELS`; None to see for oneself, as
            :func:`_pixels_of` does.
        adjust_prior: see :func:`rescore`.

    Raises:
        RunError: it cannot be read, is of another network, of classes that the benchmark does not have, or a backbone
            alone; there are no such pixels; or the results cannot be written.
        DataError: the data are not where or what they should be.
    """
    folder = local(out, "--out", LOCAL_OUT).absolute()
    if pixels is not None and pixels not in PIXELS:
        raise RunError(f"--pixels is {pixels}; choose one of {', '.join(PIXELS)}")
    state = read_weights(path)
    if not is_whole_network(state):
        raise RunError(
            f"{path} has no classifier layer5.head or conv2d_list and no path saptial_path: it is a backbone alone, "
            "which cannot be scored, or of another system; give a whole network of MRNet, EPLC, ProDA, BiSeNet or FADA"
        )
    options = AdaptOptions(**data, init=path, name="file", references="never")
    setup = resolve(_scored_as(options, described(state)), to_train=False)
    config = described(state, setup.preset.network)  # perhaps with a norm that the recipe's own has not
    config = replace(config, pixels=pixels or _pixels_of(place(path), state, config))
    setup = replace(setup, plan=replace(setup.plan, network=Build(config)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = setup.make_scorer()(device)
    check_initial(path, scorer.network)
    load_initial(path, scorer.network)
    weights = {name: tensor.cpu().numpy() for name, tensor in scorer.network.state_dict().items()}
    prior = _adjust(setup, scorer, weights, adjust_prior, folder)
    score, *also = _scored(setup, scorer, weights, folder)
    return {
        "prior": prior,
        "benchmark": setup.benchmark.name,
        "weights": place(path).name,
        "data": setup.data,
        "protocol": {**protocol(setup), "network": place(path).name, "pixels": config.pixels},
        "class_names": list(setup.benchmark.classes.names),
        "scores": {"adapted": score},
        "also": also,
    }


def label_lines(results: dict[str, Any]) -> list[str]:
    """Every mean and accuracy of the adapted network, a sentence a size of the labels, and what the network read.

    Args:
        results: of :func:`rescore` or :func:`score_file`.
    """
    protocol = results["protocol"]
    lines = []
    for score in ({"label_size": protocol["label_size"], **results["scores"]["adapted"]}, *results["also"]):
        means = ", ".join(
            f"mIoU{name} {mean:.1f} ({score['absent_as_zero'][name]:.1f} with absent classes as 0)"
            for name, mean in score["protocols"].items()
        )
        lines.append(
            f"labels {'×'.join(map(str, score['label_size']))}, {score['images']} images: {means}; pixel accuracy "
            f"{score['accuracy']:.1f} ({score['accuracy_ignored_wrong']:.1f} with ignored pixels as errors)"
        )
    if results["prior"] is not None:
        offsets = results["prior"]["offset"]
        most = sorted(offsets, key=lambda name: -abs(offsets[name]))[:MOST_OFFSETS]
        said = ", ".join(f"{name} {offsets[name]:+.2f}" for name in most)
        lines.append(f"class scores are adjusted ({results['prior']['from']}), most of all {said}")
    if "pixels" in protocol:
        lines.append(f"the network read {protocol['pixels']} pixels; --pixels changes that")
    return lines


def _adjust(
    setup: Setup, scorer: Scorer, weights: dict[str, np.ndarray], wanted: str, folder: Place
) -> dict[str, Any] | None:
    """Have a scorer adjust class scores to the target's class frequencies.

    Returns:
        Where the frequencies are from, and what is added to the scores; None for nothing.
    """
    names = setup.benchmark.classes.names
    estimate_now = partial(estimate_with, setup, weights, setup.options.prior.method, scorer.device)
    prior = prior_for(wanted, names, None, estimate_now)
    if prior is None:
        return None
    if wanted == "estimated":
        try:
            write_prior(folder / PRIOR, prior)
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    offset = setup.options.prior.temperature * prior.offset
    scorer.offset = torch.from_numpy(offset).float().to(scorer.device)
    return {"from": wanted, "about": prior.about, "offset": dict(zip(names, offset.tolist(), strict=True))}


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


def _pixels_of(path: Place, state: Mapping[str, Tensor], config: Config) -> Pixels:
    """What a file's network reads, as far as it can be told.

    A file in ``stages`` of a run has the run's description beside it. A published BiSeNet is told by its second copy of
    the backbone, with a classifier that was trained on ImageNet: in our exports this one is zeros. Of those, as of any
    other file, it is what the system's network reads by default.
    """
    if path.absolute().parent.name == STAGES and (path.absolute().parents[1] / FILE).is_file():
        described_there = read_description(path.absolute().parents[1]).configs
        return next((found.pixels for found in described_there if found.heads == config.heads), config.pixels)
    unused = strip_parallel(state).get(f"{BISENET_COPY}fc.weight")
    return config.pixels if unused is None or not unused.any() else PUBLISHED_PIXELS


def _scored(setup: Setup, scorer: Scorer, weights: Mapping[str, np.ndarray], folder: Place) -> list[dict[str, Any]]:
    """The score and what goes with it on disk; then, where labels are brought to a size, that on labels as they are.

    The second has ``label_size``, the (width, height) of the first label.
    """
    assert setup.domains.validation is not None
    images = PerImage(setup.domains.validation, setup.benchmark.classes)
    size = setup.preset.score_labels
    found, *also = scorer.score_at([size] if size is None else [size, None], weights, images.see)
    confusion = found.pop("confusion")
    try:
        images.write(folder)
        write_confusion(folder / CONFUSION, setup.benchmark.classes.names, confusion)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    own = list(setup.domains.validation.label(0).shape[::-1])
    return [found, *({"label_size": own, **{k: v for k, v in score.items() if k != "confusion"}} for score in also)]


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

    def write(self, folder: Place) -> None:
        """Write ``per_image.csv`` and ``worst/01-….jpg``, the worst first.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        writer.writerows(self.rows)
        write_whole(folder / "per_image.csv", text.getvalue())
        for old in (folder / "worst").glob("*.jpg"):
            old.unlink()
        for rank, (negative, index, prediction) in enumerate(sorted(self.worst, reverse=True), 1):
            name = self.split.image_ids[-index].replace("/", "_")
            picture = self._compare(-index, prediction, f"{name}: mIoU {-100 * negative:.1f}; image, label, prediction")
            pictures.save(picture, folder / "worst" / f"{rank:02d}-{name}.jpg")

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
