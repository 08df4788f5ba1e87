import pickle

import pytest
import torch
from safetensors.torch import save_file

from actors.errors import RunError
from models.networks.deeplab import DeepLab, DeepLabConfig
from pipelines.weights import check_initial, load_initial, read_weights
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
