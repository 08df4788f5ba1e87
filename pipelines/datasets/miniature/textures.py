"""Noise tiles, and the patterns that make one domain's plaster differ from another's."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.miniature.canvas import Array

TILE = 256


@lru_cache(maxsize=64)
def noise(seed: int, slope: float, low: float = 2.0, high: float = 128.0, stretch: float = 1.0) -> Array:
    """A tileable field of zero mean and unit deviation with spectrum f^-slope between two frequencies.

    `stretch` > 1 draws the grain out horizontally, < 1 vertically.
    """
    rng = np.random.default_rng([seed, 7])
    fy = np.fft.fftfreq(TILE)[:, None] * TILE
    fx = np.fft.rfftfreq(TILE)[None, :] * TILE
    frequency = np.hypot(fx * stretch, fy / stretch)
    band = (frequency >= low) & (frequency <= high)
    amplitude = np.where(band, np.maximum(frequency, 1.0) ** -slope, 0.0)
    phase = np.exp(2j * np.pi * rng.random(frequency.shape))
    field = np.fft.irfft2(amplitude * phase, s=(TILE, TILE))
    field -= field.mean()
    return (field / field.std()).astype(np.float32)


def sample(tile: Array, u: Array, v: Array, per_metre: float) -> Array:
    """Look a tile up at surface coordinates in metres."""
    rows = (v * per_metre).astype(np.int32) & (TILE - 1)
    columns = (u * per_metre).astype(np.int32) & (TILE - 1)
    return tile[rows, columns]


def bricks(u: Array, v: Array, width: float, height: float, joint: float) -> NDArray[np.bool_]:
    """Where the joints of a running bond of bricks (or slabs, or stones) run."""
    row = np.floor(v / height)
    shifted = u / width + 0.5 * (row % 2)
    return ((v / height - row) < joint) | ((shifted - np.floor(shifted)) < joint * height / width)


def grid(u: Array, v: Array, size: float, joint: float) -> NDArray[np.bool_]:
    """Where the joints of square tiles run."""
    a, b = u / size, v / size
    return ((a - np.floor(a)) < joint) | ((b - np.floor(b)) < joint)
