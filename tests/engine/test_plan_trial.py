"""plan, with its processes: students, teachers and evaluator on this machine, without Ray."""

import pytest

import run
from pipelines import load_trial
from pipelines.load_trial import measure

pytestmark = pytest.mark.slow


def test_students_that_share_batches_are_measured_beside_teachers(tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = []
    monkeypatch.setattr(load_trial, "measure", lambda *given: found.append(measure(*given)) or found[0])
    data = str(tiny_folder / "data")
    assert run.main(["plan", "--students", "2", "--teachers", "1", "--preset", "tiny", "--data", data]) == 0
    (findings,) = found
    measured = findings.measured
    assert set(measured.beside) == {0, 1, 2, 3}
    assert all(pace.step_seconds > 0 for pace in measured.beside.values())
    assert set(measured.image_seconds) == {1, 2, 3}
    assert all(seconds > 0 for seconds in (*measured.image_seconds.values(), measured.label_seconds))
    assert measured.watch_seconds > 0
    assert measured.score_seconds > 0
    assert len(measured.alone) == 2
    assert {"student", "teacher", "evaluator"} == set(findings.memory)
    assert all(memory.process > 50_000_000 for memory in findings.memory.values())
    shown = capsys.readouterr().out
    assert "in turns" in shown
    assert "take" in shown.splitlines()[-1]
    table = [line for line in shown.splitlines() if line[:1] in tuple("┏┃┡│├└")]
    assert table
    assert max(map(len, table)) <= 100
