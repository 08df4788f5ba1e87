"""BiSeNet's recipe against methods §6: schedules, losses, turns, and what a teacher does with its student's reward."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actors.errors import RunError
from actors.protocols import Batch, ObjectiveContext, Reward, StepInfo
from actors.student import Student
from bench.alone import AloneLink, Shelf, _direct
from models.meta import noisy_rectangle
from models.networks.bisenet import BiSeNet, BiSeNetConfig
from models.networks.build import Build
from models.networks.deeplab import DeepLab, DeepLabConfig
from pipelines.benchmarks import benchmark
from pipelines.label_rules import MedianRule
from pipelines.options import AdaptOptions
from pipelines.recipes import recipe
from pipelines.recipes.meta_objectives import (
    REWARD,
    AdversarialObjective,
    AlternatingObjective,
    Critic,
    OwnLabels,
    TeacherObjective,
)
from pipelines.recipes.meta_pseudo_labels import MetaPseudoLabelsOptions, decide
from pipelines.recipes.recipe import Ingredients, preset
from pipelines.recipes.supervised import SegmentationTerm
from pipelines.setup import resolve
from pipelines.views import RandomCrop, Whole, network_input, normalised

CLASSES, WIDTH = 3, 4
TERM = SegmentationTerm(CLASSES, max_value=1.0, small_class_pixels=1)
CONFIG = BiSeNetConfig(CLASSES, (1, 1, 1, 1), width=4, spatial_width=4)
OPTIONS = MetaPseudoLabelsOptions(ignore_bottom=0.0, teacher_rate=0.1).resolved(faithful=False)
INFO = StepInfo(stage_step=20, stage_steps=100, seed=11)


def ingredients(size="full", bench="gta2city", faithful=False, **more):
    pair = benchmark(bench)
    own = MetaPseudoLabelsOptions()
    made = {
        "preset": recipe("meta_pseudo_labels").fitted(preset(size, pair), pair, own, faithful),
        "num_classes": len(pair.classes.names),
        "seed": 3,
        "bonnet": pair.bonnet,
        "sure": pair.sure,
        "faithful": faithful,
        "refresh": "once" if faithful else "continuous",
        "source": lambda size, view: (size, view),
        "by_class": lambda size, view: (size, view),
        "target": lambda size, view: (size, view),
        "target_labelled": None,
        "published_term": (0.0, 1.0),
    }
    return Ingredients(**{**made, **more})


def stages(options=None, **more):
    return recipe("meta_pseudo_labels").stages(ingredients(**more), options or MetaPseudoLabelsOptions())


# The plan.


def test_the_published_schedule():
    adversarial, median, meta = stages(faithful=True)
    assert [stage.steps for stage in (adversarial, median, meta)] == [6250, 6250, 6250]
    assert [stage.batch for stage in (adversarial, median, meta)] == [4, 4, 4]
    for stage, rate in ((adversarial, 2.5e-2), (median, 1.25e-2), (meta, 2.5e-4)):
        assert stage.learning_rate(0) == stage.learning_rate(124) == pytest.approx(rate)
        assert stage.learning_rate(125) == pytest.approx(rate * (49 / 50) ** 0.9)
        assert stage.learning_rate(6249) == pytest.approx(rate * (1 / 50) ** 0.9)
    assert meta.objective.args[7][1](125) == pytest.approx(1.25e-2 * (49 / 50) ** 0.9), "the teacher's"
    for stage in (adversarial, median):
        assert stage.objective.args[3](125) == pytest.approx(1e-4 * (49 / 50) ** 0.9), "D follows the schedule"
    assert meta.objective.args[3](125) == 1e-4, "and is fixed in the last stage"
    optimiser = meta.optimiser(BiSeNet(CONFIG))
    (group,) = optimiser.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


def test_faithful_stages_see_whole_images_with_the_published_means():
    for stage in stages(faithful=True):
        assert stage.streams["source"] == ((1280, 720), Whole("bgr_gray"))
        assert stage.streams["target"] == ((1024, 512), Whole("bgr_city"))
        assert (stage.ema_decay, stage.statistics) == (None, "running")


def test_by_default_images_are_cropped_and_normalised_as_the_backbone_was():
    for stage in stages():
        _, view = stage.streams["target"]
        assert isinstance(view, RandomCrop)
        assert (view.crop, view.pixels, view.seed) == ((1024, 512), "rgb_imagenet", 4)
        assert stage.streams["source"][1].seed == 3


def test_every_published_stage_begins_with_a_fresh_network():
    first, *others = stages(faithful=True)
    assert first.network is None
    assert all(isinstance(stage.network, Build) for stage in others)
    assert [stage.network for stage in stages()] == [None, None, None]


def test_labels_come_from_the_network_before_and_then_from_a_teacher_that_learns():
    _, median, meta = stages()
    assert (median.labelled_by, median.labels.policy.refresh) == ("before", "once")
    assert (meta.labelled_by, meta.labels.policy.refresh) == ("teacher", "continuous")
    assert meta.teacher.steps == meta.steps
    assert meta.reward == ("loss/segmentation", "loss/pseudo")
    rule = meta.labels.rule
    assert (rule.cap, rule.published, rule.size, rule.ignore_bottom) == (0.9, False, (1024, 512), 0.23)
    _, median, meta = stages(faithful=True)
    assert (meta.labelled_by, meta.labels, meta.teacher, meta.keeps_before) == ("teaching", None, None, True)
    assert median.labels.rule.published
    assert median.labels.rule.ignore_bottom == 0.0


def test_a_student_of_another_network_learns_in_the_last_stage_alone():
    student = DeepLabConfig.small()
    adversarial, median, meta = stages(student=student)
    assert adversarial.network is median.network is None
    assert meta.network == Build(student)
    assert meta.streams["target"][1].pixels == "bgr_mean"
    assert meta.teacher.streams["target"][1].pixels == "rgb_imagenet"


@pytest.mark.parametrize("size", ["mini", "tiny"])
def test_small_presets_divide_the_steps_of_every_recipe(size):
    one, two = preset(size, benchmark("gta2city")).stages
    found = stages(size=size)
    assert sum(stage.steps for stage in found) == one.steps + two.steps
    assert found[2].teacher.learning_rate(found[2].steps // 2) == pytest.approx(
        0.1 * found[2].learning_rate(found[2].steps // 2)
    )


@pytest.mark.parametrize(
    ("options", "more", "sentence"),
    [
        ({"cap": 1.5}, {}, "cap is 1.5"),
        ({"noise_share": -1}, {}, "noise_share is -1"),
        ({"adversarial": -0.1}, {}, "adversarial is -0.1"),
        ({"noise": -1.0}, {}, "noise is -1.0"),
        ({"ignore_bottom": 1.0}, {}, "ignore_bottom is 1.0"),
        ({"max_label_age": 0}, {}, "max_label_age is 0"),
        ({"discriminator": "big"}, {}, "'big'; choose one of dsc, fcd"),
        ({"teaching": "asynchronous"}, {"refresh": "once"}, "add --refresh continuous, or let them alternate"),
        ({"teacher_discriminator": "student"}, {}, "sees its own maps alone"),
        ({"teaching": "alternating", "max_label_age": 5}, {}, "the very batch"),
    ],
)
def test_options_that_cannot_be_are_refused(options, more, sentence):
    with pytest.raises(RunError, match=sentence):
        decide(MetaPseudoLabelsOptions(**options), ingredients(**more))


# The label rule.


def test_the_rule_labels_with_each_images_own_medians():
    torch.manual_seed(0)
    network = BiSeNet(CONFIG).eval()
    images = torch.randint(0, 256, (2, 32, 64, 3), dtype=torch.uint8)
    rule = MedianRule(CLASSES, (64, 32), ignore_bottom=0.25)
    made = rule.label(network, [images], [0, 0])
    with torch.no_grad():
        p = network(network_input(images, "rgb_imagenet")).main.double().softmax(1).numpy()
    for image, found in zip(p, made, strict=True):
        winner, sure = image.argmax(0), image.max(0)
        expected = np.full(winner.shape, 255)
        for c in range(CLASSES):
            mine = winner[:24] == c
            if mine.any():
                threshold = min(sorted(sure[:24][mine])[(mine.sum() - 1) // 2], 0.9)
                expected[:24][mine & (sure[:24] >= threshold - 1e-7)] = c
        assert (found.columns["label"] == expected).mean() > 0.999
        assert (found.columns["label"][24:] == 255).all()
        assert found.histogram.sum() == 24 * 64
        assert found.class_pixels.tolist() == [(found.columns["label"] == c).sum() for c in range(CLASSES)]


def test_a_network_of_a_coarser_grid_is_enlarged_before_its_softmax():
    torch.manual_seed(0)
    config = DeepLabConfig(CLASSES, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4)
    network = DeepLab(config).eval()
    images = torch.randint(0, 256, (1, 32, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        logits = network(network_input(images)).fused()
    logits = F.interpolate(logits, (32, 64), mode="bilinear", align_corners=True)
    found = MedianRule(CLASSES, (64, 32)).made(network, images)
    torch.testing.assert_close(found.confidence, logits.softmax(1).max(1).values)


def test_own_labels_follow_the_view_of_the_batch_and_leave_the_mode_alone():
    torch.manual_seed(0)
    network = BiSeNet(CONFIG).train()
    before = copy.deepcopy(network.state_dict())
    whole, positions = torch.randint(0, 256, (2, 48, 64, 3), dtype=torch.uint8), np.array([5, 9])
    view, rule = RandomCrop(0, (32, 32), jitter=(1.0, 1.0), pixels="rgb_imagenet"), MedianRule(CLASSES, (64, 48))
    batch = Batch(None, None, None, None, None, whole=whole, positions={"target": positions})
    found = OwnLabels(rule, view).of(network, batch)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    label = rule.made(network.eval(), whole).label
    assert torch.equal(found, view(whole, (label,), positions)[1][0].long())
    assert found.dtype == torch.int64


# The losses.


def context(network=None, before=None, reward=lambda: None):
    return ObjectiveContext(
        torch.device("cpu"), lambda v: v, lambda parameters: None, network=network, before=before, reward=reward
    )


def batch(seed=0, size=(32, 64), labels=True):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(2, 3, *size, generator=generator)
    whole = torch.randint(0, 256, (2, *size, 3), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, CLASSES, (2, *size), generator=generator)
    label[:, :4] = 255
    pseudo = torch.randint(0, CLASSES, (2, *size), generator=generator)
    return Batch(
        source=source,
        source_label=label,
        target=network_input(whole, "rgb_imagenet"),
        pseudo_label=pseudo if labels else None,
        pseudo_weight=torch.tensor([1.0, 0.0]) if labels else None,
        whole=whole,
        positions={"target": np.array([0, 1])},
    )


def network_of(seed):
    torch.manual_seed(seed)
    return BiSeNet(CONFIG).train()


def cross_entropy(logits, labels):
    """Mean of -log p over labelled pixels, in float64 NumPy."""
    z = logits.detach().double().numpy()
    z = z - z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    y = labels.numpy()
    n, i, j = np.nonzero(y != 255)
    return -log_p[n, y[n, i, j], i, j].mean()


def three_heads(outputs, labels):
    return sum(cross_entropy(part, labels) for part in outputs)


def bce(scores, target):
    p = 1 / (1 + np.exp(-scores.detach().double().numpy()))
    return -np.log(p if target else 1 - p).mean()


def adversarial_objective(kind="dsc", **more):
    torch.manual_seed(1)
    options = replace(OPTIONS, discriminator=kind)
    return AdversarialObjective(TERM, options, WIDTH, lambda step: 1e-3, context(**more))


@pytest.mark.parametrize("kind", ["dsc", "fcd"])
def test_the_adversarial_step_equals_methods_6_1(kind):
    objective, network, seen = adversarial_objective(kind), network_of(0), batch()
    twin, critic = copy.deepcopy(network), copy.deepcopy(objective.critic.network)
    terms = objective.losses(network, seen, INFO)
    with torch.no_grad():
        source, target = twin(seen.source), twin(seen.target)
        scores = critic(target.main.softmax(1))
    pseudo = seen.pseudo_label.clone()
    pseudo[1] = 255  # a label of weight 0 is none
    assert terms["loss/segmentation"].item() == pytest.approx(three_heads(source, seen.source_label), rel=1e-5)
    assert terms["loss/adversarial"].item() == pytest.approx(0.001 * bce(scores, target=False), rel=1e-5)
    assert terms["loss/pseudo"].item() == pytest.approx(three_heads(target, pseudo), rel=1e-5)
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is None for parameter in objective.critic.network.parameters())
    loss = objective.learn(INFO)["discriminator/main"].item()
    maps = [critic(outputs.main.softmax(1)) for outputs in (source, target)]
    assert loss == pytest.approx(0.5 * bce(maps[0], target=False) + 0.5 * bce(maps[1], target=True), rel=1e-5)


def test_the_critic_takes_adams_step_on_its_own_loss():
    torch.manual_seed(0)
    critic = Critic("dsc", CLASSES, WIDTH, 1e-2, context())
    twin = copy.deepcopy(critic.network)
    source, target = torch.randn(2, CLASSES, 32, 64), torch.randn(2, CLASSES, 64, 64)
    critic.show(source, target)
    critic.learn(1e-2)
    loss = 0.5 * F.binary_cross_entropy_with_logits(twin(source.softmax(1)), torch.zeros(2, 1, 32, 64))
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(twin(target.softmax(1)), torch.ones(2, 1, 64, 64))
    optimiser = torch.optim.Adam(twin.parameters(), lr=1e-2, betas=(0.9, 0.99))
    loss.backward()
    optimiser.step()
    for mine, expected in zip(critic.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


def sgd(network):
    groups = network.parameter_groups(lr=1.0, head_multiplier=1.0, duplicates="once", train_norm_affine=True)
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


SAME = {"source": "rgb_imagenet", "target": "rgb_imagenet"}


def alternating(options=OPTIONS, before=None, student=None, pixels=None):
    torch.manual_seed(2)
    student = student or network_of(0)
    labels = OwnLabels(MedianRule(CLASSES, (64, 32)), Whole("rgb_imagenet"))
    rates = (lambda step: 0.25, lambda step: 0.1)
    made = context(network=student, before=before or network_of(7))
    decay = 0.75 if options.labels_by == "average" else None
    more = labels, pixels or (SAME, SAME), sgd, rates, None, decay, made
    return AlternatingObjective(TERM, options, WIDTH, lambda step: 1e-4, *more), student


def step(objective, network, seen, info=INFO):
    terms = objective.losses(network, seen, info)
    torch.stack(list(terms.values())).sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.05 * parameter.grad
            parameter.grad = None
    return terms, objective.learn(info)


def test_all_students_ask_each_other_equally_often_whatever_their_own_seeds_are():
    """One that asks once more than the others hangs them all."""
    counts = set()
    for seed in range(8):
        objective, student = alternating(replace(OPTIONS, noise_share=0.5))
        asked = []

        def total(value, asked=asked):
            asked.append(value)
            return value

        for balance in (objective.balance, objective.even, objective.teaches.balance, objective.teaches.even):
            balance.total = None if balance.total is None else total
        step(objective, student, batch(labels=False), replace(INFO, seed=seed))
        counts.add(len(asked))
    assert len(counts) == 1
    noisy = {s for s in range(40) if np.random.default_rng([6, s]).random() < 0.5}
    assert 10 < len(noisy) < 30


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("where", ["teacher", "student"])
def test_a_whole_turn_equals_methods_6_3(where, share):
    """Labels by the teacher as it was, H from the losses before the student's step, the teacher's loss and step."""
    options = replace(OPTIONS, teacher_discriminator=where, noise_share=share, noise=20.0, teacher_adversarial=0.5)
    objective, student = alternating(options)
    seen, teacher = batch(labels=False), copy.deepcopy(objective.teacher)
    critic, twin = copy.deepcopy(objective.teaches.critic.network), copy.deepcopy(student)
    terms, told = step(objective, student, seen)
    label = objective.labels.rule.made(copy.deepcopy(teacher).eval(), seen.whole).label.long()
    with torch.no_grad():
        own = twin(seen.source), twin(seen.target)
    a, b = three_heads(own[0], seen.source_label), three_heads(own[1], label)
    assert terms["loss/segmentation"].item() == pytest.approx(a, rel=1e-5)
    assert terms["loss/pseudo"].item() == pytest.approx(b, rel=1e-5)
    h = (math.exp(10 / 40) - 1) * 0.25 * a * b  # step 20 of 100 is in epoch 10
    assert told["teacher/coefficient"].item() == pytest.approx(h, rel=1e-5)

    teacher.train()
    source, target = teacher(seen.source), teacher(seen.target)
    critic.requires_grad_(False)
    scores = critic(target.main.softmax(1))

    def heads(outputs, labels):
        return sum(F.cross_entropy(part, labels, ignore_index=255) for part in outputs)

    expected = heads(source, seen.source_label) + h * heads(target, label)
    expected = expected + 0.5 * F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))
    if share:
        deviation = 20.0 / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        expected = expected + heads(teacher(noisy_rectangle(seen.target, deviation, INFO.seed)), label)
    assert ("teacher/noise" in told) == bool(share)
    total = sum(v.item() for k, v in told.items() if k.removeprefix("teacher/") in ("segmentation", "adversarial"))
    total += sum(v.item() for k, v in told.items() if k.removeprefix("teacher/") in ("pseudo", "noise"))
    assert total == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    optimiser = sgd(teacher)
    optimiser.param_groups[0]["lr"] = 0.1
    optimiser.step()
    for mine, wanted in zip(objective.teacher.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
    shown = own if where == "student" else (source, target)
    maps = [critic(outputs.main.detach().softmax(1)) for outputs in shown]
    assert told["teacher/discriminator"].item() == pytest.approx(
        0.5 * bce(maps[0], target=False) + 0.5 * bce(maps[1], target=True), rel=1e-4
    )


def test_the_teachers_average_labels_in_its_place():
    objective, student = alternating()
    start = objective.labeller.conv.weight.clone()
    assert torch.equal(start, objective.teacher.conv.weight)
    step(objective, student, batch(1, labels=False))
    expected = 0.75 * start + 0.25 * objective.teacher.conv.weight
    torch.testing.assert_close(objective.labeller.conv.weight, expected)
    asked = []
    objective.labels.of = lambda network, seen: asked.append(network) or torch.zeros(2, 32, 64, dtype=torch.int64)
    objective.losses(student, batch(labels=False), INFO)
    assert asked == [objective.labeller]
    published, _ = alternating(replace(OPTIONS, labels_by="teacher"))
    assert published.labeller is published.teacher


def test_the_student_does_not_learn_from_the_teachers_loss_nor_the_teacher_from_the_students():
    objective, student = alternating()
    start = copy.deepcopy(objective.teacher.state_dict())
    terms = objective.losses(student, batch(labels=False), INFO)
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert all(torch.equal(v, start[k]) for k, v in objective.teacher.state_dict().items())
    kept = copy.deepcopy(student.state_dict())
    objective.learn(INFO)
    assert all(torch.equal(v, kept[k]) for k, v in student.state_dict().items())


def test_the_teacher_begins_as_the_network_before_and_leaves_that_alone():
    before = network_of(7)
    objective, student = alternating(before=before)
    start = copy.deepcopy(before.state_dict())
    assert all(torch.equal(v, start[k]) for k, v in objective.teacher.state_dict().items())
    step(objective, student, batch(labels=False))
    assert all(torch.equal(v, start[k]) for k, v in before.state_dict().items())


def test_a_resumed_turn_is_the_one_that_would_have_come():
    objective, student = alternating()
    step(objective, student, batch(1, labels=False))
    state, weights = copy.deepcopy(objective.state_dict()), copy.deepcopy(student.state_dict())
    expected = step(objective, student, batch(2, labels=False))
    other, resumed = alternating(before=network_of(8), student=network_of(9))
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    found = step(other, resumed, batch(2, labels=False))
    for mine, wanted in zip(found, expected, strict=True):
        assert {k: v.item() for k, v in mine.items()} == {k: v.item() for k, v in wanted.items()}


def test_a_teacher_that_reads_other_pixels_is_given_them():
    torch.manual_seed(0)
    config = DeepLabConfig(CLASSES, (1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4)
    other = {"source": "bgr_gray", "target": "bgr_mean"}
    objective, _ = alternating(before=DeepLab(config), pixels=(SAME, other))
    seen = batch(labels=False)
    translated = objective._for_teacher(seen)
    torch.testing.assert_close(translated.target, network_input(seen.whole, "bgr_mean"), rtol=0, atol=1e-3)
    gray = replace(seen, source=network_input(seen.whole, "rgb_imagenet"))
    expected = network_input(seen.whole, "bgr_gray")
    torch.testing.assert_close(objective._for_teacher(gray).source, expected, rtol=0, atol=1e-3)
    step(objective, *alternating()[1:], seen)
    same, _ = alternating()
    assert same._for_teacher(seen) is seen


# The teacher in a process of its own.


def asynchronous(reward=None):
    teacher = network_of(7)
    labels = OwnLabels(MedianRule(CLASSES, (64, 32)), Whole("rgb_imagenet"))
    torch.manual_seed(2)
    made = replace(context(network=teacher, reward=lambda: reward), teaching=copy.deepcopy(teacher).eval())
    return TeacherObjective(TERM, replace(OPTIONS, noise_share=0.0), WIDTH, labels, lambda s: 0.25, 100, made), teacher


def test_without_a_reward_the_teacher_learns_as_in_the_first_epoch():
    objective, teacher = asynchronous()
    terms, twin = None, copy.deepcopy(teacher)
    terms = objective.losses(teacher, batch(labels=False), INFO)
    label = objective.labels.rule.made(copy.deepcopy(twin).eval(), batch().whole).label.long()
    with torch.no_grad():
        twin(batch().source)
        assert terms["loss/pseudo"].item() == pytest.approx(three_heads(twin(batch().target), label), rel=1e-5)


def test_a_reward_counts_with_the_students_step_and_rate():
    reward = Reward(step=130, stage_step=30, version=121, terms=dict(zip(REWARD, (1.5, 0.8), strict=True)))
    objective, teacher = asynchronous(reward)
    objective.losses(teacher, batch(labels=False), StepInfo(3, 100, 0))
    expected = (math.exp(15 / 40) - 1) * 0.25 * 1.5 * 0.8  # the student's step 30 of 100, whatever the teacher's
    assert objective.learn(INFO)["coefficient"].item() == pytest.approx(expected, rel=1e-6)


def test_the_last_coefficient_survives_a_restart_in_which_no_reward_has_come_yet():
    reward = Reward(step=130, stage_step=30, version=121, terms=dict(zip(REWARD, (1.5, 0.8), strict=True)))
    objective, teacher = asynchronous(reward)
    objective.losses(teacher, batch(labels=False), INFO)
    objective.learn(INFO)
    other, again = asynchronous()
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    other.losses(again, batch(labels=False), INFO)
    assert other.coefficient.item() == objective.coefficient.item() != 1.0


def test_published_means_and_imagenets_are_what_networks_read():
    gray = torch.full((1, 3, 1, 1), 128.0)
    gray[:, 0] = 100.0  # red
    assert normalised(gray, "bgr_gray").flatten().tolist() == pytest.approx([0, 0, -28])
    assert normalised(gray, "bgr_city").flatten().tolist() == pytest.approx([54.84164, 45.09108, 27.6076], abs=1e-4)
    assert normalised(gray, "rgb_imagenet").flatten().tolist() == pytest.approx(
        [(100 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225], rel=1e-5
    )


@pytest.mark.slow
def test_a_run_in_strict_turns_that_was_stopped_has_the_losses_of_one_that_was_not(tmp_path, tiny_folder, monkeypatch):
    """Steps 15 to 20 have a teacher in the objective; the run stops in their middle."""
    monkeypatch.setattr("actors.student.STOP_CHECK_SECONDS", 0.0)
    given = {"recipe": "meta_pseudo_labels", "preset": "tiny", "steps": 20, "refresh": "once", "references": "never"}
    setup = resolve(AdaptOptions(name="x", runs=str(tmp_path), data=str(tiny_folder / "data"), **given))
    plan = replace(setup.plan, stages=tuple(map(_direct, setup.plan.stages)), log_every=1, checkpoint_every=0)

    def run(folder, stops_after=None):
        link = AloneLink(setup, Shelf(None))
        link.stop_requested = lambda: len([kind for kind, *_ in link.lines if kind == "train"]) == stops_after
        Student(replace(plan, folder=str(tmp_path / folder)), link, 0, 1, torch.device("cpu")).run()
        names = ("loss", "teacher", "discriminator", "labels/")
        return {
            step: {name: value for name, value in numbers.items() if name.startswith(names) and "/" in name}
            for kind, step, numbers in link.lines
            if kind == "train"
        }

    expected = run("whole")
    assert {"teacher/coefficient", "loss/pseudo"} <= expected[20].keys()
    before = run("stopped", stops_after=17)
    after = run("stopped")
    assert (max(before), min(after)) == (17, 18)
    assert {**before, **after} == expected
