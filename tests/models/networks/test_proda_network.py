"""ProDA's network (methods 2.5), and how one is built from its description."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models.networks.backbone import grid_size
from models.networks.build import Build
from models.networks.deeplab import DeepLab, DeepLabConfig, parameter_groups
from models.networks.proda import Proda, ProdaOutputs
from models.networks.statistics import adapt_batch_norm, ema_update

PUBLISHED = DeepLabConfig(heads="proda", bottleneck_channels=256, pixels="rgb_unit", conv_std=0.01)
TINY = DeepLabConfig(
    3, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=16, groups=4, dilations=(1, 2), heads="proda"
)


def meta(config):
    with torch.device("meta"):
        return Build(config)()


def tiny(seed=0, **changes):
    """A network none of whose parts is neutral."""
    torch.manual_seed(seed)
    network = Proda(replace(TINY, **changes))
    nn.init.normal_(network.layer5.classifier.weight)
    for norm in network.norms():
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight, 1.0)
        nn.init.normal_(norm.bias)
    return network


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def proda_keys():
    """Key -> shape of the published layouts."""
    return json.loads((Path(__file__).parents[2] / "golden" / "proda_keys.json").read_text())


# The published network.


def test_parameter_counts_are_the_published_ones():
    assert count(meta(PUBLISHED)) == 65_063_568
    assert count(meta(replace(PUBLISHED, num_classes=16))) == 65_062_800
    assert count(meta(replace(PUBLISHED, extra_norm=True))) == 65_063_568 + 4_096


@pytest.mark.parametrize(("layout", "extra_norm"), [("proda", False), ("proda_bn_clr", True)])
def test_keys_and_shapes_are_those_of_the_published_checkpoints_and_prototypes_beside_them(
    proda_keys, layout, extra_norm
):
    state = meta(replace(PUBLISHED, extra_norm=extra_norm)).state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    assert shapes.pop("prototypes") == [19, 256]
    assert shapes == proda_keys[layout]


def test_convolutions_start_narrow_where_the_description_says_so_and_norms_neutral():
    """The published loop: every convolution, the head's too, and every batch norm."""
    torch.manual_seed(0)
    network = Build(replace(TINY, branch_channels=64, bottleneck_channels=64, extra_norm=True, conv_std=0.01))()
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    large = [weight for weight in weights if weight.numel() > 5_000]
    assert any(weight is network.layer5.bottleneck[1].weight for weight in large)
    for weight in large:
        assert weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert weight.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert max(weight.abs().max().item() for weight in weights) < 0.06
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_without_a_word_every_convolution_starts_by_its_own_rule():
    torch.manual_seed(0)
    built = Build(TINY)()
    torch.manual_seed(0)
    plain = Proda(TINY)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor)
    assert built.layer5.classifier.weight.std().item() < 0.002


# What it answers.


@torch.no_grad()
def test_scores_are_the_classifier_of_the_feature_and_the_feature_is_the_map_after_dropout():
    network = tiny(dropout=0.4).train()
    images = torch.randn(3, 3, 64, 96)
    torch.manual_seed(7)
    found = network(images)
    assert found._fields == ("main", "feature")
    assert found.feature.shape == (3, 16, *grid_size(64, 96))
    weight = network.layer5.head[1].weight.double()[:, :, 0, 0]
    expected = torch.einsum("ck,nkhw->nchw", weight, found.feature.double())
    torch.testing.assert_close(found.main.double(), expected, atol=1e-5, rtol=1e-5)
    dropped = (found.feature == 0).all(3).all(2)
    assert 0.2 < dropped.float().mean() < 0.6
    # What was not dropped is the head's map, scaled; the norms see the same batch again.
    (before,) = network.trunk(images)
    assert (before != 0).any(3).any(2).all()
    torch.testing.assert_close(found.feature[~dropped], before[~dropped] / 0.6)


@torch.no_grad()
def test_in_evaluation_mode_nothing_is_dropped():
    network = tiny().eval()
    images = torch.randn(2, 3, 64, 96)
    (before,) = network.trunk(images)
    found = network(images)
    assert torch.equal(found.feature, before)
    assert torch.equal(network.classify((before,)).main, found.main)


@torch.no_grad()
@pytest.mark.parametrize("extra_norm", [False, True])
def test_the_head_reads_stage_four_behind_the_extra_norm(extra_norm):
    """The norm computed by its definition, in float64."""
    network = tiny(extra_norm=extra_norm).eval()
    images = torch.randn(2, 3, 64, 96)
    seen = network.features(images).layer4.double()
    if extra_norm:
        norm = network.bn_pretrain
        mean, scale = norm.running_mean.double(), norm.weight.double() / (norm.running_var.double() + 1e-5).sqrt()
        seen = (seen - mean[:, None, None]) * scale[:, None, None] + norm.bias.double()[:, None, None]
    expected = network.layer5.double()(seen)
    network.float()
    torch.testing.assert_close(network(images).main.double(), expected, atol=1e-4, rtol=1e-4)


