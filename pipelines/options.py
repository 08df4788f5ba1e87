"""The options of a run. The sentence under a field is its help text, and the resolved tree is the run's config.toml."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import tomli_w

from actors.errors import RunError
from actors.storage import Place, local, place, tried, write_whole
from pipelines.choices import check_choices
from pipelines.recipes import recipe
from pipelines.recipes.eplc import EplcOptions
from pipelines.recipes.label_shift import LabelShiftOptions
from pipelines.recipes.meta_pseudo_labels import MetaPseudoLabelsOptions
from pipelines.recipes.mrnet import MrnetOptions
from pipelines.recipes.proda import ProdaOptions
from pipelines.recipes.rectified import RectifiedOptions
from pipelines.recipes.self_training import SelfTrainingOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE_OPTIONS: dict[str, type[Any]] = {
    "eplc": EplcOptions,
    "rectified": RectifiedOptions,
    "mrnet": MrnetOptions,
    "proda": ProdaOptions,
    "meta_pseudo_labels": MetaPseudoLabelsOptions,
    "label_shift": LabelShiftOptions,
}
"""Fields of :class:`AdaptOptions` that hold the options of a recipe, and their types."""


@dataclass(frozen=True)
class DataOptions:
    """Which data are read."""

    benchmark: str = "synthia2city"
    """Which pair of domains: gta2city, synthia2city or city2robot; or shift_only, a rendered pair that differs in
    nothing but how frequent classes are."""
    classes: int | None = None
    """Outputs of the network on the street benchmarks, gta2city and synthia2city: 19, or 16 or 13 as ProDA and FADA
    train on SYNTHIA; what the others would be is ignored, in labels to learn from and in those to score on. Default:
    the benchmark's own."""
    source: str | None = None
    """TOML file of a labelled source domain of your own, instead of a benchmark."""
    target: str | None = None
    """TOML file of the target domain. Labels, if it has any, are scored on, and learned from only if
    --target-labels names them."""
    validation: str | None = None
    """TOML file of labelled target images to score on. Default: those of --target that have labels; with it, the
    labels of --target are the oracle's, where references are trained."""
    data_root: str | None = None
    """Folder with the real datasets, or its address, s3://bucket/data or gs://bucket/data. Without it the benchmark
    runs on its rendered miniature."""
    preset: Literal["auto", "full", "mini", "tiny"] = "auto"
    """Schedule and size. auto: full on real data, mini on the miniature and on images of your own."""
    data: str = "data"
    """Folder for rendered miniatures and decoded images."""

    def __post_init__(self) -> None:
        check_choices(self)
        local(self.data, "--data", "miniatures and decoded images are mapped into memory")
        for given in (self.source, self.target, self.validation, self.data_root):
            if given is not None:
                place(given)  # says what is wrong with an address
        if (self.source is None) != (self.target is None):
            given, missing = ("source", "target") if self.target is None else ("target", "source")
            raise RunError(f"--{given} is given without --{missing}; a benchmark of your own needs both")
        if self.classes is not None and self.source is not None:
            raise RunError(
                f"--classes {self.classes} belongs to the published benchmarks; images of your own have the classes of "
                "their TOML files, so leave it out"
            )
        if self.source is not None and self.data_root is not None:
            raise RunError("--data-root belongs to the published benchmarks; leave it out, or --source and --target")
        if self.validation is not None and self.target is None:
            raise RunError("--validation belongs to images of your own; give --source and --target, too")

    @property
    def on_miniature(self) -> bool:
        """Whether the data are rendered."""
        return self.data_root is None and self.source is None

    @property
    def resolved_preset(self) -> str:
        """The preset that auto stands for."""
        if self.preset != "auto":
            return self.preset
        return "mini" if self.data_root is None else "full"


