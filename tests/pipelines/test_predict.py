from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from models.networks.build import SMALL, Build
from pipelines import predict as predict_module
from pipelines.deployed import Card
from pipelines.options import PriorOptions, write_config
from pipelines.predict import ModelPredictor, Predictor, find_pictures, predict
from pipelines.priors import Prior, write_prior
from pipelines.run_prior import estimate_of_run
from pipelines.trained import load_trained
from tests.pipelines.test_trained import finished_run

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)[0]


def go(run, tmp_path, *paths, **more):
    told = []
    given = {"run": run.plan.folder, "threads": 1, **more}
    done = predict(paths, str(tmp_path / "out"), lambda *what: told.append(what), **given)
    return done, told


def test_a_picture_gets_a_mask_a_colour_mask_an_overlay_and_its_confidence_at_its_own_size(run, tmp_path):
    photo = tmp_path / "own/target/photos/1.jpg"
    done, told = go(run, tmp_path, str(photo))
    assert (done.pictures, done.skipped, told) == (1, [], [(1, 1)])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"1_mask.png", "1_colour.png", "1_confidence.png", "1_overlay.jpg"}
    with Image.open(photo) as image:
        size = image.size
    with Image.open(tmp_path / "out/1_mask.png") as mask, Image.open(tmp_path / "out/1_colour.png") as colour:
        assert mask.size == colour.size == size
        assert mask.mode == "L"
        ids = np.asarray(mask)
        np.testing.assert_array_equal(np.asarray(colour), run.benchmark.classes.colourise(ids))
    assert ids.max() < 3


def test_it_says_what_the_evaluator_would(run, tmp_path):
    """On a picture of the benchmark's own proportions."""
    trained = load_trained(run.plan.folder, CPU)
    scorer = run.make_scorer()(CPU)
    scorer.network.load_state_dict(trained.network.state_dict())
    index = run.domains.validation.image_ids.index("photos/0.jpg")
    image = run.domains.validation.image(index)
    expected = scorer.predict(index, image.shape[:2]).numpy()
    np.testing.assert_array_equal(Predictor(trained, CPU)(image).mask, expected)


def test_uncertainty_is_the_deviation_over_passes_and_is_drawn_on_request(run, tmp_path):
    done, _ = go(run, tmp_path, str(tmp_path / "own/target/photos/1.jpg"), passes=4)
    assert done.pictures == 1
    assert (tmp_path / "out/1_uncertainty.png").is_file()
    trained = load_trained(run.plan.folder, CPU)
    image = run.domains.target.image(0)
    deviation = Predictor(trained, CPU, passes=4)(image).uncertainty
    assert deviation.shape == image.shape[:2]
    assert 0 <= deviation.min() < deviation.max() <= 0.5
    assert Predictor(trained, CPU, passes=4, rate=0.0)(image).uncertainty.max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (700, 500), (33, 31)])
def test_a_picture_may_have_any_size(run, tmp_path, size):
    Image.new("RGB", size, (90, 20, 10)).save(tmp_path / "x.png")
    go(run, tmp_path, str(tmp_path / "x.png"))
    with Image.open(tmp_path / "out/x_mask.png") as mask:
        assert mask.size == size


def test_a_large_picture_is_predicted_smaller_and_enlarged(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "MOST_NUMBERS", 3 * 20 * 10)
    trained = load_trained(run.plan.folder, CPU)
    made = Predictor(trained, CPU, passes=2)(np.zeros((100, 200, 3), np.uint8))
    assert made.mask.shape == made.confidence.shape == made.uncertainty.shape == (100, 200)


