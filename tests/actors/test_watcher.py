from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.errors import UnreadableImage
from actors.watcher import Watcher
from models.label_free import TargetSignals
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.proda import Proda
from pipelines.views import input_of

CONFIG = DeepLabConfig(
    num_classes=4, layers=(1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=16, groups=4, dilations=(1, 2)
)


class Reader:
    def __init__(self, images=10, broken=()):
        self.images, self.broken, self.asked = images, broken, []

    def __len__(self):
        return self.images

    def read(self, index, size):
        self.asked.append(index)
        if index in self.broken:
            raise UnreadableImage(f"/data/{index}.png", "broken")
        return np.random.default_rng([index, *size]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)


def weights(seed):
    torch.manual_seed(seed)
    made = DeepLab(CONFIG)
    for head in made.heads():
        torch.nn.init.normal_(head.classifier.weight)
    return made.eval(), {name: tensor.numpy() for name, tensor in made.state_dict().items()}


def watcher(reader, images=5, batch=4):
    return Watcher(lambda: DeepLab(CONFIG), reader, input_of, (48, 32), images, 4, torch.device("cpu"), batch=batch)


def test_it_measures_spread_images_whatever_the_batch():
    made, teaching = weights(0)
    reader = Reader()
    found = watcher(reader).look(teaching)
    assert reader.asked == [0, 2, 4, 6, 8]
    expected = TargetSignals(4)
    with torch.no_grad():
        for index in list(reader.asked):
            expected.update(made(input_of(torch.from_numpy(reader.read(index, (48, 32)))[None], made)))
    assert {name: found[name] for name in expected.values()} == pytest.approx(expected.values(), rel=1e-5)
    assert found["class_shares"] == pytest.approx(expected.class_shares())
    assert "agreement" not in found


def test_agreement_is_with_the_student_and_stability_with_the_weights_before():
    watching, (_, one), (_, two) = watcher(Reader()), weights(0), weights(1)
    first = watching.look(one, one)
    assert first["agreement"] == 1.0
    assert "stability" not in first
    second = watching.look(two, one)
    assert second["stability"] == second["agreement"] < 1.0
    assert watching.look(two)["stability"] == 1.0


def test_consistency_is_the_agreement_with_the_mirrored_image():
    made, teaching = weights(0)
    reader = Reader()
    found = watcher(reader).look(teaching)
    same = []
    with torch.no_grad():
        for index in list(reader.asked):
            image = input_of(torch.from_numpy(reader.read(index, (48, 32)))[None], made)
            one, other = (made(view) for view in (image, image.flip(-1)))
            classes = [(z.aux / 2 + z.main).argmax(1) for z in (one, other)]
            same.append((classes[0] == classes[1].flip(-1)).double().mean())
    assert found["consistency"] == pytest.approx(float(np.mean(same)))
    assert found["consistency"] < 1.0


def test_broken_images_are_left_out():
    _, teaching = weights(0)
    found = watcher(Reader(broken=(2, 6))).look(teaching)
    assert sum(found["class_shares"]) == pytest.approx(1.0)
    assert watcher(Reader(broken=range(10))).look(teaching) == {}


def test_fewer_images_than_asked_for_are_all_looked_at():
    reader = Reader(images=3)
    watcher(reader, images=32).look(weights(0)[1])
    assert reader.asked == [0, 1, 2]


def proda(extra_norm, seed):
    torch.manual_seed(seed)
    made = Proda(replace(CONFIG, heads="proda", extra_norm=extra_norm))
    torch.nn.init.normal_(made.layer5.classifier.weight)
    return made.eval()


def test_it_follows_a_change_of_the_network_and_compares_what_both_saw():
    kinds = (lambda: proda(False, 5), lambda: proda(True, 5))
    reader = Reader()
    watching = Watcher(kinds, reader, input_of, (48, 32), 5, 4, torch.device("cpu"))
    plain, normed = proda(False, 0), proda(True, 1)
    weights_of = [{name: tensor.numpy() for name, tensor in made.state_dict().items()} for made in (plain, normed)]
    first = watching.look(weights_of[0], weights_of[1])
    found = watching.look(weights_of[1], weights_of[0])
    classes = {}
    for name, made in (("plain", plain), ("normed", normed)):
        images = np.stack([reader.read(index, (48, 32)) for index in (0, 2, 4, 6, 8)])
        with torch.no_grad():
            classes[name] = made(input_of(torch.from_numpy(images), made)).main.argmax(1).numpy()
    shares = np.bincount(classes["normed"].reshape(-1), minlength=4) / classes["normed"].size
    assert found["class_shares"] == pytest.approx(shares.tolist())
    assert (
        first["agreement"]
        == found["stability"]
        == found["agreement"]
        == pytest.approx((classes["plain"] == classes["normed"]).mean())
    )
    assert found["agreement"] < 1.0
    assert "disagreement" not in found, "of heads; there is one"
    assert found["label_free_score"] == pytest.approx(found["diversity"] - found["entropy"])
