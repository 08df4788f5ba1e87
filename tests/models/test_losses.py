"""Losses against NumPy in float64: values, and gradients by central differences of the NumPy formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.losses import (
    ClassBalance,
    class_counts,
    domain_loss,
    entropy_loss,
    memory_regularisation,
    negative_terms,
    percentile,
    pixel_cross_entropy,
    rectified_terms,
    segmentation_loss,
)
from models.networks.deeplab import Logits

C, GRID = 4, (2, 3, 4)
RNG = np.random.default_rng(7)
Z_P = 2 * RNG.standard_normal((GRID[0], C, *GRID[1:]))
Z_A = 2 * RNG.standard_normal((GRID[0], C, *GRID[1:]))
LABELS = RNG.integers(0, C, GRID)
LABELS[0, 0] = 255
WEIGHTS = np.array([1.0, 7.0, 2.5, 1.3])
PIXELS = RNG.random(GRID)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z, labels, weights):
    """w_y * CE per pixel, zero where ignored."""
    safe = np.where(labels == 255, 0, labels)
    picked = np.take_along_axis(log_softmax(z), safe[:, None], axis=1)[:, 0]
    return np.where(labels == 255, 0.0, -weights[safe] * picked)


def kl(u, v):
    return (np.exp(u) * (u - v)).sum(axis=1)


def numeric_gradient(function, z, step=1e-6):
    gradient = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def check(ours, reference, *arrays, tolerance=1e-7):
    """Same value, same gradient with respect to every array."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    loss = ours(*tensors)
    assert loss.item() == pytest.approx(reference(*arrays), rel=1e-10, abs=1e-12)
    loss.backward()
    for position, tensor in enumerate(tensors):

        def moved(z, position=position):
            return reference(*[z if k == position else array for k, array in enumerate(arrays)])

        np.testing.assert_allclose(
            tensor.grad.numpy(), numeric_gradient(moved, arrays[position]), atol=tolerance, rtol=1e-5
        )


def labels(values=LABELS):
    return torch.from_numpy(values)


def weights():
    return torch.from_numpy(WEIGHTS)


# Cross-entropies.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixel_cross_entropy_is_weighted_and_zero_where_ignored(dtype):
    ours = pixel_cross_entropy(torch.tensor(Z_P), labels().to(dtype), weights())
    np.testing.assert_allclose(ours.numpy(), cross_entropy(Z_P, LABELS, WEIGHTS), atol=1e-12)


def reference_segmentation(z, percent, pixels=1.0):
    losses = cross_entropy(z, LABELS, WEIGHTS)
    kept = LABELS != 255
    if percent:
        kept &= losses >= np.percentile(losses, percent)
    return (losses * pixels)[kept].sum() / WEIGHTS[LABELS[kept]].sum()


@pytest.mark.parametrize("percent", [0.0, 50.0, 80.0])
def test_segmentation_loss_is_the_weighted_mean_of_the_hardest_pixels(percent):
    check(
        lambda z: segmentation_loss(z, labels(), weights(), hard_percentile=percent),
        lambda z: reference_segmentation(z, percent),
        Z_P,
    )


def test_pixel_weights_multiply_the_losses_but_not_the_normaliser():
    check(
        lambda z: segmentation_loss(
            z, labels(), weights(), hard_percentile=50.0, pixel_weights=torch.from_numpy(PIXELS)
        ),
        lambda z: reference_segmentation(z, 50.0, PIXELS),
        Z_P,
    )


def test_without_class_weights_it_is_the_plain_mean():
    z = torch.tensor(Z_P)
    plain = torch.nn.functional.cross_entropy(z, labels(), ignore_index=255)
    assert segmentation_loss(z, labels()).item() == pytest.approx(plain.item())


