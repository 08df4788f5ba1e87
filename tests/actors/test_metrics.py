import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors import metrics
from actors.metrics import METRICS, Export, said, series
from actors.run_log import RunLog

TAGS = {"run": "first", "recipe": "eplc", "benchmark": "synthia2city"}
CLASSES = ("road", "car")
LINE = {
    "stage": "self-training",
    "loss": 0.75,
    "loss/segmentation": 0.5,
    "loss/rectified_main": 0.25,
    "wait_share": 0.0,
    "label_age_steps_p95": 60,
}


class Gauges:
    """Stands where Ray's gauges do: every series as it was told last, and how often."""

    def __init__(self):
        self.values, self.told, self.made = {}, 0, {}

    def __call__(self, name, text, tags):
        assert name not in self.made, "one gauge a name"
        self.made[name] = (text, tags)
        return Gauge(self, name, tags)


class Gauge:
    def __init__(self, gauges, name, tags):
        self.gauges, self.name, self.tags, self.default = gauges, name, tags, {}

    def set_default_tags(self, tags):
        self.default = dict(tags)

    def set(self, value, tags):
        told = {**self.default, **tags}
        assert set(told) == set(self.tags), "Ray wants every tag, and no other"
        assert all(isinstance(word, str) for word in told.values())
        self.gauges.values[(self.name, *(told[tag] for tag in self.tags if tag not in TAGS))] = value
        self.gauges.told += 1


@pytest.fixture
def gauges():
    return Gauges()


@pytest.fixture
def export(gauges):
    return Export(TAGS, CLASSES, gauges)


def test_a_number_has_one_name_everywhere(tmp_path, gauges, export):
    """In the file, as a curve, in Prometheus; in the terminal its words."""
    log, curves = RunLog(str(tmp_path), export=export), {}
    log._events = type("Events", (), {"add_scalar": lambda _, name, value, step: curves.update({name: value})})()
    log.write("train", 3, LINE)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    plain = ("loss", "wait_share", "label_age_steps_p95")
    for name in plain:
        assert line[name] == curves[f"train/{name}"] == gauges.values[f"tutelage_train_{name}", ""] == LINE[name]
    for term in ("segmentation", "rectified_main"):
        value = LINE[f"loss/{term}"]
        assert line[f"loss/{term}"] == curves[f"train/loss/{term}"] == value
        assert gauges.values["tutelage_train_loss_terms", "", term] == value
    assert gauges.values["tutelage_train_stage", "", "self-training"] == 1.0
    shown = said(log.watch()["newest"], "train/stage", *(f"train/{name}" for name in plain))
    assert shown == ["self-training", "loss 0.750", "wait 0.0%", "95 % at most 60"]


def test_a_list_has_a_number_a_class(gauges, export):
    export.write("teachers", {"acceptance": [0.5, None]})
    assert gauges.values == {("tutelage_teachers_acceptance", "", "road"): 0.5}


def test_reference_runs_are_told_apart_by_a_tag(gauges, export):
    export.write("train", {"loss": 1.0})
    export.write("train:oracle", {"loss": 2.0})
    assert gauges.values == {("tutelage_train_loss", ""): 1.0, ("tutelage_train_loss", "oracle"): 2.0}


@pytest.mark.parametrize("value", [None, True, math.nan, math.inf, {}])
def test_what_is_no_finite_number_is_not_exported(value):
    assert series("train", {"loss": value}, CLASSES) == {}


def test_what_stands_in_no_row_is_not_exported(gauges, export):
    export.write("student", {"rank": 0, "pid": 4, "device": "cpu"})
    export.write("event", {"message": "hello"})
    assert gauges.values == {}


def test_what_a_second_student_says_does_not_take_away_what_the_first_one_said(monkeypatch, gauges, export):
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.0)
    export.write("student", {"rank": 0, "students": 2, "restarts": 1, "pid": 4})
    export.write("student", {"rank": 1, "pid": 5})
    gauges.values.clear()
    export.refresh()
    assert gauges.values == {("tutelage_student_students", ""): 2.0, ("tutelage_student_restarts", ""): 1.0}


