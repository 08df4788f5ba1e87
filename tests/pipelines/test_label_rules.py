import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.prior_estimate import CELLS, Adjustment
from actors.records import decode, encode
from models.median import CAP
from models.networks.deeplab import DeepLab, DeepLabConfig, HeadFeatures
from models.networks.fada import Fada, FadaConfig
from models.networks.proda import Proda
from models.priors import encode_posteriors
from models.uncertainty import draw_masks, negative_labels, trunk_views
from pipelines import label_rules
from pipelines.label_rules import MedianRule, MonteCarloRule, PrototypeRule, evidence_of, fewest_pixels, offset_of
from pipelines.selections import PercentileSelection
from pipelines.views import network_input

CONFIG = DeepLabConfig(
    num_classes=4, layers=(1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=16, groups=4, dilations=(1, 2)
)


def rule(keep="all", **more):
    defaults = {"num_classes": 4, "sizes": ((48, 32), (60, 40)), "label_size": (24, 16), "passes": 3, "dropout": 0.3}
    return MonteCarloRule(**{**defaults, **more}, keep=keep, threshold=0.6, max_std=0.02)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = DeepLab(CONFIG)
    for head in made.heads():
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
    return made.eval()


def views(n=3):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8)) for w, h in ((48, 32), (60, 40))]


def test_the_record_holds_label_and_confidence_at_label_size():
    layout = rule().layout
    assert layout.columns == (("label", (16, 24)), ("confidence", (16, 24)))
    assert layout.num_classes == 4


def test_a_rule_travels_by_pickle():
    assert pickle.loads(pickle.dumps(rule())) == rule()


def test_the_same_seed_gives_the_same_label_whatever_else_is_in_the_batch(network):
    both = views()
    together = rule().label(network, both, [1, 2, 3])
    for n in range(3):
        (alone,) = rule().label(network, [view[n : n + 1] for view in both], [n + 1])
        difference = alone.columns["confidence"].astype(int) - together[n].columns["confidence"]
        assert abs(difference).max() <= 1, "a rounding step at most"
        assert (alone.columns["label"] == together[n].columns["label"]).mean() > 0.999


def test_another_seed_gives_another_confidence(network):
    one, other = (rule().label(network, views(1), [seed])[0].columns["confidence"] for seed in (1, 2))
    assert (one != other).any()


def test_statistics_are_those_of_the_columns(network):
    for made in rule().label(network, views(), [1, 2, 3]):
        label, confidence = made.columns["label"], made.columns["confidence"]
        assert label.dtype == confidence.dtype == np.uint8
        assert label.max() < 4, "every pixel keeps its winner until it is read"
        np.testing.assert_array_equal(made.class_pixels, [(label == c).sum() for c in range(4)])
        expected = np.zeros((4, 256), np.int64)
        np.add.at(expected, (label, confidence), 1)
        np.testing.assert_array_equal(made.histogram, expected)


def test_fixed_rules_withhold_at_the_teacher_and_keep_the_winners_statistics(network):
    everything = rule().label(network, views(), [1, 2, 3])
    for keep in ("mean", "min", "std"):
        kept = 0
        for whole, made in zip(everything, rule(keep).label(network, views(), [1, 2, 3]), strict=True):
            label, winner = made.columns["label"], whole.columns["label"]
            stays = label != 255
            kept += stays.sum()
            np.testing.assert_array_equal(label[stays], winner[stays])
            np.testing.assert_array_equal(made.histogram, whole.histogram)
            assert made.class_pixels.sum() == stays.sum()
            assert (made.columns["confidence"][stays] >= 0.6 * 255 - 1).all()
            if keep == "mean":
                assert (stays == (whole.columns["confidence"] >= 0.6 * 255)).mean() > 0.99
        assert 0 < kept < 3 * 16 * 24


def histogram(**classes):
    found = np.zeros((3, 256), np.int64)
    for name, confidences in classes.items():
        for confidence in confidences:
            found[int(name[1:]), confidence] += 1
    return found


