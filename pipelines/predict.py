"""Run a trained network on pictures: masks, overlays, confidence, and on request Monte-Carlo uncertainty."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from actors.errors import RunError, UnreadableImage
from models.uncertainty import UncertaintyRule, draw_masks, mean_probabilities, monte_carlo_labels, trunk_views
from pipelines import pictures
from pipelines.datasets.dataset import read_image
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

    run: Path
    step: int
    out: Path
    pictures: int = 0
    skipped: list[str] = field(default_factory=list)
    """A sentence for every file that is no picture."""


class Predictor:
    """Looks at pictures as the evaluator does.

    Args:
        trained: network, classes and views.
        device: where it runs.
        passes: Monte-Carlo dropout passes; 0 for none.
        rate: channel dropout rate of the passes.
    """

    def __init__(self, trained: Trained, device: torch.device, passes: int = 0, rate: float = 0.1) -> None:
        self.trained, self.device, self.passes, self.rate = trained, device, passes, rate

    def __call__(self, image: NDArray[np.uint8]) -> Prediction:
        """Predict one picture, (H, W, 3) uint8 RGB of any size."""
        network, description = self.trained.network, self.trained.description
        height, width = image.shape[:2]
        batches = [network_input(self._at(image, view), network.config.pixels) for view in description.views]
        views = trunk_views(network, batches, mirror=description.mirrored)
        factor = min(1.0, (MOST_NUMBERS / (len(description.classes) * height * width)) ** 0.5)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        confidence, mask = mean_probabilities(network, views, None, size)[0].max(dim=0)
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
            deviation = monte_carlo_labels(network, views, masks, size, UncertaintyRule("std")).std
        numbers = [
            None if values is None else values.float().cpu().numpy()
            for values in (mask, confidence, None if deviation is None else deviation[0])
        ]
        ids, sure, unsure = (_enlarged(values, (width, height)) for values in numbers)
        assert ids is not None
        assert sure is not None
        return Prediction(ids.astype(np.uint8), sure, unsure)

    def _at(self, image: NDArray[np.uint8], view: Size) -> torch.Tensor:
        """The picture with as many pixels as a view has, in its own proportions; 1×H×W×3."""
        height, width = image.shape[:2]
        factor = (view[0] * view[1] / (width * height)) ** 0.5
        size = max(32, round(width * factor)), max(32, round(height * factor))
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized))[None].to(self.device)


def predict(
    paths: Sequence[str],
    out: str,
    progress: Callable[[int, int], None],
    *,
    run: str | None = None,
    runs: str = "runs",
    weights: Weights = "last",
    passes: int = 0,
    threads: int | None = None,
) -> Predicted:
    """Predict pictures and write the results.

    Args:
        paths: pictures, folders of pictures, or patterns.
        out: folder for the results.
        progress: told (pictures done, pictures in all).
        run: run directory; None takes the one with the newest checkpoint.
        runs: where to look for it.
        weights: ``last`` or ``recommended``, see :func:`pipelines.trained.load_trained`.
        passes: Monte-Carlo dropout passes for the uncertainty; 0 for none.
        threads: CPU threads; None for all cores.

    Raises:
        RunError: there is no such run or picture, none of the pictures can be read, or the results cannot be written.
    """
    target = Path(out).resolve()
    try:
        found = find_pictures(paths)
    except OSError as error:
        raise RunError(f"{error.filename} cannot be looked into: {error.strerror}") from error
    files = [(path, name) for path, name in found if not path.resolve().is_relative_to(target)]
    if not files:
        raise RunError(f"all pictures lie in {target}, where the results go; give another --out")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(newest_run(runs) if run is None else run, device, weights)
    predictor = Predictor(trained, device, passes)
    done = Predicted(trained.folder, trained.step, target)
    if len(files) < len(found):
        done.skipped.append(f"{len(found) - len(files)} pictures that lie in {target}, where the results go")
    for number, (path, name) in enumerate(files):
        try:
            image = read_image(str(path))
        except UnreadableImage as error:
            done.skipped.append(str(error))
        else:
            try:
                write(predictor(image), image, trained, done.out / name)
            except OSError as error:
                raise RunError(f"the results cannot be written to {done.out}: {error.strerror or error}") from error
            done.pictures += 1
        progress(number + 1, len(files))
    if not done.pictures:
        raise RunError(f"none of the {len(files)} files can be read as a picture: {done.skipped[0]}")
    return done


def write(prediction: Prediction, image: NDArray[np.uint8], trained: Trained, stem: Path) -> None:
    """Write ``…_mask.png`` (ids), ``_colour.png``, ``_overlay.jpg``, ``_confidence.png`` and ``_uncertainty.png``.

    Confidence is gray, 255 = 1; uncertainty is a heat map, brightest at a deviation of 0.25 and more.
    """
    classes = trained.description.classes
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


def _enlarged(values: NDArray[np.float32] | None, size: Size) -> NDArray[np.float32] | None:
    """A map at the picture's size (width, height), nearest."""
    if values is None or (values.shape[1], values.shape[0]) == size:
        return values
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
