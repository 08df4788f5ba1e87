"""Run a trained network on pictures: masks, overlays, confidence, and on request Monte-Carlo uncertainty.

The network is that of a run or one that was exported to a file: whatever looks at a picture is a
:class:`PicturePredictor`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from actors.errors import RunError, UnreadableImage
from actors.storage import LOCAL_OUT, Place, is_remote, local
from models.label_shift import adjusted_logits
from models.networks.segmenter import upsample
from models.uncertainty import UncertaintyRule, draw_masks, mean_probabilities, monte_carlo_labels, trunk_views
from pipelines import pictures
from pipelines.datasets.classes import ClassSet
from pipelines.datasets.dataset import read_image
from pipelines.deployed import format_of, open_model, read_card
from pipelines.run_prior import prior_for, temperature_of
from pipelines.trained import Trained, load_trained, newest_run
from pipelines.views import network_input
from pipelines.weights import Weights

Size = tuple[int, int]
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".gif")
MOST_NUMBERS = 80_000_000
"""Probabilities (classes × pixels) that are held at once; a larger picture is predicted smaller and enlarged."""
LONGEST_JPEG = 60_000
"""Pixels of a JPEG's longer side, with room for the key; a longer overlay is shrunk."""
FULL_DEVIATION = 0.25
"""Standard deviation of a probability that is drawn as the brightest uncertainty; 0.5 is the largest there is."""


@dataclass(frozen=True)
class Prediction:
    """What a network makes of one picture, each field (H, W) at the picture's own size."""

    mask: NDArray[np.uint8]
    """Class ids."""
    confidence: NDArray[np.float32]
    """Probability of that class."""
    uncertainty: NDArray[np.float32] | None
    """Standard deviation of that probability over Monte-Carlo dropout passes."""


@dataclass
class Predicted:
    """What was written."""

    origin: Place
    """Run directory, or file of the exported model."""
    step: int
    out: Path
    pictures: int = 0
    skipped: list[str] = field(default_factory=list)
    """A sentence for every file that is no picture."""


class PicturePredictor(Protocol):
    """What looks at pictures."""

    @property
    def origin(self) -> Place:
        """Run directory, or file of the exported model."""
        ...

    @property
    def step(self) -> int:
        """Of the weights."""
        ...

    @property
    def classes(self) -> ClassSet:
        """That it tells apart."""
        ...

    def __call__(self, image: NDArray[np.uint8]) -> Prediction:
        """Predict one picture, (H, W, 3) uint8 RGB of any size."""
        ...


class Predictor:
    """Looks at pictures as the evaluator does.

    Args:
        trained: network, classes and views.
        device: where it runs.
        passes: Monte-Carlo dropout passes; 0 for none.
        rate: channel dropout rate of the passes.
        offset: C, added to the class scores: inference adjustment (methods §7.4); None for nothing.
    """

    def __init__(
        self,
        trained: Trained,
        device: torch.device,
        passes: int = 0,
        rate: float = 0.1,
        offset: NDArray[np.float64] | None = None,
    ) -> None:
        if passes and not trained.network.heads():
            raise RunError(
                f"--passes is {passes}, but the network of {trained.folder} has no dropout before its classifiers, so "
                "all passes would be alike; leave --passes out"
            )
        self.trained, self.device, self.passes, self.rate = trained, device, passes, rate
        self.origin, self.step, self.classes = trained.folder, trained.step, trained.description.classes
        self.offset = None if offset is None else torch.from_numpy(offset).float().to(device)

    def __call__(self, image: NDArray[np.uint8]) -> Prediction:
        """See :class:`PicturePredictor`."""
        network, description = self.trained.network, self.trained.description
        batches = [network_input(self._at(image, view), network.config.pixels) for view in description.views]
        views = trunk_views(network, batches, mirror=description.mirrored)
        size = _size_for_probabilities(image, len(self.classes))
        confidence, mask = mean_probabilities(network, views, None, size, self.offset)[0].max(dim=0)
        deviation = None
        if self.passes:
            masks = draw_masks(
                [torch.Generator().manual_seed(0)],
                views=len(views),
                passes=self.passes,
                channels=network.config.bottleneck_channels,
                heads=len(network.heads()),
                rate=self.rate,
                device=self.device,
            )
            rule = UncertaintyRule("std")
            deviation = monte_carlo_labels(network, views, masks, size, rule, offset=self.offset).std
        return _at_own_size(image, mask, confidence, None if deviation is None else deviation[0])

    def _at(self, image: NDArray[np.uint8], view: Size) -> torch.Tensor:
        """The picture with as many pixels as a view has, in its own proportions; 1×H×W×3."""
        height, width = image.shape[:2]
        factor = (view[0] * view[1] / (width * height)) ** 0.5
        size = max(32, round(width * factor)), max(32, round(height * factor))
        return torch.from_numpy(_resized(image, size))[None].to(self.device)