def test_folders_keep_their_order_inside_and_equal_names_stay_apart(tmp_path):
    for name in ("a/x.png", "a/b/x.jpg", "a/x.jpg", "c/x.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_pictures([str(tmp_path / "a"), str(tmp_path / "c" / "*.png")])
    assert {str(name): path.relative_to(tmp_path).as_posix() for path, name in found} == {
        "b/x": "a/b/x.jpg",
        "x": "a/x.jpg",
        "x-2": "a/x.png",
        "x-3": "c/x.png",
    }


def test_a_folder_without_pictures_and_a_pattern_that_finds_none_are_refused(tmp_path):
    with pytest.raises(RunError, match="holds no picture"):
        find_pictures([str(tmp_path)])
    with pytest.raises(RunError, match="as a pattern it finds none"):
        find_pictures([str(tmp_path / "*.png")])


def test_what_is_no_picture_is_skipped_and_named_and_the_others_are_predicted(run, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done, _ = go(run, tmp_path, str(tmp_path / "bad.png"), str(tmp_path / "own/target/photos"))
    assert done.pictures == 8
    assert len(done.skipped) == 1
    assert "bad.png" in done.skipped[0]
    with pytest.raises(RunError, match="none of the 1 files can be read"):
        go(run, tmp_path, str(tmp_path / "bad.png"))


def test_its_own_results_are_not_predicted_again(run, tmp_path):
    for _ in range(2):
        done, _ = go(run, tmp_path, str(tmp_path))
        assert done.pictures == 8 * 2 + 8 * 2  # photos and masks of both domains
    with pytest.raises(RunError, match="give another --out"):
        go(run, tmp_path, str(tmp_path / "out"))


def test_a_full_disk_is_a_sentence(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RunError, match=r"cannot be written .*No space left"):
        go(run, tmp_path, str(tmp_path / "own/target/photos/1.jpg"))


def test_without_a_run_the_newest_is_taken(run, tmp_path):
    done = predict([str(tmp_path / "own/source/photos")], str(tmp_path / "out"), lambda *_: None, runs=run.options.runs)
    assert done.origin == run.options.folder()


def test_pictures_that_lie_where_the_results_go_are_left_out_and_told(run, tmp_path):
    for folder in ("out", "photos"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / folder / f"{folder}.png")
    done, _ = go(run, tmp_path, str(tmp_path / "photos"), str(tmp_path / "photos" / ".." / "out"))
    assert done.pictures == 1
    (said,) = done.skipped
    assert said.startswith("1 pictures that lie in")


def test_an_overlay_longer_than_a_jpeg_can_be_is_shrunk(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "LONGEST_JPEG", 300)
    Image.new("RGB", (900, 30)).save(tmp_path / "x.png")
    go(run, tmp_path, str(tmp_path / "x.png"))
    with Image.open(tmp_path / "out/x_overlay.jpg") as overlay, Image.open(tmp_path / "out/x_mask.png") as mask:
        assert overlay.width == 300
        assert mask.size == (900, 30)


def test_passes_of_a_network_without_a_dropout_are_refused(run):
    trained = load_trained(run.plan.folder, CPU)
    bisenet = replace(trained, network=Build(replace(SMALL["bisenet18"], num_classes=3))().eval())
    with pytest.raises(RunError, match=r"--passes is 4, but the network of .* has no dropout .* leave --passes out"):
        Predictor(bisenet, CPU, 4)
    image = np.zeros((40, 60, 3), np.uint8)
    assert Predictor(bisenet, CPU)(image).mask.shape == (40, 60)


# Adjusted to other class frequencies.

NAMES = ("class 0", "class 1", "class 2")
SKEWED = Prior(NAMES, (0.5, 0.3, 0.2), (0.05, 0.15, 0.8))
DELTA = np.log([0.1, 0.5, 4.0])


@pytest.fixture
def sure(run):
    """A run whose network is sure of some pixels and not of others."""
    network = load_trained(run.plan.folder, CPU).network
    torch.manual_seed(1)
    for head in network.heads():
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
    state = {"step": 4, "teaching": {"network": network.state_dict()}}
    assert CheckpointStore(run.options.folder() / "checkpoints").save(4, state) is None
    return run


def mask_of(tmp_path, name="1"):
    with Image.open(tmp_path / f"out/{name}_mask.png") as mask:
        return np.asarray(mask)


@torch.no_grad()
def by_hand(trained, image, offset):
    """Mean over views of the softmax of offset scores, float64 (C, H, W); views as the evaluator sees them."""
    views, mirrored, total = trained.description.views, trained.description.mirrored, 0
    for width, height in views:
        x = predict_module._resized(image, (width, height))
        x = predict_module.network_input(torch.from_numpy(x)[None], trained.network.config.pixels)
        for flip in (False, True) if mirrored else (False,):
            z = trained.network(x.flip(3) if flip else x).fused().double() + torch.from_numpy(offset)[:, None, None]
            p = z.softmax(1).flip(3) if flip else z.softmax(1)
            p = torch.nn.functional.interpolate(p, image.shape[:2], mode="bilinear", align_corners=True)
            total = total + p[0].numpy()
    return total / (len(views) * (1 + mirrored))


def test_an_offset_is_added_to_the_scores(sure):
    trained, image = load_trained(sure.plan.folder, CPU), sure.domains.target.image(0)
    plain, found = Predictor(trained, CPU)(image), Predictor(trained, CPU, offset=DELTA)(image)
    share = by_hand(trained, image, DELTA)
    assert (found.mask == share.argmax(0)).mean() > 0.999
    np.testing.assert_allclose(found.confidence, share.max(0), atol=1e-5)
    assert (found.mask != plain.mask).mean() > 0.05
    same = Predictor(trained, CPU, offset=np.zeros(3))(image)
    np.testing.assert_array_equal(same.mask, plain.mask)
    np.testing.assert_array_equal(same.confidence, plain.confidence)


def test_uncertainty_is_of_adjusted_scores_too(sure):
    trained, image = load_trained(sure.plan.folder, CPU), sure.domains.target.image(0)
    plain, same, found = (
        Predictor(trained, CPU, 4, offset=offset)(image).uncertainty for offset in (None, np.zeros(3), DELTA)
    )
    np.testing.assert_array_equal(same, plain)
    assert np.abs(found - plain).max() > 0.01


def prediction(run, photo, offset):
    with Image.open(photo) as picture:
        return Predictor(load_trained(run.plan.folder, CPU), CPU, offset=offset)(np.asarray(picture)).mask


@pytest.mark.parametrize("temperature", [None, 1.8])
def test_the_file_of_a_user_adjusts_as_the_runs_temperature_says(sure, tmp_path, temperature):
    """A run directory that has lost its options has a temperature of 1."""
    if temperature is not None:
        write_config(replace(sure.options, prior=PriorOptions(temperature=temperature)))
    write_prior(tmp_path / "mine.toml", SKEWED)
    photo = str(tmp_path / "own/target/photos/1.jpg")
    once, often = (prediction(sure, photo, times * DELTA) for times in (1.0, 1.8))
    assert (once != often).mean() > 0.02, "the case must have something to say"
    go(sure, tmp_path, photo, adjust_prior=str(tmp_path / "mine.toml"))
    np.testing.assert_array_equal(mask_of(tmp_path), once if temperature is None else often)
    go(sure, tmp_path, photo)
    np.testing.assert_array_equal(mask_of(tmp_path), prediction(sure, photo, None))


def test_estimated_is_what_was_estimated_before(sure, tmp_path):
    write_config(sure.options)
    photo = str(tmp_path / "own/target/photos/1.jpg")
    with pytest.raises(RunError, match=r"are not estimated yet; .*python run\.py prior .*run"):
        go(sure, tmp_path, photo, adjust_prior="estimated")
    assert not (tmp_path / "out").exists()
    found = estimate_of_run(sure.plan.folder, "confusion", lambda *_: None, threads=1)
    go(sure, tmp_path, photo, adjust_prior="estimated")
    np.testing.assert_array_equal(mask_of(tmp_path), prediction(sure, photo, found.offset))
    assert (mask_of(tmp_path) != prediction(sure, photo, None)).any()


def test_class_frequencies_of_other_classes_are_refused(run, tmp_path):
    photo = str(tmp_path / "own/target/photos/1.jpg")
    with pytest.raises(RunError, match="the classes of synthia-original are not those of the run"):
        go(run, tmp_path, photo, adjust_prior="synthia-original")


@pytest.fixture
def model(run, tmp_path, monkeypatch):
    """An exported model whose scores of a pixel are its colour: a file's name, since nothing is opened."""
    card = Card(run.benchmark.classes, 3, (40, 30), 40 * 30)
    monkeypatch.setattr(predict_module, "format_of", lambda path: "onnx")
    monkeypatch.setattr(predict_module, "read_card", lambda path: card)
    monkeypatch.setattr(predict_module, "open_model", lambda *_: lambda images: images / 40.0)
    return str(tmp_path / "x.onnx")


def test_an_exported_model_is_adjusted_by_a_file(model, tmp_path):
    write_prior(tmp_path / "mine.toml", SKEWED)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    for adjust, delta in (("none", np.zeros(3)), (str(tmp_path / "mine.toml"), DELTA)):
        found = ModelPredictor(model, 1, adjust)(image)
        z = image.astype(np.float64) / 40 + delta
        p = np.exp(z) / np.exp(z).sum(2, keepdims=True)
        assert (found.mask == p.argmax(2)).mean() > 0.999
        np.testing.assert_allclose(found.confidence, p.max(2), atol=1e-5)
    with pytest.raises(RunError, match="--adjust-prior estimated needs a run; with --model give a TOML file"):
        ModelPredictor(model, 1, "estimated")
    with pytest.raises(RunError, match="the classes of gta5-original are not those of the run"):
        ModelPredictor(model, 1, "gta5-original")


def test_a_model_is_asked_with_the_class_frequencies_of_the_command(model, run, tmp_path):
    write_prior(tmp_path / "mine.toml", SKEWED)
    photo = tmp_path / "own/target/photos/1.jpg"
    given = {"model": model, "adjust_prior": str(tmp_path / "mine.toml"), "threads": 1}
    predict([str(photo)], str(tmp_path / "out"), lambda *_: None, **given)
    with Image.open(photo) as picture:
        expected = ModelPredictor(model, 1, given["adjust_prior"])(np.asarray(picture)).mask
    np.testing.assert_array_equal(mask_of(tmp_path), expected)
