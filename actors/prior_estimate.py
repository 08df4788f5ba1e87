"""How frequent the classes are on the target: what teachers tell of it, and the bank's estimate. No torch here.

What is estimated from are a network's own probabilities, before any adjustment: labels that an estimate has changed
never argue for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from models.priors import (
    confusion_prior,
    damped,
    decode_posteriors,
    em_prior,
    image_counts,
    log_ratio,
    responsibilities,
    shares,
    with_floor,
)

if TYPE_CHECKING:  # the bank imports this module and must start without torch
    from torch import nn

Method = Literal["confusion", "em", "counts"]
METHODS: tuple[Method, ...] = ("confusion", "em", "counts")
CELLS = 64
"""Cells of every image whose probabilities a teacher tells: at 2 975 images 190 000, 1.2 kB of a label's 1 MB."""
SOURCE_EVERY, SOURCE_LOOKS = 16, 64
"""Target images a source image, of those whose labels stay, but at least so many source images a round; where labels
are only surveyed, a source image for each."""
KEPT = 0.98
"""Of what was seen on source images, each time that a live estimate moves: the network that saw it has changed."""
STEPS = 20
"""Of expectation maximisation, each time that a live estimate moves: it begins where it stood."""
FIRST_SHARE, NEXT_SHARE = 0.5, 0.05
"""Of the images, that have to be labelled before the estimate moves for the first time, and each time after."""


@dataclass(frozen=True)
class Evidence:
    """What the network of a teacher sees of some images, unadjusted.

    Attributes:
        log_means: float32 images×C, g = ln mean exp p of the image's probabilities (methods §7.3).
        posteriors: uint8 images×cells×C, probabilities of some cells, as :func:`models.priors.encode_posteriors` has
            them.
        means: float32 images×C, mean probabilities.
        source: float64 C×C, on some source images: the sum of the probabilities of the pixels of each class, a row a
            class of the labels. None where no source image was looked at.
    """

    log_means: np.ndarray
    posteriors: np.ndarray
    means: np.ndarray
    source: np.ndarray | None = None

    @staticmethod
    def joined(parts: Sequence[Evidence]) -> Evidence:
        """That of several images together."""
        source = [part.source for part in parts if part.source is not None]
        return Evidence(
            np.concatenate([part.log_means for part in parts]),
            np.concatenate([part.posteriors for part in parts]),
            np.concatenate([part.means for part in parts]),
            np.sum(source, axis=0) if source else None,
        )

    @staticmethod
    def nothing(classes: int) -> Evidence:
        """That of no image."""
        none = np.zeros((0, classes), np.float32)
        return Evidence(none, np.zeros((0, CELLS, classes), np.uint8), none)


class SourceSight(Protocol):
    """Labelled source images, to see what a network takes for what."""

    def __len__(self) -> int: ...

    def look(self, network: nn.Module, indices: Sequence[int], temperature: float) -> np.ndarray:
        """Sums of probabilities σ(z / T) by label, float64 C×C; images that cannot be read are left out."""
        ...


@dataclass(frozen=True)
class Adjustment:
    """What a teacher is told of the classes' frequencies.

    Attributes:
        offset: float32 C, added to the class scores: T (ln π_T − ln π_S) (methods §7.4).
        witness: whether it shall tell :class:`Evidence` of what it labels.
        temperature: T, at which evidence is of probabilities, σ(z / T).
        source_every: one of so many target images makes the teacher look at a source image.
        target: π_T as it is now estimated, float64 C, under which the teacher sums what it sees (:class:`Part`); None
            where all of it is wanted.
    """

    offset: np.ndarray
    witness: bool = False
    temperature: float = 1.0
    source_every: int = SOURCE_EVERY
    target: np.ndarray | None = None


