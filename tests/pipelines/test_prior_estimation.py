"""Estimates of class frequencies with a network at hand, on folders of stripes."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from actors.errors import RunError, UnreadableImage
from actors.labeller import label_seed
from actors.prior_estimate import CELLS
from models.networks.fada import Fada, FadaConfig, FadaScores
from models.priors import encode_posteriors
from pipelines import prior_estimation
from pipelines.benchmarks import own_benchmark
from pipelines.datasets.classes import ClassSet
from pipelines.options import PriorOptions
from pipelines.prior_estimation import SourceImages, Survey, prior_plan, source_prior, spread
from pipelines.priors import Prior, write_prior
from tests.own_data import write_own_data

CLASSES = ClassSet("three", ("road", "car", "person"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
SIZE = (12, 10)


class Reader:
    """Images of noise, some of which cannot be read."""

    def __init__(self, images=6, broken=()):
        self.image_ids, self.broken = tuple(f"city/{index}" for index in range(images)), broken

    def __len__(self):
        return len(self.image_ids)

    def read(self, index, size):
        if index in self.broken:
            raise UnreadableImage(f"/data/{index}.png", "broken")
        return np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)


class Colours(Fada):
    """A network whose scores of a pixel are its colour."""

    def __init__(self):
        nn.Module.__init__(self)
        self.config = FadaConfig(3, pixels="rgb_unit")
        self.weight = nn.Parameter(torch.full((1,), 6.0))
        self.seen = []

    def forward(self, images):
        assert not self.training
        self.seen.append(len(images))
        return FadaScores(images * self.weight)


def scores(index):
    """Float64 (C, h, w)."""
    return Reader().read(index, SIZE).astype(np.float64).transpose(2, 0, 1) / 255 * 6


def softmax(z):
    e = np.exp(z - z.max(0))
    return e / e.sum(0)


def survey(reader=None, **more):
    return Survey(reader or Reader(), SIZE, seed=3, **more)


def test_a_survey_sees_every_image_once_and_plain():
    network, told = Colours().train(), []
    evidence = survey()(network, told.append)
    assert network.seen == [4, 2]
    assert told == [4, 6]
    assert evidence.posteriors.shape == (6, CELLS, 3)
    assert evidence.source is None
    for index in range(6):
        p = softmax(scores(index))
        np.testing.assert_allclose(evidence.means[index], p.mean((1, 2)), atol=1e-6)
        np.testing.assert_allclose(evidence.log_means[index], np.log(np.exp(p).mean((1, 2))), atol=1e-6)
        drawn = torch.randperm(120, generator=torch.Generator().manual_seed(label_seed(3, f"city/{index}", 0)))[:CELLS]
        cells = encode_posteriors(p.reshape(3, -1).T)[drawn].astype(int)
        assert np.abs(evidence.posteriors[index].astype(int) - cells).max() <= 1


def test_its_bottom_rows_tell_nothing_and_scores_are_divided_by_the_temperature():
    evidence = survey(ignore_bottom=0.3, temperature=1.8)(Colours())
    for index in range(6):
        p = softmax(scores(index)[:, :7] / 1.8)
        np.testing.assert_allclose(evidence.means[index], p.mean((1, 2)), atol=1e-6)
        np.testing.assert_allclose(evidence.log_means[index], np.log(np.exp(p).mean((1, 2))), atol=1e-6)


def test_images_that_cannot_be_read_are_left_out_and_keep_no_one_else_from_its_cells():
    whole, found = survey()(Colours()), survey(Reader(broken=(1, 4)))(Colours())
    np.testing.assert_array_equal(found.posteriors, whole.posteriors[[0, 2, 3, 5]])
    assert found.means.shape == (4, 3)
    with pytest.raises(RunError, match="none of the target images can be read, so nothing can be estimated"):
        survey(Reader(broken=range(6)))(Colours())


class Labelled(Reader):
    """Images of noise with labels of another size, some pixels of which are of no class."""

    def label(self, index):
        label = np.random.default_rng([7, index]).integers(0, 3, (21, 17)).astype(np.uint8)
        label[:4] = 255
        return label


def taken_for(indices, temperature=1.0):
    """Sums of probabilities by the label that lies under the middle of every pixel, float64."""
    sums = np.zeros((3, 3))
    for index in indices:
        p, label = softmax(scores(index) / temperature), Labelled().label(index)
        for row in range(10):
            for column in range(12):
                of = label[int((row + 0.5) * 21 / 10), int((column + 0.5) * 17 / 12)]
                if of != 255:
                    sums[of] += p[:, row, column]
    return sums


@pytest.mark.parametrize("temperature", [1.0, 1.8])
def test_source_images_tell_what_is_taken_for_what(temperature):
    found = SourceImages(Labelled(), SIZE).look(Colours().eval(), [3, 0, 3], temperature)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, taken_for([3, 0, 3], temperature), rtol=1e-5)


def test_source_images_that_cannot_be_read_are_left_out():
    images = SourceImages(Labelled(broken=(1,)), SIZE)
    assert len(images) == 6
    np.testing.assert_allclose(images.look(Colours().eval(), [0, 1], 1.0), taken_for([0]), rtol=1e-5)
    assert not images.look(Colours().eval(), [1], 1.0).any()
    assert images.look(Colours().eval(), [], 1.0).shape == (3, 3)


def test_a_survey_looks_at_source_images_that_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(prior_estimation, "SOURCE_IMAGES", 3)
    plain, found = survey()(Colours()), survey(source=SourceImages(Labelled(), SIZE), temperature=1.0)(Colours())
    np.testing.assert_allclose(found.source, taken_for([0, 2, 4]), rtol=1e-5)
    np.testing.assert_array_equal(found.posteriors, plain.posteriors)
    warm = survey(source=SourceImages(Labelled(), SIZE), temperature=1.8)(Colours())
    np.testing.assert_allclose(warm.source, taken_for([0, 2, 4], 1.8), rtol=1e-5)


def test_a_survey_travels_to_students():
    found = pickle.loads(pickle.dumps(survey(source=SourceImages(Labelled(), SIZE))))
    assert (found.size, found.seed, len(found.source)) == (SIZE, 3, 6)


@pytest.mark.parametrize(
    ("count", "images", "expected"), [(4, 8, [0, 2, 4, 6]), (3, 10, [0, 3, 6]), (9, 3, [0, 1, 2]), (5, 0, [])]
)
def test_images_are_spread_evenly(count, images, expected):
    assert spread(count, images) == expected


# What an estimate begins from.


@pytest.fixture
def source(tmp_path):
    """Eight labelled pictures of stripes of three classes, of which the first is repainted by hand."""
    split = own_benchmark(*write_own_data(tmp_path / "own"))[1].source
    label = np.zeros((48, 64), np.uint8)
    label[0, :4] = 2  # 4 of 3072 pixels: enough to be counted, and more than the thousandth part
    Image.fromarray(label).save(split.label_paths[0])
    return split


def shares_by_hand(split, least=None):
    counts = np.zeros(3)
    for index in range(len(split)):
        pixels = np.bincount(split.label(index).reshape(-1), minlength=3)
        counts += pixels if least is None else pixels >= least * pixels.sum()
    return counts / counts.sum()


@pytest.mark.parametrize(("method", "least"), [("em", None), ("confusion", None), ("counts", 0.001)])
def test_the_sources_frequencies_are_those_that_an_estimator_compares_with(source, method, least):
    found, presence = source_prior(source, 3, method, None)
    np.testing.assert_allclose(found, shares_by_hand(source, least))
    np.testing.assert_allclose(presence, shares_by_hand(source))
    assert np.abs(shares_by_hand(source) - shares_by_hand(source, 0.001)).max() > 0.01


def test_classes_that_the_labels_do_not_know_have_no_share(source):
    found, presence = source_prior(source, 5, "em", None)
    assert found[3:].tolist() == presence[3:].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found[:3], shares_by_hand(source))


@pytest.mark.parametrize("method", ["em", "counts"])
def test_labels_without_a_pixel_of_any_class_have_no_frequencies(source, method):
    for path in source.label_paths:
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    with pytest.raises(RunError, match=r"none of the 8 labels has a pixel of any class, .* --adjust-prior none"):
        source_prior(source, 3, method, None)


def test_a_plan_that_estimates_has_the_options_of_the_run(source, tmp_path):
    options = PriorOptions(method="counts", damping=0.2, floor=0.3, temperature=1.8)
    plan = prior_plan("estimated", options, CLASSES, source, tmp_path)
    assert plan.target is None
    assert (plan.method, plan.damping, plan.floor, plan.temperature) == ("counts", 0.2, 0.3, 1.8)
    np.testing.assert_allclose(plan.source, shares_by_hand(source, 0.001))
    np.testing.assert_allclose(plan.presence, shares_by_hand(source))
    assert all(type(share) is float for share in (*plan.source, *plan.presence)), "they travel to actors"
    assert [path.suffix for path in (tmp_path / "statistics").iterdir()] == [".npz"], "counted once"


def test_a_plan_from_a_file_counts_nothing(source, tmp_path):
    given = Prior(("person", "road", "car"), (0.2, 0.5, 0.3), (0.6, 0.2, 0.2))
    write_prior(tmp_path / "mine.toml", given)
    options = PriorOptions(temperature=2.0)
    plan = prior_plan(str(tmp_path / "mine.toml"), options, CLASSES, source, tmp_path)
    assert (plan.source, plan.target) == ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6)), "in the order of the run's classes"
    np.testing.assert_allclose(plan.offset(np.array(plan.target)), 2 * np.log([0.4, 2 / 3, 3]), rtol=1e-6)
    assert not (tmp_path / "statistics").exists()
    with pytest.raises(RunError, match=r"there is no file .*no\.toml with class frequencies"):
        prior_plan(str(tmp_path / "no.toml"), options, CLASSES, source, tmp_path)
    assert not (tmp_path / "statistics").exists()


def test_source_images_are_seen_without_the_rows_that_tell_nothing_on_the_target():
    whole = SourceImages(Labelled(), SIZE).look(Colours().eval(), [0], 1.0)
    upper = SourceImages(Labelled(), SIZE, ignore_bottom=0.5).look(Colours().eval(), [0], 1.0)
    assert (upper <= whole + 1e-12).all()
    assert 0 < upper.sum() < whole.sum()
