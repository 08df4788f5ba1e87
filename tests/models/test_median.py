import math

import numpy as np
import pytest
import torch

from models.median import median_labels, median_thresholds, published_thresholds


def confident(values, winner, num_classes):
    """Probabilities (1, C, 1, n) in which a pixel's winner has the confidence that is asked for."""
    rest = (1 - torch.tensor(values, dtype=torch.float64)) / (num_classes - 1)
    p = rest.repeat(num_classes, 1)
    p[torch.tensor(winner), torch.arange(len(values))] = torch.tensor(values, dtype=torch.float64)
    return p[None, :, None, :]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.2, 0.4, 0.95], [False, True, True]),
        ([0.91, 0.95, 0.99], [True, True, True]),
        ([0.4, 0.5, 0.6, 0.7], [False, True, True, True]),  # the lower median of an even count
        ([0.3], [True]),
    ],
)
def test_the_median_rule_keeps_what_the_specification_says(values, kept):
    winner, confidence = torch.zeros(1, 1, len(values), dtype=torch.int64), torch.tensor([[values]])
    threshold = median_thresholds(winner, confidence, 2)[0, 0]
    assert (confidence >= threshold).flatten().tolist() == kept


def slow(p, cap):
    """Pixel by pixel, with sorted lists."""
    p = p.numpy().astype(np.float64)
    labels = np.full((len(p), *p.shape[2:]), 255)
    for image in range(len(p)):
        winner, sure = p[image].argmax(0), p[image].max(0)
        for c in range(p.shape[1]):
            values = sorted(sure[winner == c])
            if values:
                threshold = min(values[(len(values) - 1) // 2], cap)
                labels[image][(winner == c) & (sure >= threshold)] = c
    return labels


@pytest.mark.parametrize("cap", [0.9, 0.5, 0.3])
def test_labels_equal_those_of_a_loop_over_classes(cap):
    torch.manual_seed(1)
    p = (3 * torch.randn(3, 5, 9, 14, dtype=torch.float64)).softmax(1)
    p[1, 3] = 0  # a class that wins nowhere
    made = median_labels(p, cap)
    assert made.label.dtype == torch.uint8
    assert (made.label.numpy() == slow(p, cap)).all()
    assert (made.winner == p.argmax(1)).all()
    assert torch.equal(made.confidence, p.max(1).values)


def test_an_image_is_labelled_alike_alone_and_among_others():
    torch.manual_seed(2)
    p = (2 * torch.randn(4, 3, 8, 8)).softmax(1)
    assert torch.equal(median_labels(p).label[2:3], median_labels(p[2:3]).label)


def test_a_class_that_wins_nowhere_has_no_threshold():
    found = median_thresholds(torch.tensor([[[0, 2, 2]]]), torch.tensor([[[0.5, 0.6, 0.8]]]), 4)[0]
    assert found[[0, 2]].tolist() == pytest.approx([0.5, 0.6])
    assert found[[1, 3]].isnan().all()


def test_the_published_list_shifts_every_later_class():
    """Class 1 of 5 is absent: the list is t0, 0, NaN, t2, t3, t4, and class i reads entry i."""
    given = torch.tensor([[0.5, math.nan, 0.6, 0.7, 0.8]])
    read = published_thresholds(given)[0]
    assert read[[0, 1, 3, 4]].tolist() == pytest.approx([0.5, 0.0, 0.6, 0.7])
    assert read[2].isnan()


def test_a_published_nan_keeps_everything_of_the_class_that_reads_it():
    p = confident([0.9, 0.8, 0.4, 0.5, 0.6], [0, 0, 2, 2, 2], 3)
    assert median_labels(p).label.flatten().tolist() == [0, 0, 255, 2, 2]
    assert median_labels(p, published=True).label.flatten().tolist() == [0, 0, 2, 2, 2]


def test_where_every_class_wins_somewhere_the_published_list_is_right():
    torch.manual_seed(3)
    p = (2 * torch.randn(2, 3, 16, 16)).softmax(1)
    assert torch.equal(median_labels(p).label, median_labels(p, published=True).label)
