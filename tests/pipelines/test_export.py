import json
from pathlib import Path

import pytest
import torch

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.discriminators import MultiScaleDiscriminator
from pipelines.export import export_mrnet
from pipelines.weights import load_initial
from tests.models.conftest import GOLDEN
from tests.pipelines.test_trained import finished_run


def test_a_flat_state_dict_and_its_options_are_written(tmp_path):
    setup, network = finished_run(tmp_path)
    done = export_mrnet(setup.plan.folder, str(tmp_path / "out"))
    assert done.weights.name == "GTA5_3.pth"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"GTA5_3.pth", "opts.yaml"}
    state = torch.load(done.weights, weights_only=True)
    torch.testing.assert_close(state, dict(network.state_dict()))
    assert done.options.read_text().splitlines() == [
        "model: DeepLab",
        "norm_style: gn",
        "use_se: true",
        "num_classes: 3",
    ]
    assert done.parameters == sum(p.numel() for p in network.parameters())


def test_discriminators_of_stage_one_are_written_beside_it_in_the_published_layout(tmp_path):
    setup, network = finished_run(tmp_path)
    critics = torch.nn.ModuleDict({head: MultiScaleDiscriminator(19) for head in ("aux", "main")})
    for objective in ({"discriminators": critics.state_dict()}, {"inner": {"discriminators": critics.state_dict()}}):
        state = {"step": 4, "teaching": {"network": network.state_dict()}, "objective": objective}
        assert CheckpointStore(Path(setup.plan.folder) / "checkpoints").save(4, state) is None
        done = export_mrnet(setup.plan.folder, str(tmp_path / "out"))
        assert [path.name for path in done.discriminators] == ["GTA5_4_D1.pth", "GTA5_4_D2.pth"]
        keys = json.loads((GOLDEN / "mrnet_keys.json").read_text())["ms_discriminator"]
        for path, head in zip(done.discriminators, ("aux", "main"), strict=True):
            written = torch.load(path, weights_only=True)
            assert {name: list(tensor.shape) for name, tensor in written.items()} == keys
            torch.testing.assert_close(written, dict(critics[head].state_dict()))


@pytest.mark.slow
def test_the_published_network_goes_round_at_full_size(tmp_path):
    """93,536,480 parameters; names and shapes are those of the published checkpoints."""
    setup, _ = finished_run(tmp_path)
    description = json.loads((Path(setup.plan.folder) / "network.json").read_text())
    torch.manual_seed(0)
    network = DeepLab(DeepLabConfig())
    published = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(published, tmp_path / "GTA5_25000.pth", _use_new_zipfile_serialization=False)
    other = DeepLab(DeepLabConfig())
    load_initial(str(tmp_path / "GTA5_25000.pth"), other)
    description["config"] = {**description["config"], **vars(DeepLabConfig())}
    (Path(setup.plan.folder) / "network.json").write_text(json.dumps(description))
    store = CheckpointStore(Path(setup.plan.folder) / "checkpoints")
    assert store.save(25_000, {"step": 25_000, "teaching": {"network": other.state_dict()}}) is None
    done = export_mrnet(setup.plan.folder, str(tmp_path / "out"))
    assert done.parameters == 93_536_480
    written = torch.load(done.weights, weights_only=True)
    keys = json.loads((GOLDEN / "mrnet_keys.json").read_text())["mrnet_gn_se"]
    assert {name: list(tensor.shape) for name, tensor in written.items()} == keys
    for name, tensor in network.state_dict().items():
        assert torch.equal(written[name], tensor), name


def test_a_run_without_a_checkpoint_and_a_full_disk_are_sentences(tmp_path, monkeypatch):
    setup, _ = finished_run(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"the weights cannot be written to .*out: .*No space left"):
        export_mrnet(setup.plan.folder, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(RunError, match="is no run directory"):
        export_mrnet(str(tmp_path), str(tmp_path / "out"))
