"""Images a second of a trained network as it is deployed, one image at a time, beside DeepLab as the recipes have it.

    python -m bench.inference                                          BiSeNet on a ResNet-18, 1024×512
    python -m bench.inference --out docs/results/inference.json        and keep the figures
    python -m bench.inference page                                     the table in docs/bisenet.md, from those figures
    python -m bench.inference --size 256 128 --rounds 2 --baseline-rounds 1     whether it works at all

Every way maps the same picture (RGB, 0 to 255) to class scores at its size, pixel normalisation and enlargement
included. On the CPU, with one and with two threads: eagerly as ``predict`` runs a network (maps lie channels last),
with the weights channels last as well, as a ``torch.export`` file and as an ONNX file in ONNX Runtime, both of one
size. All ways of all thread counts take turns, so that a busy machine slows them alike, and every ratio is of one
round, to the eager network on as many threads. More threads than idle cores measure the waiting for them. The baseline,
DeepLab on a ResNet-101, takes seconds an image and so fewer rounds; its ratios are to the eager network of the same
rounds. On a GPU, where there is one: float32, bfloat16 autocast and ``torch.compile``, at 1024×512 and 2048×1024.
Weights are fresh: what a convolution takes does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines import environment

environment.prepare()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.command_runs import ROOT  # noqa: E402
from bench.marked import write_between  # noqa: E402
from models.networks.build import PUBLISHED, Build  # noqa: E402
from models.networks.deployed import Deployed  # noqa: E402
from models.networks.segmenter import Segmenter  # noqa: E402
from pipelines.deployed import (  # noqa: E402
    ENDINGS,
    MOST_DIFFERENCE,
    NEEDED,
    Format,
    Run,
    check_needed,
    open_model,
    random_pictures,
    write_model,
)
from pipelines.results import versions  # noqa: E402
from pipelines.views import PIXELS  # noqa: E402

Size = tuple[int, int]
RESULTS, PAGE = ROOT / "docs/results/inference.json", ROOT / "docs/bisenet.md"
NETWORK, BASELINE = "bisenet18", "deeplab101"
EAGER = "eager"
GPU_SIZES: tuple[Size, ...] = ((1024, 512), (2048, 1024))
GPU_WARM_UP = 10
PAUSE = 0.3
"""Seconds before a turn on the CPU: ONNX Runtime's threads spin for a while after their work, on others' cores."""


@dataclass(frozen=True)
class Way:
    """A network run in some way."""

    network: str
    name: str
    threads: int | None
    """Of the CPU; None on a GPU."""
    run: Callable[[], Tensor]
    """One image to its class scores."""


def fresh(name: str) -> Segmenter:
    """A published network in eval mode, with weights of its own initialisation."""
    torch.manual_seed(0)
    return Build(PUBLISHED[name])().eval().requires_grad_(False)


def whole(network: Segmenter) -> Deployed:
    """From pixel values to class scores at their size."""
    pixels = PIXELS[network.config.pixels]
    return Deployed(network, pixels.mean, pixels.scale, bgr=pixels.bgr).eval()


def cpu_ways(name: str, size: Size, threads: list[int], folder: Path) -> list[Way]:
    """Every way to run a network on the CPU.

    Args:
        name: of the network.
        size: of the image.
        threads: thread counts.
        folder: for the files that are opened.
    """
    network, image = fresh(name), random_pictures(1, size)
    eager = whole(network)
    last = copy.deepcopy(eager)
    for parameter in last.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    files: dict[Format, Path] = {}
    for layout, ending in ENDINGS.items():
        check_needed(layout)
        files[layout] = folder / f"{name}{ending}"
        write_model(network, files[layout], layout, size, dynamic=False)
    found = []
    for count in threads:
        found += [
            Way(name, EAGER, count, lambda: eager(image)),
            Way(name, "eager, weights channels last", count, lambda: last(image)),
        ]
        for layout, shown in (("torch", "torch.export"), ("onnx", "ONNX Runtime")):
            found.append(Way(name, shown, count, partial(_run_file, open_model(files[layout], layout, count), image)))
    return found


def _run_file(opened: Run, image: Tensor) -> Tensor:
    return torch.from_numpy(opened(image.numpy()))


def eager_way(name: str, size: Size, threads: int) -> Way:
    """A network eagerly on the CPU."""
    network, image = whole(fresh(name)), random_pictures(1, size)
    return Way(name, EAGER, threads, lambda: network(image))


def gpu_ways(name: str, size: Size) -> list[Way]:
    """Every way to run a network on the GPU; compiled ones compile when they are first run."""
    device = torch.device("cuda")
    network, image = whole(fresh(name)).to(device), random_pictures(1, size).to(device)
    compiled: Callable[[Tensor], Tensor] = torch.compile(network)

    def bfloat16(run: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return run(image)

    return [
        Way(name, "float32", None, lambda: network(image)),
        Way(name, "bfloat16 autocast", None, lambda: bfloat16(network)),
        Way(name, "float32, torch.compile", None, lambda: compiled(image)),
        Way(name, "bfloat16 autocast, torch.compile", None, lambda: bfloat16(compiled)),
    ]


@torch.no_grad()
def differences(ways: list[Way]) -> list[float]:
    """Largest difference of each way's class scores from the first one's, of their range; warms every way up."""
    found: list[float] = []
    expected: Tensor | None = None
    for way in ways:
        _prepare(way)
        scores = way.run().float()
        expected = scores if expected is None else expected
        found.append(float((scores - expected).abs().max() / (expected.max() - expected.min())))
    return found


@torch.no_grad()
def rates(ways: list[Way], rounds: int, images: int) -> list[list[float]]:
    """Images a second of every way in every round; ways take turns, starting with another one each round."""
    found: list[list[float]] = [[] for _ in ways]
    for number in range(rounds):
        for turn in range(len(ways)):
            index = (number + turn) % len(ways)
            _prepare(ways[index])
            began = _clock(ways[index])
            for _ in range(images):
                ways[index].run()
            found[index].append(images / (_clock(ways[index]) - began))
    return found


def rows(ways: list[Way], measured: list[list[float]], off: list[float] | None) -> list[dict[str, Any]]:
    """A row a way: median rate, spread and ratio to the first way of as many threads.

    Args:
        ways: as measured.
        measured: their rates in every round.
        off: their differences; None where they are different networks.
    """
    found = []
    for index, (way, values) in enumerate(zip(ways, measured, strict=True)):
        reference = next(rate for other, rate in zip(ways, measured, strict=True) if other.threads == way.threads)
        ratios = [value / first for value, first in zip(values, reference, strict=True)]
        found.append(
            {
                "network": way.network,
                "way": way.name,
                "threads": way.threads,
                "images_per_s": statistics.median(values),
                "images_per_s_range": [min(values), max(values)],
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                **({} if off is None else {"difference_share_of_range": off[index]}),
            }
        )
    return found


def _prepare(way: Way) -> None:
    if way.threads is not None:
        torch.set_num_threads(way.threads)
        time.sleep(PAUSE)


def _clock(way: Way) -> float:
    if way.threads is None:
        torch.cuda.synchronize()
    return time.perf_counter()


def _show(title: str, table: list[dict[str, Any]]) -> None:
    print(title)
    for row in table:
        (low, high), (least, most) = row["images_per_s_range"], row["ratio_range"]
        threads = "" if row["threads"] is None else f", {row['threads']} thread(s)"
        print(
            f"  {row['network'] + ', ' + row['way'] + threads:<58} {row['images_per_s']:8.3f} images/s "
            f"({low:.3f} to {high:.3f}), ratio {row['ratio']:.3f} ({least:.3f} to {most:.3f})",
            flush=True,
        )


def on_cpu(given: argparse.Namespace) -> dict[str, Any]:
    """All of the CPU.

    Raises:
        SystemExit: two ways of the one network do not compute the same.
    """
    size: Size = tuple(given.size)
    with tempfile.TemporaryDirectory() as folder:
        ways = cpu_ways(NETWORK, size, given.threads, Path(folder))
        off = differences(ways)
        if not max(off) <= MOST_DIFFERENCE:
            raise SystemExit(f"the ways do not compute the same: {off}; their rates cannot be compared")
        table = rows(ways, rates(ways, given.rounds, given.images), off)
        _show(f"CPU, {size[0]}×{size[1]}, {given.rounds} rounds of {given.images} images:", table)
        beside = [way for way in ways if way.name == EAGER]
        baseline = [eager_way(BASELINE, size, count) for count in given.threads]
        against = [*beside, *baseline]
        slow = rows(against, rates(against, given.baseline_rounds, 1), None) if given.baseline_rounds else []
    if slow:
        _show(f"the baseline, {given.baseline_rounds} rounds of one image:", slow)
    return {
        "size": list(size),
        "rounds": given.rounds,
        "images_per_round": given.images,
        "ways": table,
        "baseline_rounds": given.baseline_rounds,
        "baseline": slow,
    }


def on_gpu(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All of the GPU, size by size and network by network."""
    found = []
    for size in GPU_SIZES:
        for name in (NETWORK, BASELINE):
            ways = gpu_ways(name, size)
            off = differences(ways)
            rates(ways, 1, GPU_WARM_UP)
            table = rows(ways, rates(ways, given.rounds, given.gpu_images), off)
            _show(f"{torch.cuda.get_device_name()}, {size[0]}×{size[1]}:", table)
            found.append(
                {"size": list(size), "rounds": given.rounds, "images_per_round": given.gpu_images, "ways": table}
            )
    return found


