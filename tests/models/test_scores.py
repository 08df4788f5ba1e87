from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from models.scores import (
    ConfusionMatrix,
    absent_as_zero_means,
    accuracy,
    accuracy_ignored_wrong,
    gap_closed,
    iou,
    mean_iou,
    nearest,
    protocol_means,
)

RECTIFIED_SYNTHIA = "87.6 41.9 83.1 14.7 1.7 36.2 31.3 19.9 81.6 80.6 63.0 21.8 86.2 40.7 23.6 53.1"  # the 16 classes
SIXTEEN = [c for c in range(19) if c not in (9, 14, 16)]  # without terrain, truck, train
THIRTEEN = [c for c in SIXTEEN if c not in (3, 4, 5)]  # and without wall, fence, pole


def reference(prediction, label, classes):
    """IoU per class in NumPy."""
    valid = label != 255
    prediction, label = prediction[valid], label[valid]
    result = []
    for c in range(classes):
        union = ((prediction == c) | (label == c)).sum()
        result.append(((prediction == c) & (label == c)).sum() / union if union else np.nan)
    return np.array(result)


def test_iou_over_a_set_equals_the_reference():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, (6, 20, 30))
    prediction = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 6, label.shape))
    label[rng.random(label.shape) < 0.1] = 255
    matrix = ConfusionMatrix(7)  # class 5 is only predicted, class 6 occurs nowhere
    for p, y in zip(prediction, label, strict=True):
        matrix.update(torch.from_numpy(p.astype(np.uint8)), torch.from_numpy(y.astype(np.uint8)))
    expected = reference(prediction, label, 7)
    np.testing.assert_allclose(matrix.iou().numpy(), expected)
    assert expected[5] == 0.0
    assert np.isnan(expected[6])
    assert mean_iou(matrix.iou()) == pytest.approx(np.nanmean(expected))


def test_rows_are_ground_truth_and_columns_predictions():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 0, 255]))
    assert matrix.matrix.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]


def test_the_published_row_gives_the_published_16_and_13_means():
    per_class = [float("nan")] * 19
    for c, value in zip(SIXTEEN, RECTIFIED_SYNTHIA.split(), strict=True):
        per_class[c] = float(value)
    means = protocol_means(per_class, {"16": SIXTEEN, "13": THIRTEEN})
    assert means["16"] == pytest.approx(47.94, abs=0.005)
    assert means["13"] == pytest.approx(54.95, abs=0.005)


def test_sixteen_from_the_nineteen_way_matrix_is_19_sixteenths_of_the_mean_over_19():
    # Class 9 is predicted but never true: its IoU is 0, and the error it makes counts against class 8.
    matrix = torch.eye(19, dtype=torch.int64)
    for absent in (9, 14, 16):
        matrix[absent, absent] = 0
        matrix[8, absent] = 1
    row = iou(matrix)
    assert row[8].item() == 0.25
    assert mean_iou(row, SIXTEEN) == pytest.approx(mean_iou(row) * 19 / 16)


def test_an_image_without_labels_counts_nothing():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros(4, 4, dtype=torch.uint8), torch.full((4, 4), 255, dtype=torch.uint8))
    assert not matrix.matrix.any()
    assert np.isnan(mean_iou(matrix.iou()))


def test_gap_closed_is_the_share_of_the_way_to_the_oracle():
    assert gap_closed(35.0, 25.0, 45.0) == 0.5
    assert gap_closed(20.0, 25.0, 45.0) == -0.25
    assert gap_closed(35.0, 25.0, None) is None
    assert gap_closed(35.0, 25.0, 25.0) is None


def test_a_size_mismatch_is_an_error():
    with pytest.raises(ValueError, match="different sizes"):
        ConfusionMatrix(3).update(torch.zeros(4, 8), torch.zeros(8, 4))


