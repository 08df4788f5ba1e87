"""A run from its first process to its result: start the actors, train, score, write."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

from actors.checkpoints import CheckpointStore, kept_stages, read_stage
from actors.crew import Crew
from actors.errors import RunError, UnreadableImage, last_line
from actors.label_bank import LabelBank
from actors.link import Handles, train_alone, train_here
from actors.metrics import Export
from actors.reward_board import RewardBoard
from actors.run_log import RunLog
from actors.showcase import Shown
from actors.storage import Place, place
from actors.team import SECONDS_TO_MENTION, Demand, Team
from actors.trainable_teacher import TrainableTeacher
from actors.weight_board import WeightBoard
from pipelines import cluster, placement, student_group
from pipelines.options import AdaptOptions, write_config
from pipelines.placement import HEAD, Shares, actor_options, in_words
from pipelines.pseudo_labels.given import write_given_round
from pipelines.pseudo_labels.table import Table
from pipelines.report.gallery import write_gallery
from pipelines.report.history import read_history
from pipelines.report.page import write_report
from pipelines.results import CONFUSION, after_step, assemble, write_confusion, write_json
from pipelines.setup import Setup, resolve
from pipelines.trained import check_same_classes, describe

WATCH_SECONDS = 0.5
SECONDS_TO_COPY = 60.0
"""How long the last metrics may take to where the run's files are."""

SECONDS_TO_SAVE = 30.0
"""How long a teacher that learns may take to save itself when its student has ended."""

PRIOR = ("target_prior", "prior_shift")
"""What a bank tells of the target's class frequencies while it adjusts labels to them."""

SUMS = ("labels_made", "teacher_failures")
"""Counters of the bank that start at zero with it; the run's go on."""

RECORD_SECONDS = 10.0
"""How often the bank's numbers are written down where no label is made: they tell of that, too."""

Watch = Callable[[str, dict[str, Any]], None]
"""Called with what happens: ``("phase", {...})``, ``("progress", {...})``, ``("message", {"text": ...})``."""


@dataclass(frozen=True)
class Manner:
    """How a run is carried out, apart from what it computes.

    Attributes:
        student_here: the one student runs in this process, without Ray Train: nobody starts it again when it dies.
        brief: nothing is made that only people look at: no pictures, no report, no
            TensorBoard events, no score of the recommended step.
        scored: whether anything is scored with target labels.
        score_on_the_way: whether the evaluator also scores what it looks at before the last step.
    """

    student_here: bool = False
    brief: bool = False
    scored: bool = True
    score_on_the_way: bool = True


@dataclass
class Outcome:
    """How a run ended."""

    folder: Place
    results: dict[str, Any] | None = None
    report: Place | None = None
    stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def adapt(options: AdaptOptions, watch: Watch, *, resume: bool = False, manner: Manner = Manner()) -> Outcome:
    """Run a recipe on a benchmark.

    Args:
        options: what to run.
        watch: told what happens, often; must return at once.
        resume: continue the run of that name from its newest checkpoint.
        manner: how.

    Raises:
        RunError: something the user gave cannot work.
        DataError: the data are not as expected.
    """
    began = time.monotonic()
    watch("phase", {"name": "data", "text": "opening the data"})
    setup = resolve(options)
    folder = setup.options.folder()
    if not resume and (folder / "config.toml").exists():
        raise RunError(f"{folder} holds a run already: continue it with --resume {folder}, or give another --name")
    check_same_classes(setup)
    given = setup.open_given()
    seconds = {"data": time.monotonic() - began}
    watch("phase", {"name": "start", "text": "starting Ray", "folder": setup.plan.folder})
    used = cluster.start(setup.options)
    if used.sentence:
        watch("message", {"text": used.sentence})
    with stop_on_interrupt() as interrupt:
        if setup.options.own_nodes == "always":
            placement.wait_for_nodes(lambda text: watch("message", {"text": text}), lambda: interrupt.asked)
            if interrupt.asked:
                raise KeyboardInterrupt
        parts = placement.shares(setup.options, placement.capacity(), setup.learners)
        write_config(setup.options)
        describe(setup)
        return Run(setup, parts, watch, seconds, given, manner).execute(interrupt)


