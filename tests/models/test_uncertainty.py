"""Monte-Carlo dropout against the definition: T full passes, every probability volume upsampled."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.networks.deeplab import DeepLab, DeepLabConfig, HeadFeatures
from models.networks.proda import Proda
from models.networks.segmenter import upsample
from models.uncertainty import (
    UncertaintyRule,
    View,
    draw_masks,
    mean_probabilities,
    monte_carlo_labels,
    negative_labels,
    quantise,
    trunk_views,
)

SIZE = (48, 96)


def generators(images, seed=0):
    return [torch.Generator().manual_seed(seed + n) for n in range(images)]


@pytest.fixture
def one_head():
    """A small network of ProDA's with a classifier loud enough to make confident predictions."""
    torch.manual_seed(0)
    network = Proda(replace(DeepLabConfig.small(num_classes=7), heads="proda", extra_norm=True))
    torch.nn.init.normal_(network.layer5.classifier.weight, std=0.5)
    return network.eval()


def thinned(features, mask, t):
    """What is left of every head's features in a pass."""
    parts = [part * factors[t, :, :, None, None] for part, factors in zip(features, mask, strict=True)]
    return HeadFeatures(*parts) if isinstance(features, HeadFeatures) else tuple(parts)


@torch.no_grad()
def full_passes(network, batches, masks, size, temperature=1.0, offset=0.0):
    """q_t for every pass, (T, N, C, H, W): the whole network once per pass and view."""
    volumes = []
    for t in range(len(masks[0][0])):
        total = 0
        views = [(images, mirrored) for images in batches for mirrored in (False, True)]
        for (images, mirrored), mask in zip(views, masks, strict=True):
            features = network.trunk(images.flip(-1) if mirrored else images)
            scores = (network.classify(thinned(features, mask, t)).fused() + offset) / temperature
            q = upsample(scores.softmax(dim=1), size)
            total = total + (q.flip(-1) if mirrored else q)
        volumes.append(total / len(views))
    return torch.stack(volumes)


def reference_labels(q, rule):
    mean = q.mean(dim=0)
    confidence, winner = mean.max(dim=1)
    of_winner = q.gather(2, winner[None, :, None].expand(len(q), -1, 1, -1, -1))[:, :, 0]
    lowest, std = of_winner.amin(dim=0), of_winner.std(dim=0, correction=0)
    value = winner
    if rule.strategy == "mean":
        margin = confidence - rule.min_confidence
    elif rule.strategy == "min":
        margin = lowest - rule.min_confidence
        if rule.published_min:
            value = q.amin(dim=0).argmax(dim=1)
    else:
        margin = torch.minimum(confidence - rule.min_confidence, rule.max_std - std)
    label = torch.where(margin >= 0, value, 255).to(torch.uint8)
    return label, winner.to(torch.uint8), confidence, lowest, std, margin


def assert_equals_full_passes(network, batches, masks, size, rule, offset=None):
    ours = monte_carlo_labels(network, trunk_views(network, batches), masks, size, rule, offset=offset)
    q = full_passes(network, batches, masks, size, offset=0.0 if offset is None else offset[:, None, None])
    label, winner, confidence, lowest, std, margin = reference_labels(q, rule)
    torch.testing.assert_close(ours.confidence, confidence, atol=1e-5, rtol=0)
    if rule.strategy == "min":
        torch.testing.assert_close(ours.lowest, lowest, atol=1e-5, rtol=0)
    if rule.strategy == "std":
        torch.testing.assert_close(ours.std, std, atol=1e-5, rtol=0)
    top = q.mean(dim=0).topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-5  # where two classes tie, either may win
    assert torch.equal(ours.argmax[clear], winner[clear])
    decided = clear & (margin.abs() > 1e-5)
    assert torch.equal(ours.label[decided], label[decided])
    assert decided.float().mean() > 0.99
    return ours


RULES = [
    UncertaintyRule("mean", min_confidence=0.4),
    UncertaintyRule("min", min_confidence=0.35),
    UncertaintyRule("min", min_confidence=0.35, published_min=True),
    UncertaintyRule("std", min_confidence=0.3, max_std=0.1),
]


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("rule", RULES, ids=["mean", "min", "published-min", "std"])
def test_it_equals_t_full_passes_with_the_same_masks(small, one_head, rule, heads):
    torch.manual_seed(1)
    batches = [torch.randn(3, 3, 48, 96), torch.randn(3, 3, 60, 120)]
    masks = draw_masks(generators(3), views=4, passes=6, channels=64, rate=0.3, heads=heads)
    ours = assert_equals_full_passes(small if heads == 2 else one_head, batches, masks, SIZE, rule)
    kept = (ours.label != 255).float().mean().item()
    assert 0.05 < kept < 0.95, "the case must exercise the rule"