class ModelPredictor:
    """Looks at pictures with an exported model, once and at one size.

    Args:
        path: its file, with its card beside it.
        threads: CPU threads.
        adjust_prior: class frequencies that predictions are adjusted to: a TOML file, a published table, or ``none``.

    Raises:
        RunError: it is no such file, what runs it is not installed, or it has no card; or there is no such table.
    """

    def __init__(self, path: str | Path, threads: int, adjust_prior: str = "none") -> None:
        file = local(str(path), "--model", "a model is mapped into memory").absolute()
        self.origin: Place = file
        model_format = format_of(file)
        self.card = read_card(file)
        self.step, self.classes = self.card.step, self.card.classes
        prior = prior_for(adjust_prior, self.classes.names, None)
        self.offset = torch.zeros(len(self.classes)) if prior is None else torch.from_numpy(prior.offset).float()
        self.run = open_model(file, model_format, threads)

    def __call__(self, image: NDArray[np.uint8]) -> Prediction:
        """See :class:`PicturePredictor`.

        Raises:
            RunError: the model is another one than its card describes.
        """
        height, width = image.shape[:2]
        scores = torch.from_numpy(self._scores(_resized(image, self.card.size_for(width, height))))
        scores = adjusted_logits(scores, self.offset)
        size = _size_for_probabilities(image, len(self.classes))
        confidence, mask = upsample(scores.softmax(dim=1), size)[0].max(dim=0)
        return _at_own_size(image, mask, confidence, None)

    def _scores(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Class scores (1, C, H, W) of a picture of the model's size, (H, W, 3)."""
        height, width = image.shape[:2]
        expected = (1, len(self.classes), height, width)
        try:
            scores = self.run(np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32))
        except Exception as error:  # both libraries raise what they like when a size is not the model's
            raise RunError(
                f"{self.origin} cannot read an image of {width}×{height} pixels, which its card says it does; keep the "
                f"two files of one export together ({str(error).strip().splitlines()[0]})"
            ) from error
        if scores.shape != expected:
            raise RunError(
                f"{self.origin} answers {scores.shape} where its card promises {expected}; keep the two files of one "
                "export together"
            )
        return scores


def predict(
    paths: Sequence[str],
    out: str,
    progress: Callable[[int, int], None],
    *,
    model: str | None = None,
    run: str | None = None,
    runs: str = "runs",
    weights: Weights = "last",
    passes: int = 0,
    threads: int | None = None,
    adjust_prior: str = "none",
) -> Predicted:
    """Predict pictures and write the results.

    Args:
        paths: pictures, folders of pictures, or patterns.
        out: folder for the results.
        progress: told (pictures done, pictures in all).
        model: file of an exported model, instead of all that a run says: ``run``, ``runs``, ``weights``, ``passes``.
        run: run directory; None takes the one with the newest checkpoint.
        runs: where to look for it.
        weights: ``last`` or ``recommended``, see :func:`pipelines.trained.load_trained`.
        passes: Monte-Carlo dropout passes for the uncertainty; 0 for none.
        threads: CPU threads; None for all cores.
        adjust_prior: class frequencies that predictions are adjusted to: ``estimated``, those that
            :mod:`pipelines.run_prior` wrote into the run directory; a published table; a TOML file; or ``none``.

    Raises:
        RunError: there is no such run, model, table or picture, none of the pictures can be read, or the results cannot
            be written.
    """
    target = local(out, "--out", LOCAL_OUT).resolve()
    try:
        found = find_pictures(paths)
    except OSError as error:
        raise RunError(f"{error.filename} cannot be looked into: {error.strerror}") from error
    files = [(path, name) for path, name in found if not path.resolve().is_relative_to(target)]
    if not files:
        raise RunError(f"all pictures lie in {target}, where the results go; give another --out")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    predictor: PicturePredictor
    if model is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trained = load_trained(newest_run(runs) if run is None else run, device, weights)
        prior = prior_for(adjust_prior, trained.description.classes.names, trained.folder)
        offset = None if prior is None else temperature_of(trained.folder) * prior.offset
        predictor = Predictor(trained, device, passes, offset=offset)
    else:
        predictor = ModelPredictor(model, threads, adjust_prior)
    done = Predicted(predictor.origin, predictor.step, target)
    if len(files) < len(found):
        done.skipped.append(f"{len(found) - len(files)} pictures that lie in {target}, where the results go")
    for number, (path, name) in enumerate(files):
        try:
            image = read_image(str(path))
        except UnreadableImage as error:
            done.skipped.append(str(error))
        else:
            try:
                write(predictor(image), image, predictor.classes, done.out / name)
            except OSError as error:
                raise RunError(f"the results cannot be written to {done.out}: {error.strerror or error}") from error
            done.pictures += 1
        progress(number + 1, len(files))
    if not done.pictures:
        raise RunError(f"none of the {len(files)} files can be read as a picture: {done.skipped[0]}")
    return done


