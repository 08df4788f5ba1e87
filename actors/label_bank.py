"""The bank of pseudo labels: who labels what next, which block is live, and the statistics of the whole set.

The bank is the one that *calls* the teachers: a block returned by a method belongs to its caller, so labels outlive the
teacher process that made them. It awaits only the small header of a call; the pixels never enter this process. All
decisions are :class:`LabelBook`'s, an ordinary object; :class:`LabelBank` is its shell.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from actors.label_rounds import Header, read_round, write_round
from actors.prior_estimate import Adjustment, PriorEstimate
from actors.protocols import LabelPlan
from actors.staleness import StalenessPolicy, age_statistics
from actors.storage import place
from actors.weight_board import VersionGoneError

COLLAPSE_SHARE = 0.5
"""Labels of a chunk look collapsed when they offer less than this share of the pixels, or of the effective number of
classes, that labels of the same images had at their best: a slow slide is a collapse, too."""
REFUSALS_TO_BLOCK = 3
"""Chunks whose labels look collapsed before the weights are held to have collapsed. One odd chunk is not a collapse."""
ERRORS_TO_FAIL = 5
"""Calls in a row that may fail with an error of the teacher's code (not its death) before the run ends."""
ASK_AGAIN_SECONDS = 1.0
"""How often a dead teacher is asked whether it is back."""
VERSION_SECONDS = 0.05
"""How long one answer of the board serves all teachers, and how often one without work asks for some."""

ROUNDS_KEPT = 2
"""Finished rounds whose files stay."""


@dataclass
class Entry:
    """The live block of a chunk."""

    block: Any
    version: int
    sequence: int
    class_pixels: np.ndarray
    histogram: np.ndarray
    best: tuple[float, float]
    """The most pixels and the most effective classes that labels of this chunk have offered."""


@dataclass
class Delta:
    """What changed in the bank since a reader last asked."""

    stage: int
    sequence: int
    entries: list[tuple[int, list[Any], int]]
    """Chunk, the block's reference inside a list (a bare one would be resolved in transit), version."""
    thresholds: np.ndarray | None
    round_complete: bool


@dataclass
class Counters:
    """What happened so far. ``images`` counts accepted labels only."""

    images: int = 0
    blocks: int = 0
    failures: int = 0
    lost_blocks: int = 0
    collapsed_blocks: int = 0
    collapses_believed: int = 0
    teacher_seconds: float = 0.0
    gpu_bytes: int = 0
    """The most GPU memory that a teacher's process has said it holds."""
    skipped: list[str] = field(default_factory=list)


@dataclass
class Attendance:
    """Seconds for which teachers were there to be called, summed over them."""

    since: float = 0.0
    seconds: float = 0.0

    def until(self, now: float, present: int) -> float:
        """Count the time since the last call, in which so many were there; the sum so far."""
        self.seconds += present * (now - self.since)
        self.since = now
        return self.seconds


def effective_classes(class_pixels: np.ndarray) -> float:
    """Exp of the entropy of the class shares: 1 when all pixels are of one class, C when all are as frequent."""
    share = class_pixels / max(1, class_pixels.sum())
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0


