"""Measure a miniature's domain gap: source-only, AdaBN and oracle at equal steps, no method, no Ray.

    python -m bench.gap --benchmark synthia2city --seeds 0 1 2 --out gap.json

The miniature is calibrated on these three figures alone: the oracle must lead source-only by at least 12
mIoU points, and source-only with normalisation statistics re-estimated on target images (AdaBN) may close
at most 40 % of that.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.deeplab import DeepLab, DeepLabConfig, Logits
from pipelines.benchmarks import BENCHMARKS, Published, benchmark
from pipelines.datasets import IGNORE, Split
from pipelines.datasets.miniature import MINIATURE_VERSION

# BGR order, as in the published MRNet; the deviation is for a network that starts from random weights.
MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
DEVIATION = 58.0
AUX_WEIGHT = 0.5
BASE_SIZES = {
    "gta2city": ((320, 180), (320, 160)),
    "synthia2city": ((320, 180), (320, 160)),
    "city2robot": ((320, 160), (256, 192)),
    "shift_only": ((320, 160), (320, 160)),
}
"""Benchmark → (source, target) size that samples are resized to before the crop: published ones / 4."""


@dataclass(frozen=True)
class Schedule:
    """What source-only and oracle share."""

    steps: int = 1000
    batch: int = 4
    crop: tuple[int, int] = (256, 128)
    lr: float = 0.2
    warmup: int = 50
    momentum: float = 0.9
    decay: float = 5e-4
    power: float = 0.9
    jitter: tuple[float, float] = (0.8, 1.2)


@dataclass(frozen=True)
class Loaded:
    """A split in memory: images (N, 3, H, W) uint8 BGR and labels (N, H, W) uint8."""

    images: Tensor
    labels: Tensor


def load(split: Split, size: tuple[int, int], label_size: tuple[int, int] | None) -> Loaded:
    """Read a labelled split whole; labels keep their own size where `label_size` is None."""
    images = np.stack([split.image(i, size)[:, :, ::-1] for i in range(len(split))])
    labels = np.stack([split.label(i, label_size) for i in range(len(split))])
    return Loaded(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def normalise(images: Tensor) -> Tensor:
    """uint8 BGR to what the network reads."""
    mean = torch.tensor(MEAN_BGR).view(1, 3, 1, 1)
    return (images.float() - mean) / DEVIATION


def batches(data: Loaded, schedule: Schedule, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random scale, crop and mirror image, in an order that is a function of the seed."""
    rng = np.random.default_rng([seed, 17])
    count = data.images.shape[0]
    order = np.concatenate([rng.permutation(count) for _ in range(schedule.steps * schedule.batch // count + 1)])
    width, height = schedule.crop
    for step in range(schedule.steps):
        images, labels = [], []
        for index in order[step * schedule.batch : (step + 1) * schedule.batch]:
            scale = rng.uniform(*schedule.jitter)
            image, label = data.images[index], data.labels[index]
            size = (max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale)))
            top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
            image = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
            label = F.interpolate(label[None, None].float(), size, mode="nearest")[0, 0]
            image = image[:, top : top + height, left : left + width]
            label = label[top : top + height, left : left + width]
            if rng.random() < 0.5:
                image, label = image.flip(-1), label.flip(-1)
            images.append(image)
            labels.append(label.long())
        yield normalise(torch.stack(images)), torch.stack(labels)


def train(data: Loaded, classes: int, schedule: Schedule, seed: int) -> DeepLab:
    """Supervised training from random weights; the last step counts."""
    torch.manual_seed(seed)
    network = DeepLab(DeepLabConfig.small(classes)).train()
    optimiser = torch.optim.SGD(
        network.parameters(), schedule.lr, schedule.momentum, weight_decay=schedule.decay, nesterov=True
    )
    started, total = time.perf_counter(), 0.0
    for step, (images, labels) in enumerate(batches(data, schedule, seed)):
        rate = schedule.lr * (1 - step / schedule.steps) ** schedule.power
        if step < schedule.warmup:
            rate *= 0.1 + 0.9 * step / schedule.warmup
        for group in optimiser.param_groups:
            group["lr"] = rate
        logits = network(images)
        loss = torch.stack(
            [
                weight * F.cross_entropy(_upsample(z, labels.shape[-2:]), labels, ignore_index=IGNORE)
                for weight, z in ((AUX_WEIGHT, logits.aux), (1.0, logits.main))
            ]
        ).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            pace = (time.perf_counter() - started) / (step + 1)
            print(f"  step {step + 1}/{schedule.steps}  loss {total / 100:.3f}  {pace:.3f} s/step", flush=True)
            total = 0.0
    return network.eval()


def adabn(network: DeepLab, data: Loaded, batch: int) -> DeepLab:
    """The same weights with batch-norm statistics re-estimated on all target training images."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for images in data.images.split(batch):
            network(normalise(images))
    return network.eval()


def class_ious(network: DeepLab, data: Loaded, classes: int) -> list[float]:
    """IoU of every class over the set: single view, fused logits, label size; NaN where a class is absent."""
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    with torch.no_grad():
        for images, labels in zip(data.images.split(8), data.labels.split(8), strict=True):
            logits: Logits = network(normalise(images))
            fused = _upsample(AUX_WEIGHT * logits.aux + logits.main, labels.shape[-2:])
            known = labels != IGNORE
            pairs = labels[known].long() * classes + fused.argmax(1)[known]
            matrix += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    hits = matrix.diagonal().double()
    return (hits / (matrix.sum(0) + matrix.sum(1) - hits)).tolist()


def _upsample(logits: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=True)


def score(bench: Published, ious: list[float]) -> dict[str, Any]:
    """MIoU (percent) over each protocol, and the IoU of each class of the primary one."""
    means = {name: 100 * float(np.mean([ious[c] for c in chosen])) for name, chosen in bench.protocols.items()}
    primary = bench.protocols[bench.primary_protocol]
    return {
        "miou": round(means[bench.primary_protocol], 2),
        "protocols": {name: round(value, 2) for name, value in means.items()},
        "per_class": {bench.classes.names[c]: round(100 * ious[c], 1) for c in primary},
    }


def measure(bench: Published, folder: Path, size: str, schedule: Schedule, seed: int, fit: bool) -> dict[str, Any]:
    """The three figures for one seed of the networks (the pictures' seed is always 0)."""
    domains = bench.miniature(size, folder)
    if domains.target_labelled is None:
        raise AssertionError("a miniature always has target labels")
    source_size, target_size = BASE_SIZES[bench.name]
    source = load(domains.source, source_size, source_size)
    target = load(domains.target_labelled, target_size, target_size)
    assert domains.validation is not None
    validation = load(domains.validation, target_size, None)
    classes, seconds = len(bench.classes), time.perf_counter()
    print(f"{bench.name} seed {seed}: source-only", flush=True)
    source_only = train(source, classes, schedule, seed)
    result: dict[str, Any] = {"seed": seed}
    result["source_only"] = score(bench, class_ious(source_only, validation, classes))
    if fit:
        result["source_on_source"] = score(bench, class_ious(source_only, source, classes))
    result["adabn"] = score(bench, class_ious(adabn(source_only, target, schedule.batch), validation, classes))
    print(f"{bench.name} seed {seed}: oracle", flush=True)
    oracle = train(target, classes, schedule, seed)
    result["oracle"] = score(bench, class_ious(oracle, validation, classes))
    gap = result["oracle"]["miou"] - result["source_only"]["miou"]
    result["gap"] = round(gap, 2)
    result["adabn_closes"] = round((result["adabn"]["miou"] - result["source_only"]["miou"]) / gap, 3)
    result["seconds"] = round(time.perf_counter() - seconds, 1)
    return result


def main() -> None:
    """Measure, print one line per seed, and write JSON."""
    parser = argparse.ArgumentParser(description="Measure the domain gap of a miniature without any method.")
    parser.add_argument("--benchmark", choices=sorted(BENCHMARKS), default="synthia2city")
    parser.add_argument("--size", default="mini", help="size of the miniature")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of network and sample order")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="steps of source-only and of oracle")
    parser.add_argument("--lr", type=float, default=Schedule.lr)
    parser.add_argument("--folder", type=Path, default=Path("data/miniature"), help="where miniatures are kept")
    parser.add_argument("--fit", action="store_true", help="also score source-only on its own training pictures")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench, schedule = benchmark(args.benchmark), Schedule(steps=args.steps, lr=args.lr)
    runs = []
    for seed in args.seeds:
        run = measure(bench, args.folder, args.size, schedule, seed, args.fit)
        runs.append(run)
        for name in ("source_only", "adabn", "oracle", "source_on_source"):
            if name in run:
                classes = " ".join(f"{c} {v:.0f}" for c, v in run[name]["per_class"].items())
                print(f"{name:17s} {run[name]['miou']:5.2f}  {classes}")
        print(f"gap {run['gap']}  AdaBN closes {run['adabn_closes']:.0%}  {run['seconds']} s", flush=True)
    if args.out:
        report = {
            "benchmark": bench.name,
            "miniature": {"size": args.size, "version": MINIATURE_VERSION, "seed": 0},
            "schedule": schedule.__dict__,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
