import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from fakes import Remote
from PIL import Image

from actors.errors import UnreadableImage
from actors.evaluator import Evaluator, Recommended, Scorer
from actors.weight_board import WeightBoard
from models.networks.bisenet import BiSeNet, BiSeNetConfig, MainOutput
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.proda import Proda
from pipelines.views import input_of

CONFIG = DeepLabConfig(
    num_classes=4, layers=(1, 1, 1, 1), width=4, branch_channels=8, bottleneck_channels=16, groups=4, dilations=(1, 2)
)
CPU = torch.device("cpu")
PROTOCOLS = {"4": (0, 1, 2, 3), "2": (0, 1)}


class Reader:
    """Random images, labels of another size with an ignored corner."""

    def __init__(self, images=3, broken=()):
        self.images, self.broken = images, broken

    def __len__(self):
        return self.images

    def read(self, index, size):
        if index in self.broken:
            raise UnreadableImage(f"/data/{index}.png", "broken")
        return np.random.default_rng([index, *size]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)

    def label(self, index):
        label = np.random.default_rng([7, index]).integers(0, 3, (20, 36)).astype(np.uint8)
        label[:4, :4] = 255
        return label


def network(seed=0):
    torch.manual_seed(seed)
    made = DeepLab(CONFIG)
    for head in made.heads():
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
    return made.eval()


def weights(made):
    return {name: tensor.numpy() for name, tensor in made.state_dict().items()}


def scorer(reader, views=((48, 32),), mirrored=False, offset=None):
    return Scorer(lambda: DeepLab(CONFIG), reader, input_of, views, mirrored, 4, PROTOCOLS, CPU, offset=offset)


@torch.no_grad()
def slow_prediction(made, reader, index, views, mirrored, offset=(0, 0, 0, 0)):
    """Whole passes, one view after the other."""
    offset = torch.tensor(offset, dtype=torch.float64)[:, None, None]
    total = 0
    for view in views:
        x = input_of(torch.from_numpy(reader.read(index, view))[None], made)
        for flip in (False, True) if mirrored else (False,):
            logits = made(x.flip(3) if flip else x)
            p = (0.5 * logits.aux + logits.main + offset).softmax(1)
            p = p.flip(3) if flip else p
            total = total + torch.nn.functional.interpolate(p, (20, 36), mode="bilinear", align_corners=True)
    return total[0].argmax(0).numpy()


def slow_ious(made, reader, views, mirrored):
    ious = []
    predictions = [slow_prediction(made, reader, i, views, mirrored) for i in range(len(reader))]
    labels = [reader.label(i) for i in range(len(reader))]
    for c in range(4):
        both = sum(((p == c) & (y == c)).sum() for p, y in zip(predictions, labels, strict=True))
        either = sum((((p == c) | (y == c)) & (y != 255)).sum() for p, y in zip(predictions, labels, strict=True))
        ious.append(None if either == 0 else 100 * both / either)
    return ious


@pytest.mark.parametrize(("views", "mirrored"), [(((48, 32),), False), (((48, 32), (64, 40)), True)])
def test_scores_are_those_of_one_confusion_matrix_over_the_set(views, mirrored):
    made, reader = network(), Reader()
    expected = slow_ious(made, reader, views, mirrored)
    found = scorer(reader, views, mirrored).score(weights(made))
    assert found["images"] == 3
    for mine, theirs in zip(found["per_class"], expected, strict=True):
        assert mine is theirs is None or mine == pytest.approx(theirs, abs=6e-4)
    present = [v for v in expected if v is not None]
    assert found["miou"] == found["protocols"]["4"] == pytest.approx(np.mean(present), abs=1e-3)
    assert found["protocols"]["2"] == pytest.approx(np.mean([v for v in expected[:2] if v is not None]), abs=1e-3)


def test_the_confusion_matrix_counts_labels_in_rows_and_predictions_in_columns():
    made, reader = network(), Reader()
    found = np.array(scorer(reader).score(weights(made))["confusion"])
    expected = np.zeros((4, 4), int)
    for index in range(len(reader)):
        prediction = slow_prediction(made, reader, index, ((48, 32),), False)
        label = reader.label(index)
        for row in range(4):
            expected[row] += np.bincount(prediction[label == row], minlength=4)
    assert np.abs(found - expected).sum() <= 4  # a tie or two
    assert found.sum() == expected.sum()


