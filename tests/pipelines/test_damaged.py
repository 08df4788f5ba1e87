"""Five hundred files that are not what they should be: each is read, or ends in a sentence that names it."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from actors.errors import UnreadableImage
from pipelines.data_check import look
from pipelines.datasets import DataError
from pipelines.datasets.dataset import image_size, read_image
from pipelines.datasets.folder import read_folder
from pipelines.predict import predict
from tests.own_data import write_own_data
from tests.pipelines.test_trained import finished_run

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "TIFF": ("RGB", "L", "CMYK", "I;16", "I", "F", "LAB"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("RGB", "L"),
}


def encoded(kind, mode, orientation=None):
    """A small picture in a format and mode."""
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(PIXELS[..., 0].astype(np.int32 if mode == "I" else np.float32))
    elif mode == "LAB":
        image = Image.frombytes("LAB", (40, 24), PIXELS.tobytes())
    else:
        image = Image.fromarray(PIXELS).convert(mode)
    options = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth=8, colour=2, data=b""):
    """A PNG whose header may promise anything."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", zlib.compress(data)))
    body = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + body + b"\0\0\0\0IEND\xaeB`\x82"


def damaged():
    """(name, bytes) of every file."""
    made = []
    for kind, modes in MODES.items():
        for mode in modes:
            whole = encoded(kind, mode)
            made.append((f"{kind} {mode} whole", whole))
            for number in range(6):
                keep = int(RNG.integers(0, len(whole)))
                made.append((f"{kind} {mode} cut {number}", whole[:keep]))
            for number in range(10):
                broken = bytearray(whole)
                for _ in range(int(RNG.integers(1, 6))):
                    broken[int(RNG.integers(0, len(broken)))] = int(RNG.integers(0, 256))
                made.append((f"{kind} {mode} flipped {number}", bytes(broken)))
    for orientation in range(12):
        made.append((f"turned {orientation}", encoded("JPEG", "RGB", orientation)))
    for width, height in ((60000, 60000), (2**31 - 1, 1), (0, 0), (0, 5), (1, 2**30), (13000, 13000), (2**32 - 1,) * 2):
        made.append((f"claims {width}x{height}", png(width, height)))
    for depth, colour in ((3, 2), (16, 3), (1, 6), (8, 9), (255, 0)):
        made.append((f"depth {depth} colour {colour}", png(4, 4, depth, colour, b"\0" * 40)))
    for number, text in enumerate(
        (b"", b"\0", b"no picture", b"<svg/>", b"%PDF-1.4", b"GIF89a", b"\xff\xd8\xff", b"BM")
    ):
        made.append((f"other {number}", text))
    for number in range(40):
        made.append((f"noise {number}", RNG.bytes(int(RNG.integers(1, 400)))))
    return made


FILES = damaged()


def tried(expected, call, *arguments):
    """What a call returns, or the sentence of the error that it may end in; any other error passes through."""
    try:
        return call(*arguments), None
    except expected as error:
        return None, str(error)


def test_there_are_five_hundred():
    assert len(FILES) >= 500


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    source, _ = write_own_data(tmp_path_factory.mktemp("own"))
    return read_folder(source).encoding


@pytest.mark.parametrize("number", range(20))
def test_a_file_is_read_or_ends_in_a_sentence_that_names_it(number, tmp_path, encoding):
    for index, (name, content) in enumerate(FILES[number::20]):
        path = tmp_path / f"file{index}.png"
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for read in (read_image, encoding.decode):
                pixels, said = tried(UnreadableImage, read, str(path))
                assert said is None or (f"file{index}.png" in said and "\n" not in said), name
                assert pixels is None or pixels.dtype == np.uint8, name
            size, seen = image_size(str(path)), look(str(path), str(path), encoding)
        assert size is None or min(size) >= 0, name
        assert seen.problem is None or f"file{index}.png" in seen.problem, name


@pytest.mark.parametrize(("tag", "value"), [(0x0128, "2"), (0x0213, "1"), (0x011A, "72"), (0x8769, "x")])
def test_a_good_photo_with_nonsense_beside_its_orientation_is_read_upright(tag, value, tmp_path):
    texts = TiffImagePlugin.ImageFileDirectory_v2()
    texts.tagtype[tag] = 2  # text, where a number belongs
    texts[tag], texts[0x0112] = value, 6
    exif = b"Exif\0\0II*\0\x08\0\0\0" + texts.tobytes(8)
    Image.new("RGB", (40, 24)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg")).shape == (40, 24, 3)
    assert image_size(str(tmp_path / "x.jpg")) == (24, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_read_upright(orientation, tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG", "RGB", orientation))
    assert read_image(str(tmp_path / "x.jpg")).shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert image_size(str(tmp_path / "x.jpg")) == ((40, 24) if orientation < 5 else (24, 40))


def test_16_bit_gray_is_not_clipped_to_white(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded("PNG", "I;16"))
    np.testing.assert_array_equal(read_image(str(tmp_path / "x.png"))[..., 1], PIXELS[..., 0])


def test_all_of_them_in_one_folder_are_predicted_or_skipped_and_counted(tmp_path):
    run, _ = finished_run(tmp_path)
    folder = tmp_path / "wild"
    folder.mkdir()
    for index, (_, content) in enumerate(FILES[::7]):
        (folder / f"{index}.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = predict([str(folder)], str(tmp_path / "out"), lambda *_: None, run=run.plan.folder)
    assert done.pictures > 5
    assert done.pictures + len(done.skipped) == len(FILES[::7])
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == done.pictures
    assert not list((tmp_path / "out").glob(".*"))


GOOD = 'images = "photos/*.jpg"\nlabels = "masks/*.png"\nignore = [255]\nclasses = ["a", {name = "b", ids = [1, 2]}]\n'


def test_a_description_with_flipped_letters_is_read_or_ends_in_a_sentence(tmp_path):
    source, _ = write_own_data(tmp_path)
    path = tmp_path / "source" / "source.toml"
    assert str(path) == source
    refused = 0
    for _ in range(300):
        text = list(GOOD)
        for _ in range(int(RNG.integers(1, 4))):
            text[int(RNG.integers(0, len(text)))] = chr(int(RNG.choice([*range(32, 127), 0, 10, 233, 8364])))
        path.write_text("".join(text), encoding="utf-8")
        _, said = tried(DataError, read_folder, path)
        refused += said is not None
        assert said is None or "source.toml" in said
    assert refused > 100
