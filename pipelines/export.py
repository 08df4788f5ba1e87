"""The network of a run for others: its weights in the layout of a published system (methods §8.5), or all of it.

What is all of it is a file that is run without this code; :mod:`pipelines.deployed` knows these.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actors.errors import RunError
from actors.storage import LOCAL_OUT, Place, local, place
from models.networks.deeplab import DeepLabConfig
from models.networks.layouts import FADA_PARTS, PARALLEL_PREFIX, with_published_copies
from models.networks.proda import PROTOTYPES
from models.networks.segmenter import Heads, Segmenter
from pipelines.deployed import (
    ENDINGS,
    SMALLEST,
    SMALLEST_DYNAMIC,
    Agreement,
    Card,
    Format,
    Size,
    card_of,
    check_needed,
    compared,
    made_with,
    open_model,
    write_card,
    write_model,
)
from pipelines.options import read_config
from pipelines.results import versions
from pipelines.trained import fitting_network, load_trained, read_description
from pipelines.weights import PRODA, PRODA_PROTOTYPES, PRODA_STATE, Weights, newest_state

Layout = Literal["auto", "mrnet", "proda", "bisenet", "fada", "onnx", "torch"]
Files = dict[str, Callable[[Path], Any]]
"""Names of files and what writes them, the weights first."""

DATASETS = {"gta": "gta5", "synthia": "synthia", "city": "cityscapes", "robot": "robotcar"}
"""What ProDA's file names call the halves of a benchmark's name."""
BISENET_EPOCH = 125
"""Steps of what the published BiSeNet runs call an epoch (methods §6.1)."""
FORMATS: dict[Layout, Format] = {"onnx": "onnx", "torch": "torch"}
"""Layouts that are whole networks, and not weights for the code of others."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    weights: Path
    beside: tuple[Path, ...]
    """What goes with them."""
    step: int
    parameters: int
    agreement: Agreement | None = None
    """Of a whole network: how far the file is from it."""


def export(
    run: str,
    out: str,
    layout: Layout = "auto",
    weights: Weights = "last",
    *,
    size: Size | None = None,
    dynamic: bool = False,
) -> Exported:
    """Write the network of a run for others.

    The recommended weights are kept without discriminators.

    Args:
        run: run directory.
        out: folder.
        layout: ``auto``, that of the run's own system; ``onnx`` and ``torch``, a file of the whole network.
        weights: see :func:`pipelines.trained.load_trained`.
        size: (width, height) of the images of a whole network; None for the largest that the run is scored at.
        dynamic: whether it shall read images of any size.

    Raises:
        RunError: the folder is no run, has no checkpoint, or one that the layout cannot hold; the options do not belong
            together; a file does not compute what the network does; or the files cannot be written.
    """
    folder, target = place(run).absolute(), local(out, "--out", LOCAL_OUT).absolute()
    if layout in FORMATS:
        return _whole_network(folder, target, FORMATS[layout], weights, size, dynamic=dynamic)
    if size is not None or dynamic:
        raise RunError(
            f"--layout {layout} writes weights, which are of no size; --size and --dynamic belong to --layout onnx and "
            "torch"
        )
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
    first, *others = _write(target, files)
    return Exported(first, tuple(others), saved["step"], sum(parameter.numel() for parameter in network.parameters()))


