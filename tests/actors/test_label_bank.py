import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
from fakes import CLASSES, FakeSelection, LostError, Remote, header, label_plan, soon
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors import label_bank
from actors.label_bank import (
    ERRORS_TO_FAIL,
    REFUSALS_TO_BLOCK,
    VERSION_SECONDS,
    LabelBank,
    LabelBook,
    effective_classes,
)
from actors.prior_estimate import CELLS, Evidence, PriorEstimate, PriorPlan, estimated
from actors.weight_board import VersionGoneError, WeightBoard
from models.priors import encode_posteriors


def book(images=8, rows=2, **plan):
    return LabelBook(images, rows, label_plan(**plan))


def fill(given, version=0):
    for chunk in range(len(given.ranges)):
        given.accept(header(chunk, version), f"block{chunk}v{version}")
    return given


def live_histogram(given):
    return sum((e.histogram for e in given.entries.values()), np.zeros((CLASSES, 256), np.int64))


class LabelBookMachine(RuleBasedStateMachine):
    """Any order of starts, results, failures, losses and new versions, beside a model of what was refused."""

    def __init__(self):
        super().__init__()
        self.book = LabelBook(9, 2, label_plan(selection=FakeSelection()))
        self.newest = 0
        self.in_flight = {}
        self.refused = {chunk: [] for chunk in range(5)}
        self.blocked = set()

    @rule()
    def publish(self):
        self.newest += 1

    @rule()
    def start(self):
        versions = {chunk: entry.version for chunk, entry in self.book.entries.items()}
        free = [c for c in range(5) if c not in self.in_flight and self.newest not in self.refused[c]]
        stale = [c for c in free if versions.get(c, -1) < self.newest and self.newest not in self.blocked]
        chunk = self.book.next_chunk(self.newest)
        assert chunk in stale if stale else chunk is None
        if chunk is not None:
            assert versions.get(chunk, -1) == min(versions.get(c, -1) for c in stale)
            self.in_flight[chunk] = self.newest

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.integers(0, 9), pixels=st.lists(st.integers(0, 9), min_size=CLASSES, max_size=CLASSES))
    def finish(self, pick, pixels):
        chunk = sorted(self.in_flight)[pick % len(self.in_flight)]
        version = self.in_flight.pop(chunk)
        before, refused = self.book.entries.get(chunk), self.refused[chunk]
        if self.book.accept(header(chunk, version, pixels), object()):
            assert before is None or version not in self.blocked
            refused.clear()
            return
        assert self.book.entries.get(chunk) is before is not None
        if version in self.blocked:
            return
        assert len(refused) < REFUSALS_TO_BLOCK, "what so many weights say of a chunk is so"
        refused.append(version)
        if sum(version in versions for versions in self.refused.values()) == REFUSALS_TO_BLOCK:
            self.blocked.add(version)

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.integers(0, 9))
    def fail(self, pick):
        chunk = sorted(self.in_flight)[pick % len(self.in_flight)]
        del self.in_flight[chunk]
        self.book.fail(chunk)

    @rule(chunk=st.integers(0, 4), version=st.integers(0, 5))
    def lose(self, chunk, version):
        self.book.lose(chunk, version)

    @invariant()
    def the_histogram_is_the_sum_of_the_live_blocks(self):
        np.testing.assert_array_equal(self.book.histogram, live_histogram(self.book))

    @invariant()
    def a_version_is_blocked_by_several_chunks_and_not_by_fewer(self):
        assert self.book.blocked == self.blocked

    @invariant()
    def what_is_under_way_is_reserved(self):
        assert self.book.busy == set(self.in_flight)

    @invariant()
    def thresholds_are_those_of_the_live_blocks(self):
        expected = FakeSelection().thresholds(live_histogram(self.book))
        np.testing.assert_array_equal(self.book.thresholds(), expected)


LabelBookMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLabelBook = LabelBookMachine.TestCase


def test_the_last_chunk_may_be_shorter():
    assert book(images=7, rows=3).ranges == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize(("images", "rows"), [(0, 1), (1, 0)])
def test_a_book_without_images_or_rows_is_refused(images, rows):
    with pytest.raises(ValueError, match="needs images and rows"):
        book(images, rows)


def test_nothing_starts_before_weights_are_published():
    assert book().next_chunk(None) is None


def test_the_stalest_chunk_comes_first():
    given = fill(book())
    for chunk, version in ((0, 30), (1, 10), (2, 20), (3, 40)):
        given.accept(header(chunk, version), "x")
    assert [given.next_chunk(50) for _ in range(5)] == [1, 2, 0, 3, None]


def test_a_chunk_that_never_had_a_label_comes_before_the_stalest():
    given = book()
    given.accept(header(0, 0), "x")
    given.accept(header(2, 0), "x")
    assert [given.next_chunk(5) for _ in range(4)] == [1, 3, 0, 2]


def test_a_failed_call_frees_its_chunk_and_keeps_the_older_label():
    given = fill(book(images=2))
    assert given.next_chunk(5) == 0
    assert given.next_chunk(5) is None
    given.fail(0)
    assert given.counters.failures == 1
    assert given.entries[0].version == 0
    assert given.next_chunk(5) == 0


def test_a_lost_block_is_made_again_first():
    given = fill(book(), version=7)
    given.lose(2, version=7)
    assert given.counters.lost_blocks == 1
    assert not given.round_complete
    assert given.next_chunk(7) == 2


def test_a_block_that_was_replaced_meanwhile_is_not_lost():
    given = fill(book(), version=7)
    given.lose(2, version=3)
    assert given.round_complete
    assert given.counters.lost_blocks == 0


def test_with_once_every_chunk_is_labelled_exactly_once():
    given = book(refresh="once")
    for _ in given.ranges:
        given.accept(header(given.next_chunk(3), 3), "x")
    assert given.round_complete
    assert given.next_chunk(1000) is None


@pytest.mark.parametrize(
    ("pixels", "collapsed"),
    [
        ((100, 100, 100), False),
        ((50, 50, 50), False),  # exactly half of the pixels
        ((49, 50, 50), True),  # fewer than half
        ((300, 0, 0), True),  # one class of three: 1 < 3 / 2
        ((150, 150, 0), False),  # two of three
        ((0, 0, 0), True),
    ],
)
def test_collapsed_labels_are_refused_and_where_there_is_one_chunk_their_version_is_blocked(pixels, collapsed):
    given = book(images=2)
    given.accept(header(0, 1, (100, 100, 100)), "good")
    given.next_chunk(2)
    assert given.accept(header(0, 2, pixels), "new") is not collapsed
    assert given.entries[0].block == ("good" if collapsed else "new")
    assert given.blocked == ({2} if collapsed else set())
    assert given.counters.collapsed_blocks == int(collapsed)
    assert given.busy == set()
    assert (given.next_chunk(2) is None) is True
    assert given.next_chunk(3) == 0


