import errno
import os
import threading

import pytest
import torch

from actors.checkpoints import CheckpointStore, keep_stage, kept_stages, read_stage, snapshot
from actors.errors import RunError


def state(value):
    return {"step": value, "weights": torch.full((3,), float(value))}


def full_disk(error):
    def save(value, file):
        file.write(b"half of it")
        raise error

    return save


def test_what_was_saved_is_the_newest(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.newest() is None
    assert store.save(5, state(5)) is None
    assert store.save(12, state(12)) is None
    newest = store.newest()
    assert newest["step"] == 12
    assert newest["weights"].tolist() == [12.0] * 3


def test_only_the_newest_few_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 10, 100):
        store.save(step, state(step))
    assert store.steps() == [10, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]


def test_a_step_can_be_saved_again(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, state(1))
    assert store.save(1, {"step": 1, "weights": torch.zeros(1)}) is None
    assert store.newest()["weights"].tolist() == [0.0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed\nmore"),
    ],
)
def test_a_full_disk_leaves_the_previous_checkpoint_good_and_says_so(tmp_path, monkeypatch, error):
    store = CheckpointStore(tmp_path)
    store.save(5, state(5))
    monkeypatch.setattr(torch, "save", full_disk(error))
    sentence = store.save(6, state(6))
    assert "step 6 could not be written" in sentence
    assert "the one of step 5 stays good" in sentence
    assert f"Free space in {tmp_path}" in sentence
    assert "\n" not in sentence
    assert store.newest()["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_full_disk_at_the_first_checkpoint_says_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", full_disk(OSError(errno.ENOSPC, "No space left on device")))
    assert "there is none before it" in CheckpointStore(tmp_path / "new").save(6, state(6))


def test_a_checkpoint_appears_only_after_the_disk_has_it(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(5, state(5))

    def full(descriptor):
        assert store.steps() == [5]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "the one of step 5 stays good" in store.save(6, state(6))
    assert store.newest()["step"] == 5


def test_what_is_only_half_there_is_not_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, state(5))
    (tmp_path / ".step_00000009.partial").mkdir()
    (tmp_path / ".step_00000009.partial" / "state.pt").write_bytes(b"x")
    (tmp_path / "step_00000010").mkdir()
    assert store.steps() == [5]
    assert store.newest()["step"] == 5


def test_a_foreign_folder_is_not_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, state(5))
    (tmp_path / "step_best").mkdir()
    (tmp_path / "step_best" / "state.pt").write_bytes(b"x")
    assert store.steps() == [5]


def test_another_format_is_refused_in_one_sentence(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, {**state(5), "format": 99})
    with pytest.raises(RunError, match="format 99, this version reads 1"):
        store.newest()


def test_a_checkpoint_written_later_is_there_after_waiting(tmp_path, monkeypatch):
    store, told, may_write = CheckpointStore(tmp_path), [], threading.Event()
    plain = torch.save

    def slow(value, file):
        may_write.wait(5)
        plain(value, file)

    monkeypatch.setattr(torch, "save", slow)
    store.save_later(3, state(3), told.append)
    assert store.steps() == []
    may_write.set()
    store.wait()
    assert store.steps() == [3]
    assert told == []


def test_a_failure_in_the_background_is_told(tmp_path, monkeypatch):
    store, told = CheckpointStore(tmp_path), []
    monkeypatch.setattr(torch, "save", full_disk(OSError(errno.ENOSPC, "No space left on device")))
    store.save_later(3, state(3), told.append)
    store.wait()
    assert len(told) == 1
    assert "step 3 could not be written" in told[0]


def test_a_snapshot_is_a_deep_copy():
    weights = torch.zeros(2, requires_grad=True)
    original = {"a": weights, "b": [torch.ones(1), (torch.ones(1), 4)], "c": "text"}
    copy = snapshot(original)
    with torch.no_grad():
        weights.add_(1)
        original["b"][0].add_(1)
        original["b"][1][0].add_(1)
    assert copy["a"].tolist() == [0.0, 0.0]
    assert not copy["a"].requires_grad
    assert copy["b"][0].item() == 1
    assert copy["b"][1][0].item() == 1
    assert isinstance(copy["b"][1], tuple)
    assert copy["c"] == "text"


def test_checkpoints_in_a_store_are_those_of_a_folder(store):
    kept = CheckpointStore(store.uri("bucket/runs/one/checkpoints"), keep=2)
    assert kept.newest() is None
    for step in (1, 10, 100):
        assert kept.save(step, state(step)) is None
    assert kept.steps() == [10, 100]
    assert kept.newest()["weights"].tolist() == [100.0] * 3
    assert store.files() == [f"runs/one/checkpoints/step_{step:08d}/state.pt" for step in (10, 100)]


def test_a_store_that_cannot_be_written_leaves_the_checkpoint_before_and_says_so(store):
    kept = CheckpointStore(store.uri("bucket/checkpoints"))
    kept.save(5, state(5))
    store.refuse = lambda operation, key: (403, "AccessDenied") if operation == "part" else None
    sentence = kept.save(6, state(6))
    assert "checkpoint of step 6 could not be written" in sentence
    assert "access to the bucket bucket is denied" in sentence
    assert "the one before it stays good" in sentence
    store.refuse = lambda operation, key: None
    assert kept.newest()["step"] == 5
    assert kept.save(7, state(7)) is None


def test_a_store_that_cannot_be_asked_is_one_sentence(store):
    store.refuse = lambda operation, key: (403, "AccessDenied")
    with pytest.raises(RunError, match=r"the newest checkpoint cannot be read: s3://.*is denied"):
        CheckpointStore(store.uri("bucket/checkpoints")).newest()


@pytest.mark.parametrize("where", ["folder", "store"])
def test_the_weights_of_a_stage_are_read_as_they_were(where, tmp_path, request):
    folder = str(tmp_path) if where == "folder" else request.getfixturevalue("store").uri("bucket/run")
    network = torch.nn.Linear(3, 2)
    assert keep_stage(folder, 20, "Warm up!", network) is None
    assert keep_stage(folder, 3, "first", torch.nn.Linear(3, 2)) is None
    (early, _), (step, path) = kept_stages(folder)
    assert (early, step, path.name) == (3, 20, "step_00000020-warm-up-.safetensors")
    assert torch.equal(read_stage(path)["weight"], network.weight)
