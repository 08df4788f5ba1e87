"""Discriminators: networks that tell the source domain from the target.

Most read a softmax map over the classes and answer patch by patch; FADA's reads features and answers cell by cell, for
every class of either domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.backbone import PointwiseConv2d
from models.networks.segmenter import upsample

NEGATIVE_SLOPE = 0.2
SCALES = 3
RESIDUAL_BLOCKS = 4


class ConvBlock(nn.Module):
    """3x3 convolution with zero padding, then (optionally) a leaky rectifier."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, channels_out, ceil(h / stride), ceil(w / stride))."""
        y = self.conv(x)
        return F.leaky_relu(y, NEGATIVE_SLOPE) if self.activate else y


class PatchDiscriminator(nn.Module):
    """ProDA's patch discriminator: four strided 3x3 convolutions and a 1x1 (methods 2.5).

    With 19 classes and the published width it has 1 560 705 parameters. The first three convolutions are rectified,
    the fourth leakily. Weights start from the framework's rule.

    Args:
        num_classes: channels of the probability map it reads.
        width: channels of the first convolution; each further one has twice as many.

    Raises:
        ValueError: if a count is below one.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise ValueError(f"num_classes is {num_classes} and width is {width}; both must be at least 1")
        channels = [num_classes, *(width << k for k in range(4))]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        self.classifier = PointwiseConv2d(channels[-1], 1, bias=True)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Patch scores (N, 1, h, w) at stride 16 of a softmax over classes, float (N, C, H, W)."""
        x = probabilities
        for conv in self.convs[:-1]:
            x = F.relu(conv(x))
        scores: Tensor = self.classifier(F.leaky_relu(self.convs[-1](x), NEGATIVE_SLOPE))
        return scores


UPSAMPLED = 32
"""How many times as high and wide as its last map the answer of BiSeNet's discriminators is: strides take it back."""


class FullyConvDiscriminator(nn.Module):
    """FCD: five strided 4x4 convolutions (methods 2.5).

    With 19 classes and the published width it has 2 781 121 parameters. State-dict keys are those of the published
    checkpoints. Weights start from the framework's rule.

    Args:
        num_classes: channels of the probability map it reads.
        width: channels of the first convolution; each of the next three has twice as many.

    Raises:
        ValueError: if a count is below one.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        channels = _channels(num_classes, width)
        names = ("conv1", "conv2", "conv3", "conv4", "classifier")
        self.layers = names
        for name, (before, after) in zip(names, pairwise(channels), strict=True):
            self.add_module(name, nn.Conv2d(before, after, 4, stride=2, padding=1))

    def forward(self, probabilities: Tensor) -> Tensor:
        """Scores (N, 1, 32 h, 32 w) of a softmax over classes, float (N, C, H, W), with h = H / 32 rounded down.

        Raises:
            ValueError: the map is smaller than 32 cells a side.
        """
        return _enlarged_scores([self.get_submodule(name) for name in self.layers], probabilities)


class SeparableDiscriminator(nn.Module):
    """DSC: FCD with depth-wise separable convolutions without bias, a fifteenth of its weights (methods 2.5).

    With 19 classes and the published width it has 189 424 parameters. Keys as published.

    Args:
        num_classes: channels of the probability map it reads.
        width: channels behind the first pair of convolutions; behind each of the next three there are twice as many.

    Raises:
        ValueError: if a count is below one.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        channels = _channels(num_classes, width)
        self.layers = ("1", "2", "3", "4", "CL")
        for name, (before, after) in zip(self.layers, pairwise(channels), strict=True):
            depth = nn.Conv2d(before, before, 4, stride=2, padding=1, groups=before, bias=False)
            self.add_module(f"depthwise{name}", depth)
            self.add_module(f"pointwise{name}", PointwiseConv2d(before, after))

    def forward(self, probabilities: Tensor) -> Tensor:
        """See :class:`FullyConvDiscriminator`."""
        pairs = [
            nn.Sequential(self.get_submodule(f"depthwise{name}"), self.get_submodule(f"pointwise{name}"))
            for name in self.layers
        ]
        return _enlarged_scores(pairs, probabilities)


