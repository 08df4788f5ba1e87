"""The DeepLabV2 family at any depth and width, its two-head member of MRNet, and the rates at which its parts learn.

Heads read the backbone; MRNet's auxiliary one stage three, its primary one stages four and three
together. Each ends in channel dropout and a 1x1 convolution without bias, and *everything stochastic is
behind that point*: ``trunk`` computes what lies before it once, ``classify`` may be repeated as often as
wanted for a thousandth of the price. Logits stay at network resolution; ``upsample`` is a separate step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.backbone import BackboneMaps, Bottleneck, CaffeResNet, PointwiseConv2d
from models.networks.segmenter import Duplicates, Heads, Pixels, Segmenter, as_batch, upsample

Norm = Literal["gn", "bn", "instance", "layer"]
NORMS: tuple[Norm, ...] = ("gn", "bn", "instance", "layer")
AUX_WEIGHT = 0.5
"""Share of the auxiliary logits in the fused ones, z_F = z_A / 2 + z_P (methods 2.6)."""
SE_REDUCTION = 16


class Logits(NamedTuple):
    """Class scores of MRNet's heads, each (N, C, h, w); at network resolution unless upsampled."""

    aux: Tensor
    main: Tensor

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """See :class:`models.networks.segmenter.Outputs`: L = L_P + L_A / 2 (methods 3.1)."""
        return (1.0, self.main), (AUX_WEIGHT, self.aux)

    def fused(self) -> Tensor:
        """z_F = z_A / 2 + z_P (methods 2.6)."""
        return AUX_WEIGHT * self.aux + self.main


class HeadFeatures(NamedTuple):
    """The maps that enter the channel dropout of MRNet's heads, each (N, bottleneck_channels, h, w)."""

    aux: Tensor
    main: Tensor