def test_percentile_selection_by_hand():
    selection = PercentileSelection(0.5, sure=0.8, min_pixels=4)
    given = histogram(c0=[10, 20, 30, 40], c1=[210, 220, 230, 240], c2=[99, 100])
    # Class 0 keeps its upper half; class 1 whatever is at least 0.8 sure; class 2 is too small for a percentile.
    assert selection.thresholds(given).tolist() == [30, 204, 0]
    record = {
        "label": np.array([[0, 0, 1, 1, 2, 255]], np.uint8),
        "confidence": np.array([[29, 30, 203, 204, 0, 255]], np.uint8),
    }
    assert selection.apply(record, selection.thresholds(given)).tolist() == [[255, 0, 255, 1, 2, 255]]


@pytest.mark.parametrize("keep", ["all", "mean"])
def test_the_bottom_rows_get_no_label_and_are_counted_nowhere(network, keep):
    whole = rule(keep).label(network, views(1), [1])[0]
    (made,) = rule(keep, ignore_bottom=0.25).label(network, views(1), [1])
    assert (made.columns["label"][12:] == 255).all()
    np.testing.assert_array_equal(made.columns["label"][:12], whole.columns["label"][:12])
    assert made.class_pixels.sum() == (whole.columns["label"][:12] != 255).sum()
    assert made.histogram.sum() == 12 * 24


def test_negative_classes_are_bits_of_a_column_of_their_own(network):
    made = rule(negative=True, ignore_bottom=0.25)
    assert dict(made.layout.columns)["negative"] == (1, 16, 24)
    both = views(2)
    plain, found = rule(ignore_bottom=0.25).label(network, both, [1, 2]), made.label(network, both, [1, 2])
    features = trunk_views(network, [network_input(view) for view in both])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    masks = draw_masks(generators, views=4, passes=3, channels=16, rate=0.3)
    expected = negative_labels(network, features, masks, (16, 24)).numpy()
    expected[:, :, 12:] = False
    for before, after, negative in zip(plain, found, expected, strict=True):
        np.testing.assert_array_equal(before.columns["label"], after.columns["label"])
        bits = np.unpackbits(after.columns["negative"], axis=0, bitorder="little")[:4].astype(bool)
        np.testing.assert_array_equal(bits, negative)


# ProDA's rule.

SIZE = 104, 72
LABEL = 50, 34
TAU = 0.4


def prototype_rule(denoised, **more):
    defaults = {"num_classes": 4, "size": SIZE, "label_size": LABEL, "feature_channels": 16, "temperature": TAU}
    return PrototypeRule(denoised=denoised, **{**defaults, **more})


@pytest.fixture(scope="module")
def proda():
    """A network whose prototypes lie among its features, and whose winners are of three classes."""
    torch.manual_seed(0)
    made = Proda(replace(CONFIG, heads="proda", pixels="rgb_unit")).eval()
    torch.nn.init.normal_(made.layer5.classifier.weight)
    torch.nn.init.normal_(made.prototypes)
    return made


def images(n=3):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (n, SIZE[1], SIZE[0], 3), dtype=np.uint8))


def enlarged(maps, size=LABEL):
    """Float64 (K, h, w) to label size, corners aligned."""

    def along(count, cells):
        place = np.arange(count) * (cells - 1) / (count - 1)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells)))

    rows, columns = (along(count, cells) for count, cells in zip(size[::-1], maps.shape[1:], strict=True))
    return np.einsum("ih,khw,jw->kij", rows, maps, columns)


def softmax(z):
    e = np.exp(z - z.max(0))
    return e / e.sum(0)


@torch.no_grad()
def outputs(network, batch):
    """Scores and features of every image in float64, from RGB between 0 and 1."""
    found = network(torch.from_numpy(batch.numpy().astype(np.float32) / 255).permute(0, 3, 1, 2))
    return [(main.double().numpy(), feature.double().numpy()) for main, feature in zip(*found, strict=True)]


def weighed(network, features):
    """What the prototypes say of features, float64 (C, h, w)."""
    prototypes = network.prototypes.double().numpy()
    return softmax(-TAU * np.sqrt(((features[None] - prototypes[:, :, None, None]) ** 2).sum(1)))


def close_in_steps(found, expected):
    """Whether uint8 is float64 in steps of 1/255, but for rounding."""
    assert found.dtype == np.uint8
    assert (found == np.rint(255 * expected)).mean() > 0.99
    assert np.abs(found - 255 * expected).max() < 0.52


