"""The estimate of the target's class frequencies, against references that are written as plainly as can be."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from actors.prior_estimate import (
    CELLS,
    KEPT,
    METHODS,
    SOURCE_EVERY,
    SOURCE_LOOKS,
    STEPS,
    Evidence,
    PriorEstimate,
    PriorPlan,
    estimated,
    source_looks,
)
from models.priors import PULL, encode_posteriors

SOURCE = (0.5, 0.3, 0.15, 0.05)
PLAN = PriorPlan(SOURCE, method="em")
CHUNKS = [3, 2, 4, 1, 2, 4, 3, 1]


def seen(images, seed=0, classes=4):
    """What a network says of some images: it is mostly sure."""
    rng = np.random.default_rng(seed)
    posteriors = rng.dirichlet([0.2 + 0.1 * c for c in range(classes)], (images, CELLS))
    log_means = np.log(np.exp(posteriors).mean(1)).astype(np.float32)
    source = 40 * np.eye(classes) + rng.uniform(0, 10, (classes, classes))
    return Evidence(log_means, encode_posteriors(posteriors), posteriors.mean(1).astype(np.float32), source)


def shown(log_means):
    """Evidence of images of which only g is told."""
    g = np.array(log_means, np.float32)
    return Evidence(g, np.zeros((len(g), CELLS, g.shape[1]), np.uint8), np.full_like(g, 1 / g.shape[1]))


def sure(posteriors):
    """Evidence of images of which only posteriors are told."""
    means = posteriors.mean(1).astype(np.float32)
    return Evidence(np.zeros_like(means), encode_posteriors(posteriors), means)


def told(chunks=CHUNKS, first=0):
    return {chunk: seen(images, first + chunk) for chunk, images in enumerate(chunks)}


def rows(evidence, source=SOURCE):
    """Its posteriors of the classes that the source shows, float64 (M, known)."""
    squares = (evidence.posteriors.reshape(-1, len(source)) / 255.0) ** 2
    known = squares[:, np.array(source) > 0]
    return known / known.sum(1, keepdims=True)


def reweighted(p, target, source):
    """Sum over rows of the posteriors under other class frequencies."""
    weighted = p * target / source
    return (weighted / weighted.sum(1, keepdims=True)).sum(0)


def floored(prior, floor):
    """Shares scaled until, with none below its floor, they sum to 1; by bisection."""
    low, high = 0.0, 1.0 / prior.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(middle * prior, floor).sum() < 1 else (low, middle)
    return np.maximum(low * prior, floor)


def plain_em(p, source, floor):
    target = source
    for _ in range(5000):
        target = reweighted(p, target, source) / len(p)
    return floored(target, floor * source)


def incremental_em(plan, chunks, coming):
    """The target after every (chunk, evidence) that comes."""
    source = np.array(plan.source)
    target, parts, waiting, images, found = source, {}, {}, 0, []
    for chunk, evidence in coming:
        waiting[chunk] = rows(evidence)
        images += chunks[chunk]
        if images >= math.ceil(sum(chunks) * (0.05 if parts else 0.5)):
            parts |= {c: reweighted(p, target, source) / CELLS for c, p in waiting.items()}
            total, waiting, images = sum(parts.values()), {}, 0
            target = floored(plan.damping * target + (1 - plan.damping) * total / total.sum(), plan.floor * source)
        found.append(target)
    return found


def test_the_module_imports_without_torch():
    """The bank and whoever holds a teacher's handle import it."""
    code = "import sys, actors.prior_estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What an estimate adds to class scores.


def test_the_offset_is_the_log_ratio_as_many_times_as_the_temperature():
    target = np.array([0.25, 0.3, 0.3, 0.15])
    expected = np.log([0.5, 1.0, 2.0, 3.0])
    for temperature in (1.0, 1.8):
        found = replace(PLAN, temperature=temperature).offset(target)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, temperature * expected, atol=1e-6)


