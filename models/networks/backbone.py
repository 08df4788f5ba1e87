"""Residual backbones: that of the DeepLabV2 family, in its Caffe arrangement, and the usual one.

The first differs from torchvision's ResNet in two places that decide whether published weights fit: a
bottleneck carries its stride on the *first 1x1* convolution, and the stem pools in *ceil mode*, so a
side of n pixels becomes n / 8 + 1 cells. Stages three and four keep that grid and dilate by 2 and 4
instead. Module names are those of the checkpoints.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4
"""Output channels of a bottleneck per channel of its middle convolution."""


class BackboneMaps(NamedTuple):
    """The two maps the heads read, (N, 16 * width, h, w) and (N, 32 * width, h, w)."""

    layer3: Tensor
    layer4: Tensor


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that reaches the fast kernels on one CPU thread too.

    On one thread and fewer than 16 images torch sends a plain 1x1 convolution to a generic matrix product,
    2.2 times slower here in both directions and blind to the channels-last layout. A dilated one goes to
    oneDNN, and dilating a kernel of one tap changes nothing.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = False) -> None:
        super().__init__(channels_in, channels_out, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, channels_out, ceil(h / stride), ceil(w / stride))."""
        dilation = 2 if x.device.type == "cpu" else 1
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, dilation)


class Bottleneck(nn.Module):
    """1x1 (strided), 3x3 (dilated), 1x1, each with batch norm, added to the shortcut."""

    def __init__(self, channels_in: int, channels: int, *, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        channels_out = channels * EXPANSION
        self.conv1 = PointwiseConv2d(channels_in, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = PointwiseConv2d(channels, channels_out)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if project:
            self.downsample = nn.Sequential(
                PointwiseConv2d(channels_in, channels_out, stride=stride),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, 4 * channels, ceil(h / stride), ceil(w / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + shortcut)


class CaffeResNet(nn.Module):
    """Stem and four stages at output stride 8 (methods 2.5, "caffe-style").

    ``layers=(3, 4, 23, 3), width=64`` is ResNet-101: 42 500 160 parameters. Convolutions start from
    Kaiming's normal fan-out rule, which matters only where no pretrained file replaces it.
    """

    def __init__(self, layers: tuple[int, int, int, int], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(width, width, layers[0], stride=1, dilation=1)
        self.layer2 = _stage(width * 4, width * 2, layers[1], stride=2, dilation=1)
        self.layer3 = _stage(width * 8, width * 4, layers[2], stride=1, dilation=2)
        self.layer4 = _stage(width * 16, width * 8, layers[3], stride=1, dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> BackboneMaps:
        """Maps images (N, 3, H, W) float to the outputs of stages three and four at stride 8."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        layer3 = self.layer3(self.layer2(self.layer1(x)))
        return BackboneMaps(layer3, self.layer4(layer3))

    def stem(self) -> list[nn.Module]:
        """The first convolution and its norm."""
        return [self.conv1, self.bn1]

    def stages(self) -> list[nn.Module]:
        """The four residual stages."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, images: Tensor) -> object:
        """The backbone maps; a subclass with heads returns what its heads make of them."""
        return self.features(images)


def grid_size(height: int, width: int) -> tuple[int, int]:
    """The network's output grid for an image of this size (methods 2.5, output grids).

    The stem's convolution halves rounding up, its ceil-mode pool takes n to floor(n / 2) + 1, and the strided
    1x1 of stage two halves rounding up again.
    """

    def cells(pixels: int) -> int:
        stem = (pixels - 1) // 2 + 1
        pooled = -(-(stem + 2 - 3) // 2) + 1
        if (pooled - 1) * 2 >= stem + 1:  # a window may not start in the right padding
            pooled -= 1
        return (pooled - 1) // 2 + 1

    return cells(height), cells(width)


def _stage(channels_in: int, channels: int, blocks: int, *, stride: int, dilation: int) -> nn.Sequential:
    stage: list[nn.Module] = []
    for index in range(blocks):
        first = index == 0
        stage.append(
            Bottleneck(
                channels_in if first else channels * EXPANSION,
                channels,
                stride=stride if first else 1,
                dilation=dilation,
                project=first,
            )
        )
    return nn.Sequential(*stage)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (the first strided), each with batch norm, added to the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, channels, ceil(h / stride), ceil(w / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class StridedBottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1, each with batch norm, added to the shortcut: torchvision's bottleneck."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * EXPANSION
        self.conv1 = PointwiseConv2d(channels_in, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = PointwiseConv2d(channels, channels_out)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, 4 * channels, ceil(h / stride), ceil(w / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class TorchvisionResNet(nn.Module):
    """The usual ResNet without its classifier: names, shapes and outputs of torchvision's.

    Args:
        layers: blocks in each of the four stages.
        width: channels of the stem.
        block: ``basic`` or ``bottleneck``.

    Attributes:
        channels: of the outputs of the four stages.
    """

    def __init__(self, layers: tuple[int, int, int, int], width: int, block: Literal["basic", "bottleneck"]) -> None:
        super().__init__()
        kind, expansion = (BasicBlock, 1) if block == "basic" else (StridedBottleneck, EXPANSION)
        self.channels = tuple(expansion * width << k for k in range(4))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Sequential] = []
        before = width
        for number, (blocks, channels) in enumerate(zip(layers, self.channels, strict=True), 1):
            stage: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if index == 0 and number > 1 else 1
                stage.append(kind(before if index == 0 else channels, channels // expansion, stride))
            stages.append(nn.Sequential(*stage))
            before = channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps images (N, 3, H, W) to the outputs of the four stages, at strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        one = self.layer1(x)
        two = self.layer2(one)
        three = self.layer3(two)
        return one, two, three, self.layer4(three)


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential | None:
    """A projection where shapes differ."""
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(PointwiseConv2d(channels_in, channels_out, stride=stride), nn.BatchNorm2d(channels_out))
