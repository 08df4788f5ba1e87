"""ProDA as a recipe: its schedule, its stages, its objectives against float64 references (methods §5)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.errors import RunError, UnreadableImage
from actors.protocols import Batch, ObjectiveContext, StepInfo
from models.losses import IGNORE
from models.networks.build import Build
from models.networks.deeplab import DeepLabConfig
from models.networks.discriminators import PatchDiscriminator
from pipelines.benchmarks import benchmark
from pipelines.label_rules import ASSIGNMENTS, MEANS, SOFT, PrototypeRule
from pipelines.recipes import recipe
from pipelines.recipes.few_labels import with_few_labels
from pipelines.recipes.proda import ProdaOptions, decide
from pipelines.recipes.proda_objectives import (
    DenoisingObjective,
    DistillationObjective,
    TargetViews,
    WarmUpObjective,
    given_prototypes,
    initial_prototypes,
)
from pipelines.recipes.recipe import Ingredients, preset
from pipelines.recipes.supervised import SegmentationTerm, reference_stages
from pipelines.strong_view import StrongView
from pipelines.views import RandomCrop
from tests.pipelines.test_recipes import Opener

CLASSES, CHANNELS = 5, 16
BASE, CROP, POINTS = (48, 40), (32, 24), (16, 12)
CONFIG = DeepLabConfig(
    num_classes=CLASSES,
    layers=(1, 1, 1, 1),
    width=4,
    branch_channels=8,
    bottleneck_channels=CHANNELS,
    groups=4,
    dilations=(1, 2),
    heads="proda",
    pixels="rgb_unit",
)
TERM = SegmentationTerm(CLASSES, max_value=1.0, small_class_pixels=1)
VIEWS = TargetViews(RandomCrop(7, CROP, jitter=(0.9, 1.1), pixels="rgb_unit"), StrongView(7), BASE, POINTS)
CPU = torch.device("cpu")


def ingredients(size="full", bench="gta2city", **more):
    pair = benchmark(bench)
    made = {
        "preset": recipe("proda").fitted(preset(size, pair), pair),
        "num_classes": len(pair.classes.names),
        "seed": 3,
        "bonnet": pair.bonnet,
        "sure": pair.sure,
        "regular": pair.regular,
        "faithful": False,
        "refresh": "continuous",
        "source": Opener("source"),
        "by_class": Opener("by class"),
        "target": Opener("target"),
        "target_labelled": None,
        "reader": Pictures(),
        "published_term": recipe("proda").published_term,
    }
    return Ingredients(**{**made, **more})


def plans(options=None, **more):
    return recipe("proda").stages(ingredients(**more), options or ProdaOptions())


class Pictures:
    """A few noisy pictures; one may be broken."""

    image_ids = ("a", "b", "c")

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 3

    def read(self, index, size):
        if index == self.broken:
            raise UnreadableImage("c.png", "broken")
        return np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)


def network(seed=0):
    torch.manual_seed(seed)
    made = Build(CONFIG)()
    torch.nn.init.normal_(made.layer5.classifier.weight, std=0.5)
    made.prototypes.normal_()
    return made


def context(student, teaching=None, before=None, fresh=False):
    return ObjectiveContext(
        CPU,
        lambda value: value,
        lambda parameters: None,
        network=student,
        teaching=teaching,
        before=before,
        fresh=fresh,
    )


def info(seed=5):
    return StepInfo(0, 10, seed)


def batch(seed=0, weight=1.0):
    rng = np.random.default_rng(seed)

    def images():
        return torch.from_numpy(rng.random((2, 3, CROP[1], CROP[0]), np.float32))

    def labels():
        coarse = rng.choice([*range(CLASSES), IGNORE], (2, CROP[1] // 8, CROP[0] // 8))
        return torch.from_numpy(coarse.repeat(8, 1).repeat(8, 2)).long()

    grid = (CLASSES, 6, 7)
    records = {
        SOFT: rng.integers(1, 256, (2, *grid), np.uint8),
        ASSIGNMENTS: rng.integers(1, 256, (2, *grid), np.uint8),
        MEANS: rng.random((2, CLASSES, CHANNELS), np.float32).view(np.uint8),
    }
    return Batch(
        images(),
        labels(),
        images(),
        labels(),
        torch.full((2,), weight),
        records={name: torch.from_numpy(record) for name, record in records.items()},
        whole=torch.from_numpy(rng.integers(0, 256, (2, BASE[1], BASE[0], 3), np.uint8)),
        positions={"source": np.array([0, 1]), "target": np.array([10, 11])},
    )


def denoising(student, average, options=None, fresh=False, regular=0.1, reader=None):
    options = (options or ProdaOptions(average_mode="eval")).resolved(False)
    decided = {"temperature": options.temperature or 1.0, "momentum": options.momentum or 1e-4, "regular": regular}
    known = context(student, average, fresh=fresh)
    return DenoisingObjective(TERM, replace(options, **decided), VIEWS, reader or Pictures(), known)


def quiet(made):
    """No dropout and no batch statistics: what is computed can be computed again."""
    return made.eval().requires_grad_(True)


# The published schedule, sizes and choices.


def test_the_published_schedule_is_kept_and_its_rate_never_reaches_zero():
    found = plans()
    assert [plan.steps for plan in found] == [62_412] * 4
    assert [plan.learning_rate(0) for plan in found] == pytest.approx([2.5e-4, 1e-4, 6e-4, 6e-4])
    assert found[1].learning_rate(62_412) == pytest.approx(3.45e-5, rel=2e-3)
    assert [plan.batch for plan in found] == [4] * 4


@pytest.mark.parametrize(("bench", "source"), [("gta2city", (1914, 1052)), ("synthia2city", (1280, 760))])
def test_whole_images_are_resized_to_a_random_share_of_2200_pixels_and_cropped(bench, source):
    given = ingredients(bench=bench)
    recipe("proda").stages(given, ProdaOptions())
    for opener, size in ((given.source, source), (given.target, (2048, 1024))):
        for base, view in opener.asked:
            assert base == size
            assert [base[0] * factor for factor in view.jitter] == pytest.approx([1100, 3300])
            assert (view.crop, view.flip, view.more_than_values, view.pixels) == ((896, 512), 0.5, 0, "rgb_unit")


def test_the_network_is_the_published_one_and_reads_rgb_between_0_and_1():
    config = ingredients().preset.network
    assert (config.heads, config.bottleneck_channels, config.conv_std, config.pixels) == (
        "proda",
        256,
        0.01,
        "rgb_unit",
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in Build(config)().parameters()) == 65_063_568


def test_one_rate_for_all_in_stage_one_and_multiplied_rates_elsewhere():
    config = replace(CONFIG, heads="proda")
    groups = [plan.optimiser(Build(config)()).param_groups for plan in plans()]
    scales = [{group["name"]: group["lr_scale"] for group in found} for found in groups]
    several = {"stem": 1.0, "blocks": 3.0, "shortcuts": 4.0, "heads": 10.0}
    assert scales == [several, dict.fromkeys(several, 1.0), several, several]
    for found in groups:
        assert {(g["weight_decay"], g["momentum"], g["nesterov"]) for g in found} == {(2e-4, 0.9, False)}


@pytest.mark.parametrize("faithful", [False, True])
def test_the_faithful_run_is_the_published_one(faithful):
    warm, denoise, second, third = plans(faithful=faithful, refresh="once" if faithful else "continuous")
    assert warm.frozen_norms is faithful
    assert denoise.labels.raw_columns == ((SOFT,) if faithful else (ASSIGNMENTS, MEANS))
    assert denoise.labels.policy.refresh == ("once" if faithful else "continuous")
    assert denoise.ema_decay == 0.999
    assert [plan.ema_decay for plan in (warm, second, third)] == [None if faithful else 0.999] * 3
    assert second.labels.policy.refresh == third.labels.policy.refresh == "once"
    assert second.labelled_by == third.labelled_by == "before"
    assert second.labels.rule.threshold == 0.95
    assert second.labels.rule.sizes == ((2048, 1024),)
    assert {plan.statistics for plan in (warm, denoise, second, third)} == {"running" if faithful else "target"}
    assert denoise.labels.rule.ignore_bottom == (0.0 if faithful else 0.23)


def test_soft_labels_are_kept_on_the_networks_own_grid_in_a_byte_a_class():
    layout = plans(faithful=True, refresh="once")[1].labels.rule.layout
    assert dict(layout.columns) == {"label": (129, 257), "confidence": (129, 257), SOFT: (19, 129, 257)}
    assert layout.row_bytes == pytest.approx(0.70e6, rel=1e-2)


def test_denoised_labels_are_kept_on_a_quarter_of_the_image():
    layout = plans()[1].labels.rule.layout
    assert dict(layout.columns)["label"] == (256, 512)
    assert dict(layout.columns)[ASSIGNMENTS] == (19, 129, 257)
    assert layout.row_bytes == pytest.approx(0.91e6, rel=1e-2)


@pytest.mark.parametrize(("bench", "weight"), [("gta2city", 0.1), ("synthia2city", 0.0)])
def test_the_regulariser_weighs_as_published(bench, weight):
    objective = plans(bench=bench)[1].objective
    assert objective.args[1].regular == weight
    assert plans(ProdaOptions(regular=0.3), bench=bench)[1].objective.args[1].regular == 0.3


def test_whatever_learns_or_is_compared_reads_what_the_network_reads():
    """Reference runs and few target labels, too: their network is the recipe's."""
    given = ingredients("mini", target_labelled=Opener("labelled"), few=Opener("few"))
    references = [plan for domain in ("source", "target") for plan in reference_stages(given, domain, 10)]
    every = [*references, *with_few_labels(recipe("proda").stages(given, ProdaOptions()), given)]
    views = [view for plan in every for _, _, view in plan.streams.values()]
    views += [plan.plain_view for plan in every if plan.plain_view is not None]
    assert len(views) == 2 + 4 * 4
    assert {view.pixels for view in views} == {"rgb_unit"}


