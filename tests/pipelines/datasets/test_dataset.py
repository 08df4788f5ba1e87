import contextlib
import pickle

import numpy as np
import pytest
from PIL import Image
from real_encodings import write_gray, write_image, write_rgb16

from pipelines.datasets import (
    DataError,
    LabelEncoding,
    Split,
    UnreadableImage,
    read_image,
    read_label,
    synthia,
)

PLAIN = LabelEncoding.of("plain", "index", {1: 0, 2: 1})


def test_an_image_is_rgb_uint8(tmp_path):
    pixels = write_image(tmp_path / "x.png")
    image = read_image(str(tmp_path / "x.png"))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)


def test_an_image_is_resized_bicubically_to_width_and_height(tmp_path):
    pixels = write_image(tmp_path / "x.png", width=8, height=6)
    image = read_image(str(tmp_path / "x.png"), (5, 3))
    reference = Image.fromarray(pixels).resize((5, 3), Image.Resampling.BICUBIC)
    assert image.shape == (3, 5, 3)
    np.testing.assert_array_equal(image, np.asarray(reference))


def test_a_label_is_resized_without_inventing_ids(tmp_path):
    write_gray(tmp_path / "x.png", np.array([[1, 2], [2, 1]]).repeat(4, 0).repeat(4, 1))
    label = read_label(str(tmp_path / "x.png"), PLAIN, (5, 3))
    assert label.shape == (3, 5)
    assert set(np.unique(label).tolist()) <= {0, 1}


def test_raw_ids_that_are_not_listed_are_ignored(tmp_path):
    write_gray(tmp_path / "x.png", np.array([[0, 1, 2, 255]]))
    assert read_label(str(tmp_path / "x.png"), PLAIN).tolist() == [[255, 0, 1, 255]]


@pytest.mark.parametrize("keep", [0, 5, 20, 60, 100])
def test_a_truncated_image_is_unreadable_and_named(tmp_path, keep):
    path = tmp_path / "cut.png"
    write_image(path, 40, 30)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UnreadableImage, match=r"cut\.png"):
        read_image(str(path))


@pytest.mark.parametrize("position", range(0, 700, 41))
def test_a_flipped_byte_never_raises_anything_else(tmp_path, position):
    path = tmp_path / "flipped.png"
    write_image(path, 16, 12)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0xFF
    path.write_bytes(bytes(data))
    with contextlib.suppress(UnreadableImage):
        read_image(str(path))


def test_a_truncated_16_bit_label_is_unreadable(tmp_path):
    path = tmp_path / "cut.png"
    write_rgb16(path, np.random.default_rng(0).integers(0, 23, (20, 20, 3)).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(UnreadableImage, match=r"cut\.png"):
        read_label(str(path), synthia.ENCODING)


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone\.png"):
        read_image(str(tmp_path / "gone.png"))


def test_a_colour_image_in_place_of_an_index_image_is_unreadable_and_says_why(tmp_path):
    write_image(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match="mode RGB"):
        read_label(str(tmp_path / "x.png"), PLAIN)


def test_unreadable_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "broken")))
    assert (error.path, error.cause) == ("a.png", "broken")


def test_without_labels_leaves_no_way_to_a_label():
    split = Split("x/train", ("a",), ("a.png",), ("l.png",), PLAIN).without_labels()
    assert split.label_paths is None
    assert split.label_encoding is None
    with pytest.raises(DataError, match="no labels"):
        split.label(0)


def test_labels_without_an_encoding_are_refused():
    with pytest.raises(ValueError, match="come together"):
        Split("x", ("a",), ("a.png",), ("l.png",))
