import copy

import numpy as np
import torch
from fakes import PlainView, TinyNetwork

from actors.checkpoints import snapshot
from actors.publisher import STATISTICS_BATCHES, TeachingNetwork


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