def test_a_class_that_the_source_never_shows_is_left_as_it_is():
    plan = PriorPlan((0.6, 0.0, 0.4), method="em")
    assert plan.known.tolist() == [True, False, True]
    np.testing.assert_allclose(plan.offset(np.array([0.3, 0.0, 0.7])), [np.log(0.5), 0.0, np.log(1.75)], rtol=1e-6)
    found = estimated(plan, seen(6, classes=3))
    assert found[1] == plan.offset(found)[1] == 0.0
    assert found.sum() == pytest.approx(1.0)
    expected = plain_em(rows(seen(6, classes=3), plan.source), np.array([0.6, 0.4]), plan.floor)
    np.testing.assert_allclose(found[[0, 2]], expected, atol=1e-5)


def test_counts_leave_out_what_the_source_never_shows_and_cells_that_show_nothing_else_tell_nothing():
    plan = PriorPlan((0.6, 0.0, 0.4), presence=(0.1, 0.1, 0.1))
    assert plan.counts(shown(np.full((2, 3), 0.5))).tolist() == [2.0, 0.0, 2.0]
    found = plan.posteriors(sure(np.tile(np.eye(3), (2, 2, 1))))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:3], [[1, 0], [0, 0], [0, 1]])


# The estimate of a whole set.


def test_the_likeliest_prior_is_that_of_plain_expectation_maximisation():
    evidence = seen(20)
    found = estimated(PLAN, evidence)
    np.testing.assert_allclose(found, plain_em(rows(evidence), np.array(SOURCE), 0.1), atol=1e-5)
    assert np.abs(found - SOURCE).max() > 0.1, "the case must have something to say"


