"""Scores over a whole set: confusion matrix, IoU per class, protocol means, accuracies, share of the gap closed.

A class that occurs in neither ground truth nor prediction has IoU NaN and does not enter a mean; the published means in
which it counts as 0 have names of their own. Sizes that differ are an error, never skipped. Methods 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

IGNORE = 255
EPSILON = 1e-5
"""BiSeNet's addition to the denominator of an IoU."""


class ConfusionMatrix:
    """Accumulates M over a set: row = ground truth, column = prediction, ignored ground truth left out.

    Args:
        num_classes: C.
        device: where to count.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.matrix = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Counts the pixels of one or more images.

        Args:
            prediction: integer classes 0..C-1, any shape.
            label: integer ground truth of the same shape, 255 ignored.

        Raises:
            ValueError: if the shapes differ, or a value is neither a class nor (in the label) 255.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} have different sizes; "
                "bring the prediction to the label's size before scoring"
            )
        prediction, label = prediction.to(self.matrix.device).long(), label.to(self.matrix.device).long()
        for name, values in (("prediction", prediction), ("label", label[label != IGNORE])):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise ValueError(
                    f"the {name} holds values from {int(values.min())} to {int(values.max())}, but the "
                    f"classes are 0 to {self.num_classes - 1}"
                )
        self.matrix += multiclass_confusion_matrix(
            prediction.flatten(), label.flatten(), self.num_classes, ignore_index=IGNORE, validate_args=False
        )

    def iou(self) -> Tensor:
        """IoU per class, float64 (C,), see ``iou``."""
        return iou(self.matrix)


def iou(matrix: Tensor) -> Tensor:
    """IoU_c = M_cc / (row_c + column_c - M_cc), float64 (C,); NaN where neither side has class c."""
    m = matrix.to(torch.float64)
    hit = m.diagonal()
    union = m.sum(dim=0) + m.sum(dim=1) - hit
    return torch.where(union > 0, hit / union, torch.full_like(hit, math.nan))


def mean_iou(per_class: Tensor | Sequence[float], classes: Sequence[int] | None = None) -> float:
    """Mean over the given classes (all by default) of those IoUs that are not NaN; NaN if none is.

    Raises:
        ValueError: if a class index does not exist.
    """
    values = torch.as_tensor(per_class, dtype=torch.float64)
    if classes is not None:
        if not all(0 <= index < len(values) for index in classes):
            raise ValueError(f"the protocol {list(classes)} names classes beyond the {len(values)} scored ones")
        values = values[list(classes)]
    return float(values.nanmean())


def protocol_means(per_class: Tensor | Sequence[float], protocols: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The mean of every protocol from one per-class row.

    SYNTHIA's 16 and 13 are subsets of the same 19-way row (methods 2.3, way b): a prediction of one of the
    three absent classes counts as an error.
    """
    return {name: mean_iou(per_class, classes) for name, classes in protocols.items()}


def absent_as_zero_means(
    matrix: Tensor, protocols: Mapping[str, Sequence[int]], epsilon: float = EPSILON
) -> dict[str, float]:
    """BiSeNet's plain mean of every protocol: IoU_c = M_cc / (row_c + column_c - M_cc + epsilon) over all its classes.

    A class that occurs nowhere counts as 0 there, and is left out of :func:`protocol_means`.
    """
    m = matrix.to(torch.float64)
    hit = m.diagonal()
    per_class = hit / (m.sum(dim=0) + m.sum(dim=1) - hit + epsilon)
    return {name: mean_iou(per_class, classes) for name, classes in protocols.items()}


def accuracy(matrix: Tensor) -> float:
    """Share of the labelled pixels of a set whose class is right; NaN without any."""
    m = matrix.to(torch.float64)
    return float(m.diagonal().sum() / m.sum())


def accuracy_ignored_wrong(prediction: Tensor, label: Tensor) -> float:
    """Share of all pixels of an image whose class is right, where an ignored one never is (Q-BI-5).

    Its mean over the images of a set is what BiSeNet's published tables call precision.

    Args:
        prediction: integer classes, any shape.
        label: integer ground truth of the same shape, 255 ignored.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} have different sizes")
    return float((prediction == label).double().mean())


def nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    """A label (H, W) at another size (height, width): of every new pixel the old one under its centre.

    As Pillow resizes; but it adds up fractions, and where a centre lies between two pixels its rounding may decide.
    """
    rows, columns = (
        (2 * torch.arange(wanted, device=label.device) + 1) * given // (2 * wanted)
        for wanted, given in zip(size, label.shape, strict=True)
    )
    return label[rows[:, None], columns]


def gap_closed(adapted: float, source_only: float, oracle: float | None) -> float | None:
    """(adapted - source_only) / (oracle - source_only); None without an oracle or without a gap."""
    if oracle is None or oracle == source_only:
        return None
    return (adapted - source_only) / (oracle - source_only)
