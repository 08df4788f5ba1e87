"""Labelling against the straightforward way: T full passes over four views, and the rule pixel by pixel in Python.

    python -m bench.labelling_speed                     the small network at the demo's sizes, four images
    python -m bench.labelling_speed --sizes scaled      the same views; labels twice the size of the first, as published
    python -m bench.labelling_speed --sizes published   the published network, views and label size, one image

Both ways use the same network, images and dropout masks, take turns in one run, and must give the same labels. The
straightforward way is that of the published EPLC generator: in batches of four, as ours, every pass runs the network on
every view, every pass's probabilities are kept at label size, and the rule looks at one pixel after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.networks.deeplab import DeepLab, DeepLabConfig, HeadFeatures
from models.networks.segmenter import upsample
from models.uncertainty import HeadMasks, UncertaintyRule, draw_masks, monte_carlo_labels, trunk_views

RULE = UncertaintyRule("min", min_confidence=0.5)
SIZES = {
    "demo": ((240, 120), (192, 96), (240, 120)),
    "scaled": ((384, 192), (192, 96), (240, 120)),
    "published": ((2048, 1024), (1024, 512), (1280, 640)),
}
"""Label, first and second view, (width, height)."""
LEAST_SAME = 0.9999
"""Sums are taken in another order, and a pixel may lie on a threshold."""


@torch.no_grad()
def straightforward(
    network: DeepLab, batches: list[Tensor], masks: list[HeadMasks], size: tuple[int, int]
) -> np.ndarray:
    """Labels of all images, uint8 N×H×W."""
    volumes = []
    for t in range(masks[0][1].shape[0]):
        total = torch.zeros(1)
        seen = [(images, mirrored) for images in batches for mirrored in (False, True)]
        for (images, mirrored), mask in zip(seen, masks, strict=True):
            features = network.trunk(images.flip(-1) if mirrored else images)
            dropped = HeadFeatures(
                *(part * factors[t, :, :, None, None] for part, factors in zip(features, mask, strict=True))
            )
            p = upsample(network.classify(dropped).fused().softmax(dim=1), size)
            total = total + (p.flip(-1) if mirrored else p)
        volumes.append((total / len(seen)).numpy())
    return np.stack([_ruled(np.stack([volume[n] for volume in volumes])) for n in range(len(batches[0]))])


def _ruled(passes: np.ndarray) -> np.ndarray:
    """One image: probabilities T×C×H×W to its label."""
    mean, lowest = passes.mean(0), passes.min(0)
    label = np.zeros(mean.shape[1:], np.uint8)
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            winner = np.argmax(mean[:, y, x])
            label[y, x] = winner if lowest[winner, y, x] >= RULE.min_confidence else 255
    return label


def ours(network: DeepLab, batches: list[Tensor], masks: list[HeadMasks], size: tuple[int, int]) -> np.ndarray:
    """The same labels, as a teacher makes them."""
    return monte_carlo_labels(network, trunk_views(network, batches), masks, size, RULE).label.numpy()


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=tuple(SIZES), default="demo")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--images", type=int, default=None, help="in a batch; 4, or 1 of the published size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    published = given.sizes == "published"
    network = DeepLab(DeepLabConfig() if published else DeepLabConfig.small()).eval()
    for head in network.heads():
        torch.nn.init.normal_(head.classifier.weight, std=0.5)  # sure of some pixels, unsure of others
    (width, height), *views = SIZES[given.sizes]
    images = given.images or (1 if published else 4)
    batches = [torch.randn(images, 3, h, w) * 60 for w, h in views]
    generators = [torch.Generator().manual_seed(n) for n in range(images)]
    masks = draw_masks(generators, views=4, passes=given.passes, channels=network.config.bottleneck_channels)
    seconds: dict[str, list[float]] = {"straightforward": [], "ours": []}
    labels: dict[str, np.ndarray] = {}
    for _ in range(given.rounds):
        for name, way in (("straightforward", straightforward), ("ours", ours)):
            began = time.perf_counter()
            labels[name] = way(network, batches, masks, (height, width))
            seconds[name].append((time.perf_counter() - began) / images)
    ratios = [slow / fast for slow, fast in zip(seconds["straightforward"], seconds["ours"], strict=True)]
    same = float((labels["straightforward"] == labels["ours"]).mean())
    found = {
        "network": "resnet101" if published else "small",
        "label_size": [width, height],
        "passes": given.passes,
        "images": images,
        "threads": torch.get_num_threads(),
        "seconds_per_image": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "same_pixels": same,
        "kept": float((labels["ours"] != 255).mean()),
    }
    slow, fast = found["seconds_per_image"]["straightforward"], found["seconds_per_image"]["ours"]
    print(
        f"{found['network']}, {width}×{height}, T={given.passes}: straightforward {slow:.3f} s an image, ours "
        f"{fast:.4f} s; {found['ratio']:.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}); "
        f"{same:.4%} of the pixels the same, {found['kept']:.0%} kept"
    )
    if same < LEAST_SAME:
        raise SystemExit("the two ways do not give the same labels, so their times cannot be compared")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
