"""A trained network as a run directory keeps it: enough to use it without the data it was trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.errors import RunError
from actors.labeller import load_weights
from actors.storage import Place, matching, place, tried
from models.networks.build import Build, Config, config_of
from models.networks.segmenter import Segmenter
from pipelines.datasets.classes import ClassSet
from pipelines.results import write_json
from pipelines.setup import Setup
from pipelines.weights import Weights, newest_weights

Size = tuple[int, int]
FILE = "network.json"


@dataclass(frozen=True)
class Description:
    """What a network is and how it looks at images."""

    classes: ClassSet
    configs: tuple[Config, ...]
    """Of the networks that stages of the run have; the saved weights are of one of them."""
    views: tuple[Size, ...]
    """Image sizes whose probabilities are averaged."""
    mirrored: bool
    """Whether every view is also seen mirrored."""


@dataclass(frozen=True)
class Trained:
    """A network with its newest weights."""

    folder: Place
    step: int
    description: Description
    network: Segmenter
    """In eval mode, without gradients."""


def describe(setup: Setup) -> None:
    """Write what the network of a run is beside the run."""
    description = {
        "classes": dataclasses.asdict(setup.benchmark.classes),
        "configs": [dataclasses.asdict(build.config) for build in setup.plan.networks if isinstance(build, Build)],
        "views": setup.preset.score_views,
        "mirrored": setup.preset.score_mirrored,
    }
    folder = place(setup.plan.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, description)


def check_same_classes(setup: Setup) -> None:
    """Refuse to go on with a run whose data now have other classes than those it was trained on.

    Raises:
        RunError: names or their order differ; says which and what to do.
    """
    folder = place(setup.plan.folder)
    if not (folder / FILE).is_file():
        return
    then, now = read_description(folder).classes.names, setup.benchmark.classes.names
    if then != now:
        raise RunError(
            f"{folder} was trained on the classes {', '.join(then)}, but its data now have {', '.join(now)}; give the "
            "TOML file those classes in that order again, or start a new run"
        )


def read_description(folder: Place) -> Description:
    """What :func:`describe` wrote.

    Raises:
        RunError: the folder is no run, or its description cannot be read.
    """
    path = folder / FILE
    if not tried("the run cannot be opened", path.is_file):
        raise RunError(f"{folder} is no run directory: it has no {FILE}. Give a folder that a run printed.")
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        classes = plain["classes"]
        configs = plain["configs"] if "configs" in plain else [plain["config"]]  # as runs before ProDA's wrote it
        if not configs:
            raise ValueError("no network")
        palette = tuple((int(r), int(g), int(b)) for r, g, b in classes["palette"])
        return Description(
            ClassSet(classes["name"], tuple(classes["names"]), palette),
            tuple(config_of(config) for config in configs),
            tuple((int(width), int(height)) for width, height in plain["views"]),
            bool(plain["mirrored"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} cannot be read by this version: {error!r}") from error


def load_trained(folder: str | Place, device: torch.device, weights: Weights = "last") -> Trained:
    """The teaching network of a run.

    Args:
        folder: run directory.
        device: where the network shall be.
        weights: ``last``, of the newest checkpoint; ``recommended``, of the step that looks best without labels.

    Raises:
        RunError: the folder is no run, has no checkpoint yet, or holds one of another network.
    """
    folder = place(folder).absolute()
    description = read_description(folder)
    step, arrays = newest_weights(folder, weights)
    network = fitting_network(description, arrays, folder)
    load_weights(network, arrays)
    return Trained(folder, step, description, network.to(device).eval().requires_grad_(False))


def fitting_network(
    description: Description, weights: Mapping[str, np.ndarray | torch.Tensor], folder: Place
) -> Segmenter:
    """The one of a run's networks that some weights belong to, freshly initialised.

    Raises:
        RunError: there is none.
    """
    networks = [Build(config)() for config in description.configs]
    for network in networks[:-1]:
        if {*network.state_dict()} == {*weights}:
            networks = [network]
    check_fits(networks[-1], weights, folder)
    return networks[-1]


def check_fits(network: torch.nn.Module, weights: Mapping[str, np.ndarray | torch.Tensor], folder: Place) -> None:
    """Refuse weights of another network.

    Raises:
        RunError: names or shapes differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if expected != {name: tuple(array.shape) for name, array in weights.items()}:
        raise RunError(f"the checkpoint in {folder} is of another network than the one described beside it")


def newest_run(runs: str | Place) -> Place:
    """The run directory with the newest checkpoint.

    Raises:
        RunError: there is none.
    """
    folder = place(runs).absolute()
    found = tried("the runs cannot be listed", lambda: matching(folder, "*/checkpoints/step_*/state.pt"))
    if not found:
        raise RunError(f"no run in {folder} has a checkpoint; adapt first, or give --run or --runs")
    return max(found, key=lambda path: path.stat().st_mtime).parents[2]
