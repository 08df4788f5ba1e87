from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import ray
from fakes import CLASSES, SHAPE, FakeSelection, LostError, label_plan
from hypothesis import given
from hypothesis import strategies as st

from actors.label_bank import Delta
from actors.label_view import LabelView
from actors.records import encode
from actors.staleness import age_statistics

ROWS = 2


def block(version, value, confidence=200):
    layout = label_plan().rule.layout
    rows = [
        {"label": np.full(SHAPE, value, np.uint8), "confidence": np.full(SHAPE, confidence, np.uint8)}
        for _ in range(ROWS)
    ]
    counts = [np.zeros(CLASSES)] * ROWS
    return encode(layout, [str(i) for i in range(ROWS)], rows, counts, weights_version=version, made_at_step=version)


class Bank:
    """The cluster as a view sees it: references are names; a value arrives when it is delivered."""

    def __init__(self):
        self.values, self.here, self.lost, self.questions = {}, set(), set(), []
        self.reported, self.waited_for = [], []
        self.stage, self.sequence, self.entries = 1, 0, {}
        self.thresholds, self.complete, self.silent = None, False, False

    def make(self, chunk, version, value, deliver=False, **more):
        name = f"{chunk}v{version}#{len(self.values)}"
        self.values[name] = block(version, value, **more)
        self.sequence += 1
        self.entries[chunk] = (name, version, self.sequence)
        if deliver:
            self.here.add(name)
        return name

    def ask(self, stage, stage_version, since, step):
        entries = [(c, [name], v) for c, (name, v, sequence) in self.entries.items() if sequence > since]
        answer = f"answer {len(self.questions)}"
        self.questions.append((stage, stage_version, since, step))
        self.values[answer] = Delta(self.stage, self.sequence, entries, self.thresholds, self.complete)
        if not self.silent:
            self.here.add(answer)
        return answer

    def ready(self, references, timeout=0.0):
        assert timeout == 0.0
        self.waited_for += [r for r in references if not r.startswith("answer")]
        return {r for r in references if r in self.here or r in self.lost}

    def get(self, reference):
        if reference in self.lost:
            raise LostError
        assert reference in self.here, "would have blocked"
        return self.values[reference]

    def report_lost(self, chunk, version):
        self.reported.append((chunk, version))


def view_of(bank, **plan):
    return LabelView(label_plan(**plan), SHAPE, ROWS, 1, 0, bank)


def polled(view, step, images=(0, 1, 2, 3), times=3):
    for _ in range(times):
        view.poll(step, np.array(images))


def test_a_label_that_does_not_exist_is_withheld_everywhere_and_weighs_nothing():
    view = view_of(Bank())
    polled(view, 0)
    label, weight = view.get(3, 0)
    assert label.shape == SHAPE
    assert label.dtype == np.uint8
    assert (label == 255).all()
    assert weight == 0.0
    assert (view.hits, view.misses) == (0, 1)


def test_the_older_label_is_served_until_the_newer_one_is_here():
    bank = Bank()
    bank.make(0, 10, value=1, deliver=True)
    view = view_of(bank)
    polled(view, 12)
    newer = bank.make(0, 20, value=2)
    polled(view, 22)
    assert view.get(0, 22)[0][0, 0] == 1
    bank.here.add(newer)
    polled(view, 23)
    assert view.get(1, 23)[0][0, 0] == 2
    assert view.ages == {12: 1, 3: 1}


def test_a_bank_that_does_not_answer_blocks_nobody_and_is_asked_once():
    bank = Bank()
    bank.silent = True
    view = view_of(bank)
    polled(view, 0, times=10)
    assert len(bank.questions) == 1
    assert view.get(0, 0)[1] == 0.0


def test_only_what_the_coming_samples_need_is_pulled():
    bank = Bank()
    for chunk in range(4):
        bank.make(chunk, 5, value=chunk % CLASSES)
    polled(view_of(bank), 6, images=(2, 3, 7))
    assert {name[0] for name in bank.waited_for} == {"1", "3"}


def test_a_block_that_is_here_is_not_fetched_again():
    bank = Bank()
    bank.make(0, 5, value=1, deliver=True)
    view = view_of(bank)
    polled(view, 6)
    bank.waited_for.clear()
    polled(view, 7)
    assert bank.waited_for == []


def test_the_bank_is_told_what_the_reader_has_seen():
    bank = Bank()
    bank.make(0, 5, value=1)
    bank.make(1, 5, value=1)
    view = view_of(bank)
    polled(view, 6, times=2)
    assert [(stage, since, step) for stage, _, since, step in bank.questions] == [(1, 0, 6), (1, 2, 6)]


def test_a_bank_that_was_restarted_is_followed():
    bank = Bank()
    for chunk in (0, 1):
        bank.make(chunk, 5, value=0, deliver=True)
    view = view_of(bank)
    polled(view, 6)
    bank.sequence, bank.entries = 0, {}
    bank.make(1, 8, value=2, deliver=True)
    polled(view, 9)
    assert view.get(2, 9)[0][0, 0] == 2
    assert view.get(0, 9)[0][0, 0] == 0, "the older local record is still served"
    bank.make(0, 9, value=1, deliver=True)
    polled(view, 10)
    assert view.get(0, 10)[0][0, 0] == 1


def test_a_lost_answer_is_asked_for_again():
    bank = Bank()
    bank.lost.add("answer 0")
    bank.make(0, 5, value=1, deliver=True)
    view = view_of(bank)
    polled(view, 6)
    assert view.get(0, 6)[0][0, 0] == 1


