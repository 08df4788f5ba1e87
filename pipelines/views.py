"""Augmentation: jitter, crop, flip and colour, batched on the student's device.

One parameter record a sample decides the geometry of its image and of every label map with it, and the record is a
pure function of (seed, position, label). No step of it waits for the device, not even the rule that draws a crop again
while it shows too few classes: all ten boxes are scored at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.autoaugment import autoaugment

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
"""Subtracted from 0–255 BGR values: what the DeepLab initialisation expects (methods §2.4)."""
CROP_DRAWS = 10
LUMA = (0.299, 0.587, 0.114)


def network_input(images: Tensor) -> Tensor:
    """uint8 or float N×H×W×3 RGB, 0–255 → float32 N×3×H×W BGR minus :data:`MEAN_BGR`."""
    mean = torch.tensor(MEAN_BGR, device=images.device).view(1, 3, 1, 1)
    return images.permute(0, 3, 1, 2).flip(1).float().contiguous() - mean


@dataclass(frozen=True)
class Whole:
    """No augmentation: the image as the stream delivers it."""

    def __call__(
        self, images: Tensor, labels: Sequence[Tensor], positions: np.ndarray
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`actors.protocols.View`. Labels of another size are sampled to the image's, nearest."""
        height, width = images.shape[1:3]
        return network_input(images), tuple(_nearest(label, (height, width)) for label in labels)


@dataclass(frozen=True)
class Boxes:
    """Where samples look, in pixels of the base size; all float32 N on the device.

    ``left`` and ``top`` are a crop's corner, ``zoom`` the base pixels that one crop pixel spans, ``flip`` 0 or 1.
    """

    left: Tensor
    top: Tensor
    zoom: Tensor
    flip: Tensor


