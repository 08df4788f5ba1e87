import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.selection import (
    apply_thresholds,
    confidence_histogram,
    percentile_thresholds,
    quantise_confidence,
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
