"""The benchmarks: which labelled source, which unlabelled target, which classes, which figures.

`Published.open` reads the real datasets under a data root; `miniature` renders a small pair in the same layouts and
opens it with the same readers; `own_benchmark` opens folders of your own. However it was opened, the target split for
training has no path to a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.storage import Place, StorageError, place
from pipelines.datasets import cityscapes, gta5, robotcar, synthia
from pipelines.datasets.classes import CITYSCAPES_13, CITYSCAPES_16, CITYSCAPES_19, PROTOCOLS, ROBOTCAR_9, ClassSet
from pipelines.datasets.dataset import DataError, Size, Split, image_size
from pipelines.datasets.folder import read_folder
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
    validation: Split | None
    """Labelled target images, for the evaluator only; None where a user has none."""
    few: Split | None = None
    """Labelled target images that a semi-supervised run may learn from; never scored on."""
    held_out: Split | None = None
    """Labelled source images that nothing learns from: what a score without target labels may be measured on."""

    def with_held_out(self, count: int) -> Domains:
        """The same domains with ``count`` source images, spread evenly, that nothing learns from.

        Raises:
            DataError: less than half of the source images would be left to learn from.
        """
        images = len(self.source)
        if 2 * count > images:
            raise DataError(
                f"{count} of {images} source images cannot be held out: less than half would be left to learn from; "
                f"hold out at most {images // 2}"
            )
        held_out = self.source.subset([k * images // count for k in range(count)])
        rest = self.source.without(held_out.image_paths)
        assert rest is not None
        return replace(self, source=rest, held_out=held_out)

    def narrowed(self, kept: tuple[int, ...]) -> Domains:
        """The same domains with labels of fewer classes: train id `kept[i]` becomes `i`, every other one is ignored."""

        def narrow(split: Split | None) -> Split | None:
            return None if split is None else split.narrowed(kept)

        return Domains(
            source=self.source.narrowed(kept),
            target=self.target.narrowed(kept),
            target_labelled=narrow(self.target_labelled),
            validation=narrow(self.validation),
            few=narrow(self.few),
            held_out=narrow(self.held_out),
        )

    def with_target_labels(self, listed: str) -> Domains:
        """The same domains with the labels of some target images to learn from; they are scored on no more.

        Args:
            listed: text file with an image a line: its id, its file name, or the end of its path. Empty lines and
                what follows a # do not count.

        Raises:
            DataError: the file cannot be read or names no image, or a line names no labelled target image, or several.
        """
        pool = self.target_labelled or self.validation
        if pool is None:
            raise DataError(
                f"{self.target.name} has no labels, so none of those that {listed} names can be learned from"
            )
        few = pool.subset(_listed(listed, pool))
        scored = None if self.validation is None else self.validation.without(few.image_paths)
        return replace(self, validation=scored, few=few)


@dataclass(frozen=True)
class Shapes:
    """Sizes (width, height) at which a pair of domains is run at full size (methods §2.4 to §2.6)."""

    source: Size
    target: Size
    """In stage I, and of pseudo labels that are not the published ones."""
    target_again: Size
    """In stage II."""
    crops: tuple[Size, Size]
    """In stage I and in stage II."""
    label_views: tuple[Size, ...]
    score_views: tuple[Size, ...]
    source_jitter: tuple[float, float] = (0.8, 1.2)
    """Bounds of the scale jitter of source images in stage I."""
    published_labels: Size | None = None
    """Size of the published systems' pseudo labels; None where there are none."""
    whole: tuple[Size, Size] | None = None
    """Source and target where a system trains on whole images (methods §2.4, ProDA); None for `source` and `target`."""

    def small(self, side: int) -> tuple[Size, Size]:
        """Source and target size with the longer side at most `side`, in their proportions."""
        return _with_side(self.source, side), _with_side(self.target, side)


@dataclass(frozen=True)
class Benchmark:
    """A pair of domains, a class set, and the protocols that scores are averaged over; the first is primary."""

    name: str
    description: str
    classes: ClassSet
    protocols: dict[str, tuple[int, ...]]
    shapes: Shapes
    bonnet: float = 0.0
    """Share of a target image's height, from below, that shows the camera's own car, which is no class."""
    sure: float = 0.0
    """Probability that a pseudo label must reach in the published MRNet runs (methods §3.2)."""
    regular: float = 0.1
    """Weight of ProDA's regulariser in its published runs (methods §5.2)."""
    batches: tuple[int, int] = (2, 9)
    """Images of each domain in a batch of stage I and of stage II, in the published runs at full size."""
    rates: tuple[float, float] = (2e-4, 1e-4)
    """Base learning rates of both."""
    norm_images: tuple[int | None, int | None] = (1, 3)
    """Images on a device in both, which batch norm saw together; None where that is not known."""

    @property
    def primary_protocol(self) -> str:
        """Name of the protocol that the headline figure uses."""
        return next(iter(self.protocols))

    @property
    def class_counts(self) -> tuple[int, ...]:
        """The numbers of classes that `narrowed` takes, the present one first."""
        return (len(self.classes),)

    def narrowed(self, count: int) -> Benchmark:
        """The benchmark with `count` classes, for a network with that many outputs; itself if it has that many.

        Raises:
            DataError: no train ids are known for so many of its classes; lists the numbers that are possible.
        """
        if count not in self.class_counts:
            possible = " or ".join(map(str, self.class_counts))
            raise DataError(
                f"{self.name} cannot have {count} classes: its train ids are known for {possible} classes only. "
                f"Ask for {possible}."
            )
        return self