def test_the_first_labels_of_a_chunk_cannot_collapse():
    given = book(images=2)
    assert given.accept(header(0, 1, (0, 0, 0)), "empty")
    assert given.accept(header(0, 2, (5, 0, 0)), "more")


@pytest.mark.parametrize("slide", [lambda k: (100, 100 * 0.8**k, 100 * 0.8**k), lambda k: [90 * 0.8**k] * 3])
def test_a_slow_slide_is_a_collapse_though_no_step_of_it_is_one(slide):
    given, accepted = book(images=2), []
    for version in range(20):
        accepted.append(given.accept(header(0, version, [int(n) for n in slide(version)]), f"block {version}"))
    stop = accepted.index(False)
    assert stop > 1
    assert accepted[stop : stop + 4] == [False] * 3 + [True]  # four versions that agree are believed
    assert given.counters.collapses_believed > 0


def test_when_three_chunks_insist_on_a_collapse_all_may_begin_anew():
    """Otherwise one chunk a version would follow, and a large set kept its old labels to the end."""
    given = fill(book(images=40))
    for version in range(1, 6):
        while (chunk := given.next_chunk(version)) is not None:
            given.accept(header(chunk, version, (12, 0, 0)), f"block {version}")
    assert given.counters.collapses_believed == 1
    assert given.blocked == set()
    assert {entry.version for entry in given.entries.values()} == {5}


def test_one_odd_chunk_does_not_stop_the_labels_of_all_others():
    """The first labels of one chunk were noise of many classes; every later version calms it down for good."""
    given = book(images=20)
    for chunk in range(10):
        given.accept(header(chunk, 0, (100, 100, 100) if chunk == 0 else (290, 5, 5)), "x")
    for version in range(1, 30):
        while (chunk := given.next_chunk(version)) is not None:
            given.accept(header(chunk, version, (290, 5, 5)), "x")
    assert min(given.entries[chunk].version for chunk in range(1, 10)) > 20


def refuse(given, chunks, version):
    for chunk in chunks:
        assert not given.accept(header(chunk, version, (12, 0, 0)), "odd")


def test_one_odd_chunk_is_refused_but_does_not_block_its_version():
    given = fill(book(images=20))
    refuse(given, [4], version=5)
    assert given.blocked == set()
    assert given.entries[4].version == 0
    assert given.counters.collapsed_blocks == 1
    assert {given.next_chunk(5) for _ in range(10)} == {*range(10), None} - {4}


def test_a_chunk_that_was_refused_is_tried_again_with_other_weights():
    given = fill(book(images=2 * 5))
    refuse(given, [0], version=5)
    assert given.next_chunk(6) == 0


def test_a_version_is_blocked_after_three_odd_chunks():
    given = fill(book(images=20))
    refuse(given, [1, 2], version=5)
    assert given.blocked == set()
    refuse(given, [7], version=5)
    assert given.blocked == {5}
    assert given.next_chunk(5) is None
    assert not given.accept(header(3, 5), "good, but its call was under way when the version was blocked")
    assert given.next_chunk(6) is not None


def test_odd_chunks_of_different_versions_block_none_of_them():
    given = fill(book(images=20))
    for chunk, version in ((1, 5), (2, 6), (3, 7), (4, 8)):
        refuse(given, [chunk], version)
    assert given.blocked == set()


def test_a_chunk_that_three_versions_found_odd_is_believed():
    given = fill(book(images=20))
    for version in (5, 6, 7):
        refuse(given, [0], version)
    assert given.next_chunk(8) == 0
    assert given.accept(header(0, 8, (12, 0, 0)), "believed")
    assert given.entries[0].block == "believed"
    assert given.blocked == set()
    assert given.accept(header(0, 9, (12, 0, 0)), "now the measure")


def test_one_version_that_labels_a_chunk_three_times_is_still_one_opinion():
    """A teacher that cannot get the weights it was asked for goes on with those it has."""
    given = fill(book(images=20))
    refuse(given, [0, 0, 0, 0], version=5)


def test_a_good_block_ends_a_chunks_refusals():
    given = fill(book(images=20))
    refuse(given, [0, 1], version=5)
    assert given.accept(header(0, 6), "good")
    refuse(given, [2], version=5)
    assert given.blocked == set()
    for version in (7, 8, 9):
        refuse(given, [0], version)


def test_an_older_block_does_not_replace_a_newer_one():
    """A teacher that cannot get the weights it was asked for goes on with those it has."""
    given = fill(book(), version=7)
    given.accept(header(0, 3), "older")
    assert given.entries[0].version == 7


def test_labels_from_the_students_future_are_dropped():
    given = book(selection=FakeSelection())
    for chunk, version in enumerate((10, 20, 30, 40)):
        given.accept(header(chunk, version, confidence=version), "x")
    given.rewind(20)
    assert {chunk: entry.version for chunk, entry in given.entries.items()} == {0: 10, 1: 20}
    np.testing.assert_array_equal(given.histogram, live_histogram(given))
    assert given.thresholds().tolist() == [15] * CLASSES
    assert [given.next_chunk(20) for _ in range(3)] == [2, 3, 0]


def test_a_rewound_book_forgets_the_verdicts_on_weights_that_will_be_others():
    given = fill(book(images=20))
    refuse(given, [1, 2, 3], version=5)
    refuse(given, [1, 2, 3], version=8)
    refuse(given, [1], version=9)
    given.rewind(6)
    assert given.blocked == {5}
    assert given.next_chunk(8) is not None
    given.busy.clear()
    refuse(given, [1, 2], version=9)
    assert given.blocked == {5}


def test_a_block_from_the_students_future_that_was_under_way_is_not_taken():
    given = fill(book(), version=10)
    chunk = given.next_chunk(40)
    given.rewind(20)
    given.accept(header(chunk, 40), "made by weights that will never have been")
    assert given.entries[chunk].version == 10
    assert given.busy == set()
    again = given.next_chunk(40)
    assert given.accept(header(again, 40), "made after the student came to that step again")


def test_thresholds_wait_for_the_round_and_then_stay():
    given = book(refresh="once", selection=FakeSelection())
    for chunk in range(3):
        given.accept(header(chunk, 1, confidence=100), "x")
        assert given.thresholds() is None
    given.accept(header(3, 1, confidence=200), "x")
    assert given.thresholds().tolist() == [125] * CLASSES


