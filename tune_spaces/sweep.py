"""A sweep from its first process to its result: share a stage I, let Ray Tune run the trials, keep what they say."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.tune_config import ResumeConfig

from actors.checkpoints import CheckpointStore
from actors.errors import RunError, last_line
from actors.storage import place
from models.label_free import NEED_SOURCE
from pipelines import cluster, placement
from pipelines.adapt import Manner, adapt
from pipelines.options import AdaptOptions, read_config, write_options
from pipelines.placement import DATA_CPUS, HEAD, Capacity, Shares
from pipelines.results import versions
from pipelines.setup import resolve
from tune_spaces.options import CONFIG, ORACLE, SweepOptions
from tune_spaces.page import write_page
from tune_spaces.record import SweepRecord, TrialRecord
from tune_spaces.space import Space, shipped, with_point
from tune_spaces.trial import STOPPING, Trial

SPACE = "space.toml"
BEST = "best.toml"
MOST_HELD_OUT = 64
RETRIES = 1

Watch = Callable[[str, dict[str, Any]], None]
"""Called with what happens: what a run tells (:data:`pipelines.adapt.Watch`), and ``("trials",
{"record", "trial"})``."""


@dataclass
class SweepOutcome:
    """How a sweep ended."""

    folder: Path
    record: SweepRecord | None = None
    best: Path | None = None
    page: Path | None = None
    stopped: bool = False


def sweep(options: SweepOptions, watch: Watch, *, resume: bool = False) -> SweepOutcome:
    """Run a sweep.

    Args:
        options: what to search.
        watch: told what happens.
        resume: continue the sweep of that name; its finished trials stay as they are.

    Raises:
        RunError: something the user gave cannot work; nothing has been started then.
        DataError: the data are not as expected.
    """
    options = _with_places(options)
    folder = options.folder()
    space, left_out = options.read_space(folder / SPACE if resume else None)
    count = options.trials(space)
    if not resume and folder.exists():
        raise RunError(
            f"{folder} exists already: continue it with run.py tune --resume {folder}, or give another --name"
        )
    # What cannot work is refused before anything is written or started.
    whole = options.run_options() if options.shares_stage_one else options.trial_options()
    setup = resolve(dataclasses.replace(whole, references="never"))
    setup.open_given()
    for why in left_out:
        watch("message", {"text": f"not searched: {why}"})
    if options.metric in NEED_SOURCE and not options.held_out:
        options = _with_held_out(options, len(setup.domains.source), watch)
    if options.scores_target and setup.domains.validation is None:
        if options.metric == ORACLE or options.oracle == "always":
            setup.make_scorer()  # says what is missing
        options = dataclasses.replace(options, oracle="never")
    watch("phase", {"name": "start", "text": "starting Ray", "folder": str(folder)})
    used = cluster.start(options)
    if used.sentence:
        watch("message", {"text": used.sentence})
    teachers = options.teachers if setup.labels and options.pseudo_labels is None else 0
    room = Room.of(options, placement.capacity(), teachers, setup.learners)
    watch("message", {"text": room.sentence})
    if not resume:
        folder.mkdir(parents=True)
        write_options(folder / CONFIG, options)
        source = shipped(options.recipe) if options.space is None else Path(options.space)
        (folder / SPACE).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    outcome = SweepOutcome(folder)
    if options.shares_stage_one and not _stage_one(options, watch):
        outcome.stopped = True
        return outcome
    (folder / STOPPING).unlink(missing_ok=True)  # of a sweep that was killed while it stopped
    outcome.record = record = SweepRecord(folder, _about(options, setup.data, setup.benchmark.name))
    watch("phase", {"name": "trials", "text": f"{count} trials"})
    known = _tune(options, space, count, room, record, watch, resume=resume)
    record.forget_all_but(known)
    if options.keep == "best":
        record.forget_weights()  # a trial that was ended early has saved once more
    (folder / STOPPING).unlink(missing_ok=True)
    record.interrupted()
    open_ones = [t for t in record.trials.values() if t.status == "open"]
    outcome.stopped = bool(open_ones) or len(record.trials) < count
    best = record.best()
    if best is not None:
        outcome.best = write_best(options, best, len(record.trials))
    outcome.page = write_page(folder, space)
    return outcome


@dataclass(frozen=True)
class Room:
    """What a trial needs and how many fit.

    Attributes:
        bundles: of a trial's placement group; the first is its own process's.
        at_once: trials that run side by side.
        sentence: why as many.
    """

    bundles: list[dict[str, float]]
    at_once: int
    sentence: str

    @staticmethod
    def of(options: SweepOptions, capacity: Capacity, teachers: int, learners: int = 0) -> Room:
        """Count.

        Args:
            options: of the sweep.
            capacity: of the cluster.
            teachers: of a trial; 0 where it makes no labels.
            learners: teachers of a trial that learn.

        Raises:
            RunError: not one trial fits, or the user wants more at a time than fit.
        """
        parts, teachers = placement.shares(options, capacity, learners), teachers + learners
        # One student runs in the trial's own process; several are Ray Train's, in a placement group of their own.
        own = parts.student if options.students == 1 else {"CPU": 0.01}
        needs = _needs(options, parts, teachers)
        fit = min(int(capacity.total.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items() if amount)
        words = " and ".join(f"{amount:g} {name}s" for name, amount in needs.items() if amount)
        has = " and ".join(f"{capacity.total.get(name, 0.0):g}" for name, amount in needs.items() if amount)
        why = (
            f"each needs {words} ({_many(options.students, 'student')} × {parts.student['CPU']:g}, "
            f"{_many(teachers, 'teacher')} × {parts.teacher['CPU']:g}, evaluator {parts.evaluator['CPU']:g}, "
            f"reading {DATA_CPUS:g}), and Ray counts {has} here"
        )
        if not fit:
            raise RunError(
                f"not one trial fits: {why}. Use fewer --teachers or --threads, or a larger cluster (--address)."
            )
        wanted = options.max_concurrent
        if wanted is not None and wanted > fit:
            raise RunError(
                f"--max-concurrent is {wanted}, but only {_many(fit, 'trial')} can run at a time: {why}. Give at "
                f"most {fit}, fewer --teachers or --threads, or a larger cluster (--address)."
            )
        at_once = fit if wanted is None else wanted
        # After a resume Ray Tune starts whatever has room: so many groups, and no more, have room on the head node.
        boards = {name: math.floor(9900 / at_once) / 10000 for name in HEAD}
        bundles = [own, *[parts.teacher] * teachers, parts.evaluator, boards]
        return Room(bundles, at_once, f"{_many(at_once, 'trial')} at a time: {why}")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _needs(options: SweepOptions, parts: Shares, teachers: int) -> dict[str, float]:
    """CPUs and GPUs of a whole trial."""

    def total(name: str) -> float:
        own = options.students * parts.student.get(name, 0.0) + teachers * parts.teacher.get(name, 0.0)
        return own + parts.evaluator.get(name, 0.0)

    return {"CPU": round(total("CPU") + DATA_CPUS, 3), "GPU": round(total("GPU"), 3)}


def searcher(options: SweepOptions, space: Space, count: int, at_once: int) -> tuple[SearchAlgorithm | Searcher, Any]:
    """Ray Tune's searcher, and what it fills the place of a point with.

    Returns:
        The searcher, and the value of ``point`` in a trial's config; ``{}`` where the searcher fills it by itself.
    """
    base = options.trial_options()
    if options.search == "grid":
        return BasicVariantGenerator(max_concurrent=at_once), ray.tune.grid_search(space.grid(base))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.search == "random":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=options.seed)
    else:
        startup = min(10, max(2, count // 2))
        sampler = optuna.samplers.TPESampler(
            seed=options.seed, n_startup_trials=startup, multivariate=True, constant_liar=at_once > 1
        )
    # A slash is a level of the config to OptunaSearch, a dot is not.
    named = {f"point/{p.name}": p.distribution() for p in space.parameters}
    first = [{f"point/{name}": value for name, value in point.items()} for point in space.first_points(base)]
    found = OptunaSearch(named, metric="score", mode="max", points_to_evaluate=first[:count], sampler=sampler)
    return ConcurrencyLimiter(found, max_concurrent=at_once), {}


def scheduler(options: SweepOptions) -> TrialScheduler:
    """Ray Tune's scheduler, which decides at the looks of a trial."""
    last, common = options.looks + 1, {"time_attr": "look", "metric": "score", "mode": "max", "grace_period": 1}
    if options.scheduler == "asha":
        return ASHAScheduler(**common, max_t=last, reduction_factor=3)
    if options.scheduler == "median":
        # Without the minimum it pauses trials while others wait, and a paused one would have to be saved by Tune.
        return MedianStoppingRule(**common, min_samples_required=3, min_time_slice=last)
    return FIFOScheduler()


