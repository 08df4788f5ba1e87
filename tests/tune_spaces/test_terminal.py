import io

import pytest
from rich.console import Console

from tune_spaces.record import SweepRecord
from tune_spaces.terminal import SweepScreen, print_sweep

ABOUT = {"benchmark": "synthia2city", "data": "miniature", "recipe": "eplc", "metric": "combined"}


@pytest.fixture
def record(tmp_path):
    return SweepRecord(tmp_path, {**ABOUT, "oracle_metric": False})


def shown(record, **how):
    out = io.StringIO()
    print_sweep(record, Console(file=out, width=140, **how))
    return out.getvalue()


def look(step, score, finished=False, **more):
    return {"step": step, "score": score, "signals": {}, "finished": finished, **more}


def test_the_best_trial_is_the_first_row_and_a_failure_says_why(record):
    for name, score in (("a", 0.1), ("b", 0.9)):
        record.started(name, {"eplc.keep_share": 0.25})
        record.looked(name, look(10, score, True))
    record.started("c", {"eplc.keep_share": 1.0})
    record.failed("c", "its process died", again=False)
    text = shown(record)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "1", "3"]
    assert "keep share" in text
    assert "trial 3 failed: its process died" in text
    assert "oracle" not in text


def test_target_miou_is_marked_wherever_it_stands(tmp_path):
    record = SweepRecord(tmp_path, {**ABOUT, "metric": "miou", "oracle_metric": True})
    record.started("a", {})
    record.looked("a", look(10, 30.0, True, miou=30.0))
    text = shown(record)
    assert "by miou, oracle" in text
    assert "mIoU (oracle)" in text


class Silent:
    def __init__(self):
        self.told = []

    def __call__(self, kind, what):
        self.told.append(kind)

    def close(self):
        self.told.append("closed")


def test_where_there_is_no_terminal_every_look_is_a_line(record):
    out, run = io.StringIO(), Silent()
    screen = SweepScreen(Console(file=out, width=120), run)
    screen("phase", {"name": "adapt", "text": "adapting", "steps": 10})
    screen("phase", {"name": "trials", "text": "2 trials"})
    screen("trials", {"record": record, "trial": record.started("a", {})})
    for _ in range(2):
        screen("trials", {"record": record, "trial": record.looked("a", look(5, 0.5))})
    screen("trials", {"record": record, "trial": record.failed("a", "full", again=True)})
    screen.close()
    assert run.told == ["phase", "closed", "closed"]
    assert [line for line in out.getvalue().splitlines() if line.startswith("trial")] == [
        "trial 1 running, step 0",
        "trial 1 running, step 5, combined 0.5000",
        "trial 1 running, step 5, combined 0.5000: full",
    ]


def test_in_a_terminal_a_table_lives_and_goes(record):
    out = io.StringIO()
    screen = SweepScreen(Console(file=out, width=120, force_terminal=True), Silent())
    screen("trials", {"record": record, "trial": record.started("a", {"eplc.passes": 3})})
    assert screen.live is not None
    screen.close()
    assert "passes" in out.getvalue()
