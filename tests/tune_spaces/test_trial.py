import threading
import time

import pytest

from actors.errors import RunError
from models.label_free import SCORES
from tune_spaces import trial as module
from tune_spaces.options import SweepOptions
from tune_spaces.trial import TrialRun, score_of

SIGNALS = {
    "entropy": 0.1,
    "diversity": 0.7,
    "disagreement": 0.05,
    "agreement": 0.9,
    "consistency": 0.8,
    "stability": 0.95,
    "source_miou": 0.4,
}


@pytest.mark.parametrize("metric", SCORES)
def test_a_score_is_made_of_signals_or_there_is_none(metric):
    assert score_of(metric, SIGNALS, None) == pytest.approx(SCORES[metric][1](SIGNALS))
    assert score_of(metric, {}, 30.0) is None
    assert score_of(metric, {name: float("nan") for name in SIGNALS}, None) is None


def test_only_the_oracle_metric_looks_at_target_labels():
    assert score_of("miou", SIGNALS, 31.0) == 31.0
    assert score_of("miou", SIGNALS, None) is None
    assert score_of("entropy", SIGNALS, 31.0) == score_of("entropy", SIGNALS, 10.0)


class Silent(TrialRun):
    """A trial whose run is told about by the test."""

    def _work(self):
        pass


def trial(**given):
    options = SweepOptions(name="s", runs="/nowhere", init="/one", from_stage=2, **given)
    return Silent(options, "t", {"eplc.dropout": 0.3}, crew=None)


def taken(run):
    return [run.looks.get_nowait() for _ in range(run.looks.qsize())]


def line(step, **more):
    return {"kind": "signals", "step": step, "time": 1.0, **SIGNALS, **more}


def test_a_trial_is_a_run_with_the_values_of_its_point():
    run = trial()
    assert (run.options.name, run.options.eplc.dropout) == ("t", 0.3)
    assert (run.options.init, run.options.from_stage, run.options.references) == ("/one", 2, "never")


def test_every_look_is_told_once_with_its_signals_alone():
    run = trial(metric="entropy")
    run.steps = 20
    for step in (8, 8, 16):
        run._watch("progress", {"signals": line(step, class_shares=[1.0])})
    run._watch("progress", {"train": {"step": 20}})
    run._watch("message", {"text": "hello"})
    looks = taken(run)
    assert [look["step"] for look in looks] == [8, 16]
    assert looks[0] == {"step": 8, "look": 2, "score": pytest.approx(-0.1), "signals": SIGNALS, "finished": False}


def test_with_the_oracle_metric_a_look_waits_for_the_score_of_its_step():
    run = trial(metric="miou")
    run._watch("progress", {"signals": line(8)})
    run._watch("progress", {"signals": line(8), "score": {"step": 4, "miou": 1.0}})
    assert taken(run) == []
    run._watch("progress", {"signals": line(8), "score": {"step": 8, "miou": 31.0}})
    assert [look["score"] for look in taken(run)] == [31.0]


def results(miou):
    adapted = None if miou is None else {"miou": miou}
    label_free = {**SIGNALS, "class_shares": [1.0], "recommended": 20, "recommended_score": None}
    return {"steps": 20, "scores": {"adapted": adapted}, "label_free": label_free, "seconds": {"adapt": 3.0}}


def test_the_last_look_says_that_it_is_the_last_and_what_it_took():
    run = trial(metric="entropy")
    last = run._last(results(31.0))
    assert (last["finished"], last["step"], last["miou"], last["signals"]) == (True, 20, 31.0, SIGNALS)
    assert set(last["seconds"]) == {"adapt", "whole"}
    assert "miou" not in run._last(results(None))


def test_a_trial_that_waits_for_a_look_hears_that_its_sweep_is_being_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)

    class Patient(TrialRun):
        def _run(self):
            while not self.interrupt.asked:
                time.sleep(0.01)

    options = SweepOptions(name="s", runs=str(tmp_path), init="/one", from_stage=2)
    run = Patient(options, "t", {}, crew=None)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / module.STOPPING).touch()
    assert run.next() is None
    assert not run.thread.is_alive()


def test_a_trial_that_does_not_end_lets_no_other_begin_in_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_STOP", 0.05)
    free = threading.Event()

    class Stubborn(TrialRun):
        def _run(self):
            free.wait()

    run = Stubborn(SweepOptions(name="s", runs=str(tmp_path), init="/one", from_stage=2), "t", {}, crew=None)
    with pytest.raises(RunError, match=r"did not end within 0.05 seconds"):
        run.stop()
    free.set()


def test_what_ends_a_run_reaches_whoever_waits_for_its_next_look():
    class Failing(TrialRun):
        def _run(self):
            raise MemoryError("full")

    options = SweepOptions(name="s", runs="/nowhere", init="/one", from_stage=2)
    with pytest.raises(MemoryError, match="full"):
        Failing(options, "t", {}, crew=None).next()
