"""What Prometheus is told: where the numbers are, and which of them should wake somebody."""

import json
import re
import shutil
import subprocess

import pytest

from actors.metrics import METRICS
from deploy.monitoring.dashboard import FILE

FOLDER = FILE.parent
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool on the PATH")


def promtool(*arguments):
    return subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True)


@needs_promtool
@pytest.mark.parametrize(
    ("what", "file", "right", "wrong"),
    [
        ("config", "prometheus.yml", "file_sd_configs", "files_sd_configs"),
        ("config", "prometheus.yml", "alerts.yml", "alarms.yml"),
        ("rules", "alerts.yml", "max by", "most by"),
    ],
)
def test_promtool_finds_no_fault_and_would_find_one(tmp_path, what, file, right, wrong):
    folder = tmp_path / "deployed"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert promtool("check", what, folder / file).returncode == 0
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong))
    assert promtool("check", what, folder / file).returncode == 1


def series(name, values, reference=""):
    return {"series": f'ray_tutelage_{name}{{run="r",reference="{reference}"}}', "values": values}


CALM = [
    series("train_time", "0+60x300"),
    series("student_restarts", "0+0x300"),
    series("teachers_teacher_failures", "0+1x300"),
    series("train_recoveries", "0+0x300"),
    series("teachers_versions_blocked", "0+0x300"),
    series("train_time", "0+0x300", "oracle"),
]
TROUBLE = {
    "TutelageStudentStandsStill": (0, "0+60x100 6000+0x200"),
    "TutelageStudentsBeganAgain": (1, "0+0x200 0+1x5 5+0x95"),
    "TutelageTeachersFail": (2, "0+0x200 0+5x100"),
    "TutelageWeightsBroke": (3, "0+0x200 1+0x100"),
    "TutelageLabelsCollapsed": (4, "0+0x200 1+0x100"),
}
"""The alert, and what must happen to which of the calm numbers, one a minute."""


def alerts(tmp_path, numbers, firing):
    """Whether those alerts and no others fire after 220 minutes."""
    rules = [*re.findall(r"alert: (\w+)", (FOLDER / "alerts.yml").read_text())]
    assert set(rules) == set(TROUBLE)
    checks = [{"expr": f'ALERTS{{alertname="{rule}",alertstate="firing"}}', "eval_time": "220m"} for rule in rules]
    for rule, check in zip(rules, checks, strict=True):
        labels = f'ALERTS{{alertname="{rule}",alertstate="firing",run="r"}}'
        check["exp_samples"] = [{"labels": labels, "value": 1}] if rule in firing else []
    test = {"interval": "1m", "input_series": numbers, "promql_expr_test": checks}
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(FOLDER / "alerts.yml")], "tests": [test]}))
    return promtool("test", "rules", file)


@needs_promtool
def test_a_calm_run_wakes_nobody(tmp_path):
    done = alerts(tmp_path, CALM, set())
    assert done.returncode == 0, done.stdout + done.stderr
    assert alerts(tmp_path, CALM, {"TutelageWeightsBroke"}).returncode == 1, "the check can fail"


@needs_promtool
@pytest.mark.parametrize("alert", TROUBLE)
def test_trouble_wakes_somebody(tmp_path, alert):
    place, values = TROUBLE[alert]
    numbers = [dict(one) for one in CALM]
    numbers[place]["values"] = values
    done = alerts(tmp_path, numbers, {alert})
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ask_for_numbers_that_are_exported():
    wanted = set(re.findall(r"ray_tutelage_\w+", (FOLDER / "alerts.yml").read_text()))
    assert wanted
    assert wanted <= {metric.prometheus for metric in METRICS}