def test_small_pictures_are_compared_at_every_pixel_and_full_ones_at_every_fourth():
    assert plans(size="mini")[1].objective.args[2].points == ingredients("mini").preset.stages[1].crop
    assert plans()[1].objective.args[2].points == (224, 128)
    assert plans(ProdaOptions(grid=8))[1].objective.args[2].points == (112, 64)


@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_small_presets_have_as_many_steps_as_other_recipes(name):
    before = preset(name, benchmark("gta2city"))
    assert ingredients(name).preset.total_steps == before.total_steps


def test_a_simclr_backbone_begins_the_first_distillation_under_an_extra_norm(tmp_path):
    path = tmp_path / "r101_1x_sk0.pth"
    small = ingredients("tiny")
    source = Build(small.preset.network)().state_dict()
    state = {name: tensor for name, tensor in source.items() if not name.startswith(("layer5", "prototypes"))}
    torch.save({"state_dict": {**state, "projection.weight": torch.zeros(3)}}, path)
    *_, second, third = recipe("proda").stages(small, ProdaOptions(simclr=str(path)))
    made = second.network()
    assert made.bn_pretrain is not None
    second.initial(made)
    torch.testing.assert_close(made.conv1.weight, source["conv1.weight"])
    assert third.network is None
    assert recipe("proda").stages(small, ProdaOptions())[2].network is None


