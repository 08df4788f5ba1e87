"""The target's class frequencies reach the stages of a run as they were asked for, or are refused."""

from dataclasses import replace

import numpy as np
import pytest

from actors.errors import RunError
from pipelines.class_frequencies import statistics_folder
from pipelines.options import AdaptOptions, PriorOptions
from pipelines.priors import Prior, write_prior
from pipelines.recipes.eplc import EplcOptions
from pipelines.setup import resolve


def options(tiny_folder, **more):
    defaults = {"preset": "tiny", "name": "run", "data": str(tiny_folder / "data"), "references": "never"}
    return AdaptOptions(**{**defaults, **more})


# Class frequencies of the target.


def stages_of(setup):
    """Name of every stage, and how its labels are adjusted: False where they are plain, None without any."""
    return [(s.name, None if s.labels is None else s.labels.prior is not None) for s in setup.plan.stages]


def test_labels_of_the_label_shift_system_are_adjusted_unless_somebody_says_otherwise(tiny_folder):
    def last(**more):
        return stages_of(resolve(options(tiny_folder, recipe="label_shift", **more)))[-1]

    assert last() == last(faithful=True) == last(adjust_prior="estimated") == ("self-distillation", True)
    assert last(adjust_prior="none") == ("self-distillation", False)
    assert stages_of(resolve(options(tiny_folder)))[-1] == ("self-training", False)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"recipe": "proda"}, [None, True, False, False]),
        ({"recipe": "eplc", "refresh": "once", "eplc": EplcOptions(rounds=2)}, [None, True, False]),
        ({"recipe": "meta_pseudo_labels"}, [None, True, False]),
        ({"recipe": "mrnet", "student_network": "bisenet18"}, [None, True]),
    ],
    ids=lambda given: given.get("recipe") if isinstance(given, dict) else "",
)
def test_only_the_first_labels_are_adjusted(tiny_folder, more, expected):
    """Networks that learned from them see the target's frequencies themselves."""
    found = stages_of(resolve(options(tiny_folder, adjust_prior="estimated", **more)))
    assert [adjusted for _, adjusted in found] == expected


def test_an_estimate_has_the_options_of_the_run_and_sees_source_images_where_it_needs_them(tiny_folder):
    def plan_of(**more):
        given = options(tiny_folder, adjust_prior="estimated", prior=PriorOptions(floor=0.3, damping=0.2, **more))
        ((_, plan),) = resolve(given).labels.items()
        return plan

    plan = plan_of()
    assert (plan.prior.target, plan.prior.method, plan.prior.floor, plan.prior.damping) == (None, "confusion", 0.3, 0.2)
    assert sum(plan.prior.source) == pytest.approx(1.0)
    setup = resolve(options(tiny_folder))
    assert plan.source.size == setup.preset.stages[-1].source_size
    assert len(plan.source) == len(setup.domains.source)
    assert plan_of(method="em").source is plan_of(method="counts").source is None
    assert plan_of(method="counts").prior.source != plan.prior.source, "shares of images"


def test_a_file_is_the_same_from_everywhere_and_a_table_stays_a_name(tiny_folder, tmp_path, monkeypatch):
    """A run can be resumed from anywhere."""
    names = resolve(options(tiny_folder, classes=16)).benchmark.classes.names
    write_prior(tmp_path / "mine.toml", Prior(names, (1 / 16,) * 16, tuple(np.arange(1.0, 17.0) / 136)))
    monkeypatch.chdir(tmp_path)
    setup = resolve(options(tiny_folder, classes=16, adjust_prior="mine.toml"))
    assert setup.options.adjust_prior == str(tmp_path / "mine.toml")
    (plan,) = setup.labels.values()
    assert plan.prior.target == pytest.approx(np.arange(1.0, 17.0) / 136)
    assert plan.source is None, "nothing is to be seen"
    setup = resolve(options(tiny_folder, classes=16, adjust_prior="synthia-original"))
    assert setup.options.adjust_prior == "synthia-original"
    assert resolve(options(tiny_folder, adjust_prior="estimated")).options.adjust_prior == "estimated"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"recipe": "mrnet"}, "would change nothing: recipe mrnet makes no pseudo labels; run.py evaluate and predict"),
        ({"pseudo_labels": "x.parquet"}, "would change nothing: --pseudo-labels are taken as they are. Leave it out"),
    ],
    ids=["no labels", "given labels"],
)
@pytest.mark.parametrize("wanted", ["estimated", "gta5-original"])
def test_class_frequencies_that_would_change_nothing_are_refused(tiny_folder, wanted, more, text):
    with pytest.raises(RunError, match=f"--adjust-prior {wanted} {text}"):
        resolve(options(tiny_folder, adjust_prior=wanted, **more))


def test_where_nobody_asked_for_them_labels_that_are_given_are_no_mistake(tiny_folder):
    given = options(tiny_folder, recipe="label_shift", pseudo_labels="x.parquet")
    assert stages_of(resolve(given))[-1] == ("self-distillation", False)


