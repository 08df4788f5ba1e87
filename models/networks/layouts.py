"""Published checkpoint layouts, told apart by content (methods 8.5): state dicts in, state dicts out.

Reading the file is the caller's business. A layout that does not fit ends in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.networks.backbone import DilatedVgg16
from models.networks.bisenet import BiSeNetConfig
from models.networks.build import Config
from models.networks.deeplab import DeepLabConfig
from models.networks.fada import FadaConfig
from models.networks.proda import EXTRA_NORM, PROTOTYPES
from models.networks.segmenter import Segmenter

PARALLEL_PREFIX = "module."
SKIPPED_IN_INIT = ("fc", "layer5")
COUNTER = "num_batches_tracked"
SHOWN_NAMES = 3
FADA_PARTS = ("feature_extractor", "classifier")
"""Parts of FADA's network, each of which its checkpoints keep apart; in ours their names begin with it."""
FADA_FEATURES, FADA_CLASSIFIER = "feature_extractor.", "classifier.conv2d_list."
VGG_FEATURES = "features."
SPATIAL, BISENET_CONTEXT = "saptial_path.", "context_path."
BISENET_COPY = f"{BISENET_CONTEXT}features."
IMAGENET_CLASSES = 1000


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
    return any(key.startswith(("layer5.head.", SPATIAL, FADA_CLASSIFIER)) for key in strip_parallel(state))


def described(state: Mapping[str, Tensor], config: Config | None = None) -> Config:
    """The description of a file's whole network.

    Args:
        state: of the file.
        config: of a network of its family, for what names and shapes do not tell; None for the published one.
    """
    given = strip_parallel(state)
    if any(key.startswith(SPATIAL) for key in given):
        return _bisenet(given, config if isinstance(config, BiSeNetConfig) else BiSeNetConfig())
    if any(key.startswith(FADA_CLASSIFIER) for key in given):
        return _fada(given, config if isinstance(config, FadaConfig) else FadaConfig())
    return _deeplab(given, config if isinstance(config, DeepLabConfig) else DeepLabConfig())


def _bisenet(given: Mapping[str, Tensor], config: BiSeNetConfig) -> BiSeNetConfig:
    stages = [{key.split(".")[2] for key in given if key.startswith(f"context_path.layer{n}.")} for n in (1, 2, 3, 4)]
    block: Literal["basic", "bottleneck"] = "bottleneck" if "context_path.layer1.0.conv3.weight" in given else "basic"
    one, two, three, four = (len(blocks) for blocks in stages)
    try:
        return replace(
            config,
            num_classes=given["conv.weight"].shape[0],
            layers=(one, two, three, four),
            block=block,
            width=given["context_path.conv1.weight"].shape[0],
            spatial_width=given[f"{SPATIAL}convblock1.conv1.weight"].shape[0],
        )
    except (KeyError, ValueError):
        return config  # whoever loads it says what is missing


def _fada(given: Mapping[str, Tensor], config: FadaConfig) -> FadaConfig:
    """Ordinary norms keep counters and frozen ones do not (Q-UL-4); another backbone than asked for has its pixels."""
    backbone, fields = f"{FADA_FEATURES}backbone.", dict[str, Any]()
    if f"{backbone}conv1.weight" in given:
        stages = [{key.split(".")[3] for key in given if key.startswith(f"{backbone}layer{n}.")} for n in (1, 2, 3, 4)]
        fields["layers"] = tuple(len(blocks) for blocks in stages)
        fields["norms"] = "batch" if any(key.endswith(COUNTER) for key in given) else "frozen"
    first, like = ("conv1", FadaConfig()) if "layers" in fields else ("0", FadaConfig.vgg16())
    if like.backbone != config.backbone:
        fields |= {"backbone": like.backbone, "pixels": like.pixels}
    scores = given.get("classifier.head.1.weight")
    try:
        if scores is not None:
            branch = given[f"{FADA_CLASSIFIER}0.0.weight"]
            fields |= {"branch_channels": branch.shape[0], "head_channels": scores.shape[1]}
        return replace(
            config,
            **fields,
            width=given[f"{backbone}{first}.weight"].shape[0],
            aspp="original" if scores is None else "modified",
            num_classes=(given[f"{FADA_CLASSIFIER}0.weight"] if scores is None else scores).shape[0],
        )
    except (KeyError, ValueError):
        return config  # whoever loads it says what is missing