def write(prediction: Prediction, image: NDArray[np.uint8], classes: ClassSet, stem: Path) -> None:
    """Write ``…_mask.png`` (ids), ``_colour.png``, ``_overlay.jpg``, ``_confidence.png`` and ``_uncertainty.png``.

    Confidence is gray, 255 = 1; uncertainty is a heat map, brightest at a deviation of 0.25 and more.
    """
    written = {
        "mask.png": prediction.mask,
        "colour.png": classes.colourise(prediction.mask),
        "confidence.png": np.rint(prediction.confidence.clip(0, 1) * 255).astype(np.uint8),
    }
    if prediction.uncertainty is not None:
        written["uncertainty.png"] = pictures.heat(prediction.uncertainty / FULL_DEVIATION)
    for ending, pixels in written.items():
        pictures.save(Image.fromarray(pixels), stem.with_name(f"{stem.name}_{ending}"))
    shown = np.unique(prediction.mask).tolist()
    small = pictures.fitted(image.shape, LONGEST_JPEG)
    image, mask = np.asarray(Image.fromarray(image).resize(small)), pictures.shrunk(prediction.mask, small)
    overlay = pictures.with_key(pictures.overlay(image, mask, classes), classes, shown)
    pictures.save(overlay, stem.with_name(f"{stem.name}_overlay.jpg"))


def find_pictures(paths: Sequence[str]) -> list[tuple[Path, Path]]:
    """Every picture with the name, without ending, that its results get; a folder keeps its inner order.

    Raises:
        RunError: a path or pattern finds nothing.
    """
    found: dict[Path, Path] = {}
    for given in paths:
        if is_remote(given):
            raise RunError(f"{given.partition('://')[0]}://… cannot be looked for pictures; copy them to this machine")
        path = Path(given)
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in ENDINGS and item.is_file())
            if not inside:
                raise RunError(f"{path} holds no picture ({', '.join(ENDINGS)})")
            found |= {item.absolute(): item.relative_to(path) for item in inside}
        elif path.is_file():
            found[path.absolute()] = Path(path.name)
        else:
            inside = sorted(Path(item) for item in glob.glob(given, recursive=True) if Path(item).is_file())
            if not inside:
                raise RunError(f"{given} is no file or folder, and as a pattern it finds none")
            found |= {item.absolute(): Path(item.name) for item in inside}
    names: dict[Path, Path] = {}
    for path, name in found.items():
        short, number = name.with_suffix(""), 2
        while short in names:  # a.png beside a.jpg, or the same name in two folders
            short, number = name.with_name(f"{name.stem}-{number}"), number + 1
        names[short] = path
    return [(path, name) for name, path in names.items()]


def _size_for_probabilities(image: NDArray[np.uint8], classes: int) -> Size:
    """(height, width) at which the probabilities of a picture are held: its own, if there is room."""
    height, width = image.shape[:2]
    factor = min(1.0, (MOST_NUMBERS / (classes * height * width)) ** 0.5)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _at_own_size(
    image: NDArray[np.uint8], mask: torch.Tensor, confidence: torch.Tensor, deviation: torch.Tensor | None
) -> Prediction:
    """What was found of a picture, each (h, w), at the picture's size."""
    size = image.shape[1], image.shape[0]
    return Prediction(
        _enlarged(mask, size).astype(np.uint8),
        _enlarged(confidence, size),
        None if deviation is None else _enlarged(deviation, size),
    )


def _resized(image: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """A picture at another size (width, height), bicubic."""
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _enlarged(values: torch.Tensor, size: Size) -> NDArray[np.float32]:
    """A map at the picture's size (width, height), nearest."""
    found = values.float().cpu().numpy()
    if (found.shape[1], found.shape[0]) == size:
        return found
    return np.asarray(Image.fromarray(found).resize(size, Image.Resampling.NEAREST))
