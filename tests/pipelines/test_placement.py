import math
import time
from pathlib import Path

import pytest
import ray
import ray.autoscaler.sdk
import yaml

from actors.errors import RunError
from pipelines import placement
from pipelines.options import AdaptOptions
from pipelines.placement import Capacity, actor_options, grown, in_words, shares


def test_one_student_and_one_teacher_fit_on_two_cores():
    found = shares(AdaptOptions(), Capacity({"CPU": 4.0}))
    assert found.student == {"CPU": 1.0}
    assert found.teacher == {"CPU": 0.5}
    assert not found.on_gpu


def test_what_is_promised_is_never_more_than_there_is():
    for students, teachers, threads in ((1, 1, 1), (2, 4, 1), (1, 2, 4)):
        needed = students * threads + teachers * 0.5 + 0.6
        options = AdaptOptions(students=students, teachers=teachers, threads=threads)
        shares(options, Capacity({"CPU": needed + 0.01}))
        with pytest.raises(RunError, match="will never have more"):
            shares(options, Capacity({"CPU": needed - 0.01}))


def test_a_request_that_never_fits_says_how_much_and_what_to_change():
    with pytest.raises(RunError, match=r"8 students .* need 9\.1 CPUs, and this cluster has 4 .*--students"):
        shares(AdaptOptions(students=8), Capacity({"CPU": 4.0}))


@pytest.mark.parametrize(
    ("students", "teachers", "gpus", "share", "evaluator"),
    [(1, 1, 2, 1.0, None), (1, 1, 3, 1.0, 0.1), (1, 1, 1, 0.45, 0.1), (2, 2, 2, 0.45, 0.1)],
)
def test_gpus_are_shared_evenly(students, teachers, gpus, share, evaluator):
    found = shares(AdaptOptions(students=students, teachers=teachers), Capacity({"CPU": 64.0, "GPU": gpus}))
    assert found.student["GPU"] == found.teacher["GPU"] == share
    assert found.evaluator.get("GPU") == evaluator
    assert found.on_gpu


@pytest.mark.parametrize("teachers", range(1, 8))
def test_one_gpu_always_holds_everybody_with_the_evaluator(teachers):
    found = shares(AdaptOptions(teachers=teachers), Capacity({"CPU": 64.0, "GPU": 1.0}))
    assert found.student["GPU"] + teachers * found.teacher["GPU"] + found.evaluator["GPU"] <= 1.0


def test_too_many_processes_on_a_gpu_are_refused():
    with pytest.raises(RunError, match=r"5 students and 4 teachers would be 9 to a GPU on 1 GPUs"):
        shares(AdaptOptions(students=5, teachers=4), Capacity({"CPU": 64.0, "GPU": 1.0}))


def test_actor_options_are_rays_words():
    assert actor_options({"CPU": 0.5}) == {"num_cpus": 0.5, "num_gpus": 0.0}
    assert actor_options({"CPU": 1.0, "GPU": 0.45, "teacher_node": 0.001}) == {
        "num_cpus": 1.0,
        "num_gpus": 0.45,
        "resources": {"teacher_node": 0.001},
    }


def test_a_share_in_words_for_a_user():
    assert in_words({"CPU": 0.5}) == "0.5 CPU"
    assert in_words({"CPU": 1.0, "GPU": 0.9, "teacher_node": 0.001}) == "1 CPU and 0.9 GPU and a node with teacher_node"


HEAD_NODE = {"CPU": 8.0}
STUDENT = {"CPU": 8.0, "GPU": 1.0, "student_node": 1.0}
TEACHER = {"CPU": 4.0, "GPU": 1.0, "teacher_node": 1.0}


def test_nodes_of_a_kind_are_summed_apart():
    found = Capacity.of([(HEAD_NODE, 1), (STUDENT, 2), (TEACHER, 4)])
    assert found.total == {"CPU": 40.0, "GPU": 6.0, "student_node": 2.0, "teacher_node": 4.0}
    assert found.students == {"CPU": 16.0, "GPU": 2.0, "student_node": 2.0}
    assert found.teachers == {"CPU": 16.0, "GPU": 4.0, "teacher_node": 4.0}
    assert Capacity.of([(HEAD_NODE, 1)]) == Capacity({"CPU": 8.0}, None, None)


def test_what_a_cluster_can_grow_to_counts_and_what_it_has_beyond_that_too():
    now, later = Capacity.of([(HEAD_NODE, 1), (STUDENT, 1)]), Capacity.of([(STUDENT, 2), (TEACHER, math.inf)])
    found = now.or_more(later)
    assert found.total["CPU"] == math.inf
    assert found.total["student_node"] == 2.0
    assert found.students == {"CPU": 16.0, "GPU": 2.0, "student_node": 2.0}
    assert now.or_more(Capacity.of([])) == now


