import pytest
from torch import nn

from bench.alone import Shelf
from bench.staleness import table


def published(age, steps):
    shelf = Shelf(age)
    for step in steps:
        shelf.publish(step, nn.Linear(1, 1), pin=False)
    return shelf


@pytest.mark.parametrize(("age", "step", "version"), [(0, 20, 20), (8, 20, 12), (8, 23, 12), (8, 3, 0), (32, 20, 0)])
def test_labels_are_made_with_the_newest_weights_that_are_old_enough(age, step, version):
    assert published(age, range(0, step + 1, 4)).at(step)[0] == version


def test_labels_of_the_whole_stage_keep_the_weights_that_it_started_from():
    shelf = published(None, range(0, 400, 4))
    assert shelf.at(399)[0] == 0
    assert len(shelf.versions) == 1


@pytest.mark.parametrize("age", [None, 8])
def test_a_stage_labels_with_nothing_older_than_its_start(age):
    shelf = published(age, range(0, 40, 4))
    shelf.publish(40, nn.Linear(1, 1), pin=True)
    assert shelf.at(41)[0] == 40


def test_old_weights_do_not_pile_up():
    shelf = Shelf(8)
    for step in range(0, 400, 4):
        shelf.publish(step, nn.Linear(1, 1), pin=False)
        shelf.at(step)
    assert len(shelf.versions) == 3


def test_the_table_has_a_row_an_age_and_the_spread_over_seeds():
    entries = [
        {"age": age, "seed": seed, "score": {"miou": miou}, "mean_age": 20.0}
        for age, seed, miou in (("stage", 0, 30.0), ("8", 1, 34.0), ("8", 0, 32.0))
    ]
    assert table(entries).splitlines()[2:] == [
        "| 8 | 20 | 32.0, 34.0 | 33.0 ± 1.4 |",
        "| whole stage | 20 | 30.0 | one seed |",
    ]
