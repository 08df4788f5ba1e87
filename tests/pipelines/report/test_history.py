import json

from pipelines.report.history import read_history


def written(tmp_path, *lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return read_history(path)


def train(step, **numbers):
    return {"kind": "train", "step": step, "stage": "one", **numbers}


def test_a_run_without_metrics_has_an_empty_history(tmp_path):
    history = read_history(tmp_path / "metrics.jsonl")
    assert history.last_step == 0
    assert history.curve("train", "loss") == history.stages() == history.messages == []


def test_curves_leave_out_lines_that_lack_the_number(tmp_path):
    history = written(tmp_path, train(1, loss=2.0), train(10), train(20, loss=1))
    assert history.curve("train", "loss") == [(1, 2.0), (20, 1.0)]


def test_what_a_resumed_run_does_again_replaces_what_it_had_done(tmp_path):
    score = {"kind": "score", "miou": 5.0}
    history = written(
        tmp_path,
        train(10, loss=3.0),
        {**score, "step": 10},
        train(20, loss=2.0),
        {**score, "step": 25},
        train(30, loss=1.0),
        train(20, loss=2.5),
    )
    assert history.curve("train", "loss") == [(10, 3.0), (20, 2.5)]
    assert history.curve("score", "miou") == [(10, 5.0)]


def test_reference_runs_keep_their_own_steps(tmp_path):
    reference = {"kind": "train:oracle", "step": 30, "loss": 1.0}
    history = written(tmp_path, train(30), reference, train(20))
    assert history.curve("train:oracle", "loss") == [(30, 1.0)]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    history = written(tmp_path, train(1, loss=2.0), '{"kind": "train", "ste\n', "null\n", "7\n", '{"kind": "x"}\n')
    assert history.curve("train", "loss") == [(1, 2.0)]


def test_stages_messages_and_lists_are_told_apart(tmp_path):
    history = written(
        tmp_path,
        train(1),
        {**train(12), "stage": "two"},
        {"kind": "event", "step": 12, "message": "a teacher died"},
        {"kind": "teachers", "step": 12, "acceptance": [0.5, None]},
        {"kind": "teachers", "step": 13},
    )
    assert history.stages() == [("one", 1), ("two", 12)]
    assert history.messages == [(12, "a teacher died")]
    assert history.rows("teachers", "acceptance") == ([12], [[0.5, None]])
    assert history.last_step == 12
