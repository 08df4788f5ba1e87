import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.priors import (
    confusion_prior,
    damped,
    decode_posteriors,
    em_prior,
    encode_posteriors,
    image_counts,
    log_ratio,
    responsibilities,
    shares,
    with_floor,
)

SOURCE = np.array([0.4, 0.3, 0.2, 0.1])
TARGET = np.array([0.1, 0.2, 0.3, 0.4])


def gaussian_posteriors(classes, prior, means):
    """Calibrated posteriors of points drawn from unit Gaussians, float64 (M, C)."""
    points = means[classes] + np.random.default_rng(1).normal(size=(len(classes), means.shape[1]))
    log_p = np.log(prior) - 0.5 * np.square(points[:, None] - means).sum(2)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def drawn(prior, count=60_000):
    return np.random.default_rng(0).choice(len(prior), count, p=prior)


@pytest.fixture(scope="module")
def means():
    return np.random.default_rng(2).normal(size=(4, 3)) * 1.5


@pytest.fixture(scope="module")
def target_posteriors(means):
    """What a classifier calibrated on the source says of the target."""
    return gaussian_posteriors(drawn(TARGET), SOURCE, means)


def test_the_module_imports_without_torch():
    code = "import sys, models.priors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shares_are_counts_over_their_sum():
    assert shares([1, 3, 0, 4]).tolist() == [0.125, 0.375, 0.0, 0.5]


@pytest.mark.parametrize(
    ("counts", "why"),
    [([1, -1], "negative"), ([0, 0], "zero"), ([1, np.nan], "finite"), ([[1]], "shape"), ([], "shape")],
)
def test_what_is_no_count_has_no_share(counts, why):
    with pytest.raises(ValueError, match=why):
        shares(counts)


def test_the_offset_is_the_logarithm_of_the_ratio():
    np.testing.assert_allclose(log_ratio([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]), [np.log(2), 0, -np.log(2)])


def test_classes_without_a_share_have_no_offset_and_are_named():
    with pytest.raises(ValueError, match="source shares of classes 1, 3 are not positive"):
        log_ratio([0.25] * 4, [0.5, 0, 0.5, 0])
    with pytest.raises(ValueError, match="target shares of classes 0 are"):
        log_ratio([0, 1], [0.5, 0.5])
    with pytest.raises(ValueError, match="target has 2 classes and source has 3"):
        log_ratio([0.5, 0.5], [0.2, 0.3, 0.5])


def test_a_class_without_pixels_gets_the_floor():
    np.testing.assert_allclose(with_floor([0.6, 0.4, 0.0], 0.1), [0.54, 0.36, 0.1])


def test_a_share_that_scaling_pushes_below_the_floor_is_raised_too():
    # 0.104 stays above 0.1 until the others make room for the zero: then 0.104 * 0.9 is below.
    np.testing.assert_allclose(with_floor([0.896, 0.104, 0.0], 0.1), [0.8, 0.1, 0.1])


def test_a_floor_per_class_binds_only_its_own():
    np.testing.assert_allclose(with_floor([0.5, 0.5, 0.0], [0.0, 0.6, 0.0]), [0.4, 0.6, 0.0])


def test_floors_that_take_all_the_room_are_the_prior():
    np.testing.assert_allclose(with_floor([1, 0, 0, 0], 0.25), [0.25] * 4)
    np.testing.assert_allclose(with_floor([0.3, 0.7, 0.0], [0.5, 0.5, 0.0]), [0.5, 0.5, 0.0])


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 1000), min_size=2, max_size=19).filter(sum),
    room=st.floats(0.0, 1.0),
)
def test_a_floored_prior_is_a_prior_that_keeps_ratios_above_the_floor(counts, room):
    floor = room / len(counts)
    prior, found = shares(counts), with_floor(shares(counts), floor)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= floor * (1 - 1e-12)).all()
    above = found > floor * (1 + 1e-9)
    if above.sum() > 1:  # the condition of the smallest relative entropy: what is free keeps its ratios, none larger
        ratio = found[above] / prior[above]
        np.testing.assert_allclose(ratio, ratio[0])
        assert (found >= prior * ratio[0] * (1 - 1e-9)).all()