def test_counts_are_of_images_that_show_a_class_more_than_the_source_does():
    """Methods §7.3."""
    plan = PriorPlan((0.4, 0.4, 0.2), method="counts", presence=(0.2, 0.3, 0.1), floor=0.05)
    evidence = shown([[0.25, 0.1, 0.2], [0.3, 0.29, 0.09], [0.21, 0.31, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(estimated(plan, evidence), [0.6, 0.2, 0.2])  # of 3, 1 and 1 images


def test_images_that_show_no_class_leave_the_sources_frequencies():
    plan = PriorPlan(SOURCE, method="counts", presence=(0.9,) * 4)
    np.testing.assert_allclose(estimated(plan, seen(3)), SOURCE)
    for method in METHODS:
        np.testing.assert_allclose(estimated(replace(plan, method=method), Evidence.nothing(4)), SOURCE)


def plain_confusion(confusion, seen, source, steps, target):
    """Steps of expectation maximisation on how often each class is predicted, drawn towards the source."""
    likelihood = confusion / confusion.sum(1, keepdims=True)
    q = seen / seen.sum()
    for _ in range(steps):
        joint = target[:, None] * likelihood
        target = ((joint / joint.sum(0)) @ q + PULL * source) / (1 + PULL)
    return target


def test_what_is_predicted_is_explained_by_what_is_taken_for_what_on_source_images():
    evidence = seen(20)
    found = estimated(PriorPlan(SOURCE), evidence)
    predicted = evidence.means.sum(0, dtype=np.float64)
    expected = plain_confusion(evidence.source, predicted, np.array(SOURCE), 5000, np.array(SOURCE))
    np.testing.assert_allclose(found, floored(expected, 0.1 * np.array(SOURCE)), atol=1e-5)
    assert np.abs(found - SOURCE).max() > 0.1, "the case must have something to say"


def test_where_no_source_image_could_be_read_nothing_is_explained():
    for source in (None, np.zeros((4, 4))):
        np.testing.assert_allclose(estimated(PriorPlan(SOURCE), replace(seen(5), source=source)), SOURCE)


@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_a_class_that_is_nowhere_gets_its_floor(floor):
    posteriors = np.zeros((2, CELLS, 4))
    posteriors[..., 0], posteriors[..., 1] = 0.7, 0.3
    found = estimated(replace(PLAN, floor=floor), sure(posteriors))
    np.testing.assert_allclose(found[2:], floor * np.array(SOURCE[2:]))
    assert found.sum() == pytest.approx(1.0)


def test_evidence_of_several_images_stands_in_their_order():
    parts = [seen(2, 1), seen(1, 2)]
    joined = Evidence.joined(parts)
    np.testing.assert_array_equal(joined.log_means[2], parts[1].log_means[0])
    np.testing.assert_array_equal(joined.posteriors[:2], parts[0].posteriors)
    np.testing.assert_array_equal(joined.means[2], parts[1].means[0])
    np.testing.assert_array_equal(joined.source, parts[0].source + parts[1].source)
    alone = Evidence.joined([replace(parts[0], source=None), parts[1]])
    np.testing.assert_array_equal(alone.source, parts[1].source)
    assert Evidence.joined([replace(part, source=None) for part in parts]).source is None


def test_a_source_image_is_looked_at_beside_a_share_of_the_target_images():
    """A seed alone decides which, so it does not matter who looks."""
    seeds = [int(seed) for seed in np.random.default_rng(0).integers(0, 2**63, 4000)]
    for every, count in ((1, 4000), (SOURCE_EVERY, 4000 / SOURCE_EVERY)):
        found = source_looks(seeds, every, 7)
        assert abs(len(found) - count) < 80
        assert np.bincount(found, minlength=7).min() > count / 7 * 0.5, "all are looked at"
        assert found == source_looks(seeds[:100], every, 7) + source_looks(seeds[100:], every, 7)


# Frozen: one estimate, of the whole set.


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_estimate_waits_for_the_whole_set_and_is_then_what_all_of_it_says(method):
    plan = replace(PLAN, method=method, presence=(0.2,) * 4)
    estimate, evidence = PriorEstimate(plan, CHUNKS, frozen=True), told()
    for chunk in (5, 0, 7, 3, 1, 6, 2):
        estimate.put(chunk, evidence[chunk])
        assert estimate.surveying
        assert estimate.adjustment.witness
        assert not estimate.adjustment.offset.any()
        assert estimate.target.tolist() == list(SOURCE)
    estimate.put(4, evidence[4])
    expected = estimated(plan, Evidence.joined([evidence[chunk] for chunk in range(8)]))
    np.testing.assert_array_equal(estimate.target, expected)
    assert not estimate.surveying
    assert not estimate.adjustment.witness
    np.testing.assert_array_equal(estimate.adjustment.offset, plan.offset(expected))
    assert estimate.adjustment.offset.any()


def test_a_frozen_estimate_never_moves_again():
    estimate = PriorEstimate(PLAN, [2, 2], frozen=True)
    for chunk, evidence in told([2, 2]).items():
        estimate.put(chunk, evidence)
    before = estimate.target.copy()
    for chunk, evidence in told([2, 2], first=50).items():
        estimate.put(chunk, evidence)
    np.testing.assert_array_equal(estimate.target, before)
    assert estimate.evidence == {}, "nothing is kept that is not needed"


@pytest.mark.parametrize("frozen", [True, False])
def test_a_chunk_of_which_nothing_can_be_read_counts_as_surveyed(frozen):
    estimate, evidence = PriorEstimate(replace(PLAN, damping=0.0), [2, 2, 2], frozen), told([2, 2, 2])
    estimate.put(1, None)
    estimate.put(0, evidence[0])
    if frozen:
        assert estimate.surveying
        estimate.put(2, evidence[2])
        expected = estimated(PLAN, Evidence.joined([evidence[0], evidence[2]]))
    else:
        source = np.array(SOURCE)
        expected = floored(reweighted(rows(evidence[0]), source, source) / (2 * CELLS), 0.1 * source)
    np.testing.assert_allclose(estimate.target, expected, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_at_all_can_be_read_the_sources_frequencies_stay(frozen, method):
    estimate = PriorEstimate(replace(PLAN, method=method, presence=(0.2,) * 4), [2, 2], frozen)
    for chunk in (0, 1, 0, 1):
        estimate.put(chunk, None)
    np.testing.assert_allclose(estimate.target, SOURCE)
    assert not estimate.surveying


# Live: incremental expectation maximisation.


def test_a_live_estimate_is_incremental_expectation_maximisation():
    """Neal & Hinton, 1998. Chunks come in any order, and again with other evidence: the newest counts."""
    order = [5, 0, 7, 3, 1, 6, 2, 4, 0, 5, 5, 1, 2, 3, 4, 6, 7]
    coming = [(chunk, seen(CHUNKS[chunk], 10 * number)) for number, chunk in enumerate(order)]
    plan = replace(PLAN, damping=0.3, floor=0.2)
    estimate, found = PriorEstimate(plan, CHUNKS, frozen=False), []
    for chunk, evidence in coming:
        estimate.put(chunk, evidence)
        assert not estimate.surveying
        assert estimate.adjustment.witness, "it is never done"
        found.append(estimate.target)
    np.testing.assert_allclose(found, incremental_em(plan, CHUNKS, coming), atol=1e-5)
    assert len({tuple(target) for target in found}) > 8, "it moves again and again"


def test_it_moves_when_half_of_the_images_are_labelled_and_then_after_every_twentieth():
    estimate, moves = PriorEstimate(PLAN, [1] * 40, frozen=False), []
    before = estimate.target
    for number in range(60):
        estimate.put(number % 40, seen(1, number))
        if estimate.target is not before:
            before = estimate.target
            moves.append(number + 1)
    assert moves == list(range(20, 61, 2))


def test_live_counts_are_damped_and_the_newest_of_every_chunk():
    plan = PriorPlan((0.5, 0.5), method="counts", presence=(0.5, 0.5), damping=0.5, floor=0.1)
    estimate = PriorEstimate(plan, [2, 2], frozen=False)
    estimate.put(0, shown([[1, 0], [1, 1]]))  # 2 and 1 images
    np.testing.assert_allclose(estimate.target, [0.5 * 0.5 + 0.5 * 2 / 3, 0.5 * 0.5 + 0.5 / 3])
    one = estimate.target
    estimate.put(1, shown([[0, 1], [0, 1]]))  # 2 and 3
    np.testing.assert_allclose(estimate.target, 0.5 * one + 0.5 * np.array([0.4, 0.6]))
    two = estimate.target
    estimate.put(0, shown([[0, 0], [0, 1]]))  # 0 and 3
    np.testing.assert_allclose(estimate.target, 0.5 * two + [0.0, 0.5])


def test_a_live_estimate_by_confusion_begins_every_move_where_it_stands():
    """What is predicted is of the newest of every chunk; what was seen on source images adds up and fades."""
    plan, source = PriorPlan(SOURCE, damping=0.3, floor=0.2), np.array(SOURCE)
    newest, target, confusion = {}, np.array(SOURCE), np.zeros((4, 4))
    estimate = PriorEstimate(plan, [2, 2, 2, 2], frozen=False)
    for number, chunk in enumerate((2, 0, 1, 3, 0, 2)):
        newest[chunk] = evidence = seen(2, 10 * number)
        if chunk == 1:  # beside it no source image was looked at
            evidence = replace(evidence, source=None)
        else:
            confusion = confusion + evidence.source
        estimate.put(chunk, evidence)
        if number:
            q = sum(item.means.sum(0, dtype=np.float64) for item in newest.values())
            found = plain_confusion(confusion, q, source, STEPS, target)
            target, confusion = floored(0.3 * target + 0.7 * found, 0.2 * source), KEPT * confusion
        np.testing.assert_allclose(estimate.target, target, atol=1e-5)
        assert estimate.adjustment.witness


def test_a_live_estimate_by_confusion_waits_for_source_images():
    estimate = PriorEstimate(PriorPlan(SOURCE), [2, 2], frozen=False)
    estimate.put(0, replace(seen(2), source=None))
    np.testing.assert_array_equal(estimate.target, SOURCE)
    assert not estimate.adjustment.offset.any()
    estimate.put(1, seen(2))
    assert np.abs(estimate.target - SOURCE).max() > 0.02


@pytest.mark.parametrize(
    ("images", "every"), [(2975, SOURCE_EVERY), (SOURCE_EVERY * SOURCE_LOOKS, SOURCE_EVERY), (256, 4), (24, 1)]
)
def test_a_round_of_labels_looks_at_some_source_images_and_a_survey_at_one_for_each(images, every):
    assert PriorEstimate(PriorPlan(SOURCE), [images], frozen=False).adjustment.source_every == every
    assert PriorEstimate(PriorPlan(SOURCE), [images], frozen=True).adjustment.source_every == 1


# What a live estimate adds to the scores of a network that learns from it.


def seeing(shares):
    """Evidence of two images that a network sees in such shares, and of source images that it never mistakes."""
    posteriors = np.broadcast_to(np.array(shares), (2, CELLS, len(shares)))
    return replace(sure(posteriors), source=100 * np.eye(len(shares)))


def test_a_network_that_learns_from_adjusted_labels_is_brought_to_the_estimate_and_no_further():
    """In the middle between source and target it lacks the other half; where it is beyond, nothing is taken back."""
    source, target = np.array(SOURCE), np.array([0.25, 0.25, 0.3, 0.2])
    for share in (0.25, 0.5, 0.9, 1.0):
        estimate = PriorEstimate(PriorPlan(SOURCE), [2], frozen=False)
        predicted = (1 - share) * source + share * target
        estimate.put(0, seeing(predicted))
        estimate.settle(target)
        expected = np.minimum(np.abs(np.log(target / source)), np.abs(np.log(target / predicted)))
        np.testing.assert_allclose(
            estimate.adjustment.offset, np.sign(target - source) * expected, atol=1e-6, err_msg=f"{share}"
        )
    beyond = target + 0.2 * (target - source)
    estimate.put(0, seeing(beyond))
    estimate.settle(target)
    np.testing.assert_array_equal(estimate.adjustment.offset, np.zeros(4))


def test_what_it_sees_counts_as_many_times_as_the_temperature():
    target = np.array([0.25, 0.25, 0.3, 0.2])
    one, two = (PriorEstimate(PriorPlan(SOURCE, temperature=t), [2], frozen=False) for t in (1.0, 2.0))
    for estimate in (one, two):
        estimate.put(0, seeing([0.4, 0.25, 0.25, 0.1]))
        estimate.settle(target)
    np.testing.assert_allclose(two.adjustment.offset, 2 * one.adjustment.offset, rtol=1e-6)
    assert one.adjustment.offset.any()


def test_what_it_sees_of_classes_that_the_source_never_shows_is_no_ones_share():
    """Or everything else would look too rare."""
    estimate = PriorEstimate(PriorPlan((0.6, 0.0, 0.4), method="em"), [2], frozen=False)
    estimate.put(0, seeing([0.4, 0.2, 0.4]))
    estimate.settle(np.array([0.5, 0.0, 0.5]))
    np.testing.assert_allclose(estimate.adjustment.offset, 0.0, atol=1e-6)


def test_images_that_show_a_class_say_nothing_of_pixels_so_counts_adjust_in_full():
    plan = PriorPlan((0.4, 0.3, 0.2, 0.1), method="counts", presence=(0.2,) * 4)
    estimate, g = PriorEstimate(plan, [2], frozen=False), np.full((2, 4), 0.5)
    estimate.put(0, replace(shown(g), means=np.tile([0.9, 0.05, 0.03, 0.02], (2, 1)).astype(np.float32)))
    np.testing.assert_allclose(estimate.target, 0.5 * np.array(plan.source) + 0.5 * 0.25)
    np.testing.assert_array_equal(estimate.adjustment.offset, plan.offset(estimate.target))


# What teachers sum.


@pytest.mark.parametrize("method", METHODS)
def test_what_a_teacher_sums_moves_an_estimate_as_what_it_sees_does(method):
    plan = replace(PLAN, method=method, presence=(0.2,) * 4)
    whole, summed = (PriorEstimate(plan, CHUNKS, frozen=False) for _ in range(2))
    for number, chunk in enumerate((5, 0, 7, 3, 1, 6, 2, 4, 0, 5)):
        evidence = seen(CHUNKS[chunk], 10 * number)
        if number % 3 == 0:
            evidence = replace(evidence, source=None)
        assert summed.adjustment.target is summed.target
        part = plan.part(evidence, summed.adjustment.target)
        assert part.sums.shape == ((2 if number % 3 == 0 else 6), 4)
        assert part.sums.dtype == np.float64
        whole.put(chunk, evidence)
        summed.put(chunk, part)
        np.testing.assert_array_equal(summed.target, whole.target)
    assert np.abs(whole.target - SOURCE).max() > 0.02


def test_all_that_a_teacher_sees_is_wanted_of_it_for_a_frozen_estimate():
    assert PriorEstimate(PLAN, [2], frozen=True).adjustment.target is None


def test_a_rare_class_cannot_be_argued_away():
    """Its own estimate makes it rarer, step after step; the floor ends that."""
    posteriors = np.full((1, CELLS, 4), 0.01)
    posteriors[..., 0] = 0.97
    evidence = sure(posteriors)
    estimate = PriorEstimate(replace(PLAN, floor=0.3), [1, 1], frozen=False)
    for number in range(100):
        estimate.put(number % 2, evidence)
        assert (estimate.target >= 0.3 * np.array(SOURCE) - 1e-12).all()
    np.testing.assert_allclose(estimate.target[1:], 0.3 * np.array(SOURCE[1:]), rtol=1e-6)


# Going on from what a checkpoint holds.


RECALLED = np.array([0.1, 0.2, 0.3, 0.4])


def test_a_frozen_estimate_that_is_recalled_needs_no_survey():
    estimate = PriorEstimate(PLAN, [2, 2], frozen=True)
    estimate.settle(RECALLED)
    assert not estimate.surveying
    assert not estimate.adjustment.witness
    np.testing.assert_allclose(estimate.adjustment.offset, np.log(RECALLED / np.array(SOURCE)), rtol=1e-6)
    for chunk, evidence in told([2, 2]).items():
        estimate.put(chunk, evidence)
    np.testing.assert_array_equal(estimate.target, RECALLED)


def test_a_live_estimate_goes_on_from_what_is_recalled():
    estimate, evidence = PriorEstimate(PLAN, [2, 2], frozen=False), seen(2)
    estimate.settle(RECALLED)
    np.testing.assert_array_equal(estimate.target, RECALLED)
    assert estimate.adjustment.witness
    estimate.put(0, evidence)
    part = reweighted(rows(evidence), RECALLED, np.array(SOURCE))
    np.testing.assert_allclose(estimate.target, 0.5 * RECALLED + 0.5 * part / part.sum(), atol=1e-6)


def test_teachers_are_told_at_which_temperature_to_look():
    assert PriorEstimate(replace(PLAN, temperature=1.8), [2], frozen=True).adjustment.temperature == 1.8


def test_after_a_resume_labels_are_adjusted_no_further_than_before_it():
    plan = PriorPlan((0.5, 0.3, 0.2))
    before, after = (PriorEstimate(plan, [4, 4], frozen=False) for _ in range(2))
    before.settle(np.array([0.2, 0.3, 0.5]))
    before.predicted = np.array([0.25, 0.3, 0.45])
    after.recall(before.target, before.predicted)
    np.testing.assert_array_equal(after.adjustment.offset, before.adjustment.offset)
    full = plan.offset(before.target)
    assert np.abs(after.adjustment.offset).max() < np.abs(full).max()