@dataclass(frozen=True)
class PriorOptions:
    """How the target's class frequencies are found, and what is done with them beside adjusting labels."""

    OPEN: ClassVar[dict[str, tuple[Any, Any]]] = {}
    """Nothing that is left open is decided by --faithful."""

    method: Literal["confusion", "em", "counts"] = "confusion"
    """How they are estimated. confusion: those that explain what the network predicts, given what it takes for what on
    source images (Lipton et al., 2018). em: the most likely ones under its own probabilities (Saerens et al., 2002),
    which must be calibrated. counts: images that show a class, as the published label-shift system counts them."""
    damping: float = 0.5
    """Share of the old estimate that is kept each time it moves, while labels are made without end."""
    floor: float = 0.1
    """Least estimate of a class, of its frequency on the source: a rare class cannot be argued away."""
    temperature: float = 1.0
    """Divides class scores before they are probabilities to estimate from; the adjustment counts as many times."""
    refine_steps: int = 0
    """Steps of classifier refinement before the first stage with pseudo labels: the classifiers alone learn from
    source images, on scores that are offset by the class frequencies. Labels are then left as they are. They come on
    top of --steps."""
    refine_rate: float | None = None
    """Learning rate of refinement. Default: ten times that of the first stage at full size, as published, and a tenth
    of it on small presets."""
    refine_over: Literal["all", "labelled"] = "all"
    """What the loss of refinement is the mean over (Q-UL-5). all: the image, as published. labelled: its labelled
    pixels."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.damping < 1:
            raise RunError(f"--prior.damping is {self.damping}; give a share from 0 to less than 1")
        if not 0 < self.floor <= 1:
            raise RunError(f"--prior.floor is {self.floor}; give a share above 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise RunError(f"--prior.temperature is {self.temperature}; give a number above 0")
        if self.refine_steps < 0:
            raise RunError(f"--prior.refine-steps is {self.refine_steps}; give a number of steps, or 0")
        if self.refine_rate is not None and not self.refine_rate > 0:
            raise RunError(f"--prior.refine-rate is {self.refine_rate}; give a rate above 0")


@dataclass(frozen=True)
class AdaptOptions(DataOptions):
    """Adapt a segmentation network from a labelled source domain to an unlabelled target domain."""

    recipe: str = "eplc"
    """Which system adapts: eplc, rectified, mrnet, proda, meta_pseudo_labels or label_shift."""
    teacher_network: str | None = None
    """Network that the recipe trains: deeplab101, proda101, bisenet18, bisenet101, fada101, fada101-modified or
    fada-vgg16; on small presets the family's small member of that name. Default: the recipe's own. mrnet, rectified and
    eplc need two heads, proda and label_shift their own."""
    student_network: str | None = None
    """Another network that learns from the recipe's: in a stage of its own after those of the recipe, and as long, from
    its labels; with meta_pseudo_labels, as the student of its last stage. It is what is scored. Default: none."""
    steps: int | None = None
    """Total optimiser steps, instead of the preset's; every stage keeps its share."""
    batch: int | None = None
    """Images of each domain in a batch, instead of the preset's."""
    scale: float = 1.0
    """Multiplies every width and height of the preset."""
    label_scale: float | None = None
    """Multiplies width and height of pseudo labels. Default: 1; at full size with --faithful they are as large as the
    published ones (2048×1024, four times the memory; with meta_pseudo_labels 1024×512)."""
    rate_scale: float = 1.0
    """Multiplies every learning rate of the preset, those of the reference runs, too."""
    rates: Literal["auto", "published", "flat"] = "auto"
    """published: heads learn ten times as fast as the backbone, its blocks three times (Q-SH-1), which suits pretrained
    weights. flat: all parts alike, which suits random ones. auto: the preset's."""
    hard_pixels: float | None = None
    """Percentile of the supervised loss, and of the plain loss on pseudo labels, below which a pixel is left out
    (hard-pixel mining); 0 learns from all. Default: 0, and with --faithful 80, or 0 with proda,
    meta_pseudo_labels and label_shift."""
    rare_weight: float | None = None
    """Weight in every loss on labels of a class with few pixels in a batch, and again of one that is rarely in any.
    Default: 2.5, and with --faithful 7, or 1 with proda and meta_pseudo_labels; with label_shift always 1."""
    norm_affine: Literal["auto", "train", "freeze"] = "auto"
    """Whether the scales and shifts of the backbone's batch norms learn in MRNet's stage I. auto: train, and freeze
    with --faithful, which presumes a pretrained backbone. For proda there is --proda.warmup-norms."""
    norm_images: int | None = None
    """Images that batch norm sees together in training; the first of them alone move the running statistics. Default:
    all of a student's batch, and at full size with --faithful as many as the published runs had on a device."""
    init: str | None = None
    """Weights to start from: a published backbone (the DeepLab init, a ResNet-101, a VGG-16), a snapshot of the whole
    network (of MRNet, EPLC, ProDA, BiSeNet or FADA), a file in stages/ of a run, or a run directory. Default:
    random."""
    student_init: str | None = None
    """The same for the network of --student-network: a backbone, as a rule; without one, for the stages of
    meta_pseudo_labels that begin anew. Default: random, or --init where that is a backbone."""
    from_stage: int = 1
    """First stage to run, of a run that starts from the weights of the stage before (--init). --steps and the preset
    go on counting the stages that are left out."""
    to_stage: int | None = None
    """Last stage to run. Default: the recipe's last."""
    held_out: int = 0
    """Source images, spread evenly, that nothing learns from; how well they are segmented is one of the signals that
    need no target label. A sweep holds some out by itself."""
    pseudo_labels: str | None = None
    """Parquet file of pseudo labels, from run.py labels, to learn from instead of teachers' labels. They are taken as
    they are: what selects or withholds labels in the recipe's options is not applied to them."""
    target_labels: str | None = None
    """Text file that names target images, one a line, whose labels are learned from, too (semi-supervised); they are
    not scored on."""
    adjust_prior: str = "auto"
    """Class frequencies of the target that pseudo labels are adjusted to, in the first stage that has any (inference
    adjustment). estimated: from the labels as they are made. A TOML file, or the name of a published table:
    gta5-original, gta5-modified, synthia-original, synthia-modified. none: they are not. auto: estimated with
    label_shift, and none with the others."""
    seed: int = 0
    """Decides initialisation, sample order, augmentation and dropout."""
    faithful: bool = False
    """Behave as the published system where the default departs from it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the student's network computes in. auto: bfloat16 on a GPU that has it, float32 elsewhere and with
    --faithful, and so of a teacher that learns. Weights, losses, labels and scores are float32 always."""
    refresh: Literal["auto", "continuous", "once"] = "auto"
    """continuous: teachers re-label without end. once: one round of labels before self-training, as published.
    auto: continuous, or once with --faithful."""
    students: int = 1
    """Student processes; they share every batch."""
    min_students: int | None = None
    """Go on with as few students as these when their nodes are lost, and with up to --students again when there is room
    (elastic training). The batch stays as large. Default: wait for a place for all of them."""
    teachers: int = 1
    """Teacher processes."""
    max_teachers: int | None = None
    """Ask for more teachers, up to these, while labels are missing or older than --label-age, and send them home again
    when fewer suffice: on a cluster with an autoscaler, nodes follow. Default: always --teachers."""
    label_age: int | None = None
    """Steps that a label may be old before it counts as backlog, and that 19 of 20 labels may be old before more
    teachers are asked for (--max-teachers). Default: those of one pass over the target images, so that a label is new
    at every visit."""
    threads: int = 1
    """CPU threads of each student and teacher."""
    references: Literal["auto", "always", "never"] = "auto"
    """Also train source-only and oracle, as long as the adapted network. auto: on the miniature only."""
    name: str | None = None
    """Name of the run directory. Default: benchmark, recipe, seed and the time of day."""
    runs: str = "runs"
    """Folder of all run directories, or its address, s3://bucket/runs or gs://bucket/runs."""
    cache: bool = True
    """Keep decoded images in the data folder (about 3 MB each at full size, and 6 MB with proda)."""
    address: str | None = None
    """Ray cluster to join: host:port of its head, or auto. Default: that of RAY_ADDRESS, which a Ray job has; else one
    is started on this machine. local: start one in any case."""
    own_nodes: Literal["auto", "always", "never"] = "auto"
    """Whether students and teachers go to nodes of their own, those with the custom resources student_node and
    teacher_node. auto: where the cluster has such nodes, or ray up may start them. always: wait until there is one of
    each. never: anywhere."""
    dashboard: bool = True
    """Serve the Ray dashboard on 127.0.0.1 while running."""
    prior: PriorOptions = field(default_factory=PriorOptions)
    """Class frequencies of the target."""
    eplc: EplcOptions = field(default_factory=EplcOptions)
    """Options of the recipe eplc."""
    rectified: RectifiedOptions = field(default_factory=RectifiedOptions)
    """Options of the recipe rectified."""
    mrnet: MrnetOptions = field(default_factory=MrnetOptions)
    """Options of the recipe mrnet, which is also stage I of eplc and rectified."""
    proda: ProdaOptions = field(default_factory=ProdaOptions)
    """Options of the recipe proda."""
    meta_pseudo_labels: MetaPseudoLabelsOptions = field(default_factory=MetaPseudoLabelsOptions)
    """Options of the recipe meta_pseudo_labels."""
    label_shift: LabelShiftOptions = field(default_factory=LabelShiftOptions)
    """Options of the recipe label_shift."""

    def __post_init__(self) -> None:
        super().__post_init__()
        place(self.runs)  # says what is wrong with an address
        for name in ("students", "teachers", "threads"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name} is {getattr(self, name)}; a run needs at least one")
        self._check_elastic()
        if self.batch is not None and self.batch < 1:
            raise RunError(f"--batch is {self.batch}; a batch needs at least one image")
        if not 0.1 <= self.scale <= 20:
            raise RunError(f"--scale is {self.scale}; give a factor from 0.1 to 20")
        if self.norm_images is not None and self.norm_images < 1:
            raise RunError(f"--norm-images is {self.norm_images}; batch norm needs at least one image")
        if self.label_scale is not None and not 0.1 <= self.label_scale <= 4:
            raise RunError(f"--label-scale is {self.label_scale}; give a factor from 0.1 to 4")
        if not 0.001 <= self.rate_scale <= 1000:
            raise RunError(f"--rate-scale is {self.rate_scale}; give a factor from 0.001 to 1000")
        if self.pseudo_labels is not None and self.refresh == "continuous":
            raise RunError("--pseudo-labels are one round that nobody makes anew; leave --refresh continuous out")
        if self.hard_pixels is not None and not 0 <= self.hard_pixels < 100:
            raise RunError(f"--hard-pixels is {self.hard_pixels:g}; give a percentile from 0 to less than 100")
        if self.rare_weight is not None and not 1 <= self.rare_weight <= 100:
            raise RunError(f"--rare-weight is {self.rare_weight:g}; give a factor from 1 to 100")
        if self.from_stage < 1:
            raise RunError(f"--from-stage is {self.from_stage}; stages are counted from 1")
        if self.from_stage > 1 and self.init is None:
            raise RunError(f"--from-stage {self.from_stage} needs --init with the weights of the stage before")
        if self.to_stage is not None and self.to_stage < self.from_stage:
            raise RunError(f"--to-stage is {self.to_stage}, before --from-stage {self.from_stage}; no stage would run")
        if self.student_init is not None and self.student_network is None and not recipe(self.recipe).own_student:
            raise RunError("--student-init belongs to --student-network; give that, too, or --init")
        if self.prior.refine_steps and self.resolved_adjust_prior is None:
            raise RunError(
                "--prior.refine-steps refines classifiers to the target's class frequencies, and --adjust-prior says "
                "none; give --adjust-prior estimated, a table or a file"
            )
        if self.held_out < 0:
            raise RunError(f"--held-out is {self.held_out}; give a number of images, or 0")
        chosen = getattr(self, self.recipe, None)
        if isinstance(chosen, SelfTrainingOptions):
            chosen.check_refresh(self.resolved_refresh)
        if self.seed < 0:
            raise RunError(f"--seed is {self.seed}; give a number that is not negative")

    def _check_elastic(self) -> None:
        """Numbers of processes that may change in a run."""
        if self.min_students is not None and not 1 <= self.min_students <= self.students:
            raise RunError(
                f"--min-students is {self.min_students} and --students {self.students}; give at least 1 and at most "
                "--students"
            )
        if self.max_teachers is not None and self.max_teachers < self.teachers:
            raise RunError(
                f"--max-teachers is {self.max_teachers}, fewer than --teachers {self.teachers}; give at least as many"
            )
        if self.label_age is not None and self.label_age < 1:
            raise RunError(f"--label-age is {self.label_age}; give a number of steps of at least 1")

    @property
    def most_teachers(self) -> int:
        """Teacher processes that there may be at a time."""
        return self.teachers if self.max_teachers is None else self.max_teachers

    @property
    def OPEN(self) -> dict[str, tuple[Any, Any]]:  # noqa: N802
        """What an option that is left open stands for: in our default, and in the published system of the recipe."""
        chosen = recipe(self.recipe)
        hard, rare = zip(chosen.term, chosen.published_term, strict=True)
        return {
            "hard_pixels": hard,
            "rare_weight": rare,
            "norm_affine": ("train", "freeze"),
        }

    @property
    def resolved_refresh(self) -> Literal["continuous", "once"]:
        """The refresh that auto stands for."""
        if self.refresh != "auto":
            return self.refresh
        return "once" if self.faithful or self.pseudo_labels is not None else "continuous"

    @property
    def resolved_adjust_prior(self) -> str | None:
        """What auto stands for; None for none."""
        wanted = self.adjust_prior
        if wanted == "auto":
            wanted = "estimated" if recipe(self.recipe).adjusts else "none"
        return None if wanted == "none" else wanted

    @property
    def resolved_precision(self) -> Literal["auto", "float32", "bfloat16"]:
        """As asked for; the published runs computed in float32."""
        return "float32" if self.precision == "auto" and self.faithful else self.precision

    def folder(self) -> Place:
        """The run directory, absolute.

        Raises:
            RunError: the options name no run yet.
        """
        if self.name is None:
            raise RunError("this run has no name yet")
        return place(self.runs).absolute() / self.name


