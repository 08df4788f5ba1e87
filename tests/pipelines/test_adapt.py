import json
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray
import torch

from actors.checkpoints import CheckpointStore
from actors.errors import RunError, UnreadableImage
from actors.student import Student
from actors.team import SECONDS_TO_MENTION
from pipelines import adapt as adapt_module
from pipelines.adapt import Interrupt, Manner, Run, RunningSums, _readable, stop_on_interrupt
from pipelines.placement import Shares
from tests.actors.fakes import FakeLink, label_plan, run_plan, stage

QUIET = {"newest": {}, "messages": [], "students_lost": False, "failure": None}
"""What a run's log tells before anybody has said anything."""


def test_the_second_interrupt_aborts():
    interrupt = Interrupt()
    interrupt(signal.SIGINT, None)
    assert interrupt.asked
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_interrupt() as interrupt:
        assert signal.getsignal(signal.SIGINT) is interrupt
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class WorkersFailedError(Exception):
    def __init__(self, failures):
        super().__init__("workers failed")
        self.worker_failures = failures


@pytest.mark.parametrize("kind", ["itself", "cause", "context", "attribute", "worker", "deep"])
def test_the_sentence_inside_whatever_was_wrapped_round_it_is_found(kind):
    wanted, outer = RunError("a sentence"), ValueError("a wrapper")
    if kind == "itself":
        outer = wanted
    elif kind == "cause":
        outer.__cause__ = wanted
    elif kind == "context":
        outer.__context__ = wanted
    elif kind == "attribute":
        outer.cause = wanted
    elif kind == "worker":
        outer = WorkersFailedError({0: ValueError("peer"), 1: wanted})
    else:
        outer.__cause__ = WorkersFailedError({1: outer, 0: ValueError()})
        outer.__cause__.worker_failures[0].__cause__ = wanted
    assert _readable(outer) is wanted


def test_an_unreadable_image_is_a_sentence_too():
    """A broken validation image ends the score; its name is what the user needs."""
    wanted, outer = UnreadableImage("/data/1.png", "broken"), ValueError("a wrapper")
    outer.__cause__ = wanted
    assert "/data/1.png" in str(_readable(outer))


def test_an_error_without_a_sentence_stays_what_it_is():
    error = ValueError("a defect")
    assert _readable(error) is error


class Actor:
    """A handle whose methods return their answers at once, and remember what they were told."""

    def __init__(self, **answers):
        self.answers, self.told = answers, []

    def __getattr__(self, name):
        def remote(*arguments):
            self.told.append((name, *arguments))
            return self.answers.get(name)

        return SimpleNamespace(remote=remote)


def status(**more):
    quiet = {"teacher_failures": 0, "versions_blocked": 0, "labels_made": 0, "class_shares": [], "fatal": None}
    quiet["collapses_believed"] = 0
    return {**quiet, **more}


@pytest.fixture
def started(monkeypatch):
    """The classes of all actors that a run started, with their arguments and options."""
    made = []

    class Blueprint:
        def __init__(self, kind):
            self.kind, self.chosen = kind, {}

        def options(self, **chosen):
            self.chosen = chosen
            return self

        def remote(self, *arguments, **named):
            made.append((self.kind.__name__, arguments, self.chosen))
            return Actor(look_at_newest="under way")

    monkeypatch.setattr(ray, "remote", Blueprint)
    return made


@pytest.fixture
def watched(tmp_path, monkeypatch, started):
    """A run of two teachers without a cluster, and what it tells."""
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: (asked, []))
    setup = SimpleNamespace(
        plan=SimpleNamespace(folder=str(tmp_path), total_steps=10, evaluate_every=0, networks=(), seed=0),
        options=SimpleNamespace(teachers=2, most_teachers=2, threads=1, recipe="eplc", folder=lambda: tmp_path),
        benchmark=SimpleNamespace(name="pair", classes=SimpleNamespace(names=("water", "boat"))),
        labels={},
        label_age=None,
        make_scorer=lambda: None,
        make_watcher=lambda: None,
        make_showcase=lambda: None,
        make_source_scorer=lambda: None,
        target_reader=None,
        learners=0,
        domains=SimpleNamespace(target=range(8), validation=range(4)),
    )
    run = Run(setup, Shares({"CPU": 1.0}, {"CPU": 0.5}, {"CPU": 0.1}), lambda *told: run.told.append(told), {}, None)
    run.told = []
    run.run_log = Actor(watch={**QUIET, "newest": {"train": {"step": 7}}, "messages": ["hello"]})
    run.bank = Actor(status=status())
    started.clear()
    return run


def test_a_glance_passes_on_what_is_new(watched):
    watched._look()
    assert [kind for kind, _ in watched.told] == ["message", "progress"]
    assert watched.step == 7
    assert watched.seen_messages == 1


