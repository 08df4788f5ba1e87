"""Score the newest checkpoint of a run in this process, without Ray."""

from __future__ import annotations

import json
from typing import Any

import torch

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from pipelines.options import AdaptOptions
from pipelines.results import ROWS, protocol
from pipelines.setup import resolve


def rescore(options: AdaptOptions) -> dict[str, Any]:
    """Score a run's newest checkpoint; rows that the run measured itself are taken from its ``results.json``.

    Raises:
        RunError: the run has no checkpoint, or one of another network than its options say.
    """
    setup = resolve(options)
    folder = options.folder()
    state = CheckpointStore(folder / "checkpoints").newest()
    if state is None:
        raise RunError(f"{folder} has no checkpoint yet; resume the run first: python run.py --resume {folder}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = setup.make_scorer()(device)
    weights = {name: tensor.numpy() for name, tensor in state["teaching"]["network"].items()}
    expected = {name: tuple(tensor.shape) for name, tensor in scorer.network.state_dict().items()}
    if expected != {name: array.shape for name, array in weights.items()}:
        raise RunError(f"the checkpoint in {folder} is of another network than its config.toml describes")
    path = folder / "results.json"
    known: dict[str, Any] = json.loads(path.read_text())["scores"] if path.is_file() else {}
    scores = {row: known.get(row) for row in ROWS}
    scores["adapted"] = scorer.score(weights)
    return {
        "benchmark": setup.benchmark.name,
        "recipe": options.recipe,
        "data": setup.data,
        "seed": options.seed,
        "protocol": protocol(setup),
        "class_names": list(setup.benchmark.classes.names),
        "scores": scores,
        "step": state["step"],
    }
