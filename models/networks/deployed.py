"""A network as it is deployed: from the values of a picture to class scores at its size, in one module.

Everything that a caller of ours does round a network lies inside, as constants, so that whoever runs a file of it
needs none of this code.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.networks.deeplab import DilatedConv2d
from models.networks.segmenter import Segmenter, upsample


class Deployed(nn.Module):
    """Class scores at the size of the images.

    Args:
        network: in eval mode.
        mean: of the values that it reads, in the order of its colours (methods 2.4).
        scale: they are divided by it, then.
        bgr: whether its colours are in the order blue, green, red.
        any_size: for a trace that shall hold for images of any size; the network's own parameters are used in a copy.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        network: Segmenter,
        mean: tuple[float, float, float],
        scale: tuple[float, float, float],
        *,
        bgr: bool,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.network = _without_choices(network) if any_size else network
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Maps images float (N, 3, H, W), RGB of 0 to 255, to class scores (N, C, H, W)."""
        ordered = images.flip(1) if self.bgr else images
        scores = self.network((ordered - self.mean) / self.scale).fused()
        return upsample(scores, (images.shape[-2], images.shape[-1]))


def _without_choices(network: Segmenter) -> Segmenter:
    """A copy whose dilated convolutions keep all their taps: which of them can be skipped depends on the size."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    found = copy.deepcopy(network, shared)
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DilatedConv2d):
                with torch.device("meta"):
                    whole = nn.Conv2d(
                        child.in_channels, child.out_channels, 3, padding=child.reach, dilation=child.reach
                    )
                whole.weight, whole.bias = child.weight, child.bias
                setattr(parent, name, whole.train(child.training))
    return found
