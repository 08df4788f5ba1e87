"""``run.py plan``: what every network and discriminator would cost at a size, without running any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.errors import RunError
from models.costs import Cost, cost
from models.networks.bisenet import BiSeNet
from models.networks.build import PUBLISHED, Build, named_config
from models.networks.discriminators import (
    UPSAMPLED,
    FullyConvDiscriminator,
    MultiScaleDiscriminator,
    PatchDiscriminator,
    PixelDiscriminator,
    SeparableDiscriminator,
)
from models.networks.fada import FadaConfig
from models.networks.layouts import with_published_copies
from models.networks.segmenter import Outputs
from pipelines.recipes.recipe import Size

Precision = Literal["float32", "bfloat16"]
DISCRIMINATORS: dict[str, Callable[[int], nn.Module]] = {
    "MultiScale": MultiScaleDiscriminator,
    "Patch": PatchDiscriminator,
    "FCD": FullyConvDiscriminator,
    "DSC": SeparableDiscriminator,
    "Pixel": PixelDiscriminator,
}
"""Of MRNet (it has two), of ProDA, both of BiSeNet, and of FADA, with the published widths (methods 2.5)."""


@dataclass(frozen=True)
class CostRow:
    """A network or a discriminator, and what it costs.

    Attributes:
        name: of :data:`models.networks.build.PUBLISHED` or of :data:`DISCRIMINATORS`.
        kind: which of the two.
        cost: for a batch of whole images, or of class probabilities at the images' size; of Pixel, for the features
            that fada101 makes of such images.
        unused: parameters that published files have beside those: a classifier of a thousand classes.
    """

    name: str
    kind: Literal["network", "discriminator"]
    cost: Cost
    unused: int = 0


def costs(
    size: Size = (1024, 512), *, batch: int = 1, classes: int = 19, precision: Precision = "float32"
) -> list[CostRow]:
    """What every published network and discriminator costs, on the ``meta`` device: nothing is allocated.

    Networks answer at their own resolution, and neither a loss nor an optimiser is in the numbers; a
    discriminator is looked at alone, as in the step that it learns in. With ``bfloat16`` everything is of that type;
    autocast, in which a student runs, keeps some maps in float32 and takes more.

    Args:
        size: (width, height) of the images.
        batch: images.
        classes: outputs of the networks, inputs of the discriminators.
        precision: type of weights, images and activations.

    Raises:
        RunError: an argument is none that a network or a discriminator can take.
    """
    _check(size, batch, classes)
    dtype = getattr(torch, precision)
    width, height = size
    rows = []
    with torch.device("meta"):
        images = torch.empty(batch, 3, height, width, dtype=dtype)
        for name in PUBLISHED:
            network = Build(named_config(name, classes, small=False))().to(dtype)
            found = _cost(name, network, images, _trained_scores)
            rows.append(CostRow(name, "network", found, _unused(network)))
        probabilities = torch.empty(batch, classes, height, width, dtype=dtype)
        sides = (-(-side // 8) for side in (height, width))
        features = torch.empty(batch, FadaConfig().feature_channels, *sides, dtype=dtype)
        for name, build in DISCRIMINATORS.items():
            inputs = features if build is PixelDiscriminator else probabilities
            found = _cost(name, build(classes).to(dtype), inputs, _patch_scores)
            rows.append(CostRow(name, "discriminator", found))
    return rows


def _check(size: Size, batch: int, classes: int) -> None:
    width, height = size
    given = f"the size is {width}x{height}"
    if min(size) < 1:
        raise RunError(f"{given}, and an image needs pixels; give a positive width and height, such as 1024 512")
    if min(size) < UPSAMPLED:
        raise RunError(
            f"{given}, and discriminators of five strides need {UPSAMPLED} pixels a side; give a larger --size"
        )
    if batch < 1:
        raise RunError(f"--batch is {batch}; a batch needs at least one image")
    if classes < 2:
        raise RunError(f"--classes is {classes}; a segmentation network needs at least 2")


def _cost(name: str, network: nn.Module, inputs: Tensor, scores: Callable[[Any], Sequence[Tensor]]) -> Cost:
    try:
        return cost(network, inputs, scores)
    except ValueError as error:  # a batch norm that would see one number
        batch, _, height, width = inputs.shape
        raise RunError(
            f"{name} cannot learn from {batch} x {width}x{height} pixels: {error}; give a larger --size or --batch"
        ) from error


def _trained_scores(answer: Outputs) -> Sequence[Tensor]:
    """Class scores of all heads."""
    return [scores for _, scores in answer.heads()]


def _patch_scores(answer: Any) -> Sequence[Tensor]:
    """One map, or one a scale."""
    return [answer] if isinstance(answer, Tensor) else list(answer)


def _unused(network: nn.Module) -> int:
    """Numbers of the classifier that a network's published file has and the network has not."""
    if not isinstance(network, BiSeNet):
        return 0
    published = with_published_copies(network.state_dict())
    return sum(tensor.numel() for name, tensor in published.items() if ".fc." in name)
