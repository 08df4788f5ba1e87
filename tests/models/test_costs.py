import pytest
import torch
from torch import nn

from models.costs import ENLARGED_OPERATIONS, cost, flops, parameters, peak_bytes


def only(answer):
    return [answer]


def two_layers(device):
    with torch.device(device):
        made = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
        return made, torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_bytes_of_two_convolutions_are_those_counted_by_hand(device):
    network, images = two_layers(device)
    found = cost(network, images, only)
    pixels = 2 * 8 * 8
    first = rectified = 4 * 4 * pixels
    second = 4 * 5 * pixels
    assert found.inference_bytes == max(first + rectified, rectified + second)
    # The rectifier's backward pass: its answer, the scores and their gradient, what came in, what goes out.
    kept, incoming, outgoing = rectified, rectified, first
    assert found.training_bytes == kept + second + second + incoming + outgoing
    assert found.parameters == 3 * 4 * 9 + 4 * 5
    assert found.flops == 2 * pixels * (3 * 4 * 9 + 4 * 5)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_pass_in_half_precision_takes_half_the_bytes():
    network, images = two_layers("meta")
    whole = cost(network, images, only)
    half = cost(network.to(torch.bfloat16), images.to(torch.bfloat16), only)
    assert (2 * half.inference_bytes, 2 * half.training_bytes) == (whole.inference_bytes, whole.training_bytes)
    assert (half.flops, half.parameters) == (whole.flops, whole.parameters)


def test_nothing_of_what_training_does_without_a_gradient_changes_the_weights():
    network, images = two_layers("cpu")
    before = [parameter.clone() for parameter in network.parameters()]
    cost(network, images + 1, only)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_memory_that_is_shared_counts_once_and_memory_that_was_given_back_no_more():
    given = torch.zeros(100)

    def run():
        a = given + 1  # 400 bytes
        b = a.view(10, 10).relu_()[:5]  # the same
        del a, b
        c = given + 1  # in place of it
        d = c.double()  # 800 more
        return c.sum() + d.sum()

    assert peak_bytes(run, [given]) == 400 + 800 + 4 + 8 + 8
    assert peak_bytes(lambda: given.add_(1).view(-1), [given]) == 0


def test_what_is_kept_for_the_backward_pass_is_alive_until_then():
    x = torch.zeros(100, requires_grad=True)

    def run(times):
        y = x
        for _ in range(times):
            y = y.exp()
        y.backward(torch.zeros_like(y))
        x.grad = None

    # Every answer is kept, and so is the first gradient; of the others, what comes in and what goes out.
    assert [peak_bytes(lambda n=n: run(n), [x], [x]) for n in (3, 4)] == [400 * (3 + 1 + 2), 400 * (4 + 1 + 2)]


def test_gradients_of_parameters_do_not_count():
    network, images = two_layers("cpu")
    seed = torch.zeros(2, 5, 8, 8)
    given = [images, seed, *network.parameters()]

    def run(first):
        network.zero_grad()
        (network[0](images) if first else network(images)).backward(seed[:, :4] if first else seed)

    learns = list(network.parameters())
    # Without a gradient of its own images the only thing that a first layer's backward pass makes is its weight's.
    scores = 4 * 4 * 128
    assert peak_bytes(lambda: run(True), given, learns) == scores
    assert peak_bytes(lambda: run(True), given) == scores + 4 * 108
    assert not network[0].weight._post_accumulate_grad_hooks
    assert peak_bytes(lambda: run(False), given, learns) == 4 * 128 * (4 + 5 + 4 + 4)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_grouped_convolution_multiplies_the_channels_of_its_group_only(groups, device):
    with torch.device(device):
        layer = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups)
        images = torch.zeros(2, 6, 16, 20)
    assert flops(lambda: layer(images)) == 2 * (2 * 8 * 10) * 12 * (6 // groups) * 9


def test_two_operations_a_multiply_add_of_a_linear_layer():
    with torch.device("meta"):
        layer, rows = nn.Linear(7, 5), torch.zeros(3, 7)
        assert flops(lambda: layer(rows)) == 2 * 3 * 7 * 5


def test_a_bilinear_enlargement_costs_by_the_value():
    maps = torch.zeros(2, 3, 4, 4, device="meta")
    enlarged = flops(lambda: nn.functional.interpolate(maps, size=(8, 12), mode="bilinear"))
    assert enlarged == ENLARGED_OPERATIONS * 2 * 3 * 8 * 12
    assert flops(lambda: nn.functional.relu(maps)) == 0


def test_a_shared_tensor_is_one_parameter():
    layer = nn.Linear(4, 4)
    assert parameters(nn.Sequential(layer, layer)) == 20


def test_inputs_that_a_network_cannot_read_are_an_error():
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cost(norm, torch.zeros(1, 3, 1, 1), only)
