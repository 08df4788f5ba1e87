"""Settings that Ray reads while it is imported: call :func:`prepare` before the first ``import ray``."""

from __future__ import annotations

import os

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
    """Set what the user has not set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