def _channels(num_classes: int, width: int) -> list[int]:
    if num_classes < 1 or width < 1:
        raise ValueError(f"num_classes is {num_classes} and width is {width}; both must be at least 1")
    return [num_classes, *(width << k for k in range(4)), 1]


def _enlarged_scores(layers: Sequence[nn.Module], probabilities: Tensor) -> Tensor:
    """Leaky rectifiers between layers, and none behind the last, whose map is enlarged bilinearly."""
    height, width = probabilities.shape[-2:]
    if min(height, width) < UPSAMPLED:
        raise ValueError(f"the map is {height}x{width}; a discriminator of five strides needs {UPSAMPLED} a side")
    *first, last = layers
    x = probabilities
    for layer in first:
        x = F.leaky_relu(layer(x), NEGATIVE_SLOPE)
    x = last(x)
    return upsample(x, (UPSAMPLED * x.shape[-2], UPSAMPLED * x.shape[-1]), corners=False)


class PixelDiscriminator(nn.Module):
    """FADA's: which class of which domain a cell of the features is (methods 2.5; Wang et al., ECCV 2020).

    With 19 classes, the features of a ResNet-101 and the published width it has 5 057 702 parameters. State-dict keys
    are those of the published checkpoints. Weights start from the framework's rule.

    Args:
        num_classes: that the networks score; it answers for twice as many.
        features: channels of the map it reads.
        width: channels of the first convolution; the second has half as many.

    Raises:
        ValueError: if a count is below one, or the width below two.
    """

    def __init__(self, num_classes: int, features: int = 2048, width: int = 256) -> None:
        super().__init__()
        if num_classes < 1 or features < 1 or width < 2:
            raise ValueError(
                f"num_classes is {num_classes}, features is {features} and width is {width}; they must be at least 1, "
                "1 and 2"
            )
        self.D = nn.Sequential(
            nn.Conv2d(features, width, 3, padding=1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        )
        self.cls1 = nn.Conv2d(width // 2, num_classes, 3, padding=1)
        self.cls2 = nn.Conv2d(width // 2, num_classes, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (N, 2 C, h, w) of the features (N, F, h, w): the classes of the source, then those of the target."""
        x = self.D(features)
        return torch.cat((self.cls1(x), self.cls2(x)), dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the first activated, added to the input; nothing follows the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(ConvBlock(channels, channels), ConvBlock(channels, channels, activate=False))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, h, w) to the same shape."""
        return x + self.model(x)


class MultiScaleDiscriminator(nn.Module):
    """MRNet's patch discriminator: three equal networks on a three-level average-pool pyramid (methods 2.5).

    With 19 classes and the published width it has 1 041 699 parameters. State-dict keys are those of the
    published checkpoints. Weights start from N(0, 0.02^2), biases from zero.

    Args:
        num_classes: channels of the probability map it reads.
        width: channels of the first four convolutions; the rest has twice as many.

    Raises:
        ValueError: if a count is below one.
    """

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise ValueError(f"num_classes is {num_classes} and width is {width}; both must be at least 1")
        self.cnns = nn.ModuleList(_patch_network(num_classes, width) for _ in range(SCALES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, probabilities: Tensor) -> list[Tensor]:
        """Patch scores of every scale.

        Args:
            probabilities: softmax over classes, float (N, C, H, W).

        Returns:
            Three maps (N, 1, h, w) at strides 8, 16 and 32.
        """
        scores: list[Tensor] = []
        x = probabilities
        for index, network in enumerate(self.cnns):
            if index:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            scores.append(network(x))
        return scores


def _patch_network(num_classes: int, width: int) -> nn.Sequential:
    wide = 2 * width
    return nn.Sequential(
        ConvBlock(num_classes, width, stride=2),
        ConvBlock(width, width),
        ConvBlock(width, width, stride=2),
        ConvBlock(width, width),
        ConvBlock(width, wide, stride=2),
        *(ResidualBlock(wide) for _ in range(RESIDUAL_BLOCKS)),
        PointwiseConv2d(wide, 1, bias=True),
    )
