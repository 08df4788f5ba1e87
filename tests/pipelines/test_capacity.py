"""Predictions against cases computed by hand, and against the bank's own book."""

import math
from dataclasses import replace

import numpy as np
import pytest

from actors.label_bank import LabelBook
from actors.label_rounds import Header
from actors.protocols import LabelPlan, RuleShape
from actors.records import RecordLayout
from actors.staleness import StalenessPolicy
from pipelines.capacity import (
    VIEW_STEPS,
    Ages,
    Course,
    InTurns,
    Measured,
    Pace,
    SideBySide,
    StageShape,
    Store,
    StreamShape,
    advise,
    blocks_held,
    in_turns,
    mixed_quantiles,
    replay,
    side_by_side,
    store,
)


def course(images=10, rows=5, steps=100, every=20, batch=1, **more):
    """A run of one stage without evaluator and checkpoints."""
    defaults = {
        "images": images,
        "stages": (StageShape("self-training", steps, batch),),
        "labelled": 0,
        "publish_every": every,
        "evaluate_every": 0,
        "checkpoint_every": 0,
        "block_rows": {1: rows, 2: rows},
        "row_bytes": 100.0,
        "version_bytes": 1000,
        "watched": 0,
        "scored": 0,
    }
    return Course(**{**defaults, **more})


def measured(*steps, image=1.0, **more):
    """Seconds of a step beside 0, 1, … helpers; an image takes a teacher always as long."""
    beside = {number: Pace(seconds) for number, seconds in enumerate(steps)}
    images = dict.fromkeys(range(1, max(2, len(steps))), image)
    defaults = {
        "watch_seconds": 0.0,
        "score_seconds": 0.0,
        "alone": (beside[0],),
        "label_seconds": image,
        "labellers": 1,
    }
    return Measured(beside, images, **{**defaults, **more})


# --- step time


def test_teachers_that_never_pause_slow_every_step():
    row = side_by_side(course(), measured(1.0, 2.0, 2.0, image=4.0), 1)
    assert row.busy == 1
    assert row.step_seconds == pytest.approx(2.0)
    assert row.seconds == pytest.approx(200.0)
    assert row.epoch_seconds == pytest.approx(20.0)


def test_teachers_that_wait_for_weights_slow_a_part_of_the_steps():
    """A round takes 10 s; with s = 1.25 weights come every 25 s, so u = 0.4 and 1/s = 0.6/1 + 0.4/2."""
    row = side_by_side(course(), measured(1.0, 2.0, 2.0, image=1.0), 1)
    assert row.step_seconds == pytest.approx(1.25)
    assert row.busy == pytest.approx(0.4)


def test_the_evaluator_counts_as_one_more_helper_while_it_looks():
    """Looks of 10 s every 20 steps: e = 10 / 20 s, and 1/s = (1 - e)/1 + e/2."""
    looked = course(evaluate_every=20, watched=10)
    row = side_by_side(looked, measured(1.0, 2.0, 2.0, image=1e-9, watch_seconds=1.0), 1)
    assert row.step_seconds == pytest.approx(1.25)


def test_publications_and_checkpoints_are_part_of_the_mean_step():
    assert Pace(1.0, 0.5).mean(publish_every=5) == pytest.approx(1.1)
    assert Pace(1.0, 0.5).mean(publish_every=5, checkpoint_every=10) == pytest.approx(1.15)


def test_only_stages_that_teachers_label_for_are_slowed_by_them():
    shapes = (("first", 10, False), ("planned", 100, True), ("after", 20, True), ("last", 5, False))
    stages = tuple(StageShape(name, steps, 1, labelled=labelled) for name, steps, labelled in shapes)
    paces = Pace(3.0), Pace(1.0), Pace(5.0), Pace(7.0)
    given = measured(1.0, 2.0, 2.0, image=4.0, alone=paces)
    row = side_by_side(course(stages=stages, labelled=1), given, 1)
    assert row.seconds == pytest.approx(10 * 3 + 100 * 2 + 20 * 5 * 2 + 5 * 7)


# --- label age


