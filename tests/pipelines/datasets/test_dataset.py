import contextlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from real_encodings import write_gray, write_image, write_rgb16

from pipelines.blocks import decode_label
from pipelines.datasets import (
    DataError,
    LabelEncoding,
    Split,
    UnreadableImage,
    cityscapes,
    gta5,
    read_image,
    read_label,
    synthia,
)
from pipelines.datasets.classes import PROTOCOLS
from pipelines.decode_cache import DecodeCache

PLAIN = LabelEncoding.of("plain", "index", {1: 0, 2: 1})

# Rows id-16 and id-13 of methods §2.2 as printed there, by labelId and by SYNTHIA's raw id. Others are ignored.
LABEL_IDS = {
    16: {
        7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 23: 9, 24: 10, 25: 11, 26: 12, 28: 13, 32: 14,
        33: 15,
    },
    13: {7: 0, 8: 1, 11: 2, 19: 3, 20: 4, 21: 5, 23: 6, 24: 7, 25: 8, 26: 9, 28: 10, 32: 11, 33: 12},
}  # fmt: skip
SYNTHIA_IDS = {
    16: {
        3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14, 11: 15,
    },
    13: {3: 0, 4: 1, 2: 2, 15: 3, 9: 4, 6: 5, 1: 6, 10: 7, 17: 8, 8: 9, 19: 10, 12: 11, 11: 12},
}  # fmt: skip


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


@pytest.mark.parametrize("count", [16, 13])
@pytest.mark.parametrize(
    ("encoding", "tables"),
    [(cityscapes.ENCODING_19, LABEL_IDS), (gta5.ENCODING, LABEL_IDS), (synthia.ENCODING, SYNTHIA_IDS)],
    ids=["cityscapes", "gta5", "synthia"],
)
def test_fewer_classes_have_the_ids_of_the_papers(encoding, tables, count):
    found = encoding.narrowed(PROTOCOLS[str(count)]).meaning_of(np.arange(256, dtype=np.uint8))
    assert found.tolist() == [tables[count].get(raw, 255) for raw in range(256)]


def test_fewer_classes_come_in_the_order_that_is_asked_for():
    assert PLAIN.narrowed((1, 0)).meaning_of(np.array([[1, 2, 3]], np.uint8)).tolist() == [[1, 0, 255]]


def test_a_raw_id_of_a_class_that_is_left_out_is_no_unknown_one():
    whole = replace(PLAIN, complete=True)
    part = whole.narrowed((1,))
    assert (part.raw_ids, part.train_ids, part.complete) == ((1, 2), (255, 0), True)


def test_a_split_with_fewer_classes_reads_the_same_files(tmp_path):
    write_gray(tmp_path / "l.png", np.array([[0, 1, 2]]))
    split = Split("x/train", ("a",), ("a.png",), (str(tmp_path / "l.png"),), PLAIN)
    part = split.narrowed((1,))
    assert part.label(0).tolist() == [[255, 255, 0]]
    assert (part.name, part.image_paths, part.label_paths) == (split.name, split.image_paths, split.label_paths)


def test_a_split_without_labels_has_no_classes_to_lose():
    split = Split("x/train", ("a",), ("a.png",))
    assert split.narrowed((1,)) == split


def test_a_cached_label_is_not_served_for_fewer_classes(tmp_path):
    path = tmp_path / "l.png"
    write_gray(path, np.array([[7, 22, 33]]))
    cache = DecodeCache(tmp_path / "cache")

    def decoded(encoding):
        return decode_label(cache, str(path), (3, 1), encoding).tolist()

    whole = cityscapes.ENCODING_19
    for _ in range(2):  # the second time, each comes from its own entry
        assert decoded(whole) == [[0, 9, 18]]
        assert decoded(whole.narrowed(PROTOCOLS["16"])) == [[0, 255, 15]]
        assert decoded(whole.narrowed(PROTOCOLS["13"])) == [[0, 255, 12]]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 3