GROUPS: dict[str, type[Any]] = {"prior": PriorOptions, **RECIPE_OPTIONS}
"""Fields of :class:`AdaptOptions` that hold options of their own, and their types."""


def command_line(options: AdaptOptions) -> str:
    """The command that repeats a run: every option that is not at its default, but neither name nor place."""
    parts = ["python", "run.py", *([] if options.source is not None else ["--benchmark", options.benchmark])]
    for prefix, given in (("", options), *((f"{name}.", getattr(options, name)) for name in GROUPS)):
        for item in dataclasses.fields(given):
            value = getattr(given, item.name)
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            if value == default or item.name in (*GROUPS, "benchmark", "name", "runs"):
                continue
            flag = f"{prefix}{item.name}".replace("_", "-")
            if isinstance(value, bool):
                parts.append(f"--{flag}" if value else f"--{prefix}no-{item.name}".replace("_", "-"))
            else:
                parts += [f"--{flag}", str(value)]
    return shlex.join(parts)


def write_config(options: AdaptOptions) -> None:
    """Write the resolved options beside the run.

    Raises:
        RunError: the store that it is in refuses, or cannot be reached.
    """
    tried("the run directory cannot be written", lambda: write_options(options.folder() / "config.toml", options))


def write_options(path: Place, options: AdaptOptions, comment: str = "") -> None:
    """Write options as TOML, below a comment, by rename: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    write_whole(path, head + tomli_w.dumps(_without_none(dataclasses.asdict(options))))


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    """TOML has no word for None: what is left out has its default."""
    return {
        key: _without_none(item) if isinstance(item, dict) else item for key, item in value.items() if item is not None
    }


def read_config(folder: str | Place) -> AdaptOptions:
    """Options of an existing run.

    Raises:
        RunError: the folder is no run, its config has an option that this version does not know, or the store that it
            is in cannot be reached.
    """
    folder = place(folder).absolute()
    path = folder / "config.toml"
    if not tried("the run cannot be opened", path.is_file):
        raise RunError(f"{folder} is no run directory: it has no config.toml. Give a folder that a run printed.")
    return dataclasses.replace(read_options(path), runs=str(folder.parent), name=folder.name)


Options = TypeVar("Options", bound=AdaptOptions)


def read_options(path: str | Place, kind: type[Options] = AdaptOptions) -> Options:  # type: ignore[assignment]
    """Options in a file that :func:`write_options` wrote, or somebody by hand.

    Raises:
        RunError: there is no such file, or it has an option or a value that this version does not know.
    """
    try:
        plain: dict[str, Any] = tomllib.loads(place(path).read_text(encoding="utf-8"))
        nested: dict[str, Any] = {name: group(**plain.pop(name, {})) for name, group in GROUPS.items()}
        return kind(**plain, **nested)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    except (TypeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{path} cannot be read by this version: {error}") from error
