from dataclasses import replace

import pytest
import torch

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from pipelines.options import AdaptOptions
from pipelines.rescore import rescore
from pipelines.results import write_json
from pipelines.setup import resolve


@pytest.fixture
def options(tiny_folder, tmp_path):
    data = str(tiny_folder / "data")
    return AdaptOptions(preset="tiny", name="run", runs=str(tmp_path), data=data, references="never")


def save(options, network):
    state = {"step": 7, "teaching": {"network": network.state_dict()}}
    assert CheckpointStore(options.folder() / "checkpoints").save(7, state) is None


def test_a_run_without_a_checkpoint_says_how_to_go_on(options):
    with pytest.raises(RunError, match=r"has no checkpoint yet; .*--resume"):
        rescore(options)


def test_a_checkpoint_of_another_network_is_refused(options):
    save(options, torch.nn.Linear(2, 2))
    with pytest.raises(RunError, match="of another network than its config"):
        rescore(options)


def test_the_newest_checkpoint_is_scored_and_other_rows_are_those_of_the_run(options):
    setup = resolve(options)
    torch.manual_seed(0)
    network = setup.plan.network()
    save(options, network)
    known = {"miou": 12.0, "per_class": [12.0] * 19, "protocols": {"16": 12.0}}
    write_json(options.folder() / "results.json", {"scores": {"source_only": known, "adapted": known}})
    found = rescore(replace(options))
    scorer = setup.make_scorer()(torch.device("cpu"))
    expected = scorer.score({name: tensor.numpy() for name, tensor in network.state_dict().items()})
    assert found["scores"]["adapted"] == expected
    assert found["scores"]["source_only"] == known
    assert found["scores"]["oracle"] is None
    assert found["step"] == 7
