"""Weights of a run in the layout of a published system."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from actors.errors import RunError
from models.networks.deeplab import DeepLab
from pipelines.trained import Description, check_fits, read_description
from pipelines.weights import Weights, newest_weights


@dataclass(frozen=True)
class Exported:
    """What was written."""

    weights: Path
    options: Path
    step: int
    parameters: int


def export_mrnet(run: str, out: str, weights: Weights = "last") -> Exported:
    """Write ``GTA5_<step>.pth``, a flat state dict as MRNet's and EPLC's, and the ``opts.yaml`` that their code needs.

    Args:
        run: run directory.
        out: folder.
        weights: see :func:`pipelines.trained.load_trained`.

    Raises:
        RunError: the folder is no run, has no checkpoint; or the files cannot be written.
    """
    folder = Path(run).absolute()
    description = read_description(folder)
    step, arrays = newest_weights(folder, weights)
    with torch.device("meta"):
        network = DeepLab(description.config)
    check_fits(network, arrays, folder)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    target = Path(out).absolute()
    written = Exported(
        target / f"GTA5_{step}.pth",
        target / "opts.yaml",
        step,
        sum(parameter.numel() for parameter in network.parameters()),
    )
    try:
        target.mkdir(parents=True, exist_ok=True)
        _by_rename(written.weights, lambda path: torch.save(state, path))
        _by_rename(written.options, lambda path: path.write_text(_options(description), encoding="utf-8"))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise RunError(f"the weights cannot be written to {target}: {str(error).splitlines()[0]}") from error
    return written


def _by_rename(path: Path, write: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.rename(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _options(description: Description) -> str:
    """What the published evaluation reads beside the weights (methods §8.5)."""
    config = description.config
    return (
        f"model: DeepLab\nnorm_style: {config.norm}\nuse_se: {str(config.use_se).lower()}\n"
        f"num_classes: {config.num_classes}\n"
    )


EXPORTERS: dict[Literal["mrnet"], Callable[[str, str, Weights], Exported]] = {"mrnet": export_mrnet}
