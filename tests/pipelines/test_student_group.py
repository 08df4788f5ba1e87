"""How students are started again, and what is said of it. That they are trained, tests/engine shows."""

import os
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from pipelines import student_group
from pipelines.options import AdaptOptions
from pipelines.placement import Shares
from pipelines.student_group import START_TIMEOUT, TellFailures, is_elastic, train


@pytest.mark.parametrize(
    ("students", "least", "elastic"), [(1, None, False), (2, None, False), (2, 2, False), (2, 1, True), (4, 2, True)]
)
def test_students_are_elastic_where_fewer_would_do(students, least, elastic):
    assert is_elastic(AdaptOptions(students=students, min_students=least)) is elastic


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What Ray Train is told, and the timeout that it would read, for a number of students and the least of them."""
    monkeypatch.setenv(START_TIMEOUT, "before")
    monkeypatch.setattr(student_group, "USERS_TIMEOUT", None)

    def start(students, least):
        told = {}

        def fit():
            told["timeout"] = os.environ[START_TIMEOUT]
            return SimpleNamespace(return_value={"step": 3})

        monkeypatch.setattr(
            student_group, "TorchTrainer", lambda *_, **more: told.update(more) or SimpleNamespace(fit=fit)
        )
        options = AdaptOptions(students=students, min_students=least)
        setup = SimpleNamespace(options=options, plan=SimpleNamespace(folder=str(tmp_path)))
        shares = Shares({"CPU": 1.0}, {"CPU": 0.5}, {"CPU": 0.1})
        assert train(setup, SimpleNamespace(run_log=None), shares) == {"step": 3}
        return told

    return start


def test_places_for_all_students_are_waited_for_a_day(started):
    told = started(2, None)
    assert told["scaling_config"].num_workers == 2
    assert float(told["timeout"]) >= 86400


def test_elastic_students_soon_count_their_places_again_and_as_often_as_nodes_may_be_lost(started):
    """Ray Train may have counted a lost node, and would wait for it where others could go on."""
    told = started(4, 2)
    assert (told["scaling_config"].min_workers, told["scaling_config"].max_workers) == (2, 4)
    assert float(told["timeout"]) <= 30
    assert told["run_config"].failure_config.controller_failure_limit >= 100


def test_a_run_after_an_elastic_one_is_as_patient_as_any(started):
    assert started(2, 1)["timeout"] != started(2, None)["timeout"] == started(1, None)["timeout"]


def test_what_the_user_has_set_stays(monkeypatch, started):
    monkeypatch.setattr(student_group, "USERS_TIMEOUT", "5")
    assert started(2, 1)["timeout"] == started(2, None)["timeout"] == "5"


def test_ray_train_hands_the_timeout_to_whoever_waits():
    assert START_TIMEOUT in ENV_VARS_TO_PROPAGATE


DEAD = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: …", ActorDiedError())
SILENT = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 seconds.")
MISSES = RuntimeError("Traceback …\nRuntimeError: Connection closed by peer.")


@pytest.mark.parametrize(
    ("errors", "ranks", "why"),
    [
        ({0: DEAD}, [0], "the process or its node is gone"),
        ({0: SILENT}, [0], "the process or its node is gone"),
        ({0: MISSES, 1: DEAD, 2: MISSES}, [1], "the process or its node is gone"),
        ({1: MISSES, 0: MISSES}, [0, 1], "RuntimeError: Connection closed by peer"),
        ({2: ValueError()}, [2], "ValueError"),
    ],
    ids=["dead", "silent", "missed by others", "only missed", "wordless"],
)
def test_the_log_hears_who_failed_and_why(errors, ranks, why):
    told = []
    log = SimpleNamespace(students_failed=SimpleNamespace(remote=lambda *what: told.append(what)))
    TellFailures(log).after_exception(None, errors)
    assert told == [(ranks, why, 3)]
