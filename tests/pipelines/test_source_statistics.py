import os

import numpy as np
import pytest
from PIL import Image

from pipelines import source_statistics
from pipelines.benchmarks import own_benchmark
from pipelines.datasets.classes import PROTOCOLS
from pipelines.datasets.dataset import DataError
from pipelines.source_statistics import ClassPixels, class_pixels
from tests.own_data import write_own_data

BY_HAND = ClassPixels(np.array([[600, 399, 1], [0, 0, 0], [1000, 0, 0], [0, 2000, 1]]))


@pytest.fixture
def split(tmp_path):
    """Eight labelled pictures of three classes, which a test may damage."""
    return own_benchmark(*write_own_data(tmp_path / "own"))[1].source


@pytest.fixture
def decoded(monkeypatch):
    """The label files that were decoded."""
    paths = []
    read = source_statistics.read_label
    monkeypatch.setattr(source_statistics, "read_label", lambda path, *more: (paths.append(path), read(path, *more))[1])
    return paths


def pixels_by_hand(split, classes):
    labels = [split.label(i) for i in range(len(split))]
    return [[int((label == c).sum()) for c in range(classes)] for label in labels]


def entries(folder):
    return sorted((folder / "statistics").iterdir())


def test_pixels_images_and_presence_are_counted_per_class():
    assert BY_HAND.pixel_counts.tolist() == [1600, 2399, 2]
    assert BY_HAND.presence.tolist() == [
        [True, True, True],
        [False, False, False],
        [True, False, False],
        [False, True, True],
    ]


@pytest.mark.parametrize(
    ("least_share", "expected"), [(0.0, [2, 2, 2]), (0.001, [2, 2, 1]), (0.4, [2, 1, 0]), (1.0, [1, 0, 0])]
)
def test_an_image_counts_for_a_class_that_covers_enough_of_its_labelled_pixels(least_share, expected):
    assert BY_HAND.image_counts(least_share).tolist() == expected


def test_one_pixel_in_a_thousand_is_enough_by_default():
    assert BY_HAND.image_counts().tolist() == BY_HAND.image_counts(0.001).tolist() == [2, 2, 1]


@pytest.mark.parametrize("kept", [None, PROTOCOLS["16"]])
def test_every_labelled_pixel_is_counted_at_the_label_s_own_size(tiny, kept):
    split = tiny.source if kept is None else tiny.source.narrowed(kept)
    found = class_pixels(split, None)
    assert found.pixels.dtype == np.int64
    assert found.pixels.tolist() == pixels_by_hand(split, 19 if kept is None else 16)
    assert found.skipped == ()


def test_counts_follow_the_order_of_the_split(split):
    found = class_pixels(split.subset([5, 0]), None)
    assert found.pixels.tolist() == class_pixels(split, None).pixels[[5, 0]].tolist()


def test_what_was_counted_once_is_read_from_one_small_file(split, tmp_path, decoded):
    told = []
    first = class_pixels(split, tmp_path, lambda *what: told.append(what))
    assert (sorted(decoded), told) == (sorted(split.label_paths), [(8, 8)])
    second = class_pixels(split, tmp_path, lambda *what: told.append(what))
    assert (len(decoded), len(told), len(entries(tmp_path))) == (8, 1, 1)
    assert entries(tmp_path)[0].suffix == ".npz"
    np.testing.assert_array_equal(first.pixels, second.pixels)


def test_a_label_that_changed_other_classes_or_another_order_are_counted_anew(split, tmp_path, decoded):
    class_pixels(split, tmp_path)
    Image.fromarray(np.full((48, 64), 2, np.uint8)).save(split.label_paths[3])
    changed = class_pixels(split, tmp_path)
    assert changed.pixels[3].tolist() == [0, 0, 48 * 64]
    assert class_pixels(split.narrowed((2, 0)), tmp_path).pixels[3].tolist() == [48 * 64, 0]
    assert class_pixels(split.subset(range(8)[::-1]), tmp_path).pixels[4].tolist() == [0, 0, 48 * 64]
    assert len(decoded) == 4 * 8
    os.utime(split.label_paths[0], ns=(0, 0))
    class_pixels(split, tmp_path)
    assert len(decoded) == 5 * 8


