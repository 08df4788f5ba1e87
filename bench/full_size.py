"""One training step of the published network at the published sizes, and bfloat16 against float32.

    python -m bench.full_size                  CPU: batch 1
    python -m bench.full_size --batch 2 9      batches of stage I and stage II

A stage-I step is source and target through network and discriminators, both backward passes and both optimisers; a
stage-II step is the published rectified one. Random weights and images: neither time nor memory depends on them. How
far bfloat16 is off does: weights that have seen a few steps of noise make a chaotic network (0.16 here), fresh ones do
not, and trained ones cannot be had here.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.protocols import Batch, ObjectiveContext, StagePlan, StepInfo, Stream, View
from models.networks.build import Build
from models.networks.segmenter import Segmenter
from models.schedule import set_rate
from pipelines.benchmarks import benchmark
from pipelines.recipes import recipe
from pipelines.recipes.recipe import Ingredients, Preset, preset
from pipelines.recipes.rectified import RectifiedOptions


def stages(size: Preset) -> tuple[StagePlan, ...]:
    """Both stages of MRNet as published; nothing is read."""

    def nothing(_: Any, __: View) -> Stream:
        return None  # type: ignore[return-value]

    pair = benchmark("gta2city")
    given = Ingredients(size, 19, 0, pair.bonnet, pair.sure, True, "once", nothing, nothing, nothing, None)
    return recipe("rectified").stages(given, RectifiedOptions())


def batch_of(crop: tuple[int, int], images: int, device: torch.device, *, source: bool) -> Batch:
    """Random pictures and coarse random labels."""
    rng = np.random.default_rng(0)

    def pictures() -> Tensor:
        return torch.from_numpy(rng.normal(0, 60, (images, 3, crop[1], crop[0])).astype(np.float32)).to(device)

    def labels() -> Tensor:
        coarse = rng.choice([*range(19), 255], (images, crop[1] // 16, crop[0] // 16))
        return torch.from_numpy(coarse.repeat(16, 1).repeat(16, 2)).to(device)

    images_of_source, labels_of_source = (pictures(), labels()) if source else (None, None)
    return Batch(images_of_source, labels_of_source, pictures(), labels(), torch.ones(images, device=device))


def step(stage: StagePlan, network: Segmenter, batch: Batch, device: torch.device, *, bfloat16: bool) -> float:
    """Seconds of the second of two steps: the first one also allocates."""
    objective = stage.objective(ObjectiveContext(device, lambda value: value, lambda parameters: None))
    optimiser = stage.optimiser(network)
    network.train()
    seconds = 0.0
    for number in range(2):
        _wait(device)
        began = time.perf_counter()
        set_rate(optimiser, 1e-6)
        info = StepInfo(number, stage.steps, number)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            terms = objective.losses(network, batch, info)
        optimiser.zero_grad(set_to_none=True)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        optimiser.step()
        objective.learn(info)
        _wait(device)
        seconds = time.perf_counter() - began
    return seconds


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the device, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def bfloat16_error(network: Segmenter, images: Tensor) -> float:
    """Relative L2 distance of the fused logits under bfloat16 autocast from those in float32."""
    network.eval()
    exact = network(images).fused().double()
    with torch.autocast(images.device.type, torch.bfloat16):
        rough = network(images).fused().double()
    return float((rough - exact).norm() / exact.norm())


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs=2, default=(1, 1), help="images of each domain in stage I and II")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast, too")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device, size = torch.device(given.device), preset("full", benchmark("gta2city"))
    torch.manual_seed(0)
    network = Build(size.network)().to(device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    found: dict[str, Any] = {"parameters": parameters, "device": given.device, "threads": torch.get_num_threads()}
    picture = batch_of(size.stages[0].crop, 1, device, source=False).target
    assert picture is not None
    found["bfloat16_error"] = bfloat16_error(network, picture)
    print(f"fused logits of fresh weights in bfloat16: relative L2 distance {found['bfloat16_error']:.4f}")
    for number, (stage, images) in enumerate(zip(stages(size), given.batch, strict=True)):
        crop = size.stages[number].crop
        for bfloat16 in (False, True) if given.bfloat16 else (False,):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            batch = batch_of(crop, images, device, source=number == 0)
            seconds = step(stage, network, batch, device, bfloat16=bfloat16)
            line = {"crop": crop, "batch": images, "seconds": seconds, "peak_bytes": peak_bytes(device)}
            found[f"{stage.name}, {'bfloat16' if bfloat16 else 'float32'}"] = line
            print(f"{stage.name}: {images} of {crop[0]}×{crop[1]}: {seconds:.1f} s, {line['peak_bytes'] / 1e9:.1f} GB")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
