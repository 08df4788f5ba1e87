import numpy as np
import pytest
import torch

from models.label_shift import (
    adjusted_logits,
    adjusted_probabilities,
    log_mean_exp,
    refinement_loss,
    sampled_posteriors,
)
from models.priors import decode_posteriors, encode_posteriors, log_ratio

OFFSET = log_ratio([0.1, 0.3, 0.4, 0.2], [0.4, 0.3, 0.1, 0.2])


def offset():
    return torch.from_numpy(OFFSET)


def scores(shape=(2, 4, 3, 5), seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 2


def labels(shape=(2, 3, 5), ignored=0.3, seed=1):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < ignored, 255, rng.integers(0, 4, shape))


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(z, y):
    """Sum over labelled pixels and its gradient, float64."""
    p, classes = softmax(z), np.arange(z.shape[1])[:, None, None]
    hot = (y[:, None] == classes).astype(np.float64)
    return -(hot * np.log(p)).sum(), (p - hot) * (y != 255)[:, None]


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 7), (2, 4, 3, 5)])
def test_the_adjustment_adds_each_class_its_offset(shape):
    z = scores(shape)
    expected = z + OFFSET.reshape(1, 4, *[1] * (len(shape) - 2))
    found = adjusted_logits(torch.from_numpy(z).float(), offset())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_a_class_of_which_the_target_has_more_wins_where_it_nearly_won():
    z = torch.tensor([[1.0, 0.0, 0.9, 0.0]])
    assert z.argmax(1).item() == 0
    assert adjusted_logits(z, offset()).argmax(1).item() == 2


def test_learning_through_the_adjustment_is_cross_entropy_of_the_adjusted_scores():
    z, y = torch.from_numpy(scores()).float().requires_grad_(), labels()
    loss = torch.nn.functional.cross_entropy(
        adjusted_logits(z, offset()), torch.from_numpy(y), ignore_index=255, reduction="sum"
    )
    loss.backward()
    value, gradient = cross_entropy(scores() + OFFSET[:, None, None], y)
    np.testing.assert_allclose(loss.item(), value, rtol=1e-5)
    np.testing.assert_allclose(z.grad.numpy(), gradient, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_adjusted_probabilities_are_the_softmax_of_adjusted_scores(dim):
    z = scores()
    p = np.moveaxis(softmax(z), 1, dim)
    expected = np.moveaxis(softmax(z + OFFSET[:, None, None]), 1, dim)
    given = torch.from_numpy(p.copy()).float()
    found = adjusted_probabilities(given, offset(), dim)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(given.numpy(), p.astype(np.float32), "the argument stays as it was")


@pytest.mark.parametrize("adjust", [adjusted_logits, adjusted_probabilities])
def test_an_offset_for_other_classes_is_refused(adjust):
    with pytest.raises(ValueError, match="one offset for each of the 3 classes"):
        adjust(torch.rand(2, 3, 4, 4), offset())


def test_the_log_mean_exponential_is_taken_of_probabilities():
    p = softmax(scores((3, 4, 6, 8)))
    found = log_mean_exp(torch.from_numpy(p).float())
    np.testing.assert_allclose(found.numpy(), np.log(np.exp(p).mean((2, 3))), atol=1e-6)


def test_of_a_hard_mask_it_is_a_function_of_the_area():
    mask = torch.zeros(1, 2, 10, 10)
    mask[0, 0, :3] = 1
    mask[0, 1, 3:] = 1
    expected = [[np.log1p((np.e - 1) * 0.3), np.log1p((np.e - 1) * 0.7)]]
    np.testing.assert_allclose(log_mean_exp(mask).numpy(), expected, atol=1e-6)


def test_a_trace_of_a_rare_class_is_not_rounded_away():
    p = torch.full((1, 1, 50, 50), 3e-6)
    assert log_mean_exp(p).item() == pytest.approx(3e-6, rel=1e-4)


def test_sampled_cells_are_cells_of_the_image_encoded():
    p = softmax(scores((2, 4, 6, 7)))
    found = sampled_posteriors(torch.from_numpy(p).float(), 11, [3, 4])
    assert found.dtype == torch.uint8
    assert found.shape == (2, 11, 4)
    for image, rows in zip(p, found.numpy(), strict=True):
        own = {tuple(row) for row in encode_posteriors(image.reshape(4, -1).T.astype(np.float32))}
        drawn = {tuple(row) for row in rows}
        assert drawn <= own
        assert len(drawn) == 11, "no cell twice"


def test_what_is_sampled_depends_on_the_images_seed_alone():
    p = torch.from_numpy(softmax(scores((3, 4, 6, 7))))
    together = sampled_posteriors(p, 9, [5, 6, 5])
    assert torch.equal(sampled_posteriors(p[1:2], 9, [6])[0], together[1])
    alike = p[:1].expand(3, -1, -1, -1)
    first, second, third = sampled_posteriors(alike, 9, [5, 6, 5])
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("cells", "times"), [(6, [1] * 6), (8, [2, 1, 1, 2, 1, 1]), (12, [2] * 6)])
def test_a_small_image_gives_all_its_cells_evenly(cells, times):
    # Six cells, each sure of a class of its own.
    p = torch.eye(6).reshape(1, 6, 2, 3)
    counts = decode_posteriors(sampled_posteriors(p, cells, [0]).numpy())[0].sum(0)
    np.testing.assert_allclose(counts, times)


