"""FADA's DeepLabV2 (Wang et al., ECCV 2020): a feature extractor and a classifier apart (methods 2.5).

A discriminator reads the features, so the network hands them out beside the class scores. Three choices decide which of
the published files fits: the backbone, whether its norms are frozen, and the classifier, of FADA itself ("original
ASPP") or of "Undoing label shift" ("modified ASPP", ProDA's head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from models.networks.backbone import EXPANSION, DilatedVgg16, FrozenBatchNorm2d, TorchvisionResNet
from models.networks.deeplab import DeepLabConfig, DilatedConv2d, Head
from models.networks.segmenter import Duplicates, Pixels, Segmenter, as_batch

Backbone = Literal["resnet", "vgg16"]
Norms = Literal["frozen", "batch"]
Aspp = Literal["original", "modified"]


@dataclass(frozen=True)
class FadaConfig:
    """Everything that decides the shapes of a FADA network; the defaults are the published one on a ResNet-101.

    Raises:
        ValueError: if the fields cannot be built together, in a sentence saying why.
    """

    num_classes: int = 19
    """Classes the network scores."""
    backbone: Backbone = "resnet"
    """resnet: torchvision's, of bottlenecks. vgg16: without norms."""
    layers: tuple[int, int, int, int] = (3, 4, 23, 3)
    """Residual blocks in each of a ResNet's four stages; the default is ResNet-101."""
    width: int = 64
    """Channels of the backbone's first convolution; every width of it is a multiple."""
    norms: Norms = "frozen"
    """A ResNet's norms. frozen: constants, without an epsilon. batch: ordinary ones, which learn."""
    aspp: Aspp = "original"
    """The classifier. original: the sum of dilated convolutions to the classes. modified: ProDA's head."""
    dilations: tuple[int, ...] = (6, 12, 18, 24)
    """Dilations of the classifier's 3x3 convolutions, in cells of the stride-8 grid."""
    branch_channels: int = 256
    """Of the modified one: channels of each of its five parallel branches."""
    head_channels: int = 256
    """Of the modified one: channels of the map that enters its dropout."""
    groups: int = 32
    """Of the modified one: groups of its group norms."""
    dropout: float = 0.1
    """Of the modified one: rate of the channel dropout before its 1x1 convolution in training."""
    pixels: Pixels = "rgb_imagenet"
    """What the network reads; a VGG-16 of the published file reads bgr_vgg (methods 2.4)."""
    heads: Literal["fada"] = "fada"
    """Family."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}; a segmentation network needs at least 2")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"layers is {self.layers}; give four stages of at least one block each")
        if self.width < 1:
            raise ValueError(f"width is {self.width}; a convolution needs at least one channel")
        if not self.dilations:
            raise ValueError("dilations is empty; the classifier needs at least one convolution")
        for name, known in (("backbone", ("resnet", "vgg16")), ("norms", ("frozen", "batch"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if self.aspp not in ("original", "modified"):
            raise ValueError(f"aspp is {self.aspp!r}; choose original or modified")
        if self.heads != "fada":
            raise ValueError(f"heads is {self.heads!r}, which is no FADA network's")
        if self.aspp == "modified":
            self.head_config()

    @property
    def feature_channels(self) -> int:
        """Channels of the backbone's last map: 2048 of a ResNet-101, 1024 of a VGG-16."""
        return self.width * (8 * EXPANSION if self.backbone == "resnet" else 16)

    @property
    def bottleneck_channels(self) -> int:
        """Channels of the map that the classifier reads, or of the one that enters its dropout."""
        return self.feature_channels if self.aspp == "original" else self.head_channels

    @property
    def smallest_batch(self) -> int:
        """One image: even its batch norms see a whole map."""
        return 1

    def head_config(self) -> DeepLabConfig:
        """What ProDA's head is built from.

        Raises:
            ValueError: it cannot be.
        """
        return DeepLabConfig(
            num_classes=self.num_classes,
            branch_channels=self.branch_channels,
            bottleneck_channels=self.head_channels,
            groups=self.groups,
            dropout=self.dropout,
            dilations=self.dilations,
        )

    @classmethod
    def vgg16(cls, num_classes: int = 19) -> FadaConfig:
        """The published network on a VGG-16, which reads what the Caffe conversion of ImageNet's weights expects."""
        return cls(num_classes, backbone="vgg16", pixels="bgr_vgg")

    @classmethod
    def small(cls, num_classes: int = 19) -> FadaConfig:
        """The family's small member: as deep, wide and far-seeing as :meth:`DeepLabConfig.small`.

        Four images of 256x128 cost two thirds of what they cost that one, forward and backward on one thread.
        """
        return cls(
            num_classes,
            layers=(1, 2, 2, 1),
            width=12,
            norms="batch",
            dilations=(3, 8),
            branch_channels=32,
            head_channels=64,
            groups=8,
        )


class FadaOutputs(NamedTuple):
    """Class scores (N, C, h, w) and the backbone's last map (N, F, h, w), which a discriminator reads."""

    main: Tensor
    feature: Tensor

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """See :class:`models.networks.segmenter.Outputs`."""
        return ((1.0, self.main),)

    def fused(self) -> Tensor:
        """The class scores."""
        return self.main


