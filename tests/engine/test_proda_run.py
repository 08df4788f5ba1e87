"""ProDA through the whole engine: one command, and a stage started alone from the weights of the one before."""

import json

import pytest
import torch
from engine_runs import losses, start_run

from actors.checkpoints import kept_stages
from pipelines.export import export
from pipelines.options import read_config
from pipelines.predict import predict
from pipelines.recipes.proda import ProdaOptions
from pipelines.rescore import rescore, score_file
from pipelines.weights import read_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(local_ray, tmp_path_factory, tiny_folder):
    """Two students, labels made again without end and denoised by the teacher: our default."""
    return start_run(tmp_path_factory.mktemp("whole"), tiny_folder, recipe="proda", students=2).go()


def test_one_command_runs_all_stages_and_scores_each(whole):
    stages = whole.results["stages"]
    assert [(stage["name"], stage["step"]) for stage in stages] == [
        ("warm-up", 20),
        ("denoising", 30),
        ("distillation 1", 35),
        ("distillation 2", 40),
    ]
    assert all(0 <= stage["miou"] <= 100 for stage in stages)
    assert stages[-1]["miou"] == whole.results["scores"]["adapted"]["miou"]
    assert [step for step, _ in kept_stages(whole.folder)] == [20, 30, 35]
    found = losses(whole.folder)
    assert {"loss/cross_entropy", "loss/reverse", "loss/structure"} <= set(found[30])
    assert {"loss/pseudo", "loss/distillation"} <= set(found[31])
    assert whole.results["labels"]["read"] > 0


def test_prototypes_travel_with_the_weights_of_every_stage(whole):
    warm, denoised, distilled = (read_weights(path)["prototypes"] for _, path in kept_stages(whole.folder))
    assert not warm.any()
    assert denoised.any()
    assert torch.equal(denoised, distilled), "distillation has no use for them, and leaves them alone"


def test_a_stage_starts_alone_from_the_weights_of_the_one_before(whole, local_ray, tmp_path, tiny_folder):
    """Also behind a SimCLR backbone, whose network is another than that of the stages before."""
    _, denoised = kept_stages(whole.folder)[1]
    backbone = {name: t for name, t in read_weights(denoised).items() if name.split(".")[0] not in ("layer5",)}
    torch.save({"state_dict": {**backbone, "contrastive_head.weight": torch.zeros(2)}}, tmp_path / "simclr.pth")
    options = {
        "recipe": "proda",
        "from_stage": 3,
        "init": str(denoised),
        "proda": ProdaOptions(simclr=str(tmp_path / "simclr.pth")),
    }
    alone = start_run(tmp_path, tiny_folder, **options).go()
    assert [stage["name"] for stage in alone.results["stages"]] == ["distillation 1", "distillation 2"]
    assert set(losses(alone.folder)) == set(range(1, 11))
    _check_what_a_user_does_next(alone.folder, tmp_path, tiny_folder)


def _check_what_a_user_does_next(folder, tmp_path, data):
    """Its weights are of a network with an extra norm: every command finds out by itself."""
    assert len(json.loads((folder / "network.json").read_text())["configs"]) == 2
    scored = rescore(read_config(folder))["scores"]["adapted"]["miou"]
    assert scored == pytest.approx(json.loads((folder / "results.json").read_text())["scores"]["adapted"]["miou"])
    written = export(str(folder), str(tmp_path / "out"))
    again = score_file(str(written.weights), {"preset": "tiny", "data": str(data)}, str(tmp_path / "scored"))
    assert again["scores"]["adapted"]["miou"] == pytest.approx(scored)
    pictures = [str(path) for path in (data / "miniature").rglob("*leftImg8bit.png")][:1]
    done = predict(pictures, str(tmp_path / "pictures"), lambda made, total: None, run=str(folder))
    assert done.pictures == 1
