"""Against Pillow, whose operations the published code calls."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from pipelines.autoaugment import BITS, OPERATIONS, POLICIES, autoaugment

REFERENCE = {
    "solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - 256 / 9 * m),
    "posterize": lambda image, m, sign: ImageOps.posterize(image, BITS[m]),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "autocontrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "invert": lambda image, m, sign: ImageOps.invert(image),
    "color": lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * m / 10),
    "contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * m / 10),
    "sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * m / 10),
}


def images():
    rng = np.random.default_rng(0)
    smooth = np.linspace(20, 230, 24 * 32 * 3).reshape(24, 32, 3)
    flat = np.full((24, 32, 3), 77)
    return [rng.integers(0, 256, (24, 32, 3)), smooth, rng.normal(120, 8, (24, 32, 3)), flat]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 3, 5, 8, 9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_operation_is_pillows(name, magnitude, sign):
    for pixels in images():
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        expected = np.asarray(REFERENCE[name](Image.fromarray(pixels), magnitude, sign)).astype(int)
        found = OPERATIONS[name](torch.from_numpy(pixels), magnitude, sign).numpy().astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= (1 if name in ("color", "contrast", "sharpness") else 0)
        assert (found == expected).mean() > 0.99


def test_the_first_number_picks_the_policy_and_the_others_what_of_it_is_done():
    pixels = torch.from_numpy(images()[0].astype(np.uint8))
    third = (2.5 / len(POLICIES), 0.5, 0.5, 0.0, 0.0)  # posterize to 5 bits, then to 6 → 5 of 10 levels
    idle = (2.5 / len(POLICIES), 0.7, 0.7, 0.0, 0.0)
    found = autoaugment(torch.stack([pixels, pixels]), np.array([third, idle]))
    first, second = POLICIES[2]
    expected = OPERATIONS["posterize"](OPERATIONS["posterize"](pixels, first[2], 1.0), second[2], 1.0)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], pixels)
    assert not torch.equal(found[0], pixels)


def test_there_are_eighteen_policies_and_none_moves_a_pixel():
    """Methods §2.4."""
    assert len(POLICIES) == 18
    assert {name for policy in POLICIES for _, name, _ in policy} == set(OPERATIONS)
