import dataclasses
import os

import pytest
import torch

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from actors.evaluator import Recommended
from models.networks.build import Build
from pipelines.options import AdaptOptions
from pipelines.setup import resolve
from pipelines.trained import describe, load_trained, newest_run, read_description
from tests.own_data import write_own_data

CPU = torch.device("cpu")


def finished_run(tmp_path, name="run", step=3):
    """A run directory as a run leaves it, with random weights."""
    source, target = write_own_data(tmp_path / "own")
    options = AdaptOptions(source=source, target=target, preset="tiny", name=name, runs=str(tmp_path / "runs"))
    setup = resolve(options)
    describe(setup)
    torch.manual_seed(0)
    network = setup.plan.network()
    state = {"step": step, "teaching": {"network": network.state_dict()}}
    assert CheckpointStore(setup.options.folder() / "checkpoints").save(step, state) is None
    return setup, network


def test_a_network_is_used_without_the_data_it_was_trained_on(tmp_path):
    setup, network = finished_run(tmp_path)
    (tmp_path / "own").rename(tmp_path / "gone")
    trained = load_trained(setup.plan.folder, CPU)
    assert trained.step == 3
    assert trained.description.classes == setup.benchmark.classes
    assert trained.description.configs == (setup.preset.network,)
    assert trained.description.views == setup.preset.score_views
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(trained.network.state_dict()[name], tensor)
    assert not trained.network.training


def test_the_run_that_saved_last_is_the_newest(tmp_path):
    first, _ = finished_run(tmp_path, "first")
    second, _ = finished_run(tmp_path, "second")
    os.utime(tmp_path / "runs/first/checkpoints/step_00000003/state.pt", (2e9, 2e9))
    assert newest_run(tmp_path / "runs") == first.options.folder()
    with pytest.raises(RunError, match=r"no run in .* has a checkpoint"):
        newest_run(tmp_path / "own")
    assert second.options.folder().is_dir()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"classes": 1, "config": 2}', '{"classes": 1, "configs": []}', "\x00"]
)
def test_a_damaged_description_is_refused(tmp_path, text):
    setup, _ = finished_run(tmp_path)
    path = setup.options.folder() / "network.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"network\.json cannot be read"):
        read_description(setup.options.folder())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    setup, _ = finished_run(tmp_path)
    other = dataclasses.replace(setup.preset.network, width=8)
    describe(dataclasses.replace(setup, plan=dataclasses.replace(setup.plan, network=Build(other))))
    with pytest.raises(RunError, match="of another network"):
        load_trained(setup.plan.folder, CPU)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is no run directory"):
        load_trained(tmp_path, CPU)


def test_a_damaged_checkpoint_says_what_to_remove(tmp_path):
    setup, _ = finished_run(tmp_path)
    path = setup.options.folder() / "checkpoints/step_00000003/state.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"is damaged .* remove its folder"):
        load_trained(setup.plan.folder, CPU)


def test_the_recommended_weights_are_another_step(tmp_path):
    setup, network = finished_run(tmp_path)
    with pytest.raises(RunError, match="recommends no step yet"):
        load_trained(setup.plan.folder, CPU, "recommended")
    offered = {name: tensor.numpy() + 1 for name, tensor in network.state_dict().items()}
    Recommended(f"{setup.plan.folder}/recommended").offer(2, 0.5, offered)
    trained = load_trained(setup.plan.folder, CPU, "recommended")
    assert trained.step == 2
    torch.testing.assert_close(trained.network.conv1.weight, network.conv1.weight + 1)


def test_a_run_in_a_store_is_found_and_used(tmp_path, store):
    setup, network = finished_run(tmp_path)
    finished_run(tmp_path, "older")
    store.upload_folder(tmp_path / "runs", "runs")
    for name, (content, _) in list(store.buckets["bucket"].items()):
        store.buckets["bucket"][name] = (content, 1e9 if "older" in name else 2e9)
    found = newest_run(store.uri("bucket/runs"))
    assert str(found) == store.uri("bucket/runs/run")
    trained = load_trained(str(found), CPU)
    assert trained.step == 3
    assert torch.equal(next(iter(trained.network.parameters())), next(iter(network.parameters())))
    with pytest.raises(RunError, match=r"no run in s3://bucket/other.* has a checkpoint"):
        newest_run(store.uri("bucket/other"))
    assert read_description(found) == read_description(setup.options.folder())
