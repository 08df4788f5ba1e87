import os
import socket
import stat
import time
from types import SimpleNamespace

import pytest
import ray
from ray._private import ray_constants

from actors.errors import RunError
from pipelines import cluster
from pipelines.options import AdaptOptions


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A Ray that only notes what it is asked; nobody has a token or an address."""
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")] + ["RAY_ADDRESS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that one set by the code goes away again
    monkeypatch.setenv("HOME", str(tmp_path))
    notes = []

    def init(**options):
        loopback = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"), ray_constants.ENABLE_RAY_CLUSTER
        wait = os.environ.get(cluster.GCS_WAIT)
        notes.append(options | {"wait": wait, "loopback": loopback})
        info = {"session_dir": str(tmp_path), "gcs_address": "10.0.0.4:6379"}
        return SimpleNamespace(dashboard_url="127.0.0.1:8265", address_info=info)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_knock", lambda address, given: None)
    return notes


def test_a_run_without_an_address_starts_ray_here_and_says_so(asked):
    used = cluster.start(AdaptOptions(preset="tiny"))
    assert [note["address"] for note in asked] == ["local"]
    assert asked[0]["loopback"] == ("0", False), "else the dashboard looks for its cluster at another address"
    assert ray_constants.ENABLE_RAY_CLUSTER
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    assert used.dashboard == "http://127.0.0.1:8265"
    assert used.sentence.startswith("Ray runs on this machine alone. Its dashboard is http://127.0.0.1:8265")


@pytest.mark.parametrize(
    ("option", "variable", "joined", "given"),
    [
        ("10.0.0.4:6379", None, "10.0.0.4:6379", "--address"),
        (None, "10.0.0.5:6379", "10.0.0.5:6379", "RAY_ADDRESS"),
        ("10.0.0.4:6379", "10.0.0.5:6379", "10.0.0.4:6379", "--address"),
        ("auto", None, "auto", "--address"),
    ],
)
def test_a_run_joins_the_cluster_of_its_option_or_else_of_the_variable_and_says_which(
    asked, monkeypatch, option, variable, joined, given
):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    used = cluster.start(AdaptOptions(preset="tiny", address=option))
    assert [note["address"] for note in asked] == [joined]
    assert used.sentence.startswith(f"joined the Ray cluster at 10.0.0.4:6379 ({given})")
    assert asked[0]["wait"] == "1"
    assert cluster.GCS_WAIT not in os.environ
    assert not os.environ["RAY_AUTH_TOKEN"], "a token of our own would lock the run out of the cluster"


def test_address_local_starts_a_cluster_even_inside_a_ray_job(asked, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    cluster.start(AdaptOptions(preset="tiny", address="local"))
    assert [note["address"] for note in asked] == ["local"]


def test_a_cluster_of_our_own_gets_a_token_that_only_its_user_can_read_and_no_message_tells(asked, tmp_path):
    used = cluster.start(AdaptOptions(preset="tiny"))
    token, file = os.environ["RAY_AUTH_TOKEN"], tmp_path / "auth_token"
    assert len(set(token)) > 8
    assert len(token) == 64
    assert file.read_text() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(file) in used.sentence
    assert token not in used.sentence
    assert not (tmp_path / ".ray").exists()


def test_a_users_own_token_or_wish_for_none_is_left_alone(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert "your token (RAY_AUTH_TOKEN)" in cluster.start(AdaptOptions(preset="tiny")).sentence
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster.start(AdaptOptions(preset="tiny")).sentence.endswith("http://127.0.0.1:8265")
    assert os.environ["RAY_AUTH_TOKEN"] == ""
    assert not (tmp_path / "auth_token").exists()


def test_a_token_file_that_is_not_there_is_an_error_in_a_sentence(asked, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(RunError, match=r"RAY_AUTH_TOKEN_PATH is /nowhere/token, and there is no such file"):
        cluster.start(AdaptOptions(preset="tiny"))
    assert not asked


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://127.0.0.1:8265", "host:port of its head .* use ray job submit"),
        ("ray://10.0.0.4:10001", "host:port of its head .* use ray job submit"),
        ("10.0.0.4", "give host:port of the cluster's head"),
        ("10.0.0.4:port", "give host:port of the cluster's head"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_refused_before_anything_is_tried(monkeypatch, address, sentence):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it was tried"))
    with pytest.raises(RunError, match=sentence):
        cluster.start(AdaptOptions(preset="tiny", address=address))


def test_an_address_where_nobody_listens_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as held:  # bound, so nobody else's, and not listening
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(RunError, match=rf"no Ray cluster answers at {address} \(--address\): Connection refused"):
            cluster.start(AdaptOptions(preset="tiny", address=address))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("mode", "token", "sentence"),
    [
        ("token", "theirs", r"refuses the token in RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to the cluster's token"),
        (None, "", r"asks for a token, and none was given; set RAY_AUTH_TOKEN to the cluster's token"),
        ("disabled", "theirs", r"asks for a token, and RAY_AUTH_MODE switches tokens off"),
    ],
)
def test_a_wrong_token_is_named_with_the_place_it_came_from(asked, monkeypatch, mode, token, sentence):
    def refuse(**_):
        raise ConnectionError("Failed to connect") from RuntimeError("Unauthenticated: InvalidAuthToken")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(RunError, match=sentence):
        cluster.start(AdaptOptions(preset="tiny", address="10.0.0.4:6379"))
