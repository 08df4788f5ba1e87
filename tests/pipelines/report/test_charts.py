import re
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.report import charts


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_chart_is_an_element_without_fixed_size_that_follows_the_pages_ink():
    svg = charts.curves({"loss": [(1, 2.0), (10, 1.0)]}, "loss terms", levels={"oracle": 3.0}, marks={"best": 5})
    assert svg.startswith("<svg ")
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    assert "currentColor" in svg
    assert charts.INK not in svg
    assert {"loss", "oracle", "best", "loss terms", "step"} <= set(texts(svg))


def test_two_charts_can_stand_on_one_page():
    one, two = (charts.curves({name: [(1, 2.0), (10, 1.0)]}, name) for name in ("a", "b"))
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in (one, two)]
    assert all(len(set(found)) == len(found) for found in ids)
    assert not [i for i in ids[0] if i.startswith(("figure", "axes", "text"))]


def test_a_number_that_is_not_finite_is_a_gap():
    assert charts.curves({"loss": [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)]}, "loss") is not None


@pytest.mark.parametrize("lines", [{}, {"loss": []}])
def test_nothing_to_draw_is_no_chart(lines):
    assert charts.curves(lines, "loss") is None


def test_a_class_that_never_has_a_number_gets_no_row():
    svg = charts.class_heat([1, 2], [[0.5, None, 0.0], [0.25, None, 0.1]], ["road", "wall", "sky"], "share")
    assert {"road", "sky"} <= set(texts(svg))
    assert "wall" not in texts(svg)


@pytest.mark.parametrize("rows", [([], []), ([1], [[None, 0.0]])])
def test_shares_that_are_not_there_are_no_chart(rows):
    assert charts.class_heat(*rows, ["a", "b"], "share") is None


def test_hundreds_of_steps_and_classes_stay_one_small_chart():
    rows = np.random.default_rng(0).random((700, 255))
    svg = charts.class_heat(list(range(700)), rows.tolist(), [f"class {i}" for i in range(255)], "share")
    assert sum(text.startswith("class ") for text in texts(svg)) == charts.NAMED_CLASSES
    assert "share (the first 48 of 255)" in texts(svg)
    assert len(svg) < 100_000


def test_the_confusion_matrix_names_what_occurs_and_gives_shares_of_the_row():
    matrix = np.array([[6, 2, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = texts(charts.confusion_matrix(matrix, ["road", "sky", "wall", "bus"]))
    assert {"75", "25", "100"} <= set(found)
    assert found.count("road") == found.count("sky") == 2
    assert not {"wall", "bus"} & set(found)


def test_a_matrix_of_many_classes_has_no_names_and_an_empty_one_is_no_chart():
    names = [f"class {i}" for i in range(255)]
    found = texts(charts.confusion_matrix(np.ones((255, 255), np.int64), names))
    assert not [text for text in found if text in names]
    assert charts.confusion_matrix(np.zeros((3, 3), np.int64), names[:3]) is None


@pytest.mark.parametrize("name", ["price $_$", "$x^$", "US$ and A$", "$\\x$", '<b>&"', "a very long name of a class"])
def test_any_class_name_is_drawn_as_it_is_and_a_long_one_is_cut(name):
    for svg in (
        charts.confusion_matrix(np.eye(2, dtype=np.int64), [name, "b"]),
        charts.class_heat([1, 2], [[0.5, 0.5], [0.2, 0.1]], [name, "b"], "share"),
    ):
        assert (name if len(name) <= 18 else "a very long name …") in texts(svg)
