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
from torch import Tensor, nn

from models.networks.segmenter import Pixels, Segmenter
from pipelines.autoaugment import autoaugment

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
"""Subtracted from 0–255 BGR values: what the DeepLab initialisation expects (methods §2.4)."""
CROP_DRAWS = 10
LUMA = (0.299, 0.587, 0.114)


def network_input(images: Tensor, pixels: Pixels = "bgr_mean") -> Tensor:
    """uint8 or float N×H×W×3 RGB, 0–255 → what a network reads, float32 N×3×H×W (methods §2.4)."""
    return normalised(images.permute(0, 3, 1, 2).float().contiguous(), pixels)


def input_of(images: Tensor, network: nn.Module) -> Tensor:
    """uint8 or float N×H×W×3 RGB, 0–255 → what one of our networks reads, float32 N×3×H×W."""
    assert isinstance(network, Segmenter)
    return network_input(images, network.config.pixels)


@dataclass(frozen=True)
class PixelFormat:
    """(v - mean) / scale of values v in 0–255, in either order of the colours (methods §2.4)."""

    mean: tuple[float, float, float]
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bgr: bool = True


PIXELS: dict[Pixels, PixelFormat] = {
    "bgr_mean": PixelFormat(MEAN_BGR),
    "rgb_unit": PixelFormat((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), bgr=False),
    "rgb_imagenet": PixelFormat((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), bgr=False),
    "bgr_vgg": PixelFormat((103.939, 116.779, 123.68)),
    # The published BiSeNet runs: Cityscapes, whose mean is one of RGB values, and GTA5 (Q-BI-4).
    "bgr_city": PixelFormat((73.158359210711552, 82.908917542625858, 72.392398761941593)),
    "bgr_gray": PixelFormat((128.0, 128.0, 128.0)),
}


def normalised(images: Tensor, pixels: Pixels) -> Tensor:
    """Float N×3×H×W RGB, 0–255 → what a network reads."""
    wanted = PIXELS[pixels]
    ordered = images.flip(1) if wanted.bgr else images
    if any(wanted.mean):
        ordered = ordered - _of_colours(wanted.mean, images)
    return ordered if wanted.bgr else ordered / _of_colours(wanted.scale, images)


def rgb(inputs: Tensor, pixels: Pixels) -> Tensor:
    """The inverse of :func:`normalised`."""
    given = PIXELS[pixels]
    values = inputs if given.bgr else inputs * _of_colours(given.scale, inputs)
    if any(given.mean):
        values = values + _of_colours(given.mean, inputs)
    return values.flip(1) if given.bgr else values


