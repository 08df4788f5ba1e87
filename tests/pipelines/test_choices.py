import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from actors.errors import RunError
from pipelines.choices import check_choices
from pipelines.options import AdaptOptions
from pipelines.recipes.eplc import EplcOptions


@dataclass
class Options:
    colour: Literal["red", "green"] = "red"
    level: Literal[1, 2] = 1
    name: str = "anything"


@pytest.mark.parametrize("options", [Options(), Options("green", 2), Options(name="blue")])
def test_listed_values_and_free_fields_pass(options):
    check_choices(options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (Options("blue"), "colour is 'blue'; choose one of red, green"),
        (Options(level=3), "level is 3; choose one of 1, 2"),
        (Options(None), "colour is None; choose one of red, green"),
    ],
)
def test_another_value_is_refused_and_told_what_to_choose(options, sentence):
    with pytest.raises(RunError) as error:
        check_choices(options)
    assert str(error.value) == sentence


@pytest.mark.parametrize("options", [AdaptOptions, EplcOptions])
def test_no_options_take_a_word_that_they_do_not_list(options):
    """Whatever the fields are: a config.toml comes in without the command line's check."""
    words = [field.name for field in dataclasses.fields(options) if field.type.startswith("Literal[")]
    assert words
    for name in words:
        with pytest.raises(RunError, match=f"^{name} is 'magic'; choose one of "):
            options(**{name: "magic"})