_NARROWER = {16: CITYSCAPES_16, 13: CITYSCAPES_13}
"""What `CITYSCAPES_19` can be narrowed to, by the number of classes; the protocol of that name lists which."""


@dataclass(frozen=True, kw_only=True)
class Published(Benchmark):
    """A pair of published datasets, or their miniature."""

    source_folder: Callable[[Place], Place]
    target_folder: Callable[[Place], Place]
    open_source: Callable[[Place], Split]
    open_target: Callable[[Place], tuple[Split, Split | None, Split]]
    kept: tuple[int, ...] | None = None
    """Which of its readers' train ids are left, in the order of `classes`; None where all are."""
    only_miniature: bool = False
    """Whether there are no such datasets but rendered ones."""

    @property
    def class_counts(self) -> tuple[int, ...]:
        """See `Benchmark.class_counts`."""
        return (*super().class_counts, *(_NARROWER if self.classes == CITYSCAPES_19 else ()))

    def narrowed(self, count: int) -> Published:
        """See `Benchmark.narrowed`; `open` and `miniature` of the result hand out labels of those classes.

        Its scores differ from the same protocols of 19 outputs: there is no absent class left to be predicted
        (methods §2.3).
        """
        super().narrowed(count)
        if count == len(self.classes):
            return self
        kept = PROTOCOLS[str(count)]
        return replace(
            self,
            description=f"{self.description.partition(',')[0]}, {count} classes",
            classes=_NARROWER[count],
            protocols={str(n): tuple(kept.index(i) for i in PROTOCOLS[str(n)]) for n in _NARROWER if n <= count},
            kept=kept,
        )

    def open(self, data_root: str | Place) -> Domains:
        """Open the published datasets under `data_root`.

        Raises:
            DataError: a dataset, a folder or a label file is missing; says which one and what is expected. Or there are
                no such datasets, or the store that they are in cannot be reached.
        """
        if self.only_miniature:
            raise DataError(
                f"{self.name} exists only as a miniature: no real datasets differ in class frequencies alone. "
                "Leave the data root out, or choose another benchmark."
            )
        try:
            return self._opened(place(data_root))
        except StorageError as error:
            raise DataError(f"the data root cannot be read: {error}") from error

    def _opened(self, root: Place) -> Domains:
        if not root.is_dir():
            raise DataError(
                f"the data root {root} does not exist or is not a folder; give the folder that holds the datasets"
            )
        source = self.open_source(self.source_folder(root))
        target, target_labelled, validation = self.open_target(self.target_folder(root))
        domains = Domains(source, target, target_labelled, validation)
        return domains if self.kept is None else domains.narrowed(self.kept)

    def miniature(self, size: str, folder: str | Path, seed: int = 0) -> Domains:
        """Open the benchmark's miniature below `folder`, rendering it first if it is not there.

        Args:
            size: "tiny" (for tests) or "mini" (for the demo).
            folder: where miniatures are kept.
            seed: another seed gives other pictures of the same domains.
        """
        if size not in SIZES:
            raise DataError(f"unknown miniature size {size!r}; known are {', '.join(SIZES)}")
        return self._opened(write_miniature(self.name, size, Path(folder), seed))


def benchmark(name: str) -> Published:
    """The benchmark called `name`, or a `DataError` that lists the known ones."""
    if name not in BENCHMARKS:
        raise DataError(
            f"unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}. "
            "For images of your own give --source and --target."
        )
    return BENCHMARKS[name]


