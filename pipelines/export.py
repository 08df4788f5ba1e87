"""Weights of a run in the layout of a published system (methods §8.5)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actors.errors import RunError
from models.networks.deeplab import DeepLabConfig
from models.networks.proda import PROTOTYPES
from models.networks.segmenter import Heads, Segmenter
from pipelines.options import read_config
from pipelines.trained import fitting_network, read_description
from pipelines.weights import PRODA, PRODA_PROTOTYPES, PRODA_STATE, Weights, newest_state

Layout = Literal["auto", "mrnet", "proda"]
Files = dict[str, Callable[[Path], Any]]
"""Names of files and what writes them, the weights first."""

DATASETS = {"gta": "gta5", "synthia": "synthia", "city": "cityscapes", "robot": "robotcar"}
"""What ProDA's file names call the halves of a benchmark's name."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    weights: Path
    beside: tuple[Path, ...]
    """What goes with them."""
    step: int
    parameters: int


def export(run: str, out: str, layout: Layout = "auto", weights: Weights = "last") -> Exported:
    """Write the weights of a run as the code of its system reads them.

    The recommended weights are kept without discriminators.

    Args:
        run: run directory.
        out: folder.
        layout: ``auto``, that of the run's own system.
        weights: see :func:`pipelines.trained.load_trained`.

    Raises:
        RunError: the folder is no run, has no checkpoint, or one that the layout cannot hold; or the files cannot be
            written.
    """
    folder, target = Path(run).absolute(), Path(out).absolute()
    description = read_description(folder)
    saved = newest_state(folder, weights)
    with torch.device("meta"):
        network = fitting_network(description, saved["teaching"]["network"], folder)
    heads = network.config.heads
    if layout not in ("auto", heads):
        raise RunError(
            f"{folder} has a network with the heads of {heads}, which the layout {layout} cannot hold; export it with "
            f"--layout {heads}, or leave --layout out"
        )
    files = LAYOUTS[heads](folder, saved, network)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            _by_rename(target / name, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise RunError(f"the weights cannot be written to {target}: {str(error).splitlines()[0]}") from error
    first, *others = (target / name for name in files)
    return Exported(first, tuple(others), saved["step"], sum(parameter.numel() for parameter in network.parameters()))


def _mrnet(folder: Path, saved: Mapping[str, Any], network: Segmenter) -> Files:
    """``GTA5_<step>.pth``, a flat state dict as MRNet's and EPLC's, and the ``opts.yaml`` that their code needs.

    Of a checkpoint of stage I also the discriminators of the auxiliary and of the primary head, ``_D1`` and ``_D2``.
    """
    name = f"GTA5_{saved['step']}"
    found = _owned(saved, "discriminators")
    heads = [
        {key.removeprefix(f"{head}."): tensor for key, tensor in found.items() if key.startswith(f"{head}.")}
        for head in ("aux", "main")
    ]
    critics = [critic for critic in heads if critic]
    return {
        f"{name}.pth": partial(torch.save, saved["teaching"]["network"]),
        **{f"{name}_D{number}.pth": partial(torch.save, critic) for number, critic in enumerate(critics, 1)},
        "opts.yaml": lambda path: path.write_text(_options(network.config), encoding="utf-8"),
    }


def _proda(folder: Path, saved: Mapping[str, Any], network: Segmenter) -> Files:
    """``from_<source>_to_<target>_on_deeplabv2_<step>_model.pkl``, and the prototypes in a file of their own.

    A checkpoint of the warm-up has no prototypes yet: they are zeros in the one file, and there is no other. Its
    discriminator goes along; nothing is published of the names in it, which are ours.
    """
    step, state = saved["step"], dict(saved["teaching"]["network"])
    prototypes: Tensor = state.pop(PROTOTYPES)
    whole = {PRODA: {PRODA_STATE: state, PRODA_PROTOTYPES: prototypes}, "iter": step, "best_iou": _score(folder, step)}
    if critic := _owned(saved, "discriminator"):
        whole["FCDiscriminator"] = {PRODA_STATE: critic}
    source, target = _domains(folder)
    files: Files = {f"from_{source}_to_{target}_on_deeplabv2_{step}_model.pkl": partial(torch.save, whole)}
    if prototypes.any():
        files[f"prototypes_on_{target}_from_deeplabv2"] = partial(torch.save, prototypes)
    return files


LAYOUTS: dict[Heads, Callable[[Path, Mapping[str, Any], Segmenter], Files]] = {"mrnet": _mrnet, "proda": _proda}


def _owned(saved: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """What the objective of a checkpoint owns under a name; nothing where it has none."""
    objective = saved.get("objective", {})
    owned: dict[str, Tensor] = objective.get("inner", objective).get(name, {})
    return owned


def _score(folder: Path, step: int) -> float | None:
    """Mean IoU of the run's end as a share; None for another step, and where nothing was scored."""
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = results["scores"]["adapted"] if results.get("steps") == step else None
    return None if found is None else found["miou"] / 100


def _domains(folder: Path) -> tuple[str, str]:
    """What file names call source and target; of images of one's own, the names of the TOML files."""
    options = read_config(folder)
    if options.source is not None and options.target is not None:
        return Path(options.source).stem, Path(options.target).stem
    source, _, target = options.benchmark.partition("2")
    return DATASETS.get(source, source), DATASETS.get(target, target)


def _by_rename(path: Path, write: Callable[[Path], Any]) -> None:
    half = path.with_name(f".{path.name}.partial")
    try:
        write(half)
        half.rename(path)
    finally:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)


def _options(config: DeepLabConfig) -> str:
    """What the published evaluation reads beside the weights (methods §8.5)."""
    return (
        f"model: DeepLab\nnorm_style: {config.norm}\nuse_se: {str(config.use_se).lower()}\n"
        f"num_classes: {config.num_classes}\n"
    )
