"""ProDA's denoising step with the forward pass of the average in it, as published, and without, at the teachers.

    python -m bench.denoising                          the demo's network and sizes
    python -m bench.denoising --preset full --batch 1  ResNet-101, crops of 896×512, whole images of 2048×1024

Both arrangements step in turns in one process, on the same weights and pictures: random ones, on which time does not
depend. A step is everything that the student does: the losses, backward, optimiser, prototypes, average. What the other
side pays, the time to label one image, is measured, too: soft labels alone, and labels denoised.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.protocols import Batch, Objective, ObjectiveContext, StagePlan, StepInfo, Stream, View
from models.networks.build import Build
from models.networks.proda import Proda
from models.networks.statistics import ema_update
from models.schedule import set_rate
from pipelines.benchmarks import benchmark
from pipelines.recipes import recipe
from pipelines.recipes.proda import ProdaOptions
from pipelines.recipes.recipe import Ingredients, Preset, preset

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/denoising.json"
ARRANGEMENTS = ("student", "teacher")
CLASSES = 19


class NoImages:
    """A reader that nobody asks: the prototypes are set by hand."""

    image_ids = ("none",)

    def __len__(self) -> int:
        return 1

    def read(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Never called."""
        raise NotImplementedError


def denoising_stage(size: Preset, who: str) -> StagePlan:
    """Stage 1 of the paper, denoised by ``student`` or ``teacher``; nothing is read."""

    def nothing(_: Any, __: View) -> Stream:
        return None  # type: ignore[return-value]

    pair = benchmark("gta2city")
    refresh: Literal["once", "continuous"] = "once" if who == "student" else "continuous"
    given = Ingredients(size, CLASSES, 0, pair.bonnet, pair.sure, False, refresh, nothing, nothing, nothing, None)
    given = replace(given, reader=NoImages(), published_term=recipe("proda").published_term)
    options = ProdaOptions(denoise=who)  # type: ignore[arg-type]
    return recipe("proda").stages(given, options)[1]


def batch_of(stage: StagePlan, size: Preset, images: int, device: torch.device) -> Batch:
    """Random pictures, coarse random labels and random records."""
    rng, schedule = np.random.default_rng(0), size.stages[1]
    (width, height), (crop_width, crop_height) = schedule.target_size, schedule.crop
    assert stage.labels is not None

    def upload(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def pictures() -> Tensor:
        return upload(rng.random((images, 3, crop_height, crop_width), np.float32))

    def labels() -> Tensor:
        coarse = rng.choice([*range(CLASSES), 255], (images, -(-crop_height // 16), -(-crop_width // 16)))
        return upload(np.ascontiguousarray(coarse.repeat(16, 1).repeat(16, 2)[:, :crop_height, :crop_width]))

    shapes = dict(stage.labels.rule.layout.columns)
    records = {name: upload(_record(rng, (images, *shapes[name]), name)) for name in stage.labels.raw_columns}
    return Batch(
        pictures(),
        labels(),
        pictures(),
        labels(),
        torch.ones(images, device=device),
        records=records,
        whole=upload(rng.integers(0, 256, (images, height, width, 3), np.uint8)),
        positions={"target": np.arange(images), "source": np.arange(images)},
    )


def _record(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    if name == "means":
        return rng.random((*shape[:-1], shape[-1] // 4), np.float32).view(np.uint8)
    return rng.integers(0, 256, shape, np.uint8)


class Arrangement:
    """One way to do the step, with weights of its own."""

    def __init__(self, size: Preset, who: str, network: Proda, images: int, device: torch.device) -> None:
        self.stage, self.device, self.number = denoising_stage(size, who), device, 0
        self.network, self.average = copy.deepcopy(network), copy.deepcopy(network).eval().requires_grad_(False)
        self.state = dict(self.average.state_dict())
        self.batch = batch_of(self.stage, size, images, device)
        context = ObjectiveContext(
            device,
            lambda value: value,
            lambda parameters: None,
            network=self.network,
            teaching=self.average,
            fresh=False,
        )
        self.objective: Objective = self.stage.objective(context)
        self.optimiser = self.stage.optimiser(self.network)

    def step(self) -> float:
        """Seconds of one step."""
        _wait(self.device)
        began = time.perf_counter()
        self.network.train()
        set_rate(self.optimiser, 1e-6)
        info = StepInfo(self.number, self.stage.steps, self.number)
        terms = self.objective.losses(self.network, self.batch, info)
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        if self.stage.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.stage.clip_norm)
        self.optimiser.step()
        self.objective.learn(info)
        ema_update(self.state, self.network, 0.999, buffers="copy")
        self.number += 1
        _wait(self.device)
        return time.perf_counter() - began

    def label(self) -> float:
        """Seconds to label one image."""
        assert self.stage.labels is not None
        assert self.batch.whole is not None
        began = time.perf_counter()
        self.stage.labels.rule.label(self.average, [self.batch.whole[:1]], [0])  # ends on the host
        return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, images: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of both arrangements and the ratio of every round, which is two steps next to each other."""
    pair = benchmark("gta2city")
    size = recipe("proda").fitted(preset(name, pair), pair)
    torch.manual_seed(0)
    network = Build(size.network)().to(device)
    assert isinstance(network, Proda)
    torch.nn.init.normal_(network.prototypes)
    both = {who: Arrangement(size, who, network, images, device) for who in ARRANGEMENTS}
    steps: dict[str, list[float]] = {who: [] for who in ARRANGEMENTS}
    labels: dict[str, list[float]] = {who: [] for who in ARRANGEMENTS}
    for number in range(rounds + 1):
        for who, arrangement in both.items():
            seconds, labelled = arrangement.step(), arrangement.label()
            if number:  # the first one also allocates
                steps[who].append(seconds)
                labels[who].append(labelled)
    ratios = [teacher / student for student, teacher in zip(steps["student"], steps["teacher"], strict=True)]
    return {
        "preset": name,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "crop": size.stages[1].crop,
        "whole": size.stages[1].target_size,
        "batch": images,
        "rounds": rounds,
        "step_seconds": {who: statistics.median(values) for who, values in steps.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "label_seconds": {who: statistics.median(values) for who, values in labels.items()},
    }


def main() -> None:
    """Measure, print, and keep the result beside those of other presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", choices=("full", "mini"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.preset, given.batch, given.rounds, torch.device(given.device))
    step, label = found["step_seconds"], found["label_seconds"]
    print(
        f"{given.preset}, batch {given.batch}, {found['device']}: a step of {step['student']:.3f} s with the average's "
        f"forward pass, {step['teacher']:.3f} s without: ratio {found['ratio']:.2f} "
        f"({found['ratio_range'][0]:.2f} to {found['ratio_range'][1]:.2f}); "
        f"a soft label {label['student']:.3f} s, a denoised one {label['teacher']:.3f} s"
    )
    known = json.loads(given.json.read_text()) if given.json.is_file() else {}
    known[f"{given.preset}, batch {given.batch}, {found['device']}"] = found
    given.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
