"""A network as a file that is run without its run and without this code, and the card that stands beside it.

The file maps images, float (N, 3, H, W), RGB of 0 to 255, to class scores (N, C, H, W). ONNX is data alone. A ``.pt2``
of torch is opened by unpickling, which can execute what a stranger put into it: open your own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from actors.errors import RunError
from models.networks.deployed import Deployed
from models.networks.segmenter import Segmenter, upsample
from pipelines.datasets.classes import ClassSet
from pipelines.results import write_json
from pipelines.views import PIXELS, normalised

Size = tuple[int, int]
"""(width, height)."""
Format = Literal["onnx", "torch"]
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Images (N, 3, H, W) to class scores (N, C, H, W)."""
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
SMALLEST, SMALLEST_DYNAMIC = 32, 64
"""Pixels of the shorter side at least, of a model of one size and of one of any."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra ``export``."""
IMAGES, SCORES = "images", "scores"
"""Names of input and output."""
AXES = {0: "batch", 2: "height", 3: "width"}
"""Those of the input that vary in a model of any size."""
DYNAMIC = "dynamic"
"""What a card says of a size that may be any."""
EXAMPLE = (2, 3, 256, 384)
"""Images that such a model is traced with: no two sides alike, and not one image, or the trace took that for fixed."""
MOST_DIFFERENCE = 1e-4
"""Of the class scores' range. Another order of float32 sums moves them by a few millionths of it (measured with ONNX
Runtime: 6e-6 for BiSeNet on a ResNet-18, 2e-6 for DeepLab on a ResNet-101). Aligned corners taken for edges, or red for
blue, move those of the small networks by a tenth and more, a mean that is off by one of 255 steps by 2e-3 and more."""
TIMES_ROUNDING = 4
"""A network near a jump (a gate that random weights drive to its bend) rounds worse: beyond the bound above, a file may
be off by this many times what the network in float32 is off from itself in float64."""
MOST_CHANGED = 1e-3
"""Share of the pixels whose best two classes may lie so close that a rounding swaps them."""


@dataclass(frozen=True)
class Agreement:
    """How far a model in a file is from the network that it was made of, on random pictures."""

    sizes: tuple[Size, ...]
    """Of the pictures."""
    difference: float
    """Largest absolute one of the class scores."""
    share: float
    """The same, of the range that the class scores of that picture have."""
    changed: float
    """Share of the pixels whose class changes."""
    rounding: float = 0.0
    """Largest difference of the network's class scores from its own in float64, of their range; 0 where the bound is
    kept without it."""

    def __bool__(self) -> bool:
        """Whether it is rounding; no number that is none is."""
        bound = max(MOST_DIFFERENCE, TIMES_ROUNDING * self.rounding)
        return self.share <= bound and self.changed <= MOST_CHANGED


@dataclass(frozen=True)
class Card:
    """What whoever runs a model has to know of it: the JSON file beside it."""

    classes: ClassSet
    step: int
    size: Size | None
    """Of the one image that it reads; None where size and number may be any."""
    pixels: int
    """Of an image of the size that it was exported at."""

    def size_for(self, width: int, height: int) -> Size:
        """At which size a picture is shown to the model: the one that it has, or one of the picture's proportions."""
        if self.size is not None:
            return self.size
        factor = (self.pixels / (width * height)) ** 0.5
        least = SMALLEST_DYNAMIC
        return max(least, round(width * factor)), max(least, round(height * factor))


def card_of(model: Path) -> Path:
    """Where the card of a model stands: its whole name and ``.json``, as it may stand beside one of another format."""
    return model.with_name(f"{model.name}.json")