@pytest.mark.parametrize(("views", "mirrored"), [(((48, 32),), False), (((48, 32), (64, 40)), True)])
def test_an_offset_of_the_class_scores_decides_with_them(views, mirrored):
    """Inference adjustment, methods §7.4, against float64."""
    made, reader, offset = network(), Reader(), [1.5, -1.0, 0.0, 0.7]
    adjusted = scorer(reader, views, mirrored, np.array(offset, np.float32))
    found = np.array(adjusted.score(weights(made))["confusion"])
    expected = np.zeros((4, 4), int)
    for index in range(len(reader)):
        prediction = slow_prediction(made, reader, index, views, mirrored, offset)
        label = reader.label(index)
        for row in range(4):
            expected[row] += np.bincount(prediction[label == row], minlength=4)
    assert np.abs(found - expected).sum() <= 4  # a tie or two
    plain = np.array(scorer(reader, views, mirrored).score(weights(made))["confusion"])
    assert np.abs(found - plain).sum() > 100, "the case must have something to say"
    zeros = scorer(reader, views, mirrored, np.zeros(4)).score(weights(made))["confusion"]
    np.testing.assert_array_equal(zeros, plain)


def test_a_class_that_occurs_nowhere_has_no_score():
    made = network()
    with torch.no_grad():
        for head in made.heads():
            head.classifier.weight.zero_()
    found = scorer(Reader()).score(weights(made))
    assert found["per_class"][3] is None
    assert found["per_class"][0] > 0


class StubbornNetwork(BiSeNet):
    """Answers with class 3, 1 or 2 by how bright a pixel is: what it says of an image can be counted by hand."""

    def trunk(self, images):
        return images.mean(1, keepdim=True)

    def classify(self, features):
        dark, bright = features < 100, features > 150
        return MainOutput(10.0 * torch.cat((features * 0, ~dark & ~bright, bright, dark), 1).float())


def gray(images, network):
    return images.permute(0, 3, 1, 2).float()


def test_labels_are_brought_to_the_protocols_size_and_scored_as_they_are_in_one_go():
    """BiSeNet's protocol and everybody else's, against NumPy and Pillow: class 0 is labelled and never said."""
    torch.manual_seed(0)
    config = BiSeNetConfig(num_classes=5, layers=(1, 1, 1, 1), width=4, spatial_width=4)
    made, reader, seen = StubbornNetwork(config), Reader(4), []
    scores = Scorer(
        lambda: StubbornNetwork(config),
        reader,
        gray,
        ((18, 10),),
        False,
        5,
        {"5": range(5), "3": (0, 1, 4)},
        CPU,
        label_size=(18, 10),
    )
    small, own = scores.score_at([(18, 10), None], weights(made), lambda *what: seen.append(what))
    assert scores.score(weights(made)) == small
    assert [tuple(label.shape) for _, _, label in seen] == [(10, 18)] * 4
    predictions, labels, wide = [], [], []
    for index in range(4):
        brightness = reader.read(index, (18, 10)).astype(np.float32).mean(2)
        predictions.append(np.where(brightness < 100, 3, np.where(brightness > 150, 2, 1)))
        wide.append(reader.label(index))
        labels.append(np.asarray(Image.fromarray(wide[-1]).resize((18, 10), Image.Resampling.NEAREST)))
    np.testing.assert_array_equal([prediction.numpy() for _, prediction, _ in seen], predictions)
    np.testing.assert_array_equal([label.numpy() for _, _, label in seen], labels)
    p, y = np.stack(predictions), np.stack(labels)
    both = np.array([((p == c) & (y == c)).sum() for c in range(5)])
    either = np.array([(((p == c) | (y == c)) & (y != 255)).sum() for c in range(5)])
    assert either[4] == 0
    assert small["miou"] == pytest.approx(100 * np.mean(both[:4] / either[:4]))
    assert small["absent_as_zero"]["5"] == pytest.approx(100 * np.mean(both / (either + 1e-5)))
    assert small["absent_as_zero"]["3"] == pytest.approx(100 * np.sum(both[:2] / (either[:2] + 1e-5)) / 3)
    assert small["accuracy"] == pytest.approx(100 * (p == y).sum() / (y != 255).sum())
    assert small["accuracy_ignored_wrong"] == pytest.approx(
        100 * np.mean([(a == b).mean() for a, b in zip(p, y, strict=True)])
    )
    assert small["accuracy_ignored_wrong"] < small["accuracy"]
    assert (small["images"], np.sum(small["confusion"])) == (4, (y != 255).sum())
    assert np.sum(own["confusion"]) == (np.stack(wide) != 255).sum()
    plain = Scorer(lambda: StubbornNetwork(config), reader, gray, ((18, 10),), False, 5, scores.protocols, CPU)
    assert plain.score(weights(made)) == own


