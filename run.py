"""The command. It parses, prints and calls the pipelines; nothing else lives here."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pipelines import environment

environment.prepare()

import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402

from actors.errors import RunError, UnreadableImage  # noqa: E402
from actors.metrics import said  # noqa: E402
from actors.storage import LOCAL_OUT, StorageError, local, place, tried  # noqa: E402
from pipelines.datasets.dataset import DataError  # noqa: E402
from pipelines.options import AdaptOptions, DataOptions, read_config, read_options  # noqa: E402
from pipelines.pseudo_labels.layouts import FileLayout, FolderLayout  # noqa: E402

if TYPE_CHECKING:
    from pipelines.capacity import InTurns, SideBySide
    from pipelines.load_trial import Findings
    from pipelines.plan import CostRow
    from pipelines.pseudo_labels.exchange import Exchanged

SHOWN_MISTAKES = 20
COMMANDS = ("adapt", "tune", "evaluate", "predict", "report", "export", "labels", "prior", "plan", "data")
HELP = {
    "--resume RUN": "continue a stopped run",
    "--config FILE": "options from a file, such as a sweep's best.toml; others given beside it win",
    "tune": "search a recipe's options with Ray Tune",
    "tune --resume SWEEP": "continue a stopped sweep",
    "evaluate RUN": "score its newest checkpoint again, or a file of weights, image by image",
    "predict PATH …": "masks, overlays and confidence of your own pictures",
    "report RUN": "write its report.html again, from the files in its directory",
    "export RUN": "its weights as the code of MRNet, EPLC, ProDA, BiSeNet-MPL or FADA reads them; ONNX, torch.export",
    "labels export RUN": "pseudo labels of a run as Parquet or in another system's folders",
    "labels import DIR": "the folder of another system as a file for --pseudo-labels",
    "prior RUN": "how frequent classes are on the target, as a run's network sees it",
    "plan": "what every network and discriminator costs at a size, without a run",
    "plan --teachers M": "how fast a run would be on this machine, and how many teachers it should have",
    "data sample DIR": "two folders of rendered pictures to try all this on",
    "data check": "look at every file before a run does",
    "data prepare": "decode every file ahead of a run",
}
"""Other commands, and what they do; each has a --help of its own."""


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run from its newest checkpoint."""

    resume: str
    """Run directory."""