def write_card(path: Path, model: str, card: Card, agreement: Agreement, more: dict[str, Any]) -> None:
    """Write the card of a model.

    Args:
        path: JSON file.
        model: name of the model's file.
        card: what :func:`read_card` shall read.
        agreement: as measured.
        more: where it comes from, and what it was made with.
    """
    sides: list[Any] = list(AXES.values()) if card.size is None else [1, card.size[1], card.size[0]]
    write_json(
        path,
        {
            "model": model,
            "step": card.step,
            **more,
            "input": {
                "name": IMAGES,
                "shape": [sides[0], 3, *sides[1:]],
                "type": "float32",
                "colours": "RGB",
                "range": [0, 255],
            },
            "output": {"name": SCORES, "shape": [sides[0], len(card.classes), *sides[1:]], "type": "float32"},
            "size": DYNAMIC if card.size is None else list(card.size),
            "pixels": card.pixels,
            "smallest_side": SMALLEST_DYNAMIC if card.size is None else min(card.size),
            "classes": {
                "name": card.classes.name,
                "names": list(card.classes.names),
                "palette": [list(colour) for colour in card.classes.palette],
            },
            "checked": {
                "sizes": [list(size) for size in agreement.sizes],
                "largest_difference": agreement.difference,
                "share_of_range": agreement.share,
                "changed_pixels_share": agreement.changed,
                "rounding_share_of_range": agreement.rounding,
            },
        },
    )


