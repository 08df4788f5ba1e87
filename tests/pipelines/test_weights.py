import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actors.errors import RunError
from models.networks.build import Build
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.fada import Fada, FadaConfig
from pipelines.weights import check_initial, load_initial, load_pretrained_backbone, read_weights
from tests.pipelines.test_trained import finished_run

CONFIG = DeepLabConfig(3, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4)


def network(seed):
    torch.manual_seed(seed)
    return DeepLab(CONFIG)


def same(one, other, of=""):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items() if key.startswith(of))


def saved(tmp_path, state, **how):
    torch.save(state, tmp_path / "x.pth", **how)
    return str(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": s[k] for k in s}])
def test_a_whole_network_is_read_from_either_format_of_torch(tmp_path, wrap, zipped):
    path = saved(tmp_path, wrap(network(1).state_dict()), _use_new_zipfile_serialization=zipped)
    ours = network(2)
    assert check_initial(path, ours)
    assert not same(ours, network(1)), "checking loads nothing"
    load_initial(path, ours)
    assert same(ours, network(1))


def test_safetensors_and_run_directories_are_read_too(tmp_path):
    save_file({k: v.contiguous() for k, v in network(1).state_dict().items()}, tmp_path / "x.safetensors")
    ours = network(2)
    load_initial(str(tmp_path / "x.safetensors"), ours)
    assert same(ours, network(1))
    setup, theirs = finished_run(tmp_path)
    fresh = setup.plan.network()
    load_initial(setup.plan.folder, fresh)
    assert same(fresh, theirs)


def test_a_backbone_leaves_the_heads_as_they_were(tmp_path):
    state = {f"Scale.{k}": v for k, v in network(1).state_dict().items() if k.split(".")[0] not in ("layer5", "layer6")}
    path, ours = saved(tmp_path, state), network(2)
    with torch.device("meta"):
        assert not check_initial(path, DeepLab(CONFIG))
    load_initial(path, ours)
    assert same(ours, network(1), of="layer4")
    assert same(ours, network(2), of="layer6")


class Trap:
    """Its unpickling would run code."""

    def __reduce__(self):
        return pytest.fail, ("code in a weights file was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4", "cannot be read"),
        (b"no weights" * 30, "cannot be read"),
        (pickle.dumps(Trap()), "cannot be read"),
    ],
)
def test_a_damaged_file_is_a_sentence_and_nothing_in_it_runs(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_weights(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("value", "inside"), [({"model": {}, "epoch": 3}, "model, epoch"), ([torch.zeros(1)], "list"), ({}, "nothing")]
)
def test_a_file_of_something_else_says_what_it_holds(tmp_path, value, inside):
    with pytest.raises(RunError, match=f"is no state dict of a network; it holds {inside}"):
        read_weights(saved(tmp_path, value))


def test_a_missing_file_and_another_network_are_refused_by_name(tmp_path):
    with pytest.raises(RunError, match=r"none\.pth cannot be read"):
        read_weights(tmp_path / "none.pth")
    other = DeepLab(DeepLabConfig(4, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4))
    path = saved(tmp_path, other.state_dict())
    for use in (check_initial, load_initial):
        with pytest.raises(RunError, match=r"x\.pth: the checkpoint belongs to another network: 2 of another shape"):
            use(path, network(0))


# ProDA's files (methods 8.5).


def proda(seed, **changes):
    torch.manual_seed(seed)
    made = Build(replace(CONFIG, heads="proda", **changes))()
    with torch.no_grad():
        made.prototypes.normal_()
    return made


def container(network, **more):
    """A checkpoint of ProDA; its networks' names are those of their classes."""
    state = {key: value for key, value in network.state_dict().items() if key != "prototypes"}
    return {"ResNet101": {"model_state": state, **more}, "iter": 3}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("extra_norm", [False, True])
def test_a_checkpoint_of_proda_brings_its_prototypes(tmp_path, extra_norm, zipped):
    theirs, ours = proda(1, extra_norm=extra_norm), proda(2, extra_norm=extra_norm)
    held = {**container(theirs, objective_vectors=theirs.prototypes), "FCDiscriminator": container(theirs)["ResNet101"]}
    path = saved(tmp_path, held, _use_new_zipfile_serialization=zipped)
    assert {*read_weights(path)} == {*theirs.state_dict()}
    assert check_initial(path, ours)
    assert not same(ours, theirs), "checking loads nothing"
    load_initial(path, ours)
    assert same(ours, theirs)


@pytest.mark.parametrize("vectors", [{}, {"objective_vectors": None}])
def test_without_prototypes_the_networks_own_stay(tmp_path, vectors):
    theirs, ours = proda(1), proda(2)
    path = saved(tmp_path, container(theirs, **vectors))
    load_initial(path, ours)
    assert torch.equal(ours.prototypes, proda(2).prototypes)
    assert same(ours, theirs, of="layer")
    assert "prototypes" not in read_weights(path)


@pytest.mark.parametrize(("zipped", "module"), [(True, None), (False, b"numpy._core"), (False, b"numpy.core")])
def test_the_score_that_a_checkpoint_of_proda_notes_may_be_numpys(tmp_path, zipped, module):
    """The published code saves what np.nanmean gave it, in numpy 1 from a module of another name."""
    theirs, ours = proda(1), proda(2)
    held = {**container(theirs, objective_vectors=theirs.prototypes), "best_iou": np.float64(0.575)}
    path = saved(tmp_path, held, _use_new_zipfile_serialization=zipped)
    if module is not None:
        content = (tmp_path / "x.pth").read_bytes()
        name = np.float64(0).__reduce__()[0].__module__.encode()
        assert content.count(name) == 1
        (tmp_path / "x.pth").write_bytes(content.replace(name, module + b".multiarray"))
    load_initial(path, ours)
    assert same(ours, theirs)


def test_a_checkpoint_of_proda_that_does_not_fit_is_refused_by_name(tmp_path):
    path = saved(tmp_path, container(proda(1), objective_vectors=torch.zeros(19, 8)))
    with pytest.raises(
        RunError, match=r"x\.pth: the checkpoint belongs to another network: 1 of another shape \(proto"
    ):
        load_initial(path, proda(2))
    path = saved(tmp_path, container(proda(1, extra_norm=True)))
    with pytest.raises(RunError, match=r"x\.pth: .*5 unexpected \(bn_pretrain\.weight"):
        check_initial(path, proda(2))
    with pytest.raises(RunError, match=r"is no state dict of a network; it holds NoneType"):
        read_weights(saved(tmp_path, {"ResNet101": {"iter": 3}}))


def simclr(network):
    backbone = {key: value for key, value in network.state_dict().items() if not key.startswith(("layer5", "proto"))}
    return {"state_dict": {**backbone, "fc.weight": torch.zeros(1000, 8), "projection.0.weight": torch.zeros(4, 4)}}


def test_a_simclr_file_fills_the_backbone_alone(tmp_path):
    theirs, ours = proda(1), proda(2, extra_norm=True)
    with torch.no_grad():
        theirs.bn1.running_var.uniform_()
    path = saved(tmp_path, {**simclr(theirs), "epoch": 800})
    load_pretrained_backbone(path, ours)
    fresh = proda(2, extra_norm=True)
    for of in ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."):
        assert same(theirs, ours, of=of)
    for of in ("layer5.", "bn_pretrain.", "prototypes"):
        assert same(ours, fresh, of=of)
    assert not same(ours, fresh, of="bn1.")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"state_dict": {"net.0.weight": torch.zeros(1)}}, r"none of its 1 tensors \(net\.0\.weight\) belongs to this"),
        ({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, r"does not fit this backbone: 1 of another shape"),
        ({"state_dict": {"epoch": 3}}, "is no state dict of a network; it holds epoch"),
        ({"fc.weight": torch.zeros(1)}, "belongs to this backbone"),
    ],
)
def test_a_simclr_file_of_something_else_is_refused_by_name(tmp_path, state, said):
    ours = proda(2)
    with pytest.raises(RunError, match=rf"x\.pth.*{said}"):
        load_pretrained_backbone(saved(tmp_path, state), ours)
    assert same(ours, proda(2))


