import builtins
import errno
import json
import time

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


def test_students_that_failed_are_missed_until_one_begins_again(tmp_path):
    log = RunLog(str(tmp_path), events=False)
    assert not log.watch()["students_lost"]
    log.write("train", 7, {"loss": 0.5})
    log.students_failed([1], "its node is gone", 3)
    log.write("teachers", 7, {"coverage": 0.5})
    log.students_failed([1], "its node is gone", 3)
    watched = log.watch()
    assert watched["students_lost"]
    assert watched["messages"] == [
        "student 1 failed: its node is gone. All begin again from the newest checkpoint, up to 3 times in a run"
    ], "once, however often Ray Train finds it so"
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)][1] == ("event", 7)
    log.write("student", 0, {"rank": 0})
    assert not log.watch()["students_lost"]
    log.students_failed([0, 1], "both", 3)
    assert log.watch(1)["messages"][0].startswith("students 0, 1 failed: both.")


def test_students_that_end_by_a_failure_which_was_said_are_no_news(tmp_path):
    log = RunLog(str(tmp_path), events=False)
    log.fail("the data are broken")
    log.students_failed([0], "the data are broken", 3)
    assert not log.watch()["students_lost"]
    assert log.watch()["messages"] == []


def test_a_stop_is_asked_for_once_and_stays(tmp_path):
    log = RunLog(str(tmp_path))
    assert not log.should_stop()
    log.request_stop()
    assert log.should_stop()


def test_a_log_in_a_store_is_copied_there_when_it_is_flushed(store):
    log = RunLog(store.uri("bucket/runs/one"))
    log.write("train", 1, {"loss": 0.5})
    log.say("hello", 1)
    assert log.flush() is None
    text = store.buckets["bucket"]["runs/one/metrics.jsonl"][0].decode()
    assert [json.loads(line)["kind"] for line in text.splitlines()] == ["train", "event"]
    assert any(key.startswith("runs/one/events/events.out.tfevents") for key in store.files())
    assert log.close() is None


def test_what_has_not_changed_is_not_copied_again(store):
    log = RunLog(store.uri("bucket/one"), events=False)
    log.write("train", 1, {"loss": 0.5})
    assert log.flush() is None
    asked = store.asked.total()
    assert log.flush() is None
    assert store.asked.total() == asked


def test_a_log_in_a_store_is_copied_by_itself(store, monkeypatch):
    monkeypatch.setattr(run_log, "COPY_SECONDS", 0.01)
    log = RunLog(store.uri("bucket/one"), events=False)
    log.write("train", 1, {"loss": 0.5})
    end = time.monotonic() + 20
    while "one/metrics.jsonl" not in store.files():
        assert time.monotonic() < end, "nobody copied it"
        time.sleep(0.01)


def test_a_log_in_a_store_goes_on_after_the_lines_that_are_there(store):
    for step in (1, 2):
        log = RunLog(store.uri("bucket/one"), events=False)
        log.write("train", step, {"loss": 0.5})
        log.flush()
    text = store.buckets["bucket"]["one/metrics.jsonl"][0].decode()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def test_a_line_that_was_cut_off_does_not_spoil_the_next_one(store):
    store.buckets["bucket"]["one/metrics.jsonl"] = (b'{"kind": "train", "step": 1}\n{"kind": "tr', 1e9)
    log = RunLog(store.uri("bucket/one"), events=False)
    log.write("train", 2, {"loss": 0.5})
    log.flush()
    whole, _, last = store.buckets["bucket"]["one/metrics.jsonl"][0].decode().splitlines()
    assert (json.loads(whole)["step"], json.loads(last)["step"]) == (1, 2)


def test_a_log_that_is_closed_leaves_nothing_on_this_machine(store):
    log = RunLog(store.uri("bucket/one"), events=False)
    log.write("train", 1, {"loss": 0.5})
    store.refuse = lambda operation, key: (403, "AccessDenied")
    assert f"they are in {log.folder}" in log.close()
    assert log.folder.exists()
    store.refuse = lambda operation, key: None
    assert log.close() is None
    assert not log.folder.exists()
    assert store.files() == ["one/metrics.jsonl"]


def test_a_copy_that_fails_is_said_and_made_up_for(store):
    log = RunLog(store.uri("bucket/one"), events=False)
    log.write("train", 1, {"loss": 0.5})
    store.refuse = lambda operation, key: (403, "AccessDenied")
    assert "metrics could not be copied: s3://bucket/one/metrics.jsonl" in log.flush()
    store.refuse = lambda operation, key: None
    assert log.flush() is None
    assert store.files() == ["one/metrics.jsonl"]


def test_a_log_in_a_folder_has_nothing_to_copy(tmp_path):
    log = RunLog(str(tmp_path))
    log.write("train", 1, {"loss": 0.5})
    assert log.flush() is None
    assert log.copies is None
