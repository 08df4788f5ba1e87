from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.errors import UnreadableImage
from actors.prior_estimate import PriorPlan
from actors.protocols import Labelled, LabelPlan
from actors.showcase import Showcase, _resized
from actors.staleness import StalenessPolicy
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.proda import Proda
from pipelines.selections import PercentileSelection
from pipelines.views import input_of

CONFIG = DeepLabConfig(
    num_classes=4, layers=(1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=16, groups=4, dilations=(1, 2)
)
VIEW = (48, 32)


class Reader:
    """Noise, and labels of another size."""

    def __init__(self, images=9, broken=()):
        self.image_ids, self.broken = tuple(f"image {i}" for i in range(images)), broken

    def __len__(self):
        return len(self.image_ids)

    def read(self, index, size):
        if index in self.broken:
            raise UnreadableImage(f"/data/{index}.png", "broken")
        return np.random.default_rng([index, *size]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)

    def label(self, index):
        return np.full((20, 30), index % 4, np.uint8)


class Rule:
    """Confident of class 1 on the left, of class 2 less so on the right."""

    view_sizes = (VIEW,)

    def label(self, network, views, seeds, adjustment=None):
        assert views[0].shape == (1, VIEW[1], VIEW[0], 3)
        label = np.ones((8, 12), np.uint8)
        label[:, 6:] = 2
        confidence = np.where(label == 1, 200, 100).astype(np.uint8)
        return [Labelled({"label": label, "confidence": confidence}, np.zeros(4), np.zeros((4, 256)))]


def plan(selection=None):
    return LabelPlan(Rule(), StalenessPolicy(), selection)


def weights(seed):
    torch.manual_seed(seed)
    made = DeepLab(CONFIG)
    for head in made.heads():
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
    return {name: tensor.numpy() for name, tensor in made.state_dict().items()}


def showcase(reader=None, labelled=True, label_plan=None, images=4):
    reader = reader or Reader()
    cpu = torch.device("cpu")
    return Showcase(lambda: DeepLab(CONFIG), reader, labelled, input_of, (VIEW,), True, label_plan, 0, cpu, images)


def test_images_are_spread_evenly_and_neither_the_first_nor_the_last():
    assert showcase().indices == [1, 3, 5, 7]
    assert showcase(Reader(2)).indices == [0, 1]


def test_every_map_has_the_size_of_its_image():
    for item in showcase(label_plan=plan()).show({"source_only": weights(0), "adapted": weights(1)}, None):
        assert item.image.shape == (64, 96, 3)
        assert {item.truth.shape, item.confidence.shape, item.pseudo_label.shape} == {(64, 96)}
        assert {found.shape for found in item.predictions.values()} == {(64, 96)}
        assert list(item.predictions) == ["source_only", "adapted"]


def test_each_row_is_what_its_own_weights_predict_and_the_last_one_gives_the_confidence():
    one, two = weights(0), weights(1)
    both = showcase().show({"source_only": one, "adapted": two}, None)
    alone = showcase().show({"adapted": two}, None)
    first = showcase().show({"adapted": one}, None)
    for together, last, before in zip(both, alone, first, strict=True):
        np.testing.assert_array_equal(together.predictions["adapted"], last.predictions["adapted"])
        np.testing.assert_array_equal(together.predictions["source_only"], before.predictions["adapted"])
        np.testing.assert_array_equal(together.confidence, last.confidence)
        assert (together.confidence != before.confidence).any()


def test_a_pseudo_label_is_what_the_rule_keeps():
    item = showcase(label_plan=plan()).show({"adapted": weights(0)}, None)[0]
    assert (item.pseudo_label[:, :48] == 1).all()
    assert (item.pseudo_label[:, 48:] == 2).all()


def test_a_pseudo_label_is_withheld_where_the_thresholds_say_so():
    chosen = plan(PercentileSelection(0.5))
    item = showcase(label_plan=chosen).show({"adapted": weights(0)}, np.array([0, 150, 150, 0], np.uint8))[0]
    assert (item.pseudo_label[:, :48] == 1).all()
    assert (item.pseudo_label[:, 48:] == 255).all()


@pytest.mark.parametrize("label_plan", [None, plan(PercentileSelection(0.5))])
def test_without_a_rule_or_without_its_thresholds_there_is_no_pseudo_label(label_plan):
    assert showcase(label_plan=label_plan).show({"adapted": weights(0)}, None)[0].pseudo_label is None


def test_a_pseudo_label_is_adjusted_to_the_class_frequencies_that_the_bank_last_found():
    heard = []

    class Hearing(Rule):
        def label(self, network, views, seeds, adjustment=None):
            heard.append(adjustment)
            return super().label(network, views, seeds)

    prior = PriorPlan((0.4, 0.3, 0.2, 0.1), temperature=2.0)
    adjusted = LabelPlan(Hearing(), StalenessPolicy(), prior=prior)
    given = showcase(label_plan=adjusted, images=1)
    given.show({"adapted": weights(0)}, None, np.array([0.1, 0.2, 0.3, 0.4]))
    np.testing.assert_allclose(heard[0].offset, 2 * np.log([1 / 4, 2 / 3, 3 / 2, 4]), rtol=1e-6)
    assert not heard[0].witness, "nobody estimates from pictures of a report"
    given.show({"adapted": weights(0)}, None)
    plain = showcase(label_plan=replace(adjusted, prior=None), images=1)
    plain.show({"adapted": weights(0)}, None, np.array([0.1, 0.2, 0.3, 0.4]))
    assert heard[1:] == [None, None]


def proda(extra_norm, seed):
    torch.manual_seed(seed)
    made = Proda(replace(CONFIG, heads="proda", extra_norm=extra_norm))
    torch.nn.init.normal_(made.layer5.classifier.weight, std=1.0)
    return made


def test_each_row_may_have_a_network_of_its_own_and_the_last_one_labels():
    used = []

    class Watched(Rule):
        def label(self, network, views, seeds, adjustment=None):
            used.append(network.bn_pretrain is not None)
            return super().label(network, views, seeds, adjustment)

    def show(kinds, **rows):
        labels, cpu = LabelPlan(Watched(), StalenessPolicy()), torch.device("cpu")
        rows = {name: {key: tensor.numpy() for key, tensor in made.state_dict().items()} for name, made in rows.items()}
        return Showcase(kinds, Reader(), True, input_of, (VIEW,), True, labels, 0, cpu, images=2).show(rows, None)

    kinds = (lambda: proda(False, 5), lambda: proda(True, 5))
    one, two = proda(True, 1), proda(False, 2)
    both = show(kinds, before=one, after=two)
    assert used == [False, False]
    for together, before, after in zip(both, show(kinds[1], before=one), show(kinds[0], after=two), strict=True):
        np.testing.assert_array_equal(together.predictions["before"], before.predictions["before"])
        np.testing.assert_array_equal(together.predictions["after"], after.predictions["after"])
        np.testing.assert_array_equal(together.confidence, after.confidence)
        assert (together.predictions["before"] != together.predictions["after"]).any()


def test_images_without_labels_have_no_truth():
    assert showcase(labelled=False).show({"adapted": weights(0)}, None)[0].truth is None


def test_an_image_that_cannot_be_read_is_left_out():
    shown = showcase(Reader(broken=(3,))).show({"source_only": weights(0), "adapted": weights(1)}, None)
    assert [item.image_id for item in shown] == ["image 1", "image 5", "image 7"]


def test_resizing_takes_the_nearest_pixel():
    label = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(_resized(label, (6, 4)), label.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(_resized(label, (1, 1)), [[4]])
