"""Monte-Carlo dropout over test-time views, and the label rules built on it (methods 3.2 and 4.1).

All randomness of the networks sits in the channel dropout before a bias-free 1x1 convolution. So the trunk
runs once per view, and the T passes over it are one matrix product with T masked copies of the classifier.
Sums over passes and views commute with the bilinear upsampling; and the minimum and the deviation are asked
of one class per pixel only, the winner of the mean, so instead of T upsampled volumes each pixel reads that
class's T values at its four grid neighbours. Probabilities are divided by the number of views (0..1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.segmenter import Segmenter, upsample

IGNORE = 255
Strategy = Literal["mean", "min", "std"]
STRATEGIES: tuple[Strategy, ...] = ("mean", "min", "std")
PIXELS_AT_ONCE = 1 << 18
"""Pixels whose passes are gathered together; bounds the memory at large label sizes."""


@dataclass(frozen=True)
class UncertaintyRule:
    """Which pixels keep their label; thresholds are on the 0..1 scale (published: 3.2 and 0.2 of 4 views).

    With m the mean over passes of q_t and k* = argmax_c m_c: ``mean`` keeps k* where m_k* >= min_confidence;
    ``min`` where every pass gives k* at least that; ``std`` where m_k* does and the population standard
    deviation of q_{t,k*} is at most max_std.

    Raises:
        ValueError: for an unknown strategy or a threshold outside its range.
    """

    strategy: Strategy = "mean"
    """mean, min or std."""
    min_confidence: float = 0.8
    """Lowest probability a kept pixel may have."""
    max_std: float = 0.05
    """Largest deviation over passes a kept pixel may have (strategy std)."""
    published_min: bool = False
    """Bit-faithful min (Q-EP-3): store argmax_c min_t q_{t,c} although the test looks at k*."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if not 0.0 <= self.min_confidence <= 1.0:
            raise ValueError(f"min_confidence is {self.min_confidence}; a probability lies in [0, 1]")
        if self.max_std < 0.0:
            raise ValueError(f"max_std is {self.max_std}; a deviation is not negative")


@dataclass(frozen=True)
class View:
    """What the trunk made of one view of the images, (N, K, h, w) per head, perhaps of mirrored images."""

    features: Any
    """Of a network with heads behind a dropout, a tuple with the maps that each of them reads."""
    mirrored: bool = False


HeadMasks = tuple[Tensor, ...]
"""Dropout factors of one view, (T, N, K) float per head: 0 or 1 / (1 - rate)."""


@dataclass(frozen=True)
class MonteCarloLabels:
    """Labels of N images at label size, each field (N, H, W)."""

    label: Tensor
    """uint8: k* (or the published min's class) where kept, 255 where withheld."""
    argmax: Tensor
    """uint8: k*, everywhere."""
    confidence: Tensor
    """float32: m_k*, in 0..1."""
    lowest: Tensor | None = None
    """float32: min over passes of q_{t,k*}; strategy min only."""
    std: Tensor | None = None
    """float32: population standard deviation of q_{t,k*} over passes; strategy std, or with statistics."""
    min_prob: Tensor | None = None
    """float32: max over classes of the min over passes of q_{t,c}; with statistics."""

    def quantised(self) -> Tensor:
        """The confidence in 255 steps, uint8."""
        return quantise(self.confidence)


def quantise(confidence: Tensor) -> Tensor:
    """Rounds confidences in 0..1 to uint8 steps of 1/255."""
    return (confidence * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)


