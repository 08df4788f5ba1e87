import numpy as np
import pytest
import torch

from models.class_alignment import alignment_loss, soft_encodings


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape) * 2


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def encodings():
    return np.minimum(softmax(3 * normal((2, 3, 4, 5), 1)), 0.9)


def test_encodings_are_softened_and_clipped_but_not_normalised_again():
    z = 5 * normal((2, 3, 4, 5), 0)
    expected = np.minimum(softmax(z / 1.8), 0.9)
    found = soft_encodings(torch.from_numpy(z).float()).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.max() == np.float32(0.9)
    assert found.sum(1).min() < 0.95


def test_temperature_and_clip_are_what_they_are_asked_to_be():
    z = torch.tensor([[2.0, 0.0]]).view(1, 2, 1, 1)
    assert soft_encodings(z, temperature=1.0, clip=1.0)[0, 0].item() == pytest.approx(1 / (1 + np.exp(-2)))
    assert soft_encodings(z, temperature=2.0, clip=0.5).flatten().tolist() == pytest.approx([0.5, 1 / (1 + np.e)])


def test_no_gradient_passes_through_encodings_and_the_logits_stay_as_they_are():
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    before = z.detach().clone()
    assert not soft_encodings(z).requires_grad
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("half", ["source", "target"])
def test_the_loss_is_the_cross_entropy_with_the_encodings_in_one_half(half):
    d, a = normal((2, 6, 4, 5), 2), encodings()
    zeros = np.zeros_like(a)
    wanted = np.concatenate([a, zeros] if half == "source" else [zeros, a], axis=1)
    p = softmax(d)
    value = -(wanted * np.log(p)).sum(1).mean()
    gradient = (wanted.sum(1, keepdims=True) * p - wanted) / (2 * 4 * 5)

    scores = torch.from_numpy(d).float().requires_grad_()
    loss = alignment_loss(scores, torch.from_numpy(a).float(), half)
    loss.backward()
    np.testing.assert_allclose(loss.item(), value, rtol=1e-5)
    np.testing.assert_allclose(scores.grad.numpy(), gradient, atol=1e-6)


def test_a_discriminator_that_knows_nothing_pays_the_logarithm_of_its_channels():
    sure = torch.tensor([0.9, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    loss = alignment_loss(torch.zeros(1, 4, 3, 3), sure, "target")
    assert loss.item() == pytest.approx(0.9 * np.log(4))


def test_source_channels_come_first():
    scores = torch.tensor([9.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    first = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert alignment_loss(scores, first, "source").item() < 0.01
    assert alignment_loss(scores, first, "target").item() > 8.9


def test_great_scores_do_not_overflow():
    scores = 1e4 * torch.from_numpy(normal((1, 6, 2, 2), 3)).float()
    loss = alignment_loss(scores, torch.full((1, 3, 2, 2), 0.3), "source")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("shape", [(2, 5, 4, 5), (2, 3, 4, 5), (2, 6, 4, 4), (1, 6, 4, 5)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="twice as many channels on the same grid"):
        alignment_loss(torch.zeros(shape), torch.from_numpy(encodings()), "source")


def test_there_are_two_halves():
    with pytest.raises(ValueError, match="choose one of source, target"):
        alignment_loss(torch.zeros(2, 6, 4, 5), torch.from_numpy(encodings()), "left")