def test_an_error_of_the_banks_code_ends_the_run_instead_of_a_wait_without_end():
    class Failing(Bank):
        def get(self, reference):
            raise ray.exceptions.RayTaskError("poll", "Traceback", KeyError(1))

    with pytest.raises(ray.exceptions.RayTaskError):
        view_of(Failing(), refresh="once").wait_for_round(0, lambda: False, poll_seconds=0.0)


def test_a_bank_that_died_and_came_back_is_waited_for():
    bank = Bank()
    bank.lost = {f"answer {i}" for i in range(5)}
    bank.complete = True
    assert view_of(bank, refresh="once").wait_for_round(0, lambda: len(bank.questions) > 20, poll_seconds=0.0)
    assert len(bank.questions) == 6


def test_a_lost_block_is_reported_and_counts_as_a_miss():
    bank = Bank()
    bank.lost.add(bank.make(0, 5, value=1))
    view = view_of(bank)
    polled(view, 6)
    assert bank.reported == [(0, 5)]
    assert view.lost == 1
    assert view.get(0, 6)[1] == 0.0
    assert view.misses == 1


def test_a_lost_newer_block_leaves_the_older_one():
    bank = Bank()
    bank.make(0, 5, value=1, deliver=True)
    view = view_of(bank)
    polled(view, 6)
    bank.lost.add(bank.make(0, 8, value=2))
    polled(view, 9)
    assert view.get(0, 9)[0][0, 0] == 1


def test_a_label_that_is_too_old_is_a_miss():
    bank = Bank()
    bank.make(0, 5, value=1, deliver=True)
    view = view_of(bank, max_age_steps=10)
    polled(view, 15)
    assert view.get(0, 15)[1] == 1.0
    assert view.get(0, 16) == (pytest.approx(np.full(SHAPE, 255)), 0.0)


def test_an_older_label_weighs_less_where_the_policy_says_so():
    bank = Bank()
    bank.make(0, 0, value=1, deliver=True)
    view = view_of(bank, half_life_steps=10)
    polled(view, 20)
    assert view.get(0, 20)[1] == 0.25


def test_thresholds_are_applied_when_a_label_is_read():
    bank = Bank()
    bank.make(0, 0, value=1, confidence=120, deliver=True)
    view = view_of(bank, selection=FakeSelection())
    polled(view, 1)
    assert (view.get(0, 1)[0] == 255).all(), "no thresholds are known yet"
    bank.thresholds = np.array([0, 120, 0], np.uint8)
    polled(view, 1)
    assert (view.get(0, 1)[0] == 1).all()
    bank.thresholds = np.array([0, 121, 0], np.uint8)
    polled(view, 1)
    assert (view.get(0, 1)[0] == 255).all()


def test_with_once_nothing_is_served_before_the_round_is_complete():
    bank = Bank()
    bank.make(0, 0, value=1, deliver=True)
    view = view_of(bank, refresh="once")
    polled(view, 1)
    assert view.get(0, 1)[1] == 0.0
    bank.complete = True
    polled(view, 1)
    assert view.get(0, 1)[1] == 1.0


def test_with_once_a_label_that_was_not_asked_for_ahead_is_fetched_when_it_is_read():
    bank = Bank()
    bank.make(0, 0, value=1, deliver=True)
    bank.make(1, 0, value=2, deliver=True)
    bank.complete = True
    view = view_of(bank, refresh="once")
    polled(view, 1, images=(0,))
    assert view.get(3, 1)[0][0, 0] == 2


def test_waiting_for_the_round_ends_with_the_round():
    bank, ticks = Bank(), []

    def tick():
        ticks.append(None)
        bank.complete = len(ticks) > 3
        return False

    assert view_of(bank, refresh="once").wait_for_round(0, tick, poll_seconds=0.0) is True
    assert 4 <= len(ticks) <= 6


def test_waiting_for_the_round_ends_when_the_user_stops():
    assert view_of(Bank(), refresh="once").wait_for_round(0, lambda: True, poll_seconds=0.0) is False


def test_answers_about_another_stage_are_ignored():
    bank = Bank()
    bank.stage = 0
    bank.make(0, 0, value=1, deliver=True)
    view = view_of(bank)
    polled(view, 1)
    assert view.get(0, 1)[1] == 0.0


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_age_statistics_are_numpys_inverted_percentiles(ages):
    found = age_statistics(Counter(ages))
    expected = {q: int(np.percentile(ages, p, method="inverted_cdf")) for q, p in (("p50", 50), ("p95", 95))}
    assert found == {**expected, "max": max(ages)}


def test_without_labels_there_are_no_ages():
    assert age_statistics(Counter()) == {"p50": None, "p95": None, "max": None}


def test_an_extra_column_is_that_of_the_label_which_was_read_and_zeros_where_there_is_none():
    bank = Bank()
    view = view_of(bank)
    view.plan = replace(view.plan, extra_column="confidence")
    assert not view.column("confidence", 0, 5).any()
    bank.make(0, 3, value=1, deliver=True, confidence=77)
    polled(view, 5)
    view.get(1, 5)
    assert (view.column("confidence", 1, 5) == 77).all()
    assert view.column("confidence", 2, 5).shape == view.column("confidence", 1, 5).shape == SHAPE
    assert not view.column("confidence", 2, 5).any()


def test_a_label_that_is_too_old_takes_its_extra_column_along():
    bank = Bank()
    view = view_of(bank, max_age_steps=10)
    view.plan = replace(view.plan, extra_column="confidence")
    bank.make(0, 3, value=1, deliver=True)
    polled(view, 5)
    assert view.column("confidence", 0, 13).any()
    assert not view.column("confidence", 0, 14).any()
