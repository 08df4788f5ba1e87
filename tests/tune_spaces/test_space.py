import dataclasses
import itertools
import math

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from actors.errors import RunError
from pipelines.options import AdaptOptions, PriorOptions
from pipelines.recipes import RECIPES
from pipelines.recipes.eplc import EplcOptions
from tune_spaces.space import (
    FIXED,
    Parameter,
    check_space,
    parse_space,
    read_space,
    searchable,
    shipped,
    value_of,
    with_point,
)

WARM = AdaptOptions(init="runs/one", from_stage=2)


def space(**tables):
    return parse_space({name.replace("__", "."): table for name, table in tables.items()}, "mine.toml")


def nested(name, table):
    group, field = name.split(".")
    return parse_space({group: {field: table}}, "mine.toml")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_with_a_space_that_fits_it(name):
    options = AdaptOptions(recipe=name)
    found = read_space(shipped(name))
    check_space(found, options)
    drops = hasattr(getattr(options, name), "dropout")
    for wanted in ("rate_scale", "rare_weight", *(["dropout"] if drops else [])):
        assert any(parameter.endswith(wanted) for parameter in found.names)
    for point in found.first_points(options):
        with_point(options, point)
        for parameter in found.parameters:
            assert parameter.distribution()._contains(parameter.distribution().to_internal_repr(point[parameter.name]))


def test_the_published_values_come_first_and_the_defaults_next():
    found = read_space(shipped("eplc"))
    published, default = found.first_points(WARM)
    assert published["rare_weight"] == 7.0
    assert default["rare_weight"] == 2.5
    assert published["eplc.dropout"] == default["eplc.dropout"] == 0.2
    assert default["eplc.source_weight"] == 1.0, "what an option that is left open stands for"
    faithful = AdaptOptions(faithful=True, refresh="continuous", init="runs/one", from_stage=2)
    assert [point["rare_weight"] for point in found.first_points(faithful)] == [7.0]
    assert found.only(("eplc.dropout",)).first_points(WARM) == [{"eplc.dropout": 0.2}], "tried once where they agree"


def test_a_grid_is_every_combination_after_the_first_points():
    found = parse_space(
        {"rate_scale": {"low": 0.25, "high": 4.0, "log": True}, "eplc": {"passes": {"values": [1, 5]}}}, "mine.toml"
    )
    points = found.grid(WARM)
    assert points[0] == {"rate_scale": 1.0, "eplc.passes": 5}
    every = [{"rate_scale": r, "eplc.passes": p} for r, p in itertools.product((0.25, 1.0, 4.0), (1, 5))]
    assert points[1:] == [point for point in every if point != points[0]]


def test_a_range_has_its_steps_or_its_ends_and_its_middle():
    assert Parameter("x", low=0.2, high=1.0, step=0.2).grid() == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert Parameter("x", low=1, high=4, step=1, whole=True).grid() == [1, 2, 3, 4]
    assert Parameter("x", low=0.0, high=1.0).grid() == [0.0, 0.5, 1.0]
    assert Parameter("x", low=0.01, high=1.0, log=True).grid() == [0.01, pytest.approx(math.sqrt(0.01)), 1.0]


def test_values_become_what_optuna_draws_from():
    assert Parameter("x", values=(1, None)).distribution() == CategoricalDistribution((1, None))
    assert Parameter("x", low=1, high=9, step=2, whole=True).distribution() == IntDistribution(1, 9, step=2)
    assert Parameter("x", low=0.1, high=1.0, log=True).distribution() == FloatDistribution(0.1, 1.0, log=True)


def test_none_is_spelled_out_in_a_file():
    found = nested("eplc.max_label_age", {"values": ["none", 50], "published": "none"})
    assert found.parameters[0].values == (None, 50)
    assert found.parameters[0].published is None
    check_space(found, WARM)


def test_a_published_value_that_is_not_listed_is_added():
    assert nested("eplc.passes", {"values": [1, 3], "published": 5}).parameters[0].values == (1, 3, 5)