def test_students_and_teachers_go_to_their_own_nodes_with_a_gpu_each():
    found = shares(AdaptOptions(students=2, teachers=4), Capacity.of([(HEAD_NODE, 1), (STUDENT, 2), (TEACHER, 4)]))
    assert found.student == {"CPU": 1.0, "GPU": 1.0, "student_node": 0.001}
    assert found.teacher == {"CPU": 0.5, "GPU": 0.9, "teacher_node": 0.001}
    assert found.evaluator == {"CPU": 0.1, "GPU": 0.1, "teacher_node": 0.001}, "on the tenth that a teacher leaves"


def test_teachers_share_their_own_gpus_and_never_a_students():
    cluster = Capacity.of([(HEAD_NODE, 1), (STUDENT, 4), (TEACHER, 1)])
    found = shares(AdaptOptions(teachers=3), cluster)
    assert (found.student["GPU"], found.teacher["GPU"]) == (1.0, 0.3)


def test_teachers_on_nodes_without_a_gpu_ask_for_none():
    cluster = Capacity.of([(HEAD_NODE, 1), (STUDENT, 2), ({"CPU": 16.0, "teacher_node": 1.0}, 2)])
    found = shares(AdaptOptions(teachers=2), cluster)
    assert found.teacher == {"CPU": 0.5, "teacher_node": 0.001}
    assert found.student["GPU"] == 1.0


def test_a_teacher_that_is_asked_for_later_gets_as_large_a_share_on_a_node_that_may_not_be_there_yet():
    cluster = Capacity.of([(HEAD_NODE, 1), (STUDENT, 1), (TEACHER, 2)])
    assert shares(AdaptOptions(teachers=1, max_teachers=40), cluster).teacher["GPU"] == 0.9
    with pytest.raises(RunError, match=r"18 teachers need 9\.1 CPUs, and the nodes with teacher_node have 8 and"):
        shares(AdaptOptions(teachers=18), cluster)


def test_without_nodes_of_their_own_those_that_may_be_asked_for_later_count():
    """Nobody starts another machine for them."""
    assert shares(AdaptOptions(max_teachers=3), Capacity({"CPU": 8.0, "GPU": 1.0})).teacher["GPU"] == 0.225
    with pytest.raises(RunError, match="9 teachers need"):
        shares(AdaptOptions(max_teachers=9), Capacity({"CPU": 4.0}))


def test_whoever_wants_no_nodes_of_their_own_is_anywhere():
    found = shares(AdaptOptions(own_nodes="never"), Capacity.of([(STUDENT, 1), (TEACHER, 1)]))
    assert found.student == {"CPU": 1.0, "GPU": 1.0}
    assert found.teacher == {"CPU": 0.5, "GPU": 1.0}


def test_what_ray_up_may_start_is_read_where_it_leaves_its_configuration(tmp_path):
    path = tmp_path / "ray_bootstrap_config.yaml"
    types = {
        "head": {"resources": HEAD_NODE, "max_workers": 0},
        "student": {"resources": STUDENT, "max_workers": 2},
        "teacher": {"resources": TEACHER, "max_workers": 9},
    }
    config = {"max_workers": 4, "head_node_type": "head", "available_node_types": types}
    path.write_text(yaml.safe_dump(config))
    assert grown(path) == Capacity.of([(HEAD_NODE, 1), (STUDENT, 2), (TEACHER, 4)])
    for broken in ("", "[1, 2", "max_workers: 3", "available_node_types: []\nmax_workers: 1"):
        path.write_text(broken)
        assert grown(path) == Capacity({})
    assert grown(tmp_path / "none") == Capacity({})


def test_where_only_teachers_have_nodes_of_their_own_students_are_anywhere():
    found = shares(AdaptOptions(), Capacity.of([({"CPU": 4.0}, 1), (TEACHER, 1)]))
    assert "student_node" not in found.student
    assert found.teacher["teacher_node"] == 0.001


def test_a_run_that_wants_nodes_of_each_kind_asks_for_them_and_waits(monkeypatch):
    asked, said, there = [], [], iter([{"CPU": 1.0}, {"CPU": 2.0, "student_node": 1.0}, STUDENT | TEACHER])
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(there))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    placement.wait_for_nodes(said.append, lambda: False)
    assert asked == [[{"student_node": 1}, {"teacher_node": 1}], []], "the wish ends with the wait"
    assert said == ["waiting for a node with student_node and one with teacher_node (--own-nodes always)"]
    placement.wait_for_nodes(said.append, lambda: True)
    assert asked[-1] == []


def test_our_own_cluster_file_says_how_far_its_groups_may_grow():
    found = grown(Path(__file__).parent.parent.parent / "cluster.yaml")
    assert found.students is not None
    assert found.teachers is not None
    assert (found.students["GPU"], found.teachers["GPU"]) == (1.0, 8.0)
    assert found.total["CPU"] == 9 * 8
