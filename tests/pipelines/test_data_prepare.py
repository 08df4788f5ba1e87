from dataclasses import replace
from pathlib import Path

import pytest

from actors.errors import RunError
from pipelines.data_prepare import needed, prepare
from pipelines.decode_cache import DecodeCache
from pipelines.options import AdaptOptions
from pipelines.setup import resolve
from tests.own_data import write_own_data


def options(tmp_path, **more):
    source, target = write_own_data(tmp_path)
    return AdaptOptions(source=source, target=target, preset="tiny", data=str(tmp_path / "data"), **more)


def test_everything_that_a_run_reads_is_decoded_once(tmp_path):
    given, told = options(tmp_path), []
    done = prepare(given, lambda *what: told.append(what))
    assert told[-1] == (done.entries, done.entries)
    assert done.unreadable == []
    assert len(list(Path(tmp_path / "data" / "decoded").rglob("*.arrow"))) == done.entries

    def decode():
        raise AssertionError("it was not in the cache")

    setup = resolve(given)
    for job in needed(setup):
        if job.encoding is None:
            DecodeCache(setup.cache.folder).get(job.path, job.size, "image", decode)


def test_a_file_that_changed_is_decoded_again(tmp_path):
    given = options(tmp_path)
    prepare(given, lambda *_: None)
    before = set((tmp_path / "data" / "decoded").rglob("*.arrow"))
    photo = tmp_path / "target" / "photos" / "0.jpg"
    photo.write_bytes((tmp_path / "target" / "photos" / "1.jpg").read_bytes())
    prepare(given, lambda *_: None)
    assert set((tmp_path / "data" / "decoded").rglob("*.arrow")) > before


def test_an_unreadable_file_is_named_and_the_others_are_decoded(tmp_path):
    given = options(tmp_path)
    broken = tmp_path / "target" / "photos" / "3.jpg"
    broken.write_bytes(b"no picture")
    done = prepare(given, lambda *_: None)
    assert done.unreadable == [str(broken)]
    assert done.entries > 20


def test_a_cache_that_cannot_be_written_is_a_sentence_not_a_success(tmp_path):
    given = options(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"decoded images cannot be written to .*taken"):
        prepare(replace(given, data=str(tmp_path / "taken")), lambda *_: None)
