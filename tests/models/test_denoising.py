"""Loss terms of ProDA in float32 against loops over pixels in float64, in value and in gradient."""

import math

import pytest
import torch

from models.denoising import (
    assignment_loss,
    distillation_loss,
    regulariser,
    reverse_cross_entropy,
    symmetric_cross_entropy,
)
from models.prototypes import prototype_weights

N, C, H, W = 2, 4, 3, 5
GENERATOR = torch.Generator().manual_seed(11)
Z = 3 * torch.randn(N, C, H, W, generator=GENERATOR)
TEACHER = 3 * torch.randn(N, C, H, W, generator=GENERATOR)
STUDENT = 2 + 8 * torch.rand(N, C, H, W, generator=GENERATOR)  # distances
LABELS = torch.randint(0, C, (N, H, W), generator=GENERATOR)
LABELS[0, 0] = 255
SEEN = torch.rand(N, H, W, generator=GENERATOR) < 0.6
PIXELS = torch.rand(N, H, W, generator=GENERATOR)
NOTHING = torch.full((N, H, W), 255)


def structure_loss(teacher_distances, student_distances, seen, temperature=1.0):
    """As the student computes it: what prototypes say of the weak view, and of the strong one."""
    assignments = prototype_weights(teacher_distances, temperature)
    return assignment_loss(assignments, student_distances, seen, temperature)


def places():
    return [(n, y, x) for n in range(N) for y in range(H) for x in range(W)]


def check(ours, reference, array):
    """The same value, and the same gradient as autograd finds for the loop."""
    single, double = array.clone().requires_grad_(), array.double().requires_grad_()
    value, expected = ours(single), reference(double)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    value.backward()
    expected.backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-5, atol=1e-5)
    assert double.grad.any()


# Symmetric cross-entropy.


def reference_rce(z, pixels=None):
    total, count = 0.0, 0
    for n, y, x in places():
        label = LABELS[n, y, x].item()
        if label != 255:
            p = torch.exp(z[n, :, y, x]) / torch.exp(z[n, :, y, x]).sum()
            one_hot = torch.eye(C, dtype=z.dtype)[label]
            term = -(p.clamp(1e-7, 1) * one_hot.clamp(1e-4, 1).log()).sum()
            total = total + (term if pixels is None else term * pixels[n, y, x])
            count += 1
    return total / (count + 1e-6)