def test_thresholds_follow_the_live_labels_when_they_are_made_continuously():
    given = fill(book(selection=FakeSelection()))
    assert given.thresholds().tolist() == [100] * CLASSES
    given.accept(header(0, 1, confidence=200), "x")
    assert given.thresholds().tolist() == [125] * CLASSES


def test_a_rule_without_statistics_has_no_thresholds():
    assert fill(book()).thresholds() is None


def test_a_reader_is_told_only_what_is_new_to_it():
    given = book()
    given.accept(header(1, 5), "a")
    given.accept(header(3, 6), "b")
    assert given.delta(0) == [(1, ["a"], 5), (3, ["b"], 6)]
    assert given.delta(1) == [(3, ["b"], 6)]
    given.accept(header(1, 9), "c")
    assert given.delta(2) == [(1, ["c"], 9)]
    assert given.delta(given.sequence) == []


def test_the_index_holds_versions_and_thresholds_and_no_pixels():
    given = fill(book(selection=FakeSelection()), version=4)
    assert given.index() == {
        "versions": {"0": 4, "1": 4, "2": 4, "3": 4},
        "images": 8,
        "failures": 0,
        "thresholds": [100] * CLASSES,
    }


def test_class_shares_are_those_of_the_live_labels():
    given = book()
    assert given.class_shares().tolist() == [0, 0, 0]
    given.accept(header(0, 1, (6, 2, 0)), "x")
    given.accept(header(1, 1, (0, 2, 0)), "x")
    assert given.class_shares().tolist() == [0.6, 0.4, 0.0]


def test_versions_are_those_of_the_oldest_and_the_newest_live_label():
    given = book()
    assert given.versions() == {}
    for chunk, version in ((0, 3), (1, 7), (0, 5)):
        given.accept(header(chunk, version), "x")
    assert given.versions() == {"weights_version_oldest": 5, "weights_version_newest": 7}


def test_the_most_gpu_memory_that_a_teacher_holds_is_kept():
    given = book()
    for chunk, held in ((0, 5), (1, 9), (0, 7)):
        given.accept(replace(header(chunk, 1), gpu_bytes=held), "x")
    assert given.counters.gpu_bytes == 9


def test_acceptance_is_the_share_of_each_predicted_class_that_a_fixed_rule_kept():
    given = book()
    assert given.acceptance() == [None, None, None]
    histogram = np.zeros((CLASSES, 256), np.int64)
    histogram[0, 40], histogram[1, 200] = 12, 2
    given.accept(header(0, 1, (6, 2, 0), histogram=histogram), "x")
    assert given.acceptance() == [0.5, 1.0, None]


def test_with_thresholds_only_the_pixels_above_them_count_as_accepted():
    given = book(selection=FakeSelection())
    histogram = np.zeros((CLASSES, 256), np.int64)
    histogram[0, 60], histogram[0, 88], histogram[1, 109] = 3, 1, 4  # 88 on average, and 88 is kept
    given.accept(header(0, 1, (4, 4, 0), histogram=histogram), "x")
    assert given.thresholds().tolist() == [88] * CLASSES
    assert given.accepted_pixels().tolist() == [1, 4, 0]
    assert given.class_shares().tolist() == [0.2, 0.8, 0.0]
    assert given.acceptance() == [0.25, 1.0, None]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [((5, 5, 5), 3.0), ((9, 0, 0), 1.0), ((0, 0, 0), 0.0), ((3, 1, 0), 4 / 3**0.75)],
)
def test_the_effective_number_of_classes(pixels, expected):
    assert effective_classes(np.array(pixels)) == pytest.approx(expected)


def seen(chunk, images=2):
    """What is seen of the images of a chunk, and of some source images."""
    posteriors = np.random.default_rng(chunk).dirichlet([0.2, 0.5, 1.0], (images, CELLS))
    log_means, means = np.log(np.exp(posteriors).mean(1)), posteriors.mean(1)
    source = np.array([[50.0, 5, 5], [3, 30, 3], [2, 2, 20]])
    return Evidence(log_means.astype(np.float32), encode_posteriors(posteriors), means.astype(np.float32), source)


class FakeTeacher:
    """Answers a call with a header and a block, or with what it is told to."""

    def __init__(self):
        self.calls, self.running, self.most = [], 0, 0
        self.told = []
        """The adjustment of every call."""
        self.broken = lambda call: None
        self.label = Remote(self._label)
        self.gone = False
        """Whether its node is, and nobody answers."""
        self.pid = Remote(self._pid)

    async def _pid(self):
        await asyncio.sleep(0.002)
        if self.gone:
            raise ray.exceptions.ActorUnavailableError("on its way", None)
        return 7

    def _label(self, stage, chunk, start, stop, version, step, adjustment):
        self.calls.append((stage, chunk, start, stop, version, step))
        self.told.append(adjustment)
        return self._answer(chunk, version, adjustment), f"block {chunk} of {version}"

    async def _answer(self, chunk, version, adjustment):
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.002)
        self.running -= 1
        error = self.broken(len(self.calls))
        if error is not None:
            raise error
        evidence = seen(chunk) if adjustment is not None and adjustment.witness else None
        return replace(header(chunk, version, seconds=0.002), evidence=evidence)


class FakeBoard:
    """A handle of a board on which some versions hang."""

    def __init__(self, *versions):
        self.board = WeightBoard()
        for version in versions:
            self.publish(version)
        self.newest_version = Remote(self._newest)
        self.nearest_version = Remote(self._nearest)

    async def _newest(self):
        await asyncio.sleep(0)
        return self.board.newest_version()

    async def _nearest(self, wanted):
        await asyncio.sleep(0)
        return self.board.nearest_version(wanted)

    def publish(self, version):
        self.board.publish(version, [f"weights {version}"])


def unhired(board, calls_in_flight=2, **plan):
    return LabelBank({1: label_plan(**plan)}, 8, {1: 2}, board, calls_in_flight)


async def bank(teachers, board, calls_in_flight=2, **plan):
    """A bank that knows its teachers before its stage begins."""
    made = unhired(board, calls_in_flight, **plan)
    assert await made.status(teachers) == {}
    return made


def defect():
    return ray.exceptions.RayTaskError("label", "Traceback\n  in label\nValueError: no such class", ValueError())