def test_it_has_one_head_that_counts_whole():
    outputs = ProdaOutputs(torch.rand(1, 3, 2, 2), torch.rand(1, 16, 2, 2))
    ((weight, scores),) = outputs.heads()
    assert weight == 1.0
    assert scores is outputs.main is outputs.fused()
    network = tiny()
    assert network.heads() == [network.layer5]
    assert network.head_weights() == (1.0,)


def test_a_loss_of_scores_and_features_trains_all_of_it():
    network = tiny(extra_norm=True)
    found = network(torch.randn(2, 3, 40, 56))
    (found.main.square().mean() + found.feature.square().mean()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# Prototypes.


def test_prototypes_begin_as_zeros_do_not_learn_and_travel_with_the_weights():
    network, other = tiny(), tiny(1)
    assert not network.prototypes.any()
    assert network.prototypes.shape == (3, 16)
    assert "prototypes" not in dict(network.named_parameters())
    with torch.no_grad():
        network.prototypes.normal_()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.prototypes, network.prototypes)
    assert other.prototypes is not network.prototypes


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_an_average_takes_prototypes_like_other_buffers(buffers):
    network, other = tiny(), tiny(1)
    with torch.no_grad():
        network.prototypes.fill_(4.0)
    average = other.state_dict()
    ema_update(average, network, 0.75, buffers=buffers)
    assert (other.prototypes == (4.0 if buffers == "copy" else 1.0)).all()


def test_adabn_leaves_prototypes_and_adapts_the_extra_norm():
    network = tiny(extra_norm=True).eval()
    with torch.no_grad():
        network.prototypes.normal_()
    prototypes, mean = network.prototypes.clone(), network.bn_pretrain.running_mean.clone()
    adapt_batch_norm(network, [torch.randn(2, 3, 40, 56)])
    assert torch.equal(network.prototypes, prototypes)
    assert (network.bn_pretrain.running_mean != mean).any()


# Optimiser groups (methods 2.6).


def groups_of(network, **options):
    return {group["name"]: group for group in parameter_groups(network, lr=6e-4, **options)}


def test_the_published_rates_are_three_four_and_ten_and_the_extra_norm_learns_with_the_head():
    network = meta(replace(PUBLISHED, extra_norm=True))
    groups = groups_of(network, train_norm_affine=True)
    assert {name: group["lr_scale"] for name, group in groups.items()} == {
        "stem": 1.0,
        "blocks": 3.0,
        "shortcuts": 4.0,
        "heads": 10.0,
    }
    assert [len(groups[name]["params"]) for name in ("stem", "blocks", "shortcuts")] == [3, 297, 12]
    heads = {id(parameter) for parameter in groups["heads"]["params"]}
    own = [*network.layer5.parameters(), network.bn_pretrain.weight, network.bn_pretrain.bias]
    assert heads == {id(parameter) for parameter in own}
    assert groups["heads"]["lr"] == pytest.approx(6e-3)


@pytest.mark.parametrize("extra_norm", [False, True])
@pytest.mark.parametrize("train_norm_affine", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(extra_norm, train_norm_affine):
    network = tiny(extra_norm=extra_norm)
    groups = parameter_groups(network, lr=1.0, train_norm_affine=train_norm_affine)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert network.bn1.weight.requires_grad == train_norm_affine
    if extra_norm:
        assert network.bn_pretrain.weight.requires_grad, "it is no norm of the backbone"


# Descriptions.


def test_a_description_builds_the_network_that_it_describes():
    two = replace(TINY, heads="mrnet")
    assert type(Build(TINY)()) is Proda
    assert type(Build(two)()) is DeepLab
    assert Build(replace(TINY, extra_norm=True))().bn_pretrain is not None
    assert Build(TINY)().bn_pretrain is None
    assert pickle.loads(pickle.dumps(Build(TINY))) == Build(TINY) != Build(two)


def test_only_a_network_of_proda_has_the_extra_norm():
    with pytest.raises(ValueError, match="extra_norm belongs to a network with one head on stage four"):
        Build(replace(TINY, heads="mrnet", extra_norm=True))()


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="reads"):
        tiny()(torch.zeros(2, 1, 40, 40))


def test_outputs_stand_on_the_backbones_grid():
    """896x512 gives 113x65 (methods 2.5)."""
    with torch.device("meta"):
        network = Proda(TINY).eval()
    found = network(torch.empty((1, 3, 512, 896), device="meta"))
    assert found.main.shape == (1, 3, 65, 113)
    assert found.feature.shape == (1, 16, 65, 113)