def reference_ce(z, pixels=None):
    terms = [
        (torch.logsumexp(z[n, :, y, x], 0) - z[n, LABELS[n, y, x], y, x]) * (1 if pixels is None else pixels[n, y, x])
        for n, y, x in places()
        if LABELS[n, y, x] != 255
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("scale", [1.0, 6.0])  # the second one reaches the clamp of p
def test_reverse_cross_entropy_is_the_cross_entropy_with_its_arguments_swapped(dtype, scale):
    check(lambda z: reverse_cross_entropy(scale * z, LABELS.to(dtype)), lambda z: reference_rce(scale * z), Z)


def test_a_pixel_without_probability_on_its_label_costs_9_2103():
    z = torch.tensor([100.0, 0.0, 0.0]).view(1, 3, 1, 1)
    loss = reverse_cross_entropy(z, torch.ones(1, 1, 1, dtype=torch.int64))
    assert loss.item() == pytest.approx(9.2103, abs=5e-5)


def test_a_pixel_with_all_probability_on_its_label_costs_the_floor_of_p_and_has_no_gradient():
    z = torch.tensor([100.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    loss = reverse_cross_entropy(z, torch.zeros(1, 1, 1, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(2e-7 * 9.2103, rel=1e-4)
    assert not z.grad.any()


@pytest.mark.parametrize("pixels", [None, PIXELS])
def test_the_symmetric_terms_are_weighted_and_pixel_weights_leave_the_normalisers_alone(pixels):
    for part, (reference, weight) in enumerate([(reference_ce, 0.3), (reference_rce, 0.7)]):
        check(
            lambda z, part=part: symmetric_cross_entropy(z, LABELS, 0.3, 0.7, pixels)[part],
            lambda z, reference=reference, weight=weight: weight * reference(z, pixels),
            Z,
        )


def test_by_default_the_reverse_term_weighs_ten_times_the_plain_one():
    terms = symmetric_cross_entropy(Z, LABELS)
    assert terms.ce.item() == pytest.approx(0.1 * reference_ce(Z.double()).item(), rel=1e-5)
    assert terms.rce.item() == pytest.approx(reference_rce(Z.double()).item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_label_with_nothing_in_it_costs_exactly_zero(scale):
    z = (scale * Z).requires_grad_()
    terms = symmetric_cross_entropy(z, NOTHING.to(torch.uint8))
    sum(terms).backward()
    assert terms.ce.item() == terms.rce.item() == 0.0
    assert not z.grad.any()


def test_hopeless_predictions_give_finite_gradients():
    z = (1e4 * Z).requires_grad_()
    (sum(symmetric_cross_entropy(z, LABELS)) + regulariser(z) + regulariser(z, "mrent")).backward()
    assert torch.isfinite(z.grad).all()


# Regulariser.


def test_the_regulariser_is_the_mean_of_minus_log_p_over_classes_too():
    check(regulariser, lambda z: -torch.log(z.exp() / z.exp().sum(1, keepdim=True)).sum() / (N * C * H * W), Z)


def test_the_other_regulariser_is_the_negative_entropy():
    def reference(z):
        p = z.exp() / z.exp().sum(1, keepdim=True)
        return (p * p.log()).sum() / (N * H * W)

    check(lambda z: regulariser(z, "mrent"), reference, Z)


@pytest.mark.parametrize(("kind", "value"), [("mrkld", math.log(C)), ("mrent", -math.log(C))])
def test_an_even_prediction_costs_least(kind, value):
    z = torch.zeros(N, C, H, W, requires_grad=True)
    loss = regulariser(z, kind)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert z.grad.abs().max() < 1e-6


# Structure.

DISTANT = TEACHER.abs() + 1


def reference_structure(student, teacher=DISTANT, temperature=1.0, seen=SEEN):
    """As published: a distance of 250 marks what lies outside, and the mask has a value for every channel."""
    marked = torch.where(seen[:, None], teacher.double(), torch.tensor(250.0, dtype=torch.float64))
    mask = (marked != 250).double()
    t = torch.softmax(-temperature * marked, 1)
    s = torch.log(torch.softmax(-temperature * student, 1))
    return (mask * t * (t.log() - s)).sum() / mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("seen", [SEEN, SEEN[:, None]], ids=["without channel", "with channel"])
def test_the_structure_loss_is_that_of_distances_marked_with_250(temperature, seen):
    check(
        lambda d: structure_loss(DISTANT, d, seen, temperature),
        lambda d: reference_structure(d, temperature=temperature),
        STUDENT,
    )


def test_the_structure_loss_is_the_kl_of_a_pixel_divided_by_the_classes():
    teacher, student = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([2.0, 1.0, 1.5, 5.0])
    t, s = (-teacher).softmax(0), (-student).softmax(0)
    kl = (t * (t / s).log()).sum()
    both = [value.view(1, C, 1, 1).repeat(1, 1, 2, 3) for value in (teacher, student)]
    assert structure_loss(*both, torch.ones(1, 2, 3, dtype=torch.bool)).item() == pytest.approx(kl.item() / C)


def test_given_assignments_are_used_as_they_are():
    t = torch.softmax(-DISTANT, 1)
    assert torch.equal(assignment_loss(t, STUDENT, SEEN), structure_loss(DISTANT, STUDENT, SEEN))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sure_assignment_is_a_cross_entropy(kind):
    sure = torch.nn.functional.one_hot(LABELS % C, C).movedim(-1, 1).to(kind)

    def reference(d):
        terms = [torch.logsumexp(-d[n, :, y, x], 0) + d[n, LABELS[n, y, x] % C, y, x] for n, y, x in places()]
        return sum(terms) / (N * H * W * C)

    check(lambda d: assignment_loss(sure, d, torch.ones_like(SEEN)), reference, STUDENT)
    assert assignment_loss(sure, STUDENT, SEEN).dtype == STUDENT.dtype


@pytest.mark.parametrize("unseen", [0.0, 250.0, float("inf"), float("nan")])
def test_what_the_teacher_says_outside_the_view_does_not_matter(unseen):
    teacher = DISTANT.masked_fill(~SEEN[:, None], unseen)
    student = STUDENT.clone().requires_grad_()
    structure_loss(teacher, student, SEEN).backward()
    assert not student.grad.masked_select(~SEEN[:, None]).any()
    check(lambda d: structure_loss(teacher, d, SEEN), reference_structure, STUDENT)


def test_a_view_that_sees_nothing_costs_exactly_zero():
    student = STUDENT.clone().requires_grad_()
    loss = structure_loss(torch.full_like(STUDENT, 250.0), student, torch.zeros_like(SEEN))
    loss.backward()
    assert loss.item() == 0.0
    assert not student.grad.any()


def test_the_teacher_gets_no_gradient():
    teacher, student = DISTANT.softmax(1).requires_grad_(), STUDENT.clone().requires_grad_()
    for loss in (structure_loss, assignment_loss):
        loss(teacher, student, SEEN).backward()
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.any()


# Distillation.


@pytest.mark.parametrize("published", [False, True])
def test_distillation_is_a_mean_over_all_elements(published):
    def reference(z):
        t, p = TEACHER.double().softmax(1), z.softmax(1)
        return (t * (t.log() - (p if published else p.log()))).sum() / (N * C * H * W)

    check(lambda z: distillation_loss(z, TEACHER, published), reference, Z)


def test_a_student_that_equals_its_teacher_costs_nothing_and_as_published_less_than_that():
    t = Z.double().softmax(1)
    assert distillation_loss(Z, Z).item() == 0.0
    as_coded = distillation_loss(Z, Z, published=True).item()
    assert as_coded == pytest.approx(((t * (t.log() - t)).sum(1) / C).mean().item(), rel=1e-5)
    assert as_coded < 0


# Bad input.


@pytest.mark.parametrize("loss", [reverse_cross_entropy, symmetric_cross_entropy])
def test_labels_of_another_grid_are_refused(loss):
    with pytest.raises(ValueError, match="same pixels"):
        loss(Z, torch.zeros(N, W, H, dtype=torch.int64))


def test_an_unknown_regulariser_is_refused():
    with pytest.raises(ValueError, match="mrkld, mrent"):
        regulariser(Z, "entropy")


@pytest.mark.parametrize("seen", [SEEN[:1], SEEN[:, None].expand(N, C, H, W), SEEN[:, :1]])
def test_a_mask_of_another_grid_is_refused(seen):
    with pytest.raises(ValueError, match="same classes and pixels"):
        structure_loss(DISTANT, STUDENT, seen)


def test_a_teacher_of_another_size_is_refused():
    with pytest.raises(ValueError, match="same classes and pixels"):
        assignment_loss(DISTANT[:, :-1], STUDENT, SEEN)
    with pytest.raises(ValueError, match="other's grid"):
        distillation_loss(Z, TEACHER[:, :, :1])


def test_a_mask_of_weights_is_refused():
    with pytest.raises(ValueError, match="give bool"):
        structure_loss(DISTANT, STUDENT, PIXELS)
