import numpy as np
import pytest
from PIL import Image

from actors.showcase import Shown
from pipelines.datasets.classes import ClassSet
from pipelines.report.gallery import Gallery, read_gallery, write_gallery

CLASSES = ClassSet("two", ("water", "boat"), ((0, 0, 200), (200, 0, 0)))


def shown(image_id="a/b", **changes):
    image = np.full((4, 6, 3), 90, np.uint8)
    label = np.zeros((4, 6), np.uint8)
    fields = {
        "image": image,
        "truth": label,
        "predictions": {"source_only": label, "adapted": label + 1},
        "confidence": np.full((4, 6), 255, np.uint8),
        "pseudo_label": np.full((4, 6), 255, np.uint8),
    }
    return Shown(image_id, **{**fields, **changes})


def opened(folder, gallery, kind):
    return np.asarray(Image.open(folder / "pictures" / gallery.rows[0].files[kind]))


def test_every_picture_is_a_file_that_the_index_names(tmp_path):
    write_gallery(tmp_path, [shown(), shown("c")], CLASSES)
    gallery = read_gallery(tmp_path)
    assert [row.image_id for row in gallery.rows] == ["a/b", "c"]
    assert list(gallery.rows[0].files) == ["image", "truth", "source_only", "adapted", "pseudo_label", "confidence"]
    assert gallery.classes == (0, 1)
    assert (opened(tmp_path, gallery, "adapted") == (200, 0, 0)).all()
    assert (opened(tmp_path, gallery, "truth") == (0, 0, 200)).all()


def test_a_withheld_pseudo_label_shows_the_image_palely(tmp_path):
    kept = np.full((4, 6), 255, np.uint8)
    kept[0, 0] = 1
    write_gallery(tmp_path, [shown(pseudo_label=kept)], CLASSES)
    found = opened(tmp_path, read_gallery(tmp_path), "pseudo_label").astype(int)
    assert abs(found[3, 5] - (255 - (255 - 90) * 0.3)).max() < 30  # a JPEG
    assert found[0, 0, 0] - found[3, 5, 0] < found[0, 0, 0] - found[0, 0, 1]


def test_what_there_is_not_has_no_picture(tmp_path):
    write_gallery(tmp_path, [shown(truth=None, pseudo_label=None)], CLASSES)
    assert list(read_gallery(tmp_path).rows[0].files) == ["image", "source_only", "adapted", "confidence"]


def test_pictures_of_an_earlier_time_go(tmp_path):
    write_gallery(tmp_path, [shown(), shown()], CLASSES)
    write_gallery(tmp_path, [shown()], CLASSES)
    assert not list((tmp_path / "pictures").glob("02-*"))


@pytest.mark.parametrize("pictures", [None, []])
def test_a_run_without_pictures_has_an_empty_gallery(tmp_path, pictures):
    if pictures is not None:
        write_gallery(tmp_path, pictures, CLASSES)
    assert read_gallery(tmp_path) == Gallery((), ())