def test_the_kept_weights_are_those_of_the_step_that_is_named(tmp_path):
    """A resumed run looks at earlier steps again, and one of them may look better."""
    kept = Recommended(str(tmp_path))
    kept.offer(225, 0.5, {"w": np.full(1, 5.0)})
    kept.offer(200, 0.9, {"w": np.full(1, 9.0)})
    kept.offer(250, float("nan"), {"w": np.full(1, 7.0)})
    kept.offer(300, 0.4, {"w": np.full(1, 4.0)})
    for found in (kept, Recommended(str(tmp_path))):
        assert (found.step, found.score) == (200, 0.9)
        assert found.weights()["w"].tolist() == [9.0]


def test_a_broken_validation_image_ends_the_score_by_name():
    with pytest.raises(UnreadableImage, match=r"/data/1\.png"):
        scorer(Reader(broken=(1,))).score(weights(network()))


def test_adabn_changes_the_statistics_alone_and_leaves_broken_images_out():
    made = network()
    scores = scorer(Reader())
    adapted = scores.with_statistics_of(weights(made), Reader(8, broken=(0, 5)), range(8), batch=4)
    again = scores.with_statistics_of(weights(made), Reader(8, broken=(0, 5)), [1, 2, 3, 4, 6, 7], batch=3)
    changed = {name for name, array in weights(made).items() if not np.array_equal(array, adapted[name])}
    assert changed
    assert all("running" in name or "tracked" in name for name in changed)
    assert again.keys() == adapted.keys()


def proda(extra_norm, seed=0):
    torch.manual_seed(seed)
    made = Proda(replace(CONFIG, heads="proda", extra_norm=extra_norm))
    torch.nn.init.normal_(made.layer5.classifier.weight, std=1.0)
    torch.nn.init.normal_(made.bn1.running_mean)
    return made.eval()


def scorer_of(*networks):
    return Scorer(networks, Reader(), input_of, ((48, 32),), True, 4, PROTOCOLS, CPU)


def test_networks_of_different_stages_are_scored_each_as_itself():
    """One head, with and without a norm before it, and two heads."""
    plain, normed, two = proda(False), proda(True, 1), network(2)
    kinds = (lambda: proda(False, 5), lambda: proda(True, 5), lambda: DeepLab(CONFIG))
    together = scorer_of(*kinds)
    for made, kind in ((normed, kinds[1]), (plain, kinds[0]), (two, kinds[2]), (normed, kinds[1])):
        assert together.score(weights(made)) == scorer_of(kind).score(weights(made))
    assert together.score(weights(plain))["confusion"] != together.score(weights(normed))["confusion"]
    with pytest.raises(ValueError, match="none of the run's networks"):
        scorer_of(kinds[0]).score(weights(normed))


def test_a_network_with_one_head_is_scored_by_it():
    made, reader = proda(False), Reader()
    found = np.array(scorer_of(lambda: proda(False, 5)).score(weights(made))["confusion"])
    expected = np.zeros((4, 4), int)
    for index in range(len(reader)):
        x = input_of(torch.from_numpy(reader.read(index, (48, 32)))[None], made)
        with torch.no_grad():
            p = (made(x).main.softmax(1) + made(x.flip(3)).main.softmax(1).flip(3)) / 2
        p = torch.nn.functional.interpolate(p, (20, 36), mode="bilinear", align_corners=True)
        prediction, label = p[0].argmax(0).numpy(), reader.label(index)
        for row in range(4):
            expected[row] += np.bincount(prediction[label == row], minlength=4)
    assert np.abs(found - expected).sum() <= 4  # a tie or two


def test_adabn_adapts_the_network_that_the_weights_belong_to():
    scores, made = scorer_of(lambda: proda(False, 5), lambda: proda(True, 5)), proda(True)
    adapted = scores.with_statistics_of(weights(made), Reader(8), range(8), batch=4)
    changed = {name for name, array in weights(made).items() if not np.array_equal(array, adapted[name])}
    assert "bn_pretrain.running_mean" in changed
    assert all("running" in name or "tracked" in name for name in changed)