def _of_colours(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Whole:
    """No augmentation: the image as the stream delivers it.

    Attributes:
        pixels: what the network reads.
    """

    pixels: Pixels = "bgr_mean"

    def __call__(
        self, images: Tensor, labels: Sequence[Tensor], positions: np.ndarray
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`actors.protocols.View`. Labels of another size are sampled to the image's, nearest."""
        height, width = images.shape[1:3]
        return network_input(images, self.pixels), self.maps(labels, positions, (width, height))

    def maps(self, labels: Sequence[Tensor], positions: np.ndarray, base: tuple[int, int]) -> tuple[Tensor, ...]:
        """What a call makes of the maps alone, of images of a base size (width, height)."""
        return tuple(_nearest(label, base[::-1]) for label in labels)


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
        hue: bound of the hue jitter, as a share of the colour circle (FADA: 0.2, methods §2.4); 0 for none.
        autoaugment: MRNet's part of AutoAugment, on the whole image before the crop (Q-MR-1).
        pixels: what the network reads.
    """

    seed: int
    crop: tuple[int, int]
    jitter: tuple[float, float] = (0.8, 1.2)
    flip: float = 0.5
    more_than_values: int = 0
    colour: float = 0.0
    hue: float = 0.0
    autoaugment: bool = False
    pixels: Pixels = "bgr_mean"

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
        if self.hue:
            crops = _hue_turned(crops, self._turns(positions))
        return normalised(crops, self.pixels), _gathered(labels, x, y, (width, height))

    def maps(self, labels: Sequence[Tensor], positions: np.ndarray, base: tuple[int, int]) -> tuple[Tensor, ...]:
        """What a call makes of the maps alone, of images of a base size (width, height).

        For maps that are made after the images were seen; boxes that depend on a label cannot be had again.
        """
        assert not self.more_than_values
        candidates = self._candidates(self._draws(positions), base, labels[0].device)
        x, y = _positions(self._choose(candidates, None, base), self.crop)
        return _gathered(labels, x, y, base)

    def sample(self, maps: Tensor, positions: np.ndarray, base: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """What maps of whole images show inside the crops, bilinearly, at a grid of points.

        Both the maps' cells and the grid's points reach from the first to the last pixel (corners aligned), of the
        image and of the crop: where a network puts its cells, and where its logits are enlarged to.

        Args:
            maps: float N×K×h×w, of the same images.
            positions: int64 N, as this view was called with; boxes that depend on a label cannot be had again.
            base: (width, height) of the images that it was called with.
            grid: points (across, down).

        Returns:
            N×K×down×across.
        """
        assert not self.more_than_values
        candidates = self._candidates(self._draws(positions), base, maps.device)
        boxes = self._choose(candidates, None, base)
        x, y = _positions(boxes, self.crop, grid)
        x, y = 2 * (x - 0.5) / max(1, base[0] - 1) - 1, 2 * (y - 0.5) / max(1, base[1] - 1) - 1
        points = torch.stack((_expand(x, y, columns=True), _expand(y, x, columns=False)), dim=-1)
        return F.grid_sample(maps, points.to(maps.dtype), mode="bilinear", padding_mode="border", align_corners=True)

    def _draws(self, positions: np.ndarray) -> np.ndarray:
        """Uniform numbers float32 N×(2 + 2·draws + 3): zoom, flip, corners, colours."""
        count = 2 + 2 * CROP_DRAWS + 3
        return np.stack([np.random.default_rng([self.seed, 7, int(p)]).random(count, np.float32) for p in positions])

    def _policies(self, positions: np.ndarray) -> np.ndarray:
        """Uniform numbers N×5 for AutoAugment, of a stream of their own: without it nothing else changes."""
        return np.stack([np.random.default_rng([self.seed, 8, int(p)]).random(5) for p in positions])

    def _turns(self, positions: np.ndarray) -> np.ndarray:
        """By how much of the colour circle hues are turned, float32 N, of a stream of their own as well."""
        drawn = [np.random.default_rng([self.seed, 10, int(p)]).uniform(-self.hue, self.hue) for p in positions]
        return np.array(drawn, np.float32)

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


def _hue_turned(images: Tensor, turns: np.ndarray) -> Tensor:
    """RGB 0–255, N×3×H×W, with hues moved along the colour circle; HSV's saturation and value stay."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    # In sixths of the circle, counted from red; gray has no hue, and is given one that its chroma of 0 hides.
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * torch.from_numpy(turns).to(images.device).view(-1, 1, 1)
    # A channel has the value within a sixth of its own hue, the least one within a sixth of the opposite hue.
    steps = [torch.remainder(hue + offset, 6) for offset in (5, 3, 1)]
    falls = [torch.minimum(step, 4 - step).clamp(0, 1) for step in steps]
    return torch.stack([value - chroma * fall for fall in falls], dim=1)


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


def _positions(boxes: Boxes, crop: tuple[int, int], grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Centres of a crop's columns (N×w) and rows (N×h) in pixels of the base size, mirrored where asked.

    With a grid, of so many points between the first and the last.
    """
    across, down = crop if grid is None else grid
    columns = torch.arange(across, device=boxes.left.device, dtype=torch.float32)
    rows = torch.arange(down, device=boxes.left.device, dtype=torch.float32)
    if grid is not None:
        columns, rows = (
            points * ((pixels - 1) / max(1, count - 1))
            for points, pixels, count in ((columns, crop[0], across), (rows, crop[1], down))
        )
    columns, rows = columns + 0.5, rows + 0.5
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


def _gathered(labels: Sequence[Tensor], x: Tensor, y: Tensor, base: tuple[int, int]) -> tuple[Tensor, ...]:
    """Nearest values of maps at columns and rows that are counted in pixels of a base size (width, height)."""
    return tuple(_gather(label, x * label.shape[-1] / base[0], y * label.shape[-2] / base[1]) for label in labels)


def _nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(label.shape[-2:]) == size:
        return label
    return F.interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(label.dtype)
