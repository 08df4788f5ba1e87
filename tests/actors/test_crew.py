from types import SimpleNamespace

import pytest
import ray
from fakes import Remote

from actors.crew import Crew, LastingCrew
from actors.desk import Desk
from actors.evaluator import Evaluator, LastingEvaluator
from actors.teacher import LastingTeacher, Teacher


class Hired:
    """An actor: of which class, with what options and arguments, and how often it began again."""

    def __init__(self, kind, options, arguments):
        self.kind, self.options, self.arguments = kind, options, arguments
        self.begun, self.alive = 0, True
        self.begin = Remote(self._begin)

    def _begin(self):
        self.begun += 1


@pytest.fixture
def hired(monkeypatch):
    """Every actor that was started; a desk is a real one, in this process."""
    found = []

    def start(kind, options, arguments):
        if kind is Desk:
            desk = Desk()
            return SimpleNamespace(write=Remote(desk.write), read=Remote(desk.read), plain=desk)
        found.append(Hired(kind, options, arguments))
        return found[-1]

    def remote(kind):
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *arguments: start(kind, options, arguments))
        )

    def kill(actor):
        actor.alive = False

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "kill", kill)
    return found


def test_a_crew_of_one_run_goes_with_it(hired):
    crew = Crew()
    teachers = crew.teachers(2, {"num_cpus": 0.5}, "network", "reader")
    evaluator = crew.evaluator({"num_cpus": 0.1}, "scorer")
    assert [actor.kind for actor in hired] == [Teacher, Teacher, Evaluator]
    assert teachers[0].arguments == ("network", "reader")
    assert teachers[0].options == {"max_restarts": -1, "max_task_retries": 0, "num_cpus": 0.5}
    crew.dismiss([*teachers, evaluator])
    assert not any(actor.alive for actor in hired)


def test_a_lasting_crew_works_for_the_next_run_with_what_lies_on_the_desk(hired):
    crew = LastingCrew({})
    first = crew.teachers(1, {"num_cpus": 0.5}, "first run")
    watching = crew.evaluator({"num_cpus": 0.1}, "first scorer")
    crew.dismiss([*first, watching])
    assert all(actor.alive for actor in hired)
    again = crew.teachers(2, {"num_cpus": 0.5}, "second run")
    assert again[0] is first[0]
    assert [actor.begun for actor in again] == [1, 0], "the new one begins by itself"
    assert [actor.kind for actor in hired] == [LastingTeacher, LastingEvaluator, LastingTeacher]
    assert crew.desk.plain.read("teacher") == [("second run",)]
    assert crew.desk.plain.read("evaluator") == [("first scorer",)]
    assert crew.evaluator({"num_cpus": 0.1}, "second scorer") is watching


def test_a_teacher_that_cannot_begin_is_heard_of_and_a_dead_one_begins_by_itself(hired, monkeypatch):
    crew = LastingCrew({})
    (kept,) = crew.teachers(1, {}, "a")

    def get(value):
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(ray, "get", get)
    kept.begin = Remote(lambda: ray.exceptions.RayActorError())
    assert crew.teachers(1, {}, "b") == [kept]
    kept.begin = Remote(lambda: MemoryError("full"))
    with pytest.raises(MemoryError):
        crew.teachers(1, {}, "c")


def test_fewer_teachers_are_the_first_ones(hired):
    crew = LastingCrew({})
    two = crew.teachers(2, {"num_cpus": 0.5}, "a")
    assert crew.teachers(1, {"num_cpus": 0.5}, "b") == two[:1]


def test_a_run_that_asks_ray_for_something_else_is_refused(hired):
    crew = LastingCrew({})
    crew.teachers(1, {"num_cpus": 0.5}, "a")
    with pytest.raises(ValueError, match="a kept teacher asked Ray for"):
        crew.teachers(1, {"num_cpus": 1.0}, "b")


def test_everybody_goes_home_at_the_end(hired):
    crew = LastingCrew({})
    crew.teachers(2, {}, "a")
    crew.evaluator({}, "b")
    crew.end()
    assert not any(actor.alive for actor in hired)
    assert crew.kept == {"teacher": [], "evaluator": []}


@pytest.mark.parametrize(("kind", "role"), [(LastingTeacher, "teacher"), (LastingEvaluator, "evaluator")])
def test_one_that_starts_again_reads_what_now_lies_there(hired, monkeypatch, kind, role):
    desk = Desk()
    handle = SimpleNamespace(read=Remote(desk.read))
    seen = []
    monkeypatch.setattr(kind.__bases__[1], "__init__", lambda self, *arguments: seen.append(arguments))
    desk.write(role, [("one", 1)])
    actor = kind(handle)
    desk.write(role, [("two", 2)])
    actor.begin()
    assert seen == [("one", 1), ("two", 2)]