class Listener(ray.tune.Callback):
    """Keeps the record of a sweep and the checkpoints of its best trial, and tells who watches.

    Args:
        record: of the sweep.
        watch: told of every change.
        keep_all: whether the checkpoints of the other trials stay, too.
    """

    def __init__(self, record: SweepRecord, watch: Watch, *, keep_all: bool) -> None:
        self.record, self.watch, self.keep_all = record, watch, keep_all

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """See :class:`ray.tune.Callback`; so the others. Ray Tune has just installed its handler of Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            return
        tunes = signal.getsignal(signal.SIGINT)

        def interrupted(number: int, frame: Any) -> None:
            (self.record.folder / STOPPING).touch()
            self.watch("message", {"text": "stopping: trials save a checkpoint (Ctrl-C again to abort)"})
            if callable(tunes):
                tunes(number, frame)

        signal.signal(signal.SIGINT, interrupted)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts."""
        self._tell(self.record.started(trial.trial_id, trial.config["point"]))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A look."""
        self._tell(self.record.looked(trial.trial_id, result["told"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The end, by itself or early."""
        self._tell(self.record.ended(trial.trial_id))
        if not self.keep_all:
            self.record.forget_weights()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A failure that is tried again."""
        self._failed(trial, again=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A failure for good."""
        self._failed(trial, again=False)

    def _failed(self, trial: Any, *, again: bool) -> None:
        if trial.trial_id not in self.record.trials:
            self.record.started(trial.trial_id, trial.config["point"])
        self._tell(self.record.failed(trial.trial_id, _error(trial), again=again))

    def _tell(self, found: TrialRecord) -> None:
        self.watch("trials", {"record": self.record, "trial": found})


