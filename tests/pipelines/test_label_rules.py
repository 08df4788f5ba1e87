import pickle

import numpy as np
import pytest
import torch

from models.networks.deeplab import DeepLab, DeepLabConfig
from models.uncertainty import draw_masks, negative_labels, trunk_views
from pipelines.label_rules import MonteCarloRule
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
