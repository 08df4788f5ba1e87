import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.networks.backbone import CaffeResNet, grid_size
from models.networks.deeplab import (
    DeepLab,
    DeepLabConfig,
    DilatedConv2d,
    HeadFeatures,
    Logits,
    parameter_groups,
    upsample_logits,
)
from models.networks.segmenter import upsample
from models.networks.statistics import adapt_batch_norm, ema_update, norm_statistics


def meta(config: DeepLabConfig) -> DeepLab:
    with torch.device("meta"):
        return DeepLab(config)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(**changes) -> DeepLab:
    config = DeepLabConfig(
        num_classes=3, layers=(1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4
    )
    return DeepLab(replace(config, **changes))


# The published network.


def test_the_outputs_equal_the_reference(resnet101, golden, golden_input):
    with torch.no_grad():
        logits = resnet101(golden_input("mrnet_gn_se", (1, 3, 64, 128)))
    for name, value in logits._asdict().items():
        expected = golden[f"mrnet_gn_se_{name}"]
        assert value.shape == expected.shape
        assert np.abs(value.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("layout", "config"),
    [("mrnet_gn_se", DeepLabConfig()), ("mrnet_bn", DeepLabConfig(norm="bn", use_se=False))],
)
def test_state_dict_keys_and_shapes_are_those_of_the_published_checkpoints(layout, config, golden_keys):
    state = meta(config).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == golden_keys[layout]


def test_parameter_counts_are_the_published_ones():
    network = meta(DeepLabConfig())
    assert count(network.layer5) == 15_818_832
    assert count(network.layer6) == 35_217_488
    assert count(network) == 93_536_480
    assert count(meta(DeepLabConfig(num_classes=9))) == 93_526_240
    with torch.device("meta"):
        assert count(CaffeResNet((3, 4, 23, 3), 64)) == 42_500_160


GRIDS = [
    ((2048, 1024), (257, 129)),
    ((1280, 960), (161, 121)),
    ((1280, 720), (161, 91)),
    ((1280, 640), (161, 81)),
    ((1024, 512), (129, 65)),
    ((896, 512), (113, 65)),
    ((512, 256), (65, 33)),
]


@pytest.mark.parametrize(("size", "grid"), GRIDS)
def test_output_grids_are_the_measured_ones(size, grid):
    images = torch.empty((1, 3, size[1], size[0]), device="meta")
    maps = meta(DeepLabConfig.small()).eval().features(images)
    assert maps.layer3.shape[2:] == maps.layer4.shape[2:] == (grid[1], grid[0])
    assert grid_size(size[1], size[0]) == (grid[1], grid[0])


@pytest.mark.parametrize("side", range(1, 70))
def test_the_grid_formula_agrees_with_the_network_on_every_side(side):
    with torch.device("meta"):
        network = CaffeResNet((1, 1, 1, 1), 4).eval()
    assert network(torch.empty((1, 3, side, 96), device="meta")).layer4.shape[2:] == grid_size(side, 96)


def test_the_stride_sits_on_the_first_convolution_and_the_last_stages_dilate():
    network = meta(DeepLabConfig())
    assert network.layer2[0].conv1.stride == (2, 2)
    assert network.layer2[0].conv2.stride == (1, 1)
    assert network.layer3[0].conv1.stride == (1, 1)
    assert {block.conv2.dilation for block in network.layer3} == {(2, 2)}
    assert {block.conv2.dilation for block in network.layer4} == {(4, 4)}
    assert network.maxpool.ceil_mode


def test_heads_start_as_published():
    torch.manual_seed(0)
    config = DeepLabConfig(layers=(1, 1, 1, 1), width=4)
    head = DeepLab(config).layer5
    gate, conv, _ = head.bottleneck
    assert conv.weight.std().item() == pytest.approx((2 / (1280 * 9)) ** 0.5, rel=0.02)
    assert not conv.bias.any()
    assert head.classifier.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert head.classifier.bias is None
    branch = head.conv2d_list[1][0]
    bound = (1 / (64 * 9)) ** 0.5  # the framework's default: uniform within 1 / sqrt(fan in)
    assert 0.95 * bound < branch.weight.abs().max().item() <= bound
    assert 0.9 * bound < branch.bias.abs().max().item() <= bound
    assert gate.se[0].weight.abs().max().item() <= 1280**-0.5


@pytest.mark.parametrize("norm", ["gn", "bn", "instance", "layer"])
@pytest.mark.parametrize("use_se", [True, False])
def test_every_norm_and_gate_option_trains(norm, use_se):
    network = tiny(norm=norm, use_se=use_se)
    logits = network(torch.randn(2, 3, 40, 56))
    (logits.aux.square().mean() + logits.main.square().mean()).backward()
    assert logits.aux.shape == logits.main.shape == (2, 3, *grid_size(40, 56))
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


# The family.


def test_trunk_and_classify_make_up_the_forward_pass(small):
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = small.trunk(images)
        split, whole = small.classify(features), small(images)
    assert features.aux.shape == features.main.shape == (2, 64, *grid_size(64, 96))
    assert torch.equal(split.aux, whole.aux)
    assert torch.equal(split.main, whole.main)


def test_only_what_lies_behind_the_trunk_is_stochastic(small):
    small.train()
    features = HeadFeatures(torch.randn(2, 64, 5, 7), torch.randn(2, 64, 5, 7))
    assert not torch.equal(small.classify(features).main, small.classify(features).main)
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(small.trunk(images).main, small.trunk(images).main)


def test_dropout_takes_whole_maps(small):
    small.train()
    dropped = small.layer6.head[0](torch.ones(4, 64, 5, 7))
    assert torch.equal(dropped, dropped[:, :, :1, :1].expand_as(dropped))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.9])


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (5, 7), (40, 40)])
def test_skipping_taps_that_see_only_padding_changes_nothing(shape):
    torch.manual_seed(0)
    conv = DilatedConv2d(3, 4, dilation=8)
    plain = nn.Conv2d(3, 4, 3, padding=8, dilation=8)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, *shape)
    ours, theirs = conv(x), plain(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)
    torch.testing.assert_close(conv.bias.grad, plain.bias.grad)


