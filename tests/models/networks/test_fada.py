"""FADA's network (methods 2.5): a feature extractor at stride 8 and one of two classifiers."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.costs import cost
from models.networks.backbone import DilatedVgg16, FrozenBatchNorm2d, TorchvisionResNet, grid_size
from models.networks.bisenet import BiSeNet, BiSeNetConfig
from models.networks.build import PUBLISHED, SMALL, Build
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.fada import Fada, FadaConfig, FadaOutputs
from models.networks.statistics import adapt_batch_norm, ema_update
from models.uncertainty import draw_masks, mean_probabilities, trunk_views

GOLDEN = Path(__file__).parents[2] / "golden"
KEYS = json.loads((GOLDEN / "fada_keys.json").read_text())
TINY = FadaConfig(
    3,
    layers=(1, 2, 2, 2),
    width=4,
    norms="batch",
    dilations=(1, 3),
    branch_channels=16,
    head_channels=16,
    groups=4,
)
SIZES = [((1024, 512), (128, 64)), ((1280, 720), (160, 90)), ((1280, 760), (160, 95)), ((2048, 1024), (256, 128))]


def meta(config):
    with torch.device("meta"):
        return Build(config)()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(seed=0, **changes):
    """A network none of whose parts is neutral."""
    torch.manual_seed(seed)
    network = Fada(replace(TINY, **changes))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(std=0.1)
    return network


# The published networks.


def test_keys_and_shapes_are_those_of_the_published_checkpoints():
    expected = {f"feature_extractor.{key}": shape for key, shape in KEYS["fada_feature_extractor"].items()}
    expected |= {f"classifier.{key}": shape for key, shape in KEYS["fada_classifier"].items()}
    state = meta(FadaConfig(norms="batch")).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected


def test_a_frozen_network_has_the_same_names_without_counters():
    ordinary, frozen = (set(meta(FadaConfig(norms=norms)).state_dict()) for norms in ("batch", "frozen"))
    assert ordinary - frozen == {key for key in ordinary if key.endswith("num_batches_tracked")}
    assert frozen < ordinary


def test_the_modified_classifier_has_the_names_of_prodas_head():
    keys = json.loads((GOLDEN / "proda_keys.json").read_text())["proda"]
    state = meta(FadaConfig(aspp="modified")).classifier.state_dict()
    head = {key.removeprefix("layer5."): shape for key, shape in keys.items() if key.startswith("layer5.")}
    assert {key: list(value.shape) for key, value in state.items()} == head


def test_parameter_counts_are_the_published_ones():
    ordinary, frozen, modified = (
        meta(config) for config in (FadaConfig(norms="batch"), FadaConfig(), FadaConfig(aspp="modified"))
    )
    assert count(ordinary.feature_extractor) == 42_500_160
    assert count(ordinary.classifier) == count(frozen.classifier) == 1_400_908
    affine = sum(value.numel() for key, value in ordinary.named_parameters() if "bn" in key or "downsample.1" in key)
    assert count(frozen.feature_extractor) == 42_500_160 - affine
    assert count(modified.classifier) == 65_063_568 - 42_500_160


def test_a_vgg_has_the_numbers_of_the_published_checkpoints_and_no_last_pools():
    network = meta(FadaConfig.vgg16())
    layers = network.feature_extractor.backbone
    assert isinstance(layers, DilatedVgg16)
    convolutions = [name for name, module in layers.named_children() if isinstance(module, nn.Conv2d)]
    assert convolutions == [str(n) for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31)]
    assert [layers.get_submodule(name).dilation[0] for name in convolutions] == [1] * 10 + [2] * 3 + [4] * 2
    assert [name for name, module in layers.named_children() if isinstance(module, nn.MaxPool2d)] == ["4", "9", "16"]
    assert isinstance(layers[-1], nn.ReLU)
    assert count(layers) == 14_714_688 + (512 + 1024) * 1024 * 9 + 2 * 1024
    assert count(network.classifier) == 4 * (1024 * 9 + 1) * 19
    assert "feature_extractor.backbone.31.bias" in network.state_dict()


@pytest.mark.parametrize(("size", "grid"), SIZES)
@pytest.mark.parametrize("config", [TINY, FadaConfig(3, backbone="vgg16", width=2)])
def test_scores_and_features_stand_on_the_published_grids(config, size, grid):
    found = meta(config).eval()(torch.empty((1, 3, size[1], size[0]), device="meta"))
    assert found.main.shape == (1, 3, grid[1], grid[0])
    assert found.feature.shape == (1, config.feature_channels, grid[1], grid[0])


def test_the_last_stages_dilate_and_their_first_blocks_as_the_stage_before():
    backbone = meta(FadaConfig()).feature_extractor.backbone
    assert [block.conv2.dilation[0] for block in backbone.layer3] == [1] + 22 * [2]
    assert [block.conv2.dilation[0] for block in backbone.layer4] == [2, 4, 4]
    assert backbone.layer2[0].conv2.stride == (2, 2), "on the 3x3 convolution"
    strides = [
        module.stride
        for stage in (backbone.layer3, backbone.layer4)
        for module in stage.modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert set(strides) == {(1, 1)}


def test_basic_blocks_cannot_be_dilated():
    with pytest.raises(ValueError, match="basic blocks are not dilated"):
        TorchvisionResNet((1, 1, 1, 1), 4, "basic", dilated=True)


# What they compute, from names and numbers alone in float64.


def normalised(state, name, x, epsilon):
    weight, bias, mean, variance = (
        state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return weight * (x - mean) / (variance + epsilon).sqrt() + bias


def resnet(state, images, layers, epsilon):
    """torchvision's bottlenecks with strides 1, 2, 1, 1; the first block of a stage has the dilation before."""

    def part(name, x, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)

    x = normalised(state, "bn1", part("conv1", images, 2), epsilon).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    before = 1
    for stage, (blocks, stride, dilation) in enumerate(zip(layers, (1, 2, 1, 1), (1, 1, 2, 4), strict=True), 1):
        for block in range(blocks):
            name, first = f"layer{stage}.{block}", block == 0
            y = normalised(state, f"{name}.bn1", part(f"{name}.conv1", x), epsilon).relu()
            y = part(f"{name}.conv2", y, stride if first else 1, before if first else dilation)
            y = normalised(state, f"{name}.bn2", y, epsilon).relu()
            y = normalised(state, f"{name}.bn3", part(f"{name}.conv3", y), epsilon)
            if first:
                x = part(f"{name}.downsample.0", x, stride)
                x = normalised(state, f"{name}.downsample.1", x, epsilon)
            x = (x + y).relu()
        before = dilation
    return x


