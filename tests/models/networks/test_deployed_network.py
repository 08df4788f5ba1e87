from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.networks.bisenet import BiSeNetConfig
from models.networks.build import Build
from models.networks.deeplab import DeepLabConfig, DilatedConv2d
from models.networks.deployed import Deployed
from models.networks.fada import FadaConfig

CONFIGS = {
    "mrnet": DeepLabConfig.small(3),
    "proda": replace(DeepLabConfig.small(3), heads="proda"),
    "bisenet": BiSeNetConfig(3, (1, 1, 1, 1), width=8, spatial_width=8),
    "fada": FadaConfig.small(3),
}
MEAN, SCALE = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)


def network(heads):
    torch.manual_seed(0)
    return Build(CONFIGS[heads])().eval().requires_grad_(False)


@pytest.mark.parametrize("heads", CONFIGS)
@pytest.mark.parametrize("bgr", [False, True])
def test_values_of_a_picture_become_class_scores_at_its_size(heads, bgr):
    images = torch.rand(2, 3, 72, 104) * 255
    inner = network(heads)
    red, green, blue = images.unbind(1)
    first, second, third = (blue, green, red) if bgr else (red, green, blue)
    read = torch.stack([(first - 10) / 2, (second - 20) / 4, (third - 30) / 8], dim=1)
    corners = heads != "bisenet"
    expected = F.interpolate(inner(read).fused(), (72, 104), mode="bilinear", align_corners=corners)
    scores = Deployed(inner, MEAN, SCALE, bgr=bgr).eval()(images)
    assert scores.shape == (2, 3, 72, 104)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("size", [(32, 40), (64, 64), (136, 200)])
@pytest.mark.parametrize("heads", ["mrnet", "fada"])
def test_for_any_size_all_taps_are_kept_and_the_answers_stay(heads, size):
    """At the smallest size the network leaves out taps of both its dilations."""
    inner = network(heads)
    whole = Deployed(inner, MEAN, SCALE, bgr=True, any_size=True).eval()
    assert not any(isinstance(module, DilatedConv2d) for module in whole.modules())
    assert any(isinstance(module, DilatedConv2d) for module in inner.modules())
    assert {p.data_ptr() for p in whole.parameters()} == {p.data_ptr() for p in inner.parameters()}
    images = torch.rand(1, 3, *size) * 255
    torch.testing.assert_close(whole(images), Deployed(inner, MEAN, SCALE, bgr=True).eval()(images))
