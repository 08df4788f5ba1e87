import numpy as np
import pytest
from PIL import Image

from actors.errors import RunError
from actors.label_rounds import read_round
from actors.records import decode
from models.selection import confidence_histogram
from pipelines.options import AdaptOptions
from pipelines.pseudo_labels.given import write_given_round
from pipelines.pseudo_labels.table import PseudoLabel, open_table
from pipelines.recipes.eplc import EplcOptions
from pipelines.setup import resolve
from tests.own_data import write_own_data

NAMES = tuple(f"class {i}" for i in range(3))


def label(number, size=(30, 20)):
    rng = np.random.default_rng(number)
    made = rng.choice(np.array([0, 1, 2, 255], np.uint8), size[::-1])
    return PseudoLabel(f"photos/{number}.jpg", made, rng.integers(0, 256, size[::-1], np.uint8) if number % 2 else None)


def table(path, items, names=NAMES):
    with open_table(path, names) as file:
        for item in items:
            file.add(item)
    return str(path)


@pytest.fixture
def options(tmp_path):
    source, target = write_own_data(tmp_path / "own")

    def build(path, **more):
        folders = {"runs": str(tmp_path / "runs"), "data": str(tmp_path / "data")}
        return AdaptOptions(source=source, target=target, preset="tiny", pseudo_labels=path, **folders, **more)

    return build


def test_a_run_takes_them_as_one_round_and_selects_no_further(options, tmp_path):
    setup = resolve(options(table(tmp_path / "x.parquet", [label(0)])))
    ((_, plan),) = setup.labels.items()
    assert plan.policy.refresh == "once"
    assert plan.selection is None
    assert setup.open_given().image_ids == ("photos/0.jpg",)


def test_the_round_has_the_runs_own_size_blocks_and_order(options, tmp_path):
    items = [label(number, size=(20 + number, 40 - number)) for number in (5, 0, 7, 3, 2, 1)]
    setup = resolve(options(table(tmp_path / "x.parquet", items)))
    ((stage, plan),) = setup.labels.items()
    rows = setup.label_rows()[stage]
    made = write_given_round(setup.open_given(), setup.domains.target, plan, rows, str(tmp_path / "round"))
    assert made.missing == 2
    headers, *blocks = read_round(made.path, -(-8 // rows))
    found = {image_id: decode(b, i) for b in blocks for i, image_id in enumerate(b.column("image_id").to_pylist())}
    assert tuple(found) == setup.domains.target.image_ids
    histogram = np.zeros((3, 256), np.int64)
    for item in items:
        full = np.full_like(item.label, 255) if item.confidence is None else item.confidence
        expected = [np.asarray(Image.fromarray(m).resize(setup.preset.label_size, 0)) for m in (item.label, full)]
        np.testing.assert_array_equal(found[item.image_id]["label"], expected[0])
        np.testing.assert_array_equal(found[item.image_id]["confidence"], expected[1])
        histogram += confidence_histogram(*expected, 3)
    assert (found["photos/4.jpg"]["label"] == 255).all()
    np.testing.assert_array_equal(sum(header.histogram for header in headers), histogram)
    assert {header.version for header in headers} == {0}


@pytest.mark.parametrize(
    ("items", "names", "message"),
    [
        ([label(0)], ("class 0", "class 2", "class 1"), "has the classes class 0, class 2, class 1, this run class 0"),
        ([PseudoLabel("other", *[np.zeros((2, 2), np.uint8)] * 2)], NAMES, "for example 'other', they are called like"),
        ([], NAMES, "for example no image at all"),
    ],
)
def test_labels_of_something_else_are_refused_before_anything_starts(options, tmp_path, items, names, message):
    with pytest.raises(RunError, match=message):
        resolve(options(table(tmp_path / "x.parquet", items, names))).open_given()


def test_a_recipe_that_takes_no_pseudo_labels_says_so(options, tmp_path):
    given = table(tmp_path / "x.parquet", [label(0)])
    with pytest.raises(RunError, match="one round of labels, and the recipe is to run 2; leave rounds out"):
        resolve(options(given, eplc=EplcOptions(rounds=2)))
    with pytest.raises(RunError, match="this recipe takes no pseudo labels"):
        resolve(options(table(tmp_path / "x.parquet", [label(0)]), recipe="mrnet"))


def test_a_damaged_file_is_refused(options, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="cannot be read as a Parquet file"):
        resolve(options(str(tmp_path / "x.parquet"))).open_given()


def test_given_labels_are_one_round_whatever_the_refresh_says(options, tmp_path):
    with pytest.raises(RunError, match="leave --refresh continuous out"):
        options(table(tmp_path / "x.parquet", [label(0)]), refresh="continuous")


def test_a_run_that_was_given_labels_still_knows_how_its_recipe_makes_them(options, tmp_path):
    setup = resolve(options(table(tmp_path / "x.parquet", [label(0)])))
    assert setup.makes.selection is not None
    assert setup.make_showcase().args[5] is None  # no rule of this run made the labels that it learned from