@pytest.mark.parametrize("floor", [0.4, -0.1, [0.5, 0.6, 0.0], [0.1, 0.1], np.nan])
def test_floors_that_no_prior_can_have_are_refused(floor):
    with pytest.raises(ValueError, match="floor"):
        with_floor([0.5, 0.3, 0.2], floor)


def test_damping_keeps_a_share_of_the_old_prior():
    np.testing.assert_allclose(damped([1.0, 0.0], [0.5, 0.5], 0.8), [0.9, 0.1])
    assert damped([1.0, 0.0], [0.5, 0.5], 0.0).tolist() == [0.5, 0.5]
    for damping in (1.0, -0.1):
        with pytest.raises(ValueError, match="damping"):
            damped([1.0, 0.0], [0.5, 0.5], damping)
    with pytest.raises(ValueError, match="prior has 2 classes and estimate has 1"):
        damped([1.0, 0.0], [1.0], 0.5)


def test_an_image_counts_for_every_class_above_its_threshold():
    g = np.array([[0.2, 0.0, 0.5], [0.3, 0.1, 0.1], [0.1, 0.1, 0.6]])
    counts = image_counts(g, [0.15, 0.1, 0.5])
    assert counts.tolist() == [2, 0, 1], "exactly at the threshold is not above it"
    assert counts.dtype == np.int64
    with pytest.raises(ValueError, match="do not fit"):
        image_counts(g, [0.1, 0.1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_responsibilities_are_the_mean_of_the_reweighted_rows(target_posteriors, dtype, tolerance):
    rows = target_posteriors[:20_000].astype(dtype)
    weighted = rows.astype(np.float64) * (TARGET / SOURCE)
    expected = (weighted / weighted.sum(1, keepdims=True)).mean(0)
    found = responsibilities(rows, TARGET, SOURCE)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_rows_that_the_target_rules_out_tell_nothing():
    rows = [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    source = np.full(3, 1 / 3)
    np.testing.assert_allclose(responsibilities(rows, [0.9, 0.1, 0.0], source), [0.9, 0.1, 0.0])
    assert responsibilities(np.zeros((0, 3)), source, source).tolist() == [0, 0, 0]


def test_a_hand_computed_step_of_expectation_maximisation():
    # w = (2, 2/3), so p w is (1, 1/3) and (1/2, 1/2): shares (3/4, 1/4) and (1/2, 1/2).
    rows = [[0.5, 0.5], [0.25, 0.75]]
    np.testing.assert_allclose(responsibilities(rows, [0.5, 0.5], [0.25, 0.75]), [0.625, 0.375])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_expectation_maximisation_finds_the_target_prior(target_posteriors, dtype):
    found = em_prior(target_posteriors.astype(dtype), SOURCE)
    np.testing.assert_allclose(found, TARGET, atol=0.01)
    assert found.sum() == pytest.approx(1.0)


def test_what_it_finds_is_a_fixed_point_of_the_update(target_posteriors):
    found = em_prior(target_posteriors, SOURCE, iterations=5000, tolerance=1e-12)
    np.testing.assert_allclose(responsibilities(target_posteriors, found, SOURCE), found, atol=1e-9)


def test_it_agrees_with_the_plain_algorithm(target_posteriors):
    rows = target_posteriors[:500]
    target = SOURCE.copy()
    for _ in range(20):
        weighted = rows * target / SOURCE
        target = (weighted / weighted.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(em_prior(rows, SOURCE, iterations=20, tolerance=0), target, atol=1e-12)


def test_it_finds_the_target_prior_from_encoded_posteriors(target_posteriors):
    rows = decode_posteriors(encode_posteriors(target_posteriors))
    np.testing.assert_allclose(em_prior(rows, SOURCE), TARGET, atol=0.01)


def test_a_row_of_weight_two_counts_as_two_rows(target_posteriors):
    rows = target_posteriors[:300]
    weights = np.repeat([2, 0, 1], 100)
    repeated = np.concatenate([rows[:100], rows[:100], rows[200:]])
    np.testing.assert_allclose(em_prior(rows, SOURCE, weights=weights), em_prior(repeated, SOURCE), atol=1e-9)


def test_without_a_row_that_tells_anything_the_source_stays():
    assert em_prior(np.zeros((0, 2)), [0.3, 0.7]).tolist() == [0.3, 0.7]
    assert em_prior(np.zeros((5, 2)), [0.3, 0.7]).tolist() == [0.3, 0.7]


@pytest.mark.parametrize(
    ("rows", "source", "why"),
    [
        ([[0.5, 0.4]], [0.5, 0.5], "no distributions"),
        ([[1.5, -0.5]], [0.5, 0.5], "no distributions"),
        ([[np.nan, 0.5]], [0.5, 0.5], "no distributions"),
        ([[0.5, 0.5]], [1.0, 0.0], "source shares of classes 1"),
        ([[0.5, 0.5]], [0.2, 0.3, 0.5], "do not fit"),
    ],
)
def test_bad_posteriors_and_sources_are_refused(rows, source, why):
    with pytest.raises(ValueError, match=why):
        em_prior(rows, source)
    with pytest.raises(ValueError, match=why):
        responsibilities(rows, source, source)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        em_prior([[0.5, 0.5], [0.5, 0.5]], [0.5, 0.5], weights=weights)


def counted(labels, predictions, classes):
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def test_a_confusion_matrix_finds_the_target_prior(means, target_posteriors):
    labels = drawn(SOURCE)
    confusion = counted(labels, gaussian_posteriors(labels, SOURCE, means).argmax(1), 4)
    predicted = np.bincount(target_posteriors.argmax(1), minlength=4)
    np.testing.assert_allclose(confusion_prior(confusion, predicted, SOURCE, pull=0), TARGET, atol=0.01)
    np.testing.assert_allclose(confusion_prior(confusion, predicted, SOURCE), TARGET, atol=0.02)


def test_posteriors_that_are_no_probabilities_find_it_through_their_own_confusion(means, target_posteriors):
    labels = drawn(SOURCE)

    def distorted(posteriors):
        odd = posteriors**0.3 * [1.0, 5.0, 0.2, 1.0]
        return odd / odd.sum(1, keepdims=True)

    seen = distorted(gaussian_posteriors(labels, SOURCE, means))
    confusion = np.stack([seen[labels == label].sum(0) for label in range(4)])
    target = distorted(target_posteriors)
    found = confusion_prior(confusion, target.sum(0), SOURCE, pull=0, iterations=20_000)
    np.testing.assert_allclose(found, TARGET, atol=0.02)
    assert np.abs(em_prior(target, SOURCE) - TARGET).max() > 0.04


def test_without_shift_the_confusion_matrix_gives_the_source_back():
    confusion = np.array([[70, 20, 10], [5, 80, 15], [1, 2, 7]])
    source = shares(confusion.sum(1))
    np.testing.assert_allclose(confusion_prior(confusion, confusion.sum(0), source), source, atol=1e-9)


def test_a_confusion_solved_by_hand():
    # p(prediction | class) = [[.9, .1], [.2, .8]]; 0.41 = 0.9 π + 0.2 (1 - π) gives π = 0.3
    found = confusion_prior([[90, 10], [20, 80]], [41, 59], [0.5, 0.5], pull=0)
    np.testing.assert_allclose(found, [0.3, 0.7], atol=1e-6)


@pytest.mark.parametrize("pull", [0.01, 0.2])
def test_the_prior_is_the_highest_point_of_the_likelihood_with_its_pull(pull):
    rng = np.random.default_rng(4)
    confusion = rng.integers(0, 20, (4, 4)) + 30 * np.eye(4, dtype=int)
    predicted, source = shares(rng.integers(1, 50, 4)), np.array([0.1, 0.2, 0.3, 0.4])
    likelihood = confusion / confusion.sum(1, keepdims=True)

    def height(prior):
        return predicted @ np.log(prior @ likelihood) + pull * source @ np.log(prior)

    found = confusion_prior(confusion, predicted, source, pull=pull)
    others = shares_near(found, rng)
    assert height(found) >= max(height(other) for other in others)
    assert height(found) > height(source)


def shares_near(prior, rng):
    moved = prior * np.exp(rng.normal(0, 0.02, (200, len(prior))))
    return moved / moved.sum(1, keepdims=True)


def test_no_share_is_negative_where_plain_inversion_has_one():
    confusion, predicted = np.array([[80, 20, 0], [20, 80, 0], [0, 10, 90]]), np.array([90, 5, 5])
    conditional = (confusion / confusion.sum(1, keepdims=True)).T
    assert np.linalg.solve(conditional, shares(predicted)).min() < -0.01
    found = confusion_prior(confusion, predicted, [0.4, 0.3, 0.3])
    assert found.min() > 0


def test_a_class_that_the_source_never_has_gets_no_share():
    confusion = np.array([[90, 5, 5], [0, 0, 0], [10, 0, 90]])
    found = confusion_prior(confusion, [50, 10, 40], [0.5, 0.0, 0.5])
    assert found[1] == 0.0
    assert found.sum() == pytest.approx(1.0)


def test_a_class_that_no_label_showed_keeps_about_its_share():
    confusion = np.array([[90, 10, 0], [10, 90, 0], [0, 0, 0]])
    found = confusion_prior(confusion, [70, 30, 0], [0.45, 0.45, 0.1])
    assert 0.02 < found[2] < 0.2


def test_classes_that_nothing_tells_apart_keep_the_ratio_they_have_on_the_source():
    confusion = np.array([[90, 10], [90, 10]]) * [[3], [1]]
    np.testing.assert_allclose(confusion_prior(confusion, [90, 10], [0.75, 0.25]), [0.75, 0.25], atol=1e-6)


def test_a_start_near_the_end_saves_steps():
    confusion, predicted, source = [[90, 10], [20, 80]], [41, 59], [0.5, 0.5]
    end = confusion_prior(confusion, predicted, source)
    np.testing.assert_allclose(confusion_prior(confusion, predicted, source, start=end, iterations=1), end, atol=1e-9)


@pytest.mark.parametrize(
    ("confusion", "predicted"), [(np.ones((2, 3)), [1, 1]), (-np.ones((2, 2)), [1, 1]), (np.eye(2), [0, 0])]
)
def test_bad_confusions_are_refused(confusion, predicted):
    with pytest.raises(ValueError, match=r"fit|counts"):
        confusion_prior(confusion, predicted, [0.5, 0.5])


def test_encoding_keeps_small_probabilities_with_a_relative_precision():
    p = np.array([[0.9, 0.0996, 4e-4, 0.0], [1.0, 4e-6, 0.0, 0.0]])
    encoded = encode_posteriors(p)
    assert encoded.dtype == np.uint8
    assert encoded[0].tolist() == [242, 80, 5, 0]  # 255 √p = 241.9, 80.48, 5.1
    assert encoded[1].tolist() == [255, 1, 0, 0]
    decoded = decode_posteriors(encoded)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(decoded[0, :3], p[0, :3], rtol=0.1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000))
def test_decoding_what_was_encoded_is_off_by_half_a_step_of_the_root(seed):
    p = np.random.default_rng(seed).dirichlet([0.3] * 19, 10)
    squares = np.square(encode_posteriors(p) / 255.0)
    assert (np.abs(np.sqrt(squares) - np.sqrt(p)) <= 0.5 / 255 + 1e-12).all()
    np.testing.assert_allclose(
        decode_posteriors(encode_posteriors(p)), squares / squares.sum(1, keepdims=True), rtol=1e-5
    )


def test_a_row_of_zeros_decodes_to_zeros():
    assert decode_posteriors(np.zeros((2, 3), np.uint8)).tolist() == [[0.0] * 3] * 2
