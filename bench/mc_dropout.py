"""What T Monte-Carlo passes cost compared with one: trunk, passes, statistics and selection together.

    python bench/mc_dropout.py                     the published network, one image, four views
    python bench/mc_dropout.py --network small     the small member

Every case runs once per round, in turn, so that a busy machine slows all of them alike. The baseline of
every ratio is one pass with the mean rule, trunk included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from models.networks.deeplab import DeepLab, DeepLabConfig
from models.uncertainty import (
    STRATEGIES,
    Strategy,
    UncertaintyRule,
    View,
    draw_masks,
    monte_carlo_labels,
    trunk_views,
)

LIMITS = {"mean": 1.1, "min": 1.4, "std": 1.4}


def main() -> None:
    """Measures, prints a table and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--network", choices=("r101", "small"), default="r101", help="which network to label with")
    parser.add_argument("--passes", type=int, default=10, help="Monte-Carlo passes T")
    parser.add_argument("--rounds", type=int, default=5, help="times every case is measured")
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 256), help="label and first view, width height")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here as well")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = DeepLabConfig() if options.network == "r101" else DeepLabConfig.small()
    device = torch.device(options.device)
    network = DeepLab(config).eval().to(device)
    width, height = options.size
    batches = [
        torch.randn(options.images, 3, h, w, device=device)
        for w, h in ((width, height), (width * 5 // 4, height * 5 // 4))
    ]
    cases: list[tuple[Strategy, int]] = [("mean", 1), *((rule, options.passes) for rule in STRATEGIES)]

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(strategy: Strategy, passes: int) -> tuple[float, float]:
        start = clock()
        views: list[View] = trunk_views(network, batches)
        middle = clock()
        generators = [torch.Generator().manual_seed(n) for n in range(options.images)]
        masks = draw_masks(
            generators,
            views=len(views),
            passes=passes,
            channels=config.bottleneck_channels,
            device=device,
        )
        monte_carlo_labels(network, views, masks, (height, width), rules[strategy])
        return middle - start, clock() - middle

    rules = {strategy: UncertaintyRule(strategy) for strategy in STRATEGIES}
    measure("std", options.passes)  # warm-up
    trunk: dict[tuple[Strategy, int], list[float]] = {case: [] for case in cases}
    rest: dict[tuple[Strategy, int], list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            before, behind = measure(*case)
            trunk[case].append(before)
            rest[case].append(behind)

    whole = {case: statistics.median(a + b for a, b in zip(trunk[case], rest[case], strict=True)) for case in cases}
    baseline = whole["mean", 1]
    common = statistics.median(second for case in cases for second in trunk[case])
    behind_baseline = statistics.median(rest["mean", 1])
    rows = []
    print(
        f"{options.network}, {options.images} image(s), views {width}x{height} and "
        f"{width * 5 // 4}x{height * 5 // 4} plain and mirrored, {options.threads} thread(s), {device.type}; "
        f"trunk {common * 1e3:.0f} ms"
    )
    print(f"{'rule':>5} {'T':>3} {'behind trunk':>13} {'whole':>10} {'ratio':>7} {'same trunk':>11} limit")
    for strategy, passes in cases:
        behind = statistics.median(rest[strategy, passes])
        row = {
            "rule": strategy,
            "passes": passes,
            "behind_trunk_ms": behind * 1e3,
            "whole_ms": whole[strategy, passes] * 1e3,
            "ratio": whole[strategy, passes] / baseline,
            "ratio_same_trunk": (common + behind) / (common + behind_baseline),
            "limit": LIMITS[strategy] if passes > 1 else None,
        }
        rows.append(row)
        limit = f"{LIMITS[strategy]:.1f}" if passes > 1 else ""
        print(
            f"{strategy:>5} {passes:>3} {behind * 1e3:>10.1f} ms {whole[strategy, passes] * 1e3:>7.0f} ms "
            f"{row['ratio']:>7.3f} {row['ratio_same_trunk']:>11.3f} {limit:>5}"
        )
    if options.json is not None:
        record = {
            "network": options.network,
            "images": options.images,
            "label_size": [width, height],
            "threads": options.threads,
            "device": device.type,
            "rounds": options.rounds,
            "torch": torch.__version__,
            "trunk_ms": common * 1e3,
            "cases": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
