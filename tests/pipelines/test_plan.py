import dataclasses

import pytest
import torch

from actors.errors import RunError
from models.networks.build import PUBLISHED
from pipelines import plan
from pipelines.plan import DISCRIMINATORS, costs

pytestmark = pytest.mark.slow
GIGA = 10**9


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in costs()}


@pytest.fixture
def few(monkeypatch):
    """Two small networks of different families, where all of them would be asked the same."""
    monkeypatch.setattr(plan, "PUBLISHED", ("bisenet18", "fada-vgg16"))


def test_every_published_network_and_discriminator_has_a_row(rows):
    assert list(rows) == [*PUBLISHED, *DISCRIMINATORS]
    assert [row.kind for row in rows.values()] == ["network"] * 7 + ["discriminator"] * 5


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deeplab101", 93_536_480),
        ("proda101", 65_063_568),
        ("MultiScale", 1_041_699),
        ("Patch", 1_560_705),
        ("FCD", 2_781_121),
        ("DSC", 189_424),
        ("fada101", 42_394_816 + 1_400_908),
        ("fada101-modified", 42_394_816 + 65_063_568 - 42_500_160),
        ("fada-vgg16", 29_573_004),
        ("Pixel", 5_057_702),
    ],
)
def test_parameters_are_those_of_the_published_networks(rows, name, parameters):
    assert rows[name].cost.parameters == parameters
    assert rows[name].unused == 0


@pytest.mark.parametrize(
    ("name", "whole", "unused"), [("bisenet18", 12_581_672, 513_000), ("bisenet101", 50_801_192, 2_049_000)]
)
def test_a_published_bisenet_also_has_a_classifier_that_nobody_uses(rows, name, whole, unused):
    assert rows[name].unused == unused
    assert rows[name].cost.parameters + rows[name].unused == whole


def test_discriminators_cost_what_their_report_says(rows):
    assert round(rows["FCD"].cost.flops / GIGA, 2) == 30.89
    assert round(rows["DSC"].cost.flops / GIGA, 3) == 2.147


def test_operations_of_both_discriminators_by_hand(rows):
    channels = [19, 64, 128, 256, 512, 1]
    maps = [512 * 1024 // 4**k for k in range(1, 6)]
    pairs = list(zip(channels, channels[1:], maps, strict=False))
    enlarged = 22 * 512 * 1024
    assert rows["FCD"].cost.flops == 2 * sum(16 * a * b * n for a, b, n in pairs) + enlarged
    assert rows["DSC"].cost.flops == 2 * sum((16 * a + a * b) * n for a, b, n in pairs) + enlarged


def test_operations_of_fadas_discriminator_by_hand(rows):
    """It reads the features of its network, at an eighth."""
    a_cell = 2 * 9 * (2048 * 256 + 256 * 128 + 128 * 2 * 19)
    assert rows["Pixel"].cost.flops == 128 * 64 * a_cell


def test_bytes_of_both_discriminators_by_hand(rows):
    """Forward, a layer's map and its rectified copy; backward, all maps but the first layer's inputs are kept."""
    maps = [4 * c * 512 * 1024 // 4**k for k, c in enumerate([64, 128, 256, 512], 1)]
    assert rows["FCD"].cost.inference_bytes == 2 * maps[0]
    assert rows["FCD"].cost.training_bytes >= 2 * sum(maps)
    pooled = 4 * 19 * 512 * 1024 // 4
    assert rows["DSC"].cost.inference_bytes == 2 * maps[0]
    assert rows["DSC"].cost.training_bytes - rows["FCD"].cost.training_bytes > pooled


def test_a_batch_of_two_is_twice_the_work_and_the_memory(rows, few):
    for row in costs(batch=2):
        one = rows[row.name].cost
        assert row.cost.parameters == one.parameters
        assert row.cost.flops == 2 * one.flops
        assert row.cost.inference_bytes == pytest.approx(2 * one.inference_bytes, rel=0.001)
        assert row.cost.training_bytes == pytest.approx(2 * one.training_bytes, rel=0.001)


def test_half_the_bytes_a_number_are_half_the_memory(rows, few):
    for row in costs(precision="bfloat16"):
        one = rows[row.name].cost
        assert row.cost.flops == one.flops
        # But for a pooling's indices, which have eight bytes always. A VGG's are large, and there at its peaks.
        less, more = (0.13, 0.13) if row.name == "fada-vgg16" else (0.001, 0.03)
        assert row.cost.inference_bytes == pytest.approx(one.inference_bytes / 2, rel=less)
        assert row.cost.training_bytes == pytest.approx(one.training_bytes / 2, rel=more)


def test_training_takes_more_than_inference_and_neither_takes_real_memory(rows, few, monkeypatch):
    assert all(row.cost.training_bytes > row.cost.inference_bytes > 0 for row in rows.values())
    real = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real.append(made := empty(*a, **k)) or made)
    costs((64, 32), batch=2)
    assert real
    assert all(tensor.is_meta for tensor in real)


def test_classes_and_size_change_what_they_should(rows):
    nine = {row.name: row.cost for row in costs((500, 260), batch=2, classes=9)}
    assert nine["deeplab101"].parameters == 93_526_240
    assert nine["FCD"].flops < rows["FCD"].cost.flops / 2
    rounded_up = 63 * 33
    assert nine["Pixel"].flops == 2 * rounded_up * 2 * 9 * (2048 * 256 + 256 * 128 + 128 * 2 * 9)
    assert dataclasses.asdict(nine["bisenet18"]) != dataclasses.asdict(rows["bisenet18"].cost)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"size": (0, 512)}, "the size is 0x512, and an image needs pixels; give a positive width and height"),
        ({"size": (64, -8)}, "the size is 64x-8, and an image needs pixels"),
        ({"size": (1024, 31)}, "the size is 1024x31, and discriminators of five strides need 32 pixels a side"),
        ({"batch": 0}, "--batch is 0; a batch needs at least one image"),
        ({"classes": 1}, "--classes is 1; a segmentation network needs at least 2"),
        ({"size": (32, 32)}, r"bisenet18 cannot learn from 1 x 32x32 pixels: .* give a larger --size or --batch"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(few, given, sentence):
    with pytest.raises(RunError, match=sentence):
        costs(**given)
