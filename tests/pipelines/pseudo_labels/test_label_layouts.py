"""File names and contents are those of methods §2.1, written out by hand."""

import contextlib
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from actors.errors import RunError, UnreadableImage
from pipelines.datasets.classes import CITYSCAPES_13, CITYSCAPES_16, CITYSCAPES_19, PROTOCOLS
from pipelines.options import DataOptions
from pipelines.pseudo_labels.exchange import import_labels
from pipelines.pseudo_labels.layouts import LAYOUTS, FolderLayout
from pipelines.pseudo_labels.table import Table

IMAGE = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
STEM = "aachen_000000_000019_leftImg8bit"
FILES = {
    "mrnet": {f"aachen/{STEM}.png", f"aachen/{STEM}_color.png", f"aachen/{STEM}_heatmap.png"},
    "eplc": {f"aachen/{STEM}.png", f"aachen/{STEM}.npz"},
    "eplc-min": {f"aachen/{STEM}_2.png", f"aachen/{STEM}.npz"},
    "proda": {f"{STEM}.png", f"{STEM}_color.png", f"{STEM}_conf.npy"},
    "fada": {f"{STEM}.png"},
    "bisenet": {"labels/aachen_000000_000019.png", "labels_rgb/aachen_000000_000019.png"},
}
SIZE = (24, 16)


@pytest.fixture
def image(tmp_path):
    """An image twice as wide and high as its pseudo label."""
    path = tmp_path / "data" / IMAGE
    path.parent.mkdir(parents=True)
    Image.new("RGB", (2 * SIZE[0], 2 * SIZE[1])).save(path)
    return str(path)


def label(values=(0, 8, 10, 18, 255)):
    rng = np.random.default_rng(0)
    return rng.choice(np.array(values, np.uint8), SIZE[::-1]), rng.integers(0, 256, SIZE[::-1], np.uint8)


def ids(name, protocol="16"):
    return LAYOUTS[name].ids(19, PROTOCOLS[protocol])


def write(name, folder, image, made, sure):
    LAYOUTS[name].write(folder, image, made, sure, ids(name), CITYSCAPES_19)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_layout_has_its_name_among_the_options():
    assert set(LAYOUTS) == set(get_args(FolderLayout)) == {*FILES, "proda-soft"}


@pytest.mark.parametrize("name", FILES)
def test_files_have_the_published_names_and_come_back_as_they_went(name, tmp_path, image):
    made, sure = label()
    folder = tmp_path / "out"
    assert write(name, folder, image, made, sure) == FILES[name]
    found, confidence = LAYOUTS[name].read(folder, image, ids(name))
    factor = found.shape[0] // made.shape[0]
    assert factor == (1 if name == "bisenet" else 2)
    np.testing.assert_array_equal(found[::factor, ::factor], made)
    assert (confidence is None) == (name in ("mrnet", "fada", "bisenet"))
    if confidence is not None:
        np.testing.assert_array_equal(confidence[::factor, ::factor], sure)


@pytest.mark.parametrize(
    ("name", "terrain"), [("mrnet", 9), ("eplc", 9), ("bisenet", 9), ("proda", 250), ("fada", 255)]
)
def test_numbers_are_train_ids_or_count_the_16_classes(name, terrain, tmp_path, image):
    """Methods §2.2: sky is train id 10 and number 9 of 16; terrain, train id 9, is none of the 16."""
    made = np.array([[0, 10, 18, 9, 255]], np.uint8).repeat(SIZE[1], 0)
    write(name, tmp_path / "out", image, made, np.zeros_like(made))
    with Image.open(LAYOUTS[name].path(tmp_path / "out", image)) as stored:
        numbers = np.asarray(stored)
        assert stored.mode == ("P" if name == "fada" else "L")
    last = {"proda": 250}.get(name, 255)
    sky, bicycle = (9, 15) if name in ("proda", "fada") else (10, 18)
    expected = [0, sky, bicycle, terrain, last]
    assert list(dict.fromkeys(numbers[0].tolist())) == list(dict.fromkeys(expected))


def test_a_palette_image_is_painted_in_the_colours_of_its_classes(tmp_path, image):
    made = np.full(SIZE[::-1], 10, np.uint8)
    write("fada", tmp_path / "out", image, made, made)
    with Image.open(LAYOUTS["fada"].path(tmp_path / "out", image)) as stored:
        assert stored.convert("RGB").getpixel((0, 0)) == CITYSCAPES_19.palette[10]


def test_the_confidence_of_proda_is_float16_and_that_of_eplc_a_mean(tmp_path, image):
    made, sure = label()
    for name in ("proda", "eplc"):
        write(name, tmp_path / name, image, made, sure)
    half = np.load(tmp_path / "proda" / f"{STEM}_conf.npy")
    assert (half.dtype, half.shape) == (np.float16, (32, 48))
    prob = np.load(tmp_path / "eplc" / "aachen" / f"{STEM}.npz")["prob"]
    assert prob.max() <= 1
    np.testing.assert_allclose(prob[::2, ::2], sure / 255, atol=1e-6)


