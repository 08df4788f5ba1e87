"""From a description to a network, and from a name to a description."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models.networks.bisenet import BiSeNet, BiSeNetConfig
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.fada import Fada, FadaConfig
from models.networks.proda import Proda
from models.networks.segmenter import Heads, Segmenter

Config = DeepLabConfig | BiSeNetConfig | FadaConfig
NETWORKS: dict[Heads, Callable[[Any], Segmenter]] = {
    "mrnet": DeepLab,
    "proda": Proda,
    "bisenet": BiSeNet,
    "fada": Fada,
}
CONFIGS: dict[Heads, type[Any]] = {
    "mrnet": DeepLabConfig,
    "proda": DeepLabConfig,
    "bisenet": BiSeNetConfig,
    "fada": FadaConfig,
}


@dataclass(frozen=True)
class Build:
    """Builds a network whenever it is called."""

    config: Config

    def __call__(self) -> Segmenter:
        """A freshly initialised network."""
        network = NETWORKS[self.config.heads](self.config)
        std = self.config.conv_std if isinstance(self.config, DeepLabConfig) else None
        if std is not None:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=std)
        return network


def config_of(plain: Mapping[str, Any]) -> Config:
    """The description whose ``dataclasses.asdict`` somebody kept, perhaps as JSON.

    Raises:
        TypeError: it has a field that this version does not know.
        ValueError: its fields cannot be built together.
        KeyError: it is of an unknown family.
    """
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    found: Config = CONFIGS[fields.get("heads", "mrnet")](**fields)
    return found


def _proda(config: DeepLabConfig) -> DeepLabConfig:
    channels = min(256, config.bottleneck_channels)
    return replace(config, heads="proda", bottleneck_channels=channels, pixels="rgb_unit")


PUBLISHED: dict[str, Config] = {
    "deeplab101": DeepLabConfig(),
    "proda101": replace(_proda(DeepLabConfig()), conv_std=0.01),
    "bisenet18": BiSeNetConfig(),
    "bisenet101": BiSeNetConfig.resnet101(),
    "fada101": FadaConfig(),
    "fada101-modified": FadaConfig(aspp="modified"),
    "fada-vgg16": FadaConfig.vgg16(),
}
"""The networks of the published systems (methods 2.5), for 19 classes."""
SMALL: dict[str, Config] = {
    "deeplab101": DeepLabConfig.small(),
    "proda101": _proda(DeepLabConfig.small()),
    "bisenet18": BiSeNetConfig(layers=(1, 1, 1, 1), width=16, spatial_width=16),
    "bisenet101": BiSeNetConfig(layers=(2, 2, 3, 2), width=16, spatial_width=16),
    "fada101": FadaConfig.small(),
    "fada101-modified": replace(FadaConfig.small(), aspp="modified"),
    "fada-vgg16": replace(FadaConfig.small(), backbone="vgg16", pixels="bgr_vgg"),
}
"""Members of the same families that a CPU core can train."""


def named_config(name: str, num_classes: int, *, small: bool) -> Config:
    """The description of a network by its name.

    Args:
        name: of :data:`PUBLISHED`.
        num_classes: outputs.
        small: the family's small member.

    Raises:
        ValueError: there is no such network; lists the known ones.
    """
    if name not in PUBLISHED:
        raise ValueError(f"there is no network {name!r}; known are {', '.join(PUBLISHED)}")
    return dataclasses.replace((SMALL if small else PUBLISHED)[name], num_classes=num_classes)