def test_what_no_restart_mends_ends_the_run_with_its_sentence(watched):
    watched.run_log.answers["watch"]["failure"] = "a student's sentence"
    with pytest.raises(RunError, match="a student's sentence"):
        watched._look()


def test_a_teacher_that_cannot_label_ends_the_run_with_its_sentence(watched):
    watched.bank.answers["status"] = status(fatal="a teacher's sentence")
    with pytest.raises(RunError, match="a teacher's sentence"):
        watched._look()


def test_a_board_that_is_just_restarting_is_asked_again_next_time(watched, monkeypatch):
    def dead(*_, **__):
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(ray, "get", dead)
    watched._look()
    assert watched.told == []


def test_labels_are_recorded_at_the_students_step(watched):
    watched._look()
    watched.bank.answers["status"] = status(labels_made=8)
    watched._look()
    assert watched.run_log.told[-1][:3] == ("write", "teachers", 7)


def test_the_banks_numbers_are_recorded_where_no_label_is_made_too(watched, monkeypatch):
    """Labels that grow older because every teacher is gone are what somebody looks for."""
    now = [1000.0]
    monkeypatch.setattr(adapt_module.time, "monotonic", lambda: now[0])
    for seconds in (0, 4, 7, 4, 7):
        now[0] += seconds
        watched._look()
    assert sum(call[:2] == ("write", "teachers") for call in watched.run_log.told) == 3


def test_how_many_teachers_are_wanted_stands_beside_how_many_are_there(watched):
    for teachers in (2, 1):
        watched.bank.answers["status"] = status(teachers=teachers)
        watched._look()
    assert (watched.teacher_status["teachers"], watched.teacher_status["teachers_wanted"]) == (1, 2)


def test_numbers_of_students_and_teachers_that_have_gone_are_exported_no_more(watched, monkeypatch):
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    watched._retire_teachers()
    assert ("end", "train", "student", "teachers", "trainable_teacher") in watched.run_log.told


def names(started):
    return [name for name, *_ in started]


def test_teachers_and_evaluator_wait_for_the_first_line_of_the_students(watched, started):
    """They would take cores from the students' own start, and have nothing to do yet."""
    seen = watched.run_log.answers["watch"]
    for newest in ({}, {"student": {"rank": 0, "step": 0}}):
        seen["newest"] = newest
        watched._look()
        assert started == []
    seen["newest"] = {"train": {"step": 1}}
    for _ in range(3):
        watched._look()
        assert names(started) == ["Teacher", "Teacher", "Evaluator"]
    assert all(chosen["max_restarts"] == -1 for *_, chosen in started)
    assert [chosen["num_cpus"] for *_, chosen in started] == [0.5, 0.5, 0.1]


def test_students_that_resume_before_a_complete_round_find_teachers(watched, started, tmp_path):
    """They wait for the labels before their first step, and so before their first line."""
    view = SimpleNamespace(wait_for_round=lambda *_: False, ages={}, hits=0, misses=0)
    stages = [stage(steps=2), stage(name="second", steps=2, labels=label_plan("once"))]
    watched.setup.plan = plan = run_plan(tmp_path, stages)
    watched.setup.labels = {1: stages[1].labels}
    for _ in ("begun", "resumed"):
        link = FakeLink(views={1: lambda *_: view})
        link.write("student", 0, {"rank": 0})
        assert Student(plan, link, 0, 1, torch.device("cpu")).run()["stopped"]
    watched.run_log.answers["watch"]["newest"] = {kind: {"step": step, **line} for kind, step, line in link.lines}
    watched._reopen_round()
    watched._look()
    assert "Teacher" in names(started)


@pytest.mark.parametrize(("step", "first"), [(1, False), (2, True), (3, True)])
def test_a_run_that_stopped_where_the_next_stage_needs_labels_finds_teachers(watched, tmp_path, step, first):
    """It writes no line before that stage's first labels."""
    stages = [stage(steps=2), stage(name="second", steps=2, labels=label_plan("once"))]
    watched.setup.plan = run_plan(tmp_path, stages)
    watched.setup.labels = {1: stages[1].labels}
    CheckpointStore(tmp_path / "checkpoints").save(step, {"step": step, "stage": int(step > 2)})
    watched._reopen_round()
    assert watched.labels_first == first


def test_without_target_labels_signals_are_measured_and_nothing_is_scored(watched, started, tmp_path):
    watched.setup.domains.validation = None
    watched._look()
    assert names(started) == ["Teacher", "Teacher", "Evaluator"]
    assert started[-1][1][0] is None
    state = {"step": 10, "student": {}, "teaching": {"network": {}}}
    CheckpointStore(tmp_path / "checkpoints").save(10, state)
    watched.evaluator = Actor(look={"entropy": 0.5, "recommended": 10}, show=["pictures"])
    scores, label_free, shown = watched._score({})
    assert scores == {}
    assert shown == ["pictures"]
    assert label_free == {"entropy": 0.5, "recommended": 10, "recommended_score": None}
    assert [call[0] for call in watched.evaluator.told] == ["show", "look"]