def _error(trial: Any) -> str:
    """What a trial failed of, in a line."""
    # Ray Tune has just written it here; where ``get_pickled_error`` looks, it arrives later.
    path = trial.pickled_error_file
    if path is None or not Path(path).is_file():
        return "its process died"
    with open(path, "rb") as file:
        error = ray.cloudpickle.load(file)
    return "its process died" if isinstance(error, ray.exceptions.RayActorError) else last_line(error)


def _tune(
    options: SweepOptions,
    space: Space,
    count: int,
    room: Room,
    record: SweepRecord,
    watch: Watch,
    *,
    resume: bool,
) -> set[str]:
    """Let Ray Tune run the trials until they are done or the user stops it; the ids of those that it knows."""
    algorithm, point = searcher(options, space, count, room.at_once)
    # What stands in Tune's own files stands in sweep.json; it looks at its settings when it runs.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints whatever the verbosity
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    can_resume = resume and any((record.folder / "tune").glob("experiment_state-*.json"))
    before = signal.getsignal(signal.SIGINT)
    try:
        analysis = ray.tune.run(
            Trial,
            name="tune",
            storage_path=str(record.folder),
            config={"sweep": str(record.folder), "point": point},
            num_samples=1 if options.search == "grid" else count,
            search_alg=algorithm,
            scheduler=scheduler(options),
            resources_per_trial=ray.tune.PlacementGroupFactory(room.bundles),
            callbacks=[Listener(record, watch, keep_all=options.keep == "all")],
            max_failures=RETRIES,
            raise_on_failed_trial=False,
            reuse_actors=True,
            verbose=0,
            resume=True if can_resume else None,
            resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if can_resume else None,
        )
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
    return {trial.trial_id for trial in analysis.trials}


