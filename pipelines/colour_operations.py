"""Pillow's colour operations on tensors, for AutoAugment and RandAugment (methods §2.4).

Every operation takes a uint8 H×W×3 RGB image and returns one, equal to what Pillow makes of it, on the device that
holds the image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LUMA = (19595, 38470, 7471)
"""Pillow's weights of red, green and blue in gray, of 65,536."""


def solarize(image: Tensor, threshold: float) -> Tensor:
    """Inverts what is at least as bright as the threshold."""
    return torch.where(image.float() < threshold, image, 255 - image)


def posterize(image: Tensor, bits: int) -> Tensor:
    """Keeps the uppermost bits of every value."""
    return image & (256 - (1 << (8 - bits)))


def invert(image: Tensor) -> Tensor:
    """255 − image."""
    return 255 - image


def autocontrast(image: Tensor) -> Tensor:
    """Stretches every channel to 0…255, rounded down; a flat channel stays."""
    flat = image.reshape(-1, 3).double()
    low, high = flat.amin(0), flat.amax(0)
    # A number divided by a tensor would be its product with a reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    stretched = (image.double() * scale - low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, image.double()).to(torch.uint8)


def equalize(image: Tensor) -> Tensor:
    """Spreads every channel's values by their rank."""
    return torch.stack([_equalized(image[..., channel]) for channel in range(3)], dim=-1)


def _equalized(channel: Tensor) -> Tensor:
    counts = torch.bincount(channel.flatten().long(), minlength=256)
    last = counts[channel.flatten().long().amax()]
    step = torch.div(counts.sum() - last, 255, rounding_mode="floor")
    before = counts.cumsum(0) - counts
    table = torch.div(before + torch.div(step, 2, rounding_mode="floor"), step.clamp(min=1), rounding_mode="floor")
    table = torch.where(step > 0, table.clamp(max=255), torch.arange(256, device=channel.device))
    return table.to(torch.uint8)[channel.long()]


def brightness(image: Tensor, factor: float) -> Tensor:
    """0 makes it black, 1 changes nothing."""
    return _blend(torch.zeros_like(image), image, factor)


def color(image: Tensor, factor: float) -> Tensor:
    """0 makes it gray, 1 changes nothing."""
    return _blend(_gray(image)[..., None].expand_as(image), image, factor)


def contrast(image: Tensor, factor: float) -> Tensor:
    """0 makes it all the mean gray, 1 changes nothing."""
    mean = torch.floor(_gray(image).double().mean() + 0.5)
    return _blend(mean.to(torch.uint8).expand_as(image), image, factor)


def sharpness(image: Tensor, factor: float) -> Tensor:
    """Against the image smoothed by a 3×3 kernel whose middle weighs five times as much; the border stays."""
    smooth = image.clone()
    if min(image.shape[:2]) > 2:
        kernel = torch.ones(3, 1, 3, 3, dtype=torch.float64, device=image.device)
        kernel[:, :, 1, 1] = 5
        planes = image.permute(2, 0, 1)[None].double()
        inner = torch.nn.functional.conv2d(planes, kernel / 13, groups=3)[0].permute(1, 2, 0)
        smooth[1:-1, 1:-1] = (inner + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return _blend(smooth, image, factor)


def _gray(image: Tensor) -> Tensor:
    red, green, blue = (image[..., k].int() * weight for k, weight in enumerate(LUMA))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)


def _blend(plain: Tensor, image: Tensor, factor: float) -> Tensor:
    """Plain + factor · (image − plain), cut to 0…255 and rounded down, as Pillow does."""
    mixed = plain.float() + float(np.float32(factor)) * (image.float() - plain.float())
    return mixed.clamp(0, 255).to(torch.uint8)