@dataclass(frozen=True)
class RandomCrop:
    """Scale jitter, random crop, mirror: the training view of MRNet (methods §2.4).

    Attributes:
        seed: of the run.
        crop: (width, height) of the network input.
        jitter: bounds of the factor that multiplies the base size; (1, 1) for none.
        flip: probability of mirroring.
        more_than_values: a crop is drawn again, up to ten times, until its label shows more than this many distinct
            values (255 counts as one); 0 takes the first draw.
        colour: strength of brightness, contrast and saturation jitter; 0 for none.
        autoaugment: MRNet's part of AutoAugment, on the whole image before the crop (Q-MR-1).
    """

    seed: int
    crop: tuple[int, int]
    jitter: tuple[float, float] = (0.8, 1.2)
    flip: float = 0.5
    more_than_values: int = 0
    colour: float = 0.0
    autoaugment: bool = False

    def __call__(
        self, images: Tensor, labels: Sequence[Tensor], positions: np.ndarray
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`actors.protocols.View`."""
        height, width = images.shape[1:3]
        if self.crop[0] > width or self.crop[1] > height:
            raise ValueError(f"a crop of {self.crop} does not fit into images of {(width, height)}")
        draws = self._draws(positions)
        if self.autoaugment:
            images = autoaugment(images, self._policies(positions))
        candidates = self._candidates(draws, (width, height), images.device)
        first = labels[0] if labels and self.more_than_values else None
        boxes = self._choose(candidates, first, (width, height))
        x, y = _positions(boxes, self.crop)
        pixels = images.permute(0, 3, 1, 2).float()
        grid = torch.stack(
            (_expand(2 * x / width - 1, y, columns=True), _expand(2 * y / height - 1, x, columns=False)),
            dim=-1,
        )
        crops = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
        crops = crops.clamp(0, 255)
        if self.colour:
            crops = self._recolour(crops, draws)
        mean = torch.tensor(MEAN_BGR, device=crops.device).view(1, 3, 1, 1)
        maps = tuple(_gather(label, x * label.shape[-1] / width, y * label.shape[-2] / height) for label in labels)
        return crops.flip(1) - mean, maps

    def _draws(self, positions: np.ndarray) -> np.ndarray:
        """Uniform numbers float32 N×(2 + 2·draws + 3): zoom, flip, corners, colours."""
        count = 2 + 2 * CROP_DRAWS + 3
        return np.stack([np.random.default_rng([self.seed, 7, int(p)]).random(count, np.float32) for p in positions])

    def _policies(self, positions: np.ndarray) -> np.ndarray:
        """Uniform numbers N×5 for AutoAugment, of a stream of their own: without it nothing else changes."""
        return np.stack([np.random.default_rng([self.seed, 8, int(p)]).random(5) for p in positions])

    def _candidates(self, draws: np.ndarray, size: tuple[int, int], device: torch.device) -> Boxes:
        """Boxes N×draws; all draws of a sample share its zoom and flip."""
        width, height = size
        low, high = self.jitter
        low = max(low, self.crop[0] / width, self.crop[1] / height)
        scale = low + (max(low, high) - low) * draws[:, 0]
        zoom = 1.0 / scale
        corners = draws[:, 2 : 2 + 2 * CROP_DRAWS].reshape(len(draws), CROP_DRAWS, 2)
        # Corners are whole pixels of the jittered image, as a crop of a resized image would be.
        left = np.floor(corners[:, :, 0] * (width * scale - self.crop[0] + 1)[:, None]) * zoom[:, None]
        top = np.floor(corners[:, :, 1] * (height * scale - self.crop[1] + 1)[:, None]) * zoom[:, None]
        flip = (draws[:, 1] < self.flip).astype(np.float32)
        as_tensor = [torch.from_numpy(a.astype(np.float32)).to(device) for a in (left, top, zoom, flip)]
        return Boxes(*as_tensor)

    def _choose(self, boxes: Boxes, label: Tensor | None, size: tuple[int, int]) -> Boxes:
        """The first box that shows enough values, else the last: MRNet's rule, without a host synchronisation."""
        if label is None:
            return Boxes(boxes.left[:, 0], boxes.top[:, 0], boxes.zoom, boxes.flip)
        n, draws = boxes.left.shape
        every = Boxes(
            boxes.left.reshape(-1),
            boxes.top.reshape(-1),
            boxes.zoom.repeat_interleave(draws),
            boxes.flip.repeat_interleave(draws),
        )
        x, y = _positions(every, self.crop)
        x, y = x * label.shape[-1] / size[0], y * label.shape[-2] / size[1]
        shown = _gather(label.repeat_interleave(draws, 0), x, y).long().reshape(n * draws, -1)
        present = torch.zeros(n * draws, 256, device=label.device).scatter_(1, shown, 1.0)
        enough = (present.sum(1) > self.more_than_values).reshape(n, draws)
        enough[:, -1] = True
        pick = enough.to(torch.uint8).argmax(1, keepdim=True)
        return Boxes(boxes.left.gather(1, pick)[:, 0], boxes.top.gather(1, pick)[:, 0], boxes.zoom, boxes.flip)

    def _recolour(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Brightness, contrast, saturation; RGB 0–255, N×3×H×W."""
        factors = 1 + self.colour * (2 * draws[:, -3:] - 1)
        brightness, contrast, saturation = (
            torch.from_numpy(np.ascontiguousarray(factors[:, k])).to(images.device).view(-1, 1, 1, 1) for k in range(3)
        )
        images = images * brightness
        luma = (images * torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
        images = luma.mean((2, 3), keepdim=True) + contrast * (images - luma.mean((2, 3), keepdim=True))
        luma = (images * torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return (luma + saturation * (images - luma)).clamp(0, 255)


def class_mix(
    source: Tensor, source_label: Tensor, target: Tensor, target_label: Tensor, num_classes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste half of the classes of every source image onto a target image (ClassMix, Olsson et al. 2021).

    Args:
        source, target: network inputs of the same shape, N×3×H×W.
        source_label, target_label: int64 N×H×W, 255 = ignore; ignored source pixels are never pasted.
        num_classes: C.
        seed: decides which classes.

    Returns:
        The mixed images, their labels, and the mask of pasted pixels (bool N×H×W).
    """
    n = len(source)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, num_classes, generator=generator).to(source.device)
    flat = source_label.reshape(n, -1)
    present = torch.zeros(n, 256, device=source.device).scatter_(1, flat, 1.0)[:, :num_classes] > 0
    order = order.masked_fill(~present, 2.0)
    rank = order.argsort(1).argsort(1)
    chosen = (rank < (present.sum(1, keepdim=True) + 1) // 2) & present
    table = torch.zeros(n, 256, dtype=torch.bool, device=source.device)
    table[:, :num_classes] = chosen
    mask = table.gather(1, flat).view_as(source_label)
    mixed = torch.where(mask[:, None], source, target)
    return mixed, torch.where(mask, source_label, target_label), mask


def _positions(boxes: Boxes, crop: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Centres of a crop's columns (N×w) and rows (N×h) in pixels of the base size, mirrored where asked."""
    columns = torch.arange(crop[0], device=boxes.left.device, dtype=torch.float32) + 0.5
    rows = torch.arange(crop[1], device=boxes.left.device, dtype=torch.float32) + 0.5
    columns = torch.where(boxes.flip[:, None] > 0, crop[0] - columns, columns)
    return boxes.left[:, None] + columns * boxes.zoom[:, None], boxes.top[:, None] + rows * boxes.zoom[:, None]


def _expand(values: Tensor, other: Tensor, columns: bool) -> Tensor:
    """N×w (columns) or N×h (rows) → N×h×w."""
    return (
        values[:, None, :].expand(-1, other.shape[1], -1)
        if columns
        else values[:, :, None].expand(-1, -1, other.shape[1])
    )


def _gather(label: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Nearest values of N×H×W maps at columns x (N×w) and rows y (N×h), in the map's own pixels."""
    height, width = label.shape[-2:]
    columns = x.long().clamp(0, width - 1)
    rows = y.long().clamp(0, height - 1)
    strips = label.gather(1, rows[:, :, None].expand(-1, -1, width))
    return strips.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def _nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(label.shape[-2:]) == size:
        return label
    return F.interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(label.dtype)
