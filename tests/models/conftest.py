"""Deterministic weights and inputs by name, and the reference outputs made with them."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models.networks.deeplab import DeepLab, DeepLabConfig

GOLDEN = Path(__file__).parent.parent / "golden"


def golden_value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of one state-dict entry: a function of its name and shape only."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    drawn = rng.standard_normal(shape or (1,)).astype(np.float32).reshape(shape)
    if key.endswith("running_var"):
        drawn = np.abs(drawn) * 0.2 + 0.8
    elif key.endswith("running_mean"):
        drawn = drawn * 0.05
    elif len(shape) == 1 and key.endswith("weight"):
        drawn = 1 + 0.05 * drawn
    elif len(shape) == 1:
        drawn = 0.02 * drawn
    else:
        drawn = drawn * np.float32(np.sqrt(1.6 / int(np.prod(shape[1:]))))
    return torch.from_numpy(np.asarray(drawn, np.float32))


def fill(module: torch.nn.Module) -> dict[str, list[int]]:
    """Fills a module and returns its keys with their shapes."""
    state = module.state_dict()
    module.load_state_dict({key: golden_value(key, tuple(value.shape)) for key, value in state.items()})
    return {key: list(value.shape) for key, value in state.items()}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors on several threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden():
    """The reference outputs."""
    with np.load(GOLDEN / "mrnet.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_keys():
    """Key -> shape of every published layout."""
    return json.loads((GOLDEN / "mrnet_keys.json").read_text())


@pytest.fixture(scope="session")
def golden_input():
    """A function (name, shape) -> standard normal input."""

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    return draw


@pytest.fixture(scope="session")
def filled():
    """A function that fills a module with the deterministic weights and returns key -> shape."""
    return fill


@pytest.fixture(scope="session")
def resnet101():
    """The published network with deterministic weights, evaluation mode; tests leave it as it is."""
    network = DeepLab(DeepLabConfig())
    fill(network)
    return network.eval()


@pytest.fixture
def small():
    """A small member with classifiers loud enough to make confident predictions."""
    torch.manual_seed(0)
    network = DeepLab(DeepLabConfig.small(num_classes=7))
    for head in network.heads():
        torch.nn.init.normal_(head.classifier.weight, std=0.5)
    return network.eval()
