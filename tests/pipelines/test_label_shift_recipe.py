"""FADA and classifier refinement as stages: schedules, objectives against float64 references (methods §7)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.errors import RunError
from actors.prior_estimate import CELLS, Evidence, PriorPlan, estimated
from actors.protocols import Batch, StepInfo
from models.losses import IGNORE
from models.networks.build import Build
from models.networks.fada import FadaConfig
from models.networks.segmenter import upsample
from models.priors import encode_posteriors
from pipelines.benchmarks import benchmark
from pipelines.recipes import recipe
from pipelines.recipes.eplc import EplcOptions
from pipelines.recipes.label_shift import ClassAlignmentObjective, LabelShiftOptions
from pipelines.recipes.recipe import Ingredients, preset
from pipelines.recipes.refinement import ClassifierSgd, RefinementObjective
from pipelines.recipes.refinement import refinement as refinement_stage
from pipelines.recipes.supervised import SegmentationTerm
from tests.pipelines.test_proda import Pictures, context
from tests.pipelines.test_recipes import Opener

CLASSES = 4
CONFIG = FadaConfig(num_classes=CLASSES, layers=(1, 1, 1, 1), width=4, norms="batch", dilations=(1, 2))
TERM = SegmentationTerm(CLASSES, hard_percentile=0.0, max_value=1.0)
PRIOR = PriorPlan((0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4))
INFO = StepInfo(0, 10, 5)


def ingredients(size="full", bench="gta2city", faithful=False, options=None, **more):
    pair, chosen = benchmark(bench), recipe("label_shift")
    made = {
        "preset": chosen.fitted(preset(size, pair), pair, options or LabelShiftOptions(), faithful),
        "num_classes": len(pair.classes.names),
        "seed": 3,
        "bonnet": pair.bonnet,
        "sure": pair.sure,
        "faithful": faithful,
        "refresh": "once" if faithful else "continuous",
        "source": Opener("source"),
        "by_class": Opener("by class"),
        "target": Opener("target"),
        "target_labelled": None,
        "reader": Pictures(),
        "term": chosen.term,
        "published_term": chosen.published_term,
    }
    return Ingredients(**{**made, **more})


def plans(options=None, **more):
    options = options or LabelShiftOptions()
    return recipe("label_shift").stages(ingredients(options=options, **more), options)


def network(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    made = Build(config)()
    for parameter in made.classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def batch(seed=0):
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (2, 24, 32), generator=rng)
    label[0, :3] = IGNORE
    images = [torch.randn(2, 3, *size, generator=rng) for size in ((24, 32), (16, 40))]
    return Batch(images[0], label, images[1], None, None)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def enlarged(maps, size):
    return upsample(maps.detach().double(), size).numpy()


def alignment(**options):
    made = LabelShiftOptions(**options)
    torch.manual_seed(1)
    return ClassAlignmentObjective(TERM, made, CONFIG.feature_channels, 8, 100, context(None))


def test_the_published_stages_have_the_published_schedule():
    source, adversarial, distillation = plans(faithful=True)
    assert [s.name for s in (source, adversarial, distillation)] == ["source", "adversarial", "self-distillation"]
    assert [s.steps for s in (source, adversarial, distillation)] == [20_000, 40_000, 20_000]
    assert [s.batch for s in (source, adversarial, distillation)] == [8, 4, 8]
    for stage, base, horizon in zip(
        (source, adversarial, distillation), (5e-4, 2.5e-4, 5e-4), (31_250, 62_500, 31_250), strict=True
    ):
        assert stage.learning_rate(0) == pytest.approx(base)
        assert stage.learning_rate(10_000) == pytest.approx(base * (1 - 10_000 / horizon) ** 0.9)


def test_published_runs_see_whole_images_whose_classes_are_drawn_alike():
    source, adversarial, distillation = plans(faithful=True)
    name, size, view = source.streams["source"]
    assert (name, size, view.crop, view.jitter, view.flip, view.colour) == (
        ("by class", (1280, 720), (1280, 720), (1.0, 1.0), 0.0, 0.0)
    )
    name, _, view = adversarial.streams["source"]
    assert (name, view.colour, view.hue) == ("by class", 0.5, 0.2)
    _, size, view = adversarial.streams["target"]
    assert (size, view.crop, view.jitter, view.flip, view.colour) == ((1024, 512), (1024, 512), (1.0, 1.0), 0.0, 0.0)
    _, size, view = distillation.streams["target"]
    assert (size, view.crop, view.jitter, view.flip, view.colour) == ((2048, 1024), (1024, 512), (0.5, 1.5), 0.5, 0.5)
    assert list(distillation.streams) == ["target"]


def test_published_sizes_of_synthia_are_its_own():
    source, *_ = plans(faithful=True, bench="synthia2city")
    assert source.streams["source"][1] == (1280, 760)


def test_published_networks_learn_at_one_rate_and_their_classifiers_at_ten_times_it():
    source, *_ = plans(faithful=True)
    groups = source.optimiser(Build(ingredients(faithful=True).preset.network)()).param_groups
    assert sorted({group["lr_scale"] for group in groups}) == [1.0, 10.0]
    assert not any(group["nesterov"] for group in groups)
    assert {group["weight_decay"] for group in groups} == {5e-4}


def test_published_distillation_begins_anew_on_labels_of_the_network_before():
    distillation = plans(faithful=True)[-1]
    assert distillation.network().config.norms == "batch"  # trained, from GTA5
    assert (distillation.labelled_by, distillation.keeps_before) == ("before", True)
    rule = distillation.labels.rule
    assert (rule.sizes, rule.mirrored, rule.threshold, rule.passes) == (((1024, 512),), False, 0.0, 1)
    assert ingredients(faithful=True).preset.network.norms == "frozen"
    frozen = plans(LabelShiftOptions(distilled_norms="frozen"), faithful=True)[-1]
    assert frozen.network().config.norms == "frozen"


def test_by_default_the_network_labels_for_itself_without_end_beside_source_images():
    distillation = plans(size="mini")[-1]
    assert distillation.streams["source"][0] == "source"
    assert distillation.network is None
    assert distillation.labelled_by == "teaching"
    assert distillation.labels.policy.refresh == "continuous"
    assert distillation.labels.rule.ignore_bottom == benchmark("gta2city").bonnet


def test_small_presets_share_the_steps_of_every_other_recipe():
    found = ingredients("mini").preset
    assert sum(stage.steps for stage in found.stages) == preset("mini", benchmark("gta2city")).total_steps
    assert found.network == FadaConfig.small(19)


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        (LabelShiftOptions(labeller="before"), {}, "add --refresh once"),
        (LabelShiftOptions(begin="anew"), {}, "random weights"),
        (LabelShiftOptions(begin="anew", labeller="before"), {}, "add --refresh once"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(options, more, said):
    with pytest.raises(RunError, match=said):
        plans(options, **more)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"clip": 0.0},
        {"clip": 1.5},
        {"adversarial": -1.0},
        {"norms": "none"},
        {"mixing": "classes", "source_weight": 0.0},
    ],
)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RunError, match=next(iter(wrong))):
        LabelShiftOptions(**wrong)


def test_a_vgg_reads_what_its_weights_expect():
    found = ingredients(options=LabelShiftOptions(backbone="vgg16")).preset.network
    assert (found.backbone, found.pixels) == ("vgg16", "bgr_vgg")


def test_the_adversarial_losses_are_those_of_the_paper():
    net, given, objective = network(), batch(), alignment(adversarial=0.5, temperature=1.8, clip=0.7)
    terms = objective.losses(net, given, INFO)
    net.train()
    with torch.no_grad():
        source, target = net(given.source), net(given.target)
        looks = enlarged(objective.discriminator(target.feature), (16, 40))
    z = enlarged(source.main, (24, 32)) / 1.8
    p, y = softmax(z), given.source_label.numpy()
    kept = y != IGNORE
    picked = np.take_along_axis(p, np.where(kept, y, 0)[:, None], 1)[:, 0]
    assert terms["loss/segmentation"].item() == pytest.approx(-np.log(picked[kept]).mean(), rel=1e-5)
    told = np.minimum(softmax(enlarged(target.main, (16, 40)) / 1.8), 0.7)
    log_d = np.log(softmax(looks))
    wanted = 0.5 * -(told * log_d[:, :CLASSES]).sum(1).mean()
    assert terms["loss/alignment"].item() == pytest.approx(wanted, rel=1e-5)


def test_alignment_moves_the_features_and_not_what_the_discriminator_is_told():
    net, objective = network(), alignment()
    terms = objective.losses(net, batch(), INFO)
    terms["loss/alignment"].backward()
    assert all(parameter.grad is None for parameter in net.classifier.parameters())
    assert next(net.feature_extractor.parameters()).grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in objective.discriminator.parameters())


def test_the_discriminator_learns_from_features_before_the_networks_step():
    net, given, objective = network(), batch(), alignment(clip=0.7)
    objective.losses(net, given, INFO)
    net.train()
    with torch.no_grad():
        source, target = net(given.source), net(given.target)
    halves = []
    for outputs, size, first in ((source, (24, 32), True), (target, (16, 40), False)):
        told = np.minimum(softmax(enlarged(outputs.main, size) / 1.8), 0.7)
        log_d = np.log(softmax(enlarged(objective.discriminator(outputs.feature), size)))
        half = log_d[:, :CLASSES] if first else log_d[:, CLASSES:]
        halves.append(-(told * half).sum(1).mean())
    with torch.no_grad():  # the network's own step comes in between
        for parameter in net.parameters():
            parameter.add_(1.0)
    before = [parameter.detach().clone() for parameter in objective.discriminator.parameters()]
    found = objective.learn(INFO)
    assert found["discriminator/pixels"].item() == pytest.approx(0.5 * sum(halves), rel=1e-5)
    after = list(objective.discriminator.parameters())
    # Adam's first step is its rate, whatever the gradient.
    assert max((a - b).abs().max().item() for a, b in zip(after, before, strict=True)) == pytest.approx(1e-4, rel=1e-2)


def test_an_alignment_objective_goes_on_where_it_stood():
    net, given, first = network(), batch(), alignment()
    first.losses(net, given, INFO)
    first.learn(INFO)
    torch.manual_seed(9)
    second = alignment()
    second.load_state_dict(first.state_dict())
    found = [made.losses(net, given, INFO)["loss/alignment"].item() for made in (first, second)]
    assert found[0] == found[1]


def refinement(prior=PRIOR, over="all", survey=None, fresh=True, teaching=None):
    return RefinementObjective(prior, survey, over, replace(context(None, teaching=teaching), fresh=fresh))


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_refinement_learns_scores_that_the_offset_has_left(over):
    net, given = network(), batch()
    net.eval()
    loss = refinement(over=over).losses(net, given, INFO)["loss/refinement"]
    with torch.no_grad():
        z = enlarged(net(given.source).fused(), (24, 32))
    delta = np.log(np.array(PRIOR.target) / np.array(PRIOR.source))
    p, y = softmax(z - delta[:, None, None]), given.source_label.numpy()
    kept = y != IGNORE
    nll = -np.log(np.take_along_axis(p, np.where(kept, y, 0)[:, None], 1)[:, 0])[kept]
    wanted = nll.sum() / (y.size if over == "all" else kept.sum())
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, aspp="modified", head_channels=32, branch_channels=32)])
def test_refinement_trains_the_classifiers_and_nothing_else(config):
    net, given = network(config=config), batch()
    optimiser = ClassifierSgd()(net)
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    sum(refinement().losses(net, given, INFO).values()).backward()
    optimiser.step()
    moved = {name for name, tensor in net.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("classifier.")}


def test_the_stage_after_refinement_trains_everything_again():
    net = network()
    ClassifierSgd()(net)
    plans(size="mini")[-1].optimiser(net)
    assert all(parameter.requires_grad for parameter in net.parameters())


def evidence():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([0.3, 0.6, 0.9, 1.5], (3, CELLS)).astype(np.float32)
    cells = encode_posteriors(rows.reshape(-1, CLASSES)).reshape(rows.shape)
    confusion = np.eye(CLASSES) * 50 + rng.random((CLASSES, CLASSES))
    return Evidence(np.zeros((3, CLASSES), np.float32), cells, rows.mean(1), confusion)


def test_an_unknown_prior_is_asked_of_the_network_that_the_stage_finds_once():
    asked, teaching = [], network()
    prior = replace(PRIOR, target=None)

    def survey(net):
        asked.append(net)
        return evidence()

    made = refinement(prior, survey=survey, teaching=teaching)
    assert asked == [teaching]
    np.testing.assert_allclose(made.target, estimated(prior, evidence()))
    resumed = refinement(prior, survey=survey, fresh=False)
    resumed.load_state_dict(made.state_dict())
    assert asked == [teaching]
    assert torch.equal(resumed.offset, made.offset)
    assert resumed.learn(INFO)["prior_shift"] == made.learn(INFO)["prior_shift"] > 0


def refined(stages, given, **more):
    asked = {"steps": 7, "rate": None, "over": "all", **more}
    at, stage = refinement_stage(stages, given, PRIOR, lambda net: evidence(), **asked)
    return [*stages[:at], stage, *stages[at:]]


def test_refinement_comes_before_the_first_labels_and_begins_as_the_published_network():
    given = ingredients("mini", bench="synthia2city")
    stages = recipe("label_shift").stages(given, LabelShiftOptions())
    found = refined(stages, given)
    assert [stage.name for stage in found] == ["source", "adversarial", "refinement", "self-distillation"]
    assert found[2].starts_from == "teacher"
    assert found[2].steps == 7
    assert found[2].streams["source"][0] == "by class"
    assert found[2].learning_rate(7) == 0


def test_refinement_of_a_recipe_without_labels_is_its_last_stage():
    given = ingredients("mini")
    stages = recipe("label_shift").stages(given, LabelShiftOptions())[:2]
    assert refined(stages, given)[-1].name == "refinement"


def test_published_refinement_has_ten_times_the_first_rate_of_its_adversarial_stage():
    given = ingredients(faithful=True)
    stages = recipe("label_shift").stages(given, LabelShiftOptions())
    (found,) = (stage for stage in refined(stages, given, steps=40_000) if stage.name == "refinement")
    assert found.learning_rate(0) == pytest.approx(2.5e-3)
    assert found.learning_rate(40_000) == pytest.approx(2.5e-3 * (1 - 40_000 / 62_500) ** 0.9)
    assert found.batch == 4
    assert found.frozen_norms


def test_refinement_goes_with_other_recipes():
    pair = benchmark("gta2city")
    chosen = recipe("eplc")
    given = ingredients("mini", preset=chosen.fitted(preset("mini", pair), pair))
    stages = chosen.stages(given, EplcOptions())
    found = refined(stages, given, rate=0.01)
    assert [stage.name for stage in found] == ["alignment", "refinement", "self-training"]
    assert found[1].learning_rate(0) == 0.01
    assert found[1].streams["source"][2].pixels == "bgr_mean"
