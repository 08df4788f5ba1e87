import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.checkpoints import snapshot
from actors.errors import RunError
from actors.protocols import Batch, ObjectiveContext, StepInfo
from actors.staleness import StalenessPolicy
from models.losses import memory_regularisation, negative_terms, rectified_terms
from models.networks.deeplab import DeepLab, DeepLabConfig, Logits, upsample_logits
from pipelines.benchmarks import benchmark
from pipelines.recipes import RECIPES, recipe
from pipelines.recipes.eplc import EplcOptions
from pipelines.recipes.few_labels import FewLabelsObjective, with_few_labels
from pipelines.recipes.mrnet import AlignmentObjective, MrnetOptions
from pipelines.recipes.optimisation import sgd
from pipelines.recipes.recipe import Ingredients, preset
from pipelines.recipes.rectified import RectifiedOptions
from pipelines.recipes.self_training import SelfTrainingObjective, _unpacked
from pipelines.recipes.supervised import SegmentationTerm, SupervisedObjective, reference_stages, segmentation_term
from pipelines.views import class_mix

CLASSES = 5
CROP = (32, 24)
TERM = SegmentationTerm(CLASSES, small_class_pixels=6)
CONTEXT = ObjectiveContext(torch.device("cpu"), lambda value: value, lambda parameters: None)
CONFIG = DeepLabConfig(
    num_classes=CLASSES,
    layers=(1, 1, 1, 1),
    width=4,
    branch_channels=8,
    bottleneck_channels=16,
    groups=4,
    dilations=(1, 2),
)


class Opener:
    """Remembers what a recipe asked for."""

    def __init__(self, name):
        self.name, self.asked = name, []

    def __call__(self, size, view):
        self.asked.append((size, view))
        return (self.name, size, view)


def ingredients(size, bench="gta2city", **more):
    pair = benchmark(bench)
    defaults = {
        "preset": preset(size, pair),
        "num_classes": len(pair.classes.names),
        "seed": 3,
        "bonnet": pair.bonnet,
        "sure": pair.sure,
        "faithful": False,
        "refresh": "continuous",
        "source": Opener("source"),
        "by_class": Opener("by class"),
        "target": Opener("target"),
        "target_labelled": None,
    }
    return Ingredients(**{**defaults, **more})


def stages(name, options, **more):
    return recipe(name).stages(ingredients("full", **more), options)


def test_the_published_schedule_of_stage_one():
    (stage,) = stages("mrnet", MrnetOptions())
    assert (stage.steps, stage.batch) == (25_000, 2)
    for step, rate in ((0, 2.0e-5), (5_000, 1.90977e-4), (24_999, 1.54378e-4)):
        assert stage.learning_rate(step) == pytest.approx(rate, rel=1e-4)
    assert stage.learning_rate(50_000) == pytest.approx(1.07177e-4, rel=1e-4)
    assert stage.dropout == 0.1


def test_the_published_schedule_of_stage_two():
    first, second = stages("eplc", EplcOptions())
    assert (first.steps, second.steps, second.batch) == (25_000, 50_000, 9)
    assert second.learning_rate(0) == pytest.approx(1.0e-5)
    assert second.learning_rate(25_000) == pytest.approx(1e-4 * 0.75**0.9)
    assert second.dropout == 0.2


@pytest.mark.parametrize(
    ("bench", "source", "target", "second", "values"),
    [
        ("gta2city", (1280, 720), (1024, 512), (1280, 640), 10),
        ("synthia2city", (1280, 720), (1024, 512), (1280, 720), 10),
        ("city2robot", (1280, 720), (1280, 960), (1280, 960), 4),
    ],
)
def test_the_published_views(bench, source, target, second, values):
    """Sizes, crops, jitter and mirror of methods 2.4."""
    first, last = stages("eplc", EplcOptions(), bench=bench)
    assert first.streams["source"][1] == source
    assert first.streams["target"][1] == target
    assert last.streams["target"][1] == second
    view = first.streams["source"][2]
    assert (view.crop, view.flip, view.more_than_values) == ((1024, 512), 0.5, 10)
    view = first.streams["target"][2]
    assert (view.crop, view.flip, view.jitter, view.more_than_values) == ((1024, 512), 0.0, (1.0, 1.0), 0)
    view = last.streams["target"][2]
    assert (view.crop, view.flip, view.jitter, view.more_than_values) == ((512, 256), 0.5, (0.8, 1.2), values)


