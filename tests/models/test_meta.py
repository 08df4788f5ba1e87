import math

import pytest
import torch

from models.meta import meta_alpha, meta_coefficient, meta_epoch, noisy_rectangle


@pytest.mark.parametrize(
    ("epoch", "alpha"), [(10, 0.2840), (25, 0.8682), (26, 1.0), (49, 1.0), (1, math.expm1(1 / 40))]
)
def test_alpha_has_the_published_values(epoch, alpha):
    assert meta_alpha(epoch) == pytest.approx(alpha, abs=5e-5)


def test_the_first_epoch_makes_the_coefficient_one_whatever_the_losses():
    assert meta_alpha(0) is None
    assert meta_coefficient(0, 2.5e-4, torch.tensor(3.0), torch.tensor(0.0)).item() == 1.0


@pytest.mark.parametrize(("epoch", "factor"), [(10, math.exp(0.25) - 1), (25, math.exp(0.625) - 1), (30, 1.0)])
def test_the_coefficient_is_the_product_without_a_gradient(epoch, factor):
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, 0.7))
    found = meta_coefficient(epoch, 2.5e-4, a, b)
    assert found.item() == pytest.approx(factor * 2.5e-4 * 1.5 * 0.7, rel=1e-12)
    assert not found.requires_grad


def test_an_epoch_is_a_fiftieth_of_a_stage_of_any_length():
    assert [meta_epoch(step, 6250) for step in (0, 124, 125, 3249, 3250, 6249)] == [0, 0, 1, 25, 26, 49]
    assert [meta_epoch(step, 100) for step in (0, 1, 2, 99, 100)] == [0, 0, 1, 49, 49]


def test_a_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="the epoch is -1"):
        meta_alpha(-1)


def test_noise_lies_in_one_rectangle_an_image_and_is_normal():
    images = torch.zeros(500, 3, 24, 32)
    seen = noisy_rectangle(images, 2.0, seed=5)
    inside = seen != 0
    for image in inside:
        assert (image[0] == image[1]).all()
        rows, columns = image[0].any(1).nonzero().flatten(), image[0].any(0).nonzero().flatten()
        assert image[0].sum() == len(rows) * len(columns)
        assert rows.tolist() == list(range(rows[0], rows[-1] + 1))
    assert seen[inside].std().item() == pytest.approx(2.0, rel=0.02)
    assert seen[inside].mean().abs().item() < 0.05
    # Two uniform rows are a third of the height apart on average.
    assert inside[:, 0].any(2).float().mean().item() == pytest.approx(1 / 3 + 1 / 24, abs=0.04)


def test_noise_is_a_function_of_its_seed_and_may_differ_by_channel():
    images = torch.randn(2, 3, 20, 30)
    assert torch.equal(noisy_rectangle(images, 1.0, 3), noisy_rectangle(images, 1.0, 3))
    assert not torch.equal(noisy_rectangle(images, 1.0, 3), noisy_rectangle(images, 1.0, 4))
    only = noisy_rectangle(images, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1), 3) - images
    assert not only[:, 0].any()
    assert only[:, 1].any()