def same_where_clear(found, share, kept=None):
    """Whether a label is the class with the largest share, where no other comes close."""
    first, second = np.sort(share, 0)[::-1][:2]
    clear = first - second > 1e-5
    expected = np.where(True if kept is None else kept, share.argmax(0), 255)
    assert (found == expected)[clear].all()
    assert clear.mean() > 0.99
    assert len(np.unique(found)) > 2


def test_soft_labels_are_the_networks_own(proda):
    found = prototype_rule(False).label(proda, [images()], [1, 2, 3])
    for made, (main, _) in zip(found, outputs(proda, images()), strict=True):
        soft = softmax(main)
        assert set(made.columns) == {"label", "confidence", "soft"}
        close_in_steps(made.columns["soft"], soft)
        close_in_steps(made.columns["confidence"], soft.max(0))
        same_where_clear(made.columns["label"], soft)


def test_denoised_labels_are_those_that_the_prototypes_leave(proda):
    """Methods 5.2, step 5, at the size of the label; and steps 8 and 10 from the same features."""
    changed = 0
    found = prototype_rule(True).label(proda, [images()], [1, 2, 3])
    for made, (main, feature) in zip(found, outputs(proda, images()), strict=True):
        soft, features = enlarged(softmax(main)), enlarged(feature)
        share = soft * weighed(proda, features)
        share /= share.sum(0)
        changed += (share.argmax(0) != soft.argmax(0)).sum()
        assert set(made.columns) == {"label", "confidence", "assignments", "means"}
        same_where_clear(made.columns["label"], share)
        close_in_steps(made.columns["confidence"], share.max(0))
        close_in_steps(made.columns["assignments"], weighed(proda, feature))
        winners, means = enlarged(main).argmax(0), made.columns["means"].view(np.float32)
        assert means.shape == (4, 16)
        for k in range(4):
            mine = winners == k
            expected = features[:, mine].mean(1) if mine.sum() >= 10 else np.zeros(16)
            np.testing.assert_allclose(means[k], expected, atol=2e-3 if mine.sum() else 0)
    assert changed > 100, "the prototypes must have something to say"


@pytest.mark.parametrize(("shape", "fewest"), [((129, 257), 10), ((256, 512), 10), ((15, 30), 1), ((60, 120), 2)])
def test_a_class_needs_ten_pixels_of_a_published_map_and_as_large_a_share_of_a_small_one(shape, fewest):
    assert fewest_pixels(torch.zeros(1, *shape)) == fewest


def test_a_class_of_too_few_pixels_leaves_no_mean(proda, monkeypatch):
    """On a label of 48 pixels there are such, if a class needs ten of them."""
    monkeypatch.setattr(label_rules, "PUBLISHED_CELLS", 48)
    made = prototype_rule(True, label_size=(8, 6)).label(proda, [images()], [0, 0, 0])
    few = 0
    for one, (main, _) in zip(made, outputs(proda, images()), strict=True):
        counts = np.bincount(enlarged(main, (8, 6)).argmax(0).reshape(-1), minlength=4)
        assert one.columns["means"].view(np.float32).any(1).tolist() == (counts >= 10).tolist()
        few += ((counts > 0) & (counts < 10)).sum()
    assert few > 0


def test_the_temperature_decides_how_much_the_prototypes_say(proda):
    plain = enlarged(softmax(outputs(proda, images(1))[0][0])).argmax(0)
    cold = prototype_rule(True, temperature=1e-6).label(proda, [images(1)], [0])[0].columns
    warm = prototype_rule(True, temperature=5.0).label(proda, [images(1)], [0])[0].columns
    assert (cold["label"] == plain).mean() > 0.99
    assert (warm["label"] == plain).mean() < 0.9
    assert set(np.unique(cold["assignments"])) == {64}, "a quarter"


def test_what_is_not_sure_enough_is_withheld(proda):
    everything = prototype_rule(True).label(proda, [images()], [0, 0, 0])
    some = prototype_rule(True, threshold=0.6).label(proda, [images()], [0, 0, 0])
    for whole, made in zip(everything, some, strict=True):
        confidence, label = whole.columns["confidence"], made.columns["label"]
        np.testing.assert_array_equal(made.columns["confidence"], confidence)
        assert (label[confidence > 153] == whole.columns["label"][confidence > 153]).all()
        assert (label[confidence < 153] == 255).all()
        assert 0.05 < (label == 255).mean() < 0.95
        assert made.class_pixels.sum() == (label != 255).sum()
        np.testing.assert_array_equal(made.histogram, whole.histogram)  # as every rule's, before any threshold
        for name in ("assignments", "means"):
            np.testing.assert_array_equal(made.columns[name], whole.columns[name])


