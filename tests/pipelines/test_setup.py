"""A run is resolved, or refused, before any process is started."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.errors import RunError
from pipelines.benchmarks import benchmark
from pipelines.class_frequencies import statistics_folder
from pipelines.datasets.dataset import DataError
from pipelines.options import AdaptOptions
from pipelines.recipes import recipe
from pipelines.recipes.mrnet import MrnetOptions
from pipelines.setup import resolve, sized_preset
from pipelines.streams import ClassAwareOrder
from tests.own_data import write_own_data


def options(tiny_folder, **more):
    defaults = {"preset": "tiny", "name": "run", "data": str(tiny_folder / "data"), "references": "never"}
    return AdaptOptions(**{**defaults, **more})


def test_every_number_of_students_that_there_may_be_shares_every_batch_evenly(tiny_folder):
    resolve(options(tiny_folder, students=2, min_students=1))
    with pytest.raises(RunError, match=r"batches of 4, which 3 students .* divides 4 and whose every number from"):
        resolve(options(tiny_folder, students=4, min_students=2, batch=4))


def test_a_label_may_be_as_old_as_a_pass_over_the_target_images_unless_asked_otherwise(tiny_folder):
    setup = resolve(options(tiny_folder))
    assert setup.label_age == len(setup.domains.target) // 2 == 12
    assert resolve(options(tiny_folder, max_teachers=2, label_age=5)).label_age == 5
    assert resolve(options(tiny_folder, recipe="mrnet")).label_age is None


@pytest.mark.parametrize(("students", "divides"), [(1, True), (2, True), (3, False), (4, False)])
def test_students_share_every_batch_evenly_or_are_refused(tiny_folder, students, divides):
    given = options(tiny_folder, students=students)
    if divides:
        assert all(stage.batch % students == 0 for stage in resolve(given).plan.stages)
        return
    with pytest.raises(RunError, match=rf"batches of 2, which {students} students .* --students that divides 2"):
        resolve(given)


@pytest.mark.parametrize(("recipe", "total"), [("eplc", 10), ("mrnet", 10), ("mrnet", 1)])
def test_a_run_is_as_long_as_it_was_asked_to_be_whatever_its_recipe_runs(tiny_folder, recipe, total):
    given = options(tiny_folder, recipe=recipe, steps=total, references="always")
    setup = resolve(given)
    assert setup.plan.total_steps == total
    assert {plan.total_steps for plan in setup.references.values()} == {total}


@pytest.mark.parametrize(("faithful", "refresh"), [(False, "continuous"), (True, "once")])
def test_the_published_system_labels_once(tiny_folder, faithful, refresh):
    (plan,) = resolve(options(tiny_folder, faithful=faithful)).labels.values()
    assert plan.policy.refresh == refresh


@pytest.mark.parametrize(("classes", "protocols"), [(16, ["16", "13"]), (13, ["13"])])
def test_a_network_may_have_as_many_outputs_as_proda_trains_on_synthia(tiny_folder, classes, protocols):
    setup = resolve(options(tiny_folder, classes=classes))
    assert setup.plan.network().layer6.classifier.weight.shape[0] == classes
    assert [*setup.benchmark.protocols] == protocols
    for split in (setup.domains.source, setup.domains.validation):
        found = {int(value) for index in range(len(split)) for value in np.unique(split.label(index))}
        assert found - {255} <= set(range(classes))
        assert len(found) > 5
    assert len(resolve(options(tiny_folder)).benchmark.classes) == len(
        resolve(options(tiny_folder, classes=19)).benchmark.classes
    )


@pytest.mark.parametrize(("bench", "classes"), [("city2robot", 16), ("synthia2city", 9), ("gta2city", 0)])
def test_a_number_of_classes_that_a_benchmark_does_not_have_is_refused_before_it_is_rendered(tmp_path, bench, classes):
    with pytest.raises(DataError, match=rf"{bench} cannot have {classes} classes: .* Ask for"):
        resolve(AdaptOptions(benchmark=bench, classes=classes, data=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_several_blocks_fall_to_every_teacher(tiny_folder):
    setup = resolve(options(tiny_folder, teachers=2))
    (rows,) = setup.label_rows().values()
    assert len(setup.domains.target) // rows >= 8


UNPICKLE = """
import pickle, sys
import numpy as np
plan, expected = pickle.load(sys.stdin.buffer)
histogram = np.arange(plan.rule.num_classes * 256).reshape(-1, 256)
assert (plan.selection is None) == (expected is None)
if expected is not None:
    assert plan.selection.thresholds(histogram).tolist() == expected
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("adjust_prior", ["none", "estimated"])
@pytest.mark.parametrize("faithful", [False, True])
def test_the_banks_part_of_a_label_plan_needs_no_torch(tiny_folder, faithful, adjust_prior):
    """An actor unpickles its arguments before anything else, and torch costs it seconds."""
    given = options(tiny_folder, recipe="eplc", faithful=faithful, adjust_prior=adjust_prior)
    (plan,) = resolve(given).labels.values()
    light, expected = plan.for_bank(), None
    if light.selection is not None:
        histogram = np.arange(plan.rule.num_classes * 256).reshape(-1, 256)
        expected = light.selection.thresholds(histogram).tolist()
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLE],
        input=pickle.dumps((light, expected)),
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        check=True,
    )
    loaded = done.stdout.decode().split()
    assert "torch" not in loaded
    assert {"actors", "numpy"} <= set(loaded)