@pytest.mark.parametrize(("prediction", "label", "name"), [(3, 0, "prediction"), (0, 3, "label")])
def test_a_value_that_is_no_class_is_an_error(prediction, label, name):
    with pytest.raises(ValueError, match=f"the {name} holds values from"):
        ConfusionMatrix(3).update(torch.tensor([prediction]), torch.tensor([label]))


def test_a_protocol_beyond_the_classes_is_an_error():
    with pytest.raises(ValueError, match="beyond"):
        mean_iou([0.5, 0.5], [0, 2])


def pairs(seed=3):
    """Predictions and labels of four images, some pixels ignored; class 5 occurs nowhere, class 4 only as a guess."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, (4, 20, 30)).astype(np.uint8)
    prediction = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 5, label.shape)).astype(np.uint8)
    for image, share in zip(label, (0, 0.1, 0.5, 0.9), strict=True):
        image[rng.random(image.shape) < share] = 255
    return prediction, label


def counted(prediction, label, classes):
    matrix = ConfusionMatrix(classes)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    return matrix.matrix


def test_bisenets_mean_takes_a_class_that_occurs_nowhere_for_0():
    prediction, label = pairs()
    valid = label != 255
    p, y = prediction[valid], label[valid]
    ious = [((p == c) & (y == c)).sum() / (((p == c) | (y == c)).sum() + 1e-5) for c in range(6)]
    means = absent_as_zero_means(counted(prediction, label, 6), {"6": range(6), "2": (0, 5)})
    assert means == {"6": pytest.approx(np.mean(ious), abs=1e-12), "2": pytest.approx(ious[0] / 2, abs=1e-12)}
    assert means["6"] == pytest.approx(5 / 6 * np.nanmean(reference(prediction, label, 6)), abs=1e-6)


def test_the_addition_to_the_denominator_is_seen_where_it_is_large():
    matrix = torch.tensor([[2, 1], [0, 3]])
    assert absent_as_zero_means(matrix, {"2": (0, 1)}, epsilon=1.0)["2"] == pytest.approx((2 / 4 + 3 / 5) / 2)


def test_accuracy_leaves_ignored_pixels_out_and_the_published_one_counts_them_as_errors():
    prediction, label = pairs()
    right = (prediction == label).sum()
    assert accuracy(counted(prediction, label, 6)) == pytest.approx(right / (label != 255).sum())
    strict = [
        accuracy_ignored_wrong(torch.from_numpy(p), torch.from_numpy(y)) for p, y in zip(prediction, label, strict=True)
    ]
    assert strict == pytest.approx([(p == y).sum() / p.size for p, y in zip(prediction, label, strict=True)])
    assert strict[3] < 0.15 < 0.5 < accuracy(counted(prediction[3:], label[3:], 6))


def test_accuracy_without_a_labelled_pixel_is_no_number():
    nothing = np.full((2, 3), 255, np.uint8)
    assert np.isnan(accuracy(counted(np.zeros_like(nothing), nothing, 3)))
    assert accuracy_ignored_wrong(torch.zeros(2, 3, dtype=torch.uint8), torch.from_numpy(nothing)) == 0.0


def test_accuracy_of_maps_of_different_sizes_is_an_error():
    with pytest.raises(ValueError, match="different sizes"):
        accuracy_ignored_wrong(torch.zeros(4, 8), torch.zeros(8, 8))


@pytest.mark.parametrize("size", [(64, 32), (32, 32), (128, 64), (256, 128), (512, 16), (1, 1)])
def test_labels_are_resized_as_pillow_resizes_them(size):
    label = np.random.default_rng(0).integers(0, 256, (64, 128)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    np.testing.assert_array_equal(nearest(torch.from_numpy(label), size[::-1]).numpy(), expected)


def test_a_pixel_shows_the_one_under_its_centre_at_any_ratio():
    columns = torch.arange(1280)[None].expand(3, -1)
    found = nearest(columns, (2, 719))
    assert found.shape == (2, 719)
    np.testing.assert_array_equal(
        found[1].numpy(), [int((Fraction(i) + Fraction(1, 2)) * 1280 / 719) for i in range(719)]
    )
