import pytest

from bench.asynchrony import arrangements, real_table, seconds_to

CURVE = [(100, 10.0, 20.0), (200, 30.0, 24.0), (300, 50.0, 23.0)]


@pytest.mark.parametrize(("wanted", "seconds"), [(20.0, 10.0), (22.0, 20.0), (24.0, 30.0), (19.0, 10.0), (25.0, None)])
def test_the_time_to_a_score_is_that_of_its_first_crossing(wanted, seconds):
    assert seconds_to(CURVE, wanted) == seconds


def test_arrangements_are_compared_at_the_best_score_that_all_of_a_seed_reach():
    slow = [(100, 20.0, 20.0), (200, 60.0, 22.0)]
    entries = [
        {"arrangement": name, "seed": 0, "curve": curve, "miou": curve[-1][2], "label_age_steps": {"p50": 7}}
        for name, curve in (("one", CURVE), ("other", slow))
    ]
    assert real_table(entries).splitlines()[2:] == [
        "| one | 50 | 23.0 | 7 | 20 (to 22.0) |",
        "| other | 60 | 22.0 | 7 | 60 (to 22.0) |",
    ]


def test_turn_taking_gives_both_cores_to_either_phase_and_waits_for_every_round():
    found = arrangements([1, 3], 2)
    assert found["side by side"] == ["--threads", "1"]
    assert found["turn-taking, 1 round, 2 threads"][:4] == ["--threads", "2", "--refresh", "once"]
    assert found["turn-taking, 3 rounds, 2 threads"][-2:] == ["--eplc.rounds", "3"]