def test_without_a_folder_nothing_is_kept(split, tmp_path, decoded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    class_pixels(split, None)
    class_pixels(split, None)
    assert len(decoded) == 16
    assert sorted(tmp_path.rglob("*")) == before


def test_a_label_that_cannot_be_read_counts_nothing_and_is_named(split, tmp_path):
    whole = class_pixels(split, None).pixels
    (tmp_path / "own" / "source" / "masks" / "2.png").write_bytes(b"no picture")
    (tmp_path / "own" / "source" / "masks" / "6.png").unlink()
    for _ in range(2):
        found = class_pixels(split, tmp_path)
        assert found.skipped == (split.label_paths[2], split.label_paths[6])
        assert found.pixels[[2, 6]].sum() == 0
        np.testing.assert_array_equal(np.delete(found.pixels, [2, 6], 0), np.delete(whole, [2, 6], 0))


def test_only_labels_that_could_not_be_read_are_tried_again(split, tmp_path, decoded, monkeypatch):
    """A disk that is away for a moment changes no file."""
    whole = class_pixels(split, None).pixels
    read = source_statistics._count
    monkeypatch.setattr(
        source_statistics, "_count", lambda path, *more: None if path == split.label_paths[4] else read(path, *more)
    )
    assert class_pixels(split, tmp_path).skipped == (split.label_paths[4],)
    monkeypatch.setattr(source_statistics, "_count", read)
    decoded.clear()
    found = class_pixels(split, tmp_path)
    assert decoded == [split.label_paths[4]]
    assert found.skipped == ()
    np.testing.assert_array_equal(found.pixels, whole)
    class_pixels(split, tmp_path)
    assert len(decoded) == 1


@pytest.mark.parametrize("keep", [0, 0.5, 0.95])
def test_a_file_of_counts_that_is_cut_off_is_made_anew(split, tmp_path, keep):
    whole = class_pixels(split, tmp_path).pixels
    (entry,) = entries(tmp_path)
    good = entry.read_bytes()
    entry.write_bytes(good[: int(keep * len(good))])
    np.testing.assert_array_equal(class_pixels(split, tmp_path).pixels, whole)
    assert entry.stat().st_size == len(good)


def test_whatever_byte_of_a_file_of_counts_is_damaged_the_counts_are_right(split, tmp_path):
    whole = class_pixels(split, tmp_path).pixels
    (entry,) = entries(tmp_path)
    good = entry.read_bytes()
    for place in range(0, len(good), 5):
        entry.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        np.testing.assert_array_equal(class_pixels(split, tmp_path).pixels, whole, err_msg=f"byte {place}")


def test_counts_of_another_number_of_classes_are_not_taken_for_these(split, tmp_path):
    whole = class_pixels(split, tmp_path).pixels
    (entry,) = entries(tmp_path)
    with entry.open("wb") as file:
        np.savez(file, pixels=np.ones((8, 2), np.int64), missing=np.array([], np.int64))
    np.testing.assert_array_equal(class_pixels(split, tmp_path).pixels, whole)


def test_a_folder_that_cannot_be_written_costs_time_and_not_the_run(split, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert class_pixels(split, tmp_path / "taken").pixels.tolist() == pixels_by_hand(split, 3)


def test_no_partial_file_is_left_behind(split, tmp_path, monkeypatch):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    class_pixels(split, tmp_path)
    assert entries(tmp_path) == []


def test_a_split_without_labels_is_refused(tiny):
    with pytest.raises(DataError, match="cityscapes/train has no labels to count"):
        class_pixels(tiny.target, None)


def test_rows_that_are_not_looked_at_are_not_counted(split, tmp_path):
    whole = class_pixels(split, tmp_path).pixels
    found = class_pixels(split, tmp_path, ignore_bottom=0.25).pixels
    upper = [label[: len(label) * 3 // 4] for label in map(split.label, range(len(split)))]
    by_hand = [np.bincount(label.reshape(-1), minlength=256)[:3] for label in upper]
    np.testing.assert_array_equal(found, by_hand)
    assert found.sum() < whole.sum()
    np.testing.assert_array_equal(class_pixels(split, tmp_path).pixels, whole)