@dataclass(frozen=True)
class ResumeSweepOptions:
    """Continue a sweep: finished trials stay as they are, open ones go on from their checkpoints."""

    resume: str
    """Folder of the sweep."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score the newest checkpoint of a run again, or a file of weights, without training.

    Writes into the folder evaluation, of a run in its directory: per_image.csv (IoU of every class in every image),
    confusion.csv, and worst, the ten worst images with their labels.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run directory; or a whole network in a published layout: MRNet's or EPLC's GTA5_25000.pth, ProDA's
    from_gta5_to_cityscapes_on_deeplabv2_best_model.pkl, a BiSeNet's …_best_model_….pth, FADA's g2c_adv.pth. Which
    system's it is, and of how many classes, is seen in the file; it is scored as that system scores."""
    validation: str | None = None
    """TOML file of labelled target images to score on, of a run on images of your own. Default: those of the run."""
    benchmark: str | None = None
    """Of a file: whose validation images it is scored on. Default: synthia2city."""
    data_root: str | None = None
    """Of a file: folder with the real datasets. Without it, it is scored on the rendered miniature."""
    preset: Literal["auto", "full", "mini", "tiny"] | None = None
    """Of a file: which network it is, and at which sizes it looks at images. Default: full on real data, mini on the
    miniature."""
    pixels: Literal["bgr_mean", "rgb_unit", "rgb_imagenet", "bgr_vgg", "bgr_city", "bgr_gray"] | None = None
    """Of a file: what the network reads. Default: what its system reads; of a published BiSeNet, which is told by its
    second copy of the backbone, bgr_city. An export of ours made with --faithful needs bgr_city."""
    adjust_prior: str = "none"
    """Class frequencies of the target that predictions are adjusted to (inference adjustment), for a network that has
    learned from the source's: one that learned from adjusted labels knows them already. estimated: now, from unlabelled
    target images. A TOML file, or the name of a published table: gta5-original, gta5-modified,
    synthia-original, synthia-modified. none: they are not."""
    out: str = "evaluation"
    """Of a file: folder for what is written."""

    def data(self) -> dict[str, str]:
        """What was given of the data."""
        given = {"benchmark": self.benchmark, "data_root": self.data_root, "preset": self.preset}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class PredictOptions:
    """Predict pictures of any size: for each a mask (class ids), a colour mask, an overlay and the confidence."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, or patterns in quotes."""
    run: str | None = None
    """Run directory whose newest checkpoint predicts. Default: the run that saved one last."""
    runs: str = "runs"
    """Folder of all run directories."""
    weights: Literal["last", "recommended"] = "last"
    """last: the newest checkpoint. recommended: the step that looks best without labels."""
    model: str | None = None
    """An exported model instead of a run: a file of run.py export --layout onnx or torch, its JSON file beside it. It
    looks at a picture once, on the CPU. Open a .pt2 file only if it is your own: torch can execute what is in it."""
    out: str = "predictions"
    """Folder for the results."""
    adjust_prior: str = "none"
    """Class frequencies that predictions are adjusted to. estimated: what run.py prior RUN wrote. A TOML file, or the
    name of a published table: gta5-original, gta5-modified, synthia-original, synthia-modified. none: they are not."""
    passes: int = 0
    """Monte-Carlo dropout passes; more than 1 adds a heat map of the uncertainty. 10 is a good number."""
    threads: int | None = None
    """CPU threads. Default: all cores."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise RunError("predict needs at least one picture, folder or pattern")
        given = {"--run": self.run, "--runs": self.runs != "runs", "--weights": self.weights != "last"}
        of_run = [name for name, value in {**given, "--passes": self.passes}.items() if value]
        if self.model is not None and of_run:
            raise RunError(
                f"{' and '.join(of_run)} cannot go with --model: an exported model is one network without its dropout, "
                "and knows no run; leave out one or the other"
            )
        if self.passes < 0 or self.passes == 1:
            raise RunError(f"--passes is {self.passes}; give 0 for no uncertainty, or at least 2")
        if self.threads is not None and self.threads < 1:
            raise RunError(f"--threads is {self.threads}; give at least 1")


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html of a run again from the files in its directory, whether it has ended or not."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""


@dataclass(frozen=True)
class ExportOptions:
    """Write the weights of a run in the layout of a published system, or its whole network as ONNX or torch.export."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    out: str
    """Folder for the file, and for what goes with it."""
    layout: Literal["auto", "mrnet", "proda", "bisenet", "fada", "onnx", "torch"] = "auto"
    """mrnet: a flat state dict, GTA5_<step>.pth, as MRNet's and EPLC's, the opts.yaml that their code reads beside it,
    and the discriminators of a checkpoint of stage I. proda:
    from_<source>_to_<target>_on_deeplabv2_<step>_model.pkl, with the discriminator of a warm-up in it, and
    prototypes_on_<target>_from_deeplabv2. bisenet: bisenet_<step>.pth, with the discriminator if there is one. fada:
    fada_<step>.pth, likewise. auto: that of the run's own system. onnx, torch: <run>_<step>.onnx or .pt2, the whole
    network: RGB images of 0 to 255, float32 1×3×height×width, to class scores; and a JSON file with size, classes and
    colours. Each is compared with the network before it stays. onnx needs pip install 'tutelage[export]'."""
    weights: Literal["last", "recommended"] = "last"
    """last: of the newest checkpoint. recommended: of the step that looked best without labels."""
    size: tuple[int, int] | None = None
    """Of onnx and torch: width and height of the images. Default: the largest that the run is scored at."""
    dynamic: bool = False
    """Of onnx and torch: any number of images of any size from 64×64 on; predict then shows it each picture in its own
    proportions, with as many pixels as --size has."""


@dataclass(frozen=True)
class ExportLabelsOptions:
    """Label the target images of a run as its teachers would now, and write the pseudo labels."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    out: str
    """Folder for the labels; for parquet a file."""
    layout: FileLayout = "parquet"
    """How they are written. parquet: for --pseudo-labels, or to read with any library. The others: as that system
    keeps them."""
    weights: Literal["last", "recommended"] = "last"
    """last: of the newest checkpoint. recommended: of the step that looked best without labels."""
    threads: int | None = None
    """CPU threads. Default: all cores."""


@dataclass(frozen=True)
class ImportLabelsOptions(DataOptions):
    """Read the pseudo labels that another system wrote for the target images of a benchmark."""

    folder: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    """Folder of the labels."""
    layout: FolderLayout = tyro.MISSING
    """Whose they are."""
    out: str = tyro.MISSING
    """Parquet file to write, for --pseudo-labels."""


@dataclass(frozen=True)
class EstimatePriorOptions:
    """Estimate how frequent the classes are on a run's target images with its network, and write it as TOML.

    The file is what --adjust-prior takes. Target labels, where there are any, are shown beside and take no part.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    method: Literal["confusion", "em", "counts"] = "confusion"
    """confusion: the frequencies that explain what the network predicts, given what it takes for what on source images
    (Lipton et al., 2018). em: the most likely ones under its own probabilities (Saerens et al., 2002), which must be
    calibrated. counts: images that show a class, as the published label-shift system counts them."""
    out: str | None = None
    """File to write. Default: prior.toml in the run directory, where predict --adjust-prior estimated looks."""
    weights: Literal["last", "recommended"] = "last"
    """last: of the newest checkpoint. recommended: of the step that looked best without labels."""
    threads: int | None = None
    """CPU threads. Default: all cores."""


