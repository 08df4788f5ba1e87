import re

import pytest

from actors.errors import RunError
from tune_spaces.charts import axis_values, importances, parallel_coordinates, place
from tune_spaces.page import write_page
from tune_spaces.record import SweepRecord, TrialRecord
from tune_spaces.space import Parameter, parse_space

SPACE = parse_space(
    {
        "rate_scale": {"low": 0.1, "high": 10.0, "log": True},
        "eplc": {"dropout": {"low": 0.0, "high": 0.5}, "max_label_age": {"values": ["none", 50]}},
    },
    "mine.toml",
)
ABOUT = {
    "benchmark": "synthia2city",
    "recipe": "eplc",
    "data": "miniature",
    "metric": "combined",
    "oracle_metric": False,
    "search": "optuna",
    "scheduler": "none",
    "seed": 0,
    "versions": {"commit": "abc1234"},
}


def trials(count=12):
    """Only the rate matters: the nearer to 1 the better."""
    found = []
    for k in range(count):
        rate = 10 ** (2 * k / (count - 1) - 1)
        point = {"rate_scale": rate, "eplc.dropout": (k * 7 % count) / count / 2, "eplc.max_label_age": None}
        found.append(TrialRecord(f"t{k}", k + 1, point, "finished", 10, -abs(k - count / 2), curve=[]))
    return found


@pytest.fixture
def folder(tmp_path):
    record = SweepRecord(tmp_path, ABOUT)
    for trial in trials():
        record.started(trial.id, trial.point)
        for step in (5, 10):
            look = {"step": step, "score": trial.score * 10 / step, "signals": {"entropy": 0.1}, "finished": step == 10}
            record.looked(trial.id, {**look, **({"miou": 30.0 + trial.number} if step == 10 else {})})
        record.ended(trial.id)
    record.started("broken", {"rate_scale": 1.0, "eplc.dropout": 0.1, "eplc.max_label_age": 50})
    record.failed("broken", "no <space> left", again=False)
    return tmp_path


def test_a_value_stands_where_it_lies_on_its_axis():
    assert place(SPACE.parameters[0], 1.0) == pytest.approx(0.5)
    assert place(SPACE.parameters[1], 0.25) == pytest.approx(0.5)
    assert [place(SPACE.parameters[2], value) for value in (None, 50)] == [0.0, 1.0]
    assert place(SPACE.parameters[1], 0.9) == 1.0, "outside is at the end"
    assert place(SPACE.parameters[0], 0.0) == 0.0
    assert axis_values(Parameter("x", low=0.0, high=1.0)) == [0.0, 0.5, 1.0]


def test_the_parameter_that_decides_is_the_important_one():
    shares = importances(trials(24), SPACE)
    assert next(iter(shares)) == "rate_scale"
    assert shares["rate_scale"] > 0.5
    assert sum(shares.values()) == pytest.approx(1.0)


def test_few_trials_have_no_importances_and_points_outside_do_not_count():
    assert importances(trials(7), SPACE) == {}
    outside = trials(8)
    outside[0].point["eplc.dropout"] = 0.9
    assert importances(outside, SPACE) == {}


def test_one_trial_draws_no_lines():
    assert parallel_coordinates(trials(2)[:1], SPACE, "combined") is None
    assert parallel_coordinates(trials(2), SPACE, "combined").startswith("<svg")


def test_the_page_shows_every_trial_the_best_first_and_opens_offline(folder):
    page = write_page(folder, SPACE).read_text()
    assert "13 trials: 12 finished, 1 failed" in page
    assert "The best: trial 7" in page
    assert page.count("<svg") == 3
    rows = re.findall(r"<tr(?: class=\"best\")?><td>(\d+)</td>", page)
    assert rows[0] == "7"
    assert sorted(map(int, rows)) == list(range(1, 14))
    assert "mIoU (oracle)" in page
    assert "no &lt;space&gt; left" in page
    assert not re.search(r"(src|href)=\"http", page)
    assert "python run.py --config" in page


def test_an_oracle_is_called_one(tmp_path):
    record = SweepRecord(tmp_path, {**ABOUT, "metric": "miou", "oracle_metric": True})
    record.started("t", {"rate_scale": 1.0})
    record.looked("t", {"step": 10, "score": 30.0, "signals": {}, "finished": True, "miou": 30.0})
    page = write_page(tmp_path, SPACE).read_text()
    assert "miou (oracle: looks at target labels)" in page


def test_a_sweep_without_a_finished_trial_has_a_page_too(tmp_path):
    record = SweepRecord(tmp_path, ABOUT)
    record.started("t", {"rate_scale": 1.0})
    record.interrupted()
    page = write_page(tmp_path, SPACE).read_text()
    assert "No trial has finished with a score" in page
    assert "1 open" in page


def test_a_folder_without_a_sweep_has_no_page(tmp_path):
    with pytest.raises(RunError, match="is no sweep"):
        write_page(tmp_path, SPACE)