def test_weights_with_an_extra_norm_say_which_option_takes_them(tmp_path):
    config = DeepLabConfig(
        3, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4, heads="proda", extra_norm=True
    )
    torch.save({"ResNet101": {"model_state": Build(config)().state_dict()}}, tmp_path / "stage2.pkl")
    check_initial(str(tmp_path / "stage2.pkl"), Build(config)())
    with pytest.raises(RunError, match=r"unexpected \(bn_pretrain.*add --proda\.extra-norm on"):
        check_initial(str(tmp_path / "stage2.pkl"), Build(replace(config, extra_norm=False))())


# FADA's files (methods 8.5).


def fada(seed, **changes):
    torch.manual_seed(seed)
    return Fada(replace(FadaConfig(3, layers=(1, 1, 1, 1), width=4, dilations=(1, 2), norms="batch"), **changes))


def published(network, prefix, **more):
    """Both parts apart, and optimisers that hold more than tensors."""
    parts = {}
    for part in ("feature_extractor", "classifier"):
        state = getattr(network, part).state_dict()
        parts[part] = {f"{prefix}{name}": value for name, value in state.items()}
    optimiser = torch.optim.SGD(network.parameters(), lr=2.5e-4, momentum=0.9).state_dict()
    return {"iteration": 40_000, **parts, "optimizer_fea": optimiser, "optimizer_cls": optimiser, **more}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("changes", [{}, {"backbone": "vgg16"}])