def test_with_given_labels_there_are_no_teachers_either(watched, started):
    watched.given = "a table"
    watched._look()
    assert names(started) == ["Evaluator"]


def test_without_labels_there_are_no_teachers(watched, started):
    watched.bank = None
    watched._look()
    assert names(started) == ["Evaluator"]
    assert watched.told[-1][0] == "progress"


def test_the_bank_hears_at_every_look_whom_it_may_call(watched):
    """A bank that was restarted has forgotten it."""
    for _ in range(3):
        watched._look()
    assert len(watched.teachers) == 2
    assert watched.bank.told == [("status", None), ("status", []), ("status", watched.teachers)]
    assert all(teacher.told == [("pid",)] for teacher in watched.teachers), "they have a place before they are called"
    restarted = Actor(status=status())
    watched.bank = restarted
    watched._look()
    assert restarted.told == [("status", watched.teachers)]


def test_a_student_that_has_no_place_yet_is_mentioned_once_and_only_where_ray_train_looks_for_one(watched):
    watched.run_log.answers["watch"] = QUIET

    def said():
        watched._look()
        return [what["text"] for kind, what in watched.told if kind == "message"]

    assert said() == [], "a student in this process has its place"
    watched.awaits_student = time.monotonic()
    assert said() == []
    watched.awaits_student -= SECONDS_TO_MENTION
    once = ["no student is at work; each needs a place with 1 CPU, and begins when the cluster has one"]
    assert said() == once
    assert said() == once


def test_a_run_whose_student_waits_for_a_place_is_stopped_at_once(watched):
    """Ray Train would look for one for as long as the process lives."""
    interrupt, place = Interrupt(), threading.Event()
    watched.run_log.answers.update(watch=QUIET, request_stop=None)

    def look_for_a_place():
        watched.awaits_student = time.monotonic()
        interrupt(2, None)
        place.wait(30)
        return {"step": 3, "stopped": True}

    try:
        assert watched._watched(look_for_a_place, interrupt) == {"step": 0, "stopped": True}
    finally:
        place.set()


@pytest.mark.parametrize("lost", [False, True])
def test_who_waits_for_a_student_that_failed_knows_that_nobody_saves(watched, lost):
    """Ctrl-C then ends the run at once: what there is to continue is saved already."""
    interrupt, place = Interrupt(), threading.Event()
    work = {**QUIET, "newest": {"student": {"step": 0}, "train": {"step": 7}}, "students_lost": lost}
    watched.run_log.answers.update(watch=work, request_stop=None)
    watched._look()
    assert (watched.awaits_student is not None) is lost
    since = watched.awaits_student
    watched._look()
    assert watched.awaits_student == since
    interrupt(2, None)
    try:
        ended = watched._watched(lambda: place.wait(1) or {"step": 8, "stopped": True}, interrupt)
    finally:
        place.set()
    assert ended == {"step": 0 if lost else 8, "stopped": True}


def test_a_run_whose_student_has_begun_is_stopped_by_the_student(watched):
    interrupt = Interrupt()
    interrupt(2, None)
    watched.run_log.answers["request_stop"] = None

    def train():
        watched.awaits_student = time.monotonic()
        time.sleep(0.3)
        return {"step": 7, "stopped": True}

    assert watched._watched(train, interrupt) == {"step": 7, "stopped": True}


def test_a_bank_that_has_not_begun_says_nothing(watched):
    watched.bank.answers["status"] = {}
    watched._look()
    assert watched.run_log.told == [("watch", 0)]
    assert watched.told[-1] == ("progress", {"train": {"step": 7}, "teachers": {}})


def test_failed_calls_and_collapsed_weights_are_told_once(watched):
    for more in ({}, {"teacher_failures": 2}, {"teacher_failures": 2, "versions_blocked": 1}) * 2:
        watched.bank.answers["status"] = {**status(**watched.teacher_status), **more}
        watched._look()
    said = [text for name, *text in watched.run_log.told if name == "say"]
    assert [text[0].split(":")[0] for text in said] == [
        "a teacher died; another takes its place and makes the labels that were on their way",
        "the classes of new labels collapsed",
    ]


def test_collapsed_labels_that_are_believed_are_told_once(watched):
    for believed in (0, 1, 1, 1):
        watched.bank = Actor(status=status(collapses_believed=believed))
        watched._look()
    told = [what for name, *what in watched.run_log.told if name == "say"]
    assert len(told) == 1
    assert "agree on collapsed labels" in told[0][0]