def _deeplab(given: Mapping[str, Tensor], config: DeepLabConfig) -> DeepLabConfig:
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

    A file with heads must fit the whole network; prototypes may be absent, and of FADA's networks batch counters, too.
    Any other fills the backbone: a first component that all names share (``Scale.`` in the DeepLab init) is dropped,
    classifiers (``fc``, ``layer5``, those of a VGG) are skipped, heads keep their fresh start (a VGG's fc6 and fc7,
    too), and batch counters may be absent. Counters that a network with frozen norms does not have are left out.

    Raises:
        ValueError: it does not fit; names what is missing, unexpected or of another shape.
    """
    own, given, prefix = network.state_dict(), _without_copies(strip_parallel(state)), _backbone_prefix(network)
    if is_whole_network(given):
        given = {key: value for key, value in given.items() if key in own or not _is_fada_counter(key)}
        needed = {
            key: value for key, value in own.items() if key in given or not (key == PROTOTYPES or _is_fada_counter(key))
        }
        found = differences(needed, given)
        if found:
            raise ValueError(f"the checkpoint belongs to another network: {found}")
        return given
    if any(key.startswith(VGG_FEATURES) for key in given):
        given = _of_vgg(given)
    elif not any(key.startswith("conv1.") for key in given):
        given = {key.partition(".")[2]: value for key, value in given.items()}
    given = {f"{prefix}{key}": value for key, value in given.items() if key.partition(".")[0] not in SKIPPED_IN_INIT}
    given = {key: value for key, value in given.items() if key in own or not key.endswith(COUNTER)}
    needed = {key: value for key, value in own.items() if _is_backbone(key, prefix)}
    needed = {key: value for key, value in needed.items() if key in given or not _may_be_absent(key, prefix)}
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
    own, prefix = network.state_dict(), _backbone_prefix(network)
    given = {f"{prefix}{key}": value for key, value in strip_parallel(state).items()}
    taken = {key: given[key] for key in own if key in given and _is_backbone(key, prefix)}
    if not taken:
        raise ValueError(f"none of its {len(given)} tensors ({_few(tuple(state))}) belongs to this backbone")
    found = differences({key: own[key] for key in taken}, taken)
    if found:
        raise ValueError(f"the pretrained file does not fit this backbone: {found}")
    return taken


def with_published_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a BiSeNet under all names of the published checkpoints.

    These hold the context path twice, the second time as a whole ResNet whose classifier nobody uses (methods 8.5); it
    is written as zeros of the published shape.
    """
    found = dict(state)
    for key, value in state.items():
        if key.startswith(BISENET_CONTEXT):
            found[f"{BISENET_COPY}{key.removeprefix(BISENET_CONTEXT)}"] = value
    found[f"{BISENET_COPY}fc.weight"] = torch.zeros(
        IMAGENET_CLASSES, len(state["attention_refinement_module2.conv.bias"])
    )
    found[f"{BISENET_COPY}fc.bias"] = torch.zeros(IMAGENET_CLASSES)
    return found


def _without_copies(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`with_published_copies`."""
    return {key: value for key, value in given.items() if not key.startswith(BISENET_COPY)}


def _backbone_prefix(network: nn.Module) -> str:
    return network.BACKBONE if isinstance(network, Segmenter) else ""


def _is_backbone(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and (prefix != "" or key.partition(".")[0] in _BACKBONE)


def _may_be_absent(key: str, prefix: str) -> bool:
    """Of the tensors of a backbone: counters, and what no VGG of ImageNet has."""
    return key.endswith(COUNTER) or key.removeprefix(prefix).partition(".")[0] in DilatedVgg16.NEW


def _is_fada_counter(key: str) -> bool:
    return key.startswith(FADA_FEATURES) and key.endswith(COUNTER)


def _of_vgg(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions of an ImageNet file of a VGG-16 under the names of one without its last two pools."""
    found = {}
    for key, value in given.items():
        number, _, rest = key.removeprefix(VGG_FEATURES).partition(".")
        if key.startswith(VGG_FEATURES) and number.isdecimal():
            found[f"{int(number) - (int(number) > DilatedVgg16.MISSING_POOL)}.{rest}"] = value
    return found


_BACKBONE = frozenset(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"))
