import numpy as np
import pytest
from PIL import Image

from pipelines import pictures
from pipelines.datasets.classes import ClassSet

CLASSES = ClassSet("three", ("sea", "land", "a rather long name"), ((0, 0, 200), (0, 200, 0), (200, 0, 0)))


def test_an_overlay_mixes_the_colour_in_and_leaves_ignored_pixels_alone():
    image = np.full((1, 4, 3), 100, np.uint8)
    shown = pictures.overlay(image, np.array([[255, 255, 1, 1]], np.uint8), CLASSES)
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 3].tolist() == [45, 155, 45]
    assert shown[0, 2].sum() < shown[0, 3].sum()


def test_heat_begins_dark_and_ends_bright_and_clips():
    shown = pictures.heat(np.array([[-1.0, 0.0, 0.5, 1.0, 2.0]], np.float32))
    assert shown[0, 0].tolist() == shown[0, 1].tolist() == [0, 0, 4]
    assert shown[0, 2].tolist() == [188, 55, 84]
    assert shown[0, 3].tolist() == shown[0, 4].tolist() == [252, 255, 164]


def test_the_key_grows_downwards_when_its_names_do_not_fit():
    picture = np.zeros((20, 200, 3), np.uint8)
    few, many = (pictures.with_key(picture, CLASSES, shown) for shown in ([0], [0, 1, 2]))
    assert few.width == many.width == 200
    assert many.height > few.height > 20


def test_pictures_stand_side_by_side_on_white():
    row = pictures.side_by_side([np.zeros((2, 3, 3), np.uint8)] * 2, gap=1)
    assert row.shape == (2, 7, 3)
    assert row[0, 3].tolist() == [255, 255, 255]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        pictures.save(Image.new("RGB", (2, 2)), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_fitted_by_its_longer_side_and_never_enlarged():
    assert pictures.fitted((100, 400), 200) == (200, 50)
    assert pictures.fitted((400, 100, 3), 200) == (50, 200)
    assert pictures.fitted((10, 20), 200) == (20, 10)
    assert pictures.fitted((1, 4000), 200) == (200, 1)
