"""What is measured of a run's processes on a machine. Nothing is started here; tests/engine does that."""

from types import SimpleNamespace

import pytest

from actors.errors import RunError
from pipelines.load_trial import PUBLISH_EVERY, course_of, measure, pace_of, planned_stage, trial_plan
from pipelines.options import AdaptOptions
from pipelines.setup import resolve
from pipelines.workers import Spent


def options(tiny_folder, **more):
    defaults = {"preset": "tiny", "name": "run", "data": str(tiny_folder / "data"), "references": "never"}
    return AdaptOptions(**{**defaults, **more})


def steps(*seconds, first=1):
    return [(first + number, Spent(0.0, second)) for number, second in enumerate(seconds)]


def test_a_pace_tells_steps_from_their_publications():
    """Every fourth step publishes."""
    assert PUBLISH_EVERY == 4
    pace = pace_of([steps(1.0, 1.0, 1.0, 3.0), steps(2.0, 2.0, 2.0, 4.0, first=5)])
    assert pace.step_seconds == pytest.approx(1.5)
    assert pace.publish_seconds == pytest.approx(2.0)
    assert pace.spread == pytest.approx(1.0 / 1.5)


def test_a_window_without_a_publication_says_nothing_of_its_cost():
    assert pace_of([steps(1.0, 1.0)]).publish_seconds == 0


def test_the_longest_stage_with_labels_is_planned_and_made_endless(tiny_folder):
    setup = resolve(options(tiny_folder))
    number = planned_stage(setup)
    assert setup.plan.stages[number].name == "self-training"
    plan = trial_plan(setup, number, "nowhere")
    assert len(plan.stages) == 1
    assert plan.stages[0].steps > 10**6
    assert plan.stages[0].learning_rate(10**6) == setup.plan.stages[number].learning_rate(0)


def test_what_is_known_of_a_run_without_running_it(tiny_folder):
    setup = resolve(options(tiny_folder, teachers=2))
    course = course_of(setup, 1, (1, 2), 100.0)
    assert course.images == len(setup.domains.target)
    assert course.block_rows == {1: course.images // 4, 2: course.images // 8}
    assert [stage.steps for stage in course.stages] == [20, 20]
    assert course.free_age == 2 * course.images // 2
    network = setup.plan.network()
    once = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert course.version_bytes == once  # nothing is compared where nobody evaluates on the way
    width, height = setup.preset.stages[1].target_size
    target = course.stage.streams[list(setup.plan.stages[1].streams).index("target")]
    assert target.block_bytes == 32 * width * height * 3
    assert target.batches_per_block == 16


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"address": "auto"}, "joins no cluster; leave out --address"),
        ({"to_stage": 1}, "no stage of this run has pseudo labels"),
        ({"recipe": "meta_pseudo_labels"}, "a teacher learns beside its student"),
    ],
)
def test_a_run_that_has_nothing_to_plan_is_refused(tiny_folder, more, said):
    with pytest.raises(RunError, match=said):
        planned_stage(resolve(options(tiny_folder, **more)))


def test_given_labels_leave_no_teacher_to_plan():
    with pytest.raises(RunError, match="no teacher is needed"):
        planned_stage(SimpleNamespace(options=AdaptOptions(pseudo_labels="labels.parquet")))


def test_more_teachers_than_fit_are_refused_before_anything_starts(tiny_folder, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(RunError, match="50 teachers need"):
        measure(resolve(options(tiny_folder, teachers=50)))
