import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.losses import discriminator_loss, generator_loss
from models.networks.discriminators import (
    FullyConvDiscriminator,
    MultiScaleDiscriminator,
    PatchDiscriminator,
    PixelDiscriminator,
    SeparableDiscriminator,
)


@pytest.fixture(scope="module")
def published(filled):
    network = MultiScaleDiscriminator(19)
    network.layout = filled(network)
    return network


@pytest.fixture(scope="module")
def fake(golden_input):
    return golden_input("msd_fake", (2, 19, 64, 128)).softmax(dim=1)


@pytest.fixture(scope="module")
def real(golden_input):
    return (2 * golden_input("msd_real", (2, 19, 64, 128))).softmax(dim=1)


def test_state_dict_keys_and_shapes_are_those_of_the_published_checkpoints(published, golden_keys):
    assert published.layout == golden_keys["ms_discriminator"]


def test_the_parameter_count_is_the_published_one(published):
    assert sum(parameter.numel() for parameter in published.parameters()) == 1_041_699


def test_the_outputs_equal_the_reference(published, fake, golden):
    for index, score in enumerate(published(fake)):
        expected = golden[f"msd_out{index}"]
        assert score.shape == expected.shape
        assert np.abs(score.detach().numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_generator_loss_equals_the_reference(published, fake, golden):
    assert generator_loss(published(fake)).item() == pytest.approx(golden["msd_gen_loss"].item(), rel=1e-4)


def test_the_discriminator_loss_and_its_penalty_equal_the_reference(published, fake, real, golden):
    loss = discriminator_loss(published, fake, real)
    assert loss.total.item() == pytest.approx(golden["msd_dis_loss"].item(), rel=1e-4)
    assert loss.penalty.item() == pytest.approx(golden["msd_dis_reg"].item(), rel=1e-4)


def test_the_maps_of_a_full_crop_have_strides_8_16_and_32():
    with torch.device("meta"):
        network = MultiScaleDiscriminator(19)
    shapes = [tuple(score.shape[1:]) for score in network(torch.empty((1, 19, 512, 1024), device="meta"))]
    assert shapes == [(1, 64, 128), (1, 32, 64), (1, 16, 32)]


def test_weights_start_from_a_narrow_normal_and_biases_from_zero():
    torch.manual_seed(0)
    network = MultiScaleDiscriminator(19)
    weights = torch.cat([p.flatten() for name, p in network.named_parameters() if name.endswith("weight")])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_a_small_member_is_the_same_code_at_another_width():
    network = MultiScaleDiscriminator(16, width=8)
    assert network.cnns[0][4].conv.weight.shape == (16, 8, 3, 3)
    assert sum(p.numel() for p in network.parameters()) < 100_000


def test_the_penalty_is_the_squared_gradient_of_the_scores_and_trains_the_discriminator():
    # D(x) = w * x: the gradient of its sum is w everywhere, so R = 0.01 * w^2 * C * h * w per image.
    weight = torch.tensor(3.0, requires_grad=True)
    fake, real = torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 4, 5)
    loss = discriminator_loss(lambda x: [weight * x], fake, real)
    assert loss.penalty.item() == pytest.approx(0.01 * 9 * 20)
    assert loss.total.item() == pytest.approx(1 + 0.01 * 9 * 20)
    loss.penalty.backward()
    assert weight.grad.item() == pytest.approx(0.01 * 6 * 20)


def test_the_discriminator_loss_sends_no_gradient_to_its_inputs():
    fake = torch.rand(1, 1, 4, 4, requires_grad=True)
    real = torch.rand(1, 1, 4, 4, requires_grad=True)
    weight = torch.tensor(1.0, requires_grad=True)
    discriminator_loss(lambda x: [weight * x], fake, real).total.backward()
    assert fake.grad is None
    assert real.grad is None


def test_without_a_penalty_there_is_no_second_pass():
    calls = []

    def spy(x):
        calls.append(x.requires_grad)
        return [x]

    loss = discriminator_loss(spy, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), penalty_weight=0.0)
    assert calls == [False, False]
    assert loss.total.item() == 0.0
    assert loss.penalty.item() == 0.0


def test_the_generator_loss_doubles_the_sum_over_scales():
    assert generator_loss([torch.zeros(1, 1, 2, 2), torch.full((1, 1, 1, 1), 3.0)]).item() == 2 * (1 + 4)


def test_a_discriminator_without_classes_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        MultiScaleDiscriminator(0)


# ProDA's.


def test_prodas_parameter_count_is_the_published_one():
    with torch.device("meta"):
        network = PatchDiscriminator(19)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_560_705