@dataclass(frozen=True)
class PlanOptions:
    """What every published network and discriminator costs at a size: parameters, operations, memory for activations.

    Runs nothing and needs no data. Memory is what one pass keeps beside the weights, the images and the gradients of
    the weights, without a loss and without what a convolution takes for itself.

    With --students or --teachers plan measures this machine instead: run.py plan --teachers 1 --help.
    """

    size: tuple[int, int] = (1024, 512)
    """Width and height of the images."""
    batch: int = 1
    """Images."""
    classes: int = 19
    """Classes that the networks score."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights, images and activations. A student's bfloat16 keeps some maps in float32 and takes more."""


@dataclass(frozen=True)
class CapacityOptions(AdaptOptions):
    """What a run with so many students and teachers would come to on this machine, and how many teachers to take.

    Measures students, teachers and evaluator beside each other for some seconds, without Ray, and predicts step time,
    age of the labels, object store and duration; and the same for a run that trains and labels in turns. Takes the
    options of a run. --label-age is here what the median label may be old; default: the steps in which every target
    image is visited twice, which costs no accuracy (docs/staleness.md).
    """


@dataclass(frozen=True)
class SampleOptions:
    """Render two folders of street pictures, with the TOML files that describe them, to try things on."""

    folder: Annotated[str, tyro.conf.Positional]
    """Where they are written; a folder that does not exist yet."""
    size: Literal["tiny", "mini"] = "mini"
    """tiny: a few pictures. mini: as many as the demo has."""


@dataclass(frozen=True)
class CheckOptions(DataOptions):
    """Read every image and label once: counts, sizes, class shares, and everything that is wrong.

    Exits with 1 if something is.
    """

    out: str = "data-check"
    """Folder for four overlays of labels on their images."""


@dataclass(frozen=True)
class PrepareOptions(DataOptions):
    """Decode every file that a run reads, at every size it reads it at. A run does so itself on first use."""

    recipe: str = "eplc"
    """Recipe of the run: eplc, rectified, mrnet, proda, meta_pseudo_labels or label_shift."""
    scale: float = 1.0
    """Scale of the run."""


SHOWN: tuple[str, ...] = (
    "train/stage",
    "train/loss",
    "train/images_per_s",
    "train/wait_share",
    "teachers/labels_made",
    "teachers/coverage",
    "teachers/idle_share",
    "train/label_age_steps_p50",
    "train/label_age_steps_p95",
)
"""What the terminal says of a run that adapts, by the names of the numbers."""
SHOWN_OF_REFERENCES: tuple[str, ...] = ("train/loss", "train/images_per_s")


