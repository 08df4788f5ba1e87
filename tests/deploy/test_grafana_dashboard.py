"""The dashboard as Grafana reads it: against the models of the Grafana that it names, on its grid, as it is made."""

import copy
import enum
import json
import re
import typing

import pytest

from actors.metrics import METRICS
from deploy.monitoring.dashboard import COLUMNS, FAILURES, FILE, GRAFANA, SCHEMA, curves, dashboard, metric, text

BOTH = ("Label age", "Versions of the weights", "Failures", "GPU memory")
"""Panels in which the two loops meet."""
REQUIRED = (
    "train/step",
    "train/step_seconds",
    "train/wait_share",
    "train/loss",
    "train/stage",
    "train/label_age_steps_p95",
    "train/weights_version",
    "train/gpu_memory_bytes",
    "teachers/labels_made",
    "teachers/coverage",
    "teachers/acceptance",
    "teachers/idle_share",
    "teachers/weights_version_newest",
    "teachers/gpu_memory_bytes",
    "teachers/teachers",
    "teachers/backlog",
    "signals/label_free_score",
    "score/miou",
    *FAILURES,
)


@pytest.fixture(scope="module")
def shipped():
    return json.loads(FILE.read_text(encoding="utf-8"))


def expressions(board):
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def mistakes(given, known, path="dashboard"):
    """What a dashboard has that Grafana's model of it has not, or has as something else.

    Args:
        given: the JSON.
        known: the same as the model read it.
        path: where this stands.
    """
    if isinstance(given, dict):
        if hasattr(known, "to_json"):
            yield from wrong_types(known, path)
            known = known.to_json()
        if not isinstance(known, dict):
            yield f"{path}: {given} is read as {known}"
            return
        for name, value in given.items():
            if name not in known:
                yield f"{path}.{name}: unknown"
            else:
                yield from mistakes(value, known[name], f"{path}.{name}")
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for number, (mine, read) in enumerate(zip(given, known, strict=True)):
            yield from mistakes(mine, read, f"{path}[{number}]")
    elif given != known:
        yield f"{path}: {given} is read as {known}"


def wrong_types(model, path):
    """Fields of a model that hold what its annotations do not allow."""
    scope = vars(__import__(type(model).__module__, fromlist=["_"]))
    for name, wanted in typing.get_type_hints(type(model), scope).items():
        value = getattr(model, name, None)
        if value is not None and not allowed(value, wanted):
            yield f"{path}: {name} is {value!r}, not {wanted}"


def allowed(value, wanted):
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in (object, typing.Any):
        return True
    if origin is typing.Union:
        return any(allowed(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(allowed(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return value in [member.value for member in wanted]
    if wanted in (int, float):
        return isinstance(value, int | wanted) and not isinstance(value, bool)
    return value is None if wanted is type(None) else isinstance(value, wanted)


@pytest.fixture(scope="module")
def read():
    """Reads a dashboard with the models of Grafana's own SDK."""
    sdk = pytest.importorskip("grafana_foundation_sdk", reason="Grafana's SDK needs Python 3.11")
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    assert sdk
    register_default_plugins()
    return Dashboard.from_json


def test_the_file_is_what_the_script_makes():
    assert FILE.read_text(encoding="utf-8") == text(), "run python -m deploy.monitoring.dashboard"


def test_the_dashboard_fits_the_schema_that_it_names(shipped, read):
    from importlib.metadata import version

    from grafana_foundation_sdk.models.dashboard import Dashboard

    assert list(mistakes(shipped, read(shipped))) == []
    assert shipped["schemaVersion"] == SCHEMA == Dashboard().schema_version
    assert version("grafana-foundation-sdk").split("!")[1] == GRAFANA
    assert {panel["pluginVersion"] for panel in shipped["panels"]} == {GRAFANA}


BROKEN = {
    "an option that no panel has": (("panels", 0, "options", "colourMode"), "value", "colourMode: unknown"),
    "a field that no dashboard has": (("refreshes",), "10s", "dashboard.refreshes: unknown"),
    "a word for a number": (("panels", 0, "gridPos", "w"), "wide", "gridPos: w is 'wide'"),
    "a mode that thresholds do not have": (
        ("panels", 0, "fieldConfig", "defaults", "thresholds", "mode"),
        "relative",
        "thresholds: mode is 'relative'",
    ),
    "a list for an expression": (("panels", 0, "targets", 0, "expr"), ["up"], "targets[0]: expr is ['up']"),
    "a variable of no type": (("templating", "list", 0, "type"), "source", "list[0]: type_val is 'source'"),
    "a style that no curve has": (
        ("panels", 8, "fieldConfig", "defaults", "custom", "drawStyle"),
        "wavy",
        "custom: draw_style is 'wavy'",
    ),
}


@pytest.mark.parametrize(("path", "value", "said"), BROKEN.values(), ids=BROKEN)
def test_the_check_can_fail(read, path, value, said):
    board = copy.deepcopy(dashboard())
    place = board
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert [found for found in mistakes(board, read(board)) if said in found]


def test_panels_lie_side_by_side_on_the_grid(shipped):
    taken = {}
    for panel in shipped["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    height = max(y for _, y in taken) + 1
    assert len(taken) == COLUMNS * height, "there are holes"


def names_in(panel):
    return {name for target in panel["targets"] for name in re.findall(r"ray_tutelage_\w+", target["expr"])}


def test_the_student_is_on_the_left_and_its_teachers_on_the_right(shipped):
    kinds = {row.prometheus: row.kind for row in METRICS}
    columns = {0: set(), 12: set()}
    for panel in shipped["panels"]:
        if panel["gridPos"]["w"] == 12 and panel["title"] not in BOTH:
            columns[panel["gridPos"]["x"]] |= {kinds[name] for name in names_in(panel)}
    assert columns == {0: {"train", "signals", "score", "trainable_teacher"}, 12: {"teachers"}}


def test_every_number_that_a_user_must_see_has_a_panel(shipped):
    asked = set().union(*map(names_in, shipped["panels"]))
    assert {metric(name).prometheus for name in REQUIRED} <= asked
    assert asked <= {row.prometheus for row in METRICS}


def test_every_query_asks_for_one_run(shipped):
    for expression in expressions(shipped):
        selectors = re.findall(r"\{[^{}]*\}", expression)
        assert selectors
        assert all('run="$run"' in selector and "reference" in selector for selector in selectors), expression


def test_every_panel_says_what_it_shows(shipped):
    for panel in shipped["panels"]:
        if panel["type"] != "text":
            assert panel["description"].endswith("."), panel["title"]
            assert all(target["legendFormat"] for target in panel["targets"])
    assert len({panel["id"] for panel in shipped["panels"]}) == len(shipped["panels"])


def test_a_panel_asks_for_no_number_that_nobody_exports():
    with pytest.raises(KeyError):
        curves("Lost", (0, 0, 1, 1), ["train/labels_lost"])


def test_numbers_of_different_units_do_not_share_an_axis():
    with pytest.raises(ValueError, match="several units"):
        curves("Both", (0, 0, 1, 1), ["train/loss", "train/wait_share"])


def test_nothing_is_bound_to_one_grafana(shipped):
    sources = [panel["datasource"] for panel in shipped["panels"]]
    sources += [target["datasource"] for panel in shipped["panels"] for target in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${datasource}"}
    assert [variable["name"] for variable in shipped["templating"]["list"]] == ["datasource", "run"]
    assert "id" not in shipped
