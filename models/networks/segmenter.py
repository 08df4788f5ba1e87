"""What every segmentation network of the house is, whatever it is built of.

``trunk`` computes what lies before a network's classifiers once; ``classify`` may be repeated. Networks whose
classifiers stand behind a channel dropout say so in ``heads``: Monte-Carlo passes repeat only these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Heads = Literal["mrnet", "proda", "bisenet", "fada"]
Pixels = Literal["bgr_mean", "rgb_unit", "rgb_imagenet", "bgr_vgg", "bgr_city", "bgr_gray"]
Duplicates = Literal["published", "once"]


class Outputs(Protocol):
    """What a network answers, whatever its heads."""

    def heads(self) -> tuple[tuple[float, Tensor], ...]:
        """Class scores (N, C, h, w) of every head with its weight in the supervised loss, the primary one first."""
        ...

    def fused(self) -> Tensor:
        """The class scores (N, C, h, w) that are scored and that label."""
        ...


class NetworkConfig(Protocol):
    """What may be asked of any network's description, which decides all its shapes."""

    @property
    def num_classes(self) -> int:
        """Classes that the network scores."""
        ...

    @property
    def heads(self) -> Heads:
        """Which family it is of."""
        ...

    @property
    def pixels(self) -> Pixels:
        """What it reads (methods 2.4)."""
        ...

    @property
    def bottleneck_channels(self) -> int:
        """Channels of the maps that its classifiers read."""
        ...

    @property
    def smallest_batch(self) -> int:
        """Images that it needs at a time in training."""
        ...


class DroppedHead(Protocol):
    """A classifier behind a channel dropout."""

    @property
    def classifier(self) -> nn.Conv2d:
        """The 1x1 convolution without bias."""
        ...


class Segmenter(nn.Module):
    """A network that scores the classes of every pixel."""

    BACKBONE: ClassVar[str] = ""
    """What the names of its backbone's tensors begin with."""
    config: NetworkConfig

    def trunk(self, images: Tensor) -> Any:
        """Everything before the classifiers, of images float (N, 3, H, W)."""
        raise NotImplementedError

    def classify(self, features: Any) -> Any:
        """:class:`Outputs` at the network's resolution, of what :meth:`trunk` returned."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Any:
        """:class:`Outputs` at the network's resolution for images (N, 3, H, W)."""
        return self.classify(self.trunk(images))

    def heads(self) -> Sequence[DroppedHead]:
        """Those behind a channel dropout, in the order of what :meth:`trunk` returns; none in a network without."""
        return []

    def head_weights(self) -> tuple[float, ...]:
        """Share of every such head's logits in the fused ones."""
        return ()

    def classifier_parameters(self) -> list[nn.Parameter]:
        """What classifier refinement trains (methods 7.5): the classifiers of :meth:`heads`, where there are some.

        A network without says itself what of it classifies.
        """
        return [parameter for head in self.heads() for parameter in head.classifier.parameters()]

    def parameter_groups(
        self, *, lr: float, head_multiplier: float, duplicates: Duplicates, train_norm_affine: bool
    ) -> list[dict[str, Any]]:
        """Optimiser groups, each with ``params``, ``lr`` (= lr * lr_scale), ``lr_scale`` and ``name``.

        Args:
            lr: base rate.
            head_multiplier: rate of what is new on a pretrained backbone, relative to the backbone's.
            duplicates: whether to reproduce the multiplicities of published runs (Q-SH-1), where there are any.
            train_norm_affine: whether the backbone's batch-norm affine parameters learn.
        """
        raise NotImplementedError


def as_batch(images: Tensor) -> Tensor:
    """Images as a network reads them fastest.

    Raises:
        ValueError: they are no batch of three-channel images.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; the network reads (N, 3, H, W)")
    if images.device.type == "cpu":
        # oneDNN trains a third faster in this layout, and it carries through the whole network.
        images = images.contiguous(memory_format=torch.channels_last)
    return images


def upsample(maps: Tensor, size: tuple[int, int], *, corners: bool = True) -> Tensor:
    """Bilinear, (N, C, h, w) to (N, C, *size) with size = (height, width).

    Args:
        maps: returned as they are where they have that size already.
        size: wanted.
        corners: whether the centres of the corner cells stay where they are (methods section 3), or the outer edges
            do (BiSeNet).
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if maps.device.type == "cpu" and maps.requires_grad and torch.is_grad_enabled():
        # Torch's backward pass of this costs a CPU eight times its forward; two matrix products halve the sum.
        n, c, h, w = maps.shape
        rows, columns = _interpolation(size[0], h, maps, corners), _interpolation(size[1], w, maps, corners)
        wide = (maps.reshape(n * c * h, w) @ columns.t()).view(n * c, h, size[1])
        return torch.matmul(rows, wide).view(n, c, *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=corners)


def _interpolation(pixels: int, cells: int, like: Tensor, corners: bool) -> Tensor:
    """Matrix (pixels, cells) of the bilinear weights along one axis."""
    position = torch.arange(pixels, dtype=torch.float64, device=like.device)
    if corners:
        position = position * ((cells - 1) / (pixels - 1) if pixels > 1 else 0.0)
    else:
        position = ((position + 0.5) * (cells / pixels) - 0.5).clamp(min=0.0)
    low = position.floor().long().clamp(max=cells - 1)
    share = (position - low).to(like.dtype)[:, None]
    matrix = torch.zeros((pixels, cells), dtype=like.dtype, device=like.device)
    matrix.scatter_add_(1, low[:, None], 1.0 - share)
    return matrix.scatter_add_(1, (low + 1).clamp(max=cells - 1)[:, None], share)