class Screen:
    """What a run looks like in a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self.task: TaskID | None = None
        self.kinds: tuple[str, ...] = ("train",)

    def __call__(self, kind: str, what: dict[str, Any]) -> None:
        """Told by the pipeline what happens."""
        if kind == "message":
            self.console.print(what["text"], highlight=False, markup=False)
        elif kind == "phase":
            self._phase(what)
        elif self.task is not None:
            self._progress(self.task, what)

    def _phase(self, what: dict[str, Any]) -> None:
        if self.task is not None:
            self.bar.stop_task(self.task)
        self.task = None
        if "folder" in what:
            self.console.print(f"run directory: {what['folder']}", highlight=False, markup=False)
        if "steps" not in what:
            self.console.print(f"[dim]{what['text']} …[/dim]")
            return
        self.kinds = ("train",) if what["name"] == "adapt" else ("train:source_only", "train:oracle")
        self.bar.start()
        self.task = self.bar.add_task(what["text"], total=what["steps"], numbers="starting processes")

    def _progress(self, task: TaskID, newest: dict[str, Any]) -> None:
        lines = [newest[kind] for kind in self.kinds if kind in newest]
        if not lines:
            return
        line = min(lines, key=lambda item: item["step"])
        trained = {**line, "images_per_s": sum(item["images_per_s"] for item in lines)}
        if self.kinds == ("train",):
            seen, names = {**newest, "train": trained, "teachers": newest.get("teachers") or {}}, SHOWN
        else:
            seen, names = {"train": trained}, SHOWN_OF_REFERENCES
        parts = said(seen, *names)
        if "score" in seen:
            parts.append(f"{said(seen, 'score/miou')[0]} (step {seen['score']['step']}, oracle metric)")
        self.bar.update(task, completed=line["step"], numbers=" · ".join(parts))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.stop()


def main(arguments: list[str]) -> int:
    """Run a command line.

    Returns:
        0 when it did what was asked, 2 when something given cannot work, 130 when the user stopped it.
    """
    console = Console(soft_wrap=True)
    try:
        return _dispatch(arguments, console)
    except (RunError, DataError, UnreadableImage, StorageError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", highlight=False, markup=False, style="red")
        return 2
    except KeyboardInterrupt:
        trains = arguments[:1] in ([], ["adapt"], ["tune"]) or arguments[0].startswith("-")
        console.print("aborted" + ("; the last checkpoint is what a resume continues from" if trains else ""))
        return 130


def _dispatch(arguments: list[str], console: Console) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("", arguments)
    if command == "tune":
        return _tune(rest, console)
    if command == "evaluate":
        return _evaluate(tyro.cli(EvaluateOptions, prog="run.py evaluate", args=rest), console)
    if command == "predict":
        return _predict(tyro.cli(PredictOptions, prog="run.py predict", args=rest), console)
    if command == "report":
        return _report(tyro.cli(ReportOptions, prog="run.py report", args=rest), console)
    if command == "export":
        return _export(tyro.cli(ExportOptions, prog="run.py export", args=rest), console)
    if command == "labels":
        return _labels(rest, console)
    if command == "prior":
        return _prior(tyro.cli(EstimatePriorOptions, prog="run.py prior", args=rest), console)
    if command == "plan":
        return _plan(rest, console)
    if command == "data":
        return _data(rest, console)
    if command not in ("", "adapt"):
        raise RunError(f"unknown command {command!r}; known are {', '.join(COMMANDS)}")
    if any(item == "--resume" or item.startswith("--resume=") for item in rest):
        resume = tyro.cli(ResumeOptions, prog="run.py", args=rest)
        return _adapt(read_config(resume.resume), console, resume=True)
    others = "\n".join(f"  run.py {usage:<19} {what}" for usage, what in HELP.items())
    description = f"{AdaptOptions.__doc__}\n\nOther commands:\n{others}"
    config, rest = _config(rest)
    base = AdaptOptions() if config is None else read_options(config)
    return _adapt(tyro.cli(AdaptOptions, prog="run.py", description=description, args=rest, default=base), console)


def _config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file after ``--config``, if there is one, and the other arguments."""
    for at, item in enumerate(arguments):
        if item.startswith("--config="):
            return item.removeprefix("--config="), [*arguments[:at], *arguments[at + 1 :]]
        if item == "--config":
            if at + 1 == len(arguments):
                raise RunError("--config needs a file, such as the best.toml of a sweep")
            return arguments[at + 1], [*arguments[:at], *arguments[at + 2 :]]
    return None, arguments


def _data(arguments: list[str], console: Console) -> int:
    command, rest = arguments[0] if arguments else "", arguments[1:]
    if command == "sample":
        return _sample(tyro.cli(SampleOptions, prog="run.py data sample", args=rest), console)
    if command == "check":
        return _check(tyro.cli(CheckOptions, prog="run.py data check", args=rest), console)
    if command == "prepare":
        return _prepare(tyro.cli(PrepareOptions, prog="run.py data prepare", args=rest), console)
    raise RunError("data needs one of: sample, check, prepare")


def _labels(arguments: list[str], console: Console) -> int:
    command, rest = arguments[0] if arguments else "", arguments[1:]
    if command == "export":
        return _export_labels(tyro.cli(ExportLabelsOptions, prog="run.py labels export", args=rest), console)
    if command == "import":
        return _import_labels(tyro.cli(ImportLabelsOptions, prog="run.py labels import", args=rest), console)
    raise RunError("labels needs one of: export, import")


def _adapt(options: AdaptOptions, console: Console, *, resume: bool = False) -> int:
    from pipelines.adapt import adapt  # Ray and torch take seconds that a wrong option should not cost

    began = time.monotonic()
    screen = Screen(console)
    try:
        outcome = adapt(options, screen, resume=resume)
    finally:
        screen.close()
    if outcome.stopped:
        console.print(f"stopped. Continue with:\n  python run.py --resume {outcome.folder}", highlight=False)
        return 130
    assert outcome.results is not None
    print_table(outcome.results, console)
    console.print(
        f"{time.monotonic() - began:.0f} s in all, adaptation {outcome.seconds['adapt']:.0f} s. "
        f"Everything is in {outcome.folder}",
        highlight=False,
    )
    if outcome.report is not None:
        console.print(f"Open this in a browser: {outcome.report}", highlight=False, markup=False)
    return 0


