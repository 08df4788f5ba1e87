import pytest
import torch

from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.layouts import is_whole_network, load, strip_parallel


def tiny(num_classes=3):
    return DeepLab(
        DeepLabConfig(num_classes, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4)
    )


def test_a_checkpoint_of_several_devices_loads_like_one_of_one():
    ours, theirs = tiny(), tiny()
    load(ours, {f"module.{key}": value for key, value in theirs.state_dict().items()})
    assert torch.equal(ours.layer6.classifier.weight, theirs.layer6.classifier.weight)


def test_a_prefix_that_only_some_keys_carry_is_left_alone():
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_parallel(state) == state


def test_the_pretrained_init_fills_the_backbone_only():
    ours, theirs = tiny(), tiny()
    head = ours.layer5.classifier.weight.clone()
    state = {
        f"Scale.{key}": value
        for key, value in theirs.state_dict().items()
        if not key.startswith("layer6") and not key.endswith("num_batches_tracked")
    }
    state["Scale.layer5.conv2d_list.3.weight"] = torch.zeros(21, 2048, 3, 3)
    loaded = load(ours, state)
    assert torch.equal(ours.layer4[0].conv2.weight, theirs.layer4[0].conv2.weight)
    assert torch.equal(ours.layer5.classifier.weight, head)
    assert loaded == sum(not key.startswith("Scale.layer5") for key in state)


def test_an_imagenet_file_without_a_prefix_fits_too():
    ours, theirs = tiny(), tiny()
    state = {key: value for key, value in theirs.state_dict().items() if key.split(".")[0] not in ("layer5", "layer6")}
    load(ours, state | {"fc.weight": torch.zeros(1000, 2048)})
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


def test_both_heads_make_a_whole_network_and_the_init_with_its_one_head_is_none():
    whole = tiny().state_dict()
    assert is_whole_network(whole)
    assert is_whole_network({f"module.{key}": value for key, value in whole.items()})
    assert not is_whole_network({f"Scale.{key}": value for key, value in whole.items() if "layer6" not in key})


def test_another_networks_checkpoint_is_refused_before_anything_is_loaded():
    network, other = tiny(), tiny(num_classes=4).state_dict()
    before = network.conv1.weight.clone()
    with pytest.raises(
        ValueError, match=r"2 of another shape \(layer5\.head\.1\.weight is \(4, 8, 1, 1\), needed is \(3,"
    ):
        load(network, other)
    other["head.more"] = other.pop("layer6.bottleneck.1.weight")
    with pytest.raises(ValueError, match=r"1 missing \(layer6.*1 unexpected \(head\.more\); 2 of another shape"):
        load(network, other)
    assert torch.equal(network.conv1.weight, before)


def test_a_file_of_something_else_names_the_first_few_of_many():
    with pytest.raises(ValueError, match=r"missing \(conv1\.weight, bn1\.weight, bn1\.bias and others\); 1 unexpected"):
        load(tiny(), {"encoder.weight": torch.zeros(1)})


def test_a_backbone_of_another_width_is_refused():
    small = {k: v for k, v in DeepLab(DeepLabConfig.small()).state_dict().items() if "layer6" not in k}
    with pytest.raises(
        ValueError, match=r"does not fit this backbone: .*of another shape \(conv1\.weight is \(12, 3, 7, 7\)"
    ):
        load(tiny(), small)
    with pytest.raises(ValueError, match="missing"):
        load(tiny(), {"Scale.conv1.weight": torch.zeros(4, 3, 7, 7)})
