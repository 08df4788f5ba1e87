import dataclasses

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import BasicVariantGenerator

from actors.errors import RunError
from pipelines.options import read_options
from pipelines.placement import Capacity
from tune_spaces.options import SweepOptions
from tune_spaces.record import TrialRecord
from tune_spaces.space import parse_space
from tune_spaces.sweep import Room, scheduler, searcher, write_best

SPACE = parse_space(
    {
        "rate_scale": {"low": 0.3, "high": 3.0, "log": True, "published": 1.0},
        "eplc": {"keep_share": {"low": 0.2, "high": 1.0, "step": 0.1, "published": 0.5}},
    },
    "mine.toml",
)


def options(**given):
    return SweepOptions(**{"name": "s", "init": "/one", "from_stage": 2, **given})


def test_as_many_trials_run_at_a_time_as_fit_with_teachers_evaluator_and_reading():
    room = Room.of(options(teachers=2), Capacity({"CPU": 10.0}), 2)
    assert room.at_once == 3, "1 + 2 × 0.5 + 0.1 + 0.5 = 2.6 each"
    assert room.sentence == (
        "3 trials at a time: each needs 2.6 CPUs (1 student × 1, 2 teachers × 0.5, evaluator 0.1, reading 0.5), and "
        "Ray counts 10 here"
    )
    assert room.bundles == [
        {"CPU": 1.0},
        {"CPU": 0.5},
        {"CPU": 0.5},
        {"CPU": 0.1},
        {"node:__internal_head__": 0.33},
    ]
    assert Room.of(options(teachers=2, max_concurrent=2), Capacity({"CPU": 10.0}), 2).at_once == 2


def test_no_more_groups_than_trials_at_a_time_have_room_on_the_head_node():
    """After a resume Ray Tune starts every failed trial that has room, whatever its searcher says."""
    for at_once in (1, 2, 3, 7):
        share = Room.of(options(max_concurrent=at_once), Capacity({"CPU": 100.0}), 1).bundles[-1][
            "node:__internal_head__"
        ]
        assert at_once * share <= 1.0 < (at_once + 1) * share


def test_a_recipe_that_makes_no_labels_needs_no_teacher():
    room = Room.of(options(), Capacity({"CPU": 4.0}), 0)
    assert room.at_once == 2, "1 + 0.1 + 0.5 = 1.6 each"
    assert "0 teachers" in room.sentence
    assert len(room.bundles) == 3


def test_gpus_count_too_and_the_scarcer_decides():
    room = Room.of(options(), Capacity({"CPU": 64.0, "GPU": 4.0}), 1)
    assert room.at_once == 1, "2 whole GPUs and a tenth of one for the evaluator"
    assert "2.1 GPUs" in room.sentence
    assert Room.of(options(), Capacity({"CPU": 64.0, "GPU": 1.0}), 1).at_once == 1, (
        "on one GPU a trial shares it among its own"
    )
    learning = Room.of(options(), Capacity({"CPU": 64.0, "GPU": 1.0}), 1, 1)
    assert (learning.at_once, len(learning.bundles)) == (1, len(room.bundles) + 1), "one that learns asks as any other"


def test_the_processes_of_several_students_are_not_in_the_trials_own_bundles():
    room = Room.of(options(students=2), Capacity({"CPU": 10.0}), 1)
    assert room.bundles[0] == {"CPU": 0.01}
    assert room.at_once == 3, "2 + 0.5 + 0.1 + 0.5 = 3.1 each"


def test_more_trials_at_a_time_than_fit_are_refused_with_the_sum():
    with pytest.raises(
        RunError, match=r"--max-concurrent is 2, but only 1 trial can run at a time: each needs 2.1 CPUs"
    ):
        Room.of(options(max_concurrent=2), Capacity({"CPU": 4.0}), 1)


def test_one_trial_that_does_not_fit_is_refused():
    with pytest.raises(RunError, match="will never have more"):
        Room.of(options(), Capacity({"CPU": 2.0}), 1)


def suggested(search, count, seed=0, tell=None):
    found, point = searcher(options(search=search, seed=seed), SPACE, count, at_once=1)
    assert point == {}
    points = []
    for k in range(count):
        points.append(found.suggest(f"t{k}")["point"])
        found.on_trial_complete(f"t{k}", {"score": 0.0 if tell is None else tell(points[-1])})
    return points


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_a_search_begins_with_the_published_values_then_the_defaults(search):
    points = suggested(search, 6)
    assert points[:2] == [{"rate_scale": 1.0, "eplc.keep_share": 0.5}, {"rate_scale": 1.0, "eplc.keep_share": 0.6}]
    assert all(0.3 <= p["rate_scale"] <= 3.0 and 0.2 <= p["eplc.keep_share"] <= 1.0 for p in points)
    assert len({p["rate_scale"] for p in points[2:]}) == 4
    assert points == suggested(search, 6), "the same seed, the same points"
    assert points != suggested(search, 6, seed=1)


def test_optuna_learns_where_the_good_ones_lie_and_random_does_not():
    def late(search):
        points = suggested(search, 40, tell=lambda point: -abs(point["eplc.keep_share"] - 0.9))
        return sum(abs(point["eplc.keep_share"] - 0.9) for point in points[20:]) / 20

    assert late("optuna") < 0.5 * late("random")


def test_a_search_of_one_trial_tries_the_published_values():
    assert suggested("optuna", 1) == [{"rate_scale": 1.0, "eplc.keep_share": 0.5}]


def test_a_grid_is_ray_tunes_own():
    found, point = searcher(options(search="grid"), SPACE, 29, at_once=1)
    assert isinstance(found, BasicVariantGenerator)
    assert point == {"grid_search": SPACE.grid(options().trial_options())}
    assert len(point["grid_search"]) == 2 + 3 * 9, "neither of the first points is on the grid"


def test_schedulers_decide_at_the_looks():
    assert type(scheduler(options())) is FIFOScheduler
    asha = scheduler(options(scheduler="asha", looks=5))
    assert isinstance(asha, ASHAScheduler)
    assert (asha._max_t, asha._time_attr, asha.metric) == (6, "look", "score")
    median = scheduler(options(scheduler="median", looks=4))
    assert isinstance(median, MedianStoppingRule)
    assert (median._grace_period, median._time_attr, median._min_time_slice) == (1, "look", 5)


def test_the_best_one_is_a_file_that_run_py_reads(tmp_path):
    shared = SweepOptions(name="s", runs=str(tmp_path), metric="miou", seed=4)
    best = TrialRecord("t", 7, {"rate_scale": 2.0, "eplc.keep_share": 0.9}, "finished", score=31.0)
    path = write_best(shared, best, 12)
    found = read_options(path)
    assert (found.rate_scale, found.eplc.keep_share, found.seed) == (2.0, 0.9, 4)
    assert (found.init, found.from_stage) == (str(tmp_path / "s/stage-one"), 2)
    assert (found.name, found.runs, found.references) == (None, str(tmp_path), "never")
    said = path.read_text()
    assert "The best of 12 trials by miou, which is an oracle metric: it looks at target labels: trial 7" in said
    assert "--from-stage 1 --init None" in said
    write_best(dataclasses.replace(shared, init="/backbone"), best, 12)
    assert "--from-stage 1 --init /backbone" in path.read_text()
    write_best(dataclasses.replace(shared, init="/one", from_stage=2, metric="entropy"), best, 12)
    assert "oracle" not in path.read_text()
    assert "--from-stage 1" not in path.read_text()
    write_best(dataclasses.replace(shared, warm_start="never", references="auto"), best, 12)
    assert read_options(path).references == "auto"