@pytest.mark.parametrize("denoised", [False, True])
def test_its_statistics_are_those_of_its_columns(proda, denoised):
    for made in prototype_rule(denoised).label(proda, [images()], [1, 2, 3]):
        label, confidence = made.columns["label"], made.columns["confidence"]
        np.testing.assert_array_equal(made.class_pixels, [(label == c).sum() for c in range(4)])
        expected = np.zeros((4, 256), np.int64)
        np.add.at(expected, (label, confidence), 1)
        np.testing.assert_array_equal(made.histogram, expected)


@pytest.mark.parametrize("denoised", [False, True])
def test_bottom_rows_get_no_label_and_all_else_stays(proda, denoised):
    (whole,) = prototype_rule(denoised).label(proda, [images(1)], [1])
    (made,) = prototype_rule(denoised, ignore_bottom=0.23).label(proda, [images(1)], [1])
    label = made.columns["label"]
    kept = label.shape[0] - round(0.23 * label.shape[0])
    assert (kept == 26) is denoised, "0.23 · 34 = 7.82 of 34 rows"
    assert (label[kept:] == 255).all()
    np.testing.assert_array_equal(label[:kept], whole.columns["label"][:kept])
    for name in set(whole.columns) - {"label"}:
        np.testing.assert_array_equal(made.columns[name], whole.columns[name])
    assert made.class_pixels.sum() == made.histogram.sum() == kept * label.shape[1]


@pytest.mark.parametrize("denoised", [False, True])
def test_its_records_are_what_its_layout_says_and_come_back_from_the_bank(proda, denoised):
    made_by = prototype_rule(denoised)
    assert made_by.view_sizes == (SIZE,)
    grid = tuple(outputs(proda, images(1))[0][0].shape)
    label = (34, 50) if denoised else grid[1:]
    expected: dict[str, tuple[int, ...]] = {"label": label, "confidence": label}
    expected |= {"assignments": grid, "means": (4, 64)} if denoised else {"soft": grid}
    assert dict(made_by.layout.columns) == expected
    assert list(dict(made_by.layout.columns))[:2] == ["label", "confidence"]
    made = made_by.label(proda, [images(2)], [0, 0])
    columns, pixels = [one.columns for one in made], [one.class_pixels for one in made]
    table = encode(made_by.layout, ["a", "b"], columns, pixels, weights_version=1, made_at_step=1)
    for row in range(2):
        back = decode(table, row)
        for name, column in columns[row].items():
            np.testing.assert_array_equal(back[name], column)
        if denoised:
            vectors = torch.from_numpy(np.stack([back["means"]])).view(torch.float32)
            np.testing.assert_array_equal(vectors[0], columns[row]["means"].view(np.float32))


@pytest.mark.parametrize("denoised", [False, True])
def test_nothing_of_it_is_random_and_images_do_not_mix(proda, denoised):
    made_by = prototype_rule(denoised)
    assert pickle.loads(pickle.dumps(made_by)) == made_by
    together = made_by.label(proda, [images()], [1, 2, 3])
    for n in range(3):
        (alone,) = made_by.label(proda, [images()[n : n + 1]], [9])
        assert (alone.columns["label"] == together[n].columns["label"]).mean() > 0.999
        difference = alone.columns["confidence"].astype(int) - together[n].columns["confidence"]
        assert abs(difference).max() <= 1, "a rounding step at most"


def test_a_network_without_prototypes_cannot_follow_it(network):
    with pytest.raises(AssertionError):
        prototype_rule(False).label(network, [images(1)], [0])


def test_monte_carlo_labels_of_one_head_see_what_it_reads(proda):
    """Without dropout: its own mean over the image and its mirror, from RGB between 0 and 1."""
    mc = MonteCarloRule(
        num_classes=4, sizes=(SIZE,), label_size=LABEL, passes=1, dropout=0.0, keep="mean", threshold=0.5, max_std=0.0
    )
    plain, mirrored = outputs(proda, images()), outputs(proda, images().flip(2))
    for made, (one, _), (other, _) in zip(mc.label(proda, [images()], [1, 2, 3]), plain, mirrored, strict=True):
        p = enlarged((softmax(one) + softmax(other)[:, :, ::-1]) / 2)
        close_in_steps(made.columns["confidence"], p.max(0))
        surely = np.abs(p.max(0) - 0.5) > 1e-5
        kept = np.where(p.max(0) >= 0.5, p.argmax(0), 255)
        assert (made.columns["label"] == kept)[surely].mean() > 0.99
        assert 0.02 < (kept == 255).mean() < 0.98