def test_ages_of_one_chunk_by_hand():
    """Made at 4, 14 and 24 with versions 0, 10 and 20; read two steps later and until the next one is there.

    Read are ages 6 to 16 for 10 steps, again, and 6 to 10 for 4: half of 24 below 10, and 22.8 of them below 15.4.
    """
    ages, _ = replay(course(images=4, rows=4, steps=30, every=10), 1, 1.0, 1.0)
    assert ages.p50 == pytest.approx(10.0)
    assert ages.p95 == pytest.approx(15.4)
    assert ages.missing == pytest.approx(6 / 30)
    assert ages.rounds == pytest.approx(3.0)


def brute_force(images, rows, teachers, chunk_steps, every, steps):
    """The bank's own book, asked step by step: all ages that are read, and the rounds that were made."""
    layout = RecordLayout((("label", (1, 1)),), 2)
    book = LabelBook(images, rows, LabelPlan(RuleShape(layout, 2), StalenessPolicy()))
    counts, histogram = np.array([5, 5]), np.zeros((2, 256), np.int64)
    free, calls = [0] * teachers, []
    live, heard, ages = {}, [], []
    for step in range(steps):
        newest = step // every * every
        for call in [call for call in calls if call[0] == step]:
            calls.remove(call)
            _, _, chunk, version = call
            assert book.accept(Header(chunk, version, rows, 1.0, counts, histogram), None)
            heard.append((step + VIEW_STEPS, chunk, version))
        for teacher in range(teachers):
            while sum(call[1] == teacher for call in calls) < 2:
                chunk = book.next_chunk(newest)
                if chunk is None:
                    break
                free[teacher] = max(step, free[teacher]) + chunk_steps
                calls.append((free[teacher], teacher, chunk, newest))
        live.update({chunk: version for at, chunk, version in heard if at == step})
        ages += [step - version for version in live.values()]
    return ages, book.counters.images / images


@pytest.mark.parametrize(
    ("teachers", "chunk_steps", "every"), [(1, 10, 25), (1, 3, 100), (2, 12, 20), (1, 40, 10), (2, 2, 90)]
)
def test_ages_are_those_of_the_banks_own_book(teachers, chunk_steps, every):
    images, rows, steps = 64, 8, 1000
    ages, rounds = brute_force(images, rows, teachers, chunk_steps, every, steps)
    given = course(images=images, rows=rows, steps=steps, every=every)
    found, _ = replay(given, teachers, 1.0, chunk_steps / rows)
    assert found.p50 == pytest.approx(np.median(ages), rel=0.05, abs=1.5)
    assert found.p95 == pytest.approx(np.percentile(ages, 95), rel=0.05, abs=1.5)
    assert found.rounds == pytest.approx(rounds, rel=0.02)
    assert found.missing == pytest.approx(1 - len(ages) / (steps * images / rows), abs=0.01)


def test_the_median_age_in_the_long_run_is_that_of_the_formula():
    """P/2 + 2b + R/2 + v with P = 25, b = 8 and R = 128."""
    ages, _ = replay(course(images=256, rows=16, steps=20_000, every=25), 1, 0.2, 0.1)
    assert ages.p50 == pytest.approx(12.5 + 16 + 64 + VIEW_STEPS, rel=0.03)


def test_a_stage_that_ends_before_its_first_label_has_no_age():
    ages, _ = replay(course(images=10, rows=10, steps=5), 1, 1.0, 1.0)
    assert math.isnan(ages.p50)
    assert ages.missing == 1


def test_quantiles_of_a_mixture():
    found = mixed_quantiles(np.array([0.0, 10.0]), np.array([10.0, 30.0]), np.array([1.0, 1.0]), (0.25, 0.5, 0.95))
    assert found == pytest.approx((5.0, 10.0, 28.0))


def test_quantiles_of_a_mixture_are_those_of_its_samples():
    rng = np.random.default_rng(0)
    firsts = rng.uniform(0, 50, 20)
    lasts, weights = firsts + rng.uniform(1, 100, 20), rng.uniform(0.1, 1, 20)
    picks = rng.choice(20, 200_000, p=weights / weights.sum())
    samples = rng.uniform(firsts[picks], lasts[picks])
    found = mixed_quantiles(firsts, lasts, weights, (0.5, 0.95))
    assert found == pytest.approx(np.percentile(samples, [50, 95]), rel=0.01)


# --- object store


def test_blocks_of_a_stream_by_hand():
    """Two segments of two blocks of two batches; the second opens when half of the first is taken."""
    assert blocks_held(StreamShape(1, 2, 2), 8).tolist() == [2, 2, 3, 3, 2, 2, 1, 1]


