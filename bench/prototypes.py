"""Distances to the prototypes: the batched expression against the published loop over classes, value and gradient.

    python -m bench.prototypes --out docs/results/prototypes.json
    python -m bench.prototypes --threads 1 --device cuda --out gpu.json

Features are those of two target images as ProDA's averaged network sees them, 2×256×129×257, against 19 prototypes.
Both ways take turns in one process and must agree. The peak of each is measured in a fresh process: what the memory in
use grows by while value and gradient are computed, features, prototypes and incoming gradient not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.prototypes import prototype_distances

ROOT = Path(__file__).parent.parent
IMAGES, CHANNELS, HEIGHT, WIDTH, CLASSES = 2, 256, 129, 257, 19
LEAST_SAME = 1e-4
"""The two ways take their sums in another order."""


def loop(features: Tensor, prototypes: Tensor) -> Tensor:
    """The published way (ProDA's feat_prototype_distance): every class by itself, written into the result."""
    images, _, height, width = features.shape
    distances = -torch.ones(images, len(prototypes), height, width, device=features.device)
    for k, prototype in enumerate(prototypes):
        spread = prototype.reshape(-1, 1, 1).expand(-1, height, width)
        distances[:, k] = torch.norm(spread - features, 2, dim=1)
    return distances


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"loop": loop, "batched": prototype_distances}


def drawn(device: torch.device, height: int = HEIGHT, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Features, prototypes and the gradient that arrives at the distances."""
    torch.manual_seed(0)
    features = torch.randn(IMAGES, CHANNELS, height, width, device=device).requires_grad_()
    prototypes = torch.randn(CLASSES, CHANNELS, device=device)
    return features, prototypes, torch.randn(IMAGES, CLASSES, height, width, device=device)


def work(way: str, features: Tensor, prototypes: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Distances, and the gradient with respect to the features."""
    distances = WAYS[way](features, prototypes)
    (gradient,) = torch.autograd.grad(distances, features, upstream)
    return distances.detach(), gradient


def peak(way: str, device: torch.device) -> float:
    """MB that the memory in use grows by; in a process that has done nothing else."""
    work(way, *drawn(device, 8, 8))  # libraries and threads are there before the level is read
    given = drawn(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(way, *given)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(way, *given)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def peaks(device: str, threads: int) -> dict[str, float]:
    """The peak of every way, each in a fresh process.

    To be called while this process is still small: a new one's ru_maxrss starts at the level of the one that made it.
    """
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "bench.prototypes", "--peak", way]
        command += ["--device", device, "--threads", str(threads)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = float(done.stdout)
    return found


def seconds(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way, in turns.

    Raises:
        SystemExit: if the two do not give the same, so that their times cannot be compared.
    """
    given = drawn(device)
    one, other = (work(way, *given) for way in WAYS)
    apart = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    del one, other
    if not apart < LEAST_SAME:
        raise SystemExit(f"the two ways differ by {apart:g}, so their times cannot be compared")
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            began = _clock(device)
            work(way, *given)
            spent[way].append(_clock(device) - began)
    return spent


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "prototypes.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--peak", choices=tuple(WAYS), help="print one way's peak in MB and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    if given.peak:
        print(peak(given.peak, device))
        return
    megabytes = peaks(given.device, given.threads)
    spent = seconds(device, given.rounds)
    ratios = [slow / fast for slow, fast in zip(spent["loop"], spent["batched"], strict=True)]
    medians = {way: statistics.median(values) for way, values in spent.items()}
    found = {
        "features": [IMAGES, CHANNELS, HEIGHT, WIDTH],
        "classes": CLASSES,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": given.rounds,
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_mb": megabytes,
    }
    print(
        f"{IMAGES}×{CHANNELS}×{HEIGHT}×{WIDTH}, {CLASSES} classes, {found['device']}, {found['threads']} thread(s): "
        f"loop {medians['loop']:.3f} s and {megabytes['loop']:.0f} MB, batched {medians['batched']:.4f} s and "
        f"{megabytes['batched']:.0f} MB; {found['ratio']:.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
    )
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
