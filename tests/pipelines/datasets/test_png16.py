import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real_encodings import write_rgb16

from pipelines.datasets.png16 import decode_rgb16, encode_rgb16


def some_pixels(seed, height=7, width=9):
    return np.random.default_rng(seed).integers(0, 65536, (height, width, 3)).astype(np.uint16)


@pytest.mark.parametrize("kind", range(5))
def test_every_filter_type_decodes_to_the_exact_16_bits(tmp_path, kind):
    pixels = some_pixels(kind)
    write_rgb16(tmp_path / "x.png", pixels, (kind,))
    np.testing.assert_array_equal(decode_rgb16(tmp_path / "x.png"), pixels)


def test_rows_with_different_filters_decode(tmp_path):
    pixels = some_pixels(9, 23, 31)
    write_rgb16(tmp_path / "x.png", pixels, (4, 1, 3, 0, 2))
    np.testing.assert_array_equal(decode_rgb16(tmp_path / "x.png"), pixels)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), height=st.integers(1, 12), width=st.integers(1, 12))
def test_what_is_encoded_is_decoded(tmp_path_factory, seed, height, width):
    path = tmp_path_factory.mktemp("png") / "x.png"
    pixels = some_pixels(seed, height, width)
    path.write_bytes(encode_rgb16(pixels))
    np.testing.assert_array_equal(decode_rgb16(path), pixels)


def test_ids_below_256_survive_where_a_plain_reader_sees_zeros(tmp_path):
    pixels = np.zeros((4, 5, 3), np.uint16)
    pixels[:, :, 0] = 22
    write_rgb16(tmp_path / "x.png", pixels)
    assert np.asarray(Image.open(tmp_path / "x.png")).max() == 0
    assert decode_rgb16(tmp_path / "x.png")[:, :, 0].min() == 22


def test_an_8_bit_image_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a 16-bit RGB PNG"):
        decode_rgb16(tmp_path / "x.png")


def test_the_encoder_refuses_anything_but_16_bit_rgb():
    with pytest.raises(ValueError, match="uint16"):
        encode_rgb16(np.zeros((4, 4), np.uint16))
