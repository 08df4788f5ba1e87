import copy

import numpy as np
import pytest
import ray
import torch
from fakes import PlainView, Remote, TinyNetwork

from actors.checkpoints import snapshot
from actors.publisher import STATISTICS_BATCHES, Publisher, TeachingNetwork
from actors.weight_board import WeightBoard


def student(seed=0):
    torch.manual_seed(seed)
    network = TinyNetwork()
    network.train()
    network(torch.randn(4, 3, 8, 8))  # running statistics that are not the initial ones
    return network


def moved(network, by):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by)


def raw(seed, count=2):
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3))
    return torch.from_numpy(images.astype(np.uint8)), np.arange(count) + 10 * seed


def test_it_starts_as_the_student_and_does_not_learn():
    network = student()
    teaching = TeachingNetwork(TinyNetwork(), network, 0.9, "running", None)
    for name, tensor in teaching.network.state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[name])
    assert not teaching.network.training
    assert not any(p.requires_grad for p in teaching.network.parameters())


def test_the_average_follows_the_student():
    network = student()
    start = network.conv.weight.detach().clone()
    teaching = TeachingNetwork(TinyNetwork(), network, 0.9, "running", None)
    moved(network, 1.0)
    teaching.follow(network)
    torch.testing.assert_close(teaching.network.conv.weight, start + 0.1)
    teaching.follow(network)
    torch.testing.assert_close(teaching.network.conv.weight, start + 0.19)
    torch.testing.assert_close(teaching.network.norm.running_mean, network.norm.running_mean)


def test_without_an_average_the_student_itself_is_published():
    network = student()
    teaching = TeachingNetwork(TinyNetwork(), network, None, "running", None)
    moved(network, 1.0)
    teaching.follow(network)
    settled = teaching.settle(network)
    torch.testing.assert_close(settled.conv.weight, network.conv.weight)


def test_running_statistics_are_those_of_the_student():
    network = student()
    teaching = TeachingNetwork(TinyNetwork(), network, 0.9, "running", PlainView())
    teaching.remember(*raw(1))
    teaching.settle(network)
    torch.testing.assert_close(teaching.network.norm.running_var, network.norm.running_var)


def test_target_statistics_are_the_mean_over_the_remembered_batches():
    network = student()
    teaching = TeachingNetwork(TinyNetwork(), network, 0.9, "target", PlainView())
    for seed in range(STATISTICS_BATCHES + 3):
        teaching.remember(*raw(seed))
    teaching.settle(network)
    means, variances = [], []
    for seed in range(3, STATISTICS_BATCHES + 3):
        maps = teaching.network.conv(PlainView()(raw(seed)[0], (), None)[0])
        means.append(maps.mean((0, 2, 3)))
        variances.append(maps.var((0, 2, 3), correction=1))
    torch.testing.assert_close(teaching.network.norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(teaching.network.norm.running_var, torch.stack(variances).mean(0))


def test_settling_twice_is_settling_once_and_changes_nothing_for_the_average():
    network = student()
    teaching = TeachingNetwork(TinyNetwork(), network, 0.9, "target", PlainView())
    teaching.remember(*raw(1))
    first = copy.deepcopy(teaching.settle(network).state_dict())
    second = teaching.settle(network).state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)
    moved(network, 1.0)
    teaching.follow(network)
    torch.testing.assert_close(teaching.network.norm.running_mean, network.norm.running_mean)


def test_its_state_makes_another_one_equal():
    network = student()
    one = TeachingNetwork(TinyNetwork(), network, 0.9, "target", PlainView())
    one.remember(*raw(1))
    moved(network, 1.0)
    one.follow(network)
    other = TeachingNetwork(TinyNetwork(), student(5), 0.9, "target", PlainView())
    other.load_state_dict(snapshot(one.state_dict()))
    for teaching in (one, other):
        moved(network, 0.5)
        teaching.follow(network)
        moved(network, -0.5)
        teaching.settle(network)
    for name, tensor in one.network.state_dict().items():
        torch.testing.assert_close(other.network.state_dict()[name], tensor)
    np.testing.assert_array_equal(other.recent[0][1], one.recent[0][1])