def _whole_network(
    folder: Place, target: Path, format: Format, weights: Weights, size: Size | None, *, dynamic: bool
) -> Exported:
    """``<run>_<step>.onnx`` or ``.pt2``, opened again and compared with the network, and its card."""
    check_needed(format)
    trained = load_trained(folder, torch.device("cpu"), weights)
    network, description = trained.network, trained.description
    width, height = size or max(description.views, key=lambda view: view[0] * view[1])
    if min(width, height) < SMALLEST:
        raise RunError(
            f"--size {width} {height} is too small for the network's grid; give sides of at least {SMALLEST} pixels"
        )
    name = f"{folder.name}_{trained.step}{ENDINGS[format]}"
    sizes: tuple[Size, ...] = ((width, height),)
    if dynamic:  # nor the size of the trace; the second one has other proportions and odd sides
        least = SMALLEST_DYNAMIC
        sizes = (
            (max(least, width), max(least, height)),
            (max(least, 2 * width // 3) | 1, (max(least, height) + 32) | 1),
        )
    card = Card(description.classes, trained.step, None if dynamic else (width, height), width * height)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    measured: list[Agreement] = []

    def write_checked(path: Path) -> None:
        write_model(network, path, format, (width, height), dynamic=dynamic)
        found = compared(open_model(path, format, torch.get_num_threads()), network, sizes)
        if not found:
            raise RunError(
                f"the {format} file does not compute what the network does: its class scores are off by up to "
                f"{found.difference:.3g} ({found.share:.2%} of their range), and {found.changed:.2%} of the pixels "
                f"change class, so nothing was written; try --layout {'torch' if format == 'onnx' else 'onnx'}, and "
                "report this with the versions of torch and onnxruntime"
            )
        measured.append(found)

    origin = {
        "run": folder.name,
        "parameters": parameters,
        "versions": {**versions(), **made_with(format)},
        "run_versions": _results(folder).get("versions"),
    }
    files: Files = {
        name: write_checked,
        card_of(Path(name)).name: lambda path: write_card(path, name, card, measured[0], origin),
    }
    model, beside = _write(target, files)
    return Exported(model, (beside,), trained.step, parameters, measured[0])


def _mrnet(folder: Place, saved: Mapping[str, Any], network: Segmenter) -> Files:
    """``GTA5_<step>.pth``, a flat state dict as MRNet's and EPLC's, and the ``opts.yaml`` that their code needs.

    Of a checkpoint of stage I also the discriminators of the auxiliary and of the primary head, ``_D1`` and ``_D2``.
    """
    assert isinstance(network.config, DeepLabConfig)
    config = network.config
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
        "opts.yaml": lambda path: path.write_text(_options(config), encoding="utf-8"),
    }


def _proda(folder: Place, saved: Mapping[str, Any], network: Segmenter) -> Files:
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


def _bisenet(folder: Place, saved: Mapping[str, Any], network: Segmenter) -> Files:
    """``bisenet_<step>.pth``, as the adversarial and the meta-pseudo-label runs kept it, without their optimisers.

    The discriminator goes along where the objective owns one.
    """
    step = saved["step"]
    whole = {"model_state": _parallel(with_published_copies(saved["teaching"]["network"]))}
    if critic := _owned(saved, "discriminator"):
        whole["model_d_state"] = _parallel(critic)
    container = {**whole, "total_epoch_so_far": step // BISENET_EPOCH}
    return {f"bisenet_{step}.pth": partial(torch.save, container)}


def _fada(folder: Place, saved: Mapping[str, Any], network: Segmenter) -> Files:
    """``fada_<step>.pth``, as FADA and "Undoing label shift" keep it, without optimisers: both parts apart.

    The discriminator goes along where the objective owns one.
    """
    step, state = saved["step"], saved["teaching"]["network"]
    container: dict[str, Any] = {"iteration": step}
    for part in FADA_PARTS:
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        container[part] = _parallel({name.removeprefix(f"{part}."): tensor for name, tensor in own.items()})
    if critic := _owned(saved, "discriminator"):
        container["model_D"] = _parallel(critic)
    return {f"fada_{step}.pth": partial(torch.save, container)}


LAYOUTS: dict[Heads, Callable[[Place, Mapping[str, Any], Segmenter], Files]] = {
    "mrnet": _mrnet,
    "proda": _proda,
    "bisenet": _bisenet,
    "fada": _fada,
}


def _parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that training on several devices gives them."""
    return {f"{PARALLEL_PREFIX}{name}": tensor for name, tensor in state.items()}


def _owned(saved: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """What the objective of a checkpoint owns under a name; nothing where it has none."""
    objective = saved.get("objective", {})
    owned: dict[str, Tensor] = objective.get("inner", objective).get(name, {})
    return owned


def _score(folder: Place, step: int) -> float | None:
    """Mean IoU of the run's end as a share; None for another step, and where nothing was scored."""
    results = _results(folder)
    found = results["scores"]["adapted"] if results.get("steps") == step else None
    return None if found is None else found["miou"] / 100


def _domains(folder: Place) -> tuple[str, str]:
    """What file names call source and target; of images of one's own, the names of the TOML files."""
    options = read_config(folder)
    if options.source is not None and options.target is not None:
        return place(options.source).stem, place(options.target).stem
    source, _, target = options.benchmark.partition("2")
    return DATASETS.get(source, source), DATASETS.get(target, target)


def _results(folder: Place) -> dict[str, Any]:
    """What ``results.json`` of a run says; nothing before its end."""
    path = folder / "results.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(target: Path, files: Files) -> list[Path]:
    """Write files into a folder by rename, when all of them are complete.

    Raises:
        RunError: they cannot be written, or what writes one says so; none is there then.
    """
    new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target) as half:
            for name, write in files.items():
                write(Path(half) / name)
            for name in files:
                (Path(half) / name).replace(target / name)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise RunError(f"the weights cannot be written to {target}: {str(error).splitlines()[0]}") from error
    finally:
        if new:
            with contextlib.suppress(OSError):  # unless something is in it
                target.rmdir()
    return [target / name for name in files]


def _options(config: DeepLabConfig) -> str:
    """What the published evaluation reads beside the weights (methods §8.5)."""
    return (
        f"model: DeepLab\nnorm_style: {config.norm}\nuse_se: {str(config.use_se).lower()}\n"
        f"num_classes: {config.num_classes}\n"
    )