@pytest.mark.parametrize(("bench", "jitter"), [("gta2city", (0.8, 1.2)), ("city2robot", (1.0, 1.0))])
def test_only_rendered_sources_are_jittered_in_stage_one(bench, jitter):
    """Methods 2.4: Cityscapes as a source is resized to 1280x720, fixed."""
    (stage,) = stages("mrnet", MrnetOptions(), bench=bench)
    assert stage.streams["source"][2].jitter == jitter


@pytest.mark.parametrize(
    ("bench", "label", "labelled", "scored"),
    [
        ("gta2city", (1024, 512), ((1024, 512), (1280, 640)), ((1024, 512), (1280, 640))),
        ("city2robot", (1280, 960), ((1280, 960), (1600, 1200)), ((1280, 960), (1024, 768))),
    ],
)
def test_the_published_label_and_score_views(bench, label, labelled, scored):
    full = preset("full", benchmark(bench))
    assert (full.label_size, full.label_views, full.score_views) == (label, labelled, scored)
    assert full.score_mirrored
    assert full.network == DeepLabConfig(num_classes=9 if bench == "city2robot" else 19)


def test_the_published_weights():
    given = MrnetOptions()
    assert (given.adversarial_aux, given.adversarial_main, given.memory) == (2e-4, 1e-3, 0.1)
    assert (given.gradient_penalty, given.discriminator_rate) == (0.01, 1e-4)
    term = stages("eplc", EplcOptions(), faithful=True)[0].objective(CONTEXT).term
    assert (term.max_value, term.small_class_pixels) == (7.0, 4096)
    rule = stages("eplc", EplcOptions(selection="std"))[1].labels.rule
    assert (rule.passes, rule.dropout, rule.threshold, rule.max_std) == (5, 0.1, 0.8, 0.05)


@pytest.mark.parametrize(("faithful", "percentile"), [(True, 80.0), (False, 0.0)])
def test_every_supervised_term_of_a_run_keeps_the_same_pixels(faithful, percentile):
    """Or the references would measure another gap than the recipe closes."""
    given = ingredients("mini", faithful=faithful, target_labelled=Opener("labelled"))
    every = [
        *recipe("eplc").stages(given, EplcOptions()),
        *recipe("mrnet").stages(given, MrnetOptions()),
        *reference_stages(given, "source", 10),
        *reference_stages(given, "target", 10),
    ]
    assert [stage.objective(CONTEXT).term.hard_percentile for stage in every] == [percentile] * 5


def test_mining_and_rare_classes_have_switches_that_hold_with_faithful_and_in_the_references():
    for faithful in (False, True):
        given = ingredients("mini", faithful=faithful, refresh="once", hard_pixels=50.0, rare_weight=3.0)
        every = [*recipe("eplc").stages(given, EplcOptions()), *reference_stages(given, "source", 10)]
        terms = [stage.objective(CONTEXT).term for stage in every]
        assert [(term.hard_percentile, term.max_value) for term in terms] == [(50.0, 3.0)] * 3
    learned_from_all = segmentation_term(ingredients("mini", faithful=True, hard_pixels=0.0))
    assert (learned_from_all.hard_percentile, learned_from_all.max_value) == (0.0, 7.0)


@pytest.mark.parametrize(
    ("faithful", "asked", "learn"),
    [(False, "auto", True), (True, "auto", False), (True, "train", True), (False, "freeze", False)],
)
def test_norm_scales_learn_in_stage_one_unless_published_or_asked_otherwise(faithful, asked, learn):
    (stage,) = stages("mrnet", MrnetOptions(), faithful=faithful, norm_affine=asked)
    network = DeepLab(CONFIG)
    optimised = {id(p) for group in stage.optimiser(network).param_groups for p in group["params"]}
    assert (id(network.layer1[0].bn1.weight) in optimised) == learn