def own_benchmark(source: str, target: str, validation: str | None = None) -> tuple[Benchmark, Domains]:
    """A benchmark of one's own from TOML files (see `pipelines.datasets.folder`).

    Args:
        source: of the labelled source domain; its classes are the benchmark's.
        target: of the target domain. Labels, where it has any, are for scoring alone.
        validation: of labelled target images to score on, instead of those of `target`.

    Raises:
        DataError: a file is missing or cannot work; says which one and what to write.
    """
    first = read_folder(source)
    if first.labelled is None or first.classes is None:
        raise DataError(f'{source}: a source domain needs labels and classes; add labels = "…/*.png" and classes')
    if first.unlabelled:
        raise DataError(
            f"{source}: {len(first.unlabelled)} of {len(first.images)} images have no label, the first is "
            f"{first.unlabelled[0]}. Add the labels, or make images = … narrower."
        )
    second = read_folder(target, source=first)
    scored, labelled = second.labelled, None
    if validation is not None:
        third = read_folder(validation, source=first)
        if third.labelled is None:
            raise DataError(f'{validation}: images to score on need labels; add labels = "…/*.png"')
        if third.unlabelled:
            raise DataError(
                f"{validation}: {len(third.unlabelled)} of {len(third.images)} images to score on have no label, the "
                f"first is {third.unlabelled[0]}. Add the labels, or make images = … narrower."
            )
        scored = third.labelled
        # Without images of its own to score on, an oracle would be scored on what it learned from.
        labelled = None if second.labelled is None else second.labelled.without(scored.image_paths)
    count = len(first.classes)
    pair = Benchmark(
        name=f"{first.name}2{second.name}",
        description=f"{first.name} to {second.name}, {count} classes",
        classes=first.classes,
        protocols={str(count): tuple(range(count))},
        shapes=_shapes(_typical_size(first.images), _typical_size(second.images)),
    )
    return pair, Domains(first.labelled, second.images, labelled, scored)


MEASURED_IMAGES = 64
SHORTEST_SIDE = 32
"""Pixels below which a side is not shrunk: four cells of the network's grid."""


def _typical_size(split: Split) -> Size:
    """Size of the image with the middle proportions, of some that are evenly spread; broken ones do not count.

    Not the median width and height: those may belong to different images and fit neither.
    """
    step = -(-len(split) // MEASURED_IMAGES)
    sizes = [size for path in split.image_paths[::step] if (size := image_size(path)) is not None]
    if not sizes:
        raise DataError(f"{split.name}: none of the images that were tried can be read, first {split.image_paths[0]}")
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))[len(sizes) // 2]


def _shapes(source: Size, target: Size) -> Shapes:
    """Sizes for images of these sizes: as many pixels as the published runs have, but no image is enlarged."""
    first, second = _with_pixels(source, 1280 * 720), _with_pixels(target, 1024 * 512)
    again = _with_pixels(target, 1280 * 640)
    crops = (common_part(first, second, 0.8, 0.8), common_part(first, again, 0.4, 0.4))
    return Shapes(first, second, again, crops, (second, again), (second, again))


def common_part(one: Size, other: Size, across: float, down: float) -> Size:
    """A crop that fits into both sizes: a share of the smaller width and of the smaller height."""
    return max(1, round(across * min(one[0], other[0]))), max(1, round(down * min(one[1], other[1])))


def _with_pixels(size: Size, pixels: int) -> Size:
    return _shrunk(size, (pixels / (size[0] * size[1])) ** 0.5)


def _with_side(size: Size, side: int) -> Size:
    return _shrunk(size, side / max(size))


def _shrunk(size: Size, factor: float) -> Size:
    factor = min(1.0, factor)
    return max(SHORTEST_SIDE, round(size[0] * factor)), max(SHORTEST_SIDE, round(size[1] * factor))


def _listed(path: str, pool: Split) -> list[int]:
    """Indices of the images that the lines of a file name, each once, in the order of the split."""
    try:
        lines = place(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of target labels {path} cannot be read: {error}") from error
    wanted = [name for line in lines if (name := line.split("#")[0].strip())]
    if not wanted:
        raise DataError(f"{path} names no image; write one a line, for example {pool.image_ids[0]}")
    ends: dict[str, set[int]] = {}
    for index, (image_id, image_path) in enumerate(zip(pool.image_ids, pool.image_paths, strict=True)):
        parts = place(image_path).parts
        for name in (image_id, image_path, *("/".join(parts[start:]) for start in range(1, len(parts)))):
            ends.setdefault(name, set()).add(index)
    unknown = [name for name in wanted if name not in ends]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} of {len(wanted)} lines name no labelled image of {pool.name}, the first is "
            f"{unknown[0]!r}; an image is called for example {pool.image_ids[0]!r}"
        )
    for name in wanted:
        if len(ends[name]) > 1:
            one, other = (pool.image_paths[i] for i in sorted(ends[name])[:2])
            raise DataError(f"{path}: {name!r} may be {one} or {other}; write more of its path")
    return sorted({index for name in wanted for index in ends[name]})


def _finder(dataset: str, names: Sequence[str], landmark: str) -> Callable[[Place], Place]:
    """Find a dataset's root below the data root by any of its usual names and the folder `landmark` in it."""

    def find(root: Place) -> Place:
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


