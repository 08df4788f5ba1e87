"""How old labels are when they are read, and what they cost the object store: the bench's loads, in small."""

import pytest
import ray

from bench.label_path import Load, measure

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_other_ray():
    ray.shutdown()  # the simulated nodes are a cluster of their own


@pytest.fixture(scope="module")
def two_nodes():
    """256 images of 64 KB, every one visited once a refresh in random order; the teachers on a node of their own.

    A refresh takes three times as long as in the bench, so that what else the machine does weighs less.
    """
    return measure(Load(refreshes=5, step_seconds=0.1))


def test_labels_from_another_node_are_no_older_than_one_refresh(two_nodes):
    assert two_nodes["reads"] == 4 * 256
    assert two_nodes["missing"] == 0
    assert two_nodes["fresh_share"] >= 0.95, two_nodes


def test_what_is_read_is_what_the_view_says_it_is(two_nodes):
    assert two_nodes["wrong"] == 0
    assert two_nodes["lost"] == two_nodes["failed_calls"] == 0


def test_the_object_store_holds_as_much_after_many_relabellings_as_after_few():
    load = Load(nodes=1, images=512, step_seconds=0.01, refreshes=15, free_ms=100)
    found = measure(load)["store"]
    assert found["blocks_labelled_again"] >= 100
    held = found["student"]
    assert held["median"] <= 1.5, held
    assert held["max"] <= 2.5, held  # the bank's round, the one that the view still serves, and what awaits removal
    assert held["second_half_median"] <= held["first_half_median"] + 0.25, held
