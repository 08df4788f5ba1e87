"""What unlabelled target images tell about a network: signals that need no target label, and a score made of them.

All are means over the cells of the network's own grid. With p the softmax of the fused logits of a cell:
entropy −Σ p ln p / ln C; diversity, the same of the mean of p over all cells; disagreement, the share of cells in which
the two heads of a network that has two name different classes; agreement, consistency and stability, the shares in
which the student, the same network on the mirrored image, or the weights looked at before, name the same class as the
teaching network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.networks.segmenter import Outputs


class TargetSignals:
    """Accumulates the signals over batches of target images.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.cells = num_classes, 0
        self._entropy = 0.0
        self._mean = torch.zeros(num_classes, dtype=torch.float64)
        self._shares = torch.zeros(num_classes, dtype=torch.float64)
        self._same: dict[str, float] = {}

    @torch.no_grad()
    def update(self, logits: Outputs, others: Mapping[str, Tensor] | None = None) -> Tensor:
        """Count a batch.

        Args:
            logits: of the teaching network, (N, C, h, w) per head.
            others: classes (N, h, w) that others see in the same cells, by the name of the signal.

        Returns:
            The teaching network's own classes, int64 (N, h, w).
        """
        log_p = logits.fused().float().log_softmax(1)
        p = log_p.exp()
        winner = p.argmax(1)
        self.cells += winner.numel()
        self._entropy += float(-(p * log_p).sum())
        (_, primary), *further = logits.heads()
        for _, scores in further:
            self._same["disagreement"] = self._same.get("disagreement", 0.0) + float(
                (scores.argmax(1) != primary.argmax(1)).sum()
            )
        self._mean += p.sum((0, 2, 3)).double().cpu()
        self._shares += torch.bincount(winner.flatten(), minlength=self.num_classes).double().cpu()
        for name, classes in (others or {}).items():
            self._same[name] = self._same.get(name, 0.0) + float((classes == winner).sum())
        return winner

    def values(self) -> dict[str, float]:
        """The signals by name, each in 0..1, and their ``label_free_score``. Empty before the first batch."""
        if not self.cells:
            return {}
        scale = math.log(self.num_classes)
        mean = self._mean / self.cells
        signals = {
            "entropy": self._entropy / self.cells / scale,
            "diversity": float(-torch.special.xlogy(mean, mean).sum()) / scale,
            **{name: same / self.cells for name, same in self._same.items()},
        }
        return {**signals, "label_free_score": label_free_score(signals)}

    def class_shares(self) -> list[float]:
        """Share of the cells in which every class wins."""
        return (self._shares / max(1, self.cells)).tolist()


def label_free_score(signals: Mapping[str, float]) -> float:
    """How good a network looks without a label; higher is better, and two steps of one run can be compared.

    The mutual information between cells and classes, diversity − entropy (Bridle et al., NIPS 1991; sure about every
    cell, yet not of one class everywhere), less the disagreement of the heads, where there are two.
    """
    return signals["diversity"] - signals["entropy"] - signals.get("disagreement", 0.0)


SCORES: dict[str, tuple[str, Callable[[Mapping[str, float]], float]]] = {
    "entropy": ("certainty: minus the entropy of a cell", lambda s: -s["entropy"]),
    "information": ("diversity of the classes less entropy", lambda s: s["diversity"] - s["entropy"]),
    "disagreement": ("agreement of the two heads", lambda s: -s["disagreement"]),
    "agreement": ("agreement of student and average", lambda s: s["agreement"]),
    "consistency": ("agreement with the mirrored image", lambda s: s["consistency"]),
    "stability": ("share of cells whose pseudo label has not changed since the look before", lambda s: s["stability"]),
    "source_miou": ("mIoU on source images that are held out", lambda s: s["source_miou"]),
    "label_free": ("diversity less entropy and disagreement of the heads", label_free_score),
    "combined": (
        "mIoU on source images that are held out, and agreement with the mirrored target image",
        lambda s: s["source_miou"] + s["consistency"],
    ),
}
"""Scores by which networks of different runs can be ranked without a target label, higher is better: in words, and made
of the signals. One whose signal is missing raises KeyError. How well each ranks: ``docs/sweeps.md``."""
NEED_SOURCE = ("source_miou", "combined")
"""Those for which source images must be held out."""