def _tune(arguments: list[str], console: Console) -> int:
    from tune_spaces.options import SweepOptions, read_sweep_options

    resume = any(item == "--resume" or item.startswith("--resume=") for item in arguments)
    if resume:
        options = read_sweep_options(tyro.cli(ResumeSweepOptions, prog="run.py tune", args=arguments).resume)
    else:
        config, rest = _config(arguments)
        base = SweepOptions() if config is None else read_options(config, SweepOptions)
        options = tyro.cli(SweepOptions, prog="run.py tune", args=rest, default=base)
    from tune_spaces.sweep import sweep
    from tune_spaces.terminal import SweepScreen, print_sweep

    began = time.monotonic()
    screen = SweepScreen(console, Screen(console))
    try:
        outcome = sweep(options, screen, resume=resume)
    finally:
        screen.close()
    if outcome.record is not None:
        print_sweep(outcome.record, console)
    if outcome.page is not None:
        console.print(f"Open this in a browser: {outcome.page}", highlight=False, markup=False)
    if outcome.stopped:
        console.print(f"stopped. Continue with:\n  python run.py tune --resume {outcome.folder}", highlight=False)
        return 130
    console.print(f"{time.monotonic() - began:.0f} s in all. Everything is in {outcome.folder}", highlight=False)
    if outcome.best is None:
        console.print("no trial has finished with a score", style="red")
        return 1
    console.print(f"The best one again:\n  python run.py --config {outcome.best}", highlight=False)
    return 0


def _evaluate(options: EvaluateOptions, console: Console) -> int:
    from pipelines.rescore import label_lines, rescore, score_file

    if tried("what is to be scored cannot be opened", place(options.run).is_file):
        if options.validation is not None:
            raise RunError("--validation belongs to a run on images of your own, and this is a file of weights")
        results = score_file(options.run, options.data(), options.out, options.pixels, options.adjust_prior)
        print_table(results, console)
        console.print("\n".join(label_lines(results)), highlight=False, markup=False)
        console.print(f"every class in every image: {Path(options.out).absolute() / 'per_image.csv'}")
        return 0
    if options.data():
        raise RunError(
            f"--{next(iter(options.data())).replace('_', '-')} belongs to a file of weights; a run knows its own"
        )
    if options.pixels is not None:
        raise RunError("--pixels belongs to a file of weights; a run knows its own")
    config = read_config(options.run)
    if options.validation is not None:
        config = dataclasses.replace(config, validation=options.validation)
    results = rescore(config, options.adjust_prior)
    print_table(results, console)
    console.print("\n".join(label_lines(results)), highlight=False, markup=False)
    folder = place(options.run).absolute() / "evaluation"
    console.print(f"every class in every image: {folder / 'per_image.csv'}; the worst: {folder / 'worst'}")
    return 0


def _predict(options: PredictOptions, console: Console) -> int:
    from pipelines.predict import predict

    with _progress(console) as bar:
        task = bar.add_task("predicting", total=None)
        done = predict(
            options.paths,
            options.out,
            lambda made, total: bar.update(task, completed=made, total=total),
            model=options.model,
            run=options.run,
            runs=options.runs,
            weights=options.weights,
            passes=options.passes,
            threads=options.threads,
            adjust_prior=options.adjust_prior,
        )
    for sentence in done.skipped:
        console.print(f"skipped: {sentence}", highlight=False, markup=False)
    console.print(
        f"{done.pictures} pictures predicted with step {done.step} of {done.origin}, {len(done.skipped)} skipped. "
        f"Results are in {done.out}",
        highlight=False,
    )
    return 0


def _report(options: ReportOptions, console: Console) -> int:
    from pipelines.report.page import write_report

    try:
        console.print(str(write_report(options.run)), highlight=False, markup=False)
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror or error}") from error
    return 0


def _export(options: ExportOptions, console: Console) -> int:
    from pipelines.export import export

    done = export(options.run, options.out, options.layout, options.weights, size=options.size, dynamic=options.dynamic)
    beside = f"; beside it {', '.join(path.name for path in done.beside)}" if done.beside else ""
    console.print(
        f"{done.parameters:,} parameters of step {done.step} are in {done.weights}{beside}",
        highlight=False,
        markup=False,
    )
    if done.agreement is not None:
        console.print(
            f"compared with the network: class scores differ by at most {done.agreement.difference:.2g} "
            f"({done.agreement.share:.1g} of their range), and {done.agreement.changed:.4%} of the pixels change class",
            highlight=False,
        )
    return 0


def _export_labels(options: ExportLabelsOptions, console: Console) -> int:
    from pipelines.pseudo_labels.exchange import export_labels

    with _progress(console) as bar:
        task = bar.add_task("labelling", total=None)
        done = export_labels(
            options.run,
            options.out,
            options.layout,
            lambda made, total: bar.update(task, completed=made, total=total),
            weights=options.weights,
            threads=options.threads,
        )
    _print_exchanged(done, f"labelled with step {done.step}", console)
    return 0


def _import_labels(options: ImportLabelsOptions, console: Console) -> int:
    from pipelines.pseudo_labels.exchange import import_labels

    with _progress(console) as bar:
        task = bar.add_task("reading labels", total=None)
        done = import_labels(
            options,
            options.folder,
            options.layout,
            options.out,
            lambda made, total: bar.update(task, completed=made, total=total),
        )
    _print_exchanged(done, "read", console)
    return 0