@dataclass(frozen=True)
class DeepLabConfig:
    """Everything that decides the shapes of a DeepLab; the defaults are MRNet's published network.

    Raises:
        ValueError: if the fields cannot be built together, in a sentence saying why.
    """

    num_classes: int = 19
    """Classes the network scores."""
    layers: tuple[int, int, int, int] = (3, 4, 23, 3)
    """Residual blocks in each of the four stages; the default is ResNet-101."""
    width: int = 64
    """Channels of the stem; every backbone width is a multiple of it."""
    branch_channels: int = 256
    """Channels of each of a head's five parallel branches."""
    bottleneck_channels: int = 512
    """Channels of the map that enters the dropout of each head."""
    norm: Norm = "gn"
    """Normalisation inside the heads: group, batch, instance or layer."""
    groups: int = 32
    """Groups of the group norm."""
    use_se: bool = True
    """Whether a squeeze-and-excitation gate scales the concatenated branches."""
    dropout: float = 0.1
    """Rate of the channel dropout before the classifiers in training."""
    dilations: tuple[int, ...] = (6, 12, 18, 24)
    """Dilations of a head's 3x3 branches, in cells of the stride-8 grid."""
    heads: Heads = "mrnet"
    """mrnet: two heads, on stage three and on stages four and three. proda: one, on stage four."""
    extra_norm: bool = False
    """Whether a batch norm stands between backbone and head (ProDA's, behind a SimCLR backbone)."""
    conv_std: float | None = None
    """Every convolution starts from N(0, conv_std^2); None leaves each its own rule."""
    pixels: Pixels = "bgr_mean"
    """What the network reads. bgr_mean: BGR 0-255 minus a mean. rgb_unit: RGB 0-1 (methods 2.4)."""

    @property
    def smallest_batch(self) -> int:
        """One image: even its batch norms see a whole map."""
        return 1

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}; a segmentation network needs at least 2")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"layers is {self.layers}; give four stages of at least one block each")
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; choose one of {', '.join(NORMS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; a rate lies in [0, 1)")
        for name in ("branch_channels", "bottleneck_channels"):
            channels = getattr(self, name)
            if self.norm == "gn" and channels % self.groups:
                raise ValueError(f"{name} is {channels}, which {self.groups} groups do not divide; change one of them")

    @classmethod
    def small(cls, num_classes: int = 19) -> DeepLabConfig:
        """The family's small member: the same code at a depth and width that one CPU core can train.

        Four images of 256x128 cost 83 ms forward and backward on one thread while the other core of the
        machine was busy. Its dilations keep the published proportion to the grid (24 of 129 cells there, 8 of
        33 here) and stay inside it: a tap that never meets the map in training would keep its random start
        and speak up at a larger view.
        """
        return cls(
            num_classes=num_classes,
            layers=(1, 2, 2, 1),
            width=12,
            branch_channels=32,
            bottleneck_channels=64,
            groups=8,
            dilations=(3, 8),
        )


class DilatedConv2d(nn.Conv2d):
    """A 3x3 convolution with padding equal to its dilation that skips taps which see only padding.

    Where the dilation reaches past a side of the map, the outer rows (or columns) of the kernel multiply
    zeros everywhere. Leaving them out is exact, in the output and in the gradients (theirs are zero).
    """

    def __init__(self, channels_in: int, channels_out: int, dilation: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=dilation, dilation=dilation)
        self.reach = dilation

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to (N, channels_out, h, w)."""
        tall, wide = self.reach < x.shape[-2], self.reach < x.shape[-1]
        if tall and wide:
            return super().forward(x)
        weight = self.weight if tall else self.weight[:, :, 1:2]
        weight = weight if wide else weight[..., 1:2]
        padding = (self.reach if tall else 0, self.reach if wide else 0)
        return F.conv2d(x, weight, self.bias, 1, padding, self.reach)


class SqueezeExcitation(nn.Module):
    """Channel gate: global average, two linear layers, sigmoid, channel scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // SE_REDUCTION)
        self.se = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of (N, channels, h, w)."""
        gate = self.se(x.mean(dim=(2, 3)))
        return x * gate[:, :, None, None]


class Head(nn.Module):
    """MRNet's "pp" head: five parallel branches, gate, 3x3 bottleneck, norm; then dropout and classifier.

    Initialisation as published (methods 2.5): bottleneck convolution Kaiming normal fan-in with zero bias,
    classifier N(0, 0.001^2), everything else the framework's own.
    """

    def __init__(self, channels_in: int, config: DeepLabConfig) -> None:
        super().__init__()
        branch, bottleneck = config.branch_channels, config.bottleneck_channels
        convs: list[nn.Module] = [PointwiseConv2d(channels_in, branch, bias=True)]
        convs += [DilatedConv2d(channels_in, branch, dilation) for dilation in config.dilations]
        self.conv2d_list = nn.ModuleList(
            nn.Sequential(conv, _norm(config, branch), nn.ReLU(inplace=True)) for conv in convs
        )
        channels = branch * len(convs)
        conv = nn.Conv2d(channels, bottleneck, 3, padding=1)
        gate = [SqueezeExcitation(channels)] if config.use_se else []
        self.bottleneck = nn.Sequential(*gate, conv, _norm(config, bottleneck))
        classifier = PointwiseConv2d(bottleneck, config.num_classes)
        self.head = nn.Sequential(nn.Dropout2d(config.dropout), classifier)
        nn.init.kaiming_normal_(conv.weight, mode="fan_in")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        nn.init.normal_(classifier.weight, std=0.001)

    def features(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to the (N, bottleneck_channels, h, w) that enter the dropout."""
        return self.bottleneck(torch.cat([branch(x) for branch in self.conv2d_list], dim=1))

    @property
    def classifier(self) -> nn.Conv2d:
        """The 1x1 convolution behind the dropout."""
        module = self.head[1]
        assert isinstance(module, nn.Conv2d)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to logits (N, C, h, w)."""
        return self.head(self.features(x))


class DilatedSegmenter(Segmenter, CaffeResNet):
    """A backbone with heads that each end in channel dropout and a 1x1 convolution without bias.

    Args:
        config: of the network; a subclass adds the heads.
    """

    config: DeepLabConfig

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__(config.layers, config.width)
        self.config = config

    def heads(self) -> list[Head]:
        """The heads, in the order of what :meth:`trunk` returns."""
        raise NotImplementedError

    def norms(self) -> list[nn.Module]:
        """Further layers that learn at the heads' rate."""
        return []

    def head_features(self, maps: BackboneMaps) -> tuple[Tensor, ...]:
        """What enters the dropout of each head."""
        raise NotImplementedError

    def trunk(self, images: Tensor) -> tuple[Tensor, ...]:
        """Everything before the dropout.

        Args:
            images: float (N, 3, H, W), preprocessed (methods 2.4).

        Returns:
            The maps that enter the dropouts, (N, bottleneck_channels, h, w) at stride 8, one a head.

        Raises:
            ValueError: if the input is not a batch of three-channel images.
        """
        return self.head_features(self.features(as_batch(images)))

    def parameter_groups(
        self, *, lr: float, head_multiplier: float, duplicates: Duplicates, train_norm_affine: bool
    ) -> list[dict[str, Any]]:
        """See :func:`parameter_groups`."""
        return parameter_groups(
            self,
            lr=lr,
            head_multiplier=head_multiplier,
            duplicates=duplicates,
            train_norm_affine=train_norm_affine,
        )


class DeepLab(DilatedSegmenter):
    """MRNet's two-head network; ``layer5`` is the auxiliary head A, ``layer6`` the primary one P.

    State-dict keys and shapes are those of the published MRNet and EPLC checkpoints.
    """

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__(config)
        if config.extra_norm:
            raise ValueError("extra_norm belongs to a network with one head on stage four; leave it out")
        self.layer5 = Head(config.width * 16, config)
        self.layer6 = Head(config.width * 48, config)

    def head_features(self, maps: BackboneMaps) -> HeadFeatures:
        """See :class:`DilatedSegmenter`."""
        aux = self.layer5.features(maps.layer3)
        main = self.layer6.features(torch.cat([maps.layer4, maps.layer3], dim=1))
        return HeadFeatures(aux, main)

    def classify(self, features: HeadFeatures) -> Logits:
        """Channel dropout (in training mode) and the classifiers: logits (N, C, h, w) of both heads."""
        return Logits(self.layer5.head(features.aux), self.layer6.head(features.main))

    def heads(self) -> list[Head]:
        """The auxiliary and the primary head."""
        return [self.layer5, self.layer6]

    def head_weights(self) -> tuple[float, ...]:
        """Of z_F = z_A / 2 + z_P (methods 2.6)."""
        return AUX_WEIGHT, 1.0


def upsample_logits(logits: Logits, size: tuple[int, int]) -> Logits:
    """Both heads of ``upsample``: the z_A, z_P of methods section 3, at the size of the label."""
    return Logits(upsample(logits.aux, size), upsample(logits.main, size))


def parameter_groups(
    network: DilatedSegmenter,
    *,
    lr: float,
    head_multiplier: float = 10.0,
    duplicates: Duplicates = "published",
    train_norm_affine: bool = False,
) -> list[dict[str, Any]]:
    """Optimiser groups with the learning-rate multipliers of the published runs (methods 2.6, Q-SH-1).

    The published parameter generator listed every tensor of a residual block three times and of a
    projection shortcut four times, and SGD stepped once per listing. ``"published"`` gives these tensors
    the equivalent multipliers 3 and 4; ``"once"`` gives every backbone tensor the plain rate.

    As a side effect the affine parameters of the backbone's batch norms get ``requires_grad`` equal to
    ``train_norm_affine`` (False in stage I, True in stage II), so call it before wrapping in DDP.

    Args:
        network: the network whose parameters to group.
        lr: base rate of the backbone.
        head_multiplier: rate of the heads, and of what learns with them, relative to it.
        duplicates: whether to reproduce the multiplicities.
        train_norm_affine: whether the backbone's batch-norm affine parameters learn.

    Returns:
        Groups with ``params``, ``lr`` (= lr * lr_scale), ``lr_scale`` and ``name``; a scheduler sets
        ``group["lr"] = rate(step) * group["lr_scale"]``.
    """
    if duplicates not in ("published", "once"):
        raise ValueError(f"duplicates is {duplicates!r}; choose 'published' or 'once'")
    for part in [*network.stem(), *network.stages()]:
        for module in part.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for parameter in module.parameters():
                    parameter.requires_grad_(train_norm_affine)
    shortcuts: list[nn.Parameter] = []
    blocks: list[nn.Parameter] = []
    for stage in network.stages():
        for block in stage.children():
            assert isinstance(block, Bottleneck)
            projected = [] if block.downsample is None else list(block.downsample.parameters())
            known = {id(parameter) for parameter in projected}
            shortcuts += projected
            blocks += [parameter for parameter in block.parameters() if id(parameter) not in known]
    stem = [parameter for module in network.stem() for parameter in module.parameters()]
    heads = [parameter for part in [*network.norms(), *network.heads()] for parameter in part.parameters()]
    published = duplicates == "published"
    table = (
        ("stem", stem, 1.0),
        ("blocks", blocks, 3.0 if published else 1.0),
        ("shortcuts", shortcuts, 4.0 if published else 1.0),
        ("heads", heads, float(head_multiplier)),
    )
    return [
        {
            "name": name,
            "params": [parameter for parameter in parameters if parameter.requires_grad],
            "lr": lr * scale,
            "lr_scale": scale,
        }
        for name, parameters, scale in table
    ]


def _norm(config: DeepLabConfig, channels: int) -> nn.Module:
    """One normalisation of the heads; "layer" takes its statistics over channels and grid of one image."""
    if config.norm == "gn":
        return nn.GroupNorm(config.groups, channels)
    if config.norm == "bn":
        return nn.BatchNorm2d(channels)
    if config.norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.GroupNorm(1, channels)
