"""Write a miniature to disk: rendered once, in the published layout of each dataset, complete or not at all.

Pictures are rendered in a temporary folder beside the final one and renamed at the end, so two processes
may ask for the same miniature at once; the slower one throws its copy away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.datasets.cityscapes import LABEL_IDS
from pipelines.datasets.classes import CITYSCAPES_19
from pipelines.datasets.dataset import DataError
from pipelines.datasets.miniature.canvas import LANE_MARKING
from pipelines.datasets.miniature.domains import DOMAINS
from pipelines.datasets.miniature.scene import RARE, render
from pipelines.datasets.png16 import encode_rgb16
from pipelines.datasets.robotcar import TO_9_CLASSES as ROBOTCAR_IDS
from pipelines.datasets.synthia import TO_19_CLASSES as SYNTHIA_IDS

MINIATURE_VERSION = 1

Picture = NDArray[np.uint8]
_Writer = Callable[[Path, str, int, Picture, Picture], None]


@dataclass(frozen=True)
class MiniatureSize:
    """How many pictures, and how large."""

    source: int
    train: int
    validation: int
    pictures: dict[str, tuple[int, int]]
    """Domain → (width, height), in the aspect ratio of the real dataset."""
    oversampling: float
    wanted_every: int
    """A rare class is put in sight in at least one of so many pictures."""
    workers: int


SIZES: dict[str, MiniatureSize] = {
    "tiny": MiniatureSize(
        source=24,
        train=24,
        validation=8,
        pictures={
            "synthia": (128, 76),
            "gta5": (128, 70),
            "cityscapes": (128, 64),
            "cityscapes-shifted": (128, 64),
            "robotcar": (96, 72),
        },
        oversampling=2.0,
        wanted_every=4,
        workers=1,
    ),
    "mini": MiniatureSize(
        source=320,
        train=256,
        validation=64,
        pictures={
            "synthia": (320, 190),
            "gta5": (320, 176),
            "cityscapes": (320, 160),
            "cityscapes-shifted": (320, 160),
            "robotcar": (256, 192),
        },
        oversampling=1.5,
        wanted_every=8,
        workers=2,
    ),
}


@dataclass(frozen=True)
class _Pair:
    source: str
    target: str
    absent: frozenset[str]


_PAIRS: dict[str, _Pair] = {
    "gta2city": _Pair("gta5", "cityscapes", frozenset()),
    "synthia2city": _Pair("synthia", "cityscapes", frozenset({"terrain", "truck", "train"})),
    "city2robot": _Pair("cityscapes", "robotcar", frozenset({"train"})),
    "shift_only": _Pair("cityscapes", "cityscapes-shifted", frozenset()),
}

_MORE_WANTED: dict[str, dict[str, int]] = {
    "cityscapes-shifted": dict.fromkeys(
        ("person", "rider_bicycle", "rider_motorcycle", "bicycle", "motorcycle", "bus", "train"), 4
    )
}
"""Domain → how many times as often as elsewhere a rare class is put in sight.

What is put in sight stands near the camera. A class that is frequent by its density alone would look smaller.
"""

_FOLDERS = {
    "synthia": "SYNTHIA",
    "gta5": "GTA5",
    "cityscapes": "Cityscapes",
    "cityscapes-shifted": "Cityscapes-shifted",
    "robotcar": "RobotCar",
}
_CITIES = {"train": ("aachen", "bremen", "ulm"), "val": ("frankfurt", "lindau")}
_SEQUENCES = {
    "train": ("2014-12-05-11-09-10_01", "2015-05-29-09-36-29_01"),
    "val": ("2014-11-25-09-18-32_01", "2015-10-29-12-18-17_07"),
}


def miniature_folder(benchmark: str, size: str, folder: Path, seed: int) -> Path:
    """Where a benchmark's miniature lives under `folder`; a name stands for the same pictures for ever."""
    return folder / f"{benchmark}-{size}-v{MINIATURE_VERSION}-s{seed}"


def write_miniature(benchmark: str, size: str, folder: Path, seed: int = 0) -> Path:
    """Render the miniature of a benchmark unless it is already there; returns its data root.

    Raises:
        DataError: the folder cannot be written, or rendering failed; nothing is left behind.
    """
    final = miniature_folder(benchmark, size, folder, seed)
    if final.is_dir():
        return final
    try:
        return _write_atomically(benchmark, size, seed, final)
    except OSError as error:
        raise DataError(
            f"cannot write the miniature {final.name} into {folder}: {error}. "
            "Free some space there or choose another folder."
        ) from error