def test_the_percentile_counts_ignored_zeros():
    # Ten pixels, eight of them ignored: the 80th percentile lies at 0.2 between the 8th and the 9th value.
    z = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2).repeat(1, 1, 1, 5).requires_grad_()
    y = torch.full((1, 1, 10), 255)
    y[0, 0, :2] = 0
    loss = segmentation_loss(z, y, hard_percentile=80.0)
    both = (np.log(2) + np.log(1 + np.exp(3))) / 2
    assert loss.item() == pytest.approx(both, rel=1e-6), "tau lies below both, so both stay"


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    percent=st.floats(0, 100),
)
def test_the_percentile_is_numpys(values, percent):
    ours = percentile(torch.tensor(values, dtype=torch.float64), percent).item()
    assert ours == pytest.approx(np.percentile(np.array(values), percent), rel=1e-9, abs=1e-9)


def test_the_percentile_has_no_limit_at_sixteen_million_values():
    values = torch.zeros(17_000_000)
    values[:4_000_000] = 1.0
    assert percentile(values, 80.0).item() == 1.0
    assert percentile(values, 70.0).item() == 0.0


@pytest.mark.parametrize("percent", [0.0, 80.0])
def test_a_label_with_nothing_in_it_costs_exactly_zero(percent):
    z = torch.tensor(Z_P, requires_grad=True)
    loss = segmentation_loss(z, torch.full(GRID, 255), weights(), hard_percentile=percent)
    loss.backward()
    assert loss.item() == 0.0
    assert not z.grad.any()


def test_hopeless_predictions_give_finite_gradients():
    z = torch.tensor(Z_P).float().mul(1e4).requires_grad_()
    segmentation_loss(z, labels(), weights().float(), hard_percentile=80.0).backward()
    assert torch.isfinite(z.grad).all()


# Two-head terms.


def fuse(z_p, z_a):
    return log_softmax(0.5 * z_a + z_p)


def test_memory_regularisation_pulls_both_heads_to_their_frozen_fusion():
    memory = fuse(Z_P, Z_A)  # a constant for the differences: the gradient stops at m
    check(
        lambda p, a: memory_regularisation(Logits(a, p)),
        lambda p, a: (kl(memory, log_softmax(p)) + kl(memory, log_softmax(a))).mean(),
        Z_P,
        Z_A,
    )


def test_the_entropy_term_weighs_by_frozen_confidence():
    confidence = (np.exp(fuse(Z_P, Z_A)) ** 2).sum(axis=1)

    def reference(p, a):
        log_p = fuse(p, a)
        return -(confidence * (np.exp(log_p) * log_p).sum(axis=1)).mean()

    check(lambda p, a: entropy_loss(Logits(a, p)), reference, Z_P, Z_A)


DISTANCES = {
    "published": lambda p, a: (kl(a, p), kl(p, a)),
    "main_to_aux": lambda p, a: (kl(p, a), kl(p, a)),
    "aux_to_main": lambda p, a: (kl(a, p), kl(a, p)),
    "squared": lambda p, a: (((np.exp(p) - np.exp(a)) ** 2).sum(axis=1),) * 2,
}


@pytest.mark.parametrize("divergence", list(DISTANCES))
@pytest.mark.parametrize("pixels", [None, PIXELS])
def test_the_rectified_loss_and_its_alternatives(divergence, pixels):
    def reference(p, a):
        main_d, aux_d = DISTANCES[divergence](log_softmax(p), log_softmax(a))
        share = 1.0 if pixels is None else pixels
        main = (cross_entropy(p, LABELS, WEIGHTS) * share * np.exp(-main_d)).mean() + main_d.mean()
        aux = (cross_entropy(a, LABELS, WEIGHTS) * share * np.exp(-aux_d)).mean() + aux_d.mean()
        return main + 0.5 * aux

    check(
        lambda p, a: rectified_terms(
            Logits(a, p),
            labels(),
            weights(),
            divergence=divergence,
            pixel_weights=None if pixels is None else torch.from_numpy(pixels),
        ).total(),
        reference,
        Z_P,
        Z_A,
    )


