"""A run on several Ray nodes, one of which is lost: each kind of process on its own kind of node."""

import json

import pytest
import ray

from bench.cluster_life import WatchedRun, nodes_of
from bench.simulated_cluster import simulated
from pipelines.placement import STUDENT_NODE, TEACHER_NODE

pytestmark = pytest.mark.slow

STEPS = 200
IN_SELF_TRAINING = 110


@pytest.fixture
def cluster():
    if ray.is_initialized():
        ray.shutdown()
    with simulated() as found:
        yield found


def places(cluster):
    """Kind of node → what runs there, by the names of actors' classes."""
    from ray.util.state import list_actors

    kinds = {
        node["NodeID"]: next((kind for kind in (STUDENT_NODE, TEACHER_NODE) if kind in node["Resources"]), "head")
        for node in ray.nodes()
    }
    found = {}
    for actor in list_actors(address=cluster.dashboard, limit=1000):
        if actor.state == "ALIVE":
            found.setdefault(kinds[actor.node_id], []).append(actor.class_name)
    return found


def test_a_teachers_node_is_lost_and_the_student_on_its_own_goes_on(cluster, tmp_path, tiny_folder):
    run = WatchedRun(cluster, tmp_path, ["--preset", "tiny", "--steps", str(STEPS), "--data", str(tiny_folder)])
    run.reaches(IN_SELF_TRAINING)
    found = places(cluster)
    assert found[TEACHER_NODE].count("Teacher") == 2
    assert "Evaluator" in found[TEACHER_NODE]
    assert {"SegmentReader", "RayTrainWorker"} <= set(found[STUDENT_NODE]), "pictures are read beside the student"
    assert {"LabelBank", "WeightBoard", "RunLog"} <= set(found["head"]), "labels outlive any node but the head"
    assert not {"Teacher", "RayTrainWorker"} & set(found["head"])

    killed = cluster.kill_node(cluster.alive(TEACHER_NODE)[0])
    cluster.until(run.ended, 180)
    assert run.process.returncode == 0, run.log.read_text()[-2000:]
    assert nodes_of(cluster) == {"head": 1, "student": 1, "teacher": 1}
    assert run.told_after(killed, "a teacher died") is not None
    assert len(run.lines("student")) == 1, "the student was not started again"
    steps = [line["step"] for line in run.lines("train")]
    assert steps == sorted(set(steps)), "and took no step twice"
    results = json.loads((run.folder / "results.json").read_text())
    assert results["steps"] == STEPS
    assert results["student"]["wait_share"] < 0.05
    assert results["teachers"]["labels_made"] > 0