def test_a_run_that_begins_after_the_labels_that_are_adjusted_adjusts_none(tiny_folder):
    late = {"recipe": "proda", "from_stage": 3, "init": "whole.pth"}
    assert resolve(options(tiny_folder, **late), to_train=False).labels
    with pytest.raises(
        RunError, match=r"would change nothing: .* the first is adjusted, 2, and the run begins after it"
    ):
        resolve(options(tiny_folder, adjust_prior="estimated", **late), to_train=False)
    second = resolve(options(tiny_folder, adjust_prior="estimated", **{**late, "from_stage": 2}), to_train=False)
    assert [adjusted for _, adjusted in stages_of(second)] == [True, False, False]
    early = resolve(options(tiny_folder, adjust_prior="estimated", recipe="proda", to_stage=1))
    assert stages_of(early) == [("warm-up", None)], "the same options hold for a run's first part"


@pytest.mark.parametrize("wanted", ["nowhere.toml", "gta5"])
def test_class_frequencies_that_are_not_there_are_refused(tiny_folder, wanted):
    with pytest.raises(RunError, match=rf"there is no file {wanted} with class frequencies"):
        resolve(options(tiny_folder, adjust_prior=wanted))


def test_class_frequencies_of_other_classes_are_refused(tiny_folder):
    with pytest.raises(RunError, match="the classes of synthia-original are not those of the run"):
        resolve(options(tiny_folder, adjust_prior="synthia-original"))


# Classifier refinement.


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"recipe": "label_shift"}, ["source", "adversarial", "refinement", "self-distillation"]),
        ({"recipe": "eplc"}, ["alignment", "refinement", "self-training"]),
        ({"recipe": "proda"}, ["warm-up", "refinement", "denoising", "distillation 1", "distillation 2"]),
        ({"recipe": "mrnet"}, ["alignment", "refinement"]),
        ({"recipe": "eplc", "to_stage": 1}, ["alignment", "refinement"]),
        ({"recipe": "label_shift", "to_stage": 1}, ["source"]),
        ({"recipe": "eplc", "from_stage": 2, "init": "whole.pth"}, ["refinement", "self-training"]),
    ],
    ids=str,
)
def test_classifiers_are_refined_before_the_first_labels_which_are_then_plain(tiny_folder, more, expected):
    given = options(tiny_folder, adjust_prior="estimated", prior=PriorOptions(refine_steps=7), **more)
    found = resolve(given, to_train=False)
    assert [name for name, _ in stages_of(found)] == expected
    assert not any(adjusted for _, adjusted in stages_of(found))
    assert [stage.steps for stage in found.plan.stages if stage.name == "refinement"] == [7] * (
        "refinement" in expected
    )
    if found.makes is not None:
        assert found.makes.prior is None, "nor are those that are exported"


def test_refinement_comes_on_top_of_the_steps_and_is_the_default_systems_too(tiny_folder):
    plain = resolve(options(tiny_folder, recipe="label_shift", steps=40))
    refined = resolve(options(tiny_folder, recipe="label_shift", steps=40, prior=PriorOptions(refine_steps=7)))
    assert (plain.plan.total_steps, refined.plan.total_steps) == (40, 47)
    assert stages_of(refined)[2:] == [("refinement", None), ("self-distillation", False)]


def test_given_labels_may_follow_a_refinement(tiny_folder):
    given = {"pseudo_labels": "x.parquet", "adjust_prior": "estimated", "prior": PriorOptions(refine_steps=7)}
    assert [name for name, _ in stages_of(resolve(options(tiny_folder, **given)))] == [
        "alignment",
        "refinement",
        "self-training",
    ]


def test_a_run_that_begins_after_its_refinement_is_refused(tiny_folder):
    late = {"recipe": "proda", "from_stage": 3, "init": "whole.pth", "adjust_prior": "estimated"}
    with pytest.raises(RunError, match=r"refinement comes before stage 2, and --from-stage 3 is after that"):
        resolve(options(tiny_folder, **late, prior=PriorOptions(refine_steps=7)), to_train=False)


def test_the_network_that_is_refined_is_asked_what_it_sees_without_the_bonnet(tiny_folder):
    given = options(tiny_folder, adjust_prior="estimated", prior=PriorOptions(refine_steps=7, temperature=1.8))
    setup = resolve(given)
    survey = setup.plan.stages[1].objective.args[1]
    assert (survey.size, survey.temperature) == (setup.preset.label_views[-1], 1.8)
    assert survey.ignore_bottom == setup.labels[2].rule.ignore_bottom == setup.benchmark.bonnet > 0
    assert len(survey.source) == len(setup.domains.source)
    assert survey.reader.split.label_paths is None
    assert setup.survey(setup.benchmark.bonnet, None) == replace(survey, source=None)


# Counts of labels.


def test_without_a_cache_counts_of_labels_are_kept_nowhere(tiny_folder, tmp_path):
    assert statistics_folder(AdaptOptions(data=str(tmp_path), cache=False)) is None
    assert statistics_folder(AdaptOptions(data=str(tmp_path))) == tmp_path