class LabelBook:
    """Which chunk is labelled next and which label is live.

    Invariant: at most one live block a chunk, and ``histogram`` is the sum of the live blocks' histograms.
    """

    def __init__(self, images: int, rows: int, plan: LabelPlan, counters: Counters | None = None) -> None:
        if images < 1 or rows < 1:
            raise ValueError(f"a label book needs images and rows, got {images} images and {rows} rows a block")
        self.ranges = [(start, min(start + rows, images)) for start in range(0, images, rows)]
        self.rows = rows
        self.plan = plan
        self.entries: dict[int, Entry] = {}
        self.busy: set[int] = set()
        self.blocked: set[int] = set()
        self.sequence = 0
        self.counters = counters or Counters()
        self.histogram = np.zeros((plan.rule.num_classes, 256), np.int64)
        self.prior: PriorEstimate | None = None
        """The target prior, where it is estimated."""
        if plan.prior is not None and plan.prior.target is None:
            lengths = [stop - start for start, stop in self.ranges]
            self.prior = PriorEstimate(plan.prior, lengths, frozen=plan.policy.refresh == "once")
        self._thresholds: np.ndarray | None = None
        self._refused: dict[int, set[int]] = {}
        self._believed: set[int] = set()
        self._not_after: dict[int, int] = {}

    @property
    def policy(self) -> StalenessPolicy:
        """The stage's staleness policy."""
        return self.plan.policy

    @property
    def target_prior(self) -> np.ndarray | None:
        """The target prior that labels are adjusted to, float64 C; None where they are not."""
        if self.prior is not None:
            return self.prior.target
        plan = self.plan.prior
        return None if plan is None or plan.target is None else np.array(plan.target)

    @property
    def adjustment(self) -> Adjustment | None:
        """What teachers are told of the classes' frequencies."""
        if self.prior is not None:
            return self.prior.adjustment
        plan = self.plan.prior
        return None if plan is None or plan.target is None else Adjustment(plan.offset(np.array(plan.target)))

    @property
    def round_complete(self) -> bool:
        """Every chunk has a live block."""
        return len(self.entries) == len(self.ranges)

    def next_chunk(self, newest: int | None) -> int | None:
        """Reserve the stalest chunk that the policy admits; None when there is nothing to do."""
        candidates = [
            chunk
            for chunk in range(len(self.ranges))
            if chunk not in self.busy
            and newest not in self._refused.get(chunk, ())
            and self.policy.admit(newest, self._held(chunk), self.blocked)
        ]
        if not candidates:
            return None
        chunk = min(candidates, key=lambda c: (self._order(c), c))
        self.busy.add(chunk)
        return chunk

    def accept(self, header: Header, block: Any) -> bool:
        """Make a block the live one of its chunk; False when it is refused because its labels collapsed.

        Before a frozen prior is estimated, blocks are no one's: only what they tell of the classes' frequencies counts.
        """
        self.busy.discard(header.chunk)
        self.counters.teacher_seconds += header.seconds
        self.counters.gpu_bytes = max(self.counters.gpu_bytes, header.gpu_bytes)
        self.counters.skipped += [path for path in header.skipped if path not in self.counters.skipped]
        old = self.entries.get(header.chunk)
        if header.version > self._not_after.pop(header.chunk, header.version):
            return False
        if self.prior is not None and self.prior.surveying:
            self.prior.put(header.chunk, header.evidence)
            return True
        if old is not None and (header.version < old.version or self._refuse(old, header)):
            return False
        best = float(header.class_pixels.sum()), effective_classes(header.class_pixels)
        self._refused.pop(header.chunk, None)
        if old is not None and self._collapsed(old, header):  # refused so often that it is believed
            self._believed.add(header.chunk)
        elif old is not None:
            best = max(best[0], old.best[0]), max(best[1], old.best[1])
        if old is not None:
            self.histogram -= old.histogram
        self.sequence += 1
        self.entries[header.chunk] = Entry(
            block, header.version, self.sequence, header.class_pixels, header.histogram, best
        )
        if len(self._believed) >= min(REFUSALS_TO_BLOCK, len(self.ranges)):
            self._begin_anew()
        self.histogram += header.histogram
        if self.prior is not None:
            self.prior.put(header.chunk, header.evidence)
        self.counters.images += header.images
        self.counters.blocks += 1
        self._thresholds = None
        return True

    def _begin_anew(self) -> None:
        """Several chunks insist on what looked like a collapse: from now on it is what labels are."""
        self.counters.collapses_believed += 1
        self._believed.clear()
        self._refused.clear()
        self.blocked.clear()
        for entry in self.entries.values():
            entry.best = 0.0, 0.0

    def fail(self, chunk: int) -> None:
        """A call did not come back: the chunk is free again and keeps its older label."""
        self.busy.discard(chunk)
        self.counters.failures += 1

    def lose(self, chunk: int, version: int) -> None:
        """A reader found a block gone, with the node that held it: forget it, so that it is made again first."""
        entry = self.entries.get(chunk)
        if entry is not None and entry.version == version:
            self.histogram -= entry.histogram
            del self.entries[chunk]
            self.counters.lost_blocks += 1
            self._thresholds = None

    def rewind(self, step: int) -> None:
        """The student came back at an earlier step: labels of weights that it has not made yet are no one's."""
        for chunk, version in [(c, e.version) for c, e in self.entries.items() if e.version > step]:
            self.lose(chunk, version)
        self._not_after = dict.fromkeys(self.busy, step)
        self.blocked = {version for version in self.blocked if version <= step}
        self._refused.clear()

    def thresholds(self) -> np.ndarray | None:
        """Per-class confidence thresholds from all live records, or None where the rule needs none."""
        if self.plan.selection is None:
            return None
        if self.policy.refresh == "once" and not self.round_complete:
            return None
        if self._thresholds is None:
            self._thresholds = self.plan.selection.thresholds(self.histogram)
        return self._thresholds

    def accepted_pixels(self) -> np.ndarray:
        """Pixels of every class that students learn from, int64 C, over the live records and at today's thresholds."""
        if self.plan.selection is None:
            return sum((e.class_pixels for e in self.entries.values()), np.zeros(len(self.histogram), np.int64))
        thresholds = self.thresholds()
        if thresholds is None:
            return np.zeros(len(self.histogram), np.int64)
        return (self.histogram * (np.arange(256) >= thresholds[:, None])).sum(1)

    def class_shares(self) -> np.ndarray:
        """Share of every class among the accepted pixels; zeros when there are none."""
        accepted = self.accepted_pixels()
        return accepted / max(1, accepted.sum())

    def acceptance(self) -> list[float | None]:
        """Accepted share of the pixels that the teachers take for each class; None for a class they see nowhere."""
        seen = self.histogram.sum(1)
        return [float(a) / float(n) if n else None for a, n in zip(self.accepted_pixels(), seen, strict=True)]

    def versions(self) -> dict[str, int]:
        """Versions of the weights that made the oldest and the newest live label; nothing without labels."""
        found = [entry.version for entry in self.entries.values()]
        return {"weights_version_oldest": min(found), "weights_version_newest": max(found)} if found else {}

    def ages(self, step: int) -> Counter[int]:
        """Images by the age of their live label, in steps."""
        found: Counter[int] = Counter()
        for chunk, entry in self.entries.items():
            start, stop = self.ranges[chunk]
            found[max(0, step - entry.version)] += stop - start
        return found

    def backlog(self, step: int, age: int | None) -> int:
        """Images without a label, or with one that is older than so many steps; without an age, the former alone."""
        images = sum(stop - start for start, stop in self.ranges)
        ages = self.ages(step)
        return images - sum(count for old, count in ages.items() if age is None or old <= age)

    def delta(self, since: int) -> list[tuple[int, list[Any], int]]:
        """Live blocks that are newer than a sequence number."""
        return [
            (chunk, [entry.block], entry.version) for chunk, entry in self.entries.items() if entry.sequence > since
        ]

    def index(self) -> dict[str, Any]:
        """Versions, counters and thresholds: what a checkpoint keeps. Never pixels."""
        thresholds = self.thresholds()
        return {
            "versions": {str(chunk): entry.version for chunk, entry in self.entries.items()},
            "images": self.counters.images,
            "failures": self.counters.failures,
            "thresholds": None if thresholds is None else [int(t) for t in thresholds],
            **self._known_prior(),
        }

    def _known_prior(self) -> dict[str, list[float]]:
        """The target prior as a checkpoint keeps it, and what the network that labels sees itself, where that counts.

        Nothing before a frozen one is made.
        """
        if self.target_prior is None or (self.prior is not None and self.prior.surveying):
            return {}
        known = {"prior": self.target_prior.tolist()}
        if self.prior is not None and self.prior.predicted is not None:
            known["seen"] = self.prior.predicted.tolist()
        return known

    def _held(self, chunk: int) -> int | None:
        if self.prior is not None and self.prior.surveying:
            return 0 if chunk in self.prior.evidence else None
        entry = self.entries.get(chunk)
        return None if entry is None else entry.version

    def _order(self, chunk: int) -> tuple[int, int]:
        entry = self.entries.get(chunk)
        return (-1, -1) if entry is None else (entry.version, entry.sequence)

    def _refuse(self, old: Entry, new: Header) -> bool:
        """Refuse a block whose labels look collapsed; after as many refusals of different weights it is believed."""
        if new.version in self.blocked:
            return True
        refused = self._refused.setdefault(new.chunk, set())
        if not self._collapsed(old, new) or len(refused) >= REFUSALS_TO_BLOCK:
            return False
        refused.add(new.version)
        self.counters.collapsed_blocks += 1
        if sum(new.version in versions for versions in self._refused.values()) >= min(
            REFUSALS_TO_BLOCK, len(self.ranges)
        ):
            self.blocked.add(new.version)
        return True

    def _collapsed(self, old: Entry, new: Header) -> bool:
        pixels, classes = old.best
        fewer = new.class_pixels.sum() < COLLAPSE_SHARE * pixels
        return bool(fewer or effective_classes(new.class_pixels) < COLLAPSE_SHARE * classes)


