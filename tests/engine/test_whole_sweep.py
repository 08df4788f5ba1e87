"""Whole sweeps over the tiny preset inside the test's own Ray, with its dashboard: it answers what is still alive."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from engine_runs import losses

from actors.errors import RunError
from pipelines.adapt import Manner, adapt
from pipelines.options import AdaptOptions, read_options
from tune_spaces.options import SweepOptions, read_sweep_options
from tune_spaces.record import read_sweep
from tune_spaces.sweep import sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def watched_ray():
    import ray

    folder = tempfile.mkdtemp(prefix="t")
    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        object_store_memory=200_000_000,
        _temp_dir=folder,
        log_to_driver=False,
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def stage_one(watched_ray, tmp_path_factory, tiny_folder):
    runs = tmp_path_factory.mktemp("one")
    options = AdaptOptions(
        preset="tiny", to_stage=1, runs=str(runs), data=str(tiny_folder), references="never", name="one"
    )
    return adapt(options, lambda *_: None, manner=Manner(student_here=True, brief=True)).folder


def left_over(dashboard):
    """Actors, placement groups and objects that Ray still knows, after a moment to clear away."""
    from ray.util.state import list_actors, list_objects, list_placement_groups

    gc.collect()  # futures in Ray Tune's cycles
    for _ in range(20):
        actors = [a.class_name for a in list_actors(address=dashboard, filters=[("state", "!=", "DEAD")])]
        groups = [g.placement_group_id for g in list_placement_groups(address=dashboard) if g.state != "REMOVED"]
        objects = [o.object_id for o in list_objects(address=dashboard)]
        if not actors and not groups and not objects:
            return []
        time.sleep(0.5)
    return [*actors, *groups, *objects]


def losses_until(folder, step):
    """What the terms came to over all steps: a stop writes a line of its own, of the steps since the last."""
    found, before = Counter(), 0
    for at, terms in sorted(losses(folder).items()):
        if at <= step:
            found.update({name: value * (at - before) for name, value in terms.items()})
            before = at
    assert before == step
    return dict(found)


def space(path, text):
    path.write_text(text)
    return str(path)


def options_of(tmp_path, stage_one, tiny_folder, name, **given):
    common = {"preset": "tiny", "name": name, "runs": str(tmp_path), "data": str(tiny_folder), "search": "grid"}
    return SweepOptions(**{**common, "init": str(stage_one), "from_stage": 2, **given})


def test_a_killed_trial_is_tried_again_a_failing_one_is_reported_and_nothing_is_left(
    watched_ray, stage_one, tmp_path, tiny_folder
):
    # Without source images there is nothing to mix, so every second point cannot work.
    file = space(tmp_path / "s.toml", "[rate_scale]\nvalues = [1.0, 2.0]\n[eplc.source_weight]\nvalues = [1.0, 0.0]\n")
    options = options_of(tmp_path, stage_one, tiny_folder, "killed", space=file, looks=2)
    killed = []

    def watch(kind, what):
        if kind == "trials" and what["trial"].number == 3 and what["trial"].status == "running" and not killed:
            lines = Path(tmp_path, "killed/trials", what["trial"].id, "metrics.jsonl")
            for _ in range(200):
                found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
                if found:
                    os.kill(found[0]["pid"], signal.SIGKILL)
                    killed.append(what["trial"].id)
                    return
                time.sleep(0.1)

    outcome = sweep(options, watch)
    assert not outcome.stopped
    found = {tuple(t["point"].values()): t for t in read_sweep(outcome.folder)["trials"]}
    assert list(found) == [(1.0, 1.0), (1.0, 0.0), (2.0, 1.0), (2.0, 0.0)]
    assert [t["status"] for t in found.values()] == ["finished", "failed", "finished", "failed"]
    assert [t["attempts"] for t in found.values()] == [1, 2, 2, 2]
    assert found[2.0, 1.0]["id"] in killed
    assert "mixing='classes' pastes source images" in found[1.0, 0.0]["error"]
    best = read_sweep(outcome.folder)["best"]
    assert best == max((t for t in found.values() if t["status"] == "finished"), key=lambda t: t["score"])["id"]
    again = read_options(outcome.best)
    chosen = next(t for t in found.values() if t["id"] == best)
    assert (again.rate_scale, again.eplc.source_weight) == tuple(chosen["point"].values())
    assert (again.init, again.from_stage, again.name) == (str(stage_one), 2, None)
    assert "mixing=" in outcome.page.read_text()
    assert left_over(watched_ray) == []

    again = sweep(read_sweep_options(outcome.folder), lambda *_: None, resume=True)
    after = {tuple(t["point"].values()): t for t in read_sweep(again.folder)["trials"]}
    assert [t["status"] for t in after.values()] == ["finished", "failed", "finished", "failed"]
    assert [t["attempts"] > found[point]["attempts"] for point, t in after.items()] == [False, True, False, True]
    assert left_over(watched_ray) == []


def test_an_interrupted_sweep_ends_as_one_that_was_not(watched_ray, stage_one, tmp_path, tiny_folder):
    file = space(tmp_path / "s.toml", "[eplc.dropout]\nvalues = [0.2, 0.0]\n")
    common = {"space": file, "refresh": "once", "max_concurrent": 1, "looks": 2}
    whole = sweep(options_of(tmp_path, stage_one, tiny_folder, "whole", **common), lambda *_: None)

    def interrupt(kind, what):
        if kind == "trials" and what["trial"].number == 2 and what["trial"].status == "running":
            lines = Path(tmp_path, "cut/trials", what["trial"].id, "metrics.jsonl")
            while not (lines.is_file() and '"kind": "train", "step": 1,' in lines.read_text()):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    cut = sweep(options_of(tmp_path, stage_one, tiny_folder, "cut", **common), interrupt)
    assert cut.stopped
    assert signal.getsignal(signal.SIGINT) is handler
    assert left_over(watched_ray) == []
    before = read_sweep(cut.folder)["trials"]
    assert [t["status"] for t in before] == ["finished", "open"]
    saved = sorted((cut.folder / "trials" / before[1]["id"] / "checkpoints").glob("step_*"))
    assert saved, "what ran has saved itself"
    untouched = (cut.folder / "trials" / before[0]["id"] / "results.json").stat().st_mtime_ns

    resumed = sweep(read_sweep_options(cut.folder), lambda *_: None, resume=True)
    assert not resumed.stopped
    after = read_sweep(cut.folder)["trials"]
    assert [t["status"] for t in after] == ["finished"] * 2
    assert after[0] == before[0]
    assert (cut.folder / "trials" / before[0]["id"] / "results.json").stat().st_mtime_ns == untouched
    assert after[1]["attempts"] == 2
    expected = read_sweep(whole.folder)["trials"]
    for one, other in zip(expected, after, strict=True):
        assert one["point"] == other["point"]
        assert one["score"] == other["score"]
        assert one["miou"] == other["miou"]
        # Stability compares with the look before, whose step depends on when the evaluator had time.
        signals = [{k: v for k, v in t["signals"].items() if k != "stability"} for t in (one, other)]
        assert signals[0] == signals[1]
        folders = [whole.folder / "trials" / one["id"], cut.folder / "trials" / other["id"]]
        assert losses_until(folders[0], 20) == pytest.approx(losses_until(folders[1], 20), rel=1e-6)
    lines = (cut.folder / "trials" / after[1]["id"] / "metrics.jsonl").read_text()
    assert lines.count('"kind": "train", "step": 1,') == 1, "it went on and did not begin anew"
    assert left_over(watched_ray) == []


def test_what_cannot_work_is_refused_before_a_folder_is_made(watched_ray, stage_one, tmp_path, tiny_folder):
    for given, said in (
        ({"max_concurrent": 9}, "--max-concurrent is 9, but only 1 trial can run at a time: each needs 2.1 CPUs"),
        ({"space": space(tmp_path / "a.toml", "[eplc.drop]\nvalues = [1]\n")}, "did you mean eplc.dropout"),
        (
            {"space": space(tmp_path / "b.toml", "[mrnet.memory]\nvalues = [1.0]\n")},
            "decides a stage that all trials share",
        ),
    ):
        options = options_of(tmp_path, stage_one, tiny_folder, "never", **{"only": (), "search": "random", **given})
        with pytest.raises(RunError, match=said):
            sweep(options, lambda *_: None)
        assert not (tmp_path / "never").exists()
    held = dataclasses.replace(options_of(tmp_path, stage_one, tiny_folder, "never"), search="random", held_out=13)
    with pytest.raises(Exception, match="13 of 24 source images cannot be held out"):
        sweep(held, lambda *_: None)
