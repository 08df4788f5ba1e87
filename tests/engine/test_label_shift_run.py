"""Labels at the target's class frequencies through the whole engine: estimated live, surveyed once, gone on with."""

import json

import numpy as np
import pytest
from engine_runs import lines, losses, start_run

from pipelines.options import PriorOptions, read_config
from pipelines.predict import predict
from pipelines.rescore import rescore
from pipelines.run_prior import estimate_of_run

pytestmark = pytest.mark.slow
CLASSES = 19


@pytest.fixture(scope="module")
def live(local_ray, tmp_path_factory, tiny_folder):
    """Our default: two students, labels made again without end, their class frequencies followed meanwhile."""
    folder = tmp_path_factory.mktemp("live")
    return start_run(folder, tiny_folder, recipe="label_shift", benchmark="shift_only", students=2, steps=80).go()


def test_one_command_runs_all_stages_and_scores_each(live):
    assert [stage["name"] for stage in live.results["stages"]] == ["source", "adversarial", "self-distillation"]
    assert {"loss/segmentation", "loss/alignment", "discriminator/pixels"} <= set(losses(live.folder)[50])
    assert live.results["labels"]["read"] > 0


def test_the_estimate_follows_the_labels_and_stands_in_metrics_results_and_report(live):
    told = [line for line in lines(live.folder, "teachers") if "target_prior" in line]
    assert told
    assert {"prior_offset", "prior_shift"} <= set(told[-1])
    found = live.results["prior"]
    assert found["method"] == "confusion"
    assert len(found["target"]) == CLASSES
    assert sum(found["target"]) == pytest.approx(1.0)
    assert found["target"] != found["source"]
    assert "held to be on the target" in (live.folder / "report.html").read_text()


def test_its_network_is_scored_and_predicts_at_frequencies_that_are_estimated_with_it(live, tmp_path, tiny_folder):
    plain, adjusted = (rescore(read_config(live.folder), how) for how in ("none", "estimated"))
    assert plain["scores"]["adapted"]["miou"] == pytest.approx(live.results["scores"]["adapted"]["miou"])
    assert plain["prior"] is None
    assert adjusted["prior"]["from"] == "estimated"
    assert (live.folder / "evaluation" / "prior.toml").is_file()
    found = estimate_of_run(str(live.folder), "confusion", lambda done, images: None)
    assert found.prior.offset == pytest.approx(list(adjusted["prior"]["offset"].values()), abs=1e-6)
    assert found.truth.sum() == pytest.approx(1.0)
    pictures = [str(path) for path in (tiny_folder / "miniature").rglob("*leftImg8bit.png")][:1]
    done = predict(pictures, str(tmp_path), lambda made, total: None, run=str(live.folder), adjust_prior="estimated")
    assert done.pictures == 1


def test_a_stopped_run_goes_on_from_the_frequencies_that_it_had(local_ray, tmp_path, tiny_folder):
    options = {"recipe": "eplc", "adjust_prior": "estimated", "steps": 80}

    first = start_run(tmp_path, tiny_folder, **options)
    first.go(at_step=70, do=lambda run: run.interrupt())
    known = [line["target_prior"] for line in lines(tmp_path / "run", "teachers") if "target_prior" in line][-1]
    assert any(a != b for a, b in zip(known, first.setup.labels[1].prior.source, strict=True))
    second = start_run(tmp_path, tiny_folder, **options)
    before = len(lines(tmp_path / "run", "teachers"))
    second.go()
    later = lines(tmp_path / "run", "teachers")[before:]
    again = next(line["target_prior"] for line in later if "target_prior" in line)
    # Nearer to what was known than to where an estimate begins.
    source = np.array(second.setup.labels[1].prior.source)
    assert np.abs(np.array(again) - known).sum() < np.abs(source - known).sum()


def test_published_labels_are_surveyed_then_made_once_at_what_was_found(local_ray, tmp_path, tiny_folder):
    run = start_run(
        tmp_path, tiny_folder, recipe="label_shift", faithful=True, prior=PriorOptions(method="counts"), steps=60
    )
    done = run.go()
    told = [line["target_prior"] for line in lines(done.folder, "teachers") if "target_prior" in line]
    assert done.results["prior"]["method"] == "counts"
    assert done.results["prior"]["target"] != done.results["prior"]["source"]
    assert told[-1] == done.results["prior"]["target"]
    made = done.results["teachers"]["labels_made"]
    assert made == len(run.setup.domains.target), "labels of the survey are no one's"
    assert len(json.loads((done.folder / "network.json").read_text())["configs"]) == 2


def test_refinement_stands_before_the_labels_of_any_recipe(local_ray, tmp_path, tiny_folder):
    options = {"recipe": "eplc", "adjust_prior": "estimated", "prior": PriorOptions(refine_steps=10), "students": 2}
    done = start_run(tmp_path, tiny_folder, **options).go()
    assert [(stage["name"], stage["step"]) for stage in done.results["stages"]] == [
        ("alignment", 20),
        ("refinement", 30),
        ("self-training", 50),
    ]
    assert "loss/refinement" in losses(done.folder)[25]
    assert done.results["prior"] is None, "labels are left as they are"
