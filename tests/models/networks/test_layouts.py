from dataclasses import replace

import pytest
import torch

from models.networks.bisenet import BiSeNet, BiSeNetConfig
from models.networks.build import Build, named_config
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.fada import Fada, FadaConfig
from models.networks.layouts import (
    backbone_part,
    described,
    is_whole_network,
    load,
    strip_parallel,
    with_published_copies,
)

COUNTER = "num_batches_tracked"
BACKBONE = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


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


def test_a_head_makes_a_whole_network_and_the_init_with_a_part_of_one_is_none():
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
    small = {k: v for k, v in DeepLab(DeepLabConfig.small()).state_dict().items() if k.startswith(BACKBONE)}
    with pytest.raises(
        ValueError, match=r"does not fit this backbone: .*of another shape \(conv1\.weight is \(12, 3, 7, 7\)"
    ):
        load(tiny(), small)
    with pytest.raises(ValueError, match="missing"):
        load(tiny(), {"Scale.conv1.weight": torch.zeros(4, 3, 7, 7)})


# ProDA's files.

PRODA = DeepLabConfig(
    3, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4, heads="proda", pixels="rgb_unit"
)


def proda(seed=0, **changes):
    """A network whose prototypes are not those of a fresh one."""
    torch.manual_seed(seed)
    network = Build(replace(PRODA, **changes))()
    with torch.no_grad():
        network.prototypes.normal_()
    return network


def published(network):
    """A file keeps prototypes elsewhere or nowhere."""
    return {key: value for key, value in network.state_dict().items() if key != "prototypes"}


def unlike(one, other):
    """Names of the tensors in which two networks of one kind differ."""
    theirs = other.state_dict()
    return {key for key, value in one.state_dict().items() if not torch.equal(value, theirs[key])}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "given",
    [{"num_classes": 5}, {"extra_norm": True}, {"heads": "mrnet"}, {"heads": "mrnet", "num_classes": 4}],
)
def test_a_file_tells_heads_classes_and_extra_norm_of_its_network(given, prefix):
    asked = replace(PRODA, num_classes=9, dropout=0.4)
    state = {f"{prefix}{key}": value for key, value in Build(replace(PRODA, **given))().state_dict().items()}
    expected = replace(asked, **{"num_classes": 3, "extra_norm": False, **given})
    assert described(state, asked) == expected
    load(Build(expected)(), state)


def test_what_a_file_tells_comes_before_what_was_asked_for():
    asked = replace(PRODA, extra_norm=True)
    assert described(proda().state_dict(), asked) == PRODA
    assert described(tiny().state_dict(), asked) == replace(PRODA, heads="mrnet")


def test_a_file_without_a_head_tells_nothing():
    backbone = {f"Scale.{key}": value for key, value in proda().state_dict().items() if key.startswith(BACKBONE)}
    for state in (backbone, {**backbone, "Scale.layer5.conv2d_list.3.weight": torch.zeros(21, 2048, 3, 3)}, {}):
        assert described(state, PRODA) is PRODA


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("extra_norm", [False, True])
def test_prototypes_may_be_absent_and_stay_as_they_were(extra_norm, prefix):
    ours, theirs = proda(1, extra_norm=extra_norm), proda(2, extra_norm=extra_norm)
    state = {f"{prefix}{key}": value for key, value in published(theirs).items()}
    assert is_whole_network(state)
    assert load(ours, state) == len(ours.state_dict()) - 1
    assert unlike(ours, theirs) == {"prototypes"}
    assert unlike(ours, proda(1, extra_norm=extra_norm)) >= {"conv1.weight", "layer5.head.1.weight"}
    assert torch.equal(ours.prototypes, proda(1, extra_norm=extra_norm).prototypes)


def test_prototypes_that_are_there_are_loaded_and_must_fit():
    ours, theirs = proda(1), proda(2)
    load(ours, theirs.state_dict())
    assert not unlike(ours, theirs)
    with pytest.raises(ValueError, match=r"1 of another shape \(prototypes is \(19, 8\), needed is \(3, 8\)\)"):
        load(ours, {**published(theirs), "prototypes": torch.zeros(19, 8)})
    with pytest.raises(ValueError, match=r"1 unexpected \(prototypes\)"):
        load(tiny(), {**tiny().state_dict(), "prototypes": torch.zeros(3, 8)})


