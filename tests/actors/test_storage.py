import io
import os
import pickle
from pathlib import Path

import pytest

from actors import storage
from actors.errors import RunError
from actors.storage import (
    RemotePath,
    Statuses,
    StorageError,
    is_remote,
    listed,
    local,
    matching,
    place,
    readable,
    remove_tree,
    tried,
    whole,
    write_whole,
)


@pytest.fixture(params=["folder", "store"])
def root(request, tmp_path):
    """The same tests on a folder of this machine, which is the reference, and on an object store."""
    if request.param == "folder":
        return place(str(tmp_path)) / "runs"
    return place(request.getfixturevalue("store").uri("bucket/runs"))


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return path


def names(paths):
    return [path.name for path in paths]


def test_what_was_written_is_read(root):
    path = write(root / "a" / "text.toml", "ä = 1\n")
    assert path.read_text(encoding="utf-8") == "ä = 1\n"
    assert path.read_bytes() == "ä = 1\n".encode()
    assert path.stat().st_size == 7
    assert path.stat().st_mtime > 1e9
    assert write(root / "empty", b"").read_bytes() == b""


def test_line_ends_and_damaged_bytes_are_read_as_from_a_folder(root):
    path = write(root / "lines", b"a\r\nb\rc\n\xff")
    assert path.read_text(encoding="utf-8", errors="replace") == "a\nb\nc\n\ufffd"


def test_files_and_folders_are_told_apart(root):
    write(root / "run" / "config.toml")
    found = {name: (path.exists(), path.is_file(), path.is_dir()) for name, path in
             {"file": root / "run" / "config.toml", "folder": root / "run", "none": root / "ru"}.items()}  # fmt: skip
    assert found == {"file": (True, True, False), "folder": (True, False, True), "none": (False, False, False)}


def test_a_pattern_finds_the_same_everywhere(root):
    for name in ("b/step_1/state.pt", "b/step_2/state.pt", "b/step_3/other", "a/step_9/state.pt", "c.txt"):
        write(root / name)
    assert names(path.parent for path in matching(root, "*/step_*/state.pt")) == ["step_9", "step_1", "step_2"]
    assert names(matching(root / "b", "step_*/state.pt")) == ["state.pt"] * 2
    assert names(matching(root, "*.txt")) == ["c.txt"]
    assert matching(root / "nowhere", "*.txt") == []
    assert names(sorted(root.iterdir())) == ["a", "b", "c.txt"]


def test_a_listed_folder_answers_as_one_that_is_asked(root):
    for name in ("images/ulm/1.png", "images/ulm/2.png", "images/aachen/1.png", "labels/1.png"):
        write(root / name)
    seen = listed(root / "images")
    assert [f"{path.parent.name}/{path.name}" for path in matching(seen, "*/*.png")] == [
        "aachen/1.png",
        "ulm/1.png",
        "ulm/2.png",
    ]
    assert (seen / "ulm" / "2.png").is_file()
    assert (seen / "ulm").is_dir()
    assert not (seen / "ulm" / "3.png").exists()
    assert not listed(root / "nothing").is_dir()


def test_a_path_has_the_parts_of_a_path(root):
    path = root / "a.b" / "image.tar.gz"
    assert (path.name, path.stem, path.suffix) == ("image.tar.gz", "image.tar", ".gz")
    assert path.parent == root / "a.b"
    assert path.parents[1] == root
    assert path.with_suffix(".txt").name == "image.tar.txt"
    assert path.with_name("other") == root / "a.b/other"
    assert path.parts[-2:] == ("a.b", "image.tar.gz")
    assert path.is_relative_to(root)
    assert not path.is_relative_to(root / "a")
    assert path.absolute() == path
    assert place(str(path)) == path
    assert place(path) is path
    assert sorted([root / "b", root / "a/z", root / "a"]) == [root / "a", root / "a/z", root / "b"]
    assert len({root / "a", root / "a", root / "b"}) == 2


def test_a_path_travels_to_another_process(root):
    path = write(root / "x", b"here")
    assert pickle.loads(pickle.dumps(path)) == path
    assert pickle.loads(pickle.dumps(listed(root))) / "x" == path


def test_what_is_missing_is_no_file(root):
    missing = root / "nothing"
    for work in (missing.read_bytes, missing.stat, missing.unlink):
        with pytest.raises(FileNotFoundError):
            work()
    missing.unlink(missing_ok=True)
    remove_tree(missing)


def test_files_and_folders_are_removed(root):
    path = write(root / "a" / "x")
    write(root / "a" / "deep" / "y")
    path.unlink()
    assert not path.exists()
    assert (root / "a").exists()
    remove_tree(root / "a")
    assert not (root / "a").exists()


def test_a_file_appears_when_it_is_complete(root):
    path = write(root / "file", b"before")
    with whole(path, durable=True) as file:
        file.write(b"af")
        file.write(b"ter")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert names(root.iterdir()) == ["file"]


def test_a_file_whose_writer_fails_stays_as_it_was(root):
    path = write(root / "file", b"before")

    def half(target):
        with whole(target) as file:
            file.write(b"half")
            raise ValueError("no more")

    for target in (path, root / "new"):
        with pytest.raises(ValueError, match="no more"):
            half(target)
    assert path.read_bytes() == b"before"
    assert names(root.iterdir()) == ["file"]


def test_pillow_and_torch_can_read_what_is_readable(root):
    path = write(root / "x", b"content")
    for given in (path, str(path)):
        file = readable(given)
        assert (file.read() if isinstance(file, io.BytesIO) else Path(file).read_bytes()) == b"content"