OFFSET = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, -0.5, 0.25])


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("rule", RULES, ids=["mean", "min", "published-min", "std"])
def test_an_offset_is_added_to_the_scores_of_every_pass(small, one_head, rule, heads):
    """Inference adjustment, methods 7.4."""
    network = small if heads == 2 else one_head
    torch.manual_seed(1)
    batches = [torch.randn(2, 3, 48, 96), torch.randn(2, 3, 60, 120)]
    masks = draw_masks(generators(2), views=4, passes=4, channels=64, rate=0.3, heads=heads)
    ours = assert_equals_full_passes(network, batches, masks, SIZE, rule, OFFSET)
    views = trunk_views(network, batches)
    plain = monte_carlo_labels(network, views, masks, SIZE, rule)
    assert (ours.argmax != plain.argmax).float().mean() > 0.05, "the case must have something to say"
    zeros = monte_carlo_labels(network, views, masks, SIZE, rule, offset=torch.zeros(7))
    for before, after in ((plain.label, zeros.label), (plain.confidence, zeros.confidence), (plain.std, zeros.std)):
        assert before is after is None or torch.equal(before, after)


def test_the_mean_over_views_is_of_adjusted_probabilities(small):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 48, 96)
    views = trunk_views(small, [images])
    with torch.no_grad():
        offset = OFFSET[:, None, None]
        plain = upsample((small(images).fused() + offset).softmax(dim=1), SIZE)
        mirrored = upsample((small(images.flip(-1)).fused() + offset).softmax(dim=1), SIZE).flip(-1)
    ours = mean_probabilities(small, views, None, SIZE, OFFSET)
    torch.testing.assert_close(ours, (plain + mirrored) / 2, atol=1e-6, rtol=0)
    before = mean_probabilities(small, views, None, SIZE)
    assert (before.argmax(1) != ours.argmax(1)).float().mean() > 0.05
    assert torch.equal(mean_probabilities(small, views, None, SIZE, torch.zeros(7)), before), "views stay as they are"


def test_the_published_network_equals_full_passes_too(resnet101):
    torch.manual_seed(1)
    batches = [torch.randn(1, 3, 32, 64), torch.randn(1, 3, 40, 80)]
    masks = draw_masks(generators(1), views=4, passes=3, channels=512)
    assert_equals_full_passes(resnet101, batches, masks, (32, 64), UncertaintyRule("std", 0.2, 0.02))


def test_pixels_are_gathered_in_chunks_without_a_seam(small, monkeypatch):
    torch.manual_seed(1)
    views = trunk_views(small, [torch.randn(1, 3, 48, 96)])
    masks = draw_masks(generators(1), views=2, passes=4, channels=64)
    whole = monte_carlo_labels(small, views, masks, SIZE, UncertaintyRule("std"))
    monkeypatch.setattr("models.uncertainty.PIXELS_AT_ONCE", 5 * SIZE[1])
    parts = monte_carlo_labels(small, views, masks, SIZE, UncertaintyRule("std"))
    assert torch.equal(whole.std, parts.std)


# Rules on hand-made probabilities.


