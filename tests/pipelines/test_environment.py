import os

import pytest

from pipelines import environment


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a token, and without a word about tokens."""
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    for name in environment.SETTINGS:
        monkeypatch.setenv(name, os.environ.get(name, "before"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_what_the_user_has_set_stays(monkeypatch, nobody):
    monkeypatch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", "mine")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    environment.prepare()
    assert os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] == "mine"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_without_a_token_nothing_is_said_about_tokens_before_it_is_known_whether_a_cluster_is_joined(nobody):
    environment.prepare()
    assert not [name for name in os.environ if name.startswith("RAY_AUTH")]
    assert environment.token_source() is None


def test_a_users_token_is_shown_and_looked_for_where_ray_looks_in_its_order(monkeypatch, nobody):
    file = nobody / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("mine")
    assert environment.token_source() == "~/.ray/auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert environment.token_source() == "the file of RAY_AUTH_TOKEN_PATH"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert environment.token_source() == "RAY_AUTH_TOKEN"
    environment.prepare()
    assert os.environ["RAY_AUTH_MODE"] == "token"