def test_a_simclr_file_that_does_not_fit_is_refused_before_anything_starts(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, path)
    with pytest.raises(RunError, match="belongs to this backbone"):
        plans(ProdaOptions(simclr=str(path)), size="tiny")


def test_an_extra_norm_needs_a_backbone_to_stand_behind():
    with pytest.raises(RunError, match=r"--proda\.simclr"):
        plans(ProdaOptions(extra_norm="on"), size="tiny")
    assert plans(ProdaOptions(extra_norm="on"), size="tiny", from_stage=4)[2].network().bn_pretrain is not None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"structure": -1.0}, "structure is -1.0"),
        ({"threshold": 1.5}, r"\[0, 1\]"),
        ({"momentum": -0.1}, r"\[0, 1\]"),
        ({"temperature": 0.0}, "above 0"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"grid": 0}, "at least 1"),
        ({"denoise": "nobody"}, "choose one of auto, student, teacher"),
        ({"extra_norm": "off", "simclr": "x"}, "needs it"),
    ],
)
def test_options_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(RunError, match=sentence):
        ProdaOptions(**options)


def test_files_are_found_again_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ProdaOptions(simclr="simclr.pth", prototypes="folder/prototypes")
    assert options.simclr == str(tmp_path / "simclr.pth")
    assert options.prototypes == str(tmp_path / "folder/prototypes")