def _cityscapes_target(root: Place) -> tuple[Split, Split | None, Split]:
    labelled = cityscapes.train(root) if cityscapes.has_train_labels(root) else None
    return cityscapes.train_without_labels(root), labelled, cityscapes.validation(root)


def _robotcar_target(root: Place) -> tuple[Split, Split | None, Split]:
    labelled = robotcar.train(root) if robotcar.has_train_labels(root) else None
    return robotcar.train_without_labels(root), labelled, robotcar.validation(root)


def _cityscapes_source(root: Place) -> Split:
    return cityscapes.train(root, cityscapes.ENCODING_9)


def _cityscapes_shifted(root: Place) -> Place:
    return root / "Cityscapes-shifted"


_GTA5 = _finder("GTA5", ("GTA5", "gta5"), "images")
_SYNTHIA = _finder(
    "SYNTHIA",
    ("SYNTHIA", "RAND_CITYSCAPES", "SYNTHIA/RAND_CITYSCAPES", "synthia", "synthia/RAND_CITYSCAPES"),
    "RGB",
)
_CITYSCAPES = _finder("Cityscapes", ("Cityscapes", "Cityscapes/data", "cityscapes"), "leftImg8bit")
_ROBOTCAR = _finder("RobotCar", ("RobotCar", "Oxford_Robot_ICCV19"), "train")


def _city_shapes(target_again: Size, whole_source: Size) -> Shapes:
    views = ((1024, 512), (1280, 640))
    crops = (1024, 512), (512, 256)
    return Shapes(
        (1280, 720),
        (1024, 512),
        target_again,
        crops,
        views,
        views,
        published_labels=(2048, 1024),
        whole=(whole_source, (2048, 1024)),
    )


_BONNET = 0.23
"""As DAFormer leaves out (Hoyer et al., CVPR 2022: 120 of 512 rows)."""

BENCHMARKS: dict[str, Published] = {
    item.name: item
    for item in (
        Published(
            name="gta2city",
            description="GTA5 to Cityscapes, 19 classes",
            classes=CITYSCAPES_19,
            protocols={"19": PROTOCOLS["19"]},
            shapes=_city_shapes((1280, 640), (1914, 1052)),
            bonnet=_BONNET,
            source_folder=_GTA5,
            target_folder=_CITYSCAPES,
            open_source=gta5.train,
            open_target=_cityscapes_target,
        ),
        Published(
            name="synthia2city",
            description="SYNTHIA-RAND-CITYSCAPES to Cityscapes, means over 16 and 13 of 19 network outputs",
            classes=CITYSCAPES_19,
            protocols={"16": PROTOCOLS["16"], "13": PROTOCOLS["13"]},
            shapes=_city_shapes((1280, 720), (1280, 760)),
            bonnet=_BONNET,
            sure=0.9,
            regular=0.0,
            batches=(1, 5),
            norm_images=(1, None),
            rates=(1e-4, 1e-4),
            source_folder=_SYNTHIA,
            target_folder=_CITYSCAPES,
            open_source=synthia.train,
            open_target=_cityscapes_target,
        ),
        Published(
            name="city2robot",
            description="Cityscapes to Oxford RobotCar, 9 classes",
            classes=ROBOTCAR_9,
            protocols={"9": PROTOCOLS["9"]},
            shapes=Shapes(
                source=(1280, 720),
                target=(1280, 960),
                target_again=(1280, 960),
                crops=((1024, 512), (512, 256)),
                label_views=((1280, 960), (1600, 1200)),
                score_views=((1280, 960), (1024, 768)),
                source_jitter=(1.0, 1.0),
                published_labels=(1280, 960),
            ),
            bonnet=_BONNET,
            source_folder=_CITYSCAPES,
            target_folder=_ROBOTCAR,
            open_source=_cityscapes_source,
            open_target=_robotcar_target,
        ),
        Published(
            name="shift_only",
            description="Cityscapes to Cityscapes with other class frequencies, 19 classes",
            classes=CITYSCAPES_19,
            protocols={"19": PROTOCOLS["19"]},
            # The proportions of both are the same, or shrinking to one side would distort one of them.
            shapes=Shapes(
                source=(1280, 640),
                target=(1024, 512),
                target_again=(1280, 640),
                crops=((1024, 512), (512, 256)),
                label_views=((1024, 512), (1280, 640)),
                score_views=((1024, 512), (1280, 640)),
            ),
            bonnet=_BONNET,
            source_folder=_CITYSCAPES,
            target_folder=_cityscapes_shifted,
            open_source=cityscapes.train,
            open_target=_cityscapes_target,
            only_miniature=True,
        ),
    )
}