def test_sums_over_four_views_as_published_are_read_as_means(tmp_path, image):
    """Q-EP-4."""
    made, sure = label()
    write("eplc", tmp_path, image, made, sure)
    path = tmp_path / "aachen" / f"{STEM}.npz"
    np.savez(path, prob=np.load(path)["prob"] * 4)
    _, found = LAYOUTS["eplc"].read(tmp_path, image, ids("eplc"))
    np.testing.assert_array_equal(found[::2, ::2], sure)


def test_soft_labels_are_the_probabilities_of_the_protocols_classes(tmp_path, image):
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(19), (5, 7)).transpose(2, 0, 1).astype(np.float32)
    layout = LAYOUTS["proda-soft"]
    layout.write_soft(tmp_path, image, p, ids("proda-soft"))
    stored = np.load(tmp_path / f"{STEM}.npy")
    kept = p[list(PROTOCOLS["16"])]
    np.testing.assert_allclose(stored, kept / kept.sum(0), rtol=1e-5)
    assert stored.dtype == np.float32
    found, sure = layout.read(tmp_path, image, ids("proda-soft"))
    np.testing.assert_array_equal(found, np.array(PROTOCOLS["16"])[kept.argmax(0)])
    np.testing.assert_allclose(sure, stored.max(0) * 255, atol=0.51)


def test_two_images_that_would_share_a_file_are_found():
    images = ["a/1.png", "b/1.png"]
    assert LAYOUTS["fada"].clash(images) == ("a/1.png", "b/1.png")
    assert LAYOUTS["mrnet"].clash(images) is None