def test_a_long_outage_is_told_once_and_the_next_one_again(watched):
    for failures in (1, 2, 3, 3, 4):
        watched.bank.answers["status"] = status(teacher_failures=failures)
        watched._look()
    assert sum("a teacher died" in text[0] for name, *text in watched.run_log.told if name == "say") == 2


def test_counters_of_a_restarted_bank_go_on_where_the_old_ones_stood():
    sums = RunningSums(("labels",))
    seen = [sums.carry({"labels": count, "age": 5})["labels"] for count in (0, 8, 16, 0, 8, 24, 4)]
    assert seen == [0, 8, 16, 16, 24, 40, 44]


def test_the_last_moment_of_a_run_is_looked_at(watched):
    watched.bank.answers["status"] = status(labels_made=8)
    assert watched._watched(lambda: "done", Interrupt()) == "done"
    watched.run_log.answers["watch"]["failure"] = "a student's last sentence"
    with pytest.raises(RunError, match="a student's last sentence"):
        watched._watched(lambda: "done", Interrupt())
    assert watched.teacher_status["labels_made"] == 8


def looks(watched, monkeypatch, every, steps, busy=()):
    """Steps at which the newest weights were given to the evaluator."""
    watched.setup.plan.evaluate_every, at = every, []
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: ([], calls) if watched.step in busy else (calls, []))
    for step in steps:
        watched.run_log.answers["watch"]["newest"] = {"train": {"step": step}}
        before = 0 if watched.evaluator is None else len(watched.evaluator.told)
        watched._look()
        told = watched.evaluator.told[before:]
        assert told in ([], [("look_at_newest", watched.manner.score_on_the_way)])
        at += [step] * len(told)
    return at


def test_the_newest_weights_are_scored_every_so_many_steps(watched, monkeypatch):
    assert looks(watched, monkeypatch, 3, [1, 2, 3, 3, 4, 5, 7, 7, 8, 9]) == [3, 7, 9]


def test_who_wants_no_scores_on_the_way_has_signals_alone(watched, monkeypatch):
    watched.manner = Manner(score_on_the_way=False)
    assert looks(watched, monkeypatch, 3, [3, 4, 6]) == [3, 6]


def test_the_last_step_is_left_to_the_table(watched, monkeypatch):
    assert looks(watched, monkeypatch, 5, [4, 5, 9, 10, 10]) == [5]


def test_nothing_is_scored_in_between_unless_asked_for(watched, monkeypatch):
    assert looks(watched, monkeypatch, 0, range(1, 10)) == []


def test_an_evaluator_that_is_still_busy_is_not_given_more(watched, monkeypatch):
    watched.scoring = "the last one"
    assert looks(watched, monkeypatch, 2, [2, 3, 4, 6, 7], busy=(2, 3, 6)) == [4, 7]


@pytest.mark.parametrize("saved", [None, 8])
def test_a_last_step_that_was_not_saved_is_not_scored(watched, saved):
    if saved is not None:
        CheckpointStore(f"{watched.setup.plan.folder}/checkpoints").save(saved, {"step": saved})
    with pytest.raises(RunError, match=r"last step could not be saved, .* --resume"):
        watched._score({})


def test_a_resumed_run_stands_at_the_step_of_its_checkpoint(watched, tmp_path):
    """Its first words about teachers would else be written at step 0, before all others."""
    CheckpointStore(tmp_path / "checkpoints").save(8, {"step": 8, "stage": 0, "bank": {}})
    watched.bank = None
    watched._reopen_round()
    watched.run_log.answers["watch"]["newest"] = {}
    watched._look()
    assert watched.step == 8


def finished(watched, monkeypatch, tmp_path, shown):
    """What `_results` writes for a run of which everything but the last steps is fake."""
    monkeypatch.setattr(
        watched, "_score", lambda _: ({"adapted": {"confusion": [[1]]}}, {"recommended_score": None}, shown)
    )
    watched.setup.benchmark = SimpleNamespace(classes=SimpleNamespace(names=("one",)))
    told = {}
    monkeypatch.setattr(
        adapt_module, "assemble", lambda setup, scores, student, teachers, *_, **__: told.update(teachers) or told
    )
    return watched._results({}, {}), json.loads((tmp_path / "results.json").read_text())


def test_after_a_resume_at_the_end_the_words_of_the_teachers_are_those_in_the_metrics(watched, monkeypatch, tmp_path):
    lines = [{"kind": "teachers", "step": step, "labels_made": made} for step, made in ((5, 40), (9, 80))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, results = finished(watched, monkeypatch, tmp_path, [])
    assert results["labels_made"] == 80


def test_pictures_that_cannot_be_written_cost_no_result(watched, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapt_module, "write_gallery", full)
    finished(watched, monkeypatch, tmp_path, ["a picture"])
    assert ("message", {"text": "the pictures cannot be written: No space left on device"}) in watched.told
