import pytest

from actors.errors import RunError
from pipelines.options import AdaptOptions
from pipelines.placement import actor_options, shares


def test_one_student_and_one_teacher_fit_on_two_cores():
    found = shares(AdaptOptions(), {"CPU": 4.0})
    assert found.student == {"CPU": 1.0}
    assert found.teacher == {"CPU": 0.5}
    assert not found.on_gpu


def test_what_is_promised_is_never_more_than_there_is():
    for students, teachers, threads in ((1, 1, 1), (2, 4, 1), (1, 2, 4)):
        needed = students * threads + teachers * 0.5 + 0.6
        options = AdaptOptions(students=students, teachers=teachers, threads=threads)
        shares(options, {"CPU": needed + 0.01})
        with pytest.raises(RunError, match="will never have more"):
            shares(options, {"CPU": needed - 0.01})


def test_a_request_that_never_fits_says_how_much_and_what_to_change():
    with pytest.raises(RunError, match=r"8 students .* need 9\.1 CPUs, and this cluster has 4 .*--students"):
        shares(AdaptOptions(students=8), {"CPU": 4.0})


@pytest.mark.parametrize(
    ("students", "teachers", "gpus", "share", "evaluator"),
    [(1, 1, 2, 1.0, None), (1, 1, 3, 1.0, 0.1), (1, 1, 1, 0.45, 0.1), (2, 2, 2, 0.45, 0.1)],
)
def test_gpus_are_shared_evenly(students, teachers, gpus, share, evaluator):
    found = shares(AdaptOptions(students=students, teachers=teachers), {"CPU": 64.0, "GPU": gpus})
    assert found.student["GPU"] == found.teacher["GPU"] == share
    assert found.evaluator.get("GPU") == evaluator
    assert found.on_gpu


@pytest.mark.parametrize("teachers", range(1, 8))
def test_one_gpu_always_holds_everybody_with_the_evaluator(teachers):
    found = shares(AdaptOptions(teachers=teachers), {"CPU": 64.0, "GPU": 1.0})
    assert found.student["GPU"] + teachers * found.teacher["GPU"] + found.evaluator["GPU"] <= 1.0


def test_too_many_processes_on_a_gpu_are_refused():
    with pytest.raises(RunError, match=r"5 students and 4 teachers would be 9 to a GPU on 1 GPUs"):
        shares(AdaptOptions(students=5, teachers=4), {"CPU": 64.0, "GPU": 1.0})


def test_actor_options_are_rays_words():
    assert actor_options({"CPU": 0.5}) == {"num_cpus": 0.5, "num_gpus": 0.0}