def test_blocks_that_are_read_when_they_are_asked_for_lie_nowhere_before():
    """Of three direct blocks two are asked for ahead, and the last of a short segment is cut."""
    assert blocks_held(StreamShape(1, 1, 4, direct_blocks=3), 3).tolist() == [2, 2, 1]


def test_bytes_in_the_store_by_hand():
    stages = (StageShape("self-training", 8, 1, (StreamShape(1000, 2, 2),)),)
    given = course(stages=stages, students=2)
    found = store(given, teachers=1, step_seconds=0.5, image_seconds=0.1, busy=0.5, behind=0.25)
    labels = 10 * 100 * 1.25
    weights = 2 * 1000
    not_yet_freed = 0.5 * (0.5 / 0.1 * 100 + 1000 / (20 * 0.5))
    assert found.mean == pytest.approx(labels + weights + not_yet_freed + 2 * 1000 * 2.0)
    assert found.most == pytest.approx(labels + weights + not_yet_freed + 2 * 1000 * 3.0)


def test_a_student_that_visits_all_images_at_once_exchanges_every_block_at_once():
    often, _ = replay(course(images=64, rows=8, batch=64, steps=500), 1, 1.0, 1.0)
    assert often.p50 > 0
    behind = [replay(course(images=64, rows=8, batch=batch, steps=500), 1, 1.0, 1.0)[1] for batch in (1, 64)]
    assert behind[0] > 10 * behind[1]
    assert 0 < behind[1] < behind[0] <= 1


# --- turns


def test_turns_have_as_few_rounds_as_keep_labels_young():
    turns = in_turns(course(steps=300), measured(1.0, 2.0, image=0.5), age=50)
    assert (turns.rounds, turns.age_p50, turns.age_p95) == (3, 50, 95)
    assert turns.round_seconds == pytest.approx(5.0)
    assert turns.seconds == pytest.approx(300 + 3 * 5)
    assert in_turns(course(steps=300), measured(1.0, 2.0), age=1000).rounds == 1


def test_turns_train_on_all_devices_where_that_is_faster():
    given = measured(1.0, 2.0)
    slow = in_turns(course(), replace(given, whole=(Pace(1.5), Pace(2.0))), age=50)
    fast = in_turns(course(), replace(given, whole=(Pace(0.6), Pace(2.0))), age=50)
    assert (slow.step_seconds, slow.whole) == (1.0, False)
    assert (fast.step_seconds, fast.whole) == (0.6, True)


# --- advice


def row(teachers, seconds, p50):
    return SideBySide(teachers, 1.0, 1.0, 1.0, Ages(p50, 2 * p50, 0.0, 5.0), Store(1.0, 1.0), 1.0, seconds)


def turns_of(seconds):
    return InTurns(3, 1.0, 10.0, 100.0, 190.0, Store(1.0, 1.0), 1.0, seconds, whole=False)


def test_the_fewest_teachers_whose_labels_are_young_enough_are_taken():
    rows = [row(1, 100, 300), row(2, 101, 120), row(4, 102, 60)]
    advice = advise(rows, turns_of(150), age=128)
    assert advice.teachers == 2
    assert "labels 120 steps old" in advice.sentence


def test_more_teachers_are_not_taken_when_they_slow_the_student():
    assert advise([row(1, 100, 120), row(2, 140, 60)], turns_of(150), age=128).teachers == 1


def test_turns_are_taken_when_splitting_costs_more_than_it_gains():
    advice = advise([row(1, 100, 120)], turns_of(80), age=128)
    assert advice.teachers is None
    assert "1.25 times the time" in advice.sentence


def test_a_difference_within_the_uncertainty_is_none():
    advice = advise([row(1, 100, 120)], turns_of(80), age=128, uncertain=0.3)
    assert advice.teachers == 1
    assert "as far as can be told (within 30%)" in advice.sentence


@pytest.mark.parametrize(
    ("ages", "said"),
    [
        ((600.0, 500.0), "labels are 500 steps old at best (2 teachers)"),
        ((math.nan, math.nan), "images have none in time"),
    ],
)
def test_turns_are_taken_when_no_number_of_teachers_keeps_labels_young(ages, said):
    advice = advise([row(number, 100, p50) for number, p50 in enumerate(ages, 1)], turns_of(200), age=128)
    assert advice.teachers is None
    assert said in advice.sentence
