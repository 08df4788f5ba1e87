"""A process that is measured, and how it ends."""

import pytest

from actors.errors import RunError
from pipelines.workers import Worker


def fail(orders):
    raise RunError("a teacher cannot label")


def test_a_process_that_fails_says_why():
    worker = Worker(fail)
    try:
        worker.connection.poll(60)
        with pytest.raises(RunError, match="a teacher cannot label"):
            worker.take()
    finally:
        worker.end()


def test_a_process_that_dies_is_not_waited_for():
    worker = Worker(fail)
    worker.process.kill()
    try:
        with pytest.raises(RunError, match=r"died|cannot label"):
            worker.take()
    finally:
        worker.end()