def _print_exchanged(done: Exchanged, what: str, console: Console) -> None:
    for sentence in done.skipped[:SHOWN_MISTAKES]:
        console.print(f"left out: {sentence}", highlight=False, markup=False)
    console.print(
        f"{done.images} images {what}, {len(done.skipped)} left out; {done.kept:.0%} of the pixels are kept. "
        f"They are in {done.out}",
        highlight=False,
    )


def _prior(options: EstimatePriorOptions, console: Console) -> int:
    from pipelines.run_prior import estimate_of_run

    with _progress(console) as bar:
        task = bar.add_task("looking at images", total=None)
        found = estimate_of_run(
            options.run,
            options.method,
            lambda made, total: bar.update(task, completed=made, total=total),
            out=options.out,
            weights=options.weights,
            threads=options.threads,
        )
    prior = found.prior
    what = "images that show it" if options.method == "counts" else "pixels"
    table = Table(title=f"shares of the classes ({what}), {options.method}, step {found.step}")
    for name in ("", "source", "target, estimated", "added to scores"):
        table.add_column(name, justify="left" if not name else "right")
    if found.truth is not None:
        table.add_column("target's labels (pixels)", justify="right")
    for index, name in enumerate(prior.classes):
        cells = [f"{prior.source[index]:.3%}", f"{prior.target[index]:.3%}", f"{found.offset[index]:+.2f}"]
        cells += [] if found.truth is None else [f"{found.truth[index]:.3%}"]
        table.add_row(escape(name), *cells)
    console.print(table)
    console.print(f"{prior.about}; written to {found.path}", highlight=False, markup=False)
    return 0


def plans_a_run(arguments: list[str]) -> bool:
    """Whether ``plan`` is asked for a run on this machine, and not for what networks cost."""
    return any(item.split("=")[0] in ("--students", "--teachers", "--config") for item in arguments)


def _plan(arguments: list[str], console: Console) -> int:
    if plans_a_run(arguments):
        config, rest = _config(arguments)
        base = CapacityOptions() if config is None else read_options(config, CapacityOptions)
        return _capacity(tyro.cli(CapacityOptions, prog="run.py plan", args=rest, default=base), console)
    from pipelines.plan import costs

    options = tyro.cli(PlanOptions, prog="run.py plan", args=arguments)
    rows = costs(options.size, batch=options.batch, classes=options.classes, precision=options.precision)
    print_costs(options, rows, console)
    return 0


def _capacity(options: CapacityOptions, console: Console) -> int:
    from pipelines.load_trial import measure
    from pipelines.setup import resolve

    with console.status("opening the data") as status:
        setup = resolve(options)
        found = measure(setup, lambda text: status.update(f"measuring: {text}"))
    print_capacity(options, setup.preset.name, found, console)
    return 0


def print_capacity(options: CapacityOptions, preset: str, found: Findings, console: Console) -> None:
    """Predictions for every number of teachers that was tried, for taking turns, and the advice."""
    from pipelines.capacity import advise, in_turns, side_by_side

    course, measured = found.course, found.measured
    age = options.label_age or course.free_age
    rows = [side_by_side(course, measured, teachers) for teachers in found.teachers]
    turns = in_turns(course, measured, age)
    what = options.source or options.benchmark
    table = Table(
        title=f"{escape(what)}, recipe {options.recipe}, preset {preset}: {options.students} "
        f"student{'s' if options.students > 1 else ''} on {found.devices}, stage {course.stage.name}",
        caption="predicted; label age in steps, p50 / p95; object store on average / at most; all: every stage",
    )
    table.add_column("teachers")
    for name in ("step", "labels/s", "label age", "object store", "epoch", "all"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_side_cells(row))
    table.add_section()
    table.add_row(*_turn_cells(turns))
    console.print(table)
    if turns.whole:
        console.print(f"in turns a student trains on {measured.whole_devices}", highlight=False)
    for line in _measured_lines(found):
        console.print(line, highlight=False)
    advice = advise(rows, turns, age, max(0.05, measured.spread))
    console.print(f"[bold]{advice.sentence}[/bold]", highlight=False)


def _side_cells(row: SideBySide) -> tuple[str, ...]:
    return (
        str(row.teachers),
        _seconds(row.step_seconds),
        f"{row.busy * row.teachers / row.image_seconds:.1f}",
        f"{row.ages.p50:.0f} / {row.ages.p95:.0f}",
        f"{row.store.mean / 1e6:,.0f} / {row.store.most / 1e6:,.0f} MB",
        _seconds(row.epoch_seconds),
        _seconds(row.seconds),
    )


