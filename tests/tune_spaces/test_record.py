import json

import pytest

from actors.errors import RunError
from tune_spaces.record import SweepRecord, read_sweep

ABOUT = {"metric": "label_free", "oracle_metric": False}


def look(step, score, finished=False, **more):
    return {"step": step, "score": score, "signals": {"entropy": 0.1}, "finished": finished, **more}


@pytest.fixture
def record(tmp_path):
    return SweepRecord(tmp_path, ABOUT)


def on_disk(record):
    return {t["id"]: t for t in read_sweep(record.folder)["trials"]}


def test_everything_that_happens_is_on_the_disk(record):
    record.started("a", {"eplc.dropout": 0.1})
    record.looked("a", look(5, 0.2))
    record.looked("a", look(10, 0.3, True, miou=30.0, seconds={"adapt": 1.0}))
    found = on_disk(record)["a"]
    assert (found["number"], found["point"], found["status"]) == (1, {"eplc.dropout": 0.1}, "finished")
    assert found["curve"] == [{"step": 5, "score": 0.2}, {"step": 10, "score": 0.3}]
    assert (found["score"], found["miou"], found["seconds"]) == (0.3, 30.0, {"adapt": 1.0})
    assert read_sweep(record.folder)["best"] == "a"


def test_the_best_has_finished_and_of_equals_is_the_first(record):
    for name, score, finished in (("a", 0.1, True), ("b", 0.5, True), ("c", 0.5, True), ("d", 0.9, False)):
        record.started(name, {})
        record.looked(name, look(10, score, finished))
        record.ended(name)
    assert record.best().id == "b"
    assert on_disk(record)["d"]["status"] == "stopped"


def test_a_trial_without_a_score_is_never_the_best(record):
    for name, score in (("a", None), ("b", float("nan"))):
        record.started(name, {})
        record.looked(name, look(10, score, True))
    assert record.best() is None


def test_a_failure_is_remembered_until_the_trial_finishes(record):
    record.started("a", {})
    record.failed("a", "its process died", again=True)
    assert (on_disk(record)["a"]["status"], on_disk(record)["a"]["error"]) == ("running", "its process died")
    record.started("a", {})
    record.looked("a", look(10, 0.3, True))
    assert (on_disk(record)["a"]["attempts"], on_disk(record)["a"]["error"]) == (2, None)
    record.started("b", {})
    record.failed("b", "full", again=False)
    assert on_disk(record)["b"]["status"] == "failed"


def test_steps_that_are_run_again_replace_those_of_the_first_attempt(record):
    record.started("a", {})
    for step in (5, 10, 5):
        record.looked("a", look(step, step / 10))
    assert on_disk(record)["a"]["curve"] == [{"step": 5, "score": 0.5}]


def test_a_sweep_that_goes_on_knows_its_trials(record, tmp_path):
    record.started("a", {"x": 1})
    record.looked("a", look(10, 0.3, True))
    record.started("b", {"x": 2})
    record.interrupted()
    again = SweepRecord(tmp_path, ABOUT)
    assert [t.status for t in again.trials.values()] == ["finished", "open"]
    assert again.started("b", {"x": 2}).attempts == 2
    assert again.started("c", {"x": 3}).number == 3


def test_open_trials_that_ray_tune_forgot_in_a_crash_are_left_out(record):
    for name in "abc":
        record.started(name, {})
    record.looked("a", look(10, 0.1, True))
    record.forget_all_but({"b"})
    assert set(record.trials) == {"a", "b"}


def test_only_the_weights_of_the_best_and_of_those_that_go_on_are_kept(record, tmp_path):
    def weights(name):
        return [tmp_path / "trials" / name / kind for kind in ("checkpoints", "recommended")]

    for name, score in (("a", 0.1), ("b", 0.5), ("c", 0.3), ("d", None), ("e", None), ("f", 0.2)):
        record.started(name, {})
        for folder in weights(name):
            folder.mkdir(parents=True)
        if score is not None:
            record.looked(name, look(10, score, finished=name != "f"))
    record.ended("f")
    record.failed("e", "full", again=False)
    record.forget_weights()
    left = {name for name in "abcdef" if all(folder.is_dir() for folder in weights(name))}
    assert left == {"b", "d", "e"}
    assert not any(folder.exists() for name in "acf" for folder in weights(name))
    record.looked("d", look(10, 0.9, finished=True))
    record.forget_weights()
    assert {name for name in "abcdef" if any(folder.exists() for folder in weights(name))} == {"d", "e"}


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(RunError, match="is no sweep"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({})[:1])
    with pytest.raises(RunError, match="is no sweep"):
        read_sweep(tmp_path)