def test_a_withheld_pixel_adds_its_divergence_and_counts_in_the_mean():
    main, aux = torch.tensor(Z_P), torch.tensor(Z_A)
    some = rectified_terms(Logits(aux, main), labels(), weights())
    none = rectified_terms(Logits(aux, main), torch.full(GRID, 255), weights())
    assert none.main_divergence.item() == some.main_divergence.item() > 0
    d = kl(log_softmax(Z_A), log_softmax(Z_P))
    expected = (cross_entropy(Z_P, LABELS, WEIGHTS) * np.exp(-d)).sum() / LABELS.size
    assert some.main_ce.item() == pytest.approx(expected)


def test_an_empty_pseudo_label_gives_exactly_no_cross_entropy_and_finite_gradients():
    main = torch.tensor(Z_P).float().mul(1e3).requires_grad_()
    aux = torch.tensor(Z_A).float().mul(1e3).requires_grad_()
    terms = rectified_terms(Logits(aux, main), torch.full(GRID, 255, dtype=torch.uint8), weights().float())
    terms.total().backward()
    assert terms.main_ce.item() == terms.aux_ce.item() == 0.0
    assert torch.isfinite(main.grad).all()
    assert torch.isfinite(aux.grad).all()


def test_equal_heads_make_the_rectified_loss_plain_cross_entropy():
    z = torch.tensor(Z_P)
    terms = rectified_terms(Logits(z, z), labels(), weights())
    assert terms.main_divergence.item() == pytest.approx(0.0, abs=1e-12)
    assert terms.total().item() == pytest.approx(1.5 * cross_entropy(Z_P, LABELS, WEIGHTS).mean())


# Class balance.


def batch_of(pixels_of_class_one, images=2, side=200):
    y = torch.zeros(images, side, side, dtype=torch.uint8)
    y.view(-1)[:pixels_of_class_one] = 1
    return y


@pytest.mark.parametrize(("pixels", "weight"), [(8_191, 7.0), (8_192, 1.0)])
def test_a_class_is_small_below_4096_pixels_an_image(pixels, weight):
    assert ClassBalance(2)(batch_of(pixels))[1].item() == weight


def test_an_absent_class_weighs_11_point_2_after_one_batch_and_49_in_the_end():
    balance = ClassBalance(3)
    assert balance(batch_of(9_000))[2].item() == pytest.approx(11.2)
    for _ in range(200):
        last = balance(batch_of(9_000))
    assert last[2].item() == pytest.approx(49.0, rel=1e-5)
    assert last[0].item() == 1.0


@pytest.mark.parametrize("shares", [2, 4])
def test_processes_that_share_a_batch_have_the_weights_of_the_whole_batch(shares):
    """A class may be absent or small in one share and frequent in another."""
    pixels = torch.from_numpy(np.random.default_rng(1).choice([0, 0, 0, 1, 255], (4, 8, 8)))
    pixels[3, :4] = 2
    parts = pixels.chunk(shares)

    def total(value):
        others = [torch.cat([class_counts(part, 4), torch.tensor([len(part)])]) for part in parts]
        assert any(torch.equal(value, other) for other in others)
        return torch.stack(others).sum(0)

    whole = ClassBalance(4, small_class_pixels=10)
    shared = [ClassBalance(4, small_class_pixels=10, total=total) for _ in parts]
    alone = [ClassBalance(4, small_class_pixels=10) for _ in parts]
    for _ in range(2):
        expected = whole(pixels)
        for balance, part in zip(shared, parts, strict=True):
            torch.testing.assert_close(balance(part), expected, rtol=0, atol=0)
        assert any((balance(part) != expected).any() for balance, part in zip(alone, parts, strict=True))


def test_without_often_balance_an_absent_class_is_only_small():
    assert ClassBalance(3, often_balance=False)(batch_of(9_000))[2].item() == 7.0