def vgg(state, images):
    x = images
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31):
        if number in (5, 10, 17):
            x = F.max_pool2d(x, 2)
        dilation = 4 if number > 28 else 2 if number > 22 else 1
        x = F.conv2d(x, state[f"{number}.weight"], state[f"{number}.bias"], 1, dilation, dilation).relu()
    return x


@pytest.mark.parametrize("norms", ["batch", "frozen"])
@pytest.mark.parametrize("size", [(64, 96), (33, 65)])
def test_a_residual_network_is_the_dilated_resnet_and_a_sum_of_dilated_convolutions(norms, size):
    network = tiny(norms=norms).eval()
    images = torch.randn(2, 3, *size)
    state = {key: value.double() for key, value in network.state_dict().items()}
    own = {key.removeprefix(Fada.BACKBONE): value for key, value in state.items() if key.startswith(Fada.BACKBONE)}
    feature = resnet(own, images.double(), TINY.layers, 1e-5 if norms == "batch" else 0.0)
    scores = sum(
        F.conv2d(feature, state[f"classifier.conv2d_list.{n}.weight"], None, 1, dilation, dilation)
        + state[f"classifier.conv2d_list.{n}.bias"][:, None, None]
        for n, dilation in enumerate(TINY.dilations)
    )
    found = network(images)
    torch.testing.assert_close(found.feature.double(), feature, rtol=1e-4, atol=1e-5 * feature.max().item())
    torch.testing.assert_close(found.main.double(), scores, rtol=1e-4, atol=1e-5 * scores.abs().max().item())


def test_a_vgg_is_its_convolutions_and_the_same_classifier():
    network = tiny(backbone="vgg16").eval()
    images = torch.randn(2, 3, 40, 56)
    state = {key: value.double() for key, value in network.feature_extractor.backbone.state_dict().items()}
    feature = vgg(state, images.double())
    found = network(images)
    assert feature.std() > 0
    torch.testing.assert_close(found.feature.double(), feature, rtol=1e-4, atol=1e-5 * feature.max().item())
    scores = network.classifier.double()(feature)
    torch.testing.assert_close(found.main.double(), scores, rtol=1e-4, atol=1e-5 * scores.abs().max().item())


def test_a_frozen_norm_is_a_line_without_an_epsilon_in_value_and_gradient():
    rng = np.random.default_rng(0)
    norm = FrozenBatchNorm2d(5)
    weight, bias, mean = (rng.normal(size=5) for _ in range(3))
    variance = np.array([1.0, 0.3, 1e-6, 4.0, 2.0])  # an epsilon of 1e-5 would make the third a third as large
    values = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    norm.load_state_dict({name: torch.from_numpy(value).float() for name, value in values.items()})
    x, upstream = rng.normal(size=(2, 2, 5, 3, 4))
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    found = norm(given)
    scale = (weight / np.sqrt(variance))[:, None, None]
    expected = scale * (x - mean[:, None, None]) + bias[:, None, None]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-4)
    found.backward(torch.tensor(upstream, dtype=torch.float32))
    np.testing.assert_allclose(given.grad.numpy(), scale * upstream, rtol=1e-5)


