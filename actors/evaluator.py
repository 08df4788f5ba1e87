"""Scores published weights beside the student. The only process that may open target labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
import torch
from torch import Tensor, nn

from actors.checkpoints import CheckpointStore
from actors.desk import Lasting
from actors.errors import UnreadableImage
from actors.labeller import Networks, helper_device
from actors.showcase import Showcase, Shown
from actors.watcher import Watcher
from models.networks.segmenter import Segmenter
from models.networks.statistics import adapt_batch_norm
from models.scores import (
    ConfusionMatrix,
    absent_as_zero_means,
    accuracy,
    accuracy_ignored_wrong,
    nearest,
    protocol_means,
)
from models.uncertainty import View, mean_probabilities, trunk_views

Size = tuple[int, int]


class LabelledReader(Protocol):
    """Labelled target images, for scoring only."""

    def __len__(self) -> int: ...

    def read(self, index: int, size: Size) -> np.ndarray:
        """Image, uint8 H×W×3 RGB, at size (width, height)."""
        ...

    def label(self, index: int) -> np.ndarray:
        """Class map, uint8 H×W, at its own size, 255 = ignore."""
        ...


class Scorer:
    """One confusion matrix over a validation set. Plain object.

    Args:
        network: builds the network; several builders where stages have networks of their own.
        reader: labelled images.
        prepare: uint8 N×H×W×3 RGB and a network → what it reads.
        views: image sizes (width, height) whose probabilities are averaged.
        mirrored: whether every view is also seen mirrored.
        num_classes: C.
        protocols: class indices by protocol name; the first is the primary one.
        device: where the network runs.
        label_size: (width, height) to which labels are brought before they are scored on, nearest; None for their own.
        offset: float32 C, added to the class scores: inference adjustment (methods §7.4); None for nothing.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]],
        reader: LabelledReader,
        prepare: Callable[[Tensor, nn.Module], Tensor],
        views: Sequence[Size],
        mirrored: bool,
        num_classes: int,
        protocols: Mapping[str, Sequence[int]],
        device: torch.device,
        label_size: Size | None = None,
        offset: np.ndarray | None = None,
    ) -> None:
        self.networks = Networks(network, device)
        self.network = self.networks.first
        self.reader, self.prepare, self.views, self.mirrored = reader, prepare, tuple(views), mirrored
        self.num_classes, self.protocols, self.device = num_classes, dict(protocols), device
        self.label_size = label_size
        self.offset = None if offset is None else torch.from_numpy(np.array(offset, np.float32)).to(device)

    def score(
        self, weights: Mapping[str, np.ndarray], see: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> dict[str, Any]:
        """Score one set of weights.

        Args:
            weights: of the network.
            see: told (index, prediction int64 H×W, label uint8 H×W) of every image.

        Returns:
            ``{"miou", "per_class", "protocols", "absent_as_zero", "accuracy", "accuracy_ignored_wrong", "images",
            "confusion"}``: shares in percent, IoU None for a class that occurs nowhere. ``protocols`` leaves such a
            class out and ``absent_as_zero`` is BiSeNet's mean. ``accuracy`` is of all labelled pixels together,
            ``accuracy_ignored_wrong`` the mean over images of the share of all pixels, as BiSeNet's is. The confusion
            matrix has pixel counts, a row a class of the labels, a column a predicted class.

        Raises:
            UnreadableImage: a validation file is broken: a score over fewer images would be another score.
        """
        return self.score_at([self.label_size], weights, see)[0]

    def score_at(
        self,
        label_sizes: Sequence[Size | None],
        weights: Mapping[str, np.ndarray],
        see: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Score one set of weights on labels of several sizes; every image is looked at once.

        Args:
            label_sizes: see ``label_size`` of the class.
            weights: of the network.
            see: told of every image at the first of the sizes, see :meth:`score`.

        Returns:
            What :meth:`score` returns, a size.
        """
        self.network = self.networks.load(weights)
        tallies = [_Tally(self.num_classes) for _ in label_sizes]
        for index in range(len(self.reader)):
            given = torch.from_numpy(np.array(self.reader.label(index)))
            views = self._views(index)
            for number, (size, tally) in enumerate(zip(label_sizes, tallies, strict=True)):
                label = given if size is None else nearest(given, size[::-1])
                prediction = self._classes(views, (label.shape[0], label.shape[1]))
                tally.count(prediction, label)
                if see is not None and number == 0:
                    see(index, prediction, label)
        return [tally.score(self.protocols) for tally in tallies]

    def predict(self, index: int, size: tuple[int, int]) -> Tensor:
        """Classes of one image at a label's (height, width), int64 on the CPU."""
        return self._classes(self._views(index), size)

    def _views(self, index: int) -> list[View]:
        inputs = [self._seen(self.reader.read(index, view)[None]) for view in self.views]
        assert isinstance(self.network, Segmenter)
        return trunk_views(self.network, inputs, mirror=self.mirrored)

    def _classes(self, views: Sequence[View], size: tuple[int, int]) -> Tensor:
        assert isinstance(self.network, Segmenter)
        return mean_probabilities(self.network, views, None, size, self.offset)[0].argmax(0).cpu()

    def with_statistics_of(
        self, weights: Mapping[str, np.ndarray], reader: Any, indices: Sequence[int], batch: int = 4
    ) -> dict[str, np.ndarray]:
        """AdaBN: the same weights with batch-norm statistics estimated on other images.

        Args:
            weights: of the network.
            reader: unlabelled target images.
            indices: which of them; unreadable ones are left out.
            batch: images in one forward pass.
        """
        self.network = self.networks.load(weights)
        adapt_batch_norm(self.network, self._batches(reader, indices, batch))
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.network.state_dict().items()}

    def _batches(self, reader: Any, indices: Sequence[int], batch: int) -> Any:
        for start in range(0, len(indices), batch):
            images = []
            for index in indices[start : start + batch]:
                try:
                    images.append(np.array(reader.read(index, self.views[0])))
                except UnreadableImage:
                    continue
            if images:
                yield self._seen(np.stack(images))

    def _seen(self, images: np.ndarray) -> Tensor:
        """uint8 N×H×W×3 RGB as the network of the hour reads it."""
        return self.prepare(torch.from_numpy(np.array(images)).to(self.device), self.network)


class _Tally:
    """What is counted of a validation set at one size of its labels.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.matrix = ConfusionMatrix(num_classes)
        self.strict: list[float] = []
        """Accuracy of every image, ignored pixels wrong."""

    def count(self, prediction: Tensor, label: Tensor) -> None:
        """Count one image, (H, W) classes and (H, W) labels."""
        self.matrix.update(prediction, label)
        self.strict.append(accuracy_ignored_wrong(prediction, label))

    def score(self, protocols: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """See :meth:`Scorer.score`."""
        matrix = self.matrix.matrix
        per_class = self.matrix.iou() * 100
        means = protocol_means(per_class, protocols)
        return {
            "miou": next(iter(means.values())),
            "per_class": [None if math.isnan(v) else round(v, 3) for v in per_class.tolist()],
            "protocols": means,
            "absent_as_zero": {name: 100 * mean for name, mean in absent_as_zero_means(matrix, protocols).items()},
            "accuracy": 100 * accuracy(matrix),
            "accuracy_ignored_wrong": 100 * float(np.mean(self.strict)),
            "images": len(self.strict),
            "confusion": matrix.tolist(),
        }


class Evaluator:
    """Shell of :class:`Scorer`, :class:`actors.watcher.Watcher` and :class:`actors.showcase.Showcase`.

    What the first two find goes into the run log.

    Args:
        make_scorer: builds the scorer; None where there are no labels to score on.
        make_watcher: builds the watcher.
        make_showcase: builds the showcase; called when pictures are asked for.
        make_source_scorer: builds the scorer of held-out source images; None where there are none.
        target: target images without labels, for AdaBN.
        board: where the newest weights hang.
        run_log: where numbers are written.
        folder: where the weights that look best without labels are kept.
        threads: CPU threads.
    """

    def __init__(
        self,
        make_scorer: Callable[[torch.device], Scorer] | None,
        make_watcher: Callable[[torch.device], Watcher],
        make_showcase: Callable[[torch.device], Showcase],
        target: Any,
        board: Any,
        run_log: Any,
        folder: str,
        threads: int = 1,
        make_source_scorer: Callable[[torch.device], Scorer] | None = None,
    ) -> None:
        device = helper_device(threads)
        self.scorer = None if make_scorer is None else make_scorer(device)
        self.source_scorer = None if make_source_scorer is None else make_source_scorer(device)
        self.watcher = make_watcher(device)
        self.device, self.make_showcase = device, make_showcase
        self.target, self.board, self.run_log = target, board, run_log
        self.recommended = Recommended(folder)

    def look_at_newest(self, score: bool = True) -> int | None:
        """Look at the weights that hang on the board, and score them where there are labels.

        Returns:
            Their version; None when there are none, or they died with their student.
        """
        try:
            version = ray.get(self.board.newest_version.remote())
            weights = None if version is None else ray.get(ray.get(self.board.take.remote(version)))
        except (ray.exceptions.RayError, LookupError):
            return None
        if weights is None:
            return None
        self.look(version, *weights)
        if score and self.scorer is not None:
            result = self.scorer.score(weights[0])
            self.run_log.write.remote("score", version, {"miou": result["miou"], "oracle_metric": True})
        return int(version)

    def look(
        self, step: int, teaching: Mapping[str, np.ndarray], student: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """Measure what needs no labels, and keep the weights if none looked better so far.

        Returns:
            The signals, among them ``source_miou`` as a share of 1 where source images are held out, and under
            ``recommended`` the step whose weights are kept.
        """
        signals = self.watcher.look(teaching, student)
        if signals and self.source_scorer is not None:
            signals["source_miou"] = self.source_scorer.score(teaching)["miou"] / 100
        if signals:
            self.run_log.write.remote("signals", step, signals)
            self.recommended.offer(step, signals["label_free_score"], teaching)
        return {**signals, "recommended": self.recommended.step}

    def score_weights(self, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Score weights that are given by value."""
        assert self.scorer is not None
        return self.scorer.score(weights)

    def score_recommended(self) -> dict[str, Any] | None:
        """Score the kept weights; None without any."""
        weights = self.recommended.weights()
        return None if weights is None else self.score_weights(weights)

    def adabn(self, weights: Mapping[str, np.ndarray], images: int = 256) -> dict[str, Any]:
        """Score weights after AdaBN on up to ``images`` target training images, spread evenly."""
        assert self.scorer is not None
        count = min(images, len(self.target))
        indices = [i * len(self.target) // count for i in range(count)]
        return self.scorer.score(self.scorer.with_statistics_of(weights, self.target, indices))

    def show(
        self,
        rows: Mapping[str, Mapping[str, np.ndarray]],
        thresholds: np.ndarray | None,
        target_prior: np.ndarray | None = None,
    ) -> list[Shown]:
        """See :meth:`actors.showcase.Showcase.show`."""
        return self.make_showcase(self.device).show(rows, thresholds, target_prior)


class LastingEvaluator(Lasting, Evaluator):
    """An evaluator that works for one run after another."""

    role = "evaluator"


class Recommended:
    """The weights that look best without labels, on disk; a new evaluator goes on where the last one stood.

    Args:
        folder: of its own; holds one checkpoint.
    """

    def __init__(self, folder: str) -> None:
        self.store = CheckpointStore(folder, keep=1)
        state = self.store.newest()
        self.step: int | None = None if state is None else state["step"]
        self.score: float | None = None if state is None else state["label_free_score"]

    def offer(self, step: int, score: float, weights: Mapping[str, np.ndarray]) -> None:
        """Keep weights whose score is higher than that of all before; on a full disk the ones before stay."""
        if not math.isfinite(score) or (self.score is not None and score <= self.score):
            return
        network = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        state = {"step": step, "label_free_score": score, "teaching": {"network": network}}
        if self.store.save(step, state) is None:
            self.step, self.score = step, score

    def weights(self) -> dict[str, np.ndarray] | None:
        """What is kept; None before the first offer."""
        state = self.store.newest()
        return None if state is None else {name: t.numpy() for name, t in state["teaching"]["network"].items()}
