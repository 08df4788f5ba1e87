import pytest
import torch

from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.layouts import load_backbone_init, load_exact, strip_parallel


def tiny(num_classes=3):
    return DeepLab(
        DeepLabConfig(num_classes, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4)
    )


def test_a_checkpoint_of_several_devices_loads_like_one_of_one():
    ours, theirs = tiny(), tiny()
    load_exact(ours, {f"module.{key}": value for key, value in theirs.state_dict().items()})
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
    loaded = load_backbone_init(ours, state)
    assert torch.equal(ours.layer4[0].conv2.weight, theirs.layer4[0].conv2.weight)
    assert torch.equal(ours.layer5.classifier.weight, head)
    assert loaded == sum(not key.startswith("Scale.layer5") for key in state)


def test_an_imagenet_file_without_a_prefix_fits_too():
    ours, theirs = tiny(), tiny()
    state = {key: value for key, value in theirs.state_dict().items() if key.split(".")[0] not in ("layer5", "layer6")}
    load_backbone_init(ours, state | {"fc.weight": torch.zeros(1000, 2048)})
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


def test_another_networks_checkpoint_is_refused_before_anything_is_loaded():
    network = tiny()
    before = network.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"layer5.head.1.weight.*instead of.*1 more"):
        load_exact(network, tiny(num_classes=4).state_dict())
    with pytest.raises(ValueError, match=r"it has no 'conv1\.weight'"):
        load_exact(network, {"encoder.weight": torch.zeros(1)})
    assert torch.equal(network.conv1.weight, before)


def test_a_backbone_of_another_width_is_refused():
    with pytest.raises(ValueError, match="does not fit this backbone"):
        load_backbone_init(tiny(), DeepLab(DeepLabConfig.small()).state_dict())
    with pytest.raises(ValueError, match="has no"):
        load_backbone_init(tiny(), {"Scale.conv1.weight": torch.zeros(4, 3, 7, 7)})
