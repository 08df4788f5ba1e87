"""A run is resolved, or refused, before any process is started."""

import pytest

from actors.errors import RunError
from pipelines.options import AdaptOptions
from pipelines.setup import resolve


def options(tiny_folder, **more):
    defaults = {"preset": "tiny", "name": "run", "data": str(tiny_folder / "data"), "references": "never"}
    return AdaptOptions(**{**defaults, **more})


@pytest.mark.parametrize(("students", "divides"), [(1, True), (2, True), (3, False), (4, False)])
def test_students_share_every_batch_evenly_or_are_refused(tiny_folder, students, divides):
    given = options(tiny_folder, students=students)
    if divides:
        assert all(stage.batch % students == 0 for stage in resolve(given).plan.stages)
        return
    with pytest.raises(RunError, match=rf"batches of 2, which {students} students .* --students that divides 2"):
        resolve(given)


@pytest.mark.parametrize(("recipe", "total"), [("eplc", 10), ("mrnet", 10), ("mrnet", 1)])
def test_a_run_is_as_long_as_it_was_asked_to_be_whatever_its_recipe_runs(tiny_folder, recipe, total):
    given = options(tiny_folder, recipe=recipe, steps=total, references="always")
    setup = resolve(given)
    assert setup.plan.total_steps == total
    assert {plan.total_steps for plan in setup.references.values()} == {total}


@pytest.mark.parametrize(("faithful", "refresh"), [(False, "continuous"), (True, "once")])
def test_the_published_system_labels_once(tiny_folder, faithful, refresh):
    (plan,) = resolve(options(tiny_folder, faithful=faithful)).labels.values()
    assert plan.policy.refresh == refresh


def test_several_blocks_fall_to_every_teacher(tiny_folder):
    setup = resolve(options(tiny_folder, teachers=2))
    (rows,) = setup.label_rows().values()
    assert len(setup.domains.target) // rows >= 8