def page(found: dict[str, Any]) -> str:
    """The figures as a table."""
    cpu, gpu = found["cpu"], found["gpu"]
    width, height = cpu["size"]
    lines = ["| one image | | threads | images/s | range | of the eager network's |", "|---|---|---|---|---|---|"]
    groups = [
        (f"CPU, {width}×{height}", [*cpu["ways"], *(row for row in cpu["baseline"] if row["network"] == BASELINE)])
    ]
    groups += [(f"{found['gpu_name']}, {'×'.join(map(str, part['size']))}", part["ways"]) for part in gpu]
    for where, rows in groups:
        for row in rows:
            low, high = row["images_per_s_range"]
            threads = "" if row["threads"] is None else str(row["threads"])
            lines.append(
                f"| {where}, {row['network']} | {row['way']} | {threads} | {row['images_per_s']:.3g} "
                f"| {low:.3g} to {high:.3g} | {row['ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "page"), nargs="?", default="measure")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 512), help="of the CPU's image, width height")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU thread counts")
    parser.add_argument("--rounds", type=int, default=9, help="times every way has its turn")
    parser.add_argument("--images", type=int, default=3, help="images of a turn on the CPU")
    parser.add_argument("--gpu-images", type=int, default=50, help="images of a turn on the GPU")
    parser.add_argument("--baseline-rounds", type=int, default=2, help="turns of the baseline on the CPU; 0 for none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    if given.what == "page":
        write_between(PAGE, "rate", page(json.loads(RESULTS.read_text())))
        return
    found: dict[str, Any] = {
        "network": NETWORK,
        "baseline": BASELINE,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_before": os.getloadavg()[0],
        "cpu": on_cpu(given),
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu": on_gpu(given) if torch.cuda.is_available() else [],
        "versions": {**versions(), **{name: metadata.version(name) for name in NEEDED}},
    }
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
