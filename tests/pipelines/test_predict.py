from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from actors.errors import RunError
from models.networks.build import SMALL, Build
from pipelines import predict as predict_module
from pipelines.predict import Predictor, find_pictures, predict
from pipelines.trained import load_trained
from tests.pipelines.test_trained import finished_run

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)[0]


def go(run, tmp_path, *paths, **more):
    told = []
    done = predict(paths, str(tmp_path / "out"), lambda *what: told.append(what), run=run.plan.folder, **more)
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