def test_a_checkpoint_of_fada_is_put_together_from_its_parts(tmp_path, prefix, changes, zipped):
    theirs, ours = fada(1, **changes), fada(2, **changes)
    critic = {f"{prefix}D.0.weight": torch.zeros(2, 2, 3, 3)}
    held = published(theirs, prefix, model_D=critic)
    path = saved(tmp_path, held, _use_new_zipfile_serialization=zipped)
    assert {*read_weights(path)} == {*theirs.state_dict()}
    assert check_initial(path, ours)
    assert not same(ours, theirs), "checking loads nothing"
    load_initial(path, ours)
    assert same(ours, theirs)


def test_an_adversarial_checkpoint_fills_a_network_with_ordinary_norms(tmp_path):
    """Its norms were frozen and have no counters (Q-UL-4)."""
    theirs, ours = fada(1, norms="frozen"), fada(2)
    path = saved(tmp_path, published(theirs, "module."))
    assert check_initial(path, ours)
    load_initial(path, ours)
    assert same(theirs, ours)


def test_a_part_of_fadas_network_alone_is_not_read(tmp_path):
    held = published(fada(1), "")
    del held["classifier"]
    with pytest.raises(RunError, match="is no state dict of a network; it holds iteration, feature_extractor"):
        read_weights(saved(tmp_path, held))


def test_a_checkpoint_of_another_network_of_fada_is_refused_by_name(tmp_path):
    path = saved(tmp_path, published(fada(1, num_classes=4), "module."))
    with pytest.raises(RunError, match=r"x\.pth: the checkpoint belongs to another network: 4 of another shape"):
        load_initial(path, fada(2))


@pytest.mark.parametrize("prefix", ["", "Scale."])
def test_a_backbone_leaves_the_classifier_of_fada_as_it_was(tmp_path, prefix):
    state = {f"{prefix}{key}": value for key, value in fada(1).feature_extractor.backbone.state_dict().items()}
    path, ours = saved(tmp_path, {**state, f"{prefix}fc.weight": torch.zeros(4, 4)}), fada(2)
    assert not check_initial(path, ours)
    load_initial(path, ours)
    assert same(ours, fada(1), of="feature_extractor")
    assert same(ours, fada(2), of="classifier")


def test_weights_in_a_store_are_read_as_those_in_a_folder(tmp_path, store):
    state = network(1).state_dict()
    for zipped in (True, False):
        torch.save(state, tmp_path / f"zipped-{zipped}.pth", _use_new_zipfile_serialization=zipped)
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    store.upload_folder(tmp_path, "weights")
    for name in ("zipped-True.pth", "zipped-False.pth", "x.safetensors"):
        ours = network(2)
        assert check_initial(store.uri(f"bucket/weights/{name}"), ours)
        load_initial(store.uri(f"bucket/weights/{name}"), ours)
        assert same(ours, network(1))
    for name in ("damaged.pth", "missing.pth", "missing.safetensors"):
        with pytest.raises(RunError, match=f"the weights s3://bucket/weights/{name}.* cannot be read"):
            read_weights(store.uri(f"bucket/weights/{name}"))