def test_the_running_balance_travels_in_the_state_dict():
    first, second = ClassBalance(3), ClassBalance(3)
    first(batch_of(9_000))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(batch_of(10)), second(batch_of(10)))


def test_ignored_pixels_belong_to_no_class():
    y = torch.tensor([[[0, 1, 1, 255], [200, 2, 0, 0]]], dtype=torch.uint8)
    assert class_counts(y, 3).tolist() == [3, 2, 1]


# Bad input.


def test_logits_of_another_size_are_refused():
    with pytest.raises(ValueError, match="same pixels"):
        segmentation_loss(torch.zeros(2, 4, 9, 17), torch.zeros(2, 64, 128, dtype=torch.int64))


def test_an_unknown_divergence_is_refused():
    z = torch.tensor(Z_P)
    with pytest.raises(ValueError, match="published, main_to_aux"):
        rectified_terms(Logits(z, z), labels(), divergence="jensen")


def test_a_percentile_beyond_100_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 100\]"):
        percentile(torch.zeros(3), 120.0)


# Negative labels.

NEGATIVE = RNG.random((GRID[0], C, *GRID[1:])) < 0.4
NEGATIVE[0, :, 1] = False  # pixels of which nothing is known


def reference_negative(z, pixels=None):
    """UPS: the mean over pixels that have a negative class of their mean -log(1 - p)."""
    p, counts = np.exp(log_softmax(z)), NEGATIVE.sum(1)
    losses = -(np.log(np.maximum(1 - p, 1e-7)) * NEGATIVE).sum(1) / np.maximum(counts, 1)
    return (losses * (1.0 if pixels is None else pixels)).sum() / (counts > 0).sum()


@pytest.mark.parametrize("pixels", [None, PIXELS])
def test_negative_labels_push_down_what_a_pixel_is_not(pixels):
    negative = torch.from_numpy(NEGATIVE)
    weight = None if pixels is None else torch.from_numpy(pixels)
    for head, z in enumerate((Z_P, Z_A)):

        def ours(value, head=head):
            other = torch.from_numpy(Z_A if head == 0 else Z_P)
            logits = Logits(other, value) if head == 0 else Logits(value, other)
            return negative_terms(logits, negative, weight)[head]

        check(ours, lambda value: reference_negative(value, pixels), z)


def test_where_nothing_is_known_negative_labels_cost_exactly_nothing():
    z = torch.tensor(Z_P, requires_grad=True)
    main, aux = negative_terms(Logits(z, z), torch.zeros(Z_P.shape, dtype=torch.bool))
    (main + aux).backward()
    assert main.item() == aux.item() == 0.0
    assert (z.grad == 0).all()


def test_a_class_that_the_network_is_sure_of_gives_a_finite_loss():
    z = torch.zeros(1, 2, 1, 1, requires_grad=True)
    main, _ = negative_terms(
        Logits(z, z + torch.tensor([200.0, 0.0]).view(1, 2, 1, 1)), torch.tensor([True, False]).view(1, 2, 1, 1)
    )
    main.backward()
    assert main.item() == pytest.approx(-np.log(1e-7), rel=1e-5)
    assert torch.isfinite(z.grad).all()


def test_negatives_of_another_size_are_refused():
    z = torch.from_numpy(Z_P)
    with pytest.raises(ValueError, match="do not fit logits"):
        negative_terms(Logits(z, z), torch.zeros(2, C, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize("target", [False, True])
def test_the_domain_loss_and_its_gradient_equal_a_float64_loop(target):
    torch.manual_seed(0)
    scores = (3 * torch.randn(2, 1, 5, 7)).requires_grad_()
    loss = domain_loss(scores, target=target)
    loss.backward()
    z = scores.detach().numpy().astype(np.float64)
    p = 1 / (1 + np.exp(-z))
    y = float(target)
    assert loss.item() == pytest.approx(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), rel=1e-5)
    np.testing.assert_allclose(scores.grad.numpy(), (p - y) / z.size, rtol=1e-5, atol=1e-9)
