import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.networks.bisenet import AttentionRefinement, BiSeNet, BiSeNetConfig
from models.networks.build import SMALL, Build, config_of, named_config
from models.networks.segmenter import upsample

KEYS = json.loads((Path(__file__).parents[2] / "golden" / "bisenet_keys.json").read_text())
PUBLISHED = {"bisenet_resnet18": BiSeNetConfig(), "bisenet_resnet101": BiSeNetConfig.resnet101()}
UNUSED = {"bisenet_resnet18": 513_000, "bisenet_resnet101": 2_049_000}
COUNTS = {"bisenet_resnet18": 12_581_672, "bisenet_resnet101": 50_801_192}


def tiny(**changes):
    torch.manual_seed(0)
    return BiSeNet(replace(BiSeNetConfig(3, (1, 1, 1, 1), width=4, spatial_width=4), **changes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_counts_are_those_of_the_published_checkpoints(name):
    with torch.device("meta"):
        network = BiSeNet(PUBLISHED[name])
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == KEYS[name]
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name] - UNUSED[name]


def published_order(network, images):
    """As methods 2.5 tells it: both refined maps enlarged, fused, enlarged by eight, and then classified."""
    one, two, map3, map4 = network.context_path(images)
    assert one.shape[-1] == images.shape[-1] // 4
    assert two.shape[-1] == images.shape[-1] // 8
    spatial = images
    for block in (network.saptial_path.convblock1, network.saptial_path.convblock2, network.saptial_path.convblock3):
        spatial = F.relu(
            F.batch_norm(
                F.conv2d(spatial, block.conv1.weight, None, 2, 1),
                None,
                None,
                block.bn.weight,
                block.bn.bias,
                training=True,
            )
        )

    def refined(x, arm):
        seen = F.conv2d(F.adaptive_avg_pool2d(x, 1), arm.conv.weight, arm.conv.bias)
        return x * F.batch_norm(seen, None, None, arm.bn.weight, arm.bn.bias, training=True).sigmoid()

    def larger(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    tail = F.adaptive_avg_pool2d(map4, 1)
    map3 = larger(refined(map3, network.attention_refinement_module1), 2)
    map4 = larger(refined(map4, network.attention_refinement_module2) * tail, 4)
    fusion = network.feature_fusion_module
    x = F.conv2d(torch.cat((spatial, map3, map4), 1), fusion.convblock.conv1.weight, None, 1, 1)
    x = F.relu(F.batch_norm(x, None, None, fusion.convblock.bn.weight, fusion.convblock.bn.bias, training=True))
    att = F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), fusion.conv1.weight, fusion.conv1.bias))
    att = F.conv2d(att, fusion.conv2.weight, fusion.conv2.bias).sigmoid()
    main = F.conv2d(larger(x * att + x, 8), network.conv.weight, network.conv.bias)
    return main, larger(network.supervision1(map3), 8), larger(network.supervision2(map4), 8)


def test_classifying_before_enlarging_is_the_published_network():
    network = tiny().double().train()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for made, expected in zip(network(images), published_order(network, images), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


def test_three_heads_are_trained_and_one_answers():
    network = tiny()
    images = torch.randn(2, 3, 64, 96)
    trained = network.train()(images)
    assert [share for share, _ in trained.heads()] == [1.0, 1.0, 1.0]
    assert {scores.shape for _, scores in trained.heads()} == {(2, 3, 64, 96)}
    torch.stack([scores.square().mean() for _, scores in trained.heads()]).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    ((share, only),) = network.eval()(images).heads()
    assert share == 1.0
    assert torch.equal(only, network(images).fused())


@pytest.mark.parametrize("size", [(40, 56), (108, 192), (33, 65)])
def test_answers_have_the_size_of_any_image(size):
    with torch.no_grad():
        assert tiny().eval()(torch.randn(1, 3, *size)).main.shape[2:] == size


def test_one_image_alone_takes_the_running_statistics_of_the_attention():
    module = AttentionRefinement(4).train()
    nn.init.normal_(module.bn.running_mean)
    x = torch.randn(1, 4, 3, 5)
    trained = module(x)
    assert torch.equal(trained, module.eval()(x))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"layers": (1, 1, 1)}, "four stages"),
        ({"block": "thick"}, "choose basic or bottleneck"),
        ({"width": 0}, "width is 0"),
        ({"spatial_width": 0}, "spatial_width is 0"),
        ({"heads": "mrnet"}, "no BiSeNet"),
    ],
)
def test_what_cannot_be_built_is_said(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(BiSeNetConfig(), **change)


def test_all_parts_learn_alike():
    network = tiny()
    (group,) = network.parameter_groups(lr=2.0, head_multiplier=10.0, duplicates="published", train_norm_affine=False)
    assert group["lr"] == 2.0
    assert len(group["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(7, 11), (16, 24), (3, 2)])
def test_enlarging_with_a_gradient_is_torchs(corners, size):
    maps = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(maps, size=size, mode="bilinear", align_corners=corners)
    torch.testing.assert_close(upsample(maps, size, corners=corners), expected)


# By name.


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("small", [True, False])
def test_networks_have_names(name, small):
    config = named_config(name, 9, small=small)
    with torch.device("meta"):
        network = Build(config)()
    assert network.config.num_classes == 9
    assert config_of(json.loads(json.dumps(vars(config)))) == config


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'vgg'; known are deeplab101, proda101, bisenet18, bisenet101, fada101, fada"
    ):
        named_config("vgg", 19, small=False)