def label_of(passes, rule, views=4):
    """Labels of one pixel whose pass t has the given class probabilities, equal in all views.

    The classifier of the primary head is the identity and the mask of pass t holds log p_t.
    """
    passes = torch.tensor(passes)
    classes = passes.shape[1]
    config = DeepLabConfig(
        num_classes=classes, layers=(1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=8, groups=4
    )
    network = DeepLab(config).eval()
    weight = torch.zeros(classes, 8, 1, 1)
    weight[:, :classes, 0, 0] = torch.eye(classes)
    network.layer6.classifier.weight.data = weight
    main = torch.zeros(len(passes), 1, 8)
    main[:, 0, :classes] = passes.log()
    ones = torch.ones(1, 8, 1, 1)
    view = View(HeadFeatures(ones, ones))
    masks = (torch.zeros_like(main), main)
    found = monte_carlo_labels(network, [view] * views, [masks] * views, (1, 1), rule)
    return found.label.item(), found


def two(*of_first):
    return [[p, 1 - p] for p in of_first]


def test_five_passes_that_sum_to_point_85_keep_and_to_point_79_drop():
    assert label_of(two(*[0.85] * 5), UncertaintyRule("mean"))[0] == 0
    assert label_of(two(*[0.79] * 5), UncertaintyRule("mean"))[0] == 255
    assert label_of(two(0.95, 0.75, 0.85, 0.85, 0.85), UncertaintyRule("mean"))[0] == 0


def test_confidence_is_on_the_unit_scale_whatever_the_number_of_views():
    for views in (1, 2, 4):
        assert label_of(two(0.85), UncertaintyRule(), views)[1].confidence.item() == pytest.approx(0.85)


def test_min_asks_every_pass():
    assert label_of(two(0.95, 0.81, 0.9), UncertaintyRule("min"))[0] == 0
    label, found = label_of(two(0.95, 0.79, 0.9), UncertaintyRule("min"))
    assert label == 255
    assert found.argmax.item() == 0
    assert found.lowest.item() == pytest.approx(0.79)


def test_std_asks_for_a_sure_mean_and_a_small_population_deviation():
    steady = two(0.9, 0.8, 0.9, 0.8)  # deviation 0.05
    label, found = label_of(steady, UncertaintyRule("std", max_std=0.0501))
    assert label == 0
    assert found.std.item() == pytest.approx(0.05, abs=1e-6)
    assert label_of(steady, UncertaintyRule("std", max_std=0.0499))[0] == 255
    assert label_of(two(0.7, 0.7), UncertaintyRule("std"))[0] == 255


def test_the_published_min_stores_the_class_of_the_largest_minimum():
    passes = [[0.60, 0.35, 0.05], [0.05, 0.35, 0.60], [0.60, 0.35, 0.05]]  # mean winner 0, min winner 1
    fixed = UncertaintyRule("min", min_confidence=0.05 - 1e-6)
    published = UncertaintyRule("min", min_confidence=0.05 - 1e-6, published_min=True)
    assert label_of(passes, fixed)[0] == 0
    assert label_of(passes, published)[0] == 1


# Views and masks.


def test_one_pass_without_dropout_is_the_plain_multi_view_prediction(small):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 48, 96)
    with torch.no_grad():
        plain = upsample(small(images).fused().softmax(dim=1), SIZE)
        mirrored = upsample(small(images.flip(-1)).fused().softmax(dim=1), SIZE).flip(-1)
    ours = mean_probabilities(small, trunk_views(small, [images]), None, SIZE)
    torch.testing.assert_close(ours, (plain + mirrored) / 2, atol=1e-6, rtol=0)
    off = draw_masks(generators(2), views=2, passes=1, channels=64, rate=0.0)
    labels = monte_carlo_labels(small, trunk_views(small, [images]), off, SIZE, UncertaintyRule())
    torch.testing.assert_close(labels.confidence, ours.amax(dim=1), atol=1e-6, rtol=0)


def test_one_head_without_dropout_is_its_plain_multi_view_prediction(one_head):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 48, 96)
    with torch.no_grad():
        plain = upsample(one_head(images).main.softmax(dim=1), SIZE)
        mirrored = upsample(one_head(images.flip(-1)).main.softmax(dim=1), SIZE).flip(-1)
    ours = mean_probabilities(one_head, trunk_views(one_head, [images]), None, SIZE)
    torch.testing.assert_close(ours, (plain + mirrored) / 2, atol=1e-6, rtol=0)


def test_an_image_gets_the_same_labels_alone_and_in_a_batch(small):
    torch.manual_seed(1)
    images = torch.randn(3, 3, 48, 96)
    rule = UncertaintyRule("std", min_confidence=0.3)

    def label(part, seeds):
        masks = draw_masks(seeds, views=2, passes=4, channels=64)
        return monte_carlo_labels(small, trunk_views(small, [part]), masks, SIZE, rule)

    together = label(images, generators(3))
    alone = label(images[1:2], generators(1, seed=1))
    torch.testing.assert_close(together.confidence[1], alone.confidence[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.std[1], alone.std[0], atol=1e-5, rtol=0)


def test_masks_drop_the_rate_and_keep_the_expectation():
    masks = draw_masks(generators(2), views=4, passes=10, channels=512, rate=0.1)
    assert len(masks) == 4
    assert masks[0][0].shape == masks[0][1].shape == (10, 2, 512)
    values = torch.stack([torch.stack(mask) for mask in masks])
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert values.mean().item() == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][1][0], masks[0][1][1])
    assert not torch.equal(masks[0][1][:, 0], masks[0][1][:, 1])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_a_network_gets_masks_for_as_many_heads_as_it_has():
    for heads in (1, 2):
        masks = draw_masks(generators(2), views=3, passes=4, channels=8, heads=heads)
        assert [[factors.shape for factors in mask] for mask in masks] == [[(4, 2, 8)] * heads] * 3


