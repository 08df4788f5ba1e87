"""Our own metrics: which numbers are exported, and what a number is called wherever it is shown.

One rule for names. Every number has a kind and a name, and stands under that name in the lines of that kind in
``metrics.jsonl``. TensorBoard draws it as ``kind/name``, the terminal says it in the words that stand beside it here,
and Prometheus has it as ``ray_tutelage_kind_name``; the ``ray_`` is Ray's. Where one name has many numbers, Prometheus
tells them apart by a tag:

- a name with a slash, as ``loss/segmentation``, is a term: ``ray_tutelage_train_loss_terms{term="segmentation"}``;
- a list has a number a class: ``ray_tutelage_teachers_acceptance{class="road"}``;
- a word is a number that is 1 while it holds: ``ray_tutelage_train_stage{stage="alignment"}``;
- the lines of a reference run, of a kind as ``train:oracle``, carry ``reference="oracle"``.

Every number also carries the tags of its run. A number that stands in no row of :data:`METRICS` is not exported.

All are gauges, sums as well: Ray exports no counter before its first increment, so a failure that has not happened
would be no data instead of 0, and it goes on exporting a counter whose process is gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PREFIX = "tutelage"
REFRESH_SECONDS = 5.0
"""How often every number is told to Ray again. Ray passes on what was told since its last report (every 10 seconds),
and forgets a number of which it hears nothing for two of them: also one whose next line takes longer."""

Unit = Literal["", "share", "percent", "seconds", "per second", "steps", "bytes", "moment"]


@dataclass(frozen=True)
class Metric:
    """A number that is exported.

    Attributes:
        kind: of the lines in which it stands.
        name: in these lines; ``loss/*`` is every name that begins with ``loss/``.
        text: what it is.
        unit: a share is one of 1, a moment is seconds since 1970.
        tag: what tells several numbers of the name apart; empty where there is one.
        sums: it only grows while its process lives.
        words: how the terminal says it; None where it does not.
    """

    kind: str
    name: str
    text: str
    unit: Unit = ""
    tag: str = ""
    sums: bool = False
    words: str | None = None

    @property
    def exported(self) -> str:
        """The name that Ray is given."""
        return f"{PREFIX}_{self.kind}_{self.name.replace('/*', '_terms')}"

    @property
    def prometheus(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.exported}"


def _signal(name: str, text: str) -> Metric:
    return Metric("signals", name, text, "share")


METRICS = (
    Metric("student", "students", "Students that train together"),
    Metric("student", "restarts", "Times that students began again: one failed, or more had a place", sums=True),
    Metric("train", "stage", "The stage that the student is in", tag="stage", words="{}"),
    Metric("train", "step", "The student's step", "steps"),
    Metric("train", "time", "When the student's newest line was written", "moment"),
    Metric("train", "loss", "Sum of the loss terms, mean since the line before", words="loss {:.3f}"),
    Metric("train", "loss/*", "A loss term, mean since the line before", tag="term"),
    Metric("train", "discriminator", "Loss of the discriminator"),
    Metric("train", "discriminator/*", "Loss of a discriminator", tag="term"),
    Metric("train", "teacher/*", "What a teacher that learns in turns with the student minimises", tag="term"),
    Metric("train", "labels/*", "What a recipe counts of the labels that it reads", tag="term"),
    Metric("train", "prior_shift", "Share of pixels that would change class from source to target", "share"),
    Metric("train", "learning_rate", "Learning rate of the step"),
    Metric("train", "images_per_s", "Images that the students have trained on, a second of the run", "per second",
           words="{:.1f} images/s"),
    Metric("train", "steps_per_s", "Student steps a second since the line before", "per second"),
    Metric("train", "step_seconds", "A student step, mean since the line before", "seconds"),
    Metric("train", "seconds", "What the student's steps have taken in all", "seconds", sums=True),
    Metric("train", "wait_share", "Share of its time for which the student waited for labels, after the first ones",
           "share", words="wait {:.1%}"),
    Metric("train", "data_wait_share", "Share of its time for which the student waited for images", "share"),
    Metric("train", "join_share", "Share of its time in which the student put labels to images", "share"),
    Metric("train", "labels_read", "Labels that the first student has read", sums=True),
    Metric("train", "labels_missing", "Labels that were not there when the first student read", sums=True),
    Metric("train", "label_age_steps_p50", "Age of the labels read since the line before, median", "steps",
           words="labels {} steps old"),
    Metric("train", "label_age_steps_p95", "Age of the labels read since the line before, 95th percentile", "steps",
           words="95 % at most {}"),
    Metric("train", "label_age_steps_max", "Age of the labels read since the line before, the oldest", "steps"),
    Metric("train", "weights_version", "Version of the weights that the student published last: its step", "steps"),
    Metric("train", "recoveries", "Times that the student went back to its last good weights", sums=True),
    Metric("train", "gpu_memory_bytes", "GPU memory that the first student's process holds", "bytes"),
    Metric("teachers", "stage", "Number of the stage whose labels are made, from 0"),
    Metric("teachers", "step", "The student's step when the bank was asked", "steps"),
    Metric("teachers", "time", "When the bank was asked", "moment"),
    Metric("teachers", "teachers", "Teachers that are there"),
    Metric("teachers", "teachers_wanted", "Teachers that there should be"),
    Metric("teachers", "backlog", "Target images whose label is missing or older than wanted"),
    Metric("teachers", "labels_made", "Labels made", sums=True, words="{} labels"),
    Metric("teachers", "images_per_s", "Labels made, a second since the first stage with labels", "per second"),
    Metric("teachers", "coverage", "Share of the target images' chunks that have a label", "share",
           words="{:.0%} covered"),
    Metric("teachers", "idle_share", "Share of their time in which teachers did not label", "share",
           words="teachers idle {:.0%}"),
    Metric("teachers", "live_age_steps_p50", "Age of the labels in the bank, median", "steps"),
    Metric("teachers", "live_age_steps_p95", "Age of the labels in the bank, 95th percentile", "steps"),
    Metric("teachers", "live_age_steps_max", "Age of the labels in the bank, the oldest", "steps"),
    Metric("teachers", "weights_version_oldest", "Oldest version of the weights among the labels in the bank", "steps"),
    Metric("teachers", "weights_version_newest", "Newest version of the weights among the labels in the bank", "steps"),
    Metric("teachers", "teacher_failures", "Calls of teachers that did not come back", sums=True),
    Metric("teachers", "blocks_lost", "Blocks of labels that were lost with their node, and are made again", sums=True),
    Metric("teachers", "blocks_collapsed", "Blocks of labels that were refused because their classes collapsed",
           sums=True),
    Metric("teachers", "collapses_believed", "Times that collapsed labels were believed, as several versions agreed",
           sums=True),
    Metric("teachers", "versions_blocked", "Versions of the weights that may label no more"),
    Metric("teachers", "acceptance", "Share of the pixels taken for a class that the student learns from", "share",
           tag="class"),
    Metric("teachers", "class_shares", "Share of a class among the pixels that the student learns from", "share",
           tag="class"),
    Metric("teachers", "target_prior", "Frequency of a class on the target that labels are adjusted to", "share",
           tag="class"),
    Metric("teachers", "prior_shift", "Share of pixels that would change class from source to target", "share"),
    Metric("teachers", "gpu_memory_bytes", "GPU memory that a teacher's process holds, the most of any", "bytes"),
    Metric("trainable_teacher", "stage", "The stage of the teacher that learns", tag="stage"),
    Metric("trainable_teacher", "steps", "Steps of the teacher that learns", "steps"),
    Metric("trainable_teacher", "loss", "Its loss, mean since the line before"),
    Metric("trainable_teacher", "loss/*", "A term of its loss, mean since the line before", tag="term"),
    Metric("trainable_teacher", "discriminator", "Loss of its discriminator"),
    Metric("trainable_teacher", "coefficient", "What its student's reward is multiplied by"),
    Metric("trainable_teacher", "reward_age_steps", "Age of the newest reward that it has heard of", "steps"),
    Metric("trainable_teacher", "steps_per_s", "Its steps a second since the line before", "per second"),
    Metric("trainable_teacher", "gpu_memory_bytes", "GPU memory that its process holds", "bytes"),
    _signal("entropy", "Mean entropy of what the network says of target pixels; 1 where all classes are as likely"),
    _signal("diversity", "Entropy of the classes it sees on all target pixels together; 1 where all are as frequent"),
    _signal("agreement", "Share of target pixels in which student and average see the same class"),
    _signal("consistency", "Share of target pixels whose class is the same in the mirrored image"),
    _signal("disagreement", "Share of target pixels in which the two heads see different classes"),
    _signal("stability", "Share of target pixels whose class is the same as at the look before"),
    _signal("label_free_score", "What the weights are recommended by, without labels"),
    _signal("source_miou", "mIoU on held-out source images"),
    Metric("score", "miou", "mIoU on labelled target images, which nothing learns from (oracle metric)", "percent",
           words="target mIoU {:.1f}"),
)  # fmt: skip
"""All that is exported, and all that the terminal says, in its order within a kind."""

Series = dict[tuple[Metric, str], float]
"""Numbers by what they are and by their tag's value."""


def find(kind: str, name: str) -> Metric | None:
    """The row of a number; None where it is not exported."""
    return _BY_NAME.get((kind, name)) or _BY_NAME.get((kind, f"{name.partition('/')[0]}/*"))


_BY_NAME = {(metric.kind, metric.name): metric for metric in METRICS}


def series(kind: str, numbers: Mapping[str, Any], classes: Sequence[str]) -> Series:
    """What is exported of a line.

    Args:
        kind: of the line, without the name of a reference run.
        numbers: JSON values. What is missing, None or no finite number has no value.
        classes: names, for lists that have a number a class.
    """
    found: Series = {}
    for name, value in numbers.items():
        metric = find(kind, name)
        if metric is None:
            continue
        if isinstance(value, str):
            found[metric, value] = 1.0
        elif isinstance(value, list):
            pairs = zip(classes, value, strict=True)
            found.update({(metric, label): float(item) for label, item in pairs if _counts(item)})
        elif _counts(value):
            found[metric, name.partition("/")[2]] = float(value)
    return found


def _counts(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def said(newest: Mapping[str, Mapping[str, Any]], *names: str) -> list[str]:
    """What the terminal says of some numbers.

    Args:
        newest: lines by kind.
        names: as ``kind/name``; what has no value is left out.
    """
    parts = []
    for full in names:
        kind, _, name = full.partition("/")
        value, metric = newest.get(kind, {}).get(name), find(kind, name)
        assert metric is not None
        assert metric.words is not None
        parts += [] if value is None else [metric.words.format(value)]
    return parts


class Export:
    """Tells Ray the newest numbers of a run, for Prometheus to fetch.

    It never waits and never raises: after an error, which is returned once as a sentence, it is silent for good.

    Args:
        tags: of the run, on every number: ``run``, ``recipe``, ``benchmark``.
        classes: names.
        gauge: makes a gauge from a name, a text and the names of its tags.
    """

    def __init__(
        self,
        tags: Mapping[str, str],
        classes: Sequence[str],
        gauge: Callable[[str, str, tuple[str, ...]], Any] | None = None,
    ) -> None:
        self.tags, self.classes = dict(tags), tuple(classes)
        self.broken = False
        self._gauge = _rays_gauge if gauge is None else gauge
        self._gauges: dict[Metric, Any] = {}
        self._newest: dict[str, Series] = {}
        self._refreshed = 0.0

    def write(self, kind: str, numbers: Mapping[str, Any]) -> str | None:
        """Tell the numbers of a line, which are from now on the newest of their kind.

        Returns:
            A sentence when nothing can be told any more; None otherwise.
        """
        return self._try(lambda: self._take(kind, numbers))

    def refresh(self) -> str | None:
        """Tell everything once more, if that is some time ago; to be called every second or so. See :meth:`write`."""
        if time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return None
        self._refreshed = time.monotonic()
        return self._try(self._tell_all)

    def end(self, kinds: Sequence[str]) -> None:
        """Nobody works on some kinds any more: Ray forgets their numbers two of its reports later."""
        for kind in kinds:
            self._newest.pop(kind, None)

    def _take(self, kind: str, numbers: Mapping[str, Any]) -> None:
        found = series(kind.partition(":")[0], numbers, self.classes)
        if found:  # a second student's line holds nothing that is not said of all
            self._newest[kind] = found
            self._tell(kind)

    def _tell_all(self) -> None:
        for kind in self._newest:
            self._tell(kind)

    def _tell(self, kind: str) -> None:
        reference = kind.partition(":")[2]
        for (metric, label), value in self._newest[kind].items():
            tag = {metric.tag: label} if metric.tag else {}
            self._made(metric).set(value, {"reference": reference, **tag})

    def _try(self, work: Callable[[], object]) -> str | None:
        if self.broken:
            return None
        try:
            work()
        except Exception as error:  # whatever ails the metrics, the run is worth more
            self.broken = True
            return f"numbers are exported to Prometheus no more: {type(error).__name__}: {error}"
        return None

    def _made(self, metric: Metric) -> Any:
        if metric not in self._gauges:
            text = f"{metric.text} ({metric.unit})" if metric.unit else metric.text
            names = (*self.tags, "reference", *((metric.tag,) if metric.tag else ()))
            gauge = self._gauge(metric.exported, text, names)
            gauge.set_default_tags(self.tags)
            self._gauges[metric] = gauge
        return self._gauges[metric]


def _rays_gauge(name: str, text: str, tags: tuple[str, ...]) -> Any:
    from ray.util.metrics import Gauge  # the table alone needs no Ray

    return Gauge(name, text, tags)
