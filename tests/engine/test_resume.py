"""A run that was killed or stopped continues with the very samples, labels and losses of one that was not."""

import json
import os
import signal

import pytest
from engine_runs import TERMS, losses, start_run

pytestmark = pytest.mark.slow
WAYS = {
    "one student, three rounds": {"students": 1, "recipe": "proda", "faithful": True},
    "two students": {"students": 2, "refresh": "once"},
}
"""Steps 1 to 20 align or warm up; 21 to 40 learn from a round of labels; with three rounds 21 to 30 denoise one, and 31
to 35 and 36 to 40 learn from those of the stage before."""
TERMS_AT = {
    "proda": {
        1: {"loss/segmentation", "loss/adversarial", "discriminator/main"},
        30: {"loss/segmentation", "loss/cross_entropy", "loss/reverse", "loss/structure"},
        40: {"loss/segmentation", "loss/pseudo", "loss/distillation"},
    },
    "eplc": {
        1: {"loss/segmentation", "loss/adversarial_main", "discriminator/main"},
        40: {"loss/segmentation", "loss/rectified_main", "loss/divergence"},
    },
}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def uninterrupted(request, local_ray, tmp_path_factory, tiny_folder):
    outcome = start_run(tmp_path_factory.mktemp("whole"), tiny_folder, **request.param).go()
    assert outcome.results is not None
    return request.param, losses(outcome.folder)


def test_a_run_that_is_stopped_and_then_killed_has_the_losses_of_one_that_was_neither(
    uninterrupted, local_ray, tmp_path, tiny_folder
):
    way, expected = uninterrupted
    stopped = start_run(tmp_path, tiny_folder, **way).go(at_step=23, do=lambda run: run.interrupt())
    assert stopped.stopped
    assert 23 <= max(losses(stopped.folder)) < 40

    def kill(run):
        os.kill(run.student_pids()[-1], signal.SIGKILL)

    run = start_run(tmp_path, tiny_folder, **way)
    resumed = run.go(at_step=33, do=kill)
    assert resumed.results is not None
    (said,) = [text for text in run.messages if text.startswith("student")]
    if way["students"] == 1:  # of two, the other may be the first to notice
        assert said.startswith("student 0 failed: the process or its node is gone. All begin again")
    assert losses(resumed.folder) == expected
    lines = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    starts = sum(line["kind"] == "student" for line in lines)
    assert starts == 3 * way["students"], "every student started, was resumed, and was started again after the kill"


def test_the_losses_that_are_compared_are_all_terms_of_all_stages(uninterrupted):
    way, expected = uninterrupted
    assert set(expected) == set(range(1, 41))
    for step, terms in TERMS_AT[way.get("recipe", "eplc")].items():
        assert set(expected[step]) >= terms
    assert all(name.split("/")[0] in TERMS for terms in expected.values() for name in terms)
