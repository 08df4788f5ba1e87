import pytest
import ray
from fakes import Remote

from actors.errors import RunError
from actors.team import SECONDS_TO_MENTION, Demand, Team

PATIENCE = 15.0


def status(age=None, coverage=1.0, refresh="continuous"):
    return {"live_age_steps_p95": age, "coverage": coverage, "refresh": refresh}


def after(demand, seconds, present, found):
    """What is wanted when the bank has told the same for as long, asked twice a second."""
    for tick in range(int(2 * seconds) + 1):
        demand.look(1000 + tick / 2, present, found)
    return demand.wanted


@pytest.mark.parametrize(("age", "wanted"), [(90, 2), (100, 2), (101, 3), (150, 3), (151, 4), (190, 4), (900, 6)])
def test_labels_that_are_too_old_ask_for_as_many_as_bring_their_age_down(age, wanted):
    """Twice as many teachers need half as long for all images."""
    demand = Demand(least=2, most=6, age=100)
    assert after(demand, PATIENCE + 1, 2, status(age)) == wanted


def test_a_moment_of_old_labels_changes_nothing():
    demand = Demand(least=1, most=6, age=100)
    for tick in range(200):
        assert demand.look(tick * 10.0, 1, status(300 if tick % 2 else 90)) == 1


def test_missing_labels_ask_for_one_more_at_a_time():
    demand = Demand(least=1, most=3, age=100)
    for present in (1, 2):
        assert after(demand, PATIENCE + 1, present, status(10, coverage=0.4)) == present + 1
    assert after(demand, 100 * PATIENCE, 3, status(10, coverage=0.4)) == 3, "never more than the most"


def test_nobody_else_is_asked_for_while_somebody_is_still_awaited():
    demand = Demand(least=1, most=9, age=100)
    assert after(demand, PATIENCE + 1, 1, status(200)) == 2
    assert after(demand, 100 * PATIENCE, 1, status(900)) == 2


def test_one_goes_when_the_others_suffice_with_room_to_spare_and_not_before():
    demand = Demand(least=1, most=4, age=100)
    demand.wanted = 3
    assert after(demand, 100 * PATIENCE, 3, status(60)) == 3, "two would need 90 steps, too close to 100"
    assert after(demand, 4 * PATIENCE - 1, 3, status(50)) == 3
    assert after(demand, 4 * PATIENCE + 1, 3, status(50)) == 2
    demand.wanted = 1
    assert after(demand, 100 * PATIENCE, 1, status(1)) == 1, "never fewer than the least"


def test_a_round_asks_for_more_until_it_is_complete_and_then_sends_them_home():
    demand = Demand(least=1, most=2, age=100)
    assert after(demand, PATIENCE + 1, 1, status(400, coverage=0.2, refresh="once")) == 2
    assert after(demand, 4 * PATIENCE + 1, 2, status(4000, refresh="once")) == 1, "its labels grow old by design"


def test_where_the_number_is_fixed_or_nothing_is_labelled_it_stays():
    assert after(Demand(least=2, most=2, age=1), 100 * PATIENCE, 2, status(900)) == 2
    assert after(Demand(least=2, most=5, age=1), 100 * PATIENCE, 2, {}) == 2


class Hired:
    """A teacher who answers when the test lets it."""

    def __init__(self):
        self.asked, self.answer, self.here = 0, 7, False
        self.pid = Remote(self._pid)

    def _pid(self):
        self.asked += 1
        return self


@pytest.fixture
def office(monkeypatch):
    """Everybody who was hired, and who was dismissed."""
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([q for q in asked if q.here], []))

    def get(question):
        if isinstance(question.answer, BaseException):
            error, question.answer, question.here = question.answer, 7, False
            raise error
        return question.answer

    monkeypatch.setattr(ray, "get", get)

    class Office:
        hired, dismissed = [], []

    office = Office()
    office.hired, office.dismissed = [], []

    def hire(count):
        more = [Hired() for _ in range(count)]
        office.hired += more
        return more

    office.team = lambda demand: Team(hire, office.dismissed.extend, demand, "1 GPU", now=0.0)
    return office


def test_a_teacher_is_called_when_it_has_a_place_and_not_before(office):
    given = office.team(Demand(2, 2, 100))
    first, second = office.hired
    assert given.look(1.0, {}) == []
    assert given.present == []
    second.here = True
    given.look(2.0, {})
    assert given.present == [second]
    first.here = True
    given.look(3.0, {})
    assert given.present == [second, first]
    assert (first.asked, second.asked) == (1, 1)


def test_those_who_wait_for_a_place_are_mentioned_once_and_so_is_the_end_of_it(office):
    given = office.team(Demand(2, 2, 100))
    office.hired[0].here = True
    assert given.look(SECONDS_TO_MENTION, {}) == []
    late = SECONDS_TO_MENTION + 1
    assert given.look(late, {}) == [
        "1 of 2 teachers wait for a place (1 GPU each); they begin when the cluster has one"
    ]
    assert given.look(late + 60, {}) == []
    office.hired[1].here = True
    assert given.look(late + 61, {}) == ["all 2 teachers have a place now"]
    assert given.look(late + 62, {}) == []


def test_one_who_is_not_needed_any_more_goes_after_the_bank_has_heard_of_it(office):
    demand = Demand(1, 2, 100)
    given = office.team(demand)
    demand.wanted = 2
    given.look(0.0, {})
    first, last = office.hired
    first.here = last.here = True
    given.look(1.0, {})
    assert given.present == [first, last]
    demand.wanted = 1
    said = given.look(2.0, {})
    assert said == ["labels are fresh enough for fewer teachers: 2 become 1"]
    assert (given.present, office.dismissed) == ([first], []), "it may still be labelling"
    given.look(3.0, {})
    assert office.dismissed == [last]


def test_one_that_is_sent_home_before_it_came_is_never_called(office):
    demand = Demand(1, 2, 100)
    given = office.team(demand)
    demand.wanted = 2
    given.look(0.0, {})
    demand.wanted = 1
    given.look(1.0, {})
    office.hired[1].here = True
    given.look(2.0, {})
    assert given.present == []
    assert office.dismissed == [office.hired[1]]


def test_a_teacher_that_cannot_start_ends_the_run_with_its_reason(office):
    given = office.team(Demand(1, 1, 100))
    (broken,) = office.hired
    cause = ValueError("no such network")
    creation = ray.exceptions.RayTaskError("__init__", "Traceback\nValueError: no such network", cause, actor_id="a")
    broken.here, broken.answer = True, ray.exceptions.ActorDiedError(creation)
    with pytest.raises(RunError, match=r"a teacher cannot start: .*no such network"):
        given.look(1.0, {})


def test_a_teacher_whose_node_went_before_it_began_is_asked_again(office):
    given = office.team(Demand(1, 1, 100))
    (lost,) = office.hired
    lost.here, lost.answer = True, ray.exceptions.ActorUnavailableError("on its way", None)
    given.look(1.0, {})
    assert (given.present, lost.asked) == ([], 2)
    lost.here = True
    given.look(2.0, {})
    assert given.present == [lost]


def test_at_the_end_everybody_goes(office):
    demand = Demand(1, 3, 100)
    given = office.team(demand)
    demand.wanted = 3
    given.look(0.0, {})
    demand.wanted = 2
    given.look(1.0, {})
    given.end()
    assert set(office.dismissed) == set(office.hired)
    assert (given.hired, given.present) == ([], [])