def _stage_one(options: SweepOptions, watch: Watch) -> bool:
    """Train the stage that all trials start from, unless it is there; False when the user stopped it."""
    first = options.first_stage()
    newest = CheckpointStore(first.folder() / "checkpoints").steps()
    if newest and newest[-1] == resolve(first).plan.total_steps:
        return True
    manner = Manner(brief=True, scored=options.scores_target, score_on_the_way=False)
    return not adapt(first, watch, resume=(first.folder() / "config.toml").exists(), manner=manner).stopped


def _about(options: SweepOptions, data: str, benchmark: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "recipe": options.recipe,
        "data": data,
        "metric": options.metric,
        "oracle_metric": options.metric == ORACLE,
        "search": options.search,
        "scheduler": options.scheduler,
        "seed": options.seed,
        "versions": versions(),
    }


def write_best(options: SweepOptions, best: TrialRecord, trials: int) -> Path:
    """The options of the best trial, for ``run.py --config``; the file's path."""
    shared = dataclasses.replace(options.trial_options(), name=None, runs=options.runs)
    if shared.from_stage == 1:
        shared = dataclasses.replace(shared, references=options.references)
    values = "\n".join(f"  {name} = {value}" for name, value in best.point.items())
    oracle = ", which is an oracle metric: it looks at target labels" if options.metric == ORACLE else ""
    comment = (
        f"The best of {trials} trials by {options.metric}{oracle}: trial {best.number}, {best.score:.4f}\n{values}\n"
        f"python run.py --config {options.folder() / BEST}"
    )
    if options.shares_stage_one:
        comment += (
            "\nIt starts from the stage I that all trials share; to train that, too, for example with another seed:\n"
            f"python run.py --config {options.folder() / BEST} --from-stage 1 --init {options.init} --seed 1"
        )
    path = options.folder() / BEST
    write_options(path, with_point(shared, best.point), comment)
    return path


def _with_held_out(options: SweepOptions, images: int, watch: Watch) -> SweepOptions:
    """With source images held out: those that the run that trials start from held out, or a tenth."""
    wanted = max(1, min(MOST_HELD_OUT, images // 10))
    if options.init is not None and not options.shares_stage_one:
        started = place(options.init)
        before = read_config(started).held_out if (started / "config.toml").is_file() else 0
        if before:
            return dataclasses.replace(options, held_out=before)
    if options.from_stage > 1:
        watch(
            "message",
            {
                "text": f"{wanted} source images are held out of the trials, but {options.init} may have learned from "
                "them: it flatters every trial alike. To avoid it, train that with --held-out, too."
            },
        )
    return dataclasses.replace(options, held_out=wanted)


def _with_places(options: SweepOptions) -> SweepOptions:
    """With a name, and paths that hold in every process and on every day."""
    paths = ("data", "data_root", "runs", "source", "target", "validation", "target_labels", "init", "pseudo_labels")
    given = {name: getattr(options, name) for name in paths}
    whole: dict[str, Any] = {name: str(place(path).absolute()) for name, path in given.items() if path is not None}
    if place(options.adjust_prior).is_file():
        whole["adjust_prior"] = str(place(options.adjust_prior).absolute())
    return dataclasses.replace(options, name=options.name or _default_name(options), **whole)


def _default_name(options: AdaptOptions) -> str:
    pair = options.benchmark if options.source is None else place(options.source).stem
    name = re.sub(r"[^\w.-]+", "-", pair)
    return f"sweep-{name}-{options.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