@pytest.fixture
def evaluator(monkeypatch, tmp_path):
    """An evaluator beside a board and a log, and what it wrote there. Weights are their own score."""
    monkeypatch.setattr(os, "nice", lambda by: 0)
    monkeypatch.setattr(ray, "get", lambda value: value)
    board, lines = WeightBoard(), []
    handle = SimpleNamespace(newest_version=Remote(board.newest_version), take=Remote(board.take))
    log = SimpleNamespace(write=Remote(lambda *line: lines.append(line)))
    scorer = SimpleNamespace(score=lambda weights: {"miou": float(weights["w"])})
    watcher = SimpleNamespace(look=lambda teaching, student: {"label_free_score": float(teaching["w"]) / 100})
    made = Evaluator(lambda device: scorer, lambda device: watcher, None, None, handle, log, str(tmp_path / "kept"))
    made.hanging, made.lines = board, lines
    return made


def numbered(value):
    return {"w": np.array(value, np.float32)}


def test_the_newest_weights_are_looked_at_and_their_score_is_marked_as_an_oracles_number(evaluator):
    for version, miou in ((40, 10.0), (50, 20.0)):
        evaluator.hanging.publish(version, [numbered(miou), numbered(miou + 1)])
    assert evaluator.look_at_newest() == 50
    assert evaluator.lines == [
        ("signals", 50, {"label_free_score": 0.2}),
        ("score", 50, {"miou": 20.0, "oracle_metric": True}),
    ]


def test_the_weights_that_look_best_are_kept_also_by_an_evaluator_that_starts_again(evaluator, tmp_path):
    for step, value in ((10, 30.0), (20, 50.0), (30, 40.0)):
        found = evaluator.look(step, numbered(value))
    assert found["recommended"] == 20
    assert evaluator.score_recommended() == {"miou": 50.0}
    again = Recommended(str(tmp_path / "kept"))
    again.offer(40, 0.45, numbered(45.0))
    assert (again.step, again.score) == (20, 0.5)
    again.offer(50, 0.6, numbered(60.0))
    assert again.weights()["w"] == 60.0
    assert Recommended(str(tmp_path / "kept")).step == 50


def test_a_full_disk_leaves_the_weights_that_were_kept_before(evaluator, monkeypatch):
    evaluator.look(10, numbered(30.0))
    monkeypatch.setattr(evaluator.recommended.store, "save", lambda *_: "no space left")
    assert evaluator.look(20, numbered(50.0))["recommended"] == 10


def test_without_labels_only_signals_are_written(evaluator):
    evaluator.scorer = None
    evaluator.hanging.publish(5, [numbered(1.0)])
    evaluator.watcher.look = lambda teaching, student=None: {"label_free_score": 0.1}
    assert evaluator.look_at_newest() == 5
    assert [kind for kind, *_ in evaluator.lines] == ["signals"]


def test_held_out_source_images_are_one_of_the_signals(evaluator):
    evaluator.source_scorer = SimpleNamespace(score=lambda weights: {"miou": 2 * float(weights["w"])})
    evaluator.hanging.publish(5, [numbered(20.0), numbered(0.0)])
    evaluator.look_at_newest(score=False)
    assert evaluator.lines == [("signals", 5, {"label_free_score": 0.2, "source_miou": 0.4})]


def test_nothing_kept_is_nothing_scored(evaluator):
    assert evaluator.score_recommended() is None


def test_where_nothing_hangs_nothing_is_scored(evaluator):
    assert evaluator.look_at_newest() is None
    assert evaluator.lines == []


@pytest.mark.parametrize("error", [LookupError, ray.exceptions.RayError])
def test_weights_that_died_with_their_student_are_not_scored(evaluator, error):
    def gone(version):
        raise error

    evaluator.hanging.publish(40, [numbered(10.0)])
    evaluator.board.take = Remote(gone)
    assert evaluator.look_at_newest() is None
    assert evaluator.lines == []


def test_pictures_are_made_with_the_class_frequencies_that_labels_were_adjusted_to(evaluator):
    asked = []
    evaluator.make_showcase = lambda device: SimpleNamespace(show=lambda *given: asked.append(given) or [])
    rows, thresholds, prior = {"adapted": numbered(1.0)}, np.zeros(4, np.uint8), np.full(4, 0.25)
    assert evaluator.show(rows, thresholds, prior) == evaluator.show(rows, None) == []
    assert asked == [(rows, thresholds, prior), (rows, None, None)]
