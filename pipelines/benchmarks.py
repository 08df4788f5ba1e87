"""The benchmarks: which labelled source, which unlabelled target, which classes, which figures.

`open` reads the real datasets under a data root; `miniature` renders a small pair in the same layouts and
opens it with the same readers. Either way the target split for training has no path to a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.datasets import cityscapes, gta5, robotcar, synthia
from pipelines.datasets.classes import CITYSCAPES_19, PROTOCOLS, ROBOTCAR_9, ClassSet
from pipelines.datasets.dataset import DataError, Split
from pipelines.datasets.miniature import SIZES, write_miniature


@dataclass(frozen=True)
class Domains:
    """The four splits of a benchmark, each with the labels that its reader may see and no more."""

    source: Split
    """Labelled."""
    target: Split
    """Unlabelled: the images that a network is adapted to."""
    target_labelled: Split | None
    """The same images with labels, for the oracle run only; None where the labels are not on disk."""
    validation: Split
    """Labelled target images, for the evaluator only."""


@dataclass(frozen=True)
class Benchmark:
    """A pair of domains, a class set, and the protocols that scores are averaged over; the first is primary."""

    name: str
    description: str
    classes: ClassSet
    protocols: dict[str, tuple[int, ...]]
    source_folder: Callable[[Path], Path]
    target_folder: Callable[[Path], Path]
    open_source: Callable[[Path], Split]
    open_target: Callable[[Path], tuple[Split, Split | None, Split]]

    @property
    def primary_protocol(self) -> str:
        """Name of the protocol that the headline figure uses."""
        return next(iter(self.protocols))

    def open(self, data_root: str | Path) -> Domains:
        """Open the published datasets under `data_root`.

        Raises:
            DataError: a dataset, a folder or a label file is missing; says which one and what is expected.
        """
        root = Path(data_root)
        if not root.is_dir():
            raise DataError(
                f"the data root {root} does not exist or is not a folder; give the folder that holds the datasets"
            )
        source = self.open_source(self.source_folder(root))
        target, target_labelled, validation = self.open_target(self.target_folder(root))
        return Domains(source, target, target_labelled, validation)

    def miniature(self, size: str, folder: str | Path, seed: int = 0) -> Domains:
        """Open the benchmark's miniature below `folder`, rendering it first if it is not there.

        Args:
            size: "tiny" (for tests) or "mini" (for the demo).
            folder: where miniatures are kept.
            seed: another seed gives other pictures of the same domains.
        """
        if size not in SIZES:
            raise DataError(f"unknown miniature size {size!r}; known are {', '.join(SIZES)}")
        return self.open(write_miniature(self.name, size, Path(folder), seed))


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`, or a `DataError` that lists the known ones."""
    if name not in BENCHMARKS:
        raise DataError(f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _finder(dataset: str, names: Sequence[str], landmark: str) -> Callable[[Path], Path]:
    """Find a dataset's root below the data root by any of its usual names and the folder `landmark` in it."""

    def find(root: Path) -> Path:
        for name in names:
            if (root / name / landmark).is_dir():
                return root / name
        present = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:12]) or "no folders"
        expected = " or ".join(f"{name}/{landmark}" for name in names)
        raise DataError(
            f"{dataset} was not found under {root}: expected {expected}, found {present}. "
            f"Move or link the dataset there, or give another data root."
        )

    return find


def _cityscapes_target(root: Path) -> tuple[Split, Split | None, Split]:
    labelled = cityscapes.train(root) if cityscapes.has_train_labels(root) else None
    return cityscapes.train_without_labels(root), labelled, cityscapes.validation(root)


def _robotcar_target(root: Path) -> tuple[Split, Split | None, Split]:
    labelled = robotcar.train(root) if robotcar.has_train_labels(root) else None
    return robotcar.train_without_labels(root), labelled, robotcar.validation(root)


def _cityscapes_source(root: Path) -> Split:
    return cityscapes.train(root, cityscapes.ENCODING_9)


_GTA5 = _finder("GTA5", ("GTA5", "gta5"), "images")
_SYNTHIA = _finder(
    "SYNTHIA",
    ("SYNTHIA", "RAND_CITYSCAPES", "SYNTHIA/RAND_CITYSCAPES", "synthia", "synthia/RAND_CITYSCAPES"),
    "RGB",
)
_CITYSCAPES = _finder("Cityscapes", ("Cityscapes", "Cityscapes/data", "cityscapes"), "leftImg8bit")
_ROBOTCAR = _finder("RobotCar", ("RobotCar", "Oxford_Robot_ICCV19"), "train")

BENCHMARKS: dict[str, Benchmark] = {
    item.name: item
    for item in (
        Benchmark(
            name="gta2city",
            description="GTA5 to Cityscapes, 19 classes",
            classes=CITYSCAPES_19,
            protocols={"19": PROTOCOLS["19"]},
            source_folder=_GTA5,
            target_folder=_CITYSCAPES,
            open_source=gta5.train,
            open_target=_cityscapes_target,
        ),
        Benchmark(
            name="synthia2city",
            description="SYNTHIA-RAND-CITYSCAPES to Cityscapes, means over 16 and 13 of 19 network outputs",
            classes=CITYSCAPES_19,
            protocols={"16": PROTOCOLS["16"], "13": PROTOCOLS["13"]},
            source_folder=_SYNTHIA,
            target_folder=_CITYSCAPES,
            open_source=synthia.train,
            open_target=_cityscapes_target,
        ),
        Benchmark(
            name="city2robot",
            description="Cityscapes to Oxford RobotCar, 9 classes",
            classes=ROBOTCAR_9,
            protocols={"9": PROTOCOLS["9"]},
            source_folder=_CITYSCAPES,
            target_folder=_ROBOTCAR,
            open_source=_cityscapes_source,
            open_target=_robotcar_target,
        ),
    )
}
