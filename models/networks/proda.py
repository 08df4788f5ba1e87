"""ProDA's one-head DeepLabV2 (methods 2.5): a head on stage four, whose map after dropout has prototypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.networks.backbone import BackboneMaps
from models.networks.deeplab import DeepLabConfig, DilatedSegmenter, Head

EXTRA_NORM = "bn_pretrain"
"""Name of the norm between backbone and head, in published checkpoints, too."""
PROTOTYPES = "prototypes"


class ProdaOutputs(NamedTuple):
    """Class scores (N, C, h, w) and the feature map (N, K, h, w) that they were read from, after dropout."""

    main: Tensor
    feature: Tensor

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """See :class:`models.networks.segmenter.Outputs`."""
        return ((1.0, self.main),)

    def fused(self) -> Tensor:
        """The class scores."""
        return self.main


class Proda(DilatedSegmenter):
    """Backbone, perhaps another batch norm, one head.

    The prototypes (C, K) are a buffer: they travel with the weights, to whoever denoises labels with them. Published
    checkpoints keep them beside the network; but for them, keys and shapes are those of the published ones.

    Args:
        config: with ``heads="proda"``.
    """

    prototypes: Tensor

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__(config)
        self.layer5 = Head(config.width * 32, config)
        self.bn_pretrain = nn.BatchNorm2d(config.width * 32) if config.extra_norm else None
        self.register_buffer(PROTOTYPES, torch.zeros(config.num_classes, config.bottleneck_channels))

    def head_features(self, maps: BackboneMaps) -> tuple[Tensor]:
        """See :class:`models.networks.deeplab.DilatedSegmenter`."""
        map4 = maps.layer4 if self.bn_pretrain is None else self.bn_pretrain(maps.layer4)
        return (self.layer5.features(map4),)

    def classify(self, features: tuple[Tensor]) -> ProdaOutputs:
        """Channel dropout (in training mode), then the classifier."""
        feature = self.layer5.head[0](features[0])
        return ProdaOutputs(self.layer5.classifier(feature), feature)

    def heads(self) -> list[Head]:
        """The only one."""
        return [self.layer5]

    def head_weights(self) -> tuple[float, ...]:
        """One."""
        return (1.0,)

    def norms(self) -> list[nn.Module]:
        """The extra norm learns at the head's rate (methods 2.6)."""
        return [] if self.bn_pretrain is None else [self.bn_pretrain]
