"""Settings that Ray reads while it is imported: call :func:`prepare` before the first ``import ray``."""

from __future__ import annotations

import os
from pathlib import Path

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # ray.train.report waits for one such poll
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started",  # a start-up notice, not a problem
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the core worker warns about every actor that may restart
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def prepare() -> None:
    """Set what the user has not set.

    A user who has a token means to use it: Ray by itself would show none to a cluster that is joined by its address.
    The token of a cluster of our own is made where that is started, when it is known that none is joined.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if token_source() is not None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def token_source() -> str | None:
    """Where Ray finds the user's token, as a user would name it: the first of its three places; None without one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return "the file of RAY_AUTH_TOKEN_PATH"
    return "~/.ray/auth_token" if (Path.home() / ".ray" / "auth_token").is_file() else None