def test_an_average_goes_on_over_stages():
    network = student()
    first = TeachingNetwork(TinyNetwork(), network, 0.9, "target", PlainView())
    first.remember(*raw(1))
    moved(network, 1.0)
    first.follow(network)
    second = TeachingNetwork(TinyNetwork(), network, 0.5, "target", PlainView(), first)
    torch.testing.assert_close(second.network.conv.weight, first.network.conv.weight)
    assert (second.network.conv.weight != network.conv.weight).all()
    average = second.network.conv.weight.clone()
    moved(network, 1.0)
    second.follow(network)
    torch.testing.assert_close(second.network.conv.weight, 0.5 * (average + network.conv.weight))
    assert [positions.tolist() for _, positions in second.recent] == [[10, 11]]
    assert second.recent is not first.recent


@pytest.mark.parametrize(("before", "now"), [(None, 0.9), (0.9, None), (None, None)])
def test_where_one_of_two_stages_has_no_average_the_next_starts_from_the_student(before, now):
    network = student()
    first = TeachingNetwork(TinyNetwork(), network, before, "running", None)
    moved(network, 1.0)
    first.follow(network)
    second = TeachingNetwork(TinyNetwork(), network, now, "running", None, first)
    torch.testing.assert_close(second.network.conv.weight, network.conv.weight)


def test_without_a_plain_view_the_statistics_stay_the_students():
    network = student()
    teaching = TeachingNetwork(TinyNetwork(), network, 0.9, "target", None)
    teaching.remember(*raw(1))
    teaching.settle(network)
    torch.testing.assert_close(teaching.network.norm.running_mean, network.norm.running_mean)


class Call:
    """The answer of a remote call."""

    def __init__(self, function):
        self.function = function


class Handle:
    """A handle of an object whose methods run when their answer is asked for."""

    def __init__(self, **methods):
        self.methods = methods

    def __getattr__(self, name):
        return Remote(lambda *arguments: Call(lambda: self.methods[name](*arguments)))


@pytest.fixture
def no_cluster(monkeypatch):
    def get(what):
        return [get(item) for item in what] if isinstance(what, list) else what.function()

    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", get)


def dead(*_):
    raise ray.exceptions.RayActorError


def board_handle(board):
    return Handle(publish=board.publish, rewind=board.rewind)


@pytest.mark.usefixtures("no_cluster")
def test_published_weights_are_those_of_the_moment_of_the_call():
    board, network = WeightBoard(), student()
    before = network.conv.weight.detach().numpy().copy()
    publisher = Publisher(board_handle(board), None)
    publisher.publish(4, network, pin=True)
    moved(network, 1.0)
    publisher.flush()
    (weights,) = board.take(4)
    np.testing.assert_array_equal(weights["conv.weight"], before)
    assert set(weights) == set(network.state_dict())
    assert (publisher.version, publisher.failures) == (4, 0)


@pytest.mark.usefixtures("no_cluster")
def test_the_students_own_weights_hang_beside_the_average():
    board, average, own = WeightBoard(), student(), student()
    moved(own, 1.0)
    publisher = Publisher(board_handle(board), None)
    publisher.publish(4, average, pin=False, student=own)
    publisher.flush()
    first, second = board.take(4)
    np.testing.assert_array_equal(first["conv.weight"], average.conv.weight.detach().numpy())
    np.testing.assert_array_equal(second["conv.weight"], own.conv.weight.detach().numpy())


@pytest.mark.usefixtures("no_cluster")
def test_a_dead_board_costs_a_version_and_not_the_student():
    board, network = WeightBoard(), student()
    publisher = Publisher(Handle(publish=dead), None)
    publisher.publish(1, network, pin=False)
    publisher.publish(2, network, pin=False)
    publisher.flush()
    publisher.board = board_handle(board)
    publisher.publish(3, network, pin=False)
    publisher.flush()
    assert publisher.failures == 2
    assert board.newest_version() == 3


@pytest.mark.usefixtures("no_cluster")
def test_a_defect_while_publishing_is_not_taken_for_a_dead_board():
    def defect(*_):
        raise KeyError("weights")

    publisher = Publisher(Handle(publish=defect), None)
    publisher.publish(1, student(), pin=False)
    with pytest.raises(KeyError):
        publisher.flush()


@pytest.mark.usefixtures("no_cluster")
def test_board_and_bank_hear_that_the_student_came_back_at_an_earlier_step():
    heard = []
    board, bank = (Handle(rewind=lambda step, name=name: heard.append((name, step))) for name in ("board", "bank"))
    Publisher(board, bank).rewind(7)
    Publisher(board, None).rewind(8)
    assert heard == [("board", 7), ("bank", 7), ("board", 8)]
