"""A whole run and what may happen to it: killed processes, a broken file, a wish that cannot be met."""

import dataclasses
import json
import os
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import ray
from engine_runs import lines, start_run, until

from actors.errors import RunError

pytestmark = pytest.mark.slow

STEPS = 100
IN_SELF_TRAINING = 55
"""The second half of the steps is self-training; labels are read from its beginning on."""


def long_run(folder, data):
    run = start_run(folder, data, steps=STEPS, refresh="continuous")
    run.setup = dataclasses.replace(run.setup, plan=dataclasses.replace(run.setup.plan, checkpoint_every=0))
    return run


def table(outcome):
    assert outcome.results is not None
    assert outcome.results["scores"]["adapted"]["miou"] is not None
    assert json.loads((outcome.folder / "results.json").read_text())["steps"] == outcome.results["steps"]
    return outcome.results


@contextmanager
def held(run):
    """The student stands still, so that what happens meanwhile happens in the middle of its run, however slow."""
    pid = run.student_pids()[-1]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_teacher_killed_in_the_middle_is_noticed_and_replaced_and_the_run_ends(local_ray, tmp_path, tiny_folder):
    seen = {}

    def kill(run):
        teacher, bank = run.run.teachers[0], run.run.bank
        killed = ray.get(teacher.pid.remote())
        os.kill(killed, signal.SIGKILL)
        until(lambda: ray.get(bank.status.remote())["teacher_failures"])
        with held(run):
            until(lambda: ray.get(teacher.pid.remote()) != killed)
            seen["labels"] = ray.get(bank.status.remote())["labels_made"]
            seen["step"] = run.newest["train"]["step"]

    run = long_run(tmp_path, tiny_folder)
    results = table(run.go(at_step=IN_SELF_TRAINING, do=kill))
    assert seen["step"] < STEPS
    assert results["teachers"]["teacher_failures"] >= 1
    assert any("a teacher died" in text for text in run.messages)
    assert results["teachers"]["labels_made"] > seen["labels"], "the teacher that took over labelled"
    assert results["labels"]["read"] > 0
    assert len(lines(tmp_path / "run", "student")) == 1, "the student went on"


def test_labels_that_died_with_their_bank_are_made_again_and_the_run_ends(local_ray, tmp_path, tiny_folder):
    def kill(run):
        bank = run.run.bank
        until(lambda: ray.get(bank.status.remote())["labels_made"])
        with held(run):
            ray.kill(bank, no_restart=False)
            until(lambda: ray.get(bank.status.remote()) == {})  # it lives, and knows no label any more

    run = long_run(tmp_path, tiny_folder)
    results = table(run.go(at_step=IN_SELF_TRAINING, do=kill))
    assert results["teachers"]["labels_made"] > 0, "it heard again whom to call, and of which stage"
    assert results["labels"]["read"] > 0
    assert len(lines(tmp_path / "run", "student")) == 1, "the student went on"


@pytest.fixture
def broken(tmp_path, tiny_folder):
    """A run on a copy of the miniature in which one of the 24 source images is cut short, and that image's path."""
    if (tiny_folder / "miniature").exists():  # else it is rendered
        shutil.copytree(tiny_folder / "miniature", tmp_path / "data" / "miniature")
    run = start_run(tmp_path, tmp_path / "data", steps=26)
    path = run.setup.domains.source.image_paths[5]
    assert path.startswith(str(tmp_path))
    os.truncate(path, os.path.getsize(path) // 2)
    return run, path


def test_too_many_unreadable_images_end_the_run_once_and_by_name(local_ray, broken, tmp_path):
    run, path = broken
    with pytest.raises(RunError, match=r"1 of 24 images cannot be read, more than 1%.*Repair or remove") as error:
        run.go()
    assert path in str(error.value)
    assert len(lines(tmp_path / "run", "student")) == 1, "the user hears of it before anything is tried again"


def test_a_few_unreadable_images_are_skipped_counted_and_named(local_ray, broken):
    run, path = broken
    run.setup = dataclasses.replace(run.setup, plan=dataclasses.replace(run.setup.plan, max_skipped_share=0.1))
    results = table(run.go())
    assert results["skipped"] == [path]
    assert any(path in text for text in run.messages)


@pytest.mark.parametrize(("students", "why"), [(64, "cannot share evenly"), (2, "will never have more")])
def test_more_students_than_there_can_be_is_said_at_once(local_ray, tmp_path, tiny_folder, students, why):
    began = time.monotonic()
    with pytest.raises(RunError, match=f"(?s)--students.*{why}|{why}.*--students"):
        start_run(tmp_path, tiny_folder, students=students, teachers=7).go()
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "nothing was started"
