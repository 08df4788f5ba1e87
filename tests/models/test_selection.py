import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.selection import (
    apply_thresholds,
    blended_thresholds,
    confidence_histogram,
    instance_thresholds,
    percentile_thresholds,
    quantise_confidence,
    stationary_thresholds,
)


def u8(*values):
    return np.array(values, np.uint8)


def histogram(confidences, num_classes=1):
    """All pixels of class 0, confidences on the 0..1 scale."""
    quantised = quantise_confidence(np.array(confidences))
    return confidence_histogram(np.zeros_like(quantised), quantised, num_classes)


def test_the_module_imports_without_torch():
    code = "import sys, models.selection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_confidences_round_to_255_steps():
    assert quantise_confidence(np.array([0.0, 0.8, 1.0, 1.5, -1])).tolist() == [0, 204, 255, 255, 0]


def test_the_histogram_counts_every_class_and_leaves_out_what_is_withheld():
    counts = confidence_histogram(u8(0, 0, 2, 255, 7), u8(10, 10, 255, 99, 99), 3)
    assert counts.shape == (3, 256)
    assert counts[0, 10] == 2
    assert counts[2, 255] == 1
    assert counts.sum() == 3


def test_the_median_rule_of_the_checks():
    rule = {"keep_share": 0.5, "cap": 230}  # min(median, 0.9)
    low, high = histogram([0.2, 0.4, 0.95]), histogram([0.91, 0.95, 0.99])
    assert percentile_thresholds(low, **rule).tolist() == [102]  # 0.4: keeps the .4 and the .95
    assert percentile_thresholds(high, **rule).tolist() == [230]  # 0.9: keeps all three


@pytest.mark.parametrize(("share", "threshold"), [(0.1, 90), (0.2, 80), (0.25, 70), (0.5, 50), (1.0, 0)])
def test_the_threshold_keeps_at_least_the_share(share, threshold):
    counts = confidence_histogram(np.zeros(10, np.uint8), np.arange(0, 100, 10).astype(np.uint8), 1)
    assert percentile_thresholds(counts, share).tolist() == [threshold]


def test_a_share_that_is_a_hair_above_a_whole_number_means_the_whole_number():
    counts = confidence_histogram(np.zeros(30, np.uint8), np.arange(30).astype(np.uint8), 1)
    assert percentile_thresholds(counts, 0.1).tolist() == [27]


def test_absent_and_rare_classes_do_not_shift_the_others():
    label = u8(0, 0, 2, 2, 2, 2)
    counts = confidence_histogram(label, u8(10, 20, 50, 60, 70, 80), 4)
    assert percentile_thresholds(counts, 0.5).tolist() == [20, 0, 70, 0]
    assert percentile_thresholds(counts, 0.5, min_pixels=3, floor=5).tolist() == [5, 5, 70, 5]


def test_floor_and_cap_bound_every_threshold():
    counts = confidence_histogram(u8(0, 1), u8(3, 250), 2)
    assert percentile_thresholds(counts, 0.5, floor=128, cap=204).tolist() == [128, 204]


def test_apply_keeps_what_reaches_its_classs_threshold():
    label, confidence = u8(0, 0, 1, 1, 255, 9), u8(99, 100, 10, 9, 255, 255)
    assert apply_thresholds(label, confidence, u8(100, 10)).tolist() == [255, 0, 1, 255, 255, 255]


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 255)), min_size=1, max_size=80),
    share=st.floats(0.01, 1.0),
)
def test_each_class_keeps_its_share_and_one_level_more_would_not(pixels, share):
    label, confidence = (np.array(column, np.uint8) for column in zip(*pixels, strict=True))
    thresholds = percentile_thresholds(confidence_histogram(label, confidence, 5), share)
    kept = apply_thresholds(label, confidence, thresholds)
    for c in range(5):
        own = confidence[label == c]
        if not len(own):
            assert thresholds[c] == 0
            continue
        assert (kept == c).sum() >= share * len(own) - 1e-6
        assert (own > thresholds[c]).sum() < share * len(own) or thresholds[c] == 255


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="keep_share"):
        percentile_thresholds(histogram([0.5]), share)


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        confidence_histogram(u8(0, 1), u8(0), 2)
    with pytest.raises(ValueError, match="quantise"):
        apply_thresholds(u8(0), np.array([0.5]), u8(0))
    with pytest.raises(ValueError, match="floor"):
        percentile_thresholds(histogram([0.5]), 0.5, floor=10, cap=5)
    with pytest.raises(ValueError, match="256"):
        percentile_thresholds(np.zeros((3, 10), np.int64), 0.5)


ALPHA, BETA, GAMMA = 0.2, 0.9, 8.0


def drawn(seed, count, power=0.3):
    """Confidences 0..255 of one class, many of them high."""
    return np.rint(255 * np.random.default_rng(seed).random(count) ** power).astype(np.uint8)


def counted(*classes):
    """Histogram of one class after the other."""
    label = np.repeat(np.arange(len(classes)), [len(c) for c in classes])
    return confidence_histogram(label, np.concatenate(classes).astype(np.uint8), len(classes))


def test_an_image_keeps_less_of_a_class_that_has_been_uncertain():
    # Ten pixels 10, 20, ..., 100 and θ itself. Of θ = 255 a share 0.5 is kept: 6 of 11. Of θ = 51 a share
    # 0.5 * 0.2 = 0.1: 2 of 11.
    pixels = np.arange(10, 101, 10)
    found = instance_thresholds(counted(pixels, pixels), u8(255, 51), alpha=0.5, gamma=1.0)
    assert found.tolist() == [60, 90]  # 255 100 90 80 70 [60]; 100 [90], of 100 ... 60 51 50 ... 10
    assert found.dtype == np.uint8