def _write_atomically(benchmark: str, size: str, seed: int, final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        workers = min(SIZES[size].workers, os.cpu_count() or 1)
        if workers == 1:
            render_share(benchmark, size, seed, temporary, 0, 1)
        else:
            _render_in_processes(benchmark, size, seed, temporary, workers)
        temporary.chmod(0o755)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def render_share(benchmark: str, size: str, seed: int, root: Path, share: int, shares: int) -> None:
    """Render every `shares`-th picture of a miniature, beginning with number `share`, into `root`."""
    pair, scale = _PAIRS[benchmark], SIZES[size]
    for number, (domain, part, index) in enumerate(_pictures(pair, scale)):
        if number % shares != share:
            continue
        style, code = DOMAINS[domain], {"train": 0, "val": 1}[part]
        rgb, ids = render(
            style,
            scale.pictures[domain],
            np.random.default_rng([seed, style.seed, code, index]),
            absent=pair.absent,
            wanted=_wanted(domain, index, scale.wanted_every),
            oversampling=scale.oversampling,
        )
        _WRITERS[domain](root / _FOLDERS[domain], part, index, rgb, ids)


def _wanted(domain: str, index: int, every: int) -> frozenset[str]:
    """The rare kinds that a picture must show: each in one picture of `every`, or in more of them."""
    more = _MORE_WANTED.get(domain, {})
    return frozenset(
        kind for number, kind in enumerate(RARE) if (index - number) % max(1, every // more.get(kind, 1)) == 0
    )


def _pictures(pair: _Pair, scale: MiniatureSize) -> Iterator[tuple[str, str, int]]:
    for domain, part, count in (
        (pair.source, "train", scale.source),
        (pair.target, "train", scale.train),
        (pair.target, "val", scale.validation),
    ):
        for index in range(count):
            yield domain, part, index


def _render_in_processes(benchmark: str, size: str, seed: int, root: Path, workers: int) -> None:
    """Plain subprocesses: they need none of the caller's state, and a caller full of threads cannot fork."""
    repository = Path(__file__).resolve().parents[3]
    path = os.pathsep.join(p for p in (str(repository), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipelines.datasets.miniature", benchmark, size, str(seed), str(root)]
    running = [
        subprocess.Popen([*command, str(share), str(workers)], env=environment, stderr=subprocess.PIPE, text=True)
        for share in range(workers)
    ]
    try:
        for process in running:
            _, errors = process.communicate()
            if process.returncode != 0:
                cause = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                raise DataError(f"rendering the miniature {benchmark}-{size} in {root} failed: {cause[0]}")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=3)


def _table(mapping: dict[int, int]) -> NDArray[np.uint8]:
    """LabelId → raw id of another dataset; what the dataset does not know becomes its void, 0."""
    table = np.zeros(256, np.uint8)
    for label_id, raw in mapping.items():
        table[label_id] = raw
    return table


def _write_synthia(root: Path, part: str, index: int, rgb: Picture, ids: Picture) -> None:
    raw_of = {train_id: raw for raw, train_id in SYNTHIA_IDS.items()}
    mapping = {LABEL_IDS[name]: raw_of[i] for i, name in enumerate(CITYSCAPES_19.names)}
    label = np.zeros((*ids.shape, 3), np.uint16)
    label[:, :, 0] = _table({**mapping, LANE_MARKING: 22})[ids]
    _save(Image.fromarray(rgb), root / "RGB" / f"{index:07d}.png")
    path = root / "GT" / "LABELS" / f"{index:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_rgb16(label))


def _label_ids(ids: Picture) -> Picture:
    return np.where(ids == LANE_MARKING, np.uint8(LABEL_IDS["road"]), ids)


def _write_gta5(root: Path, part: str, index: int, rgb: Picture, ids: Picture) -> None:
    palette = np.zeros((256, 3), np.uint8)
    for name, colour in zip(CITYSCAPES_19.names, CITYSCAPES_19.palette, strict=True):
        palette[LABEL_IDS[name]] = colour
    label = Image.fromarray(_label_ids(ids))
    label.putpalette(palette.ravel().tolist())
    _save(Image.fromarray(rgb), root / "images" / f"{index + 1:05d}.png")
    _save(label, root / "labels" / f"{index + 1:05d}.png")


def _write_cityscapes(root: Path, part: str, index: int, rgb: Picture, ids: Picture) -> None:
    cities = _CITIES[part]
    city = cities[index % len(cities)]
    stem = f"{city}_{index // len(cities):06d}_000019"
    _save(Image.fromarray(rgb), root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
    _save(Image.fromarray(_label_ids(ids)), root / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png")


def _write_robotcar(root: Path, part: str, index: int, rgb: Picture, ids: Picture) -> None:
    raw_of = {train_id: raw for raw, train_id in reversed(ROBOTCAR_IDS.items())}
    mapping = {label: raw_of[i] for i, labels in enumerate(_ROBOTCAR_CLASSES) for label in labels}
    label = np.full((*ids.shape, 4), 255, np.uint8)
    label[:, :, :3] = _table({**mapping, LANE_MARKING: 12})[ids][:, :, None]
    sequences = _SEQUENCES[part]
    sequence, frame = sequences[index % len(sequences)], f"{index // len(sequences):06d}"
    image = f"train/{sequence}/{frame}.png" if part == "train" else f"val/{sequence}_{frame}.png"
    _save(Image.fromarray(rgb), root / image)
    _save(Image.fromarray(label), root / "anno" / f"{sequence}_{frame}.png")


_ROBOTCAR_CLASSES: tuple[tuple[int, ...], ...] = tuple(
    tuple(LABEL_IDS[name] for name in names)
    for names in (
        ("sky",),
        ("person", "rider"),
        ("motorcycle", "bicycle"),
        ("car", "truck", "bus"),
        ("sign",),
        ("light",),
        ("building",),
        ("sidewalk",),
        ("road",),
    )
)

_WRITERS: dict[str, _Writer] = {
    "synthia": _write_synthia,
    "gta5": _write_gta5,
    "cityscapes": _write_cityscapes,
    "cityscapes-shifted": _write_cityscapes,
    "robotcar": _write_robotcar,
}