def test_full_size_keeps_the_published_rates_and_a_random_network_learns_alike_everywhere():
    net = DeepLab(DeepLabConfig.small(19))
    scales = {
        name: [
            group["lr_scale"]
            for group in sgd(preset(name, benchmark("gta2city")), train_norm_affine=True)(net).param_groups
        ]
        for name in ("full", "mini")
    }
    assert scales == {"full": [1.0, 3.0, 4.0, 10.0], "mini": [1.0, 1.0, 1.0, 1.0]}


def test_references_decay_as_far_as_the_last_stage():
    given = ingredients("mini", target_labelled=Opener("labelled"))
    last = recipe("eplc").stages(given, EplcOptions())[-1]
    (alone,) = reference_stages(given, "source", 1100)
    share = last.learning_rate(last.steps) / last.learning_rate.base
    assert alone.learning_rate(1100) / alone.learning_rate.base == pytest.approx(share, rel=0.01)


def test_source_and_mixed_images_pass_the_network_as_one_batch():
    net, seen = network(), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    given = batch()
    rectified().losses(net, given, info())
    assert seen == [2 * len(given.target)]


def test_small_classes_are_those_of_stage_one_in_both_stages_and_scale_with_its_crop():
    """Stage II has the class weights of stage I, though its crops are smaller (methods 3.3)."""
    for stage in stages("eplc", EplcOptions()):
        assert stage.objective(CONTEXT).term.balance(CONTEXT).small_class_pixels == 4096
    half = segmentation_term(ingredients("full", preset=preset("full", benchmark("gta2city")).with_scale(0.5)))
    assert half.small_class_pixels == 1024


def test_the_faithful_run_is_the_published_one():
    first, second = stages("eplc", EplcOptions(), faithful=True)
    assert (first.ema_decay, first.statistics) == (None, "running")
    assert (second.ema_decay, second.statistics) == (None, "running")
    assert set(second.streams) == {"target"}
    assert second.labels.selection is None
    assert second.labels.rule.keep == "mean"
    view = second.streams["target"][2]
    assert view.colour == 0.0
    assert second.labels.rule.ignore_bottom == 0.0


def test_the_cameras_own_bonnet_is_left_out_where_there_is_one():
    def rule(options, **more):
        return stages("eplc", options, **more)[1].labels.rule

    assert rule(EplcOptions()).ignore_bottom == 0.23
    assert rule(EplcOptions(), bonnet=0.0).ignore_bottom == 0.0
    assert rule(EplcOptions(ignore_bottom=0.1)).ignore_bottom == 0.1


@pytest.mark.parametrize(("classes", "values"), [(2, 1), (3, 1), (9, 4), (13, 6), (16, 8), (19, 10), (40, 10)])
def test_a_crop_of_few_classes_need_not_show_many(classes, values):
    stage = stages("eplc", EplcOptions(), num_classes=classes)[1]
    assert stage.streams["target"][2].more_than_values == values


def test_the_fewest_pixels_of_a_percentile_scale_with_the_labels_area():
    selection = stages("eplc", EplcOptions())[1].labels.selection
    assert selection.min_pixels == 1024 * 512 // 288
    small = recipe("eplc").stages(ingredients("mini"), EplcOptions())[1].labels.selection
    assert small.min_pixels == 100


def test_a_preset_at_another_batch_and_image_size():
    mini = preset("mini", benchmark("synthia2city")).with_batch(1).with_scale(2)
    first, second = mini.stages
    assert (first.batch, second.batch) == (1, 1)
    assert (second.source_size, second.target_size, second.crop) == ((480, 270), (480, 240), (384, 192))
    assert (mini.label_size, mini.score_views, mini.label_views) == (
        (480, 240),
        ((480, 240),),
        ((384, 192), (480, 240)),
    )