@pytest.mark.parametrize("size", ["full", "mini"])
@pytest.mark.parametrize("faithful", [False, True])
def test_every_option_that_is_left_open_is_decided(faithful, size):
    given = ingredients(size, faithful=faithful, refresh="once" if faithful else "continuous")
    found = vars(decide(ProdaOptions(), given))
    assert {name for name, value in found.items() if value in (None, "auto")} <= FILES_AND_LIMITS
    assert found["denoise"] == ("student" if faithful else "teacher")
    assert (found["grid"], found["temperature"]) == ((4, 1.0) if size == "full" else (1, 2.0))
    assert found["momentum"] == pytest.approx(1e-4 if size == "full" else 1e-4 * 62_412 / 275)


FILES_AND_LIMITS = {"prototypes", "simclr", "extra_norm", "max_label_age"}


def test_labels_that_are_made_once_are_denoised_by_the_student():
    assert decide(ProdaOptions(), ingredients(refresh="once")).denoise == "student"
    with pytest.raises(RunError, match="leave --refresh once out"):
        decide(ProdaOptions(denoise="teacher"), ingredients(refresh="once"))
    with pytest.raises(RunError, match="grow old by design"):
        decide(ProdaOptions(max_label_age=5), ingredients(refresh="once"))


def test_small_classes_are_as_small_on_the_grid_as_in_the_crop():
    term = SegmentationTerm(CLASSES, small_class_pixels=96)
    assert VIEWS.of_grid(term).small_class_pixels == 96 * 16 * 12 // (32 * 24)


def test_files_are_read_only_where_a_stage_is_to_use_them(tmp_path):
    """A run whose SimCLR file is gone can still be scored, and resumed behind it."""
    gone = ProdaOptions(simclr=str(tmp_path / "gone.pth"), prototypes=str(tmp_path / "gone"))
    for late in ({"to_train": False}, {"from_stage": 4}):
        assert len(plans(gone, size="tiny", **late)) == 4
    for early in (1, 2, 3):
        with pytest.raises(RunError, match="cannot be read"):
            plans(gone, size="tiny", from_stage=early)


def test_quirks_of_the_strong_view_have_switches():
    for faithful in (False, True):
        strong = plans(faithful=faithful, refresh="once")[1].objective.args[2].strong
        assert (strong.translation, strong.replay) == (("published",) * 2 if faithful else ("exact", "ordered"))


# Warm-up.


def warm_up(**options):
    torch.manual_seed(1)
    return WarmUpObjective(TERM, ProdaOptions(**options).resolved(False), VIEWS, 4, 100, context(None))