class LabelBank:
    """Shell of :class:`LabelBook`: calls the teachers and answers the students. One instance a run."""

    def __init__(
        self,
        plans: dict[int, LabelPlan],
        images: int,
        rows: Mapping[int, int],
        board: Any,
        calls_in_flight: int = 2,
        folder: str | None = None,
        given: Mapping[int, str] | None = None,
        label_age: int | None = None,
    ) -> None:
        """Set up an empty bank.

        Args:
            plans: label plan by stage.
            images: target images.
            rows: images in a block, by stage.
            board: where the newest weights hang.
            calls_in_flight: to each teacher.
            folder: where finished rounds are written.
            given: files of rounds by stage, for stages whose labels nobody makes.
            label_age: steps that a label may be old before it counts as backlog; None counts missing labels alone.
        """
        self.folder, self.given, self.label_age = folder, dict(given or {}), label_age
        self.plans, self.images = plans, images
        self.teachers: list[Any] = []
        self.away: set[Any] = set()
        """Teachers that died and are not back yet."""
        self.attendance = Attendance()
        self.board = board
        self.rows = rows
        self.calls_in_flight = calls_in_flight
        self.stage = -1
        self.stage_version = 0
        self.book: LabelBook | None = None
        self.counters = Counters()
        self.student_step = 0
        self.feeders: dict[Any, list[asyncio.Task[None]]] = {}
        """Of every teacher, while a stage has labels."""
        self.feeding_since = time.monotonic()
        self.round_file: str | None = None
        self.rounds: list[str] = []
        """Files of the newest rounds that were made in this process."""
        self.fatal: str | None = None
        self.rewinds = 0
        self._answer: asyncio.Future[int | None] | None = None
        """The board's newest, for all teachers; forgotten where an older one would be wrong."""
        self._asked_at = 0.0
        self.recalled: dict[int, tuple[list[float], list[float] | None]] = {}
        """Target priors by stage, from before a resume, and what the network that labelled saw by itself."""

    async def poll(self, stage: int, stage_version: int, since: int, step: int) -> Delta:
        """Answer a student, and begin its stage when this is the first word of it.

        Because every poll names the stage, a bank that was restarted finds its way back by itself.

        Args:
            stage: index of the stage that the student is in.
            stage_version: the weights version with which the stage began.
            since: sequence number of the reader's last delta.
            step: the student's step.
        """
        if stage > self.stage:
            self._open(stage, stage_version)
            if stage in self.given:
                await self._refill(self.given[stage])
            self._start_feeding()
        assert self.book is not None
        self.student_step = max(self.student_step, step)
        return Delta(
            self.stage,
            self.book.sequence,
            self.book.delta(since),
            self.book.thresholds(),
            self.book.round_complete,
        )

    async def lost(self, chunk: int, version: int) -> None:
        """A student could not read a block that this bank believes live."""
        if self.book is not None:
            self.book.lose(chunk, version)
            if self.stage in self.given:
                await self._refill(self.given[self.stage])
            self._forget_broken_round()

    async def rewind(self, step: int) -> None:
        """See :meth:`LabelBook.rewind`. A student from before the stage began begins that stage, or another, itself."""
        self.student_step = step
        self.rewinds += 1
        self._answer = None
        if self.book is not None and step < self.stage_version:
            self._close()
        if self.book is not None:
            self.book.rewind(step)
            self._forget_broken_round()

    async def index(self) -> dict[str, Any]:
        """What a checkpoint keeps of the bank."""
        if self.book is None:
            return {}
        return {"stage": self.stage, "round_file": self.round_file, **self.book.index()}

    async def status(self, teachers: Sequence[Any] | None = None) -> dict[str, Any]:
        """Numbers for the progress line and the report.

        Args:
            teachers: whom the bank may call from now on; None is no word about it.
        """
        if teachers is not None:
            self._employ(list(teachers))
        if self.book is None:
            return {}
        book, elapsed = self.book, max(1e-9, time.monotonic() - self.feeding_since)
        attended = self.attendance.until(time.monotonic(), len(self.teachers) - len(self.away))
        ages, once = age_statistics(book.ages(self.student_step)), book.policy.refresh == "once"
        return {
            "stage": self.stage,
            "labels_made": book.counters.images,
            "coverage": len(book.entries) / len(book.ranges),
            "images_per_s": book.counters.images / elapsed,
            "idle_share": max(0.0, 1.0 - book.counters.teacher_seconds / max(1e-9, attended)),
            "teachers": len(self.teachers) - len(self.away),
            "refresh": book.policy.refresh,
            "backlog": book.backlog(self.student_step, None if once else self.label_age),
            **{f"live_age_steps_{name}": value for name, value in ages.items()},
            **book.versions(),
            **({"gpu_memory_bytes": book.counters.gpu_bytes} if book.counters.gpu_bytes else {}),
            "teacher_failures": book.counters.failures,
            "blocks_lost": book.counters.lost_blocks,
            "blocks_collapsed": book.counters.collapsed_blocks,
            "collapses_believed": book.counters.collapses_believed,
            "versions_blocked": len(book.blocked),
            "skipped": list(book.counters.skipped),
            "fatal": self.fatal,
            "class_shares": book.class_shares().tolist(),
            "acceptance": book.acceptance(),
            **_prior_status(book),
        }

    async def blocks(self) -> list[Any]:
        """References of all live blocks, for ``ray.data.from_arrow_refs``."""
        return [] if self.book is None else [entry.block for _, entry in sorted(self.book.entries.items())]

    async def recall(self, stage: int, prior: list[float], seen: list[float] | None = None) -> None:
        """Go on from the target prior that a checkpoint of a stage holds."""
        self.recalled[stage] = prior, seen

    async def reopen(self, stage: int, stage_version: int, path: str) -> None:
        """Take over a complete round that :func:`actors.label_rounds.write_round` wrote before a resume.

        Raises:
            ray.exceptions.RayTaskError: the file is gone or of another run; the bank is then as it was.
        """
        blocks = await self._read(stage, path)
        self._open(stage, stage_version)
        assert self.book is not None
        prior = self.book.prior
        if prior is not None and prior.surveying:  # whatever it was, the labels of the round are made with it
            prior.settle(prior.target)
        for header, block in blocks:
            self.book.accept(header, block)
        self.round_file = path
        self._start_feeding()

    async def _read(self, stage: int, path: str) -> list[tuple[Header, Any]]:
        """Headers and references of a round in a file; a task reads it, so the pixels stay out of this process."""
        count = -(-self.images // self.rows[stage])
        headers_ref, *blocks = ray.remote(num_cpus=0)(read_round).options(num_returns=1 + count).remote(path, count)
        return list(zip(await headers_ref, blocks, strict=True))

    async def _refill(self, path: str) -> None:
        """Take those blocks of a given round that the book does not hold."""
        book = self.book
        assert book is not None
        for header, block in await self._read(self.stage, path):
            if header.chunk not in book.entries:
                book.accept(header, block)
        self.round_file = path

    def _forget_broken_round(self) -> None:
        """A round that lost a block is made whole again by other labels than those in its file."""
        if self.book is not None and not self.book.round_complete:
            self.round_file = None

    def _open(self, stage: int, stage_version: int) -> None:
        if not self.counters.blocks:
            self._begin_counting()
        self._close()
        self.stage, self.stage_version = stage, stage_version
        self.book = LabelBook(self.images, self.rows[stage], self.plans[stage], self.counters)
        if self.book.prior is not None and stage in self.recalled:
            prior, seen = self.recalled[stage]
            self.book.prior.recall(np.array(prior), None if seen is None else np.array(seen))

    def _close(self) -> None:
        for teacher in list(self.feeders):
            self._stop_feeding(teacher)
        self.stage, self.book, self.round_file, self._answer = -1, None, None, None

    def _employ(self, teachers: list[Any]) -> None:
        """Call these teachers from now on, and no others."""
        if not self.teachers and teachers:
            self._begin_counting()
        self.attendance.until(time.monotonic(), len(self.teachers) - len(self.away))
        for teacher in self.teachers:
            if teacher not in teachers:
                self._stop_feeding(teacher)
                self.away.discard(teacher)
        self.teachers = teachers
        if self.book is not None:
            self._start_feeding()

    def _begin_counting(self) -> None:
        self.feeding_since = time.monotonic()
        self.attendance = Attendance(self.feeding_since)

    def _start_feeding(self) -> None:
        for teacher in self.teachers:
            if teacher not in self.feeders:
                calls = range(self.calls_in_flight)
                self.feeders[teacher] = [asyncio.create_task(self._feed(teacher)) for _ in calls]

    def _stop_feeding(self, teacher: Any) -> None:
        for feeder in self.feeders.pop(teacher, ()):
            feeder.cancel()

    async def _feed(self, teacher: Any) -> None:
        """Keep one call to one teacher under way for as long as the stage lasts."""
        book, stage = self.book, self.stage
        assert book is not None
        once, errors = book.policy.refresh == "once", 0
        while True:
            if once and book.round_complete:
                await asyncio.sleep(1.0)
                continue
            rewinds = self.rewinds
            try:
                newest = await self._version()
            except ray.exceptions.RayError:
                newest = None
            if rewinds != self.rewinds:  # what the board said is from before
                continue
            chunk = book.next_chunk(newest)
            if chunk is None:
                await asyncio.sleep(VERSION_SECONDS)
                continue
            try:
                header_ref, block = teacher.label.options(num_returns=2).remote(
                    stage, chunk, *book.ranges[chunk], newest, self.student_step, book.adjustment
                )
                book.accept(await header_ref, block)
                errors = 0
                if once and book.round_complete:
                    await self._keep_round(book)
            except asyncio.CancelledError:
                book.busy.discard(chunk)
                raise
            except ray.exceptions.RayError as error:
                book.fail(chunk)
                # A dead teacher starts again, and one that has just begun finds weights when the student is back;
                # one that raises anything else, or never labelled anything, will not get better.
                waits = isinstance(error, VersionGoneError)
                defect = isinstance(error, ray.exceptions.RayTaskError) and not waits
                errors = errors + 1 if defect or not (book.counters.blocks or waits) else 0
                if errors >= ERRORS_TO_FAIL * (1 if defect else 20):
                    self.fatal = f"a teacher cannot label: {str(error).strip().splitlines()[-1]}"
                await asyncio.sleep(0.2)
                if isinstance(error, ray.exceptions.RayActorError):
                    await self._until_back(teacher)

    async def _until_back(self, teacher: Any) -> None:
        """Wait until a teacher that died answers again: it may have to wait for another node."""
        while True:
            try:
                await teacher.pid.remote()
            except ray.exceptions.RayActorError:
                self._count_away(teacher, away=True)
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                self._count_away(teacher, away=False)
                return

    def _count_away(self, teacher: Any, *, away: bool) -> None:
        self.attendance.until(time.monotonic(), len(self.teachers) - len(self.away))
        if away and teacher in self.teachers:
            self.away.add(teacher)
        else:
            self.away.discard(teacher)

    async def _keep_round(self, book: LabelBook) -> None:
        """Write a completed round once; a task does it, so the pixels stay out of this process."""
        if self.folder is None or self.round_file is not None:
            return
        self.round_file = "being written"
        blocks = [entry.block for _, entry in sorted(book.entries.items())]
        task = ray.remote(num_cpus=0)(write_round)
        try:
            self.round_file = await task.remote(self.folder, book.histogram, *blocks)
        except ray.exceptions.RayError:
            self.round_file = None
            return
        # A resumed run may go back into the round before, but not further.
        self.rounds = [*(path for path in self.rounds if path != self.round_file), self.round_file]
        while len(self.rounds) > ROUNDS_KEPT:
            with contextlib.suppress(OSError):  # a store that cannot be reached keeps an old round
                place(self.rounds.pop(0)).unlink(missing_ok=True)

    async def _version(self) -> int | None:
        """The weights version that a teacher should use now, as the board said a moment ago at most."""
        now = time.monotonic()
        if self._answer is None or (self._answer.done() and now - self._asked_at >= VERSION_SECONDS):
            self._answer, self._asked_at = asyncio.ensure_future(self._ask_board()), now
        return await asyncio.shield(self._answer)  # a teacher that leaves must not take the answer along

    async def _ask_board(self) -> int | None:
        assert self.book is not None
        if self.book.policy.refresh == "once":
            # The round's own weights are gone only when a round is lost after a resume: it is then made anew.
            version = await self.board.nearest_version.remote(self.stage_version)
        else:
            version = await self.board.newest_version.remote()
        return None if version is None or version < self.stage_version else int(version)


def _prior_status(book: LabelBook) -> dict[str, Any]:
    """The target prior that labels are adjusted to, what it adds to scores at most, and its distance from the source's.

    The distance is the total variation: the share of pixels that would have to change class. Nothing where labels are
    not adjusted.
    """
    plan, target = book.plan.prior, book.target_prior
    if plan is None or target is None:
        return {}
    return {
        "target_prior": target.tolist(),
        "prior_offset": plan.offset(target).tolist(),
        "prior_shift": 0.5 * float(np.abs(target - np.array(plan.source)).sum()),
    }
