"""BiSeNet (Yu et al., ECCV 2018) as methods section 2.5 has it: a shallow path for space, a ResNet for context.

State-dict keys and shapes are those of the published checkpoints, misspelt names included. Where the published network
enlarges first and classifies then, this one does the reverse: a 1x1 convolution and a bilinear enlargement may change
places, and at an eighth of the resolution the one costs a sixty-fourth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.backbone import TorchvisionResNet
from models.networks.segmenter import Duplicates, Pixels, Segmenter, as_batch, upsample

SPATIAL_WIDENING = 4
"""Channels of the spatial path's last convolution per channel of its first."""


@dataclass(frozen=True)
class BiSeNetConfig:
    """Everything that decides the shapes of a BiSeNet; the defaults are the published one on a ResNet-18.

    Raises:
        ValueError: if the fields cannot be built together, in a sentence saying why.
    """

    num_classes: int = 19
    """Classes the network scores."""
    layers: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual blocks in each of the context path's four stages."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Residual blocks of two 3x3 convolutions (ResNet-18), or of 1x1, 3x3 and 1x1 (ResNet-101)."""
    width: int = 64
    """Channels of the context path's stem; every width of it is a multiple."""
    spatial_width: int = 64
    """Channels of the spatial path's first convolution; the others have two and four times as many."""
    pixels: Pixels = "rgb_imagenet"
    """What the network reads: RGB normalised as ImageNet's, or as published (Q-BI-4)."""
    heads: Literal["bisenet"] = "bisenet"
    """Family."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}; a segmentation network needs at least 2")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"layers is {self.layers}; give four stages of at least one block each")
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f"block is {self.block!r}; choose basic or bottleneck")
        if self.heads != "bisenet":
            raise ValueError(f"heads is {self.heads!r}, which is no BiSeNet's")
        for name in ("width", "spatial_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a convolution needs at least one channel")

    @property
    def bottleneck_channels(self) -> int:
        """Channels of the map that the classifier reads: one a class."""
        return self.num_classes

    @property
    def smallest_batch(self) -> int:
        """Two: the attention's batch norms see one number a channel and image."""
        return 2

    @classmethod
    def resnet101(cls, num_classes: int = 19) -> BiSeNetConfig:
        """The published network on a ResNet-101."""
        return cls(num_classes, layers=(3, 4, 23, 3), block="bottleneck")


class BiSeNetOutputs(NamedTuple):
    """Class scores of the three heads that are trained, each (N, C, H, W) at the images' size."""

    main: Tensor
    layer3: Tensor
    layer4: Tensor

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """See :class:`models.networks.segmenter.Outputs`: three equal weights (methods 6.1)."""
        return (1.0, self.main), (1.0, self.layer3), (1.0, self.layer4)

    def fused(self) -> Tensor:
        """Those of the main head: the others are there to be trained."""
        return self.main


class MainOutput(NamedTuple):
    """Class scores (N, C, H, W) of the one head that there is outside training."""

    main: Tensor

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """See :class:`models.networks.segmenter.Outputs`."""
        return ((1.0, self.main),)

    def fused(self) -> Tensor:
        """The class scores."""
        return self.main


class Paths(NamedTuple):
    """What the classifiers read: fused maps (N, C, h, w) and both refined ones of the context path, at an eighth."""

    fused: Tensor
    layer3: Tensor
    layer4: Tensor
    size: tuple[int, int]
    """(height, width) of the images."""


class ConvBlock(nn.Module):
    """3x3 convolution without bias, batch norm, rectifier."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, channels_out, ceil(h / stride), ceil(w / stride))."""
        return F.relu(self.bn(self.conv1(x)), inplace=True)


class SpatialPath(nn.Module):
    """Three strided convolutions: detail at an eighth of the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convblock1 = ConvBlock(3, width, 2)
        self.convblock2 = ConvBlock(width, 2 * width, 2)
        self.convblock3 = ConvBlock(2 * width, SPATIAL_WIDENING * width, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to (N, 4 * width, ceil(H / 8), ceil(W / 8))."""
        return self.convblock3(self.convblock2(self.convblock1(images)))


