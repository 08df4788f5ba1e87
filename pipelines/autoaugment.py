"""The part of AutoAugment that MRNet uses: sub-policies that leave geometry alone (methods §2.4, Q-MR-1).

Every operation equals Pillow's on 8-bit RGB and runs on the device that holds the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Name = Literal["solarize", "posterize", "equalize", "autocontrast", "invert", "color", "contrast", "sharpness"]
Step = tuple[float, Name, int]
"""Probability, operation, index of its magnitude."""

POLICIES: tuple[tuple[Step, Step], ...] = (
    ((0.6, "solarize", 5), (0.6, "autocontrast", 0)),
    ((0.8, "equalize", 0), (0.6, "equalize", 0)),
    ((0.6, "posterize", 7), (0.6, "posterize", 6)),
    ((0.4, "equalize", 0), (0.2, "solarize", 4)),
    ((0.6, "solarize", 3), (0.6, "equalize", 0)),
    ((0.8, "posterize", 5), (1.0, "equalize", 0)),
    ((0.6, "equalize", 0), (0.4, "posterize", 6)),
    ((0.0, "equalize", 0), (0.8, "equalize", 0)),
    ((0.6, "invert", 0), (1.0, "equalize", 0)),
    ((0.6, "color", 4), (1.0, "contrast", 8)),
    ((0.8, "color", 8), (0.8, "solarize", 7)),
    ((0.4, "sharpness", 7), (0.6, "invert", 0)),
    ((0.4, "color", 0), (0.6, "equalize", 0)),
    ((0.4, "equalize", 0), (0.2, "solarize", 4)),
    ((0.6, "solarize", 5), (0.6, "autocontrast", 0)),
    ((0.6, "invert", 0), (1.0, "equalize", 0)),
    ((0.6, "color", 4), (1.0, "contrast", 8)),
    ((0.8, "equalize", 0), (0.6, "equalize", 0)),
)
"""18 of the 25 sub-policies, some of them twice, as in the published code."""
BITS = (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
"""Bits that posterize keeps, by magnitude."""
LUMA = (19595, 38470, 7471)
"""Pillow's weights of red, green and blue in gray, of 65,536."""


def autoaugment(images: Tensor, draws: np.ndarray) -> Tensor:
    """Apply one sub-policy to each image.

    Args:
        images: uint8 N×H×W×3 RGB.
        draws: float N×5 in [0, 1): the policy, and for each of its two operations whether it is applied and the sign of
            its magnitude.

    Returns:
        uint8 N×H×W×3.
    """
    return torch.stack([_policy(image, numbers) for image, numbers in zip(images, draws, strict=True)])


def _policy(image: Tensor, numbers: np.ndarray) -> Tensor:
    policy = POLICIES[int(numbers[0] * len(POLICIES))]
    for (probability, name, magnitude), applied, sign in zip(policy, numbers[1:3], numbers[3:5], strict=True):
        if applied < probability:
            image = OPERATIONS[name](image, magnitude, 1.0 if sign < 0.5 else -1.0)
    return image


def _solarize(image: Tensor, magnitude: int, sign: float) -> Tensor:
    """Inverts what is at least as bright as 256 − 28.44 · magnitude."""
    return torch.where(image.float() < 256 - 256 / 9 * magnitude, image, 255 - image)


def _posterize(image: Tensor, magnitude: int, sign: float) -> Tensor:
    return image & (256 - (1 << (8 - BITS[magnitude])))


def _invert(image: Tensor, magnitude: int, sign: float) -> Tensor:
    return 255 - image


def _autocontrast(image: Tensor, magnitude: int, sign: float) -> Tensor:
    """Stretches every channel to 0…255, rounded down; a flat channel stays."""
    flat = image.reshape(-1, 3).double()
    low, high = flat.amin(0), flat.amax(0)
    # A number divided by a tensor would be its product with a reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    stretched = (image.double() * scale - low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, image.double()).to(torch.uint8)


def _equalize(image: Tensor, magnitude: int, sign: float) -> Tensor:
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


def _color(image: Tensor, magnitude: int, sign: float) -> Tensor:
    return _blend(_gray(image)[..., None].expand_as(image), image, magnitude, sign)


def _contrast(image: Tensor, magnitude: int, sign: float) -> Tensor:
    mean = torch.floor(_gray(image).double().mean() + 0.5)
    return _blend(mean.to(torch.uint8).expand_as(image), image, magnitude, sign)


def _sharpness(image: Tensor, magnitude: int, sign: float) -> Tensor:
    """Against the image smoothed by a 3×3 kernel whose middle weighs five times as much; the border stays."""
    smooth = image.clone()
    if min(image.shape[:2]) > 2:
        kernel = torch.ones(3, 1, 3, 3, dtype=torch.float64, device=image.device)
        kernel[:, :, 1, 1] = 5
        planes = image.permute(2, 0, 1)[None].double()
        inner = torch.nn.functional.conv2d(planes, kernel / 13, groups=3)[0].permute(1, 2, 0)
        smooth[1:-1, 1:-1] = (inner + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return _blend(smooth, image, magnitude, sign)


def _gray(image: Tensor) -> Tensor:
    red, green, blue = (image[..., k].int() * weight for k, weight in enumerate(LUMA))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)


def _blend(plain: Tensor, image: Tensor, magnitude: int, sign: float) -> Tensor:
    """Plain + (1 ± magnitude / 10) · (image − plain), cut to 0…255 and rounded down, as Pillow does."""
    factor = np.float32(1 + sign * magnitude / 10)
    mixed = plain.float() + float(factor) * (image.float() - plain.float())
    return mixed.clamp(0, 255).to(torch.uint8)


OPERATIONS: dict[Name, Callable[[Tensor, int, float], Tensor]] = {
    "solarize": _solarize,
    "posterize": _posterize,
    "equalize": _equalize,
    "autocontrast": _autocontrast,
    "invert": _invert,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
}