def test_samples_of_every_image_need_a_seed_of_every_image():
    with pytest.raises(ValueError, match="1 seeds for 2 images"):
        sampled_posteriors(torch.rand(2, 4, 3, 3), 5, [1])


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_refinement_learns_scores_that_are_offset_the_other_way(over):
    z, y = torch.from_numpy(scores()).float().requires_grad_(), labels()
    loss = refinement_loss(z, torch.from_numpy(y), offset(), over=over)
    loss.backward()
    value, gradient = cross_entropy(scores() - OFFSET[:, None, None], y)
    pixels = y.size if over == "all" else (y != 255).sum()
    np.testing.assert_allclose(loss.item(), value / pixels, rtol=1e-5)
    np.testing.assert_allclose(z.grad.numpy(), gradient / pixels, atol=1e-6)


def test_refinement_divides_by_all_pixels_unless_told_otherwise():
    # CE of equal scores is ln 4; one of four pixels is labelled.
    z, y = torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 255], [255, 255]]])
    none = torch.zeros(4)
    assert refinement_loss(z, y, none).item() == pytest.approx(np.log(4) / 4)
    assert refinement_loss(z, y, none, over="labelled").item() == pytest.approx(np.log(4))


def test_refinement_rests_at_scores_with_the_targets_frequencies():
    # Where nothing but the source's own frequencies, 40 30 10 20, can be learned, z - δ learns them.
    y = torch.tensor([0] * 40 + [1] * 30 + [2] * 10 + [3] * 20).view(1, 10, 10)
    gradients = []
    for frequencies in ([0.1, 0.3, 0.4, 0.2], [0.4, 0.3, 0.1, 0.2]):
        z = torch.tensor(frequencies).log().requires_grad_()
        refinement_loss(z.view(1, 4, 1, 1).expand(1, 4, 10, 10), y, offset()).backward()
        gradients.append(z.grad.abs().max().item())
    assert gradients[0] < 1e-6
    assert gradients[1] > 0.1


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_without_a_labelled_pixel_refinement_is_exactly_zero(over):
    z = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = refinement_loss(z, torch.full((1, 3, 3), 255), offset(), over=over)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_bad_input_of_refinement_is_refused():
    z, y = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="choose one of all, labelled"):
        refinement_loss(z, y, offset(), over="valid")
    with pytest.raises(ValueError, match="same pixels"):
        refinement_loss(z, y[:, :1], offset())
    with pytest.raises(ValueError, match="one offset for each"):
        refinement_loss(z[:, :3], y, offset())