def test_what_a_user_leaves_open_is_ours_or_the_published_choice_and_what_is_asked_for_holds():
    ours, theirs = EplcOptions().resolved(False), EplcOptions().resolved(True)
    assert (ours.selection, ours.mixing, ours.source_weight, ours.teacher) == ("percentile", "classes", 1.0, "average")
    assert (theirs.selection, theirs.mixing, theirs.source_weight, theirs.teacher) == ("mean", "none", 0.0, "student")
    assert (ours.class_weights, ours.min_class, ours.colour) == ("normalised", "tested", 0.3)
    assert (theirs.class_weights, theirs.min_class, theirs.colour) == ("published", "lowest", 0.0)
    asked = EplcOptions(selection="percentile", min_class="tested", negative=1.0, statistics="target", colour=0.2)
    found = asked.resolved(True)
    for name in ("selection", "min_class", "negative", "statistics", "colour"):
        assert getattr(found, name) == getattr(asked, name)


def test_every_option_that_is_left_open_is_decided():
    for options in (EplcOptions(), RectifiedOptions(), MrnetOptions()):
        for faithful in (False, True):
            found = options.resolved(faithful)
            assert all(getattr(found, name) != "auto" for name in vars(found))
            assert all(getattr(found, name) is not None for name in ("source_weight", "colour") if hasattr(found, name))


@pytest.mark.parametrize(("bench", "published"), [("gta2city", [1, 3]), ("synthia2city", [1, None])])
def test_batch_norm_sees_what_a_device_of_the_published_runs_held(bench, published):
    def images(**more):
        return [stage.norm_images for stage in stages("eplc", EplcOptions(), bench=bench, **more)]

    assert images(faithful=True) == published
    assert images() == [None, None]
    assert images(faithful=True, norm_images=2) == [2, 2]


@pytest.mark.parametrize("name", ["teacher", "statistics"])
def test_stage_one_publishes_what_it_is_told(name):
    value = {"teacher": "student", "statistics": "running"}[name]
    (stage,) = stages("mrnet", MrnetOptions(**{name: value}))
    assert (stage.ema_decay is None) == (name == "teacher")
    assert stage.statistics == ("running" if name == "statistics" else "target")