# Adjusted to other class frequencies (methods §7.4).

OFFSET = np.array([1.5, -1.0, 0.0, 0.7], np.float32)
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def fada():
    """A network without a dropout before its classifier."""
    torch.manual_seed(0)
    made = Fada(FadaConfig(4, layers=(1, 1, 1, 1), width=4, norms="batch", dilations=(1, 2), pixels="rgb_unit"))
    for branch in made.classifier.conv2d_list:
        torch.nn.init.normal_(branch.weight, std=0.3)
    return made.eval()


def once(**more):
    """A rule as label shift has it: one plain view, no dropout."""
    return rule(sizes=(SIZE,), label_size=LABEL, passes=1, dropout=0.0, mirrored=False, **more)


CASES = {
    "with dropout": (rule, "network", lambda: views()),
    "plain, without dropout": (once, "fada", lambda: [images()]),
    "soft": (lambda **more: prototype_rule(False, **more), "proda", lambda: [images()]),
    "denoised": (lambda **more: prototype_rule(True, **more), "proda", lambda: [images()]),
    "median": (lambda **more: MedianRule(4, LABEL, **more), "network", lambda: [images(2)[:, :34, :50]]),
}


@pytest.fixture(params=CASES)
def case(request):
    """How to make a rule, its network, and views."""
    made_by, network, batches = CASES[request.param]
    return made_by, request.getfixturevalue(network), batches()


def labelled(made_by, network, batches, adjustment=None):
    return made_by.label(network, batches, SEEDS[: len(batches[0])], adjustment)


@torch.no_grad()
def scores_of(network, view):
    """Unadjusted class scores of a plain view, float64 (N, C, h, w)."""
    return network(network_input(view, network.config.pixels)).fused().double().numpy()


@torch.no_grad()
def slow_shares(made_by, network, batches, offset):
    """Mean over whole passes and views, at label size, float64 (N, C, H, W)."""
    inputs = [network_input(view, network.config.pixels) for view in batches]
    seen = [
        (flip, x.flip(3) if flip else x) for x in inputs for flip in ((False, True) if made_by.mirrored else (False,))
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(inputs[0])]]
    masks, passes, total = None, 1, 0
    if network.heads():
        masks, passes = draw_masks(generators, views=len(seen), passes=3, channels=16, rate=0.3), 3
    for number, (flip, x) in enumerate(seen):
        for t in range(passes):
            features = network.trunk(x)
            if masks is not None:
                kept = [factors[t, :, :, None, None] for factors in masks[number]]
                features = HeadFeatures(*(part * factors for part, factors in zip(features, kept, strict=True)))
            z = network.classify(features).fused().double().numpy() + offset[:, None, None]
            p = np.stack([softmax(one) for one in z])
            total = total + np.stack([enlarged(one, made_by.label_size) for one in (p[..., ::-1] if flip else p)])
    return total / (len(seen) * passes)


@pytest.mark.parametrize("case", ["with dropout", "plain, without dropout"], indirect=True)
def test_monte_carlo_labels_are_of_adjusted_scores(case):
    make, network, batches = case
    made_by = make()
    plain = labelled(made_by, network, batches)
    found = labelled(made_by, network, batches, Adjustment(OFFSET))
    for made, before, share in zip(found, plain, slow_shares(made_by, network, batches, OFFSET), strict=True):
        same_where_clear(made.columns["label"], share)
        assert np.abs(made.columns["confidence"] - 255 * share.max(0)).max() < 0.6
        assert (made.columns["label"] != before.columns["label"]).mean() > 0.01


def test_soft_labels_are_of_adjusted_scores(proda):
    found = labelled(prototype_rule(False), proda, [images()], Adjustment(OFFSET))
    for made, (main, _) in zip(found, outputs(proda, images()), strict=True):
        soft = softmax(main + OFFSET[:, None, None])
        close_in_steps(made.columns["soft"], soft)
        close_in_steps(made.columns["confidence"], soft.max(0))
        same_where_clear(made.columns["label"], soft)
        assert (soft.argmax(0) != main.argmax(0)).mean() > 0.05


