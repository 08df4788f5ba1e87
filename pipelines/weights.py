"""Weights in files: those that a run has saved, and those that it starts from when they are not random."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from actors.checkpoints import CheckpointStore, read_stage
from actors.errors import RunError
from actors.storage import Place, RemotePath, place, readable, tried
from models.networks.deeplab import DeepLabConfig, DilatedSegmenter
from models.networks.layouts import (
    FADA_PARTS,
    backbone_part,
    described,
    fitting,
    is_whole_network,
    load,
    strip_parallel,
)
from models.networks.proda import PROTOTYPES

Weights = Literal["last", "recommended"]
FOLDERS: dict[Weights, str] = {"last": "checkpoints", "recommended": "recommended"}
WRAPPERS = ("state_dict", "model_state")
"""Names under which a file may keep its state dict: SimCLR's does, and a BiSeNet's with its discriminator."""
PRODA, PRODA_STATE, PRODA_PROTOTYPES = "ResNet101", "model_state", "objective_vectors"
"""Where ProDA's checkpoints keep the network and its prototypes."""


_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: Any = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype("float64")),
]
"""What numpy writes for a number, as the best score in ProDA's checkpoints is one."""


def newest_weights(folder: Place, weights: Weights = "last") -> tuple[int, dict[str, np.ndarray]]:
    """Step and teaching weights of a run; see :func:`newest_state`."""
    state = newest_state(folder, weights)
    return state["step"], {name: tensor.numpy() for name, tensor in state["teaching"]["network"].items()}


def newest_state(folder: Place, weights: Weights = "last") -> dict[str, Any]:
    """What a run has saved of a step.

    Args:
        folder: run directory.
        weights: ``last``, of the newest checkpoint; ``recommended``, of the step that looks best without labels.

    Raises:
        RunError: there is none yet.
    """
    state = CheckpointStore(folder / FOLDERS[weights]).newest()
    if state is None and weights == "recommended":
        raise RunError(f"{folder} recommends no step yet; its first one is looked at some steps into the run")
    if state is None:
        raise RunError(f"{folder} has no checkpoint yet; resume the run first: python run.py --resume {folder}")
    return state


def read_weights(path: str | Place) -> dict[str, Tensor]:
    """A state dict from a file, or of the teaching network of a run directory.

    Files are ``.pth``, ``.pt`` or ``.pkl`` of torch, among them ProDA's and FADA's checkpoints, and ``.safetensors``.

    Raises:
        RunError: there is no such file, or it holds something else; nothing in it is executed.
    """
    path = place(path)
    if tried("the weights cannot be opened", path.is_dir):
        return {name: torch.from_numpy(array) for name, array in newest_weights(path)[1].items()}
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            loaded: Any = (
                read_stage(path)
                if path.suffix == ".safetensors"
                else torch.load(readable(path), map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
            )
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        cause = str(error).strip().splitlines()
        raise RunError(f"the weights {path} cannot be read: {cause[0] if cause else type(error).__name__}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get(PRODA), Mapping):
        inner = loaded[PRODA]
        state = inner.get(PRODA_STATE)
        loaded = dict(state) if isinstance(state, Mapping) else state
        if isinstance(loaded, dict) and isinstance(inner.get(PRODA_PROTOTYPES), Tensor):
            loaded[PROTOTYPES] = inner[PRODA_PROTOTYPES]
    if isinstance(loaded, Mapping) and all(isinstance(loaded.get(part), Mapping) for part in FADA_PARTS):
        parts = {part: strip_parallel(loaded[part]) for part in FADA_PARTS}
        loaded = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
    for name in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        inside = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise RunError(f"{path} is no state dict of a network; it holds {inside[:200] or 'nothing'}")
    return {str(name): value for name, value in loaded.items()}


def check_initial(path: str, network: nn.Module) -> bool:
    """Whether a file holds a whole network, and not a backbone alone.

    Args:
        path: see :func:`read_weights`.
        network: that it shall fill; on the ``meta`` device is enough.

    Raises:
        RunError: it cannot be read or does not fit.
    """
    state = read_weights(path)
    try:
        fitting(network, state)
    except ValueError as error:
        hint = ""
        if _has_extra_norm(state) and isinstance(network, DilatedSegmenter) and not network.config.extra_norm:
            hint = ". It has a norm between backbone and head: add --proda.extra-norm on"
        raise RunError(f"{path}: {error}{hint}") from error
    whole = is_whole_network(state)
    if whole and isinstance(network, DilatedSegmenter):
        _check_options(place(path), network.config)
    return whole


def _has_extra_norm(state: Mapping[str, Tensor]) -> bool:
    found = described(state) if is_whole_network(state) else None
    return isinstance(found, DeepLabConfig) and found.extra_norm


def _check_options(path: Place, config: DeepLabConfig) -> None:
    """Refuse weights whose opts.yaml says that they are of a network with the same names and another norm.

    Raises:
        RunError: it does.
    """
    beside = path.parent / "opts.yaml"
    if path.is_dir() or not beside.is_file():
        return
    lines = (line.partition(":") for line in beside.read_text(encoding="utf-8", errors="replace").splitlines())
    said = {name.strip(): value.strip().strip("'\"").lower() for name, _, value in lines}
    for name, ours in (("norm_style", config.norm), ("use_se", str(config.use_se).lower())):
        if said.get(name, ours) != ours:
            raise RunError(
                f"{beside} says {name}: {said[name]}, and this network has {ours}; they do not belong together"
            )


def load_initial(path: str, network: nn.Module) -> None:
    """Fill a network, or its backbone; called by every student.

    Raises:
        RunError: see :func:`check_initial`.
    """
    try:
        load(network, read_weights(path))
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


def check_pretrained_backbone(path: str, network: nn.Module) -> dict[str, Tensor]:
    """What a file whose other tensors do not matter (SimCLR) holds of a backbone; on the ``meta`` device is enough.

    Raises:
        RunError: it cannot be read, or holds nothing of this backbone.
    """
    try:
        return backbone_part(network, read_weights(path))
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


def load_pretrained_backbone(path: str, network: nn.Module) -> None:
    """Fill the backbone alone; called by every student.

    Raises:
        RunError: see :func:`check_pretrained_backbone`.
    """
    network.load_state_dict(check_pretrained_backbone(path, network), strict=False)


def _can_be_mapped(path: Place) -> bool:
    """Whether a file of this machine has torch's newer format; the published files have the older one."""
    if isinstance(path, RemotePath):
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
