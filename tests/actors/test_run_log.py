import builtins
import errno
import json

from actors import run_log
from actors.run_log import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_json_with_kind_step_and_time(tmp_path):
    log = RunLog(str(tmp_path / "run"))
    log.write("train", 3, {"loss": 0.5, "stage": "alignment"})
    log.write("score", 4, {"miou": 31.0})
    first, second = lines(tmp_path / "run")
    assert (first["kind"], first["step"], first["loss"], first["stage"]) == ("train", 3, 0.5, "alignment")
    assert first["time"] > 1e9
    assert second["miou"] == 31.0


def test_scalars_become_tensorboard_curves(tmp_path):
    RunLog(str(tmp_path)).write("train", 1, {"loss": 0.5})
    assert list((tmp_path / "events").glob("events.out.tfevents*"))


def test_a_line_without_scalars_opens_no_event_file(tmp_path):
    RunLog(str(tmp_path)).write("event", 1, {"message": "hello", "flag": True})
    assert not (tmp_path / "events").exists()


def test_events_can_be_left_out(tmp_path):
    RunLog(str(tmp_path), events=False).write("train", 1, {"loss": 0.5})
    assert lines(tmp_path)[0]["loss"] == 0.5
    assert not (tmp_path / "events").exists()


def test_the_newest_value_of_everything_is_kept(tmp_path):
    log = RunLog(str(tmp_path))
    log.write("train", 1, {"loss": 1.0, "rate": 2.0})
    log.write("train", 2, {"loss": 0.5})
    assert log.watch()["newest"]["train"]["loss"] == 0.5
    assert log.watch()["newest"]["train"]["rate"] == 2.0


def test_messages_are_told_once(tmp_path):
    log = RunLog(str(tmp_path))
    log.say("first")
    seen = len(log.watch()["messages"])
    log.say("second", 7)
    assert log.watch(seen)["messages"] == ["second"]
    assert lines(tmp_path)[1]["message"] == "second"


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, monkeypatch):
    log = RunLog(str(tmp_path))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_log, "open", full, raising=False)
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 0.9})
    assert log.watch()["dropped_lines"] == 2
    assert log.watch()["newest"]["train"]["step"] == 2
    monkeypatch.setattr(run_log, "open", builtins.open, raising=False)
    log.write("train", 3, {"loss": 0.8})
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_a_failure_that_no_restart_mends_reaches_the_driver(tmp_path):
    log = RunLog(str(tmp_path))
    assert log.watch()["failure"] is None
    log.fail("the data are broken")
    assert log.watch()["failure"] == "the data are broken"


def test_a_stop_is_asked_for_once_and_stays(tmp_path):
    log = RunLog(str(tmp_path))
    assert not log.should_stop()
    log.request_stop()
    assert log.should_stop()