def _turn_cells(turns: InTurns) -> tuple[str, ...]:
    return (
        f"in turns, {turns.rounds} round{'s' if turns.rounds > 1 else ''}",
        _seconds(turns.step_seconds),
        f"round {_seconds(turns.round_seconds)}",
        f"{turns.age_p50:.0f} / {turns.age_p95:.0f}",
        f"{turns.store.mean / 1e6:,.0f} / {turns.store.most / 1e6:,.0f} MB",
        _seconds(turns.epoch_seconds),
        _seconds(turns.seconds),
    )


def _measured_lines(found: Findings) -> list[str]:
    """What was measured, and how far it can be trusted."""
    course, measured = found.course, found.measured
    beside = ", ".join(f"{_seconds(measured.beside[count].step_seconds)} beside {count}" for count in found.teachers)
    memory = ", ".join(
        f"{name} {used.process / 1e6:,.0f} MB" + (f" and {used.gpu / 1e6:,.0f} MB of a GPU" if used.gpu else "")
        for name, used in found.memory.items()
    )
    lines = [
        f"measured in {found.seconds:.0f} s: a step {_seconds(measured.beside[0].step_seconds)} alone, {beside} busy "
        f"teachers",
        f"labels/s {1 / measured.label_seconds:.1f} while nothing trains ({measured.labellers} at a time); a label "
        f"{course.row_bytes / 1e3:,.0f} kB, a round {course.images * course.row_bytes / 1e6:,.0f} MB, weights "
        f"{course.version_bytes / 1e6:,.0f} MB",
        f"memory of a process: {memory}",
    ]
    if found.shared:
        lines.append("students and teachers share GPUs, each with a part of one: they were measured doing so")
    if found.load > 0.25 or measured.spread > 0.25:
        lines.append(
            f"[yellow]the machine was not idle: {found.load:.0%} of its cores were busy before, and the same steps "
            f"differed by {measured.spread:.0%}; plan again when it is[/yellow]"
        )
    return lines


def _seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def print_costs(options: PlanOptions, rows: list[CostRow], console: Console) -> None:
    """Parameters, operations and memory of every network and discriminator."""
    width, height = options.size
    table = Table(
        title=f"{options.batch} × {width}×{height}, {options.classes} classes, {options.precision}",
        caption="2 operations a multiply-add; training: forward and backward pass, without loss and optimiser",
    )
    table.add_column("")
    for name in ("parameters", "GFLOPs", "inference MiB", "training MiB"):
        table.add_column(name, justify="right")
    before = rows[0].kind
    for row in rows:
        if row.kind != before:
            table.add_section()
            before = row.kind
        cost = row.cost
        memory = (f"{peak / 2**20:,.0f}" for peak in (cost.inference_bytes, cost.training_bytes))
        table.add_row(row.name, f"{cost.parameters:,}", f"{cost.flops / 1e9:,.3f}", *memory)
    console.print(table)
    for row in rows:
        if row.unused:
            console.print(
                f"{row.name}: a published file holds {row.unused:,} more, a classifier that nobody uses: "
                f"{row.cost.parameters + row.unused:,} in all",
                highlight=False,
            )


def _sample(options: SampleOptions, console: Console) -> int:
    from pipelines.data_sample import write_sample

    console.print("[dim]rendering …[/dim]")
    source, target, validation = write_sample(options.folder, options.size)
    console.print(f"labelled source: {source}\nunlabelled target: {target}\nlabelled target to score on: {validation}")
    return 0


def _check(options: CheckOptions, console: Console) -> int:
    from pipelines.data_check import check

    out = local(options.out, "--out", LOCAL_OUT)
    with _progress(console) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, made: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"reading {name}", total=total)
            bar.update(tasks[name], completed=made)

        report = check(options, out, progress)
    table = Table(title="share of each class among the labelled pixels (in how many images it occurs)")
    table.add_column("")
    for domain in report.domains:
        table.add_column(domain.name, justify="right")
    table.add_row("images", *(str(domain.images) for domain in report.domains))
    table.add_row("labels", *(str(domain.labelled) for domain in report.domains))
    table.add_row("sizes", *(_sizes(domain.sizes) for domain in report.domains))
    table.add_row("ignored", *(f"{domain.ignored_share:.1%}" if domain.labelled else "–" for domain in report.domains))
    table.add_section()
    shares = [domain.shares(len(report.classes)) for domain in report.domains]
    for index, name in enumerate(report.classes.names):
        cells = zip(report.domains, shares, strict=True)
        row = (f"{share[index]:.2%} ({found.present[index]})" if found.labelled else "–" for found, share in cells)
        table.add_row(escape(name), *row)
    console.print(table)
    if report.overlays:
        console.print(f"{len(report.overlays)} overlays are in {Path(options.out).absolute()}", highlight=False)
    for sentence in report.mistakes[:SHOWN_MISTAKES]:
        console.print(f"wrong: {sentence}", highlight=False, markup=False, style="red")
    if len(report.mistakes) > SHOWN_MISTAKES:
        console.print(f"and {len(report.mistakes) - SHOWN_MISTAKES} more of the kind")
    console.print("nothing is wrong" if not report.mistakes else f"{len(report.mistakes)} things are wrong")
    return 1 if report.mistakes else 0


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    """The commonest size, and how many others there are."""
    if not sizes:
        return "–"
    (width, height), _ = sizes.most_common(1)[0]
    others = f" and {len(sizes) - 1} others" if len(sizes) > 1 else ""
    return f"{width}×{height}{others}"


