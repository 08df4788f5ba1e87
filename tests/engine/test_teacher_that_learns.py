"""Meta pseudo labels through the whole engine, with a teacher that learns in a process of its own and is killed."""

import os
import signal
from pathlib import Path

import pytest
import ray
from engine_runs import lines, losses, start_run, until

from actors.checkpoints import CheckpointStore, kept_stages

pytestmark = pytest.mark.slow
STEPS = 150
"""60 adversarial, 45 on median labels, 45 beside a teacher that learns."""
META = 105


def begun(folder, data):
    return start_run(folder, data, recipe="meta_pseudo_labels", steps=STEPS)


@pytest.fixture(scope="module")
def story(local_ray, tmp_path_factory, tiny_folder):
    """A run whose teacher is killed in the middle, that is stopped then, and resumed; what was seen of the teacher."""
    folder, seen = tmp_path_factory.mktemp("taught"), {}

    def kill_and_stop(run):
        learner, plan = run.run.learner, Path(run.setup.plan.folder)
        store = CheckpointStore(plan / "teacher" / "3" / "checkpoints")
        student = run.student_pids()[-1]
        os.kill(student, signal.SIGSTOP)  # so that it does not end before its teacher is back
        try:
            until(lambda: store.steps() and store.steps()[-1] >= 10)
            killed = ray.get(learner.pid.remote())
            os.kill(killed, signal.SIGKILL)
            seen["saved"] = store.steps()[-1]
            seen["lines"] = len(lines(plan, "trainable_teacher"))
            until(lambda: ray.get(learner.pid.remote()) != killed)
            until(lambda: len(lines(plan, "trainable_teacher")) > seen["lines"])
            run.interrupt()
            run.run.run_log.request_stop.remote()  # the driver, which would say so, is waiting here
        finally:
            os.kill(student, signal.SIGCONT)

    stopped = begun(folder, tiny_folder).go(at_step=META + 25, do=kill_and_stop)
    assert stopped.stopped
    seen["stopped"] = max(losses(stopped.folder))
    seen["of_teacher"] = CheckpointStore(stopped.folder / "teacher" / "3" / "checkpoints").steps()[-1]
    seen["lines_before"] = len(lines(stopped.folder, "trainable_teacher"))
    return begun(folder, tiny_folder).go(), seen


def test_the_run_ends_with_every_stage_scored(story):
    outcome, _ = story
    assert [stage["name"] for stage in outcome.results["stages"]] == [
        "adversarial",
        "median labels",
        "meta pseudo labels",
    ]
    assert [step for step, _ in kept_stages(outcome.folder)] == [60, META]
    found = losses(outcome.folder)
    assert set(found) == set(range(1, STEPS + 1))
    assert {"loss/segmentation", "loss/adversarial", "loss/pseudo"} <= set(found[STEPS])


def test_a_killed_teacher_goes_on_from_its_own_checkpoint(story):
    outcome, seen = story
    after = lines(outcome.folder, "trainable_teacher")[seen["lines"]]
    assert after["steps"] > seen["saved"], "it did not begin anew"


def test_nothing_of_the_students_progress_is_lost_with_its_teacher(story):
    outcome, seen = story
    steps = [line["step"] for line in lines(outcome.folder, "train")]
    until_stop = steps[: steps.index(seen["stopped"]) + 1]
    assert until_stop == sorted(set(until_stop)), "no step was taken twice"
    assert len(lines(outcome.folder, "student")) == 2, (
        "the student was started by us alone: at the beginning, at resume"
    )


def test_a_stopped_run_saves_its_teacher_and_a_resume_takes_it_up(story):
    outcome, seen = story
    taken = [line["steps"] for line in lines(outcome.folder, "trainable_teacher")]
    assert seen["of_teacher"] >= max(taken[: seen["lines_before"]])
    assert taken[seen["lines_before"]] > seen["of_teacher"]
    assert max(taken) <= STEPS - META, "and it never overtakes its student"


def test_rewards_come_with_versions_and_labels_from_the_teachers_newest_weights(story):
    outcome, _ = story
    told = lines(outcome.folder, "trainable_teacher")
    ages = [line["reward_age_steps"] for line in told if "reward_age_steps" in line]
    assert ages
    assert all(0 <= age <= STEPS - META for age in ages)
    assert 0 <= outcome.results["label_age_steps"]["p50"] < STEPS - META
    assert all("coefficient" in line for line in told)