def test_names_with_hyphens_are_those_of_the_command_line():
    found = parse_space({"rate-scale": {"low": 0.5, "high": 2.0}}, "mine.toml")
    assert found.names == ("rate_scale",)
    assert found.only(("rate-scale",)).names == ("rate_scale",)


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("eplc.keep", {"values": [0.5]}, "recipe eplc has no option 'eplc.keep'; did you mean eplc.keep_share"),
        ("eplc.threshhold", {"values": [0.5]}, "did you mean eplc.threshold"),
        ("rectified.threshold", {"values": [0.5]}, "did you mean eplc.threshold"),
        ("dropout", {"values": [0.5]}, "did you mean eplc.dropout"),
        ("mrnet.memory", {"values": [0.5]}, "decides a stage that all trials share"),
        ("seed", {"values": [0, 1]}, r"\[seed\] is the same in all trials"),
        ("teachers", {"values": [1, 2]}, r"\[teachers\] is the same in all trials"),
        ("eplc.passes", {"values": [1, 2.5]}, "would be 2.5, but eplc.passes takes whole numbers"),
        ("eplc.passes", {"low": 1.0, "high": 5.0}, "takes whole numbers"),
        ("eplc.dropout", {"values": ["much"]}, "would be 'much'"),
        ("eplc.dropout", {"low": 0.1, "high": 1.0}, "would be 1.0: dropout is 1.0; give a rate in"),
        ("eplc.mixing", {"values": ["all"]}, "would be 'all'"),
        ("eplc.passes", {"values": [True]}, "would be True"),
        ("rate_scale", {"low": 0.0001, "high": 1.0}, "--rate-scale is 0.0001"),
        ("prior.damping", {"low": 0.5, "high": 1.0}, "would be 1.0: --prior.damping is 1.0; give a share from 0"),
        ("prior.floor", {"values": [0.1, 0.0]}, "would be 0.0: --prior.floor is 0.0; give a share above 0"),
        ("prior.method", {"values": ["em", "guess"]}, "would be 'guess', but prior.method takes"),
        ("prior.refine_steps", {"low": 1, "high": 9}, "would be 1: --prior.refine-steps refines classifiers"),
        ("prior.flor", {"values": [0.1]}, "has no option 'prior.flor'; did you mean prior.floor"),
        ("prior", {"values": [0.1]}, r"\[prior\] is the same in all trials"),
    ],
)
def test_what_the_recipe_does_not_have_or_take_is_refused(name, table, said):
    found = nested(name, table) if "." in name else parse_space({name: table}, "mine.toml")
    with pytest.raises(RunError, match=said):
        check_space(found, WARM)