def test_a_name_with_a_slash_makes_no_deeper_folder(tmp_path):
    source, target = write_own_data(tmp_path)
    text = Path(target).read_text()
    Path(target).write_text('name = "day/night [1]"\n' + text)
    named = resolve(AdaptOptions(source=source, target=target, data=str(tmp_path)))
    assert named.options.name.startswith("source2day-night-1--eplc-s0-")


@pytest.fixture
def weights(tiny_folder, tmp_path):
    """Files of a whole network and of a backbone alone, and options of runs that start from them."""
    plain = AdaptOptions(preset="tiny", data=str(tiny_folder / "data"))
    state = resolve(plain).plan.network().state_dict()
    torch.save(state, tmp_path / "whole.pth")
    backbone = {f"Scale.{k}": v for k, v in state.items() if k.split(".")[0] not in ("layer5", "layer6")}
    torch.save(backbone, tmp_path / "backbone.pth")
    return lambda name, **more: replace(plain, init=str(tmp_path / f"{name}.pth"), **more)


def test_references_start_from_the_same_backbone_and_there_are_none_beside_a_whole_network(weights):
    setup = resolve(weights("backbone"))
    networks = [plan.network() for plan in (setup.plan, *setup.references.values())]
    for plan, network in zip((setup.plan, *setup.references.values()), networks, strict=True):
        plan.initial(network)
    assert len(networks) == 3
    first, *others = (network.layer4[0].conv2.weight for network in networks)
    assert all(torch.equal(first, other) for other in others)
    assert resolve(weights("whole")).references == {}
    with pytest.raises(RunError, match="neither of them what it is called"):
        resolve(weights("whole", references="always"))


def test_a_run_may_begin_with_its_second_stage_where_it_has_the_weights_of_the_first(weights):
    whole = resolve(weights("whole", from_stage=2))
    assert [stage.name for stage in whole.plan.stages] == ["self-training"]
    assert set(whole.labels) == {0}
    with pytest.raises(RunError, match=r"--from-stage 2 needs a whole network; .*backbone\.pth is a backbone alone"):
        resolve(weights("backbone", from_stage=2))
    with pytest.raises(RunError, match="--from-stage is 3, but recipe eplc has 2 stages"):
        resolve(weights("whole", from_stage=3))
    with pytest.raises(RunError, match="needs --init"):
        AdaptOptions(from_stage=2)
    with pytest.raises(RunError, match="stages are counted from 1"):
        AdaptOptions(from_stage=0)


def test_a_run_may_end_with_an_earlier_stage(weights):
    first = resolve(weights("backbone", to_stage=1))
    assert [stage.name for stage in first.plan.stages] == ["alignment"]
    assert first.labels == {}
    with pytest.raises(RunError, match="--to-stage is 3, but recipe eplc has 2 stages"):
        resolve(weights("backbone", to_stage=3))
    with pytest.raises(RunError, match="--to-stage is 1, before --from-stage 2; no stage would run"):
        weights("whole", from_stage=2, to_stage=1)


def test_held_out_source_images_are_scored_in_one_view(tiny_folder):
    plain = AdaptOptions(preset="tiny", data=str(tiny_folder))
    assert resolve(plain).make_source_scorer() is None
    held = resolve(replace(plain, held_out=4))
    scorer = held.make_source_scorer()(torch.device("cpu"))
    assert len(scorer.reader) == len(held.domains.held_out) == 4
    assert scorer.views == (held.preset.stages[-1].source_size,)
    with pytest.raises(RunError, match="--held-out is -1"):
        replace(plain, held_out=-1)