def test_the_same_generator_draws_the_same_masks():
    first, second = (draw_masks(generators(1, seed=5), views=2, passes=3, channels=8) for _ in range(2))
    assert torch.equal(first[1][1], second[1][1])


def test_confidences_quantise_like_the_selection_rules():
    from models.selection import quantise_confidence

    values = torch.rand(1000)
    assert np.array_equal(quantise(values).numpy(), quantise_confidence(values.numpy()))


# Bad input.


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strategy": "median"}, "choose one of mean, min, std"),
        ({"min_confidence": 3.2}, r"\[0, 1\]"),
        ({"max_std": -1.0}, "not negative"),
    ],
)
def test_an_impossible_rule_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        UncertaintyRule(**fields)


def test_a_network_in_training_mode_is_refused(small):
    with pytest.raises(ValueError, match="eval"):
        trunk_views(small.train(), [torch.randn(1, 3, 48, 96)])


def test_masks_that_do_not_fit_are_refused(small):
    views = trunk_views(small, [torch.randn(2, 3, 48, 96)])
    with pytest.raises(ValueError, match="one mask per view"):
        monte_carlo_labels(small, views, [], SIZE, UncertaintyRule())
    wrong = draw_masks(generators(1), views=2, passes=2, channels=64)
    with pytest.raises(ValueError, match="2 passes over 2 images"):
        monte_carlo_labels(small, views, wrong, SIZE, UncertaintyRule())
    with pytest.raises(ValueError, match="rate"):
        draw_masks(generators(1), views=1, passes=1, channels=8, rate=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        draw_masks([], views=1, passes=1, channels=8)


def test_masks_for_another_number_of_heads_are_refused(small, one_head):
    for network, heads in ((small, 1), (one_head, 2)):
        views = trunk_views(network, [torch.randn(2, 3, 48, 96)])
        masks = draw_masks(generators(2), views=2, passes=3, channels=64, heads=heads)
        with pytest.raises(ValueError, match=rf"2 images with 64 channels and {3 - heads} heads need \(3, 2, 64\) for"):
            monte_carlo_labels(network, views, masks, SIZE, UncertaintyRule())


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_negative_classes_are_those_that_every_pass_finds_impossible(small, one_head, temperature, heads):
    """The definition, in float64, from whole passes whose logits are divided by the temperature."""
    network = small if heads == 2 else one_head
    batches = [torch.randn(2, 3, 48, 96), torch.randn(2, 3, 64, 128)]
    views = trunk_views(network, batches)
    masks = draw_masks(generators(2), views=len(views), passes=4, channels=64, rate=0.3, heads=heads)
    volumes = full_passes(network, batches, masks, SIZE, temperature).double()
    mean, std = volumes.mean(0), volumes.std(0, correction=0)
    limits = {"max_probability": mean.median().item(), "max_std": std.median().item()}
    found = negative_labels(network, views, masks, SIZE, temperature=temperature, **limits)
    expected = (mean <= limits["max_probability"]) & (std < limits["max_std"])
    assert found.shape == (2, network.config.num_classes, *SIZE)
    assert (found == expected).float().mean() > 0.999  # what lies on a limit may fall to either side
    assert 0.05 < expected.float().mean() < 0.95


@torch.no_grad()
def test_an_offset_counts_before_the_temperature_of_negative_classes(small):
    torch.manual_seed(1)
    batches = [torch.randn(2, 3, 48, 96)]
    views = trunk_views(small, batches)
    masks = draw_masks(generators(2), views=2, passes=4, channels=64, rate=0.3)
    volumes = full_passes(small, batches, masks, SIZE, 2.0, OFFSET[:, None, None]).double()
    mean, std = volumes.mean(0), volumes.std(0, correction=0)
    limits = {"max_probability": mean.median().item(), "max_std": std.median().item()}
    found = negative_labels(small, views, masks, SIZE, offset=OFFSET, **limits)
    expected = (mean <= limits["max_probability"]) & (std < limits["max_std"])
    assert (found == expected).float().mean() > 0.999
    plain = negative_labels(small, views, masks, SIZE, **limits)
    assert (found != plain).float().mean() > 0.05
    assert torch.equal(negative_labels(small, views, masks, SIZE, offset=torch.zeros(7), **limits), plain)