def test_numbers_are_told_again_or_ray_forgets_them(monkeypatch, gauges, export):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    export.write("train", {"loss": 1.0, "stage": "alignment"})
    export.write("train", {"loss": 0.5, "stage": "self-training"})
    export.refresh()
    gauges.values.clear()
    export.refresh()
    assert gauges.values == {}, "not at every look of the driver"
    now[0] += metrics.REFRESH_SECONDS
    export.refresh()
    assert gauges.values == {
        ("tutelage_train_loss", ""): 0.5,
        ("tutelage_train_stage", "", "self-training"): 1.0,
    }, "and the stage before is over"


def test_the_drivers_look_keeps_the_numbers_alive(tmp_path, monkeypatch, gauges, export):
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.0)
    log = RunLog(str(tmp_path), events=False, export=export)
    log.write("train", 1, {"loss": 1.0})
    gauges.values.clear()
    log.watch()
    assert ("tutelage_train_loss", "") in gauges.values


def test_numbers_of_those_who_have_gone_are_told_no_more(tmp_path, monkeypatch, gauges, export):
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.0)
    log = RunLog(str(tmp_path), events=False, export=export)
    log.write("teachers", 1, {"coverage": 1.0})
    log.write("train:oracle", 1, {"loss": 1.0})
    log.end("teachers", "trainable_teacher")
    gauges.values.clear()
    log.watch()
    assert {name for name, *_ in gauges.values} == {"tutelage_train_loss", "tutelage_train_step", "tutelage_train_time"}


def test_an_export_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.0)

    def broken(*_):
        raise RuntimeError("no agent")

    log = RunLog(str(tmp_path), events=False, export=Export(TAGS, CLASSES, broken))
    for step in (1, 2):
        log.write("train", step, {"loss": 1.0})
        seen = log.watch()
    assert seen["messages"] == ["numbers are exported to Prometheus no more: RuntimeError: no agent"]
    assert seen["newest"]["train"]["step"] == 2


def test_a_list_that_has_no_number_a_class_is_said(export):
    assert "ValueError" in export.write("teachers", {"acceptance": [0.5]})
    assert export.write("teachers", {"acceptance": [0.5]}) is None


def test_a_run_log_needs_nobody_to_fetch_its_numbers(tmp_path):
    log = RunLog(str(tmp_path), events=False)
    log.write("train", 1, {"loss": 1.0})
    log.end("train")
    assert log.watch()["newest"]["train"]["loss"] == 1.0


def test_names_are_prometheus_names_and_no_two_are_the_same():
    names = [metric.exported for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"tutelage_[a-z0-9_]+", name) for name in names)
    assert all(metric.prometheus == f"ray_{metric.exported}" for metric in METRICS)


def test_only_names_with_several_numbers_have_a_tag():
    for metric in METRICS:
        assert (metric.tag == "term") == metric.name.endswith("/*")
        assert metric.tag in {"", "term", "class", "stage"}


def test_every_text_and_unit_reaches_prometheus(gauges, export):
    export.write("train", {"wait_share": 0.5, "loss": 1.0})
    text, tags = gauges.made["tutelage_train_wait_share"]
    assert text == "Share of its time for which the student waited for labels, after the first ones (share)"
    assert tags == ("run", "recipe", "benchmark", "reference")
    assert gauges.made["tutelage_train_loss"][0] == "Sum of the loss terms, mean since the line before"


def test_the_terminal_leaves_out_what_has_no_value():
    assert said({"train": {"loss": 1.0}}, "train/loss", "train/wait_share", "teachers/coverage") == ["loss 1.000"]


def test_the_table_needs_neither_ray_nor_torch():
    code = "import sys, actors.metrics; print({'ray', 'torch'} & set(sys.modules))"
    root = Path(metrics.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