@pytest.fixture
def quick(monkeypatch):
    """Pauses take no time."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.001)))


async def until(condition, seconds=3.0):
    for _ in range(int(seconds / 0.005)):
        if await condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen in time")


async def close(given):
    await given.status([])
    await asyncio.sleep(0)


def run(test):
    asyncio.run(asyncio.wait_for(test(), 10))


def test_the_first_poll_of_a_stage_begins_it_and_the_teachers_fill_it():
    async def test():
        teachers, board = [FakeTeacher(), FakeTeacher()], FakeBoard(40)
        given = await bank(teachers, board, refresh="once")
        assert await given.status() == {}
        first = await given.poll(1, 40, 0, 41)
        assert (first.stage, first.entries, first.round_complete) == (1, [], False)

        async def complete():
            return (await given.poll(1, 40, 0, 41)).round_complete

        await until(complete)
        delta = await given.poll(1, 40, 0, 41)
        assert sorted((c, v) for c, _, v in delta.entries) == [(c, 40) for c in range(4)]
        assert sorted(c for t in teachers for _, c, *_ in t.calls) == [0, 1, 2, 3]
        assert {(start, stop) for t in teachers for _, _, start, stop, *_ in t.calls} == {
            (0, 2),
            (2, 4),
            (4, 6),
            (6, 8),
        }
        assert max(t.most for t in teachers) <= 2
        status = await given.status()
        assert (status["labels_made"], status["coverage"]) == (8, 1.0)
        await close(given)

    run(test)


def test_a_bank_whose_teachers_are_hired_later_starts_to_label_then():
    async def test():
        given, teacher = unhired(FakeBoard(40), refresh="once"), FakeTeacher()
        await given.poll(1, 40, 0, 40)
        assert (await given.status([]))["coverage"] == 0.0
        await asyncio.sleep(0.1)
        assert given.book.entries == {}
        await given.status([teacher])

        async def complete():
            return given.book.round_complete

        await until(complete)
        assert sorted(chunk for _, chunk, *_ in teacher.calls) == [0, 1, 2, 3]
        await close(given)

    run(test)


def test_a_teacher_that_is_named_at_every_look_is_hired_once():
    """The driver says at every look whom the bank may call, and whoever only asks says nothing about it."""

    async def test():
        board, first = FakeBoard(40), FakeTeacher()
        given = await bank([first], board, calls_in_flight=2)
        await given.poll(1, 40, 0, 40)
        for version in range(41, 61):
            for teachers in ([first], None):
                await given.status(teachers)
            board.publish(version)
            await asyncio.sleep(0.005)
        assert first.calls
        assert first.most == 2, "as many calls as are allowed, however often it is named"
        await close(given)

    run(test)


def test_teachers_join_and_leave_while_labels_are_made():
    async def test():
        board, stays, leaves, joins = FakeBoard(40), FakeTeacher(), FakeTeacher(), FakeTeacher()
        given = await bank([stays, leaves], board)
        await given.poll(1, 40, 0, 40)

        async def all_of(version):
            return given.book.round_complete and {e.version for e in given.book.entries.values()} == {version}

        await until(lambda: all_of(40))
        assert (await given.status([stays, joins]))["teachers"] == 2
        asked = len(leaves.calls)
        for version in (50, 60, 70):
            board.publish(version)
            await until(lambda version=version: all_of(version))
        assert joins.calls
        assert len(leaves.calls) == asked, "nobody calls one that has left"
        assert given.book.busy == set(), "no chunk waits for one that has left"
        await close(given)

    run(test)


def test_a_chunk_that_was_with_a_teacher_who_leaves_is_made_by_another():
    async def test():
        slow, other = FakeTeacher(), FakeTeacher()
        slow.label = Remote(lambda *_: (asyncio.sleep(60), None))
        given = await bank([slow], FakeBoard(40), refresh="once")
        await given.poll(1, 40, 0, 40)
        await asyncio.sleep(0.02)
        assert len(given.book.busy) == 2
        await given.status([other])

        async def complete():
            return given.book.round_complete

        await until(complete)
        await close(given)

    run(test)


def test_a_teacher_whose_node_is_lost_fails_its_calls_once_and_is_called_again_when_it_is_back(monkeypatch):
    monkeypatch.setattr(label_bank, "ASK_AGAIN_SECONDS", 0.01)

    async def test():
        teacher = FakeTeacher()
        board = FakeBoard(40)
        given = await bank([teacher], board)
        await given.poll(1, 40, 0, 40)

        async def all_of(version):
            return given.book.round_complete and {e.version for e in given.book.entries.values()} == {version}

        await until(lambda: all_of(40))
        teacher.gone, teacher.broken = True, lambda call: ray.exceptions.ActorUnavailableError("lost", None)
        board.publish(50)
        await asyncio.sleep(0.5)
        status = await given.status([teacher])
        assert status["teacher_failures"] == 2, "as many as were under way, however long it is away"
        assert (status["teachers"], status["fatal"]) == (0, None)
        assert given.book.busy == set(), "no chunk waits for it"
        teacher.gone, teacher.broken = False, lambda call: None
        await until(lambda: all_of(50))
        assert (await given.status())["teachers"] == 1
        await close(given)

    run(test)


def test_a_restarted_bank_that_is_told_again_labels_again():
    async def test():
        board, teacher = FakeBoard(40), FakeTeacher()
        before = await bank([teacher], board, refresh="once")
        await before.poll(1, 40, 0, 40)
        await close(before)
        again = unhired(board, refresh="once")
        first = await again.poll(1, 40, 7, 45)
        assert (first.stage, first.sequence, first.entries) == (1, 0, [])
        assert (await again.status([teacher]))["stage"] == 1

        async def complete():
            return (await again.poll(1, 40, 0, 46)).round_complete

        await until(complete)
        await close(again)

    run(test)


def test_the_shape_of_a_rule_is_all_that_the_bank_needs_of_it():
    whole = label_plan(refresh="once", selection=FakeSelection())
    shape = whole.for_bank()
    assert (shape.policy, shape.selection, shape.label_column) == (whole.policy, whole.selection, whole.label_column)
    assert (shape.rule.layout, shape.rule.num_classes) == (whole.rule.layout, whole.rule.num_classes)
    assert shape.rule.view_sizes == ()
    with pytest.raises(NotImplementedError, match="not the rule"):
        shape.rule.label(None, (), ())
    found = [fill(LabelBook(8, 2, plan)).thresholds().tolist() for plan in (whole, shape)]
    assert found[0] == found[1] == [100] * CLASSES


def test_weights_from_before_the_stage_label_nothing():
    async def test():
        teacher, board = FakeTeacher(), FakeBoard(39)
        given = await bank([teacher], board)
        await given.poll(1, 40, 0, 40)
        await asyncio.sleep(0.15)
        assert teacher.calls == []
        board.publish(40)

        async def labelled():
            return bool(teacher.calls)

        await until(labelled)
        await close(given)

    run(test)


def test_with_once_the_weights_of_the_stages_start_label_even_when_newer_ones_hang():
    async def test():
        teacher = FakeTeacher()
        given = await bank([teacher], FakeBoard(40, 90), refresh="once")
        await given.poll(1, 40, 0, 90)

        async def complete():
            return given.book.round_complete

        await until(complete)
        assert {version for *_, version, _ in teacher.calls} == {40}
        await close(given)

    run(test)


def test_a_round_whose_weights_are_gone_is_made_with_the_newest():
    async def test():
        teacher = FakeTeacher()
        given = await bank([teacher], FakeBoard(60, 70), refresh="once")
        await given.poll(1, 40, 0, 70)

        async def complete():
            return given.book.round_complete

        await until(complete)
        assert {entry.version for entry in given.book.entries.values()} == {70}
        await close(given)

    run(test)


def test_continuous_labels_are_made_again_with_newer_weights():
    async def test():
        teacher, board = FakeTeacher(), FakeBoard(40)
        given = await bank([teacher], board)
        await given.poll(1, 40, 0, 40)

        async def all_of(version):
            return given.book.round_complete and {e.version for e in given.book.entries.values()} == {version}

        await until(lambda: all_of(40))
        board.publish(50)
        await until(lambda: all_of(50))
        await close(given)

    run(test)


def test_a_dead_teacher_is_a_number_and_another_one_does_its_work():
    async def test():
        dead, alive = FakeTeacher(), FakeTeacher()
        dead.broken = lambda call: LostError()
        given = await bank([dead, alive], FakeBoard(40), refresh="once")
        await given.poll(1, 40, 0, 40)

        async def complete():
            return given.book.round_complete

        await until(complete)
        assert (await given.status())["teacher_failures"] >= 1
        assert given.book.busy <= {0, 1, 2, 3}
        await close(given)

    run(test)


async def failed(given, times):
    async def enough():
        return given.book.counters.failures >= times

    await until(enough)
    await close(given)
    return (await given.status())["fatal"]


@pytest.mark.usefixtures("quick")
def test_a_teacher_whose_code_fails_every_time_is_fatal_in_one_sentence():
    async def test():
        teacher = FakeTeacher()
        teacher.broken = lambda call: defect()
        given = await bank([teacher], FakeBoard(40), calls_in_flight=1)
        await given.poll(1, 40, 0, 40)
        assert (await given.status())["fatal"] is None
        assert await failed(given, ERRORS_TO_FAIL) == "a teacher cannot label: ValueError: no such class"

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_teacher_that_fails_and_then_works_is_not_fatal():
    async def test():
        teacher = FakeTeacher()
        teacher.broken = lambda call: defect() if call % ERRORS_TO_FAIL else None
        board = FakeBoard(40)
        given = await bank([teacher], board, calls_in_flight=1)
        await given.poll(1, 40, 0, 40)
        assert await failed(given, 3 * (ERRORS_TO_FAIL - 1)) is None
        assert given.book.entries

    run(test)


@pytest.mark.usefixtures("quick")
def test_dead_teachers_are_never_fatal():
    async def test():
        teacher = FakeTeacher()
        teacher.broken = lambda call: ray.exceptions.RayActorError()
        given = await bank([teacher], FakeBoard(40), calls_in_flight=1)
        await given.poll(1, 40, 0, 40)
        assert await failed(given, 3 * ERRORS_TO_FAIL) is None

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_teacher_that_has_just_begun_while_no_student_lives_is_not_fatal():
    """The weights on the board died with the student; it publishes them again when it is back."""

    async def test():
        teacher = FakeTeacher()
        gone = ray.exceptions.RayTaskError("label", "Traceback", VersionGoneError("weights of step 40 died"))
        teacher.broken = lambda call: gone.as_instanceof_cause()
        given = await bank([teacher], FakeBoard(40), calls_in_flight=1)
        await given.poll(1, 40, 0, 40)
        assert await failed(given, 21 * ERRORS_TO_FAIL) is None

    run(test)


def test_a_rewound_bank_drops_the_future_and_makes_it_again():
    async def test():
        teacher, board = FakeTeacher(), FakeBoard(40, 50)
        given = await bank([teacher], board)
        await given.poll(1, 40, 0, 55)

        async def all_of(version):
            return given.book.round_complete and {e.version for e in given.book.entries.values()} == {version}

        await until(lambda: all_of(50))
        board.board.rewind(45)
        await given.rewind(45)
        assert given.student_step == 45
        assert (await given.poll(1, 40, 0, 45)).entries == []
        await until(lambda: all_of(40))
        assert {step for *_, version, step in teacher.calls if version == 40} == {45}
        await close(given)

    run(test)


def test_a_student_from_before_the_stage_finds_its_own_stage_again():
    """It died before the checkpoint of the later stage could be saved."""

    async def test():
        teacher, board = FakeTeacher(), FakeBoard(20, 40)
        given = LabelBank({1: label_plan("once"), 2: label_plan("once")}, 8, {1: 2, 2: 2}, board)
        await given.status([teacher])

        async def complete():
            return given.book.round_complete

        await given.poll(2, 40, 0, 40)
        await until(complete)
        await given.rewind(30)
        delta = await given.poll(1, 20, 0, 30)
        assert (delta.stage, delta.entries) == (1, [])
        await until(complete)
        assert {entry.version for entry in given.book.entries.values()} == {20}
        await given.poll(2, 40, 0, 40)
        assert given.stage == 2
        await close(given)

    run(test)


def test_counts_go_on_from_stage_to_stage():
    async def test():
        given = LabelBank({1: label_plan("once"), 2: label_plan("once")}, 8, {1: 2, 2: 2}, FakeBoard(20, 40))
        await given.status([FakeTeacher()])

        async def complete():
            return given.book.round_complete

        for stage, version in ((1, 20), (2, 40)):
            await given.poll(stage, version, 0, version)
            await until(complete)
        assert (await given.status())["labels_made"] == 16
        await close(given)

    run(test)


def test_the_files_of_the_two_newest_rounds_stay(monkeypatch, tmp_path):
    written = iter([tmp_path / f"{name}.parquet" for name in ("one", "two", "two", "three")])

    class Writing:
        async def remote(self, *_):
            path = next(written)
            path.write_text("labels")
            return str(path)

    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Writing())

    async def test():
        given = LabelBank({1: label_plan("once")}, 8, {1: 2}, FakeBoard(), folder=str(tmp_path))
        for _ in range(4):
            given.round_file = None
            await given._keep_round(LabelBook(8, 2, label_plan("once")))
        assert given.round_file.endswith("three.parquet")
        assert {path.stem for path in tmp_path.iterdir()} == {"two", "three"}

    run(test)


def test_what_the_board_said_before_a_rewind_labels_nothing():
    async def test():
        teacher, board = FakeTeacher(), FakeBoard(40, 50)
        given = await bank([teacher], board)
        board.newest_version = Remote(lambda: soon(board.board.newest_version(), after=0.03))  # known now, heard later
        await given.poll(1, 40, 0, 55)
        await asyncio.sleep(0.01)
        board.board.rewind(45)
        await given.rewind(45)

        async def complete():
            return given.book.round_complete

        await until(complete)
        assert {entry.version for entry in given.book.entries.values()} == {40}
        await close(given)

    run(test)


def test_a_bank_that_has_not_begun_can_be_rewound():
    asyncio.run(unhired(FakeBoard()).rewind(10))


def test_a_round_that_cannot_be_reopened_is_made_anew(monkeypatch):
    class Reading:
        options = remote = lambda self, *_, **__: self

        def __iter__(self):
            yield soon(error=ray.exceptions.RayTaskError("read_round", "no such file", OSError()))
            yield from ("block 0", "block 1", "block 2", "block 3")

    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Reading())

    async def test():
        given = await bank([FakeTeacher()], FakeBoard(40), refresh="once")
        with pytest.raises(ray.exceptions.RayTaskError):
            await given.reopen(1, 40, "labels/gone.parquet")
        await given.poll(1, 40, 0, 45)

        async def complete():
            return given.book.round_complete

        await until(complete, seconds=1.0)
        assert given.round_file is None
        await close(given)

    run(test)


def test_a_board_that_does_not_answer_is_asked_again():
    async def test():
        teacher, board = FakeTeacher(), FakeBoard(40)
        board.newest_version = Remote(lambda: soon(error=ray.exceptions.RayError()))
        given = await bank([teacher], board)
        await given.poll(1, 40, 0, 40)
        await asyncio.sleep(0.1)
        assert teacher.calls == []
        board.newest_version = Remote(lambda: soon(40))

        async def labelled():
            return bool(given.book.entries)

        await until(labelled)
        await close(given)

    run(test)


def test_teachers_without_work_share_one_answer_of_the_board():
    async def test():
        board, asked = FakeBoard(40), []

        def newest():
            asked.append(board.board.newest_version())
            return soon(asked[-1], after=0.001)

        board.newest_version = Remote(newest)
        given = await bank([FakeTeacher() for _ in range(16)], board)
        await given.poll(1, 40, 0, 40)

        async def complete():
            return given.book.round_complete

        await until(complete)
        began, before = time.monotonic(), len(asked)
        await asyncio.sleep(0.3)
        most = (time.monotonic() - began) / VERSION_SECONDS + 1
        assert 1 <= len(asked) - before <= most, "and 32 times as many when each of them asks"
        board.publish(50)

        async def labelled_again():
            return all(entry.version == 50 for entry in given.book.entries.values())

        await until(labelled_again)
        await close(given)

    run(test)


def test_a_teacher_that_leaves_does_not_take_the_answer_of_the_board_along():
    async def test():
        board = FakeBoard(40)
        board.newest_version = Remote(lambda: soon(40, after=0.05))
        leaves, stays = FakeTeacher(), FakeTeacher()
        given = await bank([leaves, stays], board)
        await given.poll(1, 40, 0, 40)
        await asyncio.sleep(0.01)
        await given.status([stays])

        async def complete():
            return given.book.round_complete

        await until(complete, seconds=1.0)
        assert leaves.calls == []
        await close(given)

    run(test)


def test_a_lost_block_is_made_again_by_the_teachers():
    async def test():
        given = await bank([FakeTeacher()], FakeBoard(40), refresh="once")
        await given.poll(1, 40, 0, 40)

        async def complete():
            return given.book.round_complete

        await until(complete)
        before = given.book.sequence
        await given.lost(2, 40)
        assert not given.book.round_complete
        await until(complete)
        assert [c for c, _, _ in given.book.delta(before)] == [2]
        await close(given)

    run(test)


def test_a_later_stage_starts_with_an_empty_book_and_an_earlier_one_does_not_come_back():
    async def test():
        given = LabelBank({1: label_plan(), 2: label_plan()}, 8, {1: 2, 2: 4}, FakeBoard(40))
        await given.status([FakeTeacher()])
        await given.poll(1, 40, 0, 40)
        await given.poll(2, 80, 0, 80)
        assert len(given.book.ranges) == 2
        await given.poll(1, 40, 0, 81)
        assert given.stage == 2
        await close(given)

    run(test)


class Reading:
    """A task that reads the four blocks of a round; the headers first."""

    times = 0

    def __init__(self):
        self.options = self.remote = lambda *_, **__: self

    def __iter__(self):
        Reading.times += 1
        yield soon([header(chunk, 0) for chunk in range(4)])
        yield from (f"block {chunk} of reading {Reading.times}" for chunk in range(4))


def test_given_labels_complete_a_round_that_no_teacher_makes(monkeypatch):
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Reading())
    monkeypatch.setattr(Reading, "times", 0)

    async def test():
        given = LabelBank({1: label_plan("once")}, 8, {1: 2}, FakeBoard(40), given={1: "labels/given.parquet"})
        delta = await given.poll(1, 40, 0, 40)
        assert delta.round_complete
        assert [(chunk, version) for chunk, _, version in delta.entries] == [(0, 0), (1, 0), (2, 0), (3, 0)]
        assert (await given.index())["round_file"] == "labels/given.parquet"
        await given.rewind(40)  # labels from before the run are no one's future
        assert given.book.round_complete

    run(test)


def test_a_given_block_that_was_lost_is_read_again_and_readers_hear_of_it(monkeypatch):
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Reading())
    monkeypatch.setattr(Reading, "times", 0)

    async def test():
        given = LabelBank({1: label_plan("once")}, 8, {1: 2}, FakeBoard(40), given={1: "labels/given.parquet"})
        seen = (await given.poll(1, 40, 0, 40)).sequence
        await given.lost(2, 0)
        assert (await given.poll(1, 40, seen, 40)).entries == [(2, ["block 2 of reading 2"], 0)]
        assert given.round_file == "labels/given.parquet"

    run(test)


# Class frequencies.

PRIOR = PriorPlan((0.5, 0.3, 0.2))
KNOWN = replace(PRIOR, target=(0.2, 0.3, 0.5))
OF_ALL = estimated(PRIOR, Evidence.joined([seen(chunk) for chunk in range(4)]))
RECALLED = [0.1, 0.2, 0.7]


def adjusting(prior=PRIOR, **plan):
    return replace(label_plan(**plan), prior=prior)


def witnessed(chunk, version, **more):
    return replace(header(chunk, version, **more), evidence=seen(chunk))


def survey(given, version=3):
    """Survey every chunk of a book."""
    while given.prior.surveying:
        chunk = given.next_chunk(version)
        given.accept(witnessed(chunk, version), f"unadjusted {chunk}")
    return given


def labelled(given, version=3):
    while (chunk := given.next_chunk(version)) is not None:
        given.accept(header(chunk, version), f"adjusted {chunk}")
    return given


def test_blocks_of_a_survey_are_no_ones():
    given = LabelBook(8, 2, adjusting(refresh="once", selection=FakeSelection()))
    for chunk in range(3):
        assert given.next_chunk(3) == chunk
        assert given.accept(witnessed(chunk, 3), "unadjusted")
        assert (given.entries, given.sequence, given.delta(0)) == ({}, 0, [])
        assert given.thresholds() is None
        assert not given.round_complete
        assert not given.histogram.any()
        assert given.counters.images == 0
        assert "prior" not in given.index()
        assert not given.adjustment.offset.any()
        assert given.adjustment.witness


def test_after_its_survey_a_round_is_labelled_anew_with_one_offset():
    given = survey(LabelBook(8, 2, adjusting(refresh="once", selection=FakeSelection())))
    assert given.entries == {}
    np.testing.assert_array_equal(given.target_prior, OF_ALL)
    for chunk in range(4):
        assert given.next_chunk(3) == chunk
        assert given.thresholds() is None
        np.testing.assert_array_equal(given.adjustment.offset, PRIOR.offset(OF_ALL))
        assert not given.adjustment.witness
        given.accept(header(chunk, 3), f"adjusted {chunk}")
    assert given.round_complete
    assert given.thresholds().tolist() == [100] * CLASSES
    assert [block for _, [block], _ in given.delta(0)] == [f"adjusted {chunk}" for chunk in range(4)]
    assert given.index()["prior"] == OF_ALL.tolist()
    assert given.counters.images == 8, "those of the round"
    assert given.next_chunk(1000) is None


def test_a_chunk_is_surveyed_once_and_again_where_its_call_failed():
    given = LabelBook(8, 2, adjusting(refresh="once"))
    assert [given.next_chunk(3) for _ in range(5)] == [0, 1, 2, 3, None]
    given.accept(witnessed(0, 3), "x")
    assert given.next_chunk(3) is None
    given.fail(2)
    assert given.next_chunk(3) == 2
    for chunk in (1, 3, 2):
        given.accept(witnessed(chunk, 3), "x")
    np.testing.assert_array_equal(given.target_prior, OF_ALL)


def test_a_survey_that_was_under_way_when_the_student_went_back_is_made_again():
    given = LabelBook(8, 2, adjusting(refresh="once"))
    for _ in range(4):
        given.next_chunk(40)
    given.rewind(20)
    for chunk in range(4):
        assert not given.accept(witnessed(chunk, 40), "made by weights that will never have been")
    assert given.prior.surveying
    survey(given, version=20)
    np.testing.assert_array_equal(given.target_prior, OF_ALL)


def test_a_survey_tells_what_it_could_not_read():
    given = LabelBook(2, 2, adjusting(refresh="once"))
    given.next_chunk(3)
    given.accept(header(0, 3, skipped=["a.png", "b.png"]), "x")
    assert given.counters.skipped == ["a.png", "b.png"]
    assert not given.prior.surveying, "a chunk of which nothing can be read is surveyed"
    np.testing.assert_allclose(given.target_prior, PRIOR.source)


def test_blocks_that_are_lost_or_of_the_future_are_made_again_with_the_same_offset():
    given = labelled(survey(LabelBook(8, 2, adjusting(refresh="once"))))
    before = given.adjustment
    given.lose(1, 3)
    given.rewind(2)
    assert given.entries == {}
    assert given.next_chunk(2) == 0
    np.testing.assert_array_equal(given.adjustment.offset, before.offset)
    assert not given.adjustment.witness


def test_continuous_labels_are_live_at_once_and_their_offset_follows_them():
    given = LabelBook(8, 2, adjusting())
    assert given.accept(witnessed(0, 3), "unadjusted")
    assert given.delta(0) == [(0, ["unadjusted"], 3)]
    assert given.index()["prior"] == list(PRIOR.source)
    assert not given.adjustment.offset.any()
    expected = PriorEstimate(PRIOR, [2] * 4, frozen=False)
    expected.put(0, seen(0))
    for chunk in (1, 2, 3, 1):
        given.accept(witnessed(chunk, 3 + chunk), "x")
        expected.put(chunk, seen(chunk))
        np.testing.assert_array_equal(given.target_prior, expected.target)
        np.testing.assert_array_equal(given.adjustment.offset, expected.adjustment.offset)
        assert given.adjustment.witness
        assert given.index()["prior"] == given.target_prior.tolist()
    assert np.abs(given.target_prior - PRIOR.source).max() > 0.02


def test_labels_that_are_refused_argue_for_nothing():
    given = fill(LabelBook(8, 2, adjusting()))
    before = given.target_prior
    assert not given.accept(witnessed(0, 3, pixels=(12, 0, 0)), "collapsed")
    assert not given.accept(witnessed(1, -1), "older")
    np.testing.assert_array_equal(given.target_prior, before)


@pytest.mark.parametrize("refresh", ["once", "continuous"])
def test_known_class_frequencies_need_no_survey(refresh):
    given = LabelBook(8, 2, adjusting(KNOWN, refresh=refresh))
    assert given.prior is None
    assert given.target_prior.tolist() == [0.2, 0.3, 0.5]
    np.testing.assert_allclose(given.adjustment.offset, np.log([0.4, 1.0, 2.5]), rtol=1e-6)
    assert not given.adjustment.witness
    given.accept(witnessed(0, 3), "adjusted")
    assert given.entries[0].block == "adjusted"
    assert given.index()["prior"] == [0.2, 0.3, 0.5]


def test_the_banks_part_of_a_plan_keeps_the_class_frequencies():
    assert adjusting().for_bank().prior == PRIOR


async def bank_of(plan, teachers, board, **more):
    made = LabelBank({1: plan}, 8, {1: 2}, board, **more)
    assert await made.status(teachers) == {}
    return made


async def whole_round(given):
    async def complete():
        return given.book.round_complete

    await until(complete)


def offsets(told):
    return [adjustment.offset.tolist() for adjustment in told]


def test_teachers_survey_and_then_label_with_what_was_found():
    async def test():
        teachers = [FakeTeacher(), FakeTeacher()]
        given = await bank_of(adjusting(refresh="once", selection=FakeSelection()), teachers, FakeBoard(40))
        await given.poll(1, 40, 0, 40)
        looks = []

        async def complete():
            delta = await given.poll(1, 40, 0, 40)
            looks.append(given.book.prior.surveying)
            if looks[-1]:
                assert (delta.entries, delta.thresholds, delta.round_complete) == ([], None, False)
                status = await given.status()
                assert (status["coverage"], status["prior_shift"]) == (0.0, 0.0)
                assert status["target_prior"] == list(PRIOR.source)
                assert status["prior_offset"] == [0.0] * CLASSES
                assert "prior" not in await given.index()
            return delta.round_complete

        await until(complete)
        assert looks[0]
        for number in range(2):
            calls = [(call[1], told) for t in teachers for call, told in zip(t.calls, t.told, strict=True)]
            mine = sorted(chunk for chunk, told in calls if told.witness is (number == 0))
            assert mine == [0, 1, 2, 3], "every chunk once in the survey and once in the round"
        told = [adjustment for t in teachers for adjustment in t.told]
        assert {tuple(offset) for offset in offsets(t for t in told if t.witness)} == {(0.0,) * CLASSES}
        assert {tuple(offset) for offset in offsets(t for t in told if not t.witness)} == {
            tuple(PRIOR.offset(OF_ALL).tolist())
        }
        assert given.book.thresholds() is not None
        status = await given.status()
        assert status["labels_made"] == 8
        assert status["target_prior"] == OF_ALL.tolist()
        np.testing.assert_allclose(status["prior_offset"], np.log(OF_ALL / np.array(PRIOR.source)), rtol=1e-5)
        assert status["prior_shift"] == pytest.approx(np.maximum(OF_ALL - PRIOR.source, 0).sum())
        await close(given)

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_call_of_a_survey_that_dies_with_its_teacher_is_made_again():
    async def test():
        teacher = FakeTeacher()
        teacher.broken = lambda call: LostError() if call in (2, 3) else None
        given = await bank_of(adjusting(refresh="once"), [teacher], FakeBoard(40), calls_in_flight=1)
        await given.poll(1, 40, 0, 40)
        await whole_round(given)
        assert given.book.counters.failures == 2
        np.testing.assert_array_equal(given.book.target_prior, OF_ALL)
        assert sum(told.witness for told in teacher.told) == 6
        assert (await given.status())["fatal"] is None
        await close(given)

    run(test)


def test_a_block_that_is_lost_after_the_survey_is_made_again_with_the_same_offset():
    async def test():
        teacher = FakeTeacher()
        given = await bank_of(adjusting(refresh="once"), [teacher], FakeBoard(40))
        await given.poll(1, 40, 0, 40)
        await whole_round(given)
        calls = len(teacher.calls)
        await given.lost(2, 40)
        await whole_round(given)
        assert [call[1] for call in teacher.calls[calls:]] == [2]
        assert offsets(teacher.told[calls:]) == [PRIOR.offset(OF_ALL).tolist()]
        await close(given)

    run(test)


@pytest.mark.parametrize("recalled", [True, False])
def test_a_round_that_is_reopened_is_not_surveyed(monkeypatch, recalled):
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Reading())

    async def test():
        teacher = FakeTeacher()
        given = await bank_of(adjusting(refresh="once"), [teacher], FakeBoard(40))
        if recalled:
            await given.recall(1, RECALLED)
        await given.reopen(1, 40, "labels/round.parquet")
        assert (await given.poll(1, 40, 0, 45)).round_complete
        await asyncio.sleep(0.05)
        assert teacher.calls == []
        known = RECALLED if recalled else list(PRIOR.source)
        assert (await given.status())["target_prior"] == known
        assert (await given.index())["prior"] == known
        await given.lost(2, 0)
        await whole_round(given)
        assert offsets(teacher.told) == [PRIOR.offset(np.array(known)).tolist()]
        assert not teacher.told[0].witness
        await close(given)

    run(test)


def test_a_round_that_a_resume_finds_unfinished_is_labelled_with_what_was_found_before():
    async def test():
        teacher = FakeTeacher()
        given = await bank_of(adjusting(refresh="once"), [teacher], FakeBoard(40))
        await given.recall(1, RECALLED)
        await given.poll(1, 40, 0, 45)
        await whole_round(given)
        assert offsets(teacher.told) == [PRIOR.offset(np.array(RECALLED)).tolist()] * 4
        await close(given)

    run(test)


def test_continuous_labels_go_on_from_what_was_estimated_before_a_resume():
    async def test():
        teacher = FakeTeacher()
        given = await bank_of(adjusting(), [teacher], FakeBoard(40), calls_in_flight=1)
        await given.recall(1, RECALLED)
        await given.poll(1, 40, 0, 45)
        await whole_round(given)
        expected = LabelBook(8, 2, adjusting())
        expected.prior.settle(np.array(RECALLED))
        for chunk, found in enumerate(offsets(teacher.told)):
            assert found == expected.adjustment.offset.tolist()
            expected.accept(witnessed(chunk, 40), "x")
        assert all(told.witness for told in teacher.told)
        assert teacher.told[0].offset.tolist() == PRIOR.offset(np.array(RECALLED)).tolist()
        assert teacher.told[3].offset.tolist() != teacher.told[0].offset.tolist()
        await close(given)

    run(test)


def test_what_is_recalled_is_its_stages_alone():
    async def test():
        plan = adjusting(refresh="once")
        given = LabelBank({1: plan, 2: plan}, 8, {1: 2, 2: 2}, FakeBoard(40, 80))
        await given.recall(1, RECALLED)
        await given.poll(2, 80, 0, 80)
        assert given.book.prior.surveying
        assert given.book.target_prior.tolist() == list(PRIOR.source)

    run(test)


def test_without_class_frequencies_teachers_are_told_nothing_and_nobody_speaks_of_them():
    async def test():
        teacher = FakeTeacher()
        given = await bank([teacher], FakeBoard(40), refresh="once")
        await given.poll(1, 40, 0, 40)
        await whole_round(given)
        assert teacher.told == [None] * 4
        assert given.book.adjustment is given.book.target_prior is None
        assert not [key for key in await given.status() if "prior" in key]
        assert "prior" not in await given.index()
        await close(given)

    run(test)


def test_known_class_frequencies_are_what_every_teacher_is_told():
    async def test():
        teacher = FakeTeacher()
        given = await bank_of(adjusting(replace(KNOWN, temperature=2.0)), [teacher], FakeBoard(40))
        await given.poll(1, 40, 0, 40)
        await whole_round(given)
        assert {(told.witness, *told.offset.tolist()) for told in teacher.told} == {
            (False, *(2 * np.log([0.4, 1.0, 2.5])).astype(np.float32).tolist())
        }
        status = await given.status()
        assert (status["target_prior"], status["prior_shift"]) == ([0.2, 0.3, 0.5], pytest.approx(0.3))
        await close(given)

    run(test)