@pytest.mark.parametrize(
    "bad",
    [
        {"keep_share": 0.0},
        {"keep_share": 1.1},
        {"passes": 0},
        {"label_dropout": 1.0},
        {"mixing": "classes", "source_weight": 0.0},
        {"threshold": 80.0},
        {"threshold": -0.1},
        {"max_std": -0.1},
        {"sure": 2.0},
        {"dropout": 1.5},
        {"source_weight": -1.0},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_anything_starts(bad):
    """Inside a teacher or the bank they would fail at every call, and nobody would say so."""
    with pytest.raises(RunError, match=next(iter(bad))):
        EplcOptions(**bad)


@pytest.mark.parametrize("bad", [{"dropout": 1.0}, {"discriminator_rate": -1.0}], ids=str)
def test_impossible_options_of_stage_one_are_refused(bad):
    with pytest.raises(RunError, match=next(iter(bad))):
        MrnetOptions(**bad)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(RunError, match="unknown recipe 'magic'; known are eplc, rectified, mrnet"):
        recipe("magic")
    with pytest.raises(RunError, match="no preset 'huge'; known are full, mini, tiny"):
        preset("huge", benchmark("gta2city"))
    assert all(name == item.name for name, item in RECIPES.items())


@pytest.mark.parametrize("total", [2, 3, 10, 1200, 75_000])
def test_another_length_keeps_every_share(total):
    full = preset("full", benchmark("gta2city"))
    short = full.with_steps(total)
    assert short.total_steps == total
    assert all(stage.steps >= 1 for stage in short.stages)
    assert all(stage.horizon >= stage.steps for stage in short.stages)
    assert short.stages[0].steps == max(1, round(total / 3))
    assert short.stages[1].warmup == round(5_000 * total / 75_000)


def test_the_presets_own_length_is_the_preset():
    mini = preset("mini", benchmark("synthia2city"))
    assert mini.with_steps(mini.total_steps) == mini


@pytest.mark.parametrize("total", [-1, 0, 1])
def test_a_length_without_two_stages_is_refused(total):
    with pytest.raises(RunError, match=f"--steps {total} leaves no step"):
        preset("mini", benchmark("gta2city")).with_steps(total)


def test_references_are_as_long_as_the_adapted_run_and_see_one_domain():
    given = ingredients("mini", target_labelled=Opener("labelled"))
    (source,) = reference_stages(given, "source", 1200)
    (oracle,) = reference_stages(given, "target", 1200)
    assert (source.steps, oracle.steps) == (1200, 1200)
    assert source.batch == oracle.batch == given.preset.stages[0].batch
    assert source.streams.keys() == {"source"}
    assert oracle.streams["target"][0] == "labelled"
    assert source.learning_rate(1199) > 0


def network(seed=0):
    torch.manual_seed(seed)
    made = DeepLab(CONFIG)
    for head in made.heads():
        torch.nn.init.normal_(head.classifier.weight, std=0.5)
    return made


def batch(seed=0, pseudo=None, source=True):
    rng = np.random.default_rng(seed)

    def images():
        return torch.from_numpy(rng.normal(0, 50, (2, 3, CROP[1], CROP[0])).astype(np.float32))

    def labels():
        coarse = rng.choice([0, 1, 2, 3, 4, 255], (2, CROP[1] // 8, CROP[0] // 8))
        return torch.from_numpy(coarse.repeat(8, 1).repeat(8, 2))

    first, second, third, fourth = images(), labels(), images(), labels()
    if pseudo is not None:
        fourth = torch.full_like(fourth, pseudo)
    return Batch(first if source else None, second if source else None, third, fourth, torch.ones(2))


def info(step=0, steps=10, seed=5):
    return StepInfo(step, steps, seed)


def alignment():
    torch.manual_seed(1)
    return AlignmentObjective(TERM, MrnetOptions(), 2, 100, CONTEXT)


def rectified(**options):
    given = replace(EplcOptions(), **options).resolved(False)
    return SelfTrainingObjective(TERM, given, given.negative, CONTEXT)


def total(terms):
    return torch.stack(list(terms.values())).sum()


def test_stage_one_names_its_losses():
    objective = alignment()
    terms = objective.losses(network(), batch(), info())
    assert set(terms) == {"loss/segmentation", "loss/adversarial_aux", "loss/adversarial_main", "loss/memory"}
    assert all(math.isfinite(float(value.detach())) for value in terms.values())
    assert set(objective.learn(info())) == {"discriminator/aux", "discriminator/main"}


@pytest.mark.parametrize(
    ("step", "steps", "active"),
    [(0, 10, False), (5, 10, False), (6, 10, True), (14_999, 25_000, False), (15_000, 25_000, True)],
)
def test_memory_regularisation_sets_in_after_three_fifths_of_stage_one(step, steps, active):
    terms = alignment().losses(network().train(), batch(), info(step, steps))
    assert bool(terms["loss/memory"] > 0) is active


def test_the_generators_step_leaves_no_trace_in_the_discriminators():
    one, other = alignment(), alignment()
    net = network().eval()
    for objective, pollute in ((one, True), (other, False)):
        terms = objective.losses(net, batch(), info())
        if pollute:
            total(terms).backward()
            assert all(p.grad is None for p in objective.discriminators.parameters())
        objective.learn(info())
    for mine, theirs in zip(one.discriminators.parameters(), other.discriminators.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_discriminators_step_leaves_no_trace_in_the_network():
    objective, net = alignment(), network()
    objective.losses(net, batch(), info())
    objective.learn(info())
    assert all(p.grad is None for p in net.parameters())


def test_the_adversarial_term_reaches_the_network():
    net = network().train()
    terms = alignment().losses(net, batch(), info())
    (terms["loss/adversarial_main"] + terms["loss/adversarial_aux"]).backward()
    assert net.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (50, 0.5**0.9), (200, 0.0)])
def test_the_discriminators_rate_decays_without_warm_up(step, factor):
    objective = alignment()
    objective.losses(network(), batch(), info())
    objective.learn(info(step))
    assert objective.optimiser.param_groups[0]["lr"] == pytest.approx(1e-4 * factor)


def test_self_training_names_its_losses():
    assert set(rectified().losses(network(), batch(), info())) == {
        "loss/segmentation",
        "loss/rectified_main",
        "loss/rectified_aux",
        "loss/divergence",
    }
    alone = rectified(mixing="none", source_weight=0.0).losses(network(), batch(source=False), info())
    assert set(alone) == {"loss/rectified_main", "loss/rectified_aux", "loss/divergence"}


def test_empty_pseudo_labels_cost_nothing_and_break_nothing():
    net = network().train()
    terms = rectified(mixing="none", source_weight=0.0).losses(net, batch(pseudo=255, source=False), info())
    assert terms["loss/rectified_main"].item() == 0.0
    assert terms["loss/rectified_aux"].item() == 0.0
    (terms["loss/rectified_main"] + terms["loss/rectified_aux"]).backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    net.zero_grad()
    total(terms).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_a_label_without_weight_costs_nothing_either():
    given = replace(batch(source=False), pseudo_weight=torch.zeros(2))
    terms = rectified(mixing="none", source_weight=0.0).losses(network().train(), given, info())
    assert terms["loss/rectified_main"].item() == 0.0


def test_pasted_source_pixels_count_fully_whatever_the_labels_weight():
    given = replace(batch(pseudo=255), pseudo_weight=torch.zeros(2))
    terms = rectified().losses(network().train(), given, info())
    assert terms["loss/rectified_main"].item() > 0


def objectives():
    return {
        "alignment": alignment,
        "rectified": rectified,
        "supervised": lambda: SupervisedObjective(TERM, CONTEXT),
    }


@pytest.mark.parametrize("name", ["alignment", "rectified", "supervised"])
def test_an_objective_goes_on_from_its_state(name):
    one, net = objectives()[name](), network().eval()
    for step in range(3):
        one.losses(net, batch(step), info(step))
        one.learn(info(step))
    torch.manual_seed(77)
    other = objectives()[name]()
    other.load_state_dict(snapshot(one.state_dict()))
    for step in range(3, 6):
        mine, theirs = (objective.losses(net, batch(step), info(step)) for objective in (one, other))
        assert {k: float(v.detach()) for k, v in mine.items()} == {k: float(v.detach()) for k, v in theirs.items()}
        mine, theirs = (objective.learn(info(step)) for objective in (one, other))
        assert {k: float(v) for k, v in mine.items()} == {k: float(v) for k, v in theirs.items()}


def test_the_supervised_objective_takes_whichever_labelled_stream_there_is():
    given = batch()
    source = SupervisedObjective(TERM, CONTEXT)
    target = SupervisedObjective(TERM, CONTEXT)
    net = network().eval()
    swapped = Batch(None, None, given.source, given.source_label, torch.ones(2))
    torch.testing.assert_close(
        source.losses(net, given, info())["loss/segmentation"], target.losses(net, swapped, info())["loss/segmentation"]
    )


@pytest.mark.parametrize("name", ["mrnet", "eplc"])
def test_with_a_few_target_labels_every_stage_of_any_recipe_learns_from_them_too(name):
    given = ingredients("mini", few=Opener("few"))
    plain = recipe(name).stages(given, {"mrnet": MrnetOptions(), "eplc": EplcOptions()}[name])
    for before, after, schedule in zip(plain, with_few_labels(plain, given), given.preset.stages, strict=False):
        assert set(after.streams) == {*before.streams, "labelled"}
        opened, size, view = after.streams["labelled"]
        assert (opened, size, view.crop) == ("few", schedule.target_size, schedule.crop)
        assert view.seed not in {stream[2].seed for stream in before.streams.values()}
        assert (after.steps, after.labels) == (before.steps, before.labels)


def few(inner):
    return FewLabelsObjective(lambda context: inner, TERM, CONTEXT)


def test_a_few_target_labels_add_their_supervised_loss_and_change_no_other_term():
    plain, third = batch(), batch(seed=7)
    mixed = replace(plain, labelled=third.source, labelled_label=third.source_label)
    made, same, term = network(), network(), SegmentationTerm(CLASSES)
    torch.manual_seed(4)
    expected = rectified().losses(made, plain, info())
    expected["loss/target_labels"] = term(made, third.source, third.source_label, term.balance(CONTEXT))
    torch.manual_seed(4)
    torch.testing.assert_close(few(rectified()).losses(same, mixed, info()), expected)


def test_what_the_other_objective_learns_is_still_learned_and_kept():
    plain, third = batch(), batch(seed=7)
    mixed = replace(plain, labelled=third.source, labelled_label=third.source_label)
    one, other = few(alignment()), few(alignment())
    total(one.losses(network(), mixed, info())).backward()
    assert set(one.learn(info())) == {"discriminator/aux", "discriminator/main"}
    other.load_state_dict(snapshot(one.state_dict()))
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_the_rectified_recipe_labels_once_a_view_and_takes_the_published_threshold():
    """Methods §3.2: four views, no dropout, 3.6 of 4 from SYNTHIA and no threshold otherwise."""
    for bench, threshold in (("gta2city", 0.0), ("synthia2city", 0.9), ("city2robot", 0.0)):
        _, second = stages("rectified", RectifiedOptions(), bench=bench, faithful=True)
        rule = second.labels.rule
        assert (rule.passes, rule.dropout, rule.keep, rule.threshold) == (1, 0.0, "mean", threshold)
        assert second.labels.selection is None
        assert set(second.streams) == {"target"}
        assert (second.dropout, second.ema_decay, rule.ignore_bottom) == (0.2, None, 0.0)
    _, second = stages("rectified", RectifiedOptions(threshold=0.7), bench="synthia2city")
    assert (second.labels.rule.threshold, second.labels.rule.ignore_bottom) == (0.7, 0.23)


@pytest.mark.parametrize(
    "bad", [{"threshold": 1.5}, {"memory": -1.0}, {"loss": "magic"}, {"divergence": "magic"}], ids=str
)
def test_impossible_options_of_the_second_stage_are_refused(bad):
    with pytest.raises(RunError, match=next(iter(bad))):
        RectifiedOptions(**bad)


def test_the_plain_loss_is_the_supervised_one_of_stage_one_on_pseudo_labels_with_its_memory_term():
    """Methods §3.3, "MRNet+Pseudo"."""
    given, made = batch(source=False), network()
    objective = rectified(loss="plain", mixing="none", source_weight=0.0)
    torch.manual_seed(4)
    found = objective.losses(made, given, info())
    term = SegmentationTerm(CLASSES)
    torch.manual_seed(4)
    logits = made(given.target)
    supervised = term.of_logits(logits, given.pseudo_label, term.balance(CONTEXT))
    enlarged = upsample_logits(logits, (CROP[1], CROP[0]))
    expected = {"loss/pseudo": supervised, "loss/memory": 0.1 * memory_regularisation(enlarged)}
    torch.testing.assert_close(found, expected)
    unweighted = replace(given, pseudo_weight=torch.zeros(2))
    assert objective.losses(made, unweighted, info())["loss/pseudo"].item() == 0.0


@pytest.mark.parametrize("divergence", ["published", "main_to_aux", "aux_to_main", "squared"])
def test_the_rectified_loss_takes_the_divergence_that_it_is_told(divergence):
    given, made = batch(source=False), network().eval()
    options = {"mixing": "none", "source_weight": 0.0, "class_weights": "published"}
    found = rectified(divergence=divergence, **options).losses(made, given, info())
    logits = upsample_logits(made(given.target), (CROP[1], CROP[0]))
    weights = TERM.balance(CONTEXT)(given.pseudo_label)
    expected = rectified_terms(logits, given.pseudo_label, weights, divergence=divergence)
    assert total(found).item() == pytest.approx(expected.total().item(), rel=1e-5)


def packed(negative):
    """bool N×C×H×W as the bits that a record holds."""
    return torch.from_numpy(np.packbits(negative.numpy(), axis=1, bitorder="little"))


def test_negative_labels_add_their_loss_where_no_source_was_pasted():
    torch.manual_seed(3)
    given, made = batch(), network().eval()
    negative = torch.rand(2, CLASSES, CROP[1], CROP[0]) < 0.3
    given = replace(given, extra=packed(negative))
    plain = rectified().losses(made, given, info())
    found = rectified(negative=0.5).losses(made, given, info())
    images, _, pasted = class_mix(
        given.source, given.source_label, given.target, given.pseudo_label, CLASSES, info().seed
    )
    logits = upsample_logits(made(torch.cat((given.source, images))), (CROP[1], CROP[0]))
    main, aux = negative_terms(Logits(logits.aux[2:], logits.main[2:]), negative & ~pasted[:, None])
    assert pasted.any()
    assert found.pop("loss/negative").item() == pytest.approx(0.5 * (main + 0.5 * aux).item(), rel=1e-5)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in plain.items()}
    )


@pytest.mark.parametrize("classes", [5, 8, 9, 19])
def test_bits_come_back_as_the_classes_that_they_were(classes):
    negative = torch.rand(2, classes, 3, 4) < 0.5
    assert torch.equal(_unpacked(packed(negative), classes), negative)


def test_negative_labels_are_made_where_their_loss_is_asked_for():
    def second(**more):
        options = EplcOptions(negative=more.pop("negative", 0.0), selection="min")
        return stages("eplc", options, **more)[1].labels

    assert not second().rule.negative
    assert second().extra_column is None
    assert second(negative=1.0).rule.negative
    assert second(negative=1.0).extra_column == "negative"
    assert second(negative=1.0, faithful=True).rule.negative, "asked for is asked for"
    assert not second(faithful=True).rule.negative
    assert not second().rule.published_min
    assert second(faithful=True).rule.published_min
    with pytest.raises(RunError, match=r"negative is -1\.0"):
        EplcOptions(negative=-1.0)


@pytest.mark.parametrize(("name", "options"), [("eplc", EplcOptions), ("rectified", RectifiedOptions)])
def test_rounds_share_the_steps_and_the_schedule_of_self_training(name, options):
    _, whole = stages(name, options(), refresh="once")
    first, *rounds = stages(name, options(rounds=3), refresh="once")
    assert first.labels is None
    assert [stage.steps for stage in rounds] == [16_666, 16_667, 16_667]
    assert [stage.name for stage in rounds] == [f"self-training, round {k}" for k in (1, 2, 3)]
    assert all(stage.labels.policy.refresh == "once" for stage in rounds)
    rates = [stage.learning_rate(step) for stage in rounds for step in (0, 10_000)]
    assert rates == [whole.learning_rate(step) for step in (0, 10_000, 16_666, 26_666, 33_333, 43_333)]


def test_a_users_bounds_on_the_age_of_labels_reach_their_plan():
    options = EplcOptions(max_label_age=128, label_half_life=64.0)
    assert stages("eplc", options)[1].labels.policy == StalenessPolicy("continuous", 128, 64.0)
    with pytest.raises(RunError, match="max_label_age is 128, but labels of one round grow old by design"):
        stages("eplc", options, refresh="once")
    for bad in ({"max_label_age": 0}, {"label_half_life": -1.0}, {"label_half_life": float("nan")}):
        with pytest.raises(RunError, match="give a number of steps above 0"):
            EplcOptions(**bad)


def test_rounds_without_an_end_or_without_steps_are_refused():
    with pytest.raises(RunError, match="add --refresh once"):
        stages("eplc", EplcOptions(rounds=2))
    short = ingredients("full", refresh="once", preset=preset("full", benchmark("gta2city")).with_steps(2))
    with pytest.raises(RunError, match="1 steps of self-training cannot be 2 rounds"):
        recipe("eplc").stages(short, EplcOptions(rounds=2))
    with pytest.raises(RunError, match="rounds is 0"):
        EplcOptions(rounds=0)


def test_a_few_labels_are_learned_from_in_every_round():
    made = ingredients("mini", refresh="once", few=Opener("few"))
    rounds = with_few_labels(recipe("eplc").stages(made, EplcOptions(rounds=3)), made)
    assert len(rounds) == 4
    assert all("labelled" in stage.streams for stage in rounds)
