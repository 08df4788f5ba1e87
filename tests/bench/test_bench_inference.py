import pytest
import torch

from bench import inference
from bench.inference import Way, differences, rates, rows


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(inference, "PAUSE", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def way(name, threads=1, run=None):
    return Way("bisenet18", name, threads, run or (lambda: torch.arange(3.0)))


def test_ratios_are_of_one_round_and_to_the_first_way_of_as_many_threads():
    ways = [way("eager"), way("file"), way("eager", 2), way("file", 2)]
    table = rows(ways, [[1.0, 2.0, 4.0], [3.0, 4.0, 4.0], [10.0, 10.0, 10.0], [5.0, 20.0, 30.0]], [0.0] * 4)
    assert [row["images_per_s"] for row in table] == [2.0, 4.0, 10.0, 20.0]
    assert [row["ratio"] for row in table] == [1.0, 2.0, 1.0, 2.0]
    assert table[1]["ratio_range"] == [1.0, 3.0]
    assert table[3]["images_per_s_range"] == [5.0, 30.0]


def test_ways_take_turns_each_on_its_own_threads_and_another_one_begins_each_round():
    told = []

    def noted(name):
        return lambda: told.append((name, torch.get_num_threads())) or torch.zeros(1)

    found = rates([way("a", 1, noted("a")), way("b", 2, noted("b"))], rounds=2, images=2)
    assert told == [("a", 1)] * 2 + [("b", 2)] * 4 + [("a", 1)] * 2
    assert [len(values) for values in found] == [2, 2]
    assert min(min(values) for values in found) > 0


def test_a_difference_is_a_share_of_the_range_of_the_first_ways_scores():
    off = differences([way("eager"), way("file", run=lambda: torch.tensor([0.0, 1.0, 2.5]))])
    assert off == [0.0, 0.25]
