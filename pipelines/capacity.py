"""What a run with N students and M teachers would come to on some devices, from a few measured figures.

Nothing is measured here: :mod:`pipelines.load_trial` does that. All times are seconds, all ages student steps.

**Step time.** Helpers (teachers and the evaluator) compete with the students for the same devices. Measured is a step
beside h helpers that work without pause. In a run they pause: teachers when a round of labels is made and no newer
weights hang on the board, the evaluator until the next look. The time of a run is divided accordingly, and the mean
rate of steps is the mean of the measured rates, each by its share of the time. The evaluator counts as one more helper.

**Label age.** A version of the weights hangs out every P steps. A round of labels takes R = n ℓ / M s steps (n images,
ℓ seconds of a teacher for one, a step of s seconds). A call waits behind another one of the same teacher, and its
weights were chosen when it was sent: with b steps to a block, a label is up to P + 2b steps old when it is made, and is
read until the next one of its images takes its place. With teachers that never pause the age at reading is so

    age = U(0, P) + 2 b + U(0, R) + v,   median P/2 + 2b + R/2 + v

with v for the view to hear of a block and to fetch it. With R < P they wait for the next version, whose blocks come
after b to R steps: U(0, P) + U(b, R) + v. :func:`replay` does not use these formulas but plays the bank's order of
calls through a whole stage, with its beginning (nothing is labelled) and its end, and sums up all reads.

**Object store.** What lies there: the live round of labels; older blocks that a student has not exchanged yet; what was
made within Ray's period of freeing; two versions of the weights; and the segments of samples that are read ahead, which
is most of it where images are small.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.weight_board import WeightBoard

CALLS_IN_FLIGHT = 2
"""Of the bank, to each teacher."""
VIEW_STEPS = 2
"""One step until the view has heard of a block, one until it has fetched it."""
FREE_SECONDS = 1.0
"""How often Ray frees objects that nobody refers to any more, its default."""
FREE_VISITS = 2
"""Labels of two visits of every image cost no accuracy that could be measured (docs/staleness.md)."""
PASSES = 40
"""Of the fixed point between step time and pauses of the helpers, which converges within a few."""


@dataclass(frozen=True)
class Pace:
    """Students, measured.

    Attributes:
        step_seconds: of a step that publishes nothing.
        publish_seconds: that publishing adds to a step; a checkpoint adds as much.
        spread: (slowest - fastest) / mean of the parts of the measurement.
    """

    step_seconds: float
    publish_seconds: float = 0.0
    spread: float = 0.0

    def mean(self, publish_every: int, checkpoint_every: int = 0) -> float:
        """Mean seconds of a step, publications and checkpoints included."""
        share = 1 / publish_every + (1 / checkpoint_every if checkpoint_every else 0.0)
        return self.step_seconds + share * self.publish_seconds


@dataclass(frozen=True)
class StreamShape:
    """A stream of one student as the object store sees it.

    Attributes:
        block_bytes: of a block of samples.
        batches_per_block: of that student.
        segment_blocks: that are read at a time.
        direct_blocks: of a segment that are read only when they are asked for.
    """

    block_bytes: int
    batches_per_block: int
    segment_blocks: int
    direct_blocks: int = 0


@dataclass(frozen=True)
class StageShape:
    """A stage.

    Attributes:
        name: as metrics call it.
        steps: of its students.
        batch: samples of each domain in a step.
        streams: of one student.
        labelled: whether teachers label for it without end.
    """

    name: str
    steps: int
    batch: int
    streams: tuple[StreamShape, ...] = ()
    labelled: bool = False


@dataclass(frozen=True)
class Course:
    """What is known of a run before it runs.

    Attributes:
        images: target images.
        stages: in order.
        labelled: index of the stage whose labels are planned.
        publish_every, evaluate_every, checkpoint_every: steps; 0 is never.
        block_rows: images in a label block, by the number of teachers.
        row_bytes: of a label record.
        version_bytes: of one publication of the weights.
        watched, scored: images at which the evaluator looks, and which it scores, each time.
        students: N.
    """

    images: int
    stages: tuple[StageShape, ...]
    labelled: int
    publish_every: int
    evaluate_every: int
    checkpoint_every: int
    block_rows: Mapping[int, int]
    row_bytes: float
    version_bytes: int
    watched: int
    scored: int
    students: int = 1

    @property
    def stage(self) -> StageShape:
        """The stage whose labels are planned."""
        return self.stages[self.labelled]

    @property
    def free_age(self) -> int:
        """Steps in which every target image is visited so often that labels as old as that cost nothing."""
        return max(1, FREE_VISITS * self.images // self.stage.batch)


@dataclass(frozen=True)
class Measured:
    """What was measured on the devices.

    Attributes:
        beside: pace of the planned stage, by the number of helpers that worked without pause.
        image_seconds: of one teacher for an image, beside the students, by the number of helpers at work.
        watch_seconds, score_seconds: of the evaluator for an image, with as many helpers at work as ever.
        alone: pace of every stage without helpers.
        label_seconds: for an image, of all teachers together that the devices hold while nothing trains.
        labellers: how many these are.
        whole: pace of the planned stage on all devices, without a helper and beside one; None where it has them anyway.
        whole_devices: what that means, in words.
    """

    beside: Mapping[int, Pace]
    image_seconds: Mapping[int, float]
    watch_seconds: float
    score_seconds: float
    alone: tuple[Pace, ...]
    label_seconds: float
    labellers: int
    whole: tuple[Pace, Pace] | None = None
    whole_devices: str = ""

    @property
    def spread(self) -> float:
        """The largest of all measurements of students."""
        return max(pace.spread for pace in (*self.beside.values(), *self.alone, *(self.whole or ())))


@dataclass(frozen=True)
class Ages:
    """Ages of the labels that are read in a stage, in steps.

    Attributes:
        p50, p95: of the reads that find a label; NaN where none does.
        missing: share of the reads before an image has its first label.
        rounds: labels made, in rounds.
    """

    p50: float
    p95: float
    missing: float
    rounds: float


@dataclass(frozen=True)
class Store:
    """Bytes in the object store of a machine that holds all of a run: mean over the planned stage, and at most."""

    mean: float
    most: float


@dataclass(frozen=True)
class SideBySide:
    """A run whose teachers label while its students learn.

    Attributes:
        teachers: M.
        step_seconds: mean of the planned stage.
        busy: share of the time in which the teachers label.
        image_seconds: of one teacher for an image.
        ages: of the labels.
        store: the object store.
        epoch_seconds: in which every target image is visited once.
        seconds: of all stages.
    """

    teachers: int
    step_seconds: float
    busy: float
    image_seconds: float
    ages: Ages
    store: Store
    epoch_seconds: float
    seconds: float


@dataclass(frozen=True)
class InTurns:
    """A run that trains and labels in turns, every device at one thing at a time.

    Attributes:
        rounds: of labels, as few as keep them young enough.
        step_seconds: mean of the planned stage.
        round_seconds: for one round of labels.
        age_p50, age_p95: of the labels, in steps.
        store: the object store.
        epoch_seconds: of training, in which every target image is visited once.
        seconds: of all stages.
        whole: whether steps are faster on all devices than on the students' own.
    """

    rounds: int
    step_seconds: float
    round_seconds: float
    age_p50: float
    age_p95: float
    store: Store
    epoch_seconds: float
    seconds: float
    whole: bool


@dataclass(frozen=True)
class Advice:
    """How many teachers to take; None: take turns. And why."""

    teachers: int | None
    sentence: str


# --- step time -----------------------------------------------------------------------------------------------------


def _between(values: Mapping[int, float], at: float) -> float:
    """Linear between what was measured, and constant beyond."""
    known = sorted(values)
    return float(np.interp(at, known, [values[number] for number in known]))


def _mean_rate(seconds: Sequence[float], shares: Sequence[float]) -> float:
    """Seconds of a step when each of some paces has its share of the time."""
    return 1 / sum(share / second for share, second in zip(shares, seconds, strict=True))


def side_by_side(course: Course, measured: Measured, teachers: int) -> SideBySide:
    """Predict a run with some number of teachers."""
    pace = {
        number: each.mean(course.publish_every, course.checkpoint_every) for number, each in measured.beside.items()
    }
    most, step, busy, looking, image = max(measured.image_seconds), pace[0], 1.0, 0.0, 0.0
    look_seconds = course.watched * measured.watch_seconds + course.scored * measured.score_seconds
    for _ in range(PASSES):
        one, two = (_between(measured.image_seconds, teachers + more) for more in (0, 1))
        image = 1 / ((1 - looking) / one + looking / two)
        busy = min(1.0, course.images * image / (teachers * course.publish_every * step))
        if course.evaluate_every:
            slower = _between(measured.image_seconds, 1 + teachers * busy) / measured.image_seconds[most]
            looking = min(1.0, look_seconds * slower / (course.evaluate_every * step))
        shares = [(1 - looking) * (1 - busy), (1 - looking) * busy, looking * (1 - busy), looking * busy]
        helpers = [0, teachers, 1, teachers + 1]
        step = _mean_rate([_between(pace, number) for number in helpers], shares)
    ages, behind = replay(course, teachers, step, image)
    return SideBySide(
        teachers,
        step,
        busy,
        image,
        ages,
        store(course, teachers, step, image, busy, behind),
        step * course.images / course.stage.batch,
        run_seconds(course, measured, step / pace[0], step * course.stage.steps),
    )


def run_seconds(course: Course, measured: Measured, slower: float, planned: float) -> float:
    """Seconds of all stages.

    Args:
        course: of the run.
        measured: paces of the stages without helpers.
        slower: how many times as long a step of the planned stage takes beside its helpers; so do those of the other
            stages that teachers label for without end.
        planned: seconds of the planned stage.
    """
    total = planned
    for index, (stage, pace) in enumerate(zip(course.stages, measured.alone, strict=True)):
        if index != course.labelled:
            factor = slower if stage.labelled else 1.0
            total += stage.steps * pace.mean(course.publish_every, course.checkpoint_every) * factor
    return total


# --- label age -----------------------------------------------------------------------------------------------------


def replay(course: Course, teachers: int, step_seconds: float, image_seconds: float) -> tuple[Ages, float]:
    """Play the bank's order of calls through the planned stage.

    Args:
        course: of the run.
        teachers: M.
        step_seconds: of the students.
        image_seconds: of one teacher for an image.

    Returns:
        The ages that students read, and the mean share of the chunks whose newest block a student has not exchanged
        yet, because none of their images is about to be read.
    """
    rows, steps, every = course.block_rows[teachers], course.stage.steps, course.publish_every
    sizes = [min(rows, course.images - start) for start in range(0, course.images, rows)]
    idle = [(-1, -1, chunk) for chunk in range(len(sizes))]  # version and order of the live block: the stalest first
    heapq.heapify(idle)
    free = [0.0] * teachers
    """When each teacher has done all that it was asked for."""
    calls = [(0.0, number % teachers) for number in range(CALLS_IN_FLIGHT * teachers)]
    heapq.heapify(calls)
    made: list[tuple[int, float, int]] = []
    """Chunk, step at which its block was made, version."""
    done: list[tuple[float, int, int, int]] = []
    """Blocks under way: when they will be made, order, chunk, version."""
    order = 0
    while calls:
        now, teacher = heapq.heappop(calls)
        if now >= steps:
            break
        while done and done[0][0] <= now:
            _, number, chunk, version = heapq.heappop(done)
            heapq.heappush(idle, (version, number, chunk))
        newest = int(now // every) * every
        if not idle or idle[0][0] >= newest:  # all are labelled, or being labelled, with the newest version
            ready = done[0][0] if done and not idle else math.inf
            heapq.heappush(calls, (min(ready, float(newest + every)), teacher))
            continue
        _, _, chunk = heapq.heappop(idle)
        end = max(now, free[teacher]) + sizes[chunk] * image_seconds / step_seconds
        free[teacher] = end
        heapq.heappush(done, (end, order, chunk, newest))
        made.append((chunk, end, newest))
        heapq.heappush(calls, (end, teacher))
        order += 1
    return _read(course, sizes, made)


def _read(course: Course, sizes: Sequence[int], made: Sequence[tuple[int, float, int]]) -> tuple[Ages, float]:
    """Ages over all reads, if every image is as likely at every step; and the share of blocks not yet exchanged."""
    steps, reads, found, behind = course.stage.steps, course.stage.steps * course.images, 0.0, 0.0
    firsts, lasts, weights = [], [], []
    visit = course.images / (course.stage.batch * max(1, course.images // max(1, len(sizes))))
    """Steps between two visits of a chunk."""
    by_chunk: dict[int, list[tuple[float, int]]] = {}
    for chunk, end, version in made:
        by_chunk.setdefault(chunk, []).append((end + VIEW_STEPS, version))
    for chunk, blocks in by_chunk.items():
        ends = [at for at, _ in blocks[1:]] + [float(steps)]
        for (at, version), until in zip(blocks, ends, strict=True):
            until = min(until, steps)
            if at >= until:
                continue
            firsts.append(at - version)
            lasts.append(until - version)
            weights.append(sizes[chunk] * (until - at))
            found += weights[-1]
            behind += visit * (1 - math.exp(-(until - at) / visit))
    p50, p95 = mixed_quantiles(np.array(firsts), np.array(lasts), np.array(weights), (0.5, 0.95))
    labelled = sum(sizes[chunk] for chunk, end, _ in made if end < steps)
    return Ages(p50, p95, 1 - found / reads, labelled / course.images), behind / (steps * len(sizes))


def mixed_quantiles(
    firsts: np.ndarray, lasts: np.ndarray, weights: np.ndarray, shares: Sequence[float]
) -> tuple[float, ...]:
    """Quantiles of a mixture of uniform distributions.

    Args:
        firsts, lasts: bounds of each, float64 n, first < last.
        weights: of each, positive.
        shares: in (0, 1).

    Returns:
        One number a share; NaN each where there is nothing.
    """
    if not len(weights):
        return tuple(math.nan for _ in shares)
    density = weights / (lasts - firsts)
    points = np.concatenate([firsts, lasts])
    order = np.argsort(points, kind="stable")
    points, changes = points[order], np.concatenate([density, -density])[order]
    below = np.concatenate([[0.0], np.cumsum(np.cumsum(changes)[:-1] * np.diff(points))])
    return tuple(float(np.interp(share * below[-1], below, points)) for share in shares)


# --- object store --------------------------------------------------------------------------------------------------


def blocks_held(stream: StreamShape, steps: int) -> np.ndarray:
    """Blocks of a stream that lie in the object store while each batch of a stage is asked for, int64 ``steps``."""
    batches = -(-steps // stream.batches_per_block) * stream.batches_per_block
    whole = stream.segment_blocks * stream.batches_per_block
    held = np.zeros(steps, np.int64)
    for start in range(0, batches, whole):
        length = min(whole, batches - start)
        before = min(whole, start)  # the segment before, or nothing
        opened = start - before + before // 2 if start else 0
        steps_of = np.arange(opened, min(start + length, steps))
        taken = np.maximum(0, steps_of - start) // stream.batches_per_block
        blocks = length // stream.batches_per_block
        waiting = np.maximum(0, min(stream.direct_blocks, blocks) - taken - 2)  # two are asked for ahead
        held[steps_of] += blocks - taken - waiting
    return held


def store(
    course: Course, teachers: int, step_seconds: float, image_seconds: float, busy: float, behind: float
) -> Store:
    """Bytes in the object store over the planned stage.

    Args:
        course: of the run.
        teachers: M.
        step_seconds: of the students.
        image_seconds: of one teacher for an image.
        busy: share of the time in which teachers label.
        behind: share of the chunks whose older block a student still holds.
    """
    made = busy * teachers / image_seconds * course.row_bytes  # bytes of labels a second
    published = course.version_bytes / (course.publish_every * step_seconds)
    round_bytes = course.images * course.row_bytes
    fixed = (
        round_bytes * (1 + behind) + WeightBoard.ALIVE * course.version_bytes + FREE_SECONDS / 2 * (made + published)
    )
    held = np.zeros(course.stage.steps)
    for stream in course.stage.streams:
        held += course.students * stream.block_bytes * blocks_held(stream, course.stage.steps)
    return Store(float(fixed + held.mean()), float(fixed + held.max()))


# --- turns, and advice ---------------------------------------------------------------------------------------------


def in_turns(course: Course, measured: Measured, age: int) -> InTurns:
    """Predict a run that takes turns, in as few rounds as keep the median age of its labels within a bound.

    A round lasts L steps, and its labels are 0 to L steps old when they are read: L / 2 is the median.
    """
    steps = course.stage.steps
    rounds = min(steps, max(1, math.ceil(steps / (2 * age))))
    own = _with_evaluator(course, measured, measured.beside[0], measured.beside[min(n for n in measured.beside if n)])
    step, whole = own, False
    if measured.whole is not None:
        on_all = _with_evaluator(course, measured, *measured.whole)
        step, whole = min(own, on_all), on_all < own
    round_seconds = course.images * measured.label_seconds
    planned = steps * step + rounds * round_seconds
    length = steps / rounds
    seconds = run_seconds(course, measured, 1.0, planned)
    lying = store(course, 1, step, measured.label_seconds, busy=0.0, behind=0.0)
    epoch = step * course.images / course.stage.batch
    return InTurns(rounds, step, round_seconds, length / 2, 0.95 * length, lying, epoch, seconds, whole)


def _with_evaluator(course: Course, measured: Measured, without: Pace, beside: Pace) -> float:
    """Seconds of a step when nobody but the evaluator helps, now and then."""
    alone, helped = (each.mean(course.publish_every, course.checkpoint_every) for each in (without, beside))
    if not course.evaluate_every:
        return alone
    most, least = max(measured.image_seconds), min(measured.image_seconds)
    work = course.watched * measured.watch_seconds + course.scored * measured.score_seconds
    work *= measured.image_seconds[least] / measured.image_seconds[most]
    step = alone
    for _ in range(PASSES):
        looking = min(1.0, work / (course.evaluate_every * step))
        step = _mean_rate([alone, helped], [1 - looking, looking])
    return step


def advise(rows: Sequence[SideBySide], turns: InTurns, age: int, uncertain: float = 0.05) -> Advice:
    """How many teachers to take, or to take turns.

    Of the numbers of teachers whose labels are young enough the fastest run wins, and the smallest of those that are
    within the uncertainty of it. Taking turns wins where it is faster than that by more than the uncertainty.

    Args:
        rows: predictions, in rising number of teachers.
        turns: the alternative on the same devices.
        age: steps that the median label may be old.
        uncertain: share of a time by which two must differ to be different.
    """
    young = [row for row in rows if row.ages.p50 <= age]
    if not young:
        best = min(rows, key=lambda row: math.inf if math.isnan(row.ages.p50) else row.ages.p50)
        none = math.isnan(best.ages.p50)
        found = "images have none in time" if none else f"labels are {best.ages.p50:.0f} steps old at best"
        return Advice(
            None,
            f"take turns, {_rounds(turns)}: side by side {found} ({_teachers(best.teachers)}), and {age} is the bound",
        )
    fastest = min(row.seconds for row in young)
    best = next(row for row in young if row.seconds <= fastest * (1 + uncertain))
    aged = f"labels {best.ages.p50:.0f} steps old"
    gain = turns.seconds / best.seconds
    if gain < 1 - uncertain:
        return Advice(
            None,
            f"take turns, {_rounds(turns)}: splitting the devices costs {1 / gain:.2f} times the time "
            f"({_teachers(best.teachers)}, {aged})",
        )
    why = (
        f"{gain:.2f} times as fast as turns of as fresh labels"
        if gain > 1 + uncertain
        else f"as fast as turns as far as can be told (within {uncertain:.0%}), and no number of rounds to choose"
    )
    return Advice(best.teachers, f"take {_teachers(best.teachers)}: {aged} (up to {age} is free), {why}")


def _teachers(number: int) -> str:
    return f"{number} teacher{'s' if number > 1 else ''}"


def _rounds(turns: InTurns) -> str:
    return f"{turns.rounds} round{'s' if turns.rounds > 1 else ''} of labels"
