import json
from dataclasses import replace

import pytest

from pipelines.options import AdaptOptions
from pipelines.results import after_step, assemble, protocol_sentence, score_lines, write_json
from pipelines.setup import resolve

DESIGN = {
    "": "benchmark recipe data protocol scores gap_closed seconds student teachers label_age_steps seed versions",
    "protocol": "classes outputs label_size network views",
    "scores": "source_only adabn adapted oracle",
    "student": "images_per_s wait_share precision",
    "teachers": "images_per_s idle_share",
    "label_age_steps": "p50 p95 max",
}
EXTRAS = {
    "class_names",
    "stages",
    "steps",
    "labels",
    "skipped",
    "label_free",
    "target_labels",
    "run",
    "trainable_teacher",
    "prior",
}
STUDENT = {
    "images_per_s": 10.0,
    "seconds": 12.0,
    "wait_share": 0.001,
    "data_wait_share": 0.2,
    "precision": "float32",
    "labels_read": 7,
    "labels_missing": 1,
    "label_age_steps": {"p50": 1, "p95": 2, "max": 3},
    "skipped": [],
}
TEACHERS = {"images_per_s": 3.0, "idle_share": 0.1, "labels_made": 8, "teacher_failures": 0, "coverage": 1.0}
FREE = {"entropy": 0.4, "recommended": 30, "recommended_score": None}


@pytest.fixture(scope="module")
def setup(tiny_folder):
    data = tiny_folder / "data"
    data.mkdir(exist_ok=True)
    return resolve(AdaptOptions(preset="tiny", name="run", runs=str(tiny_folder / "runs"), data=str(data)))


def score(miou):
    return {"miou": miou, "per_class": [miou] * 19, "protocols": {"16": miou, "13": miou + 1}, "images": 8}


def results(setup, **scores):
    return assemble(
        setup, {name: score(v) for name, v in scores.items()}, STUDENT, TEACHERS, {"adapt": 1.234}, label_free=FREE
    )


def test_a_result_says_what_was_decided_for_it(setup):
    ours = results(setup, adapted=30.0)["run"]
    assert (ours["preset"], ours["faithful"], ours["init"], ours["refresh"]) == ("tiny", False, None, "continuous")
    assert [stage["name"] for stage in ours["stages"]] == ["alignment", "self-training"]
    assert ours["options"]["eplc"]["selection"] == "percentile"
    assert ours["rates"] == setup.preset.rates
    assert ours["asked"] == {"hard_pixels": None, "rare_weight": None, "norm_affine": "auto"}
    few = tuple(replace(stage, norm_images=3) for stage in setup.plan.stages)
    chunked = results(replace(setup, plan=replace(setup.plan, stages=few)), adapted=30.0)["run"]
    assert [stage["norm_images"] for stage in chunked["stages"]] == [3, 3]
    theirs = results(resolve(replace(setup.options, faithful=True)), adapted=30.0)["run"]
    assert theirs["options"]["eplc"]["selection"] == "mean"
    assert theirs["options"]["mrnet"]["teacher"] == "student"
    json.dumps(theirs)


def test_every_stage_has_the_score_after_its_last_step_and_the_last_one_that_of_the_run(setup):
    found = results(setup, **{after_step(20): 21.0, "adapted": 30.0})
    assert [(stage["name"], stage["step"], stage["miou"]) for stage in found["stages"]] == [
        ("alignment", 20, 21.0),
        ("self-training", 40, 30.0),
    ]
    assert after_step(20) not in found["scores"]
    assert [stage["name"] for stage in results(setup, adapted=30.0)["stages"]] == ["self-training"]
    assert results(setup)["stages"] == []


def test_a_score_stands_with_all_that_decides_it(setup):
    found = results(setup, adapted=30.0)
    assert score_lines(found) == [
        "mIoU16 = 30.0 (ema, 128×64, label size 128×64)",
        "mIoU13 = 31.0 (ema, 128×64, label size 128×64)",
    ]
    views = [[1024, 512, False], [1024, 512, True], [1280, 640, False], [1280, 640, True]]
    found["protocol"] |= {"network": "student", "label_size": [2048, 1024], "views": views}
    assert score_lines(found)[0] == "mIoU16 = 30.0 (student, 1280×640 + TTA, label size 2048×1024)"
    assert "adapted = student network at the last step" in protocol_sentence(found["protocol"])
    assert "weights GTA5_7.pth" in protocol_sentence({**found["protocol"], "network": "GTA5_7.pth"})


