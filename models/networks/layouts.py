"""Published checkpoint layouts, told apart by content (methods 8.5): state dicts in, state dicts out.

Reading the file is the caller's business. A layout that does not fit ends in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

PARALLEL_PREFIX = "module."
SKIPPED_IN_INIT = ("fc", "layer5")


def strip_parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops a leading ``module.``, which training on several devices adds, where every key has it."""
    if state and all(key.startswith(PARALLEL_PREFIX) for key in state):
        return {key[len(PARALLEL_PREFIX) :]: value for key, value in state.items()}
    return dict(state)


def load_exact(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a checkpoint of this very network.

    Raises:
        ValueError: naming the first entry that is missing, foreign or misshapen; nothing is loaded then.
    """
    state = strip_parallel(state)
    own = network.state_dict()
    problems = (
        [f"it has no {key!r}" for key in own if key not in state]
        + [f"it has {key!r}, which this network does not know" for key in state if key not in own]
        + [
            f"its {key!r} has shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
    )
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise ValueError(f"the checkpoint belongs to another network: {problems[0]}{more}")
    network.load_state_dict(state)


def load_backbone_init(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Loads a pretrained backbone into a network with torchvision's module names.

    The DeepLab init carries a first component (``Scale.``) on every key; it is dropped whatever its name.
    Classifiers (``fc``, ``layer5``) are skipped, heads keep their fresh start, and files without batch
    counters are accepted.

    Returns:
        The number of tensors loaded.

    Raises:
        ValueError: if a backbone tensor is missing or has another shape; nothing is loaded then.
    """
    state = strip_parallel(state)
    if not any(key.startswith("conv1.") for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    own = network.state_dict()
    wanted = [key for key in own if key.partition(".")[0] in _BACKBONE and not key.endswith("num_batches_tracked")]
    given = {key: value for key, value in state.items() if key.partition(".")[0] not in SKIPPED_IN_INIT}
    for key in wanted:
        if key not in given:
            raise ValueError(f"the pretrained file does not fit this backbone: it has no {key!r}")
        if given[key].shape != own[key].shape:
            raise ValueError(
                f"the pretrained file does not fit this backbone: its {key!r} has shape "
                f"{tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
            )
    network.load_state_dict({key: given[key] for key in wanted}, strict=False)
    return len(wanted)


_BACKBONE = frozenset(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"))