def read_card(model: Path) -> Card:
    """What stands beside a model.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    path = card_of(model)
    if not path.is_file():
        raise RunError(
            f"{path} is missing, which says what {model.name} reads and which classes it scores; keep the two files "
            "that export writes together"
        )
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        classes, size, pixels = plain["classes"], None, int(plain["pixels"])
        palette = tuple((int(r), int(g), int(b)) for r, g, b in classes["palette"])
        if plain["size"] != DYNAMIC:
            width, height = plain["size"]
            size = int(width), int(height)
        if min(size or (pixels,)) < 1:
            raise ValueError(f"images of size {plain['size']} and of {pixels} pixels")
        found = ClassSet(str(classes["name"]), tuple(map(str, classes["names"])), palette)
        return Card(found, int(plain["step"]), size, pixels)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} cannot be read as what export writes beside a model: {error!r}") from error


def check_needed(format: Format) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        RunError: some are missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise RunError(
            f"ONNX needs {', '.join(missing)}, not installed here: pip install 'tutelage[export]'; --layout torch "
            "needs nothing more"
        )


def made_with(format: Format) -> dict[str, str]:
    """Versions of the packages that wrote a file, beside torch."""
    return {name: metadata.version(name) for name in NEEDED} if format == "onnx" else {}


def write_model(network: Segmenter, path: Path, format: Format, size: Size, *, dynamic: bool) -> None:
    """Write a network as a file of its own.

    Args:
        network: in eval mode, on the CPU.
        path: file.
        format: see :data:`ENDINGS`.
        size: of the images.
        dynamic: whether it shall hold for images of any size from :data:`SMALLEST_DYNAMIC` on, and any number of
            them.
    """
    with _quiet():
        program = traced(network, size, dynamic=dynamic)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names the folders of this machine
        if format == "torch":
            torch.export.save(program, path)
            return
        torch.onnx.export(
            program,
            f=path,
            input_names=[IMAGES],
            output_names=[SCORES],
            dynamic_shapes={IMAGES: AXES} if dynamic else None,  # names, of what the trace already leaves open
            external_data=False,
            verbose=False,
        )


def traced(network: Segmenter, size: Size, *, dynamic: bool) -> torch.export.ExportedProgram:
    """A network with everything round it as a graph of tensor operations; see :func:`write_model`."""
    pixels = PIXELS[network.config.pixels]
    whole = Deployed(network, pixels.mean, pixels.scale, bgr=pixels.bgr, any_size=dynamic).eval()
    if not dynamic:
        return torch.export.export(whole, (torch.zeros(1, 3, size[1], size[0]),))
    least = SMALLEST_DYNAMIC
    sides = {
        axis: torch.export.Dim(name) if axis == 0 else torch.export.Dim(name, min=least) for axis, name in AXES.items()
    }
    return torch.export.export(
        whole,
        (torch.zeros(EXAMPLE),),
        dynamic_shapes={IMAGES: sides},
        # "Is the map smaller than the image?" holds at every size, but the shapes' arithmetic cannot prove it.
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def open_model(path: Path, format: Format, threads: int) -> Run:
    """A file as something to call, on the CPU.

    Args:
        path: file.
        format: its format.
        threads: CPU threads; torch's are those of the process.

    Raises:
        RunError: what it needs is not installed, or it is no such file.
    """
    check_needed(format)
    try:
        return _OPEN[format](path, threads)
    except Exception as error:  # both libraries raise whatever the damage makes them stumble over
        cause = str(error).strip().splitlines()
        raise RunError(
            f"{path} cannot be opened as a model ({ENDINGS[format]}): {cause[0] if cause else type(error).__name__}"
        ) from error


def format_of(path: Path) -> Format:
    """Of a file, by its name's ending.

    Raises:
        RunError: there is no such file, or it has none of the endings.
    """
    if not path.is_file():
        raise RunError(f"{path} is no file; give the {' or '.join(ENDINGS.values())} file that export wrote")
    for format, ending in ENDINGS.items():
        if path.suffix == ending:
            return format
    raise RunError(
        f"{path} is no exported model, whose name ends in {' or '.join(ENDINGS.values())}: "
        "python run.py export RUN --out DIR --layout onnx"
    )


def compared(run: Run, network: Segmenter, sizes: tuple[Size, ...]) -> Agreement:
    """Measure how far a model is from its network, run as everywhere else in the house.

    Args:
        run: the model.
        network: in eval mode, on the CPU.
        sizes: of random pictures; one of the first size, two together of every other.
    """
    found = []
    for number, size in enumerate(sizes):
        images = random_pictures(1 if number == 0 else 2, size)
        expected = _scores(network, images)
        scores = torch.from_numpy(run(images.numpy()))
        spread = max(float(expected.max() - expected.min()), 1e-12)
        off = float((scores - expected).abs().max())
        rounding = 0.0
        if off > MOST_DIFFERENCE * spread:
            exact = _scores(copy.deepcopy(network).double(), images.double())
            rounding = float((expected - exact).abs().max()) / spread
        changed = float((scores.argmax(1) != expected.argmax(1)).double().mean())
        found.append((off, off / spread, changed, rounding))
    difference, share, changed, rounding = np.max(found, axis=0).tolist()  # a number that is none stays the largest
    return Agreement(sizes, difference, share, changed, rounding)


@torch.no_grad()
def _scores(network: Segmenter, images: Tensor) -> Tensor:
    """Class scores of a network at the images' size."""
    scores: Tensor = network(normalised(images, network.config.pixels)).fused()
    return upsample(scores, (images.shape[-2], images.shape[-1]))


def random_pictures(count: int, size: Size) -> Tensor:
    """Whole numbers 0 to 255 as float32 (count, 3, H, W): patches of several sizes, the same on every call.

    Noise alone would look the same everywhere to a deep network, and leave little to compare.
    """
    generator = torch.Generator().manual_seed(0)
    width, height = size
    total = torch.zeros(count, 3, height, width)
    for cell in (64, 16, 4, 1):
        coarse = torch.rand(count, 3, -(-height // cell), -(-width // cell), generator=generator)
        total += F.interpolate(coarse, scale_factor=float(cell), mode="nearest")[..., :height, :width]
    return (total * (255 / 4)).round()


def _open_onnx(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,), (scores,) = session.get_inputs(), session.get_outputs()

    def run(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", session.run([scores.name], {images.name: values})[0])

    return run


def _open_torch(path: Path, threads: int) -> Run:
    with _quiet():
        module = torch.export.load(path).module()

    def run(values: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return cast("NDArray[np.float32]", module(torch.from_numpy(values)).numpy())

    return run


_OPEN: dict[Format, Callable[[Path, int], Run]] = {"onnx": _open_onnx, "torch": _open_torch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what both exporters say of torchvision, which is not installed, and of their own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