def test_a_frozen_norm_learns_nothing_counts_nothing_and_keeps_the_type_of_its_maps():
    norm = FrozenBatchNorm2d(4).train()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert set(before) == {"weight", "bias", "running_mean", "running_var"}
    assert not list(norm.parameters())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(norm(x), x), "it begins as the identity"
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_frozen_norms_train_in_little_more_than_half_the_memory():
    with torch.device("meta"):
        images = torch.empty(1, 3, 256, 512)
        ordinary, frozen = (
            cost(Fada(replace(TINY, norms=norms)), images, lambda answer: [answer.main])
            for norms in ("batch", "frozen")
        )
    assert frozen.training_bytes < 0.6 * ordinary.training_bytes


def test_adabn_and_averages_leave_frozen_norms_as_they_are():
    network = tiny(norms="frozen")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    average = {key: value.clone() for key, value in before.items()}
    adapt_batch_norm(network, [torch.randn(2, 3, 40, 56)])
    ema_update(average, network, 0.9)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
        torch.testing.assert_close(average[key], before[key])


# The parts that the engine asks for.


@torch.no_grad()
@pytest.mark.parametrize("aspp", ["original", "modified"])
def test_trunk_and_classify_make_up_the_forward_pass(aspp):
    network = tiny(aspp=aspp).eval()
    images = torch.randn(2, 3, 64, 96)
    features, whole = network.trunk(images), network(images)
    assert [tuple(part.shape) for part in features] == [(2, network.config.bottleneck_channels, 8, 12)]
    assert torch.equal(network.classify(features).main, whole.main)
    torch.testing.assert_close(whole.feature, network.feature_extractor(images))
    assert torch.equal(features[0], whole.feature) == (aspp == "original")


@torch.no_grad()
def test_only_the_modified_classifier_drops_channels_and_only_behind_the_trunk():
    images = torch.randn(2, 3, 40, 56)
    modified = tiny(aspp="modified", dropout=0.5).train()
    features = modified.trunk(images)
    assert torch.equal(features[0], modified.trunk(images)[0])
    assert not torch.equal(modified.classify(features).main, modified.classify(features).main)
    original = tiny().train()
    features = original.trunk(images)
    assert torch.equal(original.classify(features).main, original.classify(features).main)


@torch.no_grad()
def test_monte_carlo_passes_of_the_modified_classifier_are_passes_with_those_channels_dropped():
    network = tiny(aspp="modified").eval()
    (head,) = network.heads()
    assert network.head_weights() == (1.0,)
    views = trunk_views(network, [torch.randn(2, 3, 40, 56)], mirror=False)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    masks = draw_masks(generators, views=1, passes=3, channels=16, rate=0.5, heads=1)
    ((factors,),) = masks
    expected = torch.stack(
        [head.head[1](views[0].features[0] * mask[..., None, None]).softmax(1) for mask in factors]
    ).mean(0)
    found = mean_probabilities(network, views, masks, (5, 7))
    torch.testing.assert_close(found, expected)


def test_the_original_classifier_has_no_heads():
    assert tiny().heads() == []
    assert tiny().head_weights() == ()


def test_outputs_are_class_scores_that_count_whole_and_features():
    outputs = FadaOutputs(torch.rand(1, 3, 2, 2), torch.rand(1, 16, 2, 2))
    ((weight, scores),) = outputs.heads()
    assert weight == 1.0
    assert scores is outputs.main is outputs.fused()
    assert outputs._fields == ("main", "feature")


@pytest.mark.parametrize(
    "changes", [{}, {"aspp": "modified", "dropout": 0.0}, {"norms": "frozen"}, {"backbone": "vgg16"}]
)
def test_a_loss_of_scores_trains_all_of_it_and_one_of_features_only_what_makes_them(changes):
    network = tiny(**changes)
    network(torch.randn(2, 3, 40, 56)).main.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    network.zero_grad()
    network(torch.randn(2, 3, 40, 56)).feature.square().mean().backward()
    assert all(parameter.grad is None for parameter in network.classifier.parameters())
    assert all(parameter.grad is not None for parameter in network.feature_extractor.parameters())