@dataclass(frozen=True)
class PriorPlan:
    """How labels are adjusted to the target's class frequencies.

    Attributes:
        source: π_S, C shares: of pixels, or of images where ``method`` counts images. A class that has none is left
            as it is.
        target: π_T, where it is known; None estimates it.
        method: ``confusion`` finds the prior that explains what is predicted, given what is taken for what on source
            images (Lipton et al., 2018); ``em`` the most likely one under the network's own probabilities (Saerens et
            al., 2002); ``counts`` counts the images that show a class, as the published system does (methods §7.3).
        presence: ρ, C: an image shows a class whose g exceeds it; for ``counts``.
        damping: share of the old estimate that is kept when it moves.
        floor: least share of a class, of its share on the source: a rare class cannot be argued away.
        temperature: T at which the network's probabilities are its own: 1, or that of its training (Q-UL-2).
    """

    source: tuple[float, ...]
    target: tuple[float, ...] | None = None
    method: Method = "confusion"
    presence: tuple[float, ...] = ()
    damping: float = 0.5
    floor: float = 0.1
    temperature: float = 1.0

    @property
    def known(self) -> np.ndarray:
        """Which classes the source shows, bool C."""
        return np.array(self.source) > 0

    def bounded(self, estimate: np.ndarray) -> np.ndarray:
        """An estimate, C shares, with no class below its floor."""
        return with_floor(estimate, self.floor * np.array(self.source))

    def counts(self, evidence: Evidence) -> np.ndarray:
        """Images that show a class, float64 C."""
        return image_counts(evidence.log_means, np.array(self.presence)) * self.known.astype(np.float64)

    def posteriors(self, evidence: Evidence) -> np.ndarray:
        """Probabilities of the known classes, a row a cell, float32."""
        rows = decode_posteriors(evidence.posteriors.reshape(-1, evidence.posteriors.shape[-1]))[:, self.known]
        return rows / np.maximum(rows.sum(1, keepdims=True), np.finfo(np.float32).tiny)

    def offset(self, target: np.ndarray) -> np.ndarray:
        """What a target prior adds to class scores, float32 C; 0 for a class that the source never shows."""
        return self.offset_from(np.array(self.source), target)

    def offset_from(self, before: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The same for a network that sees other class frequencies than the source's."""
        known = self.known
        return (self.temperature * self.spread(log_ratio(target[known], before[known]))).astype(np.float32)

    def part(self, evidence: Evidence, target: np.ndarray) -> Part:
        """What evidence adds to a live estimate that now stands at a target prior."""
        means = evidence.means.sum(0, dtype=np.float64)
        seen = means
        if self.method == "counts":
            seen = self.counts(evidence)
        elif self.method == "em":
            known = self.known
            mean = responsibilities(self.posteriors(evidence), target[known], np.array(self.source)[known])
            seen = len(evidence.posteriors) * self.spread(mean)
        rows = [np.stack([seen, means])]
        if evidence.source is not None and evidence.source.any():
            rows.append(evidence.source)
        return Part(np.concatenate(rows))

    def spread(self, shares_of_known: np.ndarray) -> np.ndarray:
        """Numbers of the known classes among all, float64 C."""
        every = np.zeros(len(self.source))
        every[self.known] = shares_of_known
        return every


def estimated(plan: PriorPlan, evidence: Evidence) -> np.ndarray:
    """The target prior that evidence of the whole target set speaks for, float64 C, no class below its floor."""
    source = np.array(plan.source)
    if plan.method == "counts":
        counts = plan.counts(evidence)
        return plan.bounded(shares(counts) if counts.any() else source)
    if plan.method == "confusion":
        predicted = evidence.means.sum(0)
        if evidence.source is None or not (evidence.source.any() and predicted.any()):
            return plan.bounded(source)
        return plan.bounded(confusion_prior(evidence.source, predicted, source))
    return plan.bounded(plan.spread(em_prior(plan.posteriors(evidence), source[plan.known])))


@dataclass(frozen=True)
class Part:
    """What a chunk adds to a live estimate, summed by its teacher: one small array, since the bank reads many.

    Attributes:
        sums: float64 (2 or 2 + C)×C. The first row is what the estimate is made of: images that show a class, mean
            probabilities, or responsibilities. The second is the sum of mean probabilities, the rest the confusion on
            source images, where one was looked at.
    """

    sums: np.ndarray


class PriorEstimate:
    """The target prior, as chunk after chunk is labelled anew. Plain object.

    With ``frozen`` nothing moves before the whole set has been surveyed once, and nothing after. Otherwise a chunk
    counts as it was last labelled, and what was seen on source images fades (:data:`KEPT`). For ``em`` that is
    incremental expectation maximisation (Neal & Hinton, 1998): a chunk's part is computed under the estimate that it
    was labelled with.

    Args:
        plan: with ``target`` None.
        chunks: number of images in every chunk.
        frozen: one estimate for good.
    """

    def __init__(self, plan: PriorPlan, chunks: list[int], frozen: bool) -> None:
        classes = len(plan.source)
        self.plan, self.chunks, self.frozen = plan, chunks, frozen
        self.target = np.array(plan.source, np.float64)
        self.predicted: np.ndarray | None = None
        """Shares of the known classes in what the network that labels sees itself, float64 C, of a live estimate."""
        self.settled = False
        """Whether a frozen estimate is made."""
        self.evidence: dict[int, Evidence] = {}
        """Of the chunks that are surveyed."""
        self.parts: dict[int, np.ndarray] = {}
        """The first two rows of the parts of a live estimate."""
        self.total, self.confusion = np.zeros((2, classes)), np.zeros((classes, classes))
        self.images = sum(chunks)
        self.moved = False
        self.waiting = 0
        """Images labelled since a live estimate moved."""

    @property
    def adjustment(self) -> Adjustment:
        """What teachers are told now.

        A network that learns from adjusted labels comes to see the target's frequencies by itself, and to adjust it in
        full once more would overshoot, round by round. So labels of such a network are adjusted no further than
        brings what it sees to the estimate, and not at all where it is beyond. With ``counts`` the two cannot be
        compared, one of images and one of pixels, and labels are adjusted in full.
        """
        offset = self.plan.offset(self.target)
        if self.predicted is not None and self.plan.method != "counts":
            offset = _no_further(offset, self.plan.offset_from(self.predicted, self.target))
        every = 1 if self.surveying else max(1, min(SOURCE_EVERY, self.images // SOURCE_LOOKS))
        return Adjustment(offset, not self.settled, self.plan.temperature, every, None if self.frozen else self.target)

    @property
    def surveying(self) -> bool:
        """Whether labels are made only to be asked for how frequent classes are."""
        return self.frozen and not self.settled

    def put(self, chunk: int, told: Evidence | Part | None) -> None:
        """Take what a chunk's new labels tell, None where none of its images can be read; move if enough is new.

        A frozen estimate that is made takes nothing more.
        """
        if self.settled:
            return
        if told is None:
            told = Evidence.nothing(len(self.plan.source))
        if self.frozen:
            assert isinstance(told, Evidence)
            self.evidence[chunk] = told
            if len(self.evidence) == len(self.chunks):
                every = Evidence.joined([part for _, part in sorted(self.evidence.items())])
                self.settle(estimated(self.plan, every))
            return
        sums = (told if isinstance(told, Part) else self.plan.part(told, self.target)).sums
        if chunk in self.parts:
            self.total -= self.parts[chunk]
        self.parts[chunk] = sums[:2]
        self.total += sums[:2]
        if len(sums) > 2:
            self.confusion += sums[2:]
        self.waiting += self.chunks[chunk]
        if self.waiting >= math.ceil(self.images * (NEXT_SHARE if self.moved else FIRST_SHARE)):
            self._move()

    def recall(self, target: np.ndarray, predicted: np.ndarray | None) -> None:
        """Go on from an estimate of before a resume, and from what the network saw then by itself."""
        self.settle(target)
        self.predicted = predicted

    def settle(self, target: np.ndarray) -> None:
        """Take an estimate; a frozen one stays."""
        self.target, self.settled = np.array(target, np.float64), self.frozen
        if self.frozen:
            self.evidence.clear()

    def _move(self) -> None:
        """Go towards what all parts say."""
        self.waiting = 0
        # Sums that went up and down may end a hair below 0.
        seen, means = np.maximum(self.total, 0.0)
        explained = self.plan.method != "confusion" or self.confusion.any()
        if not (seen.any() and means.any() and explained):
            return
        self.moved = True
        # No share is 0: a softmax has none, and in half precision it may look so.
        least = np.finfo(np.float32).tiny * means.sum()
        self.predicted = shares(np.where(self.plan.known, np.maximum(means, least), 0.0))
        estimate = shares(seen)
        if self.plan.method == "confusion":
            source = np.array(self.plan.source)
            estimate = confusion_prior(self.confusion, seen, source, start=self.target, iterations=STEPS)
            self.confusion *= KEPT
        self.settle(self.plan.bounded(damped(self.target, estimate, self.plan.damping)))


def _no_further(offset: np.ndarray, enough: np.ndarray) -> np.ndarray:
    """Of two offsets the one nearer to 0, class by class; 0 where they point apart."""
    nearer = np.where(np.abs(offset) <= np.abs(enough), offset, enough)
    return np.where(offset * enough > 0, nearer, np.float32(0.0)).astype(np.float32)


def source_looks(seeds: Sequence[int], every: int, images: int) -> list[int]:
    """Indices of the source images to look at beside target images with these seeds; a function of each seed alone."""
    return [(seed // every) % images for seed in seeds if seed % every == 0]