def test_nothing_else_may_be_absent():
    ours = proda(1)
    for name in ("layer5.bottleneck.0.se.0.bias", "bn1.num_batches_tracked"):
        state = published(proda(2))
        del state[name]
        with pytest.raises(ValueError, match=rf"another network: 1 missing \({name}\)"):
            load(ours, state)
    assert not unlike(ours, proda(1))


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        ({"extra_norm": True}, {}, r"5 missing \(bn_pretrain\.weight"),
        ({}, {"extra_norm": True}, r"5 unexpected \(bn_pretrain\.weight"),
        ({}, {"heads": "mrnet"}, r"unexpected \(layer6"),
        ({"heads": "mrnet"}, {}, r"missing \(layer6"),
    ],
)
def test_files_of_the_familys_other_members_are_refused(asked, given, said):
    network = Build(replace(PRODA, **asked))()
    with pytest.raises(ValueError, match=f"the checkpoint belongs to another network: .*{said}"):
        load(network, Build(replace(PRODA, **given))().state_dict())


def test_the_pretrained_init_leaves_head_extra_norm_and_prototypes():
    ours, theirs = proda(1, extra_norm=True), proda(2, extra_norm=True)
    state = {f"Scale.{key}": value for key, value in theirs.state_dict().items() if key.startswith(BACKBONE)}
    load(ours, state)
    assert {key.partition(".")[0] for key in unlike(ours, theirs)} == {"layer5", "prototypes"}
    assert not any(key.startswith("layer5") for key in unlike(ours, proda(1, extra_norm=True)))


def simclr(network):
    """A file with the names of a backbone and others besides, some of them known to our heads."""
    state = {key: value for key, value in network.state_dict().items() if key.startswith(BACKBONE)}
    return {
        **state,
        "fc.weight": torch.zeros(1000, 2048),
        "contrastive_head.0.weight": torch.zeros(4, 4),
        "layer5.head.1.weight": torch.zeros(7),
        "bn_pretrain.weight": torch.zeros(7),
        "prototypes": torch.zeros(7),
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_of_a_simclr_file_only_the_backbone_is_taken(prefix):
    ours, theirs = proda(1, extra_norm=True), proda(2, extra_norm=True)
    with torch.no_grad():
        theirs.bn1.running_mean.normal_()
    state = {f"{prefix}{key}": value for key, value in simclr(theirs).items()}
    backbone = {key for key in theirs.state_dict() if key.startswith(BACKBONE)}
    assert backbone_part(ours, state).keys() == backbone
    ours.load_state_dict(backbone_part(ours, state), strict=False)
    assert not unlike(ours, theirs) & backbone
    assert not unlike(ours, proda(1, extra_norm=True)) - backbone


def test_a_simclr_file_need_not_have_every_name():
    ours, theirs = proda(1), proda(2)
    state = {key: value for key, value in simclr(theirs).items() if not key.endswith("num_batches_tracked")}
    del state["conv1.weight"]
    ours.load_state_dict(backbone_part(ours, state), strict=False)
    assert torch.equal(ours.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight)
    assert "conv1.weight" not in unlike(ours, proda(1))


def test_a_simclr_file_of_something_else_is_refused():
    ours = proda(1)
    with pytest.raises(
        ValueError, match=r"none of its 4 tensors \(net\.0, net\.1, layer5\.head\.1\.weight and others\) belongs to"
    ):
        backbone_part(ours, {name: torch.zeros(1) for name in ("net.0", "net.1", "layer5.head.1.weight", "fc.weight")})
    wide = simclr(proda(2, width=8))
    with pytest.raises(
        ValueError, match=r"of another shape \(conv1\.weight is \(8, 3, 7, 7\), needed is \(4, 3, 7, 7\)"
    ):
        backbone_part(ours, {"conv1.weight": wide["conv1.weight"], "bn1.weight": torch.zeros(4)})


# BiSeNet's.


def bisenet(**changes):
    return BiSeNet(replace(BiSeNetConfig(3, (1, 1, 1, 1), width=4, spatial_width=4), **changes))


def test_a_published_bisenet_holds_its_context_path_twice():
    ours, theirs = bisenet(), bisenet()
    published = {f"module.{key}": value for key, value in with_published_copies(theirs.state_dict()).items()}
    assert published["module.context_path.features.fc.weight"].shape == (1000, 32)
    assert torch.equal(published["module.context_path.features.bn1.bias"], theirs.context_path.bn1.bias)
    assert is_whole_network(published)
    assert load(ours, published) == len(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        BiSeNetConfig(5, (1, 2, 1, 1), width=4, spatial_width=8),
        BiSeNetConfig(3, (1, 1, 2, 1), block="bottleneck", width=4, spatial_width=4),
    ],
)
def test_a_bisenet_is_described_by_its_names_and_shapes(config):
    assert described(BiSeNet(config).state_dict()) == config
    assert described(BiSeNet(config).state_dict(), DeepLabConfig()) == config