def test_the_small_member_keeps_its_dilations_inside_its_grid():
    config = DeepLabConfig.small(16)
    assert config.num_classes == 16
    assert max(config.dilations) < min(grid_size(128, 256))


def test_fused_is_half_the_auxiliary_plus_the_primary():
    logits = Logits(torch.full((1, 2, 1, 1), 4.0), torch.full((1, 2, 1, 1), 1.0))
    assert logits.fused().unique().tolist() == [3.0]


def test_upsampling_keeps_the_corners():
    maps = torch.arange(6.0).view(1, 1, 2, 3)
    up = upsample(maps, (5, 9))
    assert up[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0.0, 2.0, 3.0, 5.0]
    assert up[0, 0, 0].tolist() == pytest.approx(np.linspace(0, 2, 9).tolist())
    both = upsample_logits(Logits(maps, maps + 1), (5, 9))
    assert torch.equal(both.aux, up)
    assert both.main.shape == (1, 1, 5, 9)


@pytest.mark.parametrize("grid", [(5, 9), (1, 4), (7, 1)])
@pytest.mark.parametrize("size", [(17, 33), (1, 20), (5, 9), (3, 4)])
def test_upsampling_for_training_gives_torchs_values_and_gradients(grid, size):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *grid, dtype=torch.float64)
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    up = upsample(ours, size)
    reference = nn.functional.interpolate(theirs, size=size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(up, reference)
    torch.testing.assert_close(upsample(maps, size), reference)
    (up * weight).sum().backward()
    (reference * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# Optimiser groups (Q-SH-1).


def groups_of(network, **options):
    return {group["name"]: group for group in parameter_groups(network, lr=2e-4, **options)}


def test_published_multipliers_are_one_three_four_and_ten():
    groups = groups_of(meta(DeepLabConfig()), train_norm_affine=True)
    assert {name: group["lr_scale"] for name, group in groups.items()} == {
        "stem": 1.0,
        "blocks": 3.0,
        "shortcuts": 4.0,
        "heads": 10.0,
    }
    assert groups["blocks"]["lr"] == pytest.approx(6e-4)
    assert groups["heads"]["lr"] == pytest.approx(2e-3)


def test_the_published_multiplicities_cover_297_and_12_tensors():
    groups = groups_of(meta(DeepLabConfig()), train_norm_affine=True)
    assert len(groups["stem"]["params"]) == 3
    assert len(groups["blocks"]["params"]) == 297
    assert len(groups["shortcuts"]["params"]) == 12


def test_once_gives_the_backbone_one_rate():
    groups = groups_of(tiny(), duplicates="once", head_multiplier=5)
    assert [group["lr_scale"] for group in groups.values()] == [1.0, 1.0, 1.0, 5.0]


@pytest.mark.parametrize("train_norm_affine", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(train_norm_affine):
    network = tiny(norm="bn")
    groups = parameter_groups(network, lr=1.0, train_norm_affine=train_norm_affine)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(listed) == sorted(trainable)


def test_stage_one_freezes_the_affine_of_the_backbone_norms_and_stage_two_trains_it():
    network = tiny(norm="bn")
    parameter_groups(network, lr=1.0, train_norm_affine=False)
    assert not network.bn1.weight.requires_grad
    assert not network.layer1[0].downsample[1].bias.requires_grad
    assert network.layer5.conv2d_list[0][1].weight.requires_grad, "the heads' own norms always learn"
    assert network.conv1.weight.requires_grad
    parameter_groups(network, lr=1.0, train_norm_affine=True)
    assert network.bn1.weight.requires_grad


def sub_steps(calls: int, multiplicity: int, lr: float = 1.0, momentum: float = 0.9):
    """What the published optimiser did to a tensor listed several times, with a constant gradient of one.

    The buffers are collected before the loop, so in the first call every listing starts one of its own.
    """
    value = buffer = 0.0
    seen = []
    for call in range(calls):
        for _ in range(multiplicity):
            buffer = momentum * buffer + 1.0 if call else 1.0
            value -= lr * buffer
        seen.append((value, buffer))
    return seen


def test_looped_sub_steps_reproduce_the_measured_values():
    values, buffers = zip(*sub_steps(3, 3), strict=True)
    assert values == pytest.approx((-3, -11.049, -25.0467), abs=1e-4)
    assert buffers == pytest.approx((1, 3.4390, 5.2170), abs=1e-4)


def test_the_first_sub_steps_move_as_one_step_at_three_times_the_rate():
    assert sub_steps(1, 3)[0][0] == sub_steps(1, 1, lr=3.0)[0][0] == -3.0


def test_the_multiplier_equals_the_sub_steps_in_the_steady_state():
    # With momentum 0.9 both end up moving 3 * lr / (1 - 0.9) a call; the multiplier is the steady state.
    looped = sub_steps(200, 3)
    multiplied = sub_steps(200, 1, lr=3.0)
    assert looped[-1][0] - looped[-2][0] == pytest.approx(-30.0)
    assert multiplied[-1][0] - multiplied[-2][0] == pytest.approx(-30.0)


# Normalisation statistics, averages.


def test_statistics_are_written_only_when_asked():
    network = tiny().train()
    before = copy.deepcopy(network.state_dict())
    with norm_statistics(network, update=False):
        network(torch.randn(2, 3, 40, 40))
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with norm_statistics(network, update=True):
        network(torch.randn(2, 3, 40, 40))
    assert not torch.equal(before["bn1.running_mean"], network.bn1.running_mean)
    assert network.bn1.num_batches_tracked.item() == 1


def test_a_training_batch_is_normalised_by_its_own_statistics_either_way():
    network = tiny(dropout=0.0).train()
    images = torch.randn(2, 3, 40, 40)
    with norm_statistics(network, update=False):
        frozen = network(images)
    assert torch.equal(frozen.main, network(images).main)


def test_in_evaluation_mode_the_switch_changes_nothing():
    network = tiny().eval()
    images = torch.randn(2, 3, 40, 40)
    with norm_statistics(network, update=False):
        inside = network(images)
    assert torch.equal(inside.main, network(images).main)


def test_the_switch_is_restored_after_an_error():
    network = tiny()
    with pytest.raises(RuntimeError), norm_statistics(network, update=False):
        raise RuntimeError
    assert network.bn1.track_running_stats


def test_the_average_moves_weights_and_statistics_and_copies_counters():
    network = tiny().train()
    average = copy.deepcopy(network.state_dict())
    start = copy.deepcopy(average)
    network(torch.randn(2, 3, 40, 40))
    with torch.no_grad():
        network.conv1.weight.add_(1.0)
    ema_update(average, network, 0.75)
    now = network.state_dict()
    for key in ("conv1.weight", "bn1.running_mean"):
        torch.testing.assert_close(average[key], 0.75 * start[key] + 0.25 * now[key])
    assert average["bn1.num_batches_tracked"].item() == 1


def test_statistics_can_be_copied_instead():
    network = tiny().train()
    average = copy.deepcopy(network.state_dict())
    network(torch.randn(2, 3, 40, 40))
    ema_update(average, network, 0.99, buffers="copy")
    assert torch.equal(average["bn1.running_var"], network.bn1.running_var)


def test_an_average_of_another_network_is_refused():
    with pytest.raises(ValueError, match="different entries"):
        ema_update(tiny(norm="bn").state_dict(), tiny(), 0.9)
    with pytest.raises(ValueError, match="decay"):
        ema_update(tiny().state_dict(), tiny(), 1.5)


def test_adabn_takes_the_cumulative_average_of_the_batch_statistics():
    network = tiny().eval()
    batches = [torch.randn(2, 3, 40, 40) * (1 + k) + k for k in range(3)]
    means = [network.conv1(batch).mean(dim=(0, 2, 3)) for batch in batches]
    variances = [network.conv1(batch).transpose(0, 1).flatten(1).var(dim=1) for batch in batches]
    weights = {name: value.clone() for name, value in network.named_parameters()}
    assert adapt_batch_norm(network, iter(batches)) == 3
    torch.testing.assert_close(network.bn1.running_mean, torch.stack(means).mean(dim=0))
    torch.testing.assert_close(network.bn1.running_var, torch.stack(variances).mean(dim=0))
    assert all(torch.equal(weights[name], value) for name, value in network.named_parameters())
    assert network.bn1.momentum == 0.1


def test_adabn_keeps_every_mode_and_uses_no_dropout():
    network = tiny().train()
    network.layer5.eval()
    state = torch.get_rng_state()
    adapt_batch_norm(network, [torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(torch.get_rng_state(), state), "nothing random was drawn"
    assert network.training
    assert network.bn1.training
    assert not network.layer5.training


def test_adabn_without_images_is_refused_and_changes_nothing():
    network = tiny()
    network.bn1.running_mean.fill_(3.0)
    with pytest.raises(ValueError, match="no batches"):
        adapt_batch_norm(network, [])
    assert network.bn1.running_mean.unique().tolist() == [3.0]


# Bad input.


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"norm": "batch"}, "choose one of gn, bn"),
        ({"num_classes": 1}, "at least 2"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"branch_channels": 100}, "32 groups do not divide"),
        ({"layers": (3, 4, 23)}, "four stages"),
    ],
)
def test_an_impossible_configuration_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        DeepLabConfig(**fields)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="reads"):
        tiny()(torch.zeros(2, 1, 40, 40))


def test_an_unknown_duplicate_rule_is_refused():
    with pytest.raises(ValueError, match="published"):
        parameter_groups(tiny(), lr=1.0, duplicates="twice")
