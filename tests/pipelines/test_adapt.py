import signal

import pytest

from actors.errors import RunError, UnreadableImage
from pipelines.adapt import Interrupt, _readable, stop_on_interrupt


def test_the_second_interrupt_aborts():
    interrupt = Interrupt()
    interrupt(signal.SIGINT, None)
    assert interrupt.asked
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_interrupt() as interrupt:
        assert signal.getsignal(signal.SIGINT) is interrupt
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class WorkersFailedError(Exception):
    def __init__(self, failures):
        super().__init__("workers failed")
        self.worker_failures = failures


@pytest.mark.parametrize("kind", ["itself", "cause", "context", "attribute", "worker", "deep"])
def test_the_sentence_inside_whatever_was_wrapped_round_it_is_found(kind):
    wanted, outer = RunError("a sentence"), ValueError("a wrapper")
    if kind == "itself":
        outer = wanted
    elif kind == "cause":
        outer.__cause__ = wanted
    elif kind == "context":
        outer.__context__ = wanted
    elif kind == "attribute":
        outer.cause = wanted
    elif kind == "worker":
        outer = WorkersFailedError({0: ValueError("peer"), 1: wanted})
    else:
        outer.__cause__ = WorkersFailedError({1: outer, 0: ValueError()})
        outer.__cause__.worker_failures[0].__cause__ = wanted
    assert _readable(outer) is wanted


def test_an_unreadable_image_is_a_sentence_too():
    """A broken validation image ends the score; its name is what the user needs."""
    wanted, outer = UnreadableImage("/data/1.png", "broken"), ValueError("a wrapper")
    outer.__cause__ = wanted
    assert "/data/1.png" in str(_readable(outer))


def test_an_error_without_a_sentence_stays_what_it_is():
    error = ValueError("a defect")
    assert _readable(error) is error