def test_a_missing_label_is_none(tmp_path, image):
    assert all(layout.read(tmp_path, image, ids(name)) is None for name, layout in LAYOUTS.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_broken_label_is_unreadable_by_name(name, tmp_path, image):
    path = LAYOUTS[name].path(tmp_path, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in (b"", b"\x93NUMPY\x01\0", b"no label" * 50):
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=path.name):
            LAYOUTS[name].read(tmp_path, image, ids(name))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_good_label_with_a_broken_confidence_is_unreadable(content, tmp_path, image):
    write("eplc", tmp_path, image, *label())
    (tmp_path / "aachen" / f"{STEM}.npz").write_bytes(content)
    with pytest.raises(UnreadableImage, match=STEM):
        LAYOUTS["eplc"].read(tmp_path, image, ids("eplc"))


def test_a_colour_picture_is_no_label_and_a_confidence_of_another_size_is_refused(tmp_path, image):
    Image.new("RGB", SIZE).save(tmp_path / f"{STEM}.png")
    with pytest.raises(UnreadableImage, match="mode RGB"):
        LAYOUTS["fada"].read(tmp_path, image, ids("fada"))
    made, sure = label()
    write("proda", tmp_path, image, made, sure)
    np.save(tmp_path / f"{STEM}_conf.npy", np.zeros((3, 3), np.float16))
    with pytest.raises(UnreadableImage, match=r"its confidence .*_conf\.npy is \(3, 3\), the label \(32, 48\)"):
        LAYOUTS["proda"].read(tmp_path, image, ids("proda"))


NARROW = {16: CITYSCAPES_16, 13: CITYSCAPES_13}


def narrow_ids(name, classes):
    """As a benchmark of fewer classes has them: its own count from 0, and `kept` says which of the 19 they are."""
    return LAYOUTS[name].ids(classes, range(classes), PROTOCOLS[str(classes)])


@pytest.mark.parametrize("classes", NARROW)
@pytest.mark.parametrize("name", FILES)
def test_with_fewer_classes_files_hold_the_same_numbers_and_come_back_as_they_went(name, classes, tmp_path, image):
    """A file of train ids keeps them, whatever outputs a network has; methods §2.2: bicycle is 18, or 15 of 16."""
    made, sure = label((*range(classes), 255))
    known = narrow_ids(name, classes)
    LAYOUTS[name].write(tmp_path / "out", image, made, sure, known, NARROW[classes])
    with Image.open(LAYOUTS[name].path(tmp_path / "out", image)) as stored:
        numbers, colours = np.asarray(stored), np.asarray(stored.convert("RGB"))
    train_ids = np.array(PROTOCOLS[str(classes)])
    contiguous = LAYOUTS[name].contiguous
    factor = numbers.shape[0] // made.shape[0]
    assert set(np.unique(numbers)) == {*(range(classes) if contiguous else train_ids), LAYOUTS[name].withheld}
    bicycle = classes - 1 if contiguous else 18
    np.testing.assert_array_equal(numbers[::factor, ::factor] == bicycle, made == classes - 1)
    if LAYOUTS[name].palette:
        expected = np.array(CITYSCAPES_19.palette)[train_ids][made[made != 255]]
        np.testing.assert_array_equal(colours[::factor, ::factor][made != 255], expected)
    found, _ = LAYOUTS[name].read(tmp_path / "out", image, known)
    np.testing.assert_array_equal(found[::factor, ::factor], made)


@pytest.mark.parametrize("classes", NARROW)
def test_a_class_that_was_dropped_is_withheld_when_a_file_names_it(classes, tmp_path, image):
    path = LAYOUTS["mrnet"].path(tmp_path, image)
    path.parent.mkdir(parents=True)
    numbers = np.arange(19, dtype=np.uint8)[None]
    Image.fromarray(numbers).save(path)
    found, _ = LAYOUTS["mrnet"].read(tmp_path, image, narrow_ids("mrnet", classes))
    kept = PROTOCOLS[str(classes)]
    assert found[0].tolist() == [kept.index(i) if i in kept else 255 for i in range(19)]


def test_negative_labels_stand_at_the_numbers_of_their_classes(tmp_path, image):
    rng = np.random.default_rng(2)
    known = rng.random((16, *SIZE[::-1])) < 0.3
    more = {"negative": np.packbits(known, axis=0, bitorder="little")}
    LAYOUTS["eplc"].write(tmp_path, image, *label(range(16)), narrow_ids("eplc", 16), CITYSCAPES_16, more)
    with np.load(tmp_path / "aachen" / f"{STEM}.npz") as file:
        bits = np.unpackbits(file["neg"], axis=0, bitorder="little")[:, ::2, ::2].astype(bool)
    np.testing.assert_array_equal(bits[list(PROTOCOLS["16"])], known)
    assert not bits[[9, 14, 16, *range(19, 24)]].any()


@pytest.mark.parametrize("classes", NARROW)
def test_soft_labels_of_fewer_classes_have_a_map_for_each(classes, tmp_path, image):
    p = np.random.default_rng(1).dirichlet(np.ones(classes), (5, 7)).transpose(2, 0, 1).astype(np.float32)
    layout, known = LAYOUTS["proda-soft"], narrow_ids("proda-soft", classes)
    layout.write_soft(tmp_path, image, p, known)
    np.testing.assert_allclose(np.load(tmp_path / f"{STEM}.npy"), p, rtol=1e-5)
    found, _ = layout.read(tmp_path, image, known)
    np.testing.assert_array_equal(found, p.argmax(0))


def test_a_folder_of_train_ids_is_imported_for_a_network_of_sixteen_outputs(tiny, tiny_folder, tmp_path):
    numbers = np.array([[0, 8, 9, 10, 18, 255]], np.uint8)
    for path in tiny.target.image_paths:
        file = LAYOUTS["mrnet"].path(tmp_path / "labels", path)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(file)
    options = DataOptions(classes=16, preset="tiny", data=str(tiny_folder / "data"))
    out = str(tmp_path / "x.parquet")
    import_labels(options, str(tmp_path / "labels"), "mrnet", out, lambda *_: None)
    table = Table(out)
    assert table.classes == CITYSCAPES_16.names
    assert table.get(tiny.target.image_ids[0]).label.tolist() == [[0, 8, 255, 9, 15, 255]]


def test_a_layout_with_too_few_numbers_says_so():
    assert LAYOUTS["proda"].ids(250, range(250)).train_ids == tuple(range(250))
    with pytest.raises(RunError, match="numbers 250 classes, and there are 255; use parquet"):
        LAYOUTS["proda"].ids(255, range(255))


def test_confidences_and_soft_labels_with_any_byte_turned_never_end_an_import(tmp_path, image):
    write("eplc", tmp_path, image, *label())
    LAYOUTS["proda-soft"].write_soft(tmp_path, image, np.ones((19, 5, 7), np.float32), ids("proda-soft"))
    for name, template in (("eplc", f"aachen/{STEM}.npz"), ("proda-soft", f"{STEM}.npy")):
        path = tmp_path / template
        content = path.read_bytes()
        other = (tmp_path / f"{STEM}.npy" if name == "eplc" else tmp_path / f"aachen/{STEM}.npz").read_bytes()
        turned = [content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :] for i in range(0, len(content), 3)]
        for damaged in (*turned, other, b""):
            path.write_bytes(damaged)
            with contextlib.suppress(UnreadableImage):
                LAYOUTS[name].read(tmp_path, image, ids(name))
        path.write_bytes(content)


def test_an_empty_soft_label_is_unreadable(tmp_path, image):
    np.save(tmp_path / f"{STEM}.npy", np.zeros((16, 0, 0), np.float32))
    with pytest.raises(UnreadableImage):
        LAYOUTS["proda-soft"].read(tmp_path, image, ids("proda-soft"))
