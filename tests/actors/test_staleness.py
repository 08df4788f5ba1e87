import pytest

from actors.staleness import StalenessPolicy


@pytest.mark.parametrize(
    ("refresh", "newest", "held", "blocked", "admitted"),
    [
        ("continuous", None, None, (), False),
        ("continuous", 5, None, (), True),
        ("continuous", 5, 4, (), True),
        ("continuous", 5, 5, (), False),
        ("continuous", 5, 6, (), False),
        ("continuous", 5, 4, (5,), False),
        ("continuous", 6, 4, (5,), True),
        ("continuous", 5, None, (5,), False),
        ("once", None, None, (), False),
        ("once", 5, None, (), True),
        ("once", 5, 4, (), False),
        ("once", 5, 5, (), False),
        ("once", 5, None, (5,), False),
    ],
)
def test_who_may_start_on_a_chunk(refresh, newest, held, blocked, admitted):
    assert StalenessPolicy(refresh=refresh).admit(newest, held, blocked) is admitted


@pytest.mark.parametrize(
    ("policy", "age", "complete", "selected"),
    [
        (StalenessPolicy(), 10**6, False, True),
        (StalenessPolicy(max_age_steps=10), 10, False, True),
        (StalenessPolicy(max_age_steps=10), 11, True, False),
        (StalenessPolicy(refresh="once"), 0, False, False),
        (StalenessPolicy(refresh="once"), 10**6, True, True),
    ],
)
def test_which_records_the_student_may_use(policy, age, complete, selected):
    assert policy.select(age, complete) is selected


@pytest.mark.parametrize(("age", "weight"), [(0, 1.0), (-5, 1.0), (100, 0.5), (200, 0.25), (50, 2**-0.5)])
def test_a_label_of_one_half_life_weighs_half(age, weight):
    assert StalenessPolicy(half_life_steps=100).weigh(age) == pytest.approx(weight)
    assert StalenessPolicy().weigh(age) == 1.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"refresh": "sometimes"}, "'once' or 'continuous', not 'sometimes'"),
        ({"max_age_steps": 0}, "max_age_steps must be positive, not 0"),
        ({"half_life_steps": -1.0}, "half_life_steps must be positive, not -1.0"),
        ({"refresh": "once", "max_age_steps": 5}, "leave max_age_steps and half_life_steps None"),
        ({"refresh": "once", "half_life_steps": 5}, "leave max_age_steps and half_life_steps None"),
    ],
)
def test_an_impossible_policy_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        StalenessPolicy(**arguments)