def test_sixteen_classes_of_sixteen_outputs_are_told_from_those_of_nineteen(setup):
    own = resolve(replace(setup.options, classes=16))
    for run, outputs in ((setup, 19), (own, 16)):
        found = results(run, adapted=30.0)["protocol"]
        assert (found["classes"], found["outputs"]) == (16, outputs)
        assert protocol_sentence(found).startswith(f"16 classes of {outputs} outputs; adapted = ema network")
    del found["outputs"]  # as earlier versions wrote it
    assert protocol_sentence(found).startswith("16 classes; adapted = ema network")


def test_the_result_has_the_keys_of_the_design(setup):
    found = results(setup, source_only=20.0, adabn=22.0, adapted=30.0, oracle=40.0)
    assert set(found) == set(DESIGN[""].split()) | EXTRAS
    for key, names in DESIGN.items():
        assert set(names.split()) <= set(found[key] if key else found)
    assert set(found["scores"]) == set(DESIGN["scores"].split())
    assert found["gap_closed"] == pytest.approx(0.5)
    assert found["data"] == "miniature"
    assert found["protocol"] == {
        "classes": 16,
        "outputs": 19,
        "label_size": [128, 64],
        "network": "ema",
        "views": [[128, 64, False]],
    }
    assert json.loads(json.dumps(found)) == found


def test_without_references_there_is_no_gap(setup):
    found = results(setup, adapted=30.0)
    assert found["gap_closed"] is None
    assert found["scores"]["oracle"] is found["scores"]["source_only"] is None


def test_without_target_labels_there_is_no_gap(setup):
    assert results(setup, adapted=30.0, source_only=20.0, adabn=21.0)["gap_closed"] is None


def test_the_faithful_run_is_scored_as_the_student(setup):
    faithful = resolve(replace(setup.options, faithful=True))
    assert results(faithful, adapted=30.0)["protocol"]["network"] == "student"


def test_json_appears_completely_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_number_of_steps_is_what_was_asked_for(setup):
    """Also for a recipe that has one stage only."""
    for name in ("eplc", "mrnet"):
        asked = resolve(replace(setup.options, recipe=name, steps=30))
        assert asked.plan.total_steps == 30
        assert {plan.total_steps for plan in asked.references.values()} == {30}


def test_the_plan_knows_its_labels_and_references(setup):
    assert set(setup.labels) == {1}
    assert set(setup.references) == {"source_only", "oracle"}
    assert setup.label_rows() == {1: 24 // 4}
    assert len(setup.target_reader) == 24
    assert not resolve(replace(setup.options, references="never")).references


PRIOR = {"target_prior": [0.05] * 18 + [0.1], "prior_shift": 0.25, "prior_offset": [0.1] * 19}


def test_the_class_frequencies_that_labels_were_last_adjusted_to_are_part_of_the_result(setup, tmp_path):
    adjusted = resolve(replace(setup.options, adjust_prior="estimated"))
    teachers = TEACHERS | PRIOR
    found = assemble(adjusted, {"adapted": score(30.0)}, STUDENT, teachers, {}, label_free=FREE)["prior"]
    (plan,) = (labels.prior for labels in adjusted.labels.values())
    assert found == {
        "method": "confusion",
        "source": list(plan.source),
        "target": PRIOR["target_prior"],
        "shift": 0.25,
    }
    known = resolve(replace(setup.options, classes=16, adjust_prior="synthia-original"))
    found = assemble(known, {"adapted": score(30.0)}, STUDENT, teachers, {}, label_free=FREE)["prior"]
    assert found["method"] == "synthia-original"
    assert json.loads(json.dumps(found)) == found


def test_without_adjusted_labels_the_result_names_no_class_frequencies(setup):
    assert results(setup, adapted=30.0)["prior"] is None
    silent = resolve(replace(setup.options, adjust_prior="estimated"))
    assert assemble(silent, {}, STUDENT, TEACHERS, {}, label_free=FREE)["prior"] is None, "no bank spoke of them"