def draw_masks(
    generators: Sequence[torch.Generator],
    *,
    views: int,
    passes: int,
    channels: int,
    rate: float = 0.1,
    heads: int = 2,
    device: torch.device | str = "cpu",
) -> list[HeadMasks]:
    """Independent dropout masks for every view, pass, head and channel of every image.

    Each image draws from its own generator, so its labels depend neither on the other images of the batch
    nor on the device. The published rate is 0.1 whatever the training rate was (methods 4.1).

    Args:
        generators: one CPU generator per image.
        views: number of views V.
        passes: number of passes T.
        channels: K, the network's ``bottleneck_channels``.
        rate: share of channels dropped; 0 turns dropout off.
        heads: number of heads.
        device: where the masks are wanted.

    Returns:
        V masks, each (T, N, K) per head.

    Raises:
        ValueError: if a count is below one or the rate outside [0, 1).
    """
    if not generators or min(views, passes, channels) < 1:
        raise ValueError(
            f"{len(generators)} images, {views} views, {passes} passes and {channels} channels were asked "
            "for; each must be at least 1"
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the dropout rate is {rate}; it lies in [0, 1)")
    drawn = torch.stack(
        [torch.rand((views, heads, passes, channels), generator=generator) for generator in generators], dim=3
    )
    masks = ((drawn >= rate).float() / (1.0 - rate)).to(device)
    return [tuple(view.unbind(0)) for view in masks]


@torch.no_grad()
def monte_carlo_labels(
    network: Segmenter,
    views: Sequence[View],
    masks: Sequence[HeadMasks] | None,
    size: tuple[int, int],
    rule: UncertaintyRule,
    *,
    statistics: bool = False,
    offset: Tensor | None = None,
) -> MonteCarloLabels:
    """Labels and statistics of T dropout passes over every view.

    q_t = mean over views of Up(softmax(z_A / 2 + z_P)), the softmax at network resolution, mirrored views
    mirrored back, Up bilinear with corners aligned to ``size``. Equals T full passes with the same masks.

    Args:
        network: the network whose classifiers are used; its mode does not matter.
        views: trunk outputs of every view, same images in the same order.
        masks: as many as views, see ``draw_masks``; None for a single pass without dropout.
        size: label (height, width).
        rule: what to keep.
        statistics: also return what the published generator writes beside a label.
        offset: C, added to the fused logits of every pass and view: inference adjustment (methods 7.4); None for none.

    Returns:
        Labels of N images.

    Raises:
        ValueError: if views and masks do not belong together, or there is no view.
    """
    grids = _pass_probabilities(network, views, masks, offset=offset)
    confidence, winner = _winners(grids, size)
    argmax = winner.to(torch.uint8)
    withheld = torch.full_like(argmax, IGNORE)
    lowest = std = min_prob = None
    kept, value = confidence >= rule.min_confidence, argmax
    published = rule.strategy == "min" and rule.published_min
    if statistics or published:
        min_prob, least_doubted = _lowest_volume(grids, size)
        value = least_doubted if published else argmax
    if rule.strategy == "min":
        lowest = _winner_statistics(grids, winner, "min")
        kept = lowest >= rule.min_confidence
    if statistics or rule.strategy == "std":
        std = _winner_statistics(grids, winner, "std")
        if rule.strategy == "std":
            kept = kept & (std <= rule.max_std)
    label = torch.where(kept, value, withheld)
    return MonteCarloLabels(label, argmax, confidence, lowest, std, min_prob if statistics else None)


@torch.no_grad()
def mean_probabilities(
    network: Segmenter,
    views: Sequence[View],
    masks: Sequence[HeadMasks] | None,
    size: tuple[int, int],
    offset: Tensor | None = None,
) -> Tensor:
    """Fused prediction m = mean over passes and views of Up(softmax(z_F)) (methods 3.2 and 3.4).

    Args:
        network: the network whose classifiers are used.
        views: trunk outputs of every view.
        masks: as many as views, or None for a single pass without dropout.
        size: output (height, width).
        offset: see :func:`monte_carlo_labels`.

    Returns:
        float32 (N, C, *size); sums to one over classes.

    Raises:
        ValueError: if views and masks do not belong together, or there is no view.
    """
    grids = _pass_probabilities(network, views, masks, offset=offset)
    return _total([upsample(grid.mean(dim=1), size) for grid in grids])


@torch.no_grad()
def negative_labels(
    network: Segmenter,
    views: Sequence[View],
    masks: Sequence[HeadMasks] | None,
    size: tuple[int, int],
    *,
    temperature: float = 2.0,
    max_probability: float = 0.05,
    max_std: float = 0.005,
    offset: Tensor | None = None,
) -> Tensor:
    """Classes that a pixel surely is *not*: its complementary labels (methods 4.1; UPS, Rizve et al., ICLR 2021).

    With q_t the fused probabilities of pass t, logits divided by the temperature: class c is negative where its mean
    over the passes is at most ``max_probability`` and its population standard deviation below ``max_std``.

    Args:
        network, views, masks: as for :func:`mean_probabilities`.
        size: output (height, width).
        temperature: softens the softmax, so that it does not call everything impossible.
        max_probability, max_std: on the 0..1 scale (published: 0.2 and 0.02 of 4 views).
        offset: see :func:`monte_carlo_labels`; added before the temperature divides.

    Returns:
        bool (N, C, *size).

    Raises:
        ValueError: if views and masks do not belong together, or there is no view.
    """
    grids = _pass_probabilities(network, views, masks, temperature, offset)
    found = []
    for image in range(grids[0].shape[0]):
        mean = spread = None
        for t in range(grids[0].shape[1]):
            q = _total([upsample(grid[image, t : t + 1], size) for grid in grids])[0]
            if mean is None or spread is None:
                mean, spread = q, torch.zeros_like(q)
                continue
            off = q - mean  # Welford: the variance is far smaller than the square of the mean
            mean = mean + off / (t + 1)
            spread = spread + off * (q - mean)
        assert mean is not None
        assert spread is not None
        found.append((mean <= max_probability) & ((spread / grids[0].shape[1]).sqrt() < max_std))
    return torch.stack(found)


def trunk_views(network: Segmenter, batches: Sequence[Tensor], *, mirror: bool = True) -> list[View]:
    """Runs the trunk once per view, plain and (optionally) mirrored.

    Args:
        network: in evaluation mode, or its batch norms would read and write batch statistics.
        batches: the same images at every view size, each (N, 3, H, W).
        mirror: whether to add each batch's mirror image.

    Returns:
        One or two views per batch.

    Raises:
        ValueError: if the network is in training mode.
    """
    if network.training:
        raise ValueError("the network is in training mode; call eval() before labelling with it")
    views: list[View] = []
    with torch.no_grad():
        for images in batches:
            views.append(View(network.trunk(images)))
            if mirror:
                views.append(View(network.trunk(images.flip(-1)), mirrored=True))
    return views


def _check(network: Segmenter, views: Sequence[View], masks: Sequence[HeadMasks]) -> None:
    if not views or len(views) != len(masks):
        raise ValueError(f"{len(views)} views and {len(masks)} masks were given; there must be one mask per view")
    if not network.heads():
        raise ValueError("this network has no dropout before its classifiers, so it has no masks; leave them None")
    images, channels = views[0].features[-1].shape[:2]
    passes, heads = masks[0][-1].shape[0], len(network.heads())
    for view, mask in zip(views, masks, strict=True):
        if view.features[-1].shape[:2] != (images, channels):
            raise ValueError("the views do not show the same number of images with the same channels")
        wrong = [factors.shape for factors in mask if factors.shape != (passes, images, channels)]
        if len(mask) != heads or wrong:
            raise ValueError(
                f"masks have the shapes {[tuple(factors.shape) for factors in mask]}; {passes} passes over {images} "
                f"images with {channels} channels and {heads} heads need {(passes, images, channels)} for each head"
            )
    if channels != network.config.bottleneck_channels:
        raise ValueError(
            f"the features have {channels} channels, the network's classifiers read "
            f"{network.config.bottleneck_channels}"
        )


def _pass_probabilities(
    network: Segmenter,
    views: Sequence[View],
    masks: Sequence[HeadMasks] | None,
    temperature: float = 1.0,
    offset: Tensor | None = None,
) -> list[Tensor]:
    """Softmax of every pass at network resolution, views of one grid summed, divided by the view count.

    Args:
        network, views, masks: as for :func:`mean_probabilities`.
        temperature: divides the fused logits.
        offset: C, added to them before; None for none.

    Returns:
        One float (N, T, C, h, w) per distinct grid.
    """
    if masks is None:
        found = _plain_logits(network, views)
    else:
        _check(network, views, masks)
        found = _masked_logits(network, views, masks)
    sums: dict[tuple[int, int], Tensor] = {}
    for view, logits in zip(views, found, strict=True):
        if offset is not None:
            logits.add_(offset.view(-1, 1, 1))
        probabilities = logits.div_(temperature).softmax(dim=2)
        if view.mirrored:
            probabilities = probabilities.flip(-1)
        grid = probabilities.shape[-2], probabilities.shape[-1]
        known = sums.get(grid)
        sums[grid] = probabilities if known is None else known.add_(probabilities)
    return [total.div_(len(views)) for total in sums.values()]


def _plain_logits(network: Segmenter, views: Sequence[View]) -> Iterator[Tensor]:
    """Fused logits (N, 1, C, h, w) of every view, of one pass without dropout."""
    if not views:
        raise ValueError("no views were given; there must be at least one")
    if network.training:
        raise ValueError("the network is in training mode; call eval() before labelling with it")
    for view in views:
        yield network.classify(view.features).fused()[:, None].clone()


def _masked_logits(network: Segmenter, views: Sequence[View], masks: Sequence[HeadMasks]) -> Iterator[Tensor]:
    """Fused logits (N, T, C, h, w) of every view."""
    weights = [
        share * head.classifier.weight[:, :, 0, 0]
        for share, head in zip(network.head_weights(), network.heads(), strict=True)
    ]
    classes = weights[0].shape[0]
    for view, mask in zip(views, masks, strict=True):
        images, _, h, w = view.features[-1].shape
        logits: Tensor | None = None
        for weight, factors, part in zip(weights, mask, view.features, strict=True):
            # (N, T, 1, K) * (C, K): dropping an input channel is dropping a weight column.
            passes = (factors.transpose(0, 1)[:, :, None] * weight).flatten(1, 2)  # (N, T * C, K)
            cells = part.flatten(2).to(weight.dtype)
            logits = torch.bmm(passes, cells) if logits is None else torch.baddbmm(logits, passes, cells)
        assert logits is not None
        yield logits.view(images, -1, classes, h, w)


def _total(volumes: list[Tensor]) -> Tensor:
    """The sum of fresh tensors of one shape, in the place of the first."""
    first, *rest = volumes
    for volume in rest:
        first.add_(volume)
    return first


def _winners(grids: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Highest mean over passes and its class, float32 and int32 (N, H, W); one image's volume at a time."""
    found = []
    for image in range(grids[0].shape[0]):
        mean = _total([upsample(grid[image].mean(dim=0, keepdim=True), size) for grid in grids])[0]
        found.append(mean.max(dim=0))
    return torch.stack([f.values for f in found]), torch.stack([f.indices for f in found]).int()


def _winner_statistics(grids: list[Tensor], winner: Tensor, kind: Literal["min", "std"]) -> Tensor:
    """Minimum or deviation over passes of q_{t,k*}, float (N, H, W); reads only the winner's grid values.

    Every pixel is a weighted sum of four neighbours per grid of its winner's T values. With the grids laid
    out as one table of rows (class, cell) and T columns, that is a weighted bag of embeddings. Which neighbours
    a pixel has, and with which weights, is the same in all images.
    """
    height, width = winner.shape[-2:]
    tables = [torch.cat([grid[image].flatten(1).t() for grid in grids]) for image in range(len(winner))]
    axes = [(_taps(height, grid.shape[-2], grid.device), _taps(width, grid.shape[-1], grid.device)) for grid in grids]
    cells_of = [grid.shape[-2] * grid.shape[-1] for grid in grids]
    rows_of = [grid[0, 0].numel() for grid in grids]
    planes = torch.tensor(cells_of, dtype=torch.int32, device=winner.device).repeat_interleave(4)
    starts = torch.tensor([sum(rows_of[:i]) for i in range(len(grids))], dtype=torch.int32, device=winner.device)
    found = torch.empty(winner.shape, dtype=tables[0].dtype, device=winner.device)
    rows_at_once = max(1, PIXELS_AT_ONCE // width)
    for top in range(0, height, rows_at_once):
        band = slice(top, top + rows_at_once)
        # (pixels of the band, 4 per grid): the neighbours' cells, in the first class's plane, and their weights.
        cells = torch.cat(
            [
                start + _outer(ys[0][band] * grid.shape[-1], xs[0], torch.add)
                for start, grid, (ys, xs) in zip(starts, grids, axes, strict=True)
            ],
            dim=1,
        )
        weights = torch.cat([_outer(ys[1][band], xs[1], torch.mul) for ys, xs in axes], dim=1)
        for image, table in enumerate(tables):
            rows = torch.addcmul(cells, winner[image, band].reshape(-1, 1), planes)
            values = F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
            if kind == "min":
                part = values.amin(dim=1)
            else:  # torch.std takes ten times as long over so short an axis
                part = (values - values.mean(dim=1, keepdim=True)).square_().mean(dim=1).sqrt_()
            found[image, band] = part.view(-1, width)
    return found


def _outer(ys: Tensor, xs: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every pixel's two row taps joined with its two column taps, (H * W, 4) from (H, 2) and (W, 2)."""
    return join(ys[:, None, :, None], xs[None, :, None, :]).reshape(-1, 4)


def _taps(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two cells each pixel of an axis reads and their weights, (pixels, 2) each, corners aligned."""
    scale = (cells - 1) / (pixels - 1) if pixels > 1 else 0.0
    position = torch.arange(pixels, device=device, dtype=torch.float64) * scale
    low = position.floor().clamp(max=cells - 1)
    share = (position - low).float()
    first = low.int()
    second = (first + 1).clamp(max=cells - 1)
    return torch.stack([first, second], dim=1), torch.stack([1.0 - share, share], dim=1)


def _lowest_volume(grids: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """max_c min_t q_{t,c}, float (N, H, W), and its class, uint8; one upsampled volume per image and pass."""
    found = []
    for image in range(grids[0].shape[0]):
        lowest: Tensor | None = None
        for t in range(grids[0].shape[1]):
            q = _total([upsample(grid[image, t : t + 1], size) for grid in grids])[0]
            lowest = q if lowest is None else torch.minimum(lowest, q, out=lowest)
        assert lowest is not None
        found.append(lowest.max(dim=0))
    return torch.stack([f.values for f in found]), torch.stack([f.indices for f in found]).to(torch.uint8)
