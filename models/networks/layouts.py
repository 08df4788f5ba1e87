"""Published checkpoint layouts, told apart by content (methods 8.5): state dicts in, state dicts out.

Reading the file is the caller's business. A layout that does not fit ends in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from models.networks.deeplab import DeepLabConfig
from models.networks.proda import EXTRA_NORM, PROTOTYPES

PARALLEL_PREFIX = "module."
SKIPPED_IN_INIT = ("fc", "layer5")
COUNTER = "num_batches_tracked"
SHOWN_NAMES = 3


def strip_parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops a leading ``module.``, which training on several devices adds, where every key has it."""
    if state and all(key.startswith(PARALLEL_PREFIX) for key in state):
        return {key[len(PARALLEL_PREFIX) :]: value for key, value in state.items()}
    return dict(state)


@dataclass(frozen=True)
class Differences:
    """How a state dict differs from what a network needs; empty where it fits.

    Attributes:
        missing: names that it lacks.
        unexpected: names that the network does not know.
        misshapen: (name, given shape, needed shape).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """One clause a kind, each with its first few names."""
        shapes = tuple(f"{name} is {given}, needed is {needed}" for name, given, needed in self.misshapen)
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds if names)


def _few(names: tuple[str, ...]) -> str:
    more = "" if len(names) <= SHOWN_NAMES else " and others"
    return ", ".join(names[:SHOWN_NAMES]) + more


def is_whole_network(state: Mapping[str, Tensor]) -> bool:
    """Whether a file holds a head with its classifier, and not a backbone alone."""
    return any(key.startswith("layer5.head.") for key in strip_parallel(state))


def described(state: Mapping[str, Tensor], config: DeepLabConfig) -> DeepLabConfig:
    """A network's description with the heads, classes and extra norm of a file's whole network."""
    given = strip_parallel(state)
    classifier = next((value for key, value in given.items() if key.startswith("layer5.head.")), None)
    if classifier is None:
        return config
    return replace(
        config,
        num_classes=classifier.shape[0],
        heads="mrnet" if any(key.startswith("layer6.") for key in given) else "proda",
        extra_norm=any(key.startswith(f"{EXTRA_NORM}.") for key in given),
    )


def differences(needed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Differences:
    """Compare names and shapes."""
    return Differences(
        tuple(key for key in needed if key not in given),
        tuple(key for key in given if key not in needed),
        tuple(
            (key, tuple(given[key].shape), tuple(value.shape))
            for key, value in needed.items()
            if key in given and given[key].shape != value.shape
        ),
    )


def fitting(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published file under the names of a network, whatever of it they fill.

    A file with heads must fit the whole network; prototypes may be absent. Any other fills the backbone: a first
    component that all names share (``Scale.`` in the DeepLab init) is dropped, classifiers (``fc``, ``layer5``) are
    skipped, heads keep their fresh start, and batch counters may be absent.

    Raises:
        ValueError: it does not fit; names what is missing, unexpected or of another shape.
    """
    own, given = network.state_dict(), strip_parallel(state)
    if is_whole_network(given):
        found = differences({key: value for key, value in own.items() if key != PROTOTYPES or key in given}, given)
        if found:
            raise ValueError(f"the checkpoint belongs to another network: {found}")
        return given
    if not any(key.startswith("conv1.") for key in given):
        given = {key.partition(".")[2]: value for key, value in given.items()}
    given = {key: value for key, value in given.items() if key.partition(".")[0] not in SKIPPED_IN_INIT}
    needed = {key: value for key, value in own.items() if key.partition(".")[0] in _BACKBONE}
    needed = {key: value for key, value in needed.items() if key in given or not key.endswith(COUNTER)}
    found = differences(needed, given)
    if found:
        raise ValueError(f"the pretrained file does not fit this backbone: {found}")
    return {key: given[key] for key in needed}


def load(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Fill a network, or its backbone, from a published file.

    Returns:
        The number of tensors loaded.

    Raises:
        ValueError: see :func:`fitting`; nothing is loaded then.
    """
    tensors = fitting(network, state)
    network.load_state_dict(tensors, strict=False)
    return len(tensors)


def backbone_part(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whatever in a file has the name of a tensor of the backbone, and nothing else (methods 8.5, SimCLR).

    Raises:
        ValueError: there is none, or one has another shape.
    """
    own, given = network.state_dict(), strip_parallel(state)
    taken = {key: given[key] for key in own if key in given and key.partition(".")[0] in _BACKBONE}
    if not taken:
        raise ValueError(f"none of its {len(given)} tensors ({_few(tuple(given))}) belongs to this backbone")
    found = differences({key: own[key] for key in taken}, taken)
    if found:
        raise ValueError(f"the pretrained file does not fit this backbone: {found}")
    return taken


_BACKBONE = frozenset(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"))
