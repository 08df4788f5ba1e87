"""Backbones: the ResNet of the DeepLabV2 family, in its Caffe arrangement, the usual one, and FADA's VGG-16.

The first differs from torchvision's ResNet in two places that decide whether published weights fit: a
bottleneck carries its stride on the *first 1x1* convolution, and the stem pools in *ceil mode*, so a
side of n pixels becomes n / 8 + 1 cells. Stages three and four keep that grid and dilate by 2 and 4
instead. Module names are those of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
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


Norm = Callable[[int], nn.Module]
"""Builds a normalisation of so many channels."""


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose statistics and affine are constants, without an epsilon (methods 2.5).

    A variance of zero makes infinite values, as it does in the published runs. No counter is kept.

    Args:
        channels: of the maps; it begins as the identity.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) to the same shape: weight / sqrt(variance) * (x - mean) + bias."""
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        # Unlike batch_norm, its backward pass needs no input: a ResNet-101 trains with half the memory. Under autocast
        # it computes in float32, whatever the maps are.
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (the first strided), each with a norm, added to the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = _shortcut(channels_in, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, channels, ceil(h / stride), ceil(w / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class StridedBottleneck(nn.Module):
    """1x1, 3x3 (strided or dilated), 1x1, each with a norm, added to the shortcut: torchvision's bottleneck."""

    def __init__(self, channels_in: int, channels: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        channels_out = channels * EXPANSION
        self.conv1 = PointwiseConv2d(channels_in, channels)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = PointwiseConv2d(channels, channels_out)
        self.bn3 = norm(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels_in, channels_out, stride, norm)

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
        dilated: whether stages three and four keep the grid of stage two and dilate by 2 and 4 instead (methods 2.5,
            FADA). The first block of each dilates as the stage before it does.
        norm: builds the norms.

    Attributes:
        channels: of the outputs of the four stages.

    Raises:
        ValueError: basic blocks shall be dilated.
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        width: int,
        block: Literal["basic", "bottleneck"],
        *,
        dilated: bool = False,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if dilated and block == "basic":
            raise ValueError("basic blocks are not dilated; give block='bottleneck'")
        self.channels = tuple((1 if block == "basic" else EXPANSION) * width << k for k in range(4))
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
        stages: list[nn.Sequential] = []
        before, dilation = width, 1
        for number, (blocks, channels) in enumerate(zip(layers, self.channels, strict=True)):
            stage: list[nn.Module] = []
            for index in range(blocks):
                stride = strides[number] if index == 0 else 1
                if block == "basic":
                    stage.append(BasicBlock(before, channels, stride, norm))
                else:
                    stage.append(StridedBottleneck(before, channels // EXPANSION, stride, dilation, norm))
                before, dilation = channels, dilations[number]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps images (N, 3, H, W) to the outputs of the four stages, at strides 4, 8, 16 and 32; dilated: 4 and 8."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        one = self.layer1(x)
        two = self.layer2(one)
        three = self.layer3(two)
        return one, two, three, self.layer4(three)


def _shortcut(channels_in: int, channels_out: int, stride: int, norm: Norm) -> nn.Sequential | None:
    """A projection where shapes differ."""
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(PointwiseConv2d(channels_in, channels_out, stride=stride), norm(channels_out))


class DilatedVgg16(nn.Sequential):
    """VGG-16 as DeepLab has it: its convolutions without the last two pools, then fc6 and fc7 as convolutions.

    It answers at stride 8: stage five dilates by 2, fc6 and fc7 are 3x3 convolutions that dilate by 4. Published width:
    28 872 512 parameters (methods 2.5, 8.5). Convolutions start from Kaiming's normal fan-out rule with zero bias, fc6
    and fc7 from the framework's. Layers are numbered as in FADA's checkpoints; behind the pool that is missing (23) an
    ImageNet file has them one number later.

    Args:
        width: channels of the first stage; the map that it answers with has 16 times as many.
    """

    MISSING_POOL: ClassVar[int] = 23
    NEW: ClassVar[tuple[str, str]] = ("29", "31")
    """Names of fc6 and fc7, whose start no ImageNet file has."""

    def __init__(self, width: int) -> None:
        stages = ((1, 2, 1), (2, 2, 1), (4, 3, 1), (8, 3, 1), (8, 3, 2), (16, 2, 4))
        layers: list[nn.Module] = []
        before = 3
        for number, (factor, convolutions, dilation) in enumerate(stages):
            if 1 <= number <= 3:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                channels = factor * width
                layers += [nn.Conv2d(before, channels, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                before = channels
        super().__init__(*layers)
        for name, module in self.named_children():
            if isinstance(module, nn.Conv2d) and name not in self.NEW:
                assert module.bias is not None
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