def test_a_usual_resnet_fills_the_context_path_alone():
    ours, theirs = bisenet(), bisenet()
    spatial = ours.saptial_path.convblock1.conv1.weight.clone()
    state = {k.removeprefix("context_path."): v for k, v in theirs.state_dict().items() if k.startswith("context_path")}
    assert load(ours, state | {"fc.weight": torch.zeros(1000, 32)}) == len(state)
    assert torch.equal(ours.context_path.layer4[0].conv2.weight, theirs.context_path.layer4[0].conv2.weight)
    assert torch.equal(ours.saptial_path.convblock1.conv1.weight, spatial)
    assert torch.equal(backbone_part(ours, state)["context_path.conv1.weight"], theirs.context_path.conv1.weight)


def test_another_systems_network_is_refused():
    with pytest.raises(ValueError, match="another network"):
        load(bisenet(), tiny().state_dict())
    with pytest.raises(ValueError, match="another network"):
        load(tiny(), bisenet().state_dict())


# FADA's.

FADA = FadaConfig(
    3, layers=(1, 1, 1, 1), width=4, dilations=(1, 2), branch_channels=16, head_channels=8, groups=4, norms="batch"
)
KINDS = [{}, {"aspp": "modified"}, {"norms": "frozen"}, {"norms": "frozen", "aspp": "modified", "num_classes": 5}]


def fada(seed=0, **changes):
    """A network whose norms are not those of a fresh one."""
    torch.manual_seed(seed)
    network = Fada(replace(FADA, **changes))
    for name, value in network.state_dict().items():
        if ".bn" in name and value.is_floating_point():
            value.uniform_(0.5, 2.0)
    return network


def vgg(seed=0, **changes):
    return fada(seed, backbone="vgg16", pixels="bgr_vgg", **changes)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_fada_tells_classes_classifier_and_norms_of_its_network(kind, prefix):
    state = {f"{prefix}{key}": value for key, value in fada(**kind).state_dict().items()}
    asked = replace(FADA, num_classes=9, dropout=0.4, norms="frozen", pixels="bgr_city", layers=(2, 2, 1, 1), width=8)
    expected = replace(FADA, dropout=0.4, pixels="bgr_city", **kind)
    assert is_whole_network(state)
    assert described(state, asked) == expected
    load(Fada(expected), state)


def test_of_a_published_file_of_fada_all_is_told():
    for name in ("fada101", "fada101-modified", "fada-vgg16"):
        for given in (named_config(name, 16, small=False), replace(named_config(name, 19, small=False), norms="batch")):
            with torch.device("meta"):
                state = Fada(given).state_dict()
            expected = replace(given, norms="frozen") if name == "fada-vgg16" else given  # it has no norms
            assert described(state) == described(state, DeepLabConfig()) == expected


def test_a_file_of_fada_on_another_backbone_than_asked_for_reads_the_pixels_of_that_one():
    on_vgg = replace(FADA, backbone="vgg16", pixels="bgr_vgg")
    assert described(vgg(width=8).state_dict(), FADA) == replace(on_vgg, width=8)
    asked = replace(on_vgg, num_classes=7, pixels="rgb_imagenet")
    assert described(vgg().state_dict(), asked) == replace(asked, num_classes=3)
    assert described(fada().state_dict(), asked) == FADA


def test_a_file_of_fada_without_its_last_layer_is_left_to_whoever_loads_it():
    state = fada(aspp="modified").state_dict()
    del state["classifier.head.1.weight"]
    assert described(state, FADA) is FADA
    with pytest.raises(ValueError, match=r"another network: 1 missing \(classifier\.head\.1\.weight\)"):
        load(fada(aspp="modified"), state)


