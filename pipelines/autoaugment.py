"""The part of AutoAugment that MRNet uses: sub-policies that leave geometry alone (methods §2.4, Q-MR-1).

Every operation equals Pillow's on 8-bit RGB and runs on the device that holds the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines import colour_operations as colours

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
    return colours.solarize(image, 256 - 256 / 9 * magnitude)


def _posterize(image: Tensor, magnitude: int, sign: float) -> Tensor:
    return colours.posterize(image, BITS[magnitude])


def _signed(operation: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, int, float], Tensor]:
    """An operation whose factor is 1 ± magnitude / 10."""
    return lambda image, magnitude, sign: operation(image, 1 + sign * magnitude / 10)


def _plain(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int, float], Tensor]:
    """An operation without a magnitude."""
    return lambda image, magnitude, sign: operation(image)


OPERATIONS: dict[Name, Callable[[Tensor, int, float], Tensor]] = {
    "solarize": _solarize,
    "posterize": _posterize,
    "equalize": _plain(colours.equalize),
    "autocontrast": _plain(colours.autocontrast),
    "invert": _plain(colours.invert),
    "color": _signed(colours.color),
    "contrast": _signed(colours.contrast),
    "sharpness": _signed(colours.sharpness),
}