@torch.no_grad()
def test_prodas_layers_are_four_strided_convolutions_and_a_pointwise_one():
    """Layer by layer in float64, the last rectifier leaky."""
    torch.manual_seed(0)
    network, fake = PatchDiscriminator(3, width=4), torch.rand(2, 3, 50, 36)
    assert [tuple(conv.weight.shape) for conv in network.convs] == [
        (4, 3, 3, 3),
        (8, 4, 3, 3),
        (16, 8, 3, 3),
        (32, 16, 3, 3),
    ]
    functional, x = torch.nn.functional, fake.double()
    for number, conv in enumerate(network.convs):
        x = functional.conv2d(x, conv.weight.double(), conv.bias.double(), stride=2, padding=1)
        x = torch.where(x > 0, x, 0.2 * x if number == 3 else 0 * x)
    weight, bias = network.classifier.weight.double(), network.classifier.bias.double()
    expected = torch.einsum("ck,nkhw->nchw", weight[:, :, 0, 0], x) + bias[:, None, None]
    found = network(fake)
    assert found.shape == (2, 1, 4, 3)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_prodas_map_of_a_full_crop_has_stride_16():
    with torch.device("meta"):
        network = PatchDiscriminator(19)
        assert network(torch.empty(1, 19, 512, 896)).shape == (1, 1, 32, 56)


@pytest.mark.parametrize(("classes", "width"), [(0, 64), (19, 0)])
def test_prodas_discriminator_without_classes_or_width_is_refused(classes, width):
    with pytest.raises(ValueError, match=f"num_classes is {classes} and width is {width}; both must be at least 1"):
        PatchDiscriminator(classes, width)


# BiSeNet's.

KEYS = json.loads((Path(__file__).parents[2] / "golden" / "bisenet_keys.json").read_text())
BISENETS = {"fcd": (FullyConvDiscriminator, 2_781_121), "dsc": (SeparableDiscriminator, 189_424)}


@pytest.mark.parametrize("name", BISENETS)
def test_bisenets_discriminators_have_the_published_keys_and_counts(name):
    kind, count = BISENETS[name]
    with torch.device("meta"):
        network = kind(19)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == KEYS[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("size", "answer"), [((512, 1024), (512, 1024)), ((720, 1280), (704, 1280))])
@pytest.mark.parametrize("name", BISENETS)
def test_their_answer_is_as_large_as_five_halvings_leave_it(name, size, answer):
    with torch.device("meta"):
        scores = BISENETS[name][0](19)(torch.empty((1, 19, *size), device="meta"))
    assert scores.shape == (1, 1, *answer)


def layer(network, number, x):
    """One step of a discriminator, by its weights alone."""
    weights = list(network.state_dict().values())
    if isinstance(network, FullyConvDiscriminator):
        return F.conv2d(x, weights[2 * number], weights[2 * number + 1], 2, 1)
    depth, point = weights[2 * number : 2 * number + 2]
    return F.conv2d(F.conv2d(x, depth, None, 2, 1, groups=x.shape[1]), point)


@pytest.mark.parametrize("name", BISENETS)
def test_they_are_five_layers_with_leaky_rectifiers_between(name):
    torch.manual_seed(0)
    network = BISENETS[name][0](3, width=4).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64).softmax(1)
    expected = x
    for number in range(5):
        expected = layer(network, number, expected if number == 0 else F.leaky_relu(expected, 0.2))
    expected = F.interpolate(expected, scale_factor=32, mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("name", BISENETS)
def test_a_map_without_five_halvings_is_refused(name):
    with pytest.raises(ValueError, match=r"31x64; a discriminator of five strides needs 32"):
        BISENETS[name][0](3, width=4)(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize("name", BISENETS)
def test_they_need_classes_and_channels(name):
    with pytest.raises(ValueError, match="num_classes is 0"):
        BISENETS[name][0](0)


# FADA's.


@pytest.mark.parametrize(("classes", "count"), [(19, 5_057_702), (16, 5_050_784)])
def test_fadas_discriminator_has_the_published_keys_and_counts(classes, count):
    with torch.device("meta"):
        network = PixelDiscriminator(classes)
    expected = json.loads((Path(__file__).parents[2] / "golden" / "fada_keys.json").read_text())["fada_discriminator"]
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes.keys() == expected.keys()
    assert classes != 19 or shapes == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_it_answers_cell_by_cell_for_the_classes_of_the_source_and_then_of_the_target():
    """Layer by layer in float64."""
    torch.manual_seed(0)
    network, features = PixelDiscriminator(3, features=8, width=6), torch.randn(2, 8, 5, 9)
    state = {name: value.double() for name, value in network.state_dict().items()}

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], 1, 1)

    x = features.double()
    for name in ("D.0", "D.2"):
        x = conv(name, x)
        x = torch.where(x > 0, x, 0.2 * x)
    assert x.shape[1] == 3
    before = features.clone()
    found = network(features)
    assert found.shape == (2, 6, 5, 9)
    torch.testing.assert_close(found.double(), torch.cat((conv("cls1", x), conv("cls2", x)), 1), atol=1e-6, rtol=1e-5)
    assert torch.equal(features, before), "its rectifiers leave what it reads alone"


@pytest.mark.parametrize("counts", [(0, 8, 4), (3, 0, 4), (3, 8, 1)])
def test_it_needs_classes_features_and_two_channels(counts):
    with pytest.raises(ValueError, match=r"num_classes is .*, features is .* and width is .*at least 1, 1 and 2"):
        PixelDiscriminator(*counts)
