import signal
from types import SimpleNamespace

import pytest
import ray

from actors.checkpoints import CheckpointStore
from actors.errors import RunError, UnreadableImage
from pipelines.adapt import Interrupt, Run, _readable, stop_on_interrupt


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
    quiet = {"teacher_failures": 0, "blocks_collapsed": 0, "labels_made": 0, "class_shares": [], "fatal": None}
    return {**quiet, **more}


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A run without a cluster, and what it tells."""
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
    run = object.__new__(Run)
    run.seen_messages, run.step, run.teacher_status, run.seconds, run.told = 0, 0, {}, {}, []
    run.setup = SimpleNamespace(plan=SimpleNamespace(folder=str(tmp_path), total_steps=10))
    run.watch = lambda kind, what: run.told.append((kind, what))
    run.run_log = Actor(watch={"newest": {"train": {"step": 7}}, "messages": ["hello"], "failure": None})
    run.bank = Actor(status=status())
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


@pytest.mark.parametrize("saved", [None, 8])
def test_a_last_step_that_was_not_saved_is_not_scored(watched, saved):
    if saved is not None:
        CheckpointStore(f"{watched.setup.plan.folder}/checkpoints").save(saved, {"step": saved})
    with pytest.raises(RunError, match=r"last step could not be saved, .* --resume"):
        watched._score({})