class FadaScores(NamedTuple):
    """Class scores (N, C, h, w), where the features were given."""

    main: Tensor

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """See :class:`models.networks.segmenter.Outputs`."""
        return ((1.0, self.main),)

    def fused(self) -> Tensor:
        """The class scores."""
        return self.main


class FeatureExtractor(nn.Module):
    """The backbone's last map at an eighth: 1024x512 gives 128x64. Its one child makes the published names.

    Args:
        config: of the network.
    """

    def __init__(self, config: FadaConfig) -> None:
        super().__init__()
        self.backbone: TorchvisionResNet | DilatedVgg16
        if config.backbone == "vgg16":
            self.backbone = DilatedVgg16(config.width)
        else:
            norm = FrozenBatchNorm2d if config.norms == "frozen" else nn.BatchNorm2d
            self.backbone = TorchvisionResNet(config.layers, config.width, "bottleneck", dilated=True, norm=norm)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to (N, F, h, w); sides are halved thrice, rounding up, of a VGG-16 down."""
        found = self.backbone(images)
        return found if isinstance(found, Tensor) else found[-1]


class OriginalAspp(nn.Module):
    """The sum of 3x3 convolutions of several dilations to the classes (methods 2.5).

    With 2048 channels, 19 classes and the published dilations it has 1 400 908 parameters. Weights start from
    N(0, 0.01^2), biases from the framework's rule.

    Args:
        channels_in: of the features.
        num_classes: outputs.
        dilations: of the convolutions.
    """

    def __init__(self, channels_in: int, num_classes: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        convs = [DilatedConv2d(channels_in, num_classes, dilation) for dilation in dilations]
        self.conv2d_list = nn.ModuleList(convs)
        for conv in convs:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, h, w) to class scores (N, C, h, w)."""
        first, *others = self.conv2d_list
        scores: Tensor = first(x)
        for conv in others:
            scores = scores + conv(x)
        return scores


class Fada(Segmenter):
    """Feature extractor and classifier; class scores at an eighth of the images' size.

    State-dict keys and shapes are those that published checkpoints keep under ``feature_extractor`` and ``classifier``.

    Args:
        config: of the network.
    """

    BACKBONE: ClassVar[str] = "feature_extractor.backbone."
    config: FadaConfig

    def __init__(self, config: FadaConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.classifier: OriginalAspp | Head
        if config.aspp == "original":
            self.classifier = OriginalAspp(config.feature_channels, config.num_classes, config.dilations)
        else:
            self.classifier = Head(config.feature_channels, config.head_config())

    def trunk(self, images: Tensor) -> tuple[Tensor]:
        """What the original classifier reads, the features, or what enters the modified one's dropout.

        Args:
            images: float (N, 3, H, W), preprocessed (methods 2.4).

        Returns:
            One map (N, bottleneck_channels, h, w).

        Raises:
            ValueError: if the input is not a batch of three-channel images.
        """
        return (self._read(self.feature_extractor(as_batch(images))),)

    def classify(self, features: tuple[Tensor]) -> FadaScores:
        """The original classifier; of the modified one channel dropout (in training mode) and its last convolution."""
        return FadaScores(self._scores(features[0]))

    def forward(self, images: Tensor) -> FadaOutputs:
        """Class scores and features at the network's resolution for images (N, 3, H, W)."""
        feature: Tensor = self.feature_extractor(as_batch(images))
        return FadaOutputs(self._scores(self._read(feature)), feature)

    def heads(self) -> list[Head]:
        """The modified classifier; the original one has no dropout."""
        return [self.classifier] if isinstance(self.classifier, Head) else []

    def head_weights(self) -> tuple[float, ...]:
        """One, where there is a head."""
        return tuple(1.0 for _ in self.heads())

    def classifier_parameters(self) -> list[nn.Parameter]:
        """All of the classifier, whichever it is (methods 7.5)."""
        return list(self.classifier.parameters())

    def parameter_groups(
        self, *, lr: float, head_multiplier: float, duplicates: Duplicates, train_norm_affine: bool
    ) -> list[dict[str, Any]]:
        """See :class:`models.networks.segmenter.Segmenter`; published runs list every tensor once (Q-SH-1).

        Whatever a stage before had frozen learns again, but for the affine parameters of the backbone's batch norms as
        ``train_norm_affine`` says.
        """
        self.requires_grad_(True)
        for module in self.feature_extractor.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(train_norm_affine)
        table = (("backbone", self.feature_extractor, 1.0), ("classifier", self.classifier, float(head_multiplier)))
        return [
            {
                "name": name,
                "params": [parameter for parameter in part.parameters() if parameter.requires_grad],
                "lr": lr * scale,
                "lr_scale": scale,
            }
            for name, part, scale in table
        ]

    def _read(self, feature: Tensor) -> Tensor:
        """What :meth:`_scores` reads, of the backbone's last map."""
        return self.classifier.features(feature) if isinstance(self.classifier, Head) else feature

    def _scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier.head(x) if isinstance(self.classifier, Head) else self.classifier(x)
        return scores
