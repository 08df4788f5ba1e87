"""Weights of a run in the layout of a published system."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from actors.errors import RunError
from models.networks.deeplab import DeepLab, DeepLabConfig
from pipelines.trained import fitting_network, read_description
from pipelines.weights import Weights, newest_state


@dataclass(frozen=True)
class Exported:
    """What was written."""

    weights: Path
    options: Path
    step: int
    parameters: int
    discriminators: tuple[Path, ...] = ()


def export_mrnet(run: str, out: str, weights: Weights = "last") -> Exported:
    """Write ``GTA5_<step>.pth``, a flat state dict as MRNet's and EPLC's, and the ``opts.yaml`` that their code needs.

    Of a checkpoint of stage I also the discriminators of the auxiliary and of the primary head, ``_D1`` and ``_D2``;
    the recommended weights are kept without them.

    Args:
        run: run directory.
        out: folder.
        weights: see :func:`pipelines.trained.load_trained`.

    Raises:
        RunError: the folder is no run, has no checkpoint; or the files cannot be written.
    """
    folder = Path(run).absolute()
    description = read_description(folder)
    saved = newest_state(folder, weights)
    step, state = saved["step"], saved["teaching"]["network"]
    with torch.device("meta"):
        network = fitting_network(description, state, folder)
    if not isinstance(network, DeepLab):
        raise RunError(f"{folder} is no network of MRNet or EPLC; export it with --layout {network.config.heads}")
    critics = _discriminators(saved.get("objective", {}))
    target = Path(out).absolute()
    written = Exported(
        target / f"GTA5_{step}.pth",
        target / "opts.yaml",
        step,
        sum(parameter.numel() for parameter in network.parameters()),
        tuple(target / f"GTA5_{step}_D{number}.pth" for number in range(1, len(critics) + 1)),
    )
    try:
        target.mkdir(parents=True, exist_ok=True)
        _by_rename(written.weights, lambda path: torch.save(state, path))
        for path, critic in zip(written.discriminators, critics, strict=True):
            _by_rename(path, partial(torch.save, critic))
        _by_rename(written.options, lambda path: path.write_text(_options(network.config), encoding="utf-8"))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise RunError(f"the weights cannot be written to {target}: {str(error).splitlines()[0]}") from error
    return written


def _discriminators(objective: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """State dicts of the auxiliary head's and the primary head's, where an objective has them."""
    found = objective.get("inner", objective).get("discriminators", {})
    heads = [
        {name.removeprefix(f"{head}."): tensor for name, tensor in found.items() if name.startswith(f"{head}.")}
        for head in ("aux", "main")
    ]
    return [head for head in heads if head]


def _by_rename(path: Path, write: Any) -> None:
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


EXPORTERS: dict[Literal["mrnet"], Callable[[str, str, Weights], Exported]] = {"mrnet": export_mrnet}
