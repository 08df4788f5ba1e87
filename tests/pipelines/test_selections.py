import numpy as np
import pytest

from models.selection import confidence_histogram
from pipelines.selections import InstanceAdaptiveSelection, PercentileSelection

CLASSES = 3


def record(seed, pixels=3000):
    """A record of one image of a stationary set: classes of unlike sureness, the last of them rare."""
    rng = np.random.default_rng(seed)
    label = rng.choice(CLASSES, pixels, p=[0.6, 0.39, 0.01])
    confidence = rng.random(pixels) ** np.array([0.1, 0.4, 1.0])[label]
    label = np.where(rng.random(pixels) < 0.05, 255, label)
    return {"label": label.astype(np.uint8), "confidence": np.rint(255 * confidence).astype(np.uint8)}


def histogram(*records):
    return sum(confidence_histogram(r["label"], r["confidence"], CLASSES) for r in records)


def step(theta, image, selection):
    """One image of the published recursion, in plain Python: the new thresholds in 0..1."""
    new = []
    for c, threshold in enumerate(theta):
        own = [v / 255 for v, k in zip(image["confidence"].tolist(), image["label"].tolist(), strict=True) if k == c]
        falling = sorted([*own, threshold], reverse=True)
        rank = max(1, int(np.ceil(selection.alpha * threshold**selection.gamma * len(falling))))
        new.append(selection.beta * threshold + (1 - selection.beta) * falling[rank - 1])
    return new


def test_percentiles_keep_their_share_and_what_is_sure():
    selection = PercentileSelection(keep_share=0.5, sure=0.9)
    image = {"label": np.zeros(4, np.uint8), "confidence": np.array([10, 20, 30, 40], np.uint8)}
    thresholds = selection.thresholds(histogram(image))
    assert thresholds.tolist() == [30, 0, 0]
    assert selection.apply(image, thresholds).tolist() == [255, 255, 0, 0]


def test_the_history_is_where_the_published_recursion_comes_to_rest():
    selection = InstanceAdaptiveSelection()
    images = [record(seed) for seed in range(40)]
    theta, rested = [0.9] * CLASSES, []
    for turn in range(3):
        for image in images:
            theta = step(theta, image, selection)
            rested += [theta] if turn else []
    found = selection.thresholds(histogram(*images)) / 255
    np.testing.assert_allclose(found, np.mean(rested, axis=0), atol=0.005)


def test_an_image_takes_one_step_of_the_recursion_from_the_history():
    selection = InstanceAdaptiveSelection(alpha=0.3, beta=0.5, gamma=4.0)
    thresholds = np.array([230, 150, 90], np.uint8)
    for seed in range(5):
        image = record(seed, pixels=500)
        theta = step((thresholds / 255).tolist(), image, selection)
        bound = np.array([*theta, *[2.0] * 253])[image["label"]]
        expected = np.where(image["confidence"] / 255 >= bound - 1e-9, image["label"], 255)
        np.testing.assert_array_equal(selection.apply(image, thresholds), expected)


def test_a_hard_image_keeps_pixels_that_one_threshold_for_all_would_withhold():
    selection = InstanceAdaptiveSelection(alpha=0.5, beta=0.5, gamma=0.0)
    easy = {"label": np.zeros(4, np.uint8), "confidence": np.array([200, 210, 220, 230], np.uint8)}
    hard = {"label": np.zeros(4, np.uint8), "confidence": np.array([100, 110, 120, 199], np.uint8)}
    thresholds = np.array([200], np.uint8)
    # Half of the pixels and θ, three of five: down to 210 and to 120. Blended with 200: 205 and 160.
    assert selection.apply(easy, thresholds).tolist() == [255, 0, 0, 0]
    assert selection.apply(hard, thresholds).tolist() == [255, 255, 255, 0]


def test_what_an_image_keeps_does_not_depend_on_images_before_it():
    selection, images = InstanceAdaptiveSelection(), [record(seed) for seed in range(3)]
    thresholds = selection.thresholds(histogram(*images))
    forwards = [selection.apply(image, thresholds) for image in images]
    backwards = [selection.apply(image, thresholds) for image in reversed(images)]
    for one, other in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(selection.thresholds(histogram(*reversed(images))), thresholds)


def test_an_image_without_a_label_keeps_none():
    image = {"label": np.full((2, 3), 255, np.uint8), "confidence": np.zeros((2, 3), np.uint8)}
    kept = InstanceAdaptiveSelection().apply(image, np.array([230, 230, 230], np.uint8))
    assert kept.shape == (2, 3)
    assert (kept == 255).all()


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"gamma": -1.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        InstanceAdaptiveSelection(**wrong).thresholds(histogram(record(0)))