def test_frozen_norms_fill_ordinary_ones_and_ordinary_ones_fill_frozen_ones():
    """Q-UL-4: an adversarial checkpoint is evaluated with ordinary norms; its counters are absent."""
    frozen, ordinary = fada(1, norms="frozen"), fada(2)
    ordinary.feature_extractor.backbone.bn1.num_batches_tracked.fill_(7)
    assert load(ordinary, frozen.state_dict()) == len(frozen.state_dict())
    assert not unlike(frozen, ordinary)
    assert ordinary.feature_extractor.backbone.bn1.num_batches_tracked == 7
    again = fada(3, norms="frozen")
    assert load(again, ordinary.state_dict()) == len(frozen.state_dict())
    assert not unlike(again, frozen)


def test_nothing_but_counters_may_be_absent_from_a_file_of_fada():
    state = fada().state_dict()
    del state["feature_extractor.backbone.bn1.running_var"]
    with pytest.raises(ValueError, match=r"1 missing \(feature_extractor\.backbone\.bn1\.running_var\)"):
        load(fada(), state)
    with pytest.raises(ValueError, match=r"another network: .*missing \(classifier"):
        load(fada(aspp="modified"), fada().state_dict())
    with pytest.raises(ValueError, match=r"another network: .*unexpected \(feature_extractor\.backbone\.0\.weight"):
        load(fada(), vgg().state_dict())


@pytest.mark.parametrize("norms", ["frozen", "batch"])
@pytest.mark.parametrize("counters", [False, True])
def test_a_usual_resnet_fills_the_feature_extractor_alone(norms, counters):
    """The older ImageNet files have no counters and the newer ones have."""
    ours, theirs = fada(1, norms=norms), fada(2)
    state = {
        key.removeprefix(Fada.BACKBONE): value
        for key, value in theirs.state_dict().items()
        if key.startswith(Fada.BACKBONE) and (counters or not key.endswith(COUNTER))
    }
    assert not is_whole_network(state)
    loaded = load(ours, state | {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)})
    assert loaded == sum(norms == "batch" or not key.endswith(COUNTER) for key in state)
    differing = unlike(ours, theirs)
    assert {key.partition(".")[0] for key in differing} == {"classifier"}
    assert differing & unlike(ours, fada(1, norms=norms)) == set()


def imagenet_vgg(network):
    """A Caffe conversion (methods 8.5): all five stages numbered with their pools, then three linear layers."""
    numbers = [n for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)) for n in stage]
    convolutions = [module for module in network.feature_extractor.backbone if isinstance(module, torch.nn.Conv2d)]
    state = {}
    for number, conv in zip(numbers, convolutions[:13], strict=True):
        state |= {f"features.{number}.weight": conv.weight.detach(), f"features.{number}.bias": conv.bias.detach()}
    linear = {f"classifier.{n}.{part}": torch.zeros(4, 4) for n in (0, 3, 6) for part in ("weight", "bias")}
    return state | linear


def test_a_vgg_of_imagenet_fills_all_but_the_layers_that_it_does_not_have():
    ours, theirs = vgg(1), vgg(2)
    assert not is_whole_network(imagenet_vgg(theirs))
    assert load(ours, imagenet_vgg(theirs)) == 26
    new = {f"{Fada.BACKBONE}{number}.{part}" for number in (29, 31) for part in ("weight", "bias")}
    differing = unlike(ours, theirs)
    assert differing == new | {key for key in ours.state_dict() if key.startswith("classifier.")}
    assert not differing & unlike(ours, vgg(1))


def test_a_vgg_and_a_resnet_do_not_fill_each_other():
    resnet = {key.removeprefix(Fada.BACKBONE): v for key, v in fada().state_dict().items() if "backbone" in key}
    with pytest.raises(ValueError, match=r"does not fit this backbone: 26 missing .*unexpected"):
        load(vgg(), resnet)
    with pytest.raises(ValueError, match=r"does not fit this backbone: .*26 unexpected"):
        load(fada(), imagenet_vgg(vgg()))
    with pytest.raises(ValueError, match=r"2 missing \(feature_extractor\.backbone\.12\.weight"):
        load(vgg(), {key: value for key, value in imagenet_vgg(vgg()).items() if ".12." not in key})


def test_networks_of_fada_and_of_other_systems_are_told_apart():
    for other in (tiny(), bisenet(), proda()):
        with pytest.raises(ValueError, match="another network"):
            load(other, fada().state_dict())
        with pytest.raises(ValueError, match="another network"):
            load(fada(), other.state_dict())