def test_the_original_classifier_starts_narrow():
    torch.manual_seed(0)
    network = tiny(width=32)
    for conv in network.classifier.conv2d_list:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert conv.bias.abs().max().item() <= (1 / (1024 * 9)) ** 0.5


def test_the_small_members_look_no_further_than_their_grid():
    for name in ("fada101", "fada101-modified", "fada-vgg16"):
        assert max(SMALL[name].dilations) < min(grid_size(128, 256))
    assert {PUBLISHED[name].pixels for name in ("fada101", "fada101-modified")} == {"rgb_imagenet"}
    assert PUBLISHED["fada-vgg16"].pixels == SMALL["fada-vgg16"].pixels == "bgr_vgg"


# What learns.


def groups_of(network, *, train_norm_affine=True, duplicates="published"):
    groups = network.parameter_groups(
        lr=2.5e-4, head_multiplier=10.0, duplicates=duplicates, train_norm_affine=train_norm_affine
    )
    return {group["name"]: group for group in groups}


def test_the_classifier_learns_ten_times_as_fast_and_nothing_is_listed_twice():
    network = tiny()
    for duplicates in ("published", "once"):
        groups = groups_of(network, duplicates=duplicates)
        assert {name: group["lr_scale"] for name, group in groups.items()} == {"backbone": 1.0, "classifier": 10.0}
        assert groups["backbone"]["lr"] == pytest.approx(2.5e-4)
        assert groups["classifier"]["lr"] == pytest.approx(2.5e-3)
        listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
        assert sorted(listed) == sorted(id(parameter) for parameter in network.parameters())


@pytest.mark.parametrize("aspp", ["original", "modified"])
def test_what_another_stage_froze_learns_again_but_for_norms_that_shall_not(aspp):
    network = tiny(aspp=aspp).requires_grad_(False)
    groups = groups_of(network, train_norm_affine=False)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    backbone = {f"feature_extractor.{name}" for name, _ in network.feature_extractor.named_parameters()}
    assert frozen == {name for name in backbone if ".bn" in name or ".downsample.1." in name}
    listed = {id(parameter) for group in groups.values() for parameter in group["params"]}
    assert listed == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    groups_of(network, train_norm_affine=True)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_refinement_trains_classifiers_and_nothing_before_them():
    small = DeepLabConfig.small(3)
    proda = Build(replace(small, heads="proda"))()
    deeplab, bisenet = DeepLab(small), BiSeNet(BiSeNetConfig(3, (1, 1, 1, 1), width=4, spatial_width=4))
    fada, modified = tiny(), tiny(aspp="modified")
    expected = {
        deeplab: {"layer5.head.1.weight", "layer6.head.1.weight"},
        proda: {"layer5.head.1.weight"},
        bisenet: {"conv.weight", "conv.bias"},
        fada: {name for name, _ in fada.named_parameters() if name.startswith("classifier.")},
        modified: {name for name, _ in modified.named_parameters() if name.startswith("classifier.")},
    }
    for network, names in expected.items():
        wanted = {id(parameter) for parameter in network.classifier_parameters()}
        assert {name for name, parameter in network.named_parameters() if id(parameter) in wanted} == names
        assert len(wanted) == len(names)


# Descriptions.


def test_a_description_builds_the_network_that_it_describes():
    assert type(Build(TINY)()) is Fada
    assert pickle.loads(pickle.dumps(Build(TINY))) == Build(TINY) != Build(replace(TINY, norms="frozen"))
    assert FadaConfig().bottleneck_channels == FadaConfig().feature_channels == 2048
    assert FadaConfig.vgg16().bottleneck_channels == 1024
    assert FadaConfig(aspp="modified").bottleneck_channels == 256
    assert FadaConfig().smallest_batch == 1


def test_one_image_trains_even_ordinary_batch_norms():
    network = tiny().train()
    assert network(torch.randn(1, 3, 32, 32)).main.isfinite().all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"layers": (1, 1, 1)}, "four stages"),
        ({"width": 0}, "width is 0"),
        ({"dilations": ()}, "dilations is empty"),
        ({"backbone": "vgg19"}, "backbone is 'vgg19'; choose resnet or vgg16"),
        ({"norms": "group"}, "norms is 'group'; choose frozen or batch"),
        ({"aspp": "pp"}, "aspp is 'pp'; choose original or modified"),
        ({"heads": "mrnet"}, "no FADA network"),
        ({"aspp": "modified", "branch_channels": 100}, "32 groups do not divide"),
        ({"aspp": "modified", "dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_what_cannot_be_built_is_said(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(FadaConfig(), **change)


def test_images_of_another_shape_are_refused():
    for use in (tiny().trunk, tiny()):
        with pytest.raises(ValueError, match="reads"):
            use(torch.zeros(2, 1, 40, 40))