def test_names_with_odd_letters_are_found_again(root):
    for name in ("a b", "ä", "100%", "what?", "no#1", "a+b", "%20"):
        path = write(root / name, name)
        assert place(str(path)).read_text() == name
        assert name in names(root.iterdir())


def test_a_large_file_is_sent_in_parts(store):
    path, content = place(store.uri("bucket/large")), os.urandom(2**20) * 12
    path.write_bytes(content)
    assert store.buckets["bucket"]["large"][0] == content
    assert store.asked["part"] > 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("operation", ["begin", "part", "complete"])
def test_an_upload_that_fails_leaves_the_file_that_was_there(store, operation):
    path = place(store.uri("bucket/file"))
    path.write_bytes(b"before")
    store.refuse = lambda asked, key: (403, "AccessDenied") if asked == operation else None
    with pytest.raises(StorageError, match="access to the bucket bucket is denied"):
        path.write_bytes(b"after" * 2_500_000)
    store.refuse = lambda asked, key: None
    assert path.read_bytes() == b"before"


def test_a_listing_costs_a_request_a_thousand_files_and_then_none(store):
    store.buckets["bucket"] |= {f"data/{i:04d}.png": (b"x", 1e9) for i in range(2500)}
    seen = listed(place(store.uri("bucket/data")))
    asked = store.asked.total()
    assert asked == 3
    assert len(matching(seen, "*.png")) == 2500
    assert all((seen / f"{i:04d}.png").is_file() for i in range(2500))
    assert store.asked.total() == asked


def test_a_folder_is_asked_once_for_the_states_of_its_files(store, tmp_path):
    statuses = Statuses()
    store.buckets["bucket"] |= {f"data/{i}.png": (b"x" * i, 1e9 + i) for i in range(50)}
    found = [statuses.of(store.uri(f"bucket/data/{i}.png")) for i in range(50)]
    assert [(status.st_size, status.st_mtime) for status in found] == [(i, 1e9 + i) for i in range(50)]
    assert store.asked.total() == 1
    with pytest.raises(FileNotFoundError):
        statuses.of(store.uri("bucket/data/50.png"))
    (tmp_path / "x").write_bytes(b"here")
    assert statuses.of(str(tmp_path / "x")) == os.stat(tmp_path / "x")


def test_an_endpoint_can_stand_in_the_environment(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{store.address}")
    path = place(f"s3://bucket/{store.address.replace(':', '-')}/x")  # file systems are kept by their address
    storage._file_system.cache_clear()
    path.write_bytes(b"found")
    storage._file_system.cache_clear()
    assert store.files() == [path.key.removeprefix("bucket/")]


def test_a_bucket_that_is_not_there_is_a_sentence(store):
    path = place(store.uri("nowhere/file"))
    assert not path.exists()
    with pytest.raises(StorageError, match="the bucket nowhere does not exist"):
        path.write_bytes(b"x")
    with pytest.raises(RunError, match=r"it cannot be written: s3://nowhere/file.*does not exist"):
        tried("it cannot be written", lambda: path.write_bytes(b"x"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "access to the bucket bucket is denied"),
        ("InvalidAccessKeyId", "credentials of this machine are not known"),
        ("SignatureDoesNotMatch", "credentials of this machine are wrong"),
    ],
)
def test_a_refusal_is_a_sentence_without_credentials(store, code, said):
    path = place(store.uri("bucket/file"))
    store.refuse = lambda operation, key: (403, code)
    with pytest.raises(StorageError, match=said) as caught:
        path.write_bytes(b"x")
    assert "testing" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["runs", "/nfs/runs", "a:b", "C:/runs", "./x?y"])
def test_a_path_of_this_machine_stays_what_it_is(text):
    assert place(text) == Path(text)
    assert not is_remote(text)
    assert local(text, "--out", "it must be") == Path(text)


def test_a_file_address_is_a_path_of_this_machine(tmp_path):
    assert place(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert not is_remote(f"file://{tmp_path}")


@pytest.mark.parametrize(
    ("text", "key"),
    [("s3://bucket/runs/", "bucket/runs"), ("s3://bucket", "bucket"), ("gs://bucket/a//b/./c", "bucket/a/b/c")],
)
def test_an_address_is_a_bucket_and_what_is_in_it(text, key):
    found = place(text)
    assert isinstance(found, RemotePath)
    assert found.key == key
    assert str(found) == f"{text[:5]}{key}"


def test_settings_stay_with_every_path_that_is_made_from_an_address():
    path = place("s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http") / "a" / "b.png"
    assert str(path) == "s3://bucket/runs/a/b.png?endpoint_override=127.0.0.1:9000&scheme=http"
    assert (path.name, path.suffix) == ("b.png", ".png")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hdfs://host/runs", "give a folder, also one of NFS, or s3://bucket/folder or gs://bucket/folder"),
        ("http://host/runs", "is no address that can be read and written"),
        ("s3://", "names no bucket"),
        ("s3:///runs", "names no bucket"),
        ("s3://bucket/runs?endpoint=x", "endpoint=… has a setting that is not known; known are endpoint_override"),
    ],
)
def test_an_address_that_cannot_work_is_refused(text, said):
    with pytest.raises(RunError, match=said):
        place(text)


@pytest.mark.parametrize(
    "text", ["s3://AKIA:s3cret@bucket/runs", "s3://bucket/runs?secret_key=s3cret", "ftp://me:s3cret@host/x"]
)
def test_credentials_in_an_address_are_refused_and_not_repeated(text):
    with pytest.raises(RunError) as caught:
        place(text)
    assert "s3cret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_what_must_be_local_is_refused_in_one_sentence():
    with pytest.raises(RunError, match="--out is s3://…, and pictures are mapped; give a folder of this machine"):
        local("s3://bucket/out", "--out", "pictures are mapped")