def _prepare(options: PrepareOptions, console: Console) -> int:
    from pipelines.data_prepare import prepare

    with _progress(console) as bar:
        task = bar.add_task("decoding", total=None)
        done = prepare(
            AdaptOptions(**dataclasses.asdict(options)),
            lambda made, total: bar.update(task, completed=made, total=total),
        )
    for path in done.unreadable:
        console.print(f"unreadable: {path}", highlight=False, markup=False, style="red")
    console.print(
        f"{done.entries} entries, {done.bytes / 1e6:.0f} MB, in {Path(options.data).absolute()}; "
        f"{len(done.unreadable)} files are unreadable",
        highlight=False,
    )
    return 1 if done.unreadable else 0


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def print_table(results: dict[str, Any], console: Console) -> None:
    """The final table: every score with its protocol, per class."""
    from pipelines.results import ROW_NAMES

    names = ROW_NAMES if "weights" not in results else {**ROW_NAMES, "adapted": "these weights"}
    rows = [(names[key], value) for key, value in results["scores"].items() if value]
    if rows:
        _print_scores(results, rows, console)
    else:
        console.print("no target image has a label, so nothing was scored; look at the pictures: run.py predict")
    _print_labels(results, console)
    _print_recommended(results, console)


def _print_recommended(results: dict[str, Any], console: Console) -> None:
    """The step that looks best without labels, beside the last one and never instead of it."""
    label_free = results.get("label_free") or {}
    step = label_free.get("recommended")
    if step is None:
        return
    if step == results["steps"]:
        console.print(f"without labels, the last step ({step}) also looks best", highlight=False)
        return
    score, last = label_free.get("recommended_score"), results["scores"].get("adapted")
    scored = f": mIoU {score['miou']:.1f}, the last step has {last['miou']:.1f}" if score and last else ""
    console.print(f"without labels, step {step} of {results['steps']} looks best{scored}", highlight=False)


def _print_scores(results: dict[str, Any], rows: list[tuple[str, Any]], console: Console) -> None:
    from pipelines.results import protocol_sentence, score_lines

    table = Table(
        title=f"{results['benchmark']} ({results['data']}), {_what(results)}: IoU in %",
        caption=protocol_sentence(results["protocol"]),
    )
    table.add_column("")
    for name, _ in rows:
        table.add_column(name, justify="right")
    for name in rows[0][1]["protocols"]:
        table.add_row(f"mIoU{name}", *(f"{row['protocols'][name]:.1f}" for _, row in rows), style="bold")
    table.add_section()
    for index, name in enumerate(results["class_names"]):
        cells = [row["per_class"][index] for _, row in rows]
        if any(cell is not None for cell in cells):
            table.add_row(escape(name), *("–" if cell is None else f"{cell:.1f}" for cell in cells))
    console.print(table)
    if results["scores"].get("adapted"):
        console.print("\n".join(score_lines(results)), highlight=False)
    if results.get("target_labels"):
        console.print(f"adapted also learned from the labels of {results['target_labels']} target images")
    after = results.get("stages", [])
    if len(after) > 1:
        shown = ", ".join(f"{stage['name']} {stage['miou']:.1f}" for stage in after)
        console.print(f"mIoU after each stage: {shown}", highlight=False, markup=False)
    if results.get("gap_closed") is not None:
        console.print(f"gap closed: {results['gap_closed']:.2f} of (oracle − source-only)", highlight=False)


def _what(results: dict[str, Any]) -> str:
    weights = results.get("weights")
    return f"recipe {results['recipe']}, seed {results['seed']}" if weights is None else str(weights)


def _print_labels(results: dict[str, Any], console: Console) -> None:
    ages = results.get("label_age_steps")
    if ages and ages["p50"] is not None and not results["labels"]["given"]:
        wait = results["student"]["wait_share"]
        console.print(
            f"label age in steps: p50 {ages['p50']}, p95 {ages['p95']}, max {ages['max']}; "
            f"the student waited for labels {wait:.2%} of its time",
            highlight=False,
        )
    learner = results.get("trainable_teacher")
    if learner:
        age = learner["reward_age_steps"]
        heard = "" if age is None else f"; its last reward was for labels {age} steps old"
        console.print(f"the teacher took {learner['steps']} steps beside its student{heard}", highlight=False)
    if results.get("skipped"):
        console.print(f"{len(results['skipped'])} unreadable images were skipped: {results['skipped'][0]} …")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