def test_weights_of_another_network_are_refused_before_anything_starts(weights):
    with pytest.raises(RunError, match=r"whole\.pth: the checkpoint belongs to another network"):
        resolve(weights("whole", recipe="proda"))


@pytest.mark.parametrize(
    ("name", "bench", "batches", "rates", "steps", "label"),
    [
        ("eplc", "gta2city", (2, 9), (2e-4, 1e-4), (25_000, 100_000), (2048, 1024)),
        ("rectified", "gta2city", (2, 9), (2e-4, 1e-4), (25_000, 50_000), (2048, 1024)),
        ("rectified", "synthia2city", (1, 5), (1e-4, 1e-4), (25_000, 50_000), (2048, 1024)),
        ("rectified", "city2robot", (2, 9), (2e-4, 1e-4), (25_000, 50_000), (1280, 960)),
    ],
)
def test_schedule_and_label_size_of_the_published_runs(name, bench, batches, rates, steps, label):
    """Methods 3.1 to 4.2."""
    full = sized_preset(AdaptOptions(preset="full", faithful=True), benchmark(bench), recipe(name))
    assert tuple(stage.batch for stage in full.stages) == batches
    assert tuple(stage.learning_rate for stage in full.stages) == rates
    assert tuple(stage.steps for stage in full.stages) == steps
    assert {stage.horizon for stage in full.stages} == {100_000}
    assert full.label_size == label


def test_bisenets_published_labels_are_as_large_as_what_it_sees():
    """Methods 6.2: 1024x512."""
    given = AdaptOptions(preset="full", faithful=True, recipe="meta_pseudo_labels")
    full = sized_preset(given, benchmark("gta2city"), recipe("meta_pseudo_labels"))
    assert full.label_size == (1024, 512)
    assert (full.score_views, full.score_labels, full.score_mirrored) == (((1024, 512),), (1024, 512), False)
    assert full.network.pixels == "bgr_city"


def test_labels_are_as_large_as_their_images_unless_asked_otherwise():
    def size(**given):
        return sized_preset(AdaptOptions(preset="full", **given), benchmark("gta2city"), recipe("eplc")).label_size

    assert size() == (1024, 512)
    assert size(faithful=True, label_scale=0.5) == (512, 256)


def test_options_of_stage_one_reach_it_in_every_recipe(tiny_folder):
    folders = {"runs": str(tiny_folder / "runs"), "data": str(tiny_folder / "data")}
    for name in ("mrnet", "rectified", "eplc"):
        given = AdaptOptions(preset="tiny", recipe=name, name="one", mrnet=MrnetOptions(dropout=0.35), **folders)
        assert resolve(given).plan.stages[0].dropout == 0.35


def test_every_learning_rate_is_scaled_alike_and_that_of_the_references_too(tiny_folder):
    folders = {"runs": str(tiny_folder / "runs"), "data": str(tiny_folder / "data")}
    given = AdaptOptions(preset="tiny", name="rates", **folders)
    plain, scaled = resolve(given), resolve(replace(given, rate_scale=2.0))
    for one, two in (
        (plain.plan, scaled.plan),
        *((plain.references[n], scaled.references[n]) for n in plain.references),
    ):
        for before, after in zip(one.stages, two.stages, strict=True):
            assert after.learning_rate(3) == pytest.approx(2 * before.learning_rate(3))


def test_rates_are_the_presets_unless_they_are_asked_for(tiny_folder):
    given = AdaptOptions(preset="tiny", data=str(tiny_folder / "data"))
    assert resolve(given).preset.rates == "published"
    for plan in (
        resolve(replace(given, rates="flat")).plan,
        *resolve(replace(given, rates="flat")).references.values(),
    ):
        assert {group["lr_scale"] for group in plan.stages[-1].optimiser(plan.network()).param_groups} == {1.0}


# Streams by class.


def test_source_images_of_the_label_shift_system_are_drawn_by_class(tiny_folder):
    setup = resolve(options(tiny_folder, recipe="label_shift"))
    orders = [stage.streams["source"].order for stage in setup.plan.stages[:2]]
    assert [type(order) for order in orders] == [ClassAwareOrder] * 2
    assert orders[0].images == len(setup.domains.source)
    assert (statistics_folder(setup.options) / "statistics").is_dir(), "counted once"
