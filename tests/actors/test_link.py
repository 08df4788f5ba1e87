"""What reaches the driver when a student cannot go on."""

import json
from types import SimpleNamespace

import pytest
import ray
from fakes import Remote

from actors import link
from actors.errors import RunError
from actors.link import Handles, train_loop
from actors.run_log import RunLog


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The run log that a student in Ray Train would reach."""
    made = RunLog(str(tmp_path))
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cpu")
    monkeypatch.setattr(ray, "get", lambda value: value)
    return made


def run(log, monkeypatch, error):
    class Student:
        def __init__(self, *_):
            raise error

    monkeypatch.setattr(link, "Student", Student)
    run_log = SimpleNamespace(fail=Remote(log.fail), write=Remote(log.write), watch=Remote(log.watch))
    with pytest.raises(type(error)):
        train_loop({"plan": None, "handles": Handles(run_log=run_log), "threads": 1})
    return log.watch()["failure"]


def test_a_sentence_is_told_as_it_is(log, monkeypatch):
    assert run(log, monkeypatch, RunError("too many images cannot be read")) == "too many images cannot be read"


def test_a_sentence_from_another_process_is_told_without_its_traceback(log, monkeypatch):
    error = ray.exceptions.RayTaskError("read", "Traceback\n  much\nRunError: broken", RunError("broken"))
    assert run(log, monkeypatch, error) == "broken"


@pytest.mark.parametrize(("cause", "told"), [(KeyError(3), "KeyError: 3"), (AssertionError(), "AssertionError")])
def test_a_defect_in_another_process_is_told_too(log, monkeypatch, cause, told):
    error = ray.exceptions.RayTaskError("poll", f"Traceback\n  much\n{told}", cause)
    assert told in run(log, monkeypatch, error)


@pytest.mark.parametrize("ranks", [(0, 0, 0), (0, 1, 1, 0, 1)])
def test_restarts_are_counted_by_the_first_student(log, monkeypatch, tmp_path, ranks):
    for rank in ranks:
        context = SimpleNamespace(get_world_rank=lambda rank=rank: rank, get_world_size=lambda: 2)
        monkeypatch.setattr(ray.train, "get_context", lambda context=context: context)
        run(log, monkeypatch, ray.exceptions.RayActorError())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(ranks)
    assert [line["restarts"] for line in lines if line["rank"] == 0] == list(range(ranks.count(0)))
    assert not [line for line in lines if line["rank"] == 1 and {"students", "restarts"} & set(line)]


def test_a_dead_process_is_left_to_ray_train(log, monkeypatch):
    assert run(log, monkeypatch, ray.exceptions.RayActorError()) is None


def test_a_student_that_train_starts_again_after_a_fatal_error_does_nothing(log, monkeypatch):
    assert run(log, monkeypatch, RunError("too many images cannot be read")) == "too many images cannot be read"
    run_log = SimpleNamespace(write=Remote(log.write), watch=Remote(log.watch))
    result = train_loop({"plan": None, "handles": Handles(run_log=run_log), "threads": 1})
    assert result == {"step": 0, "stopped": True}