def test_without_decay_every_class_keeps_the_same_share_of_an_image():
    pixels = np.arange(10, 101, 10)
    found = instance_thresholds(counted(pixels, pixels), u8(255, 200), alpha=0.5, gamma=0.0)
    assert found.tolist() == [60, 60]


def test_a_class_that_an_image_does_not_show_keeps_its_threshold():
    histogram = counted(drawn(0, 50), u8(), u8())
    assert instance_thresholds(histogram, u8(200, 230, 17), ALPHA, GAMMA)[1:].tolist() == [230, 17]


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.lists(st.integers(0, 255), max_size=60),
    theta=st.integers(0, 255),
    alpha=st.floats(0.01, 1.0),
    gamma=st.floats(0.0, 10.0),
)
def test_an_images_threshold_is_that_rank_of_its_sorted_confidences(pixels, theta, alpha, gamma):
    falling = sorted([*pixels, theta], reverse=True)
    share = alpha * (theta / 255) ** gamma
    rank = next(k for k in range(1, len(falling) + 1) if k >= share * len(falling) - 1e-6)
    found = instance_thresholds(counted(np.array(pixels)), u8(theta), alpha, gamma)
    assert found.tolist() == [falling[rank - 1]]


def test_an_images_threshold_is_the_percentile_of_the_released_code():
    # Of so many pixels two neighbours are one level apart at most, and it does not matter what lies between them.
    pixels = drawn(1, 20_000)
    for theta in (150, 200, 230, 255):
        published = np.percentile([*pixels, theta], 100 * (1 - ALPHA * (theta / 255) ** GAMMA))
        found = instance_thresholds(counted(pixels), u8(theta), ALPHA, GAMMA)
        assert abs(found[0] - published) <= 1


def test_thresholds_of_alike_images_come_to_rest_where_the_whole_set_says():
    pixels = [drawn(0, 4000, 0.2), drawn(1, 4000, 0.5), drawn(2, 4000, 1.5)]
    theta = np.full(3, 0.9)
    for _ in range(300):  # the paper's recursion, every image being like the whole set
        own = [np.percentile(c / 255, 100 * (1 - ALPHA * t**GAMMA)) for c, t in zip(pixels, theta, strict=True)]
        theta = BETA * theta + (1 - BETA) * np.array(own)
    found = stationary_thresholds(counted(*pixels), ALPHA, GAMMA)
    np.testing.assert_allclose(found / 255, theta, atol=1.5 / 255)


def test_the_resting_threshold_of_evenly_spread_confidences():
    # Of 0, 1, ..., 255 the share at t or more is (256 - t) / 256; with gamma 1 it meets alpha t / 255 = t / 510 at 171:
    # 85/256 = 0.3320 < 0.3353, and at 170: 86/256 = 0.3359 >= 0.3333.
    histogram = np.ones((1, 256), np.int64)
    assert stationary_thresholds(histogram, 0.5, 1.0).tolist() == [170]


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.lists(st.integers(0, 255), min_size=1, max_size=60),
    alpha=st.floats(0.01, 1.0),
    gamma=st.floats(0.0, 10.0),
)
def test_a_resting_threshold_keeps_its_share_and_one_level_more_would_not(pixels, alpha, gamma):
    (found,) = stationary_thresholds(counted(np.array(pixels)), alpha, gamma).tolist()
    kept = np.array([sum(p >= t for p in pixels) for t in range(257)])
    wanted = np.maximum(alpha * (np.arange(257) / 255) ** gamma * len(pixels), 1)
    assert kept[found] >= wanted[found] - 1e-6
    assert found == 255 or kept[found + 1] < wanted[found + 1]


def test_a_class_without_a_pixel_rests_where_thresholds_begin():
    assert stationary_thresholds(counted(u8(), u8(99)), ALPHA, GAMMA).tolist() == [230, 99]
    assert stationary_thresholds(counted(u8()), ALPHA, GAMMA, unseen=128).tolist() == [128]


def test_blending_rounds_up_to_what_a_pixel_must_reach():
    assert blended_thresholds(u8(200, 200, 255, 0), u8(200, 203, 255, 1), 0.9).tolist() == [200, 201, 255, 1]
    assert blended_thresholds(u8(200), u8(100), 0.0).tolist() == [100]
    assert blended_thresholds(u8(200), u8(100), 1.0).tolist() == [200]


def test_bad_arguments_of_instance_adaptive_thresholds_are_refused():
    histogram = counted(u8(1), u8(2))
    for alpha in (0.0, 1.1):
        with pytest.raises(ValueError, match="alpha"):
            instance_thresholds(histogram, u8(1, 2), alpha, GAMMA)
        with pytest.raises(ValueError, match="alpha"):
            stationary_thresholds(histogram, alpha, GAMMA)
    with pytest.raises(ValueError, match="gamma"):
        stationary_thresholds(histogram, ALPHA, -1.0)
    with pytest.raises(ValueError, match="256"):
        stationary_thresholds(np.zeros((2, 5), np.int64), ALPHA, GAMMA)
    for history in (u8(1), np.array([1, 256]), np.array([-1, 3])):
        with pytest.raises(ValueError, match="each of 2 classes a level"):
            instance_thresholds(histogram, history, ALPHA, GAMMA)
    with pytest.raises(ValueError, match="beta"):
        blended_thresholds(u8(1), u8(1), 1.5)