class ImageNorm(nn.BatchNorm2d):
    """A batch norm over one number a channel and image. One image alone has no statistics: it takes the running ones.

    A student never trains on one image (``smallest_batch``); estimates of statistics may end with one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, 1, 1) to the same shape."""
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class AttentionRefinement(nn.Module):
    """ARM: channels weighed by what the whole map holds of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.bn = ImageNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of (N, channels, h, w)."""
        return x * torch.sigmoid(self.bn(self.conv(x.mean((2, 3), keepdim=True))))


class FeatureFusion(nn.Module):
    """FFM: both paths to one channel a class, each weighed by what the whole map holds of it, and added."""

    def __init__(self, channels_in: int, num_classes: int) -> None:
        super().__init__()
        self.convblock = ConvBlock(channels_in, num_classes, 1)
        self.conv1 = nn.Conv2d(num_classes, num_classes, 1)
        self.conv2 = nn.Conv2d(num_classes, num_classes, 1)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """Maps (N, a, h, w) and (N, b, h, w), a + b = channels_in, to (N, C, h, w)."""
        x = self.convblock(torch.cat((spatial, context), dim=1))
        attention = torch.sigmoid(self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True)))))
        return x * attention + x


class BiSeNet(Segmenter):
    """The bilateral network: three heads in training, one outside.

    Convolutions that no pretrained file fills start from Kaiming's normal fan-in rule.

    Args:
        config: of the network.
    """

    BACKBONE: ClassVar[str] = "context_path."

    def __init__(self, config: BiSeNetConfig) -> None:
        super().__init__()
        self.config = config
        context = TorchvisionResNet(config.layers, config.width, config.block)
        map3, map4 = context.channels[2:]
        self.saptial_path = SpatialPath(config.spatial_width)
        self.context_path = context
        self.attention_refinement_module1 = AttentionRefinement(map3)
        self.attention_refinement_module2 = AttentionRefinement(map4)
        self.supervision1 = nn.Conv2d(map3, config.num_classes, 1)
        self.supervision2 = nn.Conv2d(map4, config.num_classes, 1)
        spatial = SPATIAL_WIDENING * config.spatial_width
        self.feature_fusion_module = FeatureFusion(spatial + map3 + map4, config.num_classes)
        self.conv = nn.Conv2d(config.num_classes, config.num_classes, 1)
        own = [module for name, module in self.named_modules() if not name.startswith("context_path")]
        for module in own:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def trunk(self, images: Tensor) -> Paths:
        """Both paths and their fusion, of images float (N, 3, H, W)."""
        images = as_batch(images)
        spatial = self.saptial_path(images)
        map3, map4 = self.context_path(images)[2:]
        tail = map4.mean((2, 3), keepdim=True)
        grid = (spatial.shape[-2], spatial.shape[-1])
        map3 = upsample(self.attention_refinement_module1(map3), grid, corners=False)
        map4 = upsample(self.attention_refinement_module2(map4) * tail, grid, corners=False)
        fused = self.feature_fusion_module(spatial, torch.cat((map3, map4), dim=1))
        return Paths(fused, map3, map4, (images.shape[-2], images.shape[-1]))

    def classify(self, features: Paths) -> BiSeNetOutputs | MainOutput:
        """Class scores at the images' size; of all three heads in training mode."""
        main = upsample(self.conv(features.fused), features.size, corners=False)
        if not self.training:
            return MainOutput(main)
        return BiSeNetOutputs(
            main,
            upsample(self.supervision1(features.layer3), features.size, corners=False),
            upsample(self.supervision2(features.layer4), features.size, corners=False),
        )

    def classifier_parameters(self) -> list[nn.Parameter]:
        """Its last convolution: what the others read learns no more, and outside training nobody asks them."""
        return list(self.conv.parameters())

    def parameter_groups(
        self, *, lr: float, head_multiplier: float, duplicates: Duplicates, train_norm_affine: bool
    ) -> list[dict[str, Any]]:
        """One group: no published part of it learns faster than another (methods 2.6). Batch norms always learn."""
        return [{"name": "network", "params": list(self.parameters()), "lr": lr, "lr_scale": 1.0}]