class Interrupt:
    """Ctrl-C: the first one asks the run to save and return, the second one is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: Any) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_on_interrupt() -> Iterator[Interrupt]:
    """Take SIGINT and SIGTERM while a run lasts.

    Ray Train installs a handler of its own only where ``fit`` runs in the main thread; ours runs it in another.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunningSums:
    """Counters of an actor that may restart at zero, as sums over all its lives."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.before, self.last = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def carry(self, status: dict[str, Any]) -> dict[str, Any]:
        """The status with the counts of earlier lives added. A count that went backwards began a new life."""
        for name, last in self.last.items():
            if status[name] < last:
                self.before[name] += last
            self.last[name] = status[name]
        return {**status, **{name: self.before[name] + last for name, last in self.last.items()}}


class Run:
    """The processes of one run."""

    def __init__(
        self,
        setup: Setup,
        shares: Shares,
        watch: Watch,
        seconds: dict[str, float],
        given: Table | None,
        manner: Manner = Manner(),
        crew: Crew | None = None,
    ) -> None:
        self.manner, self.crew = manner, Crew() if crew is None else crew
        if not manner.scored:
            setup = replace(setup, domains=replace(setup.domains, validation=None))
        self.setup, self.shares, self.watch, self.seconds, self.given = setup, shares, watch, seconds, given
        self.seen_messages = 0
        self.teacher_status: dict[str, Any] = {}
        self.sums = RunningSums(SUMS)
        self.failing = False
        self.step = self.scored = 0
        self.scoring: Any = None
        self.awaits_student: float | None = None
        """Since when Ray Train has been looking for places; None where it is not known to be."""
        self.mentioned = False
        self.labels_first = 0 in setup.labels
        """Whether the students may wait for labels before their first step."""
        self.recorded = 0.0
        """When the bank's numbers were last written down."""
        run_log = ray.remote(RunLog).options(num_cpus=0, max_restarts=-1, resources=HEAD)
        self.run_log = run_log.remote(setup.plan.folder, events=not manner.brief, export=_export(setup))
        board = {"num_cpus": 0, "max_restarts": -1, "resources": HEAD}
        self.board = ray.remote(WeightBoard).options(**board).remote()
        self.labelling, self.rewards = self.board, None
        if setup.learners:  # whoever labels reads what the teacher publishes, and the evaluator what the student does
            self.labelling = ray.remote(WeightBoard).options(**board).remote()
            self.rewards = ray.remote(RewardBoard).options(**board).remote()
        self.learner: Any = None
        self.learning: Any = None
        """The teacher that learns, and its work."""
        # Kept, because an actor that restarts needs its arguments again. A short list travels by value: Ray prints a
        # warning for every reference among the arguments.
        images = len(setup.domains.target)
        self.reader = setup.target_reader if images < 500 else ray.put(setup.target_reader)
        self.team: Team | None = None
        self.bank: Any = None
        self.evaluator: Any = None

    def execute(self, interrupt: Interrupt) -> Outcome:
        """Train, train the references, score, write the result."""
        outcome = Outcome(place(self.setup.plan.folder), seconds=self.seconds)
        try:
            self._start_bank()
            student = self._train(interrupt)
            self._retire_teachers()
            references = None if student["stopped"] else self._train_references(interrupt)
            if references is None:
                outcome.stopped = True
            else:
                outcome.results = self._results(student, references)
        finally:
            self._end()
        if self.manner.brief:
            return outcome
        try:
            outcome.report = write_report(outcome.folder)
        except OSError as error:
            self.watch("message", {"text": f"the report cannot be written: {error.strerror or error}"})
        return outcome

    def _results(self, student: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
        """Score, and write what came out into the run directory."""
        folder, classes = place(self.setup.plan.folder), self.setup.benchmark.classes
        scores, label_free, shown = self._score(references)
        confusion = scores.get("adapted", {}).get("confusion")
        for row in [*scores.values(), label_free["recommended_score"] or {}]:
            row.pop("confusion", None)
        teachers = self.teacher_status
        self._keep_metrics(self.run_log.flush)
        if not teachers:  # resumed after its last step: no bank began, and the last one's words are in the metrics
            teachers = next(reversed(read_history(folder / "metrics.jsonl").of("teachers")), {})
        history = read_history(folder / "metrics.jsonl")
        learner = next(reversed(history.of("trainable_teacher")), None)
        # Stages after the one whose labels are adjusted know nothing of it any more.
        adjusted: dict[str, Any] = next(
            (line for line in reversed(history.of("teachers")) if "target_prior" in line), {}
        )
        teachers = {**{name: adjusted[name] for name in PRIOR if name in adjusted}, **teachers}
        results = assemble(self.setup, scores, student, teachers, self.seconds, label_free=label_free, learner=learner)
        write_json(folder / "results.json", results)
        try:
            if confusion is not None:
                write_confusion(folder / CONFUSION, classes.names, confusion)
            if not self.manner.brief:
                write_gallery(folder, shown, classes)
        except OSError as error:
            self.watch("message", {"text": f"the pictures cannot be written: {error.strerror or error}"})
        return results

    def _start_bank(self) -> None:
        setup = self.setup
        if setup.labels:
            given = {}
            if self.given is not None:
                given = {stage: self._given_round(self.given, stage) for stage in setup.labels}
            bank = ray.remote(LabelBank).options(num_cpus=0, max_restarts=-1, max_concurrency=64, resources=HEAD)
            self.bank = bank.remote(
                {stage: plan.for_bank() for stage, plan in setup.labels.items()},
                len(setup.domains.target),
                setup.label_rows(),
                self.labelling,
                folder=str(place(setup.plan.folder) / "labels"),
                given=given,
                label_age=setup.label_age,
            )

    def _given_round(self, table: Table, stage: int) -> str:
        """The user's pseudo labels as a round of a stage; the file's path."""
        setup, target = self.setup, self.setup.domains.target
        folder = str(place(setup.plan.folder) / "labels")
        made = write_given_round(table, target, setup.labels[stage], setup.label_rows()[stage], folder)
        if made.missing:
            text = f"{made.missing} of {len(target)} target images have no pseudo label in {table.path}"
            self.run_log.say.remote(text, 0)
        return made.path

    @property
    def teachers(self) -> list[Any]:
        """Those that label, or will when they have a place."""
        return [] if self.team is None else self.team.hired

    def _hire(self, count: int) -> list[Any]:
        setup, plan = self.setup, self.setup.plan
        return self.crew.teachers(
            count,
            actor_options(self.shares.teacher),
            plan.networks,
            self.reader,
            setup.labels,
            plan.seed,
            self.labelling,
            setup.options.threads,
        )

    def _start_helpers(self) -> None:
        """Start teachers and evaluator, once the students run.

        A process that imports torch takes seconds of a core; the first step should not wait for those that have
        nothing to do yet.
        """
        if self.evaluator is not None:
            return
        setup, plan = self.setup, self.setup.plan
        if self.bank is not None and self.given is None:
            options = setup.options
            demand = Demand(options.teachers, options.most_teachers, setup.label_age or 1)
            needs = in_words(self.shares.teacher)
            self.team = Team(self._hire, self.crew.dismiss, demand, needs, time.monotonic())
        if self.rewards is not None and self.bank is not None:
            kind = ray.remote(TrainableTeacher).options(
                max_restarts=-1, max_task_retries=-1, max_concurrency=2, **actor_options(self.shares.teacher)
            )
            self.learner = kind.remote(plan, self.labelling, self.rewards, self.run_log, setup.options.threads)
            self.learning = self.learner.run.remote()
        self.evaluator = self.crew.evaluator(
            actor_options(self.shares.evaluator),
            None if setup.domains.validation is None else setup.make_scorer(),
            setup.make_watcher(),
            setup.make_showcase(),
            self.reader,
            self.board,
            self.run_log,
            str(place(plan.folder) / "recommended"),
            setup.options.threads,
            setup.make_source_scorer(),
        )

    def _train(self, interrupt: Interrupt) -> dict[str, Any]:
        """The students, in a thread of their own; this one watches."""
        setup = self.setup
        began = time.monotonic()
        self._reopen_round()
        handles = Handles(
            self.board, self.bank, self.run_log, self.labelling, self.rewards, label_rows=setup.label_rows()
        )
        self.watch("phase", {"name": "adapt", "text": "adapting", "steps": setup.plan.total_steps})
        train = self._train_here if self.manner.student_here else self._train_with_ray_train
        value: dict[str, Any] = self._watched(lambda: train(handles), interrupt)
        self.seconds["adapt"] = time.monotonic() - began
        return value

    def _train_here(self, handles: Handles) -> dict[str, Any]:
        return train_here(self.setup.plan, handles, self.setup.options.threads)

    def _train_with_ray_train(self, handles: Handles) -> dict[str, Any]:
        self.awaits_student = time.monotonic()
        return student_group.train(self.setup, handles, self.shares)

    def _watched(self, work: Callable[[], Any], interrupt: Interrupt) -> Any:
        """Run something in a thread, pass on what the log hears meanwhile, and the user's wish to stop."""
        box: dict[str, Any] = {}

        def target() -> None:
            try:
                box["value"] = work()
            except BaseException as error:  # handed to the watching thread
                box["error"] = error

        thread = threading.Thread(target=target, name="work", daemon=True)
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(WATCH_SECONDS)
            if interrupt.asked and not asked:
                asked = True
                what = "saving a checkpoint" if self.awaits_student is None else "no student is at work"
                self.watch("message", {"text": f"stopping: {what} (Ctrl-C again to abort)"})
                self.run_log.request_stop.remote()
            self._look()
            if asked and self.awaits_student is not None:  # nothing to save, and who waits for a place hears nobody
                return {"step": 0, "stopped": True}
        self._look()  # what was said and counted in the last moment
        if "error" in box:
            raise _readable(box["error"]) from box["error"]
        return box["value"]

    def _look(self) -> None:
        """One glance at the log and the bank; a board that is just restarting is asked again next time."""
        try:
            seen = ray.get(self.run_log.watch.remote(self.seen_messages), timeout=5)
            if self.bank is not None:
                # A bank that was restarted hears here again whom it may call.
                present = None if self.team is None else list(self.team.present)
                status = ray.get(self.bank.status.remote(present), timeout=5)
                if self.team is not None:
                    for text in self.team.look(time.monotonic(), status):
                        self.run_log.say.remote(text, self.step)
                if status:
                    status = self.sums.carry(status)
                    if self.team is not None:
                        status["teachers_wanted"] = self.team.demand.wanted
                    self._tell_failures(status)
                    self.teacher_status = status
        except ray.exceptions.RayError:
            return
        for text in seen["messages"]:
            self.watch("message", {"text": text})
        self.seen_messages += len(seen["messages"])
        self.step = seen["newest"].get("train", {}).get("step", self.step)
        if "train" in seen["newest"] or (self.labels_first and "student" in seen["newest"]):
            self._start_helpers()
            self._score_now_and_then()
        if seen["students_lost"]:
            self.awaits_student = self.awaits_student or time.monotonic()
        elif seen["newest"].keys() & {"student", "train"}:
            self.awaits_student, self.mentioned = None, False
        waited = 0.0 if self.awaits_student is None else time.monotonic() - self.awaits_student
        if waited > SECONDS_TO_MENTION and not self.mentioned:
            self.mentioned = True
            needs = in_words(self.shares.student)
            text = f"no student is at work; each needs a place with {needs}, and begins when the cluster has one"
            self.watch("message", {"text": text})
        failure = seen["failure"] or self.teacher_status.get("fatal") or self._learner_failure()
        if failure:
            raise RunError(failure)
        self.watch("progress", {**seen["newest"], "teachers": self.teacher_status})

    def _score_now_and_then(self) -> None:
        """Have the newest weights looked at every so many steps, unless the evaluator is still busy."""
        every = self.setup.plan.evaluate_every
        busy = self.scoring is not None and not ray.wait([self.scoring], timeout=0)[0]
        if every and self.step // every > self.scored and not busy and self.step < self.setup.plan.total_steps:
            self.scored = self.step // every
            self.scoring = self.evaluator.look_at_newest.remote(self.manner.score_on_the_way)

    def _tell_failures(self, status: dict[str, Any]) -> None:
        failed = status["teacher_failures"] - self.teacher_status.get("teacher_failures", 0)
        if failed > 0 and not self.failing:
            self.run_log.say.remote(
                "a teacher died; another takes its place and makes the labels that were on their way", self.step
            )
        self.failing = failed > 0
        if status["versions_blocked"] and not self.teacher_status.get("versions_blocked"):
            self.run_log.say.remote(
                "the classes of new labels collapsed: those weights label no more, the last good labels stay", self.step
            )
        if status["collapses_believed"] > self.teacher_status.get("collapses_believed", 0):
            self.run_log.say.remote(
                "several versions of the weights agree on collapsed labels, so these are used now; look at the "
                "classes' shares in the report",
                self.step,
            )
        now = time.monotonic()
        if status.get("labels_made") != self.teacher_status.get("labels_made") or now - self.recorded > RECORD_SECONDS:
            self.recorded = now
            shown = {key: value for key, value in status.items() if key != "skipped"}
            self.run_log.write.remote("teachers", self.step, shown)

    def _reopen_round(self) -> None:
        """Give the bank back the finished round of ``refresh="once"`` that the newest checkpoint names."""
        state = CheckpointStore(place(self.setup.plan.folder) / "checkpoints").newest()
        if state is None:
            return
        self.step = state["step"]
        if self.bank is None:
            return
        index, stage = state.get("bank", {}), state["stage"]
        end = sum(plan.steps for plan in self.setup.plan.stages[: stage + 1])
        self.labels_first = (stage if self.step < end else stage + 1) in self.setup.labels
        path = index.get("round_file")
        if index.get("stage") == stage and index.get("prior"):
            ray.get(self.bank.recall.remote(stage, index["prior"], index.get("seen")))
        if index.get("stage") == stage and path:
            version = sum(plan.steps for plan in self.setup.plan.stages[:stage])
            try:
                ray.get(self.bank.reopen.remote(stage, version, path))
            except ray.exceptions.RayError as error:
                cause = last_line(error)
                self.watch(
                    "message", {"text": f"the round of labels in {path} cannot be read ({cause}); it is made anew"}
                )
        elif index.get("stage") == stage:
            text = f"labels are made again after the resume ({index.get('images', 0)} had been made)"
            self.watch("message", {"text": text})

    def _learner_failure(self) -> str | None:
        """Why the teacher that learns has given up; None while it has not. A dead one starts again by itself."""
        if self.learning is None or not ray.wait([self.learning], timeout=0)[0]:
            return None
        try:
            ray.get(self.learning)
        except ray.exceptions.RayTaskError as error:
            return f"the teacher that learns: {last_line(error)}"
        except ray.exceptions.RayError:
            self.learning = self.learner.run.remote()
        return None

    def _retire_learner(self) -> None:
        """Let the teacher that learns save itself, and send it home."""
        if self.learner is None:
            return
        self.learner.stop.remote()
        ray.wait([self.learning], timeout=SECONDS_TO_SAVE)
        ray.kill(self.learner)
        self.learner = self.learning = None

    def _retire_teachers(self) -> None:
        self._retire_learner()
        self.run_log.end.remote("train", "student", "teachers", "trainable_teacher")
        if self.bank is not None:
            ray.kill(self.bank)
        if self.team is not None:
            self.team.end()
        self.bank = self.team = None

    def _train_references(self, interrupt: Interrupt) -> dict[str, Any] | None:
        """Source-only and oracle, side by side; None when the user stopped them."""
        plans = self.setup.references
        if not plans:
            return {}
        began = time.monotonic()
        self.watch(
            "phase",
            {
                "name": "references",
                "text": "training " + " and ".join(plans),
                "steps": max(plan.total_steps for plan in plans.values()),
            },
        )
        task = ray.remote(train_alone).options(max_retries=1, **actor_options(self.shares.student))
        handles = Handles(run_log=self.run_log)
        references = {
            name: task.remote(plan, handles, self.setup.options.threads, name) for name, plan in plans.items()
        }
        done = self._watched(lambda: ray.get(list(references.values())), interrupt)
        self.seconds["references"] = time.monotonic() - began
        if any(item["stopped"] for item in done):
            return None
        return {name: item["weights"] for name, item in zip(references, done, strict=True)}

    def _score(self, references: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[Shown]]:
        """The table's rows, for which the last step counts, what the signals that need no label say, and pictures."""
        began = time.monotonic()
        self.watch("phase", {"name": "score", "text": "scoring"})
        self._start_helpers()
        state = CheckpointStore(place(self.setup.plan.folder) / "checkpoints").newest()
        if state is None or state["step"] != self.setup.plan.total_steps:
            raise RunError(
                f"the last step could not be saved, so there is nothing to score: free space in "
                f"{self.setup.plan.folder} and continue with --resume"
            )
        adapted = _as_numpy(state["teaching"]["network"])
        thresholds = state.get("bank", {}).get("thresholds")
        seen = {name: weights for name, weights in references.items() if name == "source_only"} | {"adapted": adapted}
        kept = None if thresholds is None else np.array(thresholds, np.uint8)
        prior = state.get("bank", {}).get("prior")
        prior = None if prior is None else np.array(prior)
        pictures = None if self.manner.brief else self.evaluator.show.remote(seen, kept, prior)
        jobs = {"label_free": self.evaluator.look.remote(state["step"], adapted, _as_numpy(state["student"]))}
        if self.setup.domains.validation is not None:
            jobs["adapted"] = self.evaluator.score_weights.remote(adapted)
            if not self.manner.brief:
                jobs["recommended"] = self.evaluator.score_recommended.remote()
                for step, path in kept_stages(self.setup.plan.folder):
                    jobs[after_step(step)] = self.evaluator.score_weights.remote(_as_numpy(read_stage(path)))
            for name, weights in references.items():
                jobs[name] = self.evaluator.score_weights.remote(weights)
            if "source_only" in references:
                jobs["adabn"] = self.evaluator.adabn.remote(references["source_only"])
        try:
            found = {name: ray.get(job) for name, job in jobs.items()}
        except ray.exceptions.RayError as error:
            raise _readable(error) from error
        try:
            shown = [] if pictures is None else ray.get(pictures)
        except ray.exceptions.RayError as error:  # scores are worth more than pictures
            shown = []
            self.watch("message", {"text": f"there are no pictures in the report: {last_line(error)}"})
        self.seconds["score"] = time.monotonic() - began
        label_free = {**found.pop("label_free"), "recommended_score": found.pop("recommended", None)}
        return found, label_free, shown

    def _keep_metrics(self, method: Any) -> None:
        """Have all metrics where the run's files are; whoever is killed next writes nothing any more."""
        try:
            sentence = ray.get(method.remote(), timeout=SECONDS_TO_COPY)
        except ray.exceptions.RayError as error:
            sentence = f"the last metrics may be missing: {last_line(error)}"
        if sentence is not None:
            self.watch("message", {"text": sentence})

    def _end(self) -> None:
        self._keep_metrics(self.run_log.close)
        own = (self.learner, self.bank, self.board, self.labelling, self.rewards, self.run_log)
        for actor in dict.fromkeys(own):
            if actor is not None:
                ray.kill(actor)
        if self.team is not None:
            self.team.end()
        if self.evaluator is not None:
            self.crew.dismiss([self.evaluator])


def _export(setup: Setup) -> Export:
    """What tells Prometheus the run's numbers."""
    options = setup.options
    tags = {"run": options.folder().name, "recipe": options.recipe, "benchmark": setup.benchmark.name}
    return Export(tags, setup.benchmark.classes.names)


def _as_numpy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def _readable(error: BaseException) -> BaseException:
    """The RunError inside whatever Ray wrapped round it, or the error itself."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        item = queue.pop(0)
        if item is None or item in seen:
            continue
        seen.append(item)
        if isinstance(item, RunError | UnreadableImage):
            return item
        failures = getattr(item, "worker_failures", {})
        queue += [item.__cause__, item.__context__, getattr(item, "cause", None), *failures.values()]
    return error
