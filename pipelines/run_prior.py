"""How frequent classes are on the target of a run, as its network sees it: estimated, written, read again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from actors.errors import RunError
from actors.labeller import Networks
from actors.prior_estimate import Method, PriorPlan, estimated
from actors.storage import Place, place
from models.priors import shares
from pipelines.class_frequencies import statistics_folder
from pipelines.options import read_config
from pipelines.prior_estimation import source_prior
from pipelines.priors import Prior, read_prior, write_prior
from pipelines.setup import Setup, resolve
from pipelines.source_statistics import class_pixels
from pipelines.trained import check_fits, check_same_classes
from pipelines.weights import Weights, newest_weights

FILE = "prior.toml"
"""In a run directory."""


@dataclass(frozen=True)
class Found:
    """What was estimated of a run.

    Attributes:
        path: of the file.
        prior: the estimate.
        offset: what it adds to class scores, float64 C.
        truth: shares of the target's own labels, or those to score on, where there are any; they took no part.
        step: of the weights.
    """

    path: Place
    prior: Prior
    offset: np.ndarray
    truth: np.ndarray | None
    step: int


def estimate_of_run(
    run: str,
    method: Method,
    progress: Callable[[int, int], None],
    *,
    out: str | None = None,
    weights: Weights = "last",
    threads: int | None = None,
) -> Found:
    """Estimate the target's class frequencies with the network of a run, and write them.

    Args:
        run: run directory.
        method: how.
        progress: told (target images done, target images).
        out: file; None for ``prior.toml`` in the run directory.
        weights: see :func:`pipelines.trained.load_trained`.
        threads: CPU threads; None for all cores.

    Raises:
        RunError: the folder is no run or has no checkpoint, or the file cannot be written.
    """
    setup = resolve(read_config(run), to_train=False)
    folder = place(setup.plan.folder)
    check_same_classes(setup)
    step, arrays = newest_weights(folder, weights)
    check_fits(setup.network_with(arrays), arrays, folder)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = estimate_with(setup, arrays, method, device, progress)
    path = place(out).absolute() if out is not None else folder / FILE
    try:
        write_prior(path, prior)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    labelled, truth = setup.domains.target_labelled or setup.domains.validation, None
    if labelled is not None:
        folder_of_counts, bonnet = statistics_folder(setup.options), setup.benchmark.bonnet
        counts = class_pixels(labelled, folder_of_counts, ignore_bottom=bonnet).pixel_counts
        truth = shares(np.pad(counts, (0, len(prior.classes) - len(counts)))) if counts.any() else None
    return Found(path, prior, setup.options.prior.temperature * prior.offset, truth, step)


def estimate_with(
    setup: Setup,
    weights: dict[str, np.ndarray],
    method: Method,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, images: None,
) -> Prior:
    """Estimate the class frequencies of a run's target images with weights of one of its networks."""
    options, classes, domains = setup.options, setup.benchmark.classes, setup.domains
    bonnet = setup.benchmark.bonnet
    of_source, presence = source_prior(domains.source, len(classes), method, statistics_folder(options), bonnet)
    plan = PriorPlan(
        tuple(of_source.tolist()),
        method=method,
        presence=tuple(presence.tolist()),
        floor=options.prior.floor,
        temperature=options.prior.temperature,
    )
    network = Networks(setup.plan.networks, device).load(weights)
    survey = setup.survey(bonnet, setup.source_sight(bonnet) if method == "confusion" else None)
    images = len(domains.target)
    seen = survey(network, lambda done: progress(done, images))
    target = estimated(plan, seen)
    about = f"estimated by {method} from {len(seen.means)} target images"
    return Prior(classes.names, plan.source, tuple(target.tolist()), method, about)


def temperature_of(folder: Place) -> float:
    """T of a run's options, as many times as which an adjustment counts; 1 where only its network was kept."""
    return read_config(folder).prior.temperature if (folder / "config.toml").is_file() else 1.0


def prior_for(
    wanted: str, classes: tuple[str, ...], folder: Place | None, estimate_now: Callable[[], Prior] | None = None
) -> Prior | None:
    """What ``--adjust-prior`` stands for where a network is evaluated or predicts.

    Args:
        wanted: ``none``, ``estimated``, a published table or a TOML file.
        classes: that the network scores.
        folder: run directory, where ``prior.toml`` may lie; None without one.
        estimate_now: where the data are at hand; estimates, whatever lies there.

    Raises:
        RunError: there is no such table or file; or nothing is estimated yet.
    """
    if wanted == "none":
        return None
    if wanted != "estimated":
        return read_prior(wanted, classes)
    if estimate_now is not None:
        return estimate_now()
    if folder is None:
        raise RunError("--adjust-prior estimated needs a run; with --model give a TOML file or a published table")
    if not (folder / FILE).is_file():
        raise RunError(
            f"the class frequencies of {folder}'s target are not estimated yet; do so with its data at hand: "
            f"python run.py prior {folder}"
        )
    return read_prior(folder / FILE, classes)
