"""From a description to a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.networks.deeplab import DeepLab, DeepLabConfig, Heads, Segmenter
from models.networks.proda import Proda

NETWORKS: dict[Heads, type[Segmenter]] = {"mrnet": DeepLab, "proda": Proda}


@dataclass(frozen=True)
class Build:
    """Builds a network whenever it is called."""

    config: DeepLabConfig

    def __call__(self) -> Segmenter:
        """A freshly initialised network."""
        network = NETWORKS[self.config.heads](self.config)
        if self.config.conv_std is not None:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=self.config.conv_std)
        return network