def test_the_adversary_is_least_squares_with_source_0_and_target_1():
    made, objective, given = quiet(network()), warm_up(adversarial=0.5), batch()
    terms = objective.losses(made, given, info())
    critic = objective.discriminator

    def scores(images):
        logits = torch.nn.functional.interpolate(
            made(images).main, size=(CROP[1], CROP[0]), mode="bilinear", align_corners=True
        )
        return critic(logits.softmax(1)).double()

    assert terms["loss/adversarial"].item() == pytest.approx(
        0.5 * scores(given.target).square().mean().item(), rel=1e-5
    )
    source, target = (critic(made(images).main.softmax(1)).double() for images in (given.source, given.target))
    expected = source.square().mean() + (target - 1).square().mean()
    assert objective.learn(info())["discriminator/main"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_networks_step_leaves_no_trace_in_the_discriminator_and_the_reverse():
    made, objective = network().train(), warm_up()
    terms = objective.losses(made, batch(), info())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in objective.discriminator.parameters())
    before = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    objective.learn(info())
    after = [p.grad for p in made.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_warm_up_can_learn_from_strongly_augmented_source_images():
    made, given = quiet(network()), batch()
    plain, strong = (warm_up(strong_source=w).losses(made, given, info())["loss/segmentation"] for w in (0.0, 1.0))
    twice = warm_up(strong_source=2.0).losses(made, given, info())["loss/segmentation"]
    assert plain.item() != pytest.approx(strong.item(), rel=1e-3)
    assert twice.item() == pytest.approx(2 * strong.item(), rel=1e-6)


def test_the_discriminator_goes_on_from_its_state():
    one, other = warm_up(), warm_up()
    one.losses(network().train(), batch(), info())
    one.learn(info())
    other.load_state_dict(one.state_dict())
    for mine, theirs in zip(one.discriminator.parameters(), other.discriminator.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert isinstance(one.discriminator, PatchDiscriminator)


# Denoising.


def reference_terms(made, average, given, options, regular):
    """The target terms of stage 1 in float64, one sample and pixel after the other (methods §5.2)."""
    soft = VIEWS.of_whole(given.records[SOFT].double() / 255, given.positions["target"]).numpy()
    whole = given.whole.permute(0, 3, 1, 2).float() / 255
    feature = VIEWS.of_whole(average(whole).feature.detach().double(), given.positions["target"]).numpy()
    prototypes = made.prototypes.double().numpy()
    grid = (POINTS[1], POINTS[0])

    def enlarged(maps):
        return torch.nn.functional.interpolate(maps.detach().double(), size=grid, mode="bilinear", align_corners=True)

    logits = enlarged(made(given.target).main)
    p = logits.softmax(1).numpy()
    images, warp = VIEWS.strongly(given.target, given.positions["target"])
    strong = enlarged(made(images).feature).numpy()
    withheld = VIEWS.labels_on_grid(given.pseudo_label).numpy() == IGNORE
    assignments = np.zeros_like(soft)
    ce, rce, valid = 0.0, 0.0, 0
    for n in range(2):
        for y in range(grid[0]):
            for x in range(grid[1]):
                d = np.sqrt(((feature[n, :, y, x] - prototypes) ** 2).sum(1))
                w = np.exp(-(d - d.min()))
                assignments[n, :, y, x] = w / w.sum()
                if not withheld[n, y, x]:
                    k = (assignments[n, :, y, x] * soft[n, :, y, x]).argmax()
                    valid += 1
                    ce -= np.log(p[n, k, y, x])
                    rce += -np.log(1e-4) * (1 - p[n, k, y, x])
    assigned, seen = warp(torch.from_numpy(assignments), 0.0)
    assigned, seen, structure = assigned.numpy(), seen.numpy(), 0.0
    for n, y, x in zip(*np.nonzero(seen), strict=True):
        d = np.sqrt(((strong[n, :, y, x] - prototypes) ** 2).sum(1))
        s = -d - np.log(np.exp(-d).sum())
        t = assigned[n, :, y, x]
        structure += (t * (np.log(t) - s)).sum()
    return {
        "loss/cross_entropy": 0.1 * ce / valid,
        "loss/reverse": rce / valid,
        "loss/regulariser": -regular * np.log(p).mean(),
        "loss/structure": 10 * structure / (seen.sum() * CLASSES),
    }


def test_a_denoising_step_is_that_of_the_paper():
    made, average, given = quiet(network()), quiet(network(1)), batch()
    average.prototypes.copy_(made.prototypes)
    options = ProdaOptions(denoise="student", average_mode="eval")
    terms = denoising(made, average, options).losses(made, given, info())
    expected = reference_terms(made, average, given, options, regular=0.1)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-5), name


def test_a_teacher_that_denoises_says_what_the_student_would_have():
    """The same weights, on the whole image; what differs is 1/255 of a probability, and where pixels are read."""
    made = quiet(network())
    given = batch()
    rule = PrototypeRule(CLASSES, BASE, (4 * BASE[0], 4 * BASE[1]), CHANNELS, denoised=True)
    plain = replace(rule, denoised=False)
    soft = np.stack([item.columns[SOFT] for item in plain.label(made, [given.whole], [0, 1])])
    columns = [item.columns for item in rule.label(made, [given.whole], [0, 1])]
    label = torch.from_numpy(np.stack([column["label"] for column in columns]))
    _, (seen,) = VIEWS.weak(given.whole, (label,), given.positions["target"])
    records = {name: torch.from_numpy(np.stack([column[name] for column in columns])) for name in (ASSIGNMENTS, MEANS)}
    theirs = replace(given, pseudo_label=seen.long(), records=records)
    ours = replace(given, pseudo_label=torch.zeros_like(given.pseudo_label), records={SOFT: torch.from_numpy(soft)})
    student = denoising(made, made, ProdaOptions(denoise="student", average_mode="eval"))
    teacher = denoising(made, made, ProdaOptions(denoise="teacher"))
    (mine, near), (made_there, near_there) = student._denoised(ours), teacher._denoised(theirs)
    assert (mine == made_there).float().mean() > 0.95
    assert (near - near_there).abs().max() < 0.15
    assert (near - near_there).abs().mean() < 0.03


def test_the_prototypes_follow_what_the_teachers_saw_by_the_published_share():
    made, given = quiet(network()), batch()
    objective = denoising(made, made, ProdaOptions(denoise="teacher", momentum=0.25))
    before = made.prototypes.double().clone().numpy()
    objective.losses(made, given, info())
    objective.learn(info())
    vectors = given.records[MEANS].view(torch.float32).double().numpy()
    for vector in vectors:
        before = 0.75 * before + 0.25 * vector
    np.testing.assert_allclose(made.prototypes.numpy(), before, rtol=1e-5)


def test_the_prototypes_follow_the_averages_features_where_the_student_denoises():
    made, average, given = quiet(network()), quiet(network(1)), batch()
    objective = denoising(made, average, ProdaOptions(denoise="student", average_mode="eval", momentum=0.5))
    before = made.prototypes.clone()
    objective.losses(made, given, info())
    seen = objective.learn(info())
    assert seen["labels/classes"] > 0
    means, present = objective._vectors
    for vectors, here in zip(means, present, strict=True):
        before[here] = 0.5 * before[here] + 0.5 * vectors[here]
    torch.testing.assert_close(made.prototypes, before)


@pytest.mark.parametrize("denoise", ["student", "teacher"])
def test_images_without_a_label_cost_nothing_on_the_target_side(denoise):
    made, average, given = network().train(), network(1).eval(), batch(weight=0.0)
    empty = {name: torch.zeros_like(record) for name, record in given.records.items()}
    given = replace(given, pseudo_label=torch.full_like(given.pseudo_label, IGNORE), records=empty)
    before = made.prototypes.clone()
    objective = denoising(made, average, ProdaOptions(denoise=denoise), regular=0.0)
    terms = objective.losses(made, given, info())
    sum(terms.values()).backward()
    assert all(terms[name] == 0 for name in ("loss/cross_entropy", "loss/reverse", "loss/structure"))
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    objective.learn(info())
    if denoise == "teacher":
        assert torch.equal(made.prototypes, before)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_average_drops_channels_and_keeps_its_statistics(mode):
    """In training mode as published; and whoever it teaches next finds it in eval mode, with the statistics it had."""
    made, average, given = network().train(), network(1).eval(), batch()
    statistics = average.bn1.running_mean.clone()
    objective = denoising(made, average, ProdaOptions(denoise="student", average_mode=mode))
    torch.manual_seed(0)
    one = objective._denoised(given)[1]
    torch.manual_seed(1)
    assert torch.equal(one, objective._denoised(given)[1]) is (mode == "eval")
    assert not average.training
    assert torch.equal(average.bn1.running_mean, statistics)


def test_initial_prototypes_are_the_mean_features_of_all_images():
    made = network().eval()
    expected = [[] for _ in range(CLASSES)]
    for index in range(3):
        image = torch.from_numpy(Pictures().read(index, BASE)).permute(2, 0, 1)[None].float() / 255
        found = made(image)
        winners = found.main[0].argmax(0).numpy()
        for k in range(CLASSES):
            if (winners == k).any():  # a share of ten of 257×129 cells is less than one of these
                expected[k].append(found.feature[0].detach().double().numpy()[:, winners == k].mean(1))
    prototypes = initial_prototypes(made, Pictures(), BASE, context(made)).numpy()
    assert any(expected)
    for k, vectors in enumerate(expected):
        np.testing.assert_allclose(prototypes[k], np.mean(vectors, 0) if vectors else 0, rtol=1e-4, atol=1e-5)


def test_a_broken_image_has_no_say_in_the_prototypes():
    made = network().eval()
    found = initial_prototypes(made, Pictures(broken=2), BASE, context(made))
    assert found.isfinite().all()
    assert not torch.equal(found, initial_prototypes(made, Pictures(), BASE, context(made)))


def test_two_students_share_the_images_and_end_with_the_same_prototypes():
    made = network().eval()
    whole = initial_prototypes(made, Pictures(), BASE, context(made))
    shares = []

    def kept(rank):
        def gather(value):
            shares.append((rank, value.clone()))
            return value

        return replace(context(made), rank=rank, world=2, gather=gather)

    for rank in range(2):
        initial_prototypes(made, Pictures(), BASE, kept(rank))
    means = torch.cat([shares[0][1], shares[2][1]]), torch.cat([shares[1][1], shares[3][1]])
    assert means[0].shape[0] == 4  # two places each, the last of them empty
    answers = iter(means * 2)
    both = replace(context(made), rank=0, world=2, gather=lambda value: next(answers))
    torch.testing.assert_close(initial_prototypes(made, Pictures(), BASE, both), whole)


def test_a_stage_that_begins_gives_both_networks_their_prototypes_and_a_resumed_one_keeps_them():
    made, average = network(), network(1).eval()
    denoising(made, average, fresh=True)
    assert torch.equal(made.prototypes, average.prototypes)
    before = made.prototypes.clone()
    denoising(made, network(2).eval(), fresh=False)
    assert torch.equal(made.prototypes, before)


def test_prototypes_can_be_given_in_the_published_file(tmp_path):
    path, wanted = tmp_path / "prototypes_on_cityscapes_from_deeplabv2", torch.randn(CLASSES, CHANNELS)
    torch.save(wanted, path)
    made, average = network(), network(1).eval()
    denoising(made, average, ProdaOptions(prototypes=str(path)), fresh=True)
    assert torch.equal(made.prototypes, wanted)
    assert torch.equal(average.prototypes, wanted)


def test_prototypes_of_something_else_are_refused(tmp_path):
    path = tmp_path / "prototypes"
    torch.save(torch.zeros(3, 2), path)
    with pytest.raises(RunError, match=r"holds \(3, 2\) where prototypes are a tensor of the shape \(5, 16\)"):
        given_prototypes(str(path), network())
    path.write_bytes(b"no tensor")
    with pytest.raises(RunError, match="cannot be read"):
        given_prototypes(str(path), network())
    with pytest.raises(RunError, match="cannot be read"):
        given_prototypes(str(tmp_path / "missing"), network())


# Distillation.


def distillation(before, **options):
    return DistillationObjective(TERM, ProdaOptions(**options).resolved(False), VIEWS, context(None, before=before))


def test_a_student_that_is_its_teacher_diverges_by_nothing():
    made = network().eval()
    given = batch()
    terms = distillation(made).losses(made, given, info())
    assert terms["loss/distillation"].item() == pytest.approx(0.0, abs=1e-7)
    published = distillation(made, kd="published").losses(made, given, info())["loss/distillation"]
    t = made(VIEWS.strongly(given.target, given.positions["target"])[0]).main.double().softmax(1)
    assert published.item() == pytest.approx((t * (t.log() - t)).mean().item(), rel=1e-5)
    assert published < 0


def test_hard_labels_follow_the_strong_view():
    made, given = network().eval(), batch()
    terms = distillation(network(1).eval()).losses(made, given, info())
    images, warp = VIEWS.strongly(given.target, given.positions["target"])
    label, seen = warp(VIEWS.labels_on_grid(given.pseudo_label)[:, None], IGNORE)
    assert (label[:, 0][~seen] == IGNORE).all()
    logits = torch.nn.functional.interpolate(
        made(images).main, size=(POINTS[1], POINTS[0]), mode="bilinear", align_corners=True
    )
    expected = torch.nn.functional.cross_entropy(logits.double(), label[:, 0], ignore_index=IGNORE)
    assert terms["loss/pseudo"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_of_the_teacher_learns():
    before, made = network(1).eval().requires_grad_(False), network().train()
    terms = distillation(before).losses(made, batch(), info())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in before.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_labels_on_a_grid_are_those_of_its_points():
    label = torch.arange(CROP[0] * CROP[1]).view(1, CROP[1], CROP[0])
    found = VIEWS.labels_on_grid(label)[0]
    assert found.shape == (POINTS[1], POINTS[0])
    assert found[0, 0] == 0
    assert found[-1, -1] == label[0, -1, -1]
    x = np.rint(np.arange(POINTS[0]) * (CROP[0] - 1) / (POINTS[0] - 1))
    assert found[0].tolist() == x.tolist()