def test_denoised_labels_are_what_prototypes_leave_of_adjusted_scores(proda):
    found = labelled(prototype_rule(True), proda, [images()], Adjustment(OFFSET))
    for made, (main, feature) in zip(found, outputs(proda, images()), strict=True):
        adjusted = main + OFFSET[:, None, None]
        features = enlarged(feature)
        share = enlarged(softmax(adjusted)) * weighed(proda, features)
        share /= share.sum(0)
        same_where_clear(made.columns["label"], share)
        close_in_steps(made.columns["confidence"], share.max(0))
        close_in_steps(made.columns["assignments"], weighed(proda, feature))  # a prototype has no frequency
        winners, means = enlarged(adjusted).argmax(0), made.columns["means"].view(np.float32)
        for k in range(4):
            mine = winners == k
            expected = features[:, mine].mean(1) if mine.sum() >= 10 else np.zeros(16)
            np.testing.assert_allclose(means[k], expected, atol=2e-3 if mine.sum() else 0)


def test_medians_are_of_adjusted_scores(network):
    batch = [images(2)[:, :34, :50]]
    found = labelled(MedianRule(4, LABEL), network, batch, Adjustment(OFFSET))
    for made, z in zip(found, scores_of(network, batch[0]), strict=True):
        share = softmax(enlarged(z) + OFFSET[:, None, None])
        confidence, winner = share.max(0), share.argmax(0)
        kept = np.zeros(winner.shape, bool)
        for k in np.unique(winner):
            sure = np.sort(confidence[winner == k])
            kept |= (winner == k) & (confidence >= min(sure[(len(sure) - 1) // 2], CAP))
        assert (made.columns["label"] == np.where(kept, winner, 255)).mean() > 0.99
        close_in_steps(made.columns["confidence"], confidence)
        assert 0.1 < kept.mean() < 0.9


def test_negative_classes_are_of_adjusted_scores(network):
    both = views(2)
    features = trunk_views(network, [network_input(view) for view in both])
    masks = draw_masks(
        [torch.Generator().manual_seed(seed) for seed in (1, 2)], views=4, passes=3, channels=16, rate=0.3
    )
    expected = negative_labels(network, features, masks, (16, 24), offset=torch.from_numpy(OFFSET)).numpy()
    for made, negative in zip(labelled(rule(negative=True), network, both, Adjustment(OFFSET)), expected, strict=True):
        bits = np.unpackbits(made.columns["negative"], axis=0, bitorder="little")[:4].astype(bool)
        np.testing.assert_array_equal(bits, negative)


def assert_same_labels(one, other):
    for mine, its in zip(one, other, strict=True):
        assert mine.columns.keys() == its.columns.keys()
        for name, column in mine.columns.items():
            np.testing.assert_array_equal(column, its.columns[name])
        np.testing.assert_array_equal(mine.class_pixels, its.class_pixels)
        np.testing.assert_array_equal(mine.histogram, its.histogram)


def test_an_offset_of_zero_changes_nothing_nor_does_being_asked_what_one_sees(case):
    made_by, network, batches = case
    plain = labelled(made_by(), network, batches)
    assert_same_labels(plain, labelled(made_by(), network, batches, Adjustment(np.zeros(4, np.float32))))
    assert_same_labels(plain, labelled(made_by(), network, batches, Adjustment(np.zeros(4, np.float32), True, 1.8)))


def test_an_adjusted_record_has_the_statistics_of_its_columns_and_no_bottom(case):
    made_by, network, batches = case
    for made in labelled(made_by(ignore_bottom=0.25), network, batches, Adjustment(OFFSET)):
        label = made.columns["label"]
        assert (label[label.shape[0] - round(0.25 * label.shape[0]) :] == 255).all()
        np.testing.assert_array_equal(made.class_pixels, [(label == c).sum() for c in range(4)])


def test_nothing_is_told_unless_it_is_asked_for(case):
    made_by, network, batches = case
    for adjustment in (None, Adjustment(OFFSET)):
        assert {made.evidence for made in labelled(made_by(), network, batches, adjustment)} == {None}


@pytest.mark.parametrize("temperature", [1.0, 1.8])
def test_what_is_told_is_of_unadjusted_scores_above_the_bonnet(case, temperature):
    made_by, network, batches = case
    made_by = made_by(ignore_bottom=0.3)
    unadjusted = labelled(made_by, network, batches, Adjustment(np.zeros(4, np.float32), True, temperature))
    adjusted = labelled(made_by, network, batches, Adjustment(OFFSET, True, temperature))
    for before, after, z in zip(unadjusted, adjusted, scores_of(network, batches[0]), strict=True):
        np.testing.assert_array_equal(before.evidence.log_means, after.evidence.log_means)
        np.testing.assert_array_equal(before.evidence.posteriors, after.evidence.posteriors)
        p = softmax(z[:, : z.shape[1] - round(0.3 * z.shape[1])] / temperature)
        assert after.evidence.log_means.dtype == np.float32
        np.testing.assert_allclose(after.evidence.log_means, np.log(np.exp(p).mean((1, 2)))[None], atol=1e-5)
        np.testing.assert_allclose(after.evidence.means, p.mean((1, 2))[None], atol=1e-5)
        np.testing.assert_array_equal(before.evidence.means, after.evidence.means)
        cells = encode_posteriors(p.reshape(4, -1).T).astype(int)
        assert after.evidence.posteriors.shape == (1, CELLS, 4)
        away = np.abs(after.evidence.posteriors[0][:, None].astype(int) - cells).max(2).min(1)
        assert away.max() <= 1, "a rounding step at most from one of the cells"
        assert len(np.unique(after.evidence.posteriors[0], axis=0)) > min(CELLS, len(cells)) / 2


def test_the_bonnet_has_no_say_and_scores_are_divided_by_the_temperature():
    scores = torch.zeros(1, 3, 10, 8)
    scores[:, 0, :7], scores[:, 2, 7:] = 2.0, 40.0
    p = np.exp([1.0, 0.0, 0.0]) / (np.e + 2)
    (found,) = evidence_of(Adjustment(OFFSET, True, 2.0), scores, [5], 0.3)
    np.testing.assert_allclose(
        found.log_means, p[None], atol=1e-6
    )  # the logarithm of the mean exponential of one value
    np.testing.assert_array_equal(found.posteriors, np.broadcast_to(encode_posteriors(p), (1, CELLS, 3)))
    (whole,) = evidence_of(Adjustment(OFFSET, True, 2.0), scores, [5], 0.0)
    assert whole.log_means[0, 2] > 0.3 > found.log_means[0, 2]


def test_scores_are_not_computed_where_nobody_asks():
    def never():
        raise AssertionError("computed")

    for adjustment in (None, Adjustment(OFFSET)):
        assert evidence_of(adjustment, never, [1, 2], 0.0) == [None, None]
    with pytest.raises(AssertionError, match="computed"):
        evidence_of(Adjustment(OFFSET, True), never, [1], 0.0)


def test_an_images_seed_decides_which_of_its_cells_are_told_of():
    scores = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    one, same, other = evidence_of(Adjustment(OFFSET, True), scores, [7, 7, 8], 0.0)
    np.testing.assert_array_equal(one.posteriors, same.posteriors)
    assert (one.posteriors != other.posteriors).any()
    np.testing.assert_array_equal(one.log_means, other.log_means)


def test_an_offset_is_a_copy_on_the_views_device():
    given = OFFSET.copy()
    given.flags.writeable = False  # as Ray hands it over
    found = offset_of(Adjustment(given), torch.device("cpu"))
    found.add_(1.0)
    np.testing.assert_array_equal(given, OFFSET)
    assert offset_of(None, torch.device("cpu")) is None


def test_a_rule_that_sees_no_mirror_image_labels_what_it_sees(fada):
    """Against the network's own probabilities; with the mirror it is another label."""
    for made, z in zip(labelled(once(), fada, [images()]), scores_of(fada, images()), strict=True):
        same_where_clear(made.columns["label"], enlarged(softmax(z)))
    both = replace(once(), mirrored=True)
    for made, share in zip(
        labelled(both, fada, [images()]), slow_shares(both, fada, [images()], 0 * OFFSET), strict=True
    ):
        same_where_clear(made.columns["label"], share)
        assert (made.columns["label"] != labelled(once(), fada, [images()])[0].columns["label"]).any()