def test_bounds_on_the_age_of_labels_are_refused_with_one_round_of_them():
    once = AdaptOptions(init="runs/one", from_stage=2, refresh="once")
    with pytest.raises(RunError, match="labels of one round grow old by design"):
        check_space(nested("eplc.max_label_age", {"values": [50]}), once)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({}, "names no parameter"),
        ({"rate_scale": 2.0}, "gives no values to search; write"),
        ({"rate_scale": {}}, "needs values"),
        ({"rate_scale": {"low": 1.0}}, "needs values"),
        ({"rate_scale": {"low": 1.0, "hihg": 2.0}}, "unknown key 'hihg'"),
        ({"rate_scale": {"values": []}}, "give a list of at least one"),
        ({"rate_scale": {"values": 1.0}}, "give a list of at least one"),
        ({"rate_scale": {"values": [[1.0]]}}, "no number, word or truth value"),
        ({"rate_scale": {"values": [1.0], "low": 1.0}}, "has values and a range"),
        ({"rate_scale": {"low": 2.0, "high": 1.0}}, "low must be less than high"),
        ({"rate_scale": {"low": "a", "high": 1.0}}, "has low = 'a', which is no number"),
        ({"rate_scale": {"low": 0.0, "high": 1.0, "log": True}}, "low must be above 0"),
        ({"rate_scale": {"low": 0.1, "high": 1.0, "log": 1}}, "has log = 1; give true or false"),
        ({"rate_scale": {"low": 0.0, "high": 1.0, "step": 2.0}}, "does not fit between"),
        ({"rate_scale": {"low": 0.5, "high": 1.0, "published": 2.0}}, "published = 2.0, which is not between"),
    ],
)
def test_a_file_that_says_nothing_to_search_is_refused(plain, said):
    with pytest.raises(RunError, match=said):
        parse_space(plain, "mine.toml")


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_space(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[")
    with pytest.raises(RunError, match="cannot be read"):
        read_space(tmp_path / "bad.toml")


def test_only_names_that_the_space_has_can_be_picked():
    with pytest.raises(RunError, match=r"no parameter 'eplc.sure'; it has rate_scale"):
        read_space(shipped("eplc")).only(("eplc.sure",))


@pytest.mark.parametrize(
    ("name", "table", "first"),
    [
        ("eplc.passes", {"values": [1, 3]}, 1),
        ("eplc.max_label_age", {"low": 50, "high": 200}, 50),
        ("eplc.keep_share", {"low": 0.7, "high": 0.9}, 0.7),
        ("eplc.dropout", {"low": 0.0, "high": 0.1}, 0.1),
    ],
)
def test_a_default_that_a_space_does_not_have_is_not_tried(name, table, first):
    found = nested(name, table)
    check_space(found, WARM)
    assert found.first_points(WARM) == [{name: first}]


def test_none_may_be_a_word_that_an_option_lists():
    found = nested("eplc.mixing", {"values": ["none", "classes"]})
    check_space(found, WARM)
    assert found.grid(WARM) == [{"eplc.mixing": "classes"}, {"eplc.mixing": "none"}]


def test_a_parameter_knows_its_values():
    assert Parameter("x", values=(1, None)).contains(None)
    assert not Parameter("x", values=(1, 2)).contains(None)
    assert Parameter("x", low=0.1, high=1.0).contains(1.0)
    assert not Parameter("x", low=0.1, high=1.0).contains(0.0)
    assert not Parameter("x", low=0.1, high=1.0).contains(None)


def test_a_range_ends_where_its_steps_do():
    assert parse_space({"rate_scale": {"low": 0.0, "high": 1.0, "step": 0.4}}, "m").parameters[0].high == 0.8


def test_a_point_changes_its_options_and_no_others():
    changed = with_point(WARM, {"rate_scale": 2.0, "eplc.passes": 3, "eplc.max_label_age": None})
    assert changed == AdaptOptions(init="runs/one", from_stage=2, rate_scale=2.0, eplc=EplcOptions(passes=3))
    assert value_of(changed, "eplc.passes") == 3
    assert value_of(changed, "rate_scale") == 2.0


def test_what_trials_share_cannot_be_searched_and_everything_else_can():
    found = searchable(WARM)
    assert not set(found) & FIXED
    assert {"rate_scale", "eplc.dropout", "eplc.source_weight", "eplc.max_label_age"} <= set(found)
    assert not any(name.startswith("mrnet.") for name in found)
    assert "mrnet.memory" in searchable(AdaptOptions())


@pytest.mark.parametrize("name", RECIPES)
def test_how_class_frequencies_are_found_can_be_searched_with_every_recipe(name):
    options = AdaptOptions(recipe=name, adjust_prior="estimated")
    names = {f"prior.{item.name}" for item in dataclasses.fields(PriorOptions)}
    assert names | {"adjust_prior"} <= set(searchable(options))
    found = parse_space(
        {
            "adjust_prior": {"values": ["none", "estimated"]},
            "prior": {
                "floor": {"low": 0.01, "high": 1.0, "log": True},
                "damping": {"values": [0.0, 0.5, 0.9]},
                "refine-rate": {"values": ["none", 0.01]},
            },
        },
        "mine.toml",
    )
    check_space(found, options)
    assert found.parameters[-1].values == (None, 0.01)
    first, *_ = found.first_points(options)
    assert first == {"adjust_prior": "estimated", "prior.floor": 0.1, "prior.damping": 0.5, "prior.refine_rate": None}
    changed = with_point(options, {"prior.floor": 0.3, "adjust_prior": "none"})
    assert (changed.prior, changed.adjust_prior) == (PriorOptions(floor=0.3), "none")
    assert value_of(changed, "prior.floor") == 0.3


def test_class_frequencies_can_be_searched_in_trials_that_share_a_first_stage():
    check_space(nested("prior.temperature", {"low": 1.0, "high": 2.0}), WARM)
    assert value_of(AdaptOptions(faithful=True), "prior.temperature") == 1.0
