"""Prototypes against plain loops in float64: values, and gradients by torch's own autograd of those loops."""

import numpy as np
import pytest
import torch

from models.prototypes import (
    PrototypeMean,
    class_distances,
    class_means,
    momentum_update,
    prototype_distances,
    prototype_weights,
    rectify,
)

N, C, K, H, W = 2, 5, 16, 6, 7


@pytest.fixture
def drawn():
    """Features, prototypes and an incoming gradient, float32."""
    torch.manual_seed(3)
    return torch.randn(N, K, H, W), torch.randn(C, K), torch.randn(N, C, H, W)


def loop(features, prototypes):
    """The published way, class by class."""
    each = [(prototype[:, None, None] - features).norm(dim=1) for prototype in prototypes]
    return torch.stack(each, dim=1)


def gradients(function, upstream, *arrays):
    leaves = [array.detach().clone().requires_grad_() for array in arrays]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


# Distances.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_and_both_gradients_are_those_of_the_loop(drawn, dtype):
    features, prototypes, upstream = drawn
    ours = gradients(prototype_distances, upstream, features.to(dtype), prototypes.to(dtype))
    expected = gradients(loop, upstream, features.double(), prototypes.double())
    for mine, reference in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        close(mine, reference, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_gradient_may_be_asked_of_one_argument_alone(drawn, asked):
    features, prototypes, upstream = drawn
    both = gradients(prototype_distances, upstream, features, prototypes)[1:]
    arguments = [features.clone(), prototypes.clone()]
    arguments[asked].requires_grad_()
    prototype_distances(*arguments).backward(upstream)
    assert torch.equal(arguments[asked].grad, both[asked])
    assert arguments[1 - asked].grad is None


def test_a_part_that_all_vectors_share_does_not_cancel(drawn):
    """Without the centring |f|² is 1.6 million here, and its rounding as large as d² would be."""
    features, prototypes, upstream = drawn
    far = 316.0 * torch.randn(1, K)
    # Sums in float32, so that both ways are given the same numbers.
    features, prototypes = features + far[..., None, None], prototypes + far
    ours = gradients(prototype_distances, upstream, features, prototypes)
    expected = gradients(loop, upstream, features.double(), prototypes.double())
    for mine, reference in zip(ours, expected, strict=True):
        close(mine, reference, 2e-5)


@pytest.mark.parametrize("channels", [16, 256])
def test_a_feature_on_its_prototype_has_distance_zero_and_no_gradient_from_it(channels):
    torch.manual_seed(1)
    prototypes = torch.randn(C, channels) + 3.0
    features = prototypes[torch.arange(H * W) % C].t().reshape(1, channels, H, W).clone().requires_grad_()
    own = (torch.arange(H * W) % C).view(1, 1, H, W)
    distances = prototype_distances(features, prototypes)
    assert not distances.gather(1, own).any()
    (of_own,) = torch.autograd.grad(distances.gather(1, own).sum(), features, retain_graph=True)
    assert not of_own.any()
    (of_all,) = torch.autograd.grad(distances.sum(), features)
    reference = features.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(loop(reference, prototypes.double()).sum(), reference)
    close(of_all, expected)


@pytest.mark.parametrize("gap", [1e-8, 1e-6, 1e-4, 1e-2])
def test_close_to_a_prototype_the_gradient_stays_a_direction(gap):
    """The true one has length 1; noise under a tiny square root would make it thousands."""
    torch.manual_seed(2)
    prototypes = torch.randn(C, 256)
    features = (prototypes[:1] + gap * torch.randn(500, 256)).t().reshape(1, 256, 20, 25).requires_grad_()
    prototype_distances(features, prototypes)[:, 0].sum().backward()
    assert features.grad.norm(dim=1).max() < 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_neither_value_nor_gradient(drawn, dtype):
    features, prototypes, upstream = drawn
    features = features.to(dtype)
    expected = gradients(prototype_distances, upstream, features.float(), prototypes)
    with torch.autocast("cpu", torch.bfloat16):  # backward too: it then sees autocast, as forward does
        ours = gradients(prototype_distances, upstream, features, prototypes)
    assert [value.dtype for value in ours] == [torch.float32, dtype, torch.float32]
    for mine, reference in zip(ours, expected, strict=True):
        assert torch.equal(mine, reference.to(mine.dtype))


def test_memory_order_and_slices_do_not_matter(drawn):
    features, prototypes, upstream = drawn
    expected = gradients(prototype_distances, upstream, features, prototypes)
    last = features.to(memory_format=torch.channels_last)
    for other in (last, features.transpose(2, 3).contiguous().transpose(2, 3), torch.cat([last, last], 3)[..., :W]):
        for mine, reference in zip(gradients(prototype_distances, upstream, other, prototypes), expected, strict=True):
            assert mine.shape == reference.shape
            close(mine, reference, 1e-6)


def test_the_graph_keeps_nothing_larger_than_its_arguments_and_its_result(drawn):
    features, prototypes, _ = drawn
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        distances = prototype_distances(features.requires_grad_(), prototypes)
    assert kept == [features.data_ptr(), prototypes.data_ptr(), distances.data_ptr()]


# Weights and rectified labels.


def reference_weights(distances, temperature):
    least = distances.min(axis=1, keepdims=True)
    e = np.exp(-temperature * (distances - least))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_weights_are_a_softmax_of_what_a_class_lies_further_than_the_nearest(drawn, temperature):
    distances = loop(*drawn[:2]).double()
    ours = prototype_weights(distances.float(), temperature)
    close(ours, torch.from_numpy(reference_weights(distances.numpy(), temperature)))
    leaf = distances.clone().requires_grad_()
    e = torch.exp(-temperature * (leaf - leaf.min(dim=1, keepdim=True).values))
    (expected,) = torch.autograd.grad(e / e.sum(dim=1, keepdim=True), leaf, drawn[2].double())
    close(gradients(lambda d: prototype_weights(d, temperature), drawn[2], distances.float())[1], expected)


def test_far_from_every_prototype_the_weights_are_finite():
    weights = prototype_weights(torch.tensor([9000.0, 9001.0, 9500.0]).view(1, 3, 1, 1))
    np.testing.assert_allclose(weights.flatten(), [1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0], rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_rectified_label_is_the_class_with_the_largest_product(drawn, threshold):
    soft, weights = drawn[2].softmax(1), prototype_weights(loop(*drawn[:2]))
    labels, confidence = rectify(soft, weights, threshold)
    assert labels.dtype == torch.int64
    withheld = 0
    for n, y, x in np.ndindex(N, H, W):
        product = (soft[n, :, y, x] * weights[n, :, y, x]).double().numpy()
        share = product / product.sum()
        assert confidence[n, y, x].item() == pytest.approx(share.max(), rel=1e-5)
        assert labels[n, y, x].item() == (share.argmax() if share.max() >= threshold else 255)
        withheld += share.max() < threshold
    assert (withheld > 0) == (threshold > 0), "the threshold matters in this example"


def test_prototypes_overrule_a_soft_label_that_is_not_sure():
    soft = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1)
    labels, confidence = rectify(soft, torch.tensor([0.2, 0.8]).view(1, 2, 1, 1))
    assert labels.item() == 1
    assert confidence.item() == pytest.approx(0.32 / 0.44)


@pytest.mark.parametrize(("threshold", "label"), [(0.5, 0), (0.500001, 255)])
def test_a_pixel_exactly_as_confident_as_the_threshold_is_kept(threshold, label):
    even = torch.full((1, 2, 1, 1), 0.5)
    assert rectify(even, even, threshold)[0].item() == label


def test_where_every_product_vanishes_nothing_is_labelled():
    labels, confidence = rectify(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    assert labels.item() == 255
    assert confidence.item() == 0.0


# Means per class.


def reference_means(features, winners, least):
    means, present = np.zeros((N, C, K)), np.zeros((N, C), bool)
    for n, k in np.ndindex(N, C):
        inside = winners[n] == k
        if inside.sum() >= least:
            means[n, k] = features[n][:, inside].mean(axis=1)
            present[n, k] = means[n, k].sum() != 0
    return means, present


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("least", [1, 8])
def test_a_class_has_the_mean_of_its_pixels_in_an_image(drawn, dtype, least):
    features = drawn[0]
    winners = torch.from_numpy(np.random.default_rng(0).choice([0, 0, 1, 1, 1, 2, 4, 255], (N, H, W)))
    means, present = class_means(features, winners.to(dtype), C, least)
    expected, there = reference_means(features.double().numpy(), winners.numpy(), least)
    assert present.tolist() == there.tolist()
    assert present.any()
    assert not present.all()
    close(means[present], torch.from_numpy(expected[there]))


@pytest.mark.parametrize(("pixels", "enough"), [(9, False), (10, True)])
def test_a_class_needs_ten_pixels(pixels, enough):
    winners = torch.full((1, 4, 5), 255)
    winners.view(-1)[:pixels] = 1
    _, present = class_means(torch.ones(1, 3, 4, 5), winners, 2)
    assert present.tolist() == [[False, enough]]


def test_a_mean_that_sums_to_exactly_zero_is_passed_over():
    features = torch.stack([torch.full((4, 5), 2.0), torch.full((4, 5), -2.0)])[None]
    _, present = class_means(features, torch.zeros(1, 4, 5, dtype=torch.int64), 1)
    assert not present.any()


def test_means_are_float32_under_autocast(drawn):
    winners = torch.zeros(N, H, W, dtype=torch.int64)
    expected, _ = class_means(drawn[0], winners, C)
    with torch.autocast("cpu", torch.bfloat16):
        means, _ = class_means(drawn[0], winners, C)
    assert torch.equal(means, expected)


# Prototypes that move.


def vectors(images, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, C, K, generator=generator), torch.rand(images, C, generator=generator) < 0.7


def test_initial_prototypes_are_running_means_with_a_bounded_count():
    means, present = vectors(40)
    ours = PrototypeMean(C, K, cap=7)
    ours.add(means[:25], present[:25])
    ours.add(means[25:], present[25:])
    for k in range(C):
        eta, count = np.zeros(K), 0
        for v, here in zip(means[:, k].double().numpy(), present[:, k], strict=True):
            if here:
                eta, count = (eta * count + v) / (count + 1), min(count + 1, 7)
        close(ours.prototypes[k], torch.from_numpy(eta))
        assert ours.counts[k].item() == count == 7


def test_below_the_bound_it_is_the_mean():
    means, present = vectors(40)
    ours = PrototypeMean(C, K)
    ours.add(means, present)
    for k in range(C):
        close(ours.prototypes[k], means[present[:, k], k].double().mean(dim=0))
    assert ours.counts.tolist() == present.sum(dim=0).tolist()


def test_a_new_vector_never_weighs_less_than_one_in_3001():
    ours = PrototypeMean(1, 2)
    ours.counts += 2999
    weights = []
    for _ in range(4):
        ours.prototypes = torch.zeros(1, 2)
        ours.add(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
        weights.append(ours.prototypes[0, 0].item())
    assert weights == pytest.approx([1 / 3000, 1 / 3001, 1 / 3001, 1 / 3001], rel=1e-6)


def test_afterwards_a_new_vector_weighs_one_in_ten_thousand():
    prototypes = torch.tensor([[0.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    momentum_update(prototypes, torch.ones(1, 2, 3), torch.tensor([[True, False]]))
    np.testing.assert_allclose(prototypes, [[1e-4, 1e-4, 2 - 1e-4], [1.0] * 3], rtol=1e-6)


def test_a_class_without_a_prototype_takes_its_first_vector_whole():
    prototypes, vectors = torch.zeros(2, 3), torch.tensor([[[2.0, 4.0, 6.0]] * 2, [[0.0, 0.0, 1.0]] * 2])
    momentum_update(prototypes, vectors, torch.tensor([[True, False], [True, False]]), momentum=0.5)
    np.testing.assert_allclose(prototypes, [[1.0, 2.0, 3.5], [0.0] * 3])


def test_a_class_without_a_prototype_is_nobodys_neighbour():
    """Zeros would be the nearest of all to a feature that is unlike the others."""
    prototypes = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 7.0]])
    features = torch.tensor([0.1, 0.1]).view(1, 2, 1, 1).requires_grad_()
    assert prototype_distances(features, prototypes).argmin() == 1
    distances = class_distances(features, prototypes)
    weights = prototype_weights(distances)[0, :, 0, 0]
    assert weights[1] == 0
    d = np.hypot([0.1 - 5, 0.1], [0.1, 0.1 - 7])
    np.testing.assert_allclose(weights[[0, 2]].detach(), np.exp(-d) / np.exp(-d).sum(), rtol=1e-5)
    distances.log_softmax(1)[0, 0].sum().backward()
    assert features.grad.isfinite().all()
    nobody = prototype_weights(class_distances(features, torch.zeros(3, 2)))
    np.testing.assert_allclose(nobody.detach().flatten(), 1 / 3, rtol=1e-6)


def test_updates_go_image_by_image_and_in_place():
    means, present = vectors(4)
    prototypes, before = torch.zeros(C, K) + 0.5, np.full((C, K), 0.5)
    same = prototypes.data_ptr()
    momentum_update(prototypes, means, present, momentum=0.3)
    for v, here in zip(means.double().numpy(), present.numpy(), strict=True):
        for k in range(C):
            if here[k]:
                before[k] = 0.7 * before[k] + 0.3 * v[k]
    close(prototypes, torch.from_numpy(before))
    assert prototypes.data_ptr() == same


@pytest.mark.parametrize("way", ["mean", "momentum"])
def test_a_vector_that_is_not_there_may_hold_anything(way):
    means, nothing = torch.full((2, C, K), float("nan")), torch.zeros(2, C, dtype=torch.bool)
    ours = PrototypeMean(C, K)
    if way == "mean":
        ours.add(means, nothing)
    else:
        momentum_update(ours.prototypes, means, nothing)
    assert not ours.prototypes.any()
    assert not ours.counts.any()


# Bad input.


@pytest.mark.parametrize(
    ("features", "prototypes"), [((2, 4, 3, 3), (5, 6)), ((4, 3, 3), (5, 4)), ((2, 4, 3, 3), (4,))]
)
def test_prototypes_of_another_length_are_refused(features, prototypes):
    with pytest.raises(ValueError, match="the same K"):
        prototype_distances(torch.zeros(features), torch.zeros(prototypes))


def test_a_soft_label_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="one grid"):
        rectify(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 1, 1))


def test_winners_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="same pixels"):
        class_means(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.int64), 3)


@pytest.mark.parametrize(("means", "present"), [((4, 3), (4,)), ((2, 4, 3), (4, 2)), ((2, 4, 1), (2, 4))])
def test_vectors_of_another_shape_are_refused(means, present):
    there = torch.ones(present, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not fit prototypes"):
        momentum_update(torch.zeros(4, 3), torch.zeros(means), there)
    with pytest.raises(ValueError, match="do not fit prototypes"):
        PrototypeMean(4, 3).add(torch.zeros(means), there)


def test_prototypes_in_half_precision_are_refused():
    with pytest.raises(ValueError, match="keep float32"):
        momentum_update(torch.zeros(1, 2).bfloat16(), torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
