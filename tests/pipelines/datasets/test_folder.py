import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from real_encodings import write_gray, write_image, write_palette

from pipelines.blocks import decode_image
from pipelines.datasets import DataError, UnreadableImage
from pipelines.datasets.folder import MAX_CLASSES, default_colours, read_folder
from pipelines.decode_cache import DecodeCache
from tests.own_data import write_own_data

IDS = np.array([[0, 1], [2, 255]])


def write_folder(root, text, count=3, ids=IDS):
    """Images a/0.png, b/1.png …, masks beside them under masks/, and the TOML file."""
    for number in range(count):
        place = "ab"[number % 2]
        write_image(root / "photos" / place / f"{number}.png", width=8 + number)
        write_gray(root / "masks" / place / f"{number}_mask.png", ids)
    (root / "mine.toml").write_text(text)
    return root / "mine.toml"


PAIRED = 'images = "photos/**/*.png"\nlabels = "masks/**/*_mask.png"\n'


def test_images_and_labels_pair_by_what_the_stars_stand_for(tmp_path):
    folder = read_folder(write_folder(tmp_path, PAIRED + 'classes = ["water", "boat", "quay"]'))
    assert folder.images.image_ids == ("photos/a/0.png", "photos/a/2.png", "photos/b/1.png")
    assert [path[-12:] for path in folder.labelled.label_paths] == ["a/0_mask.png", "a/2_mask.png", "b/1_mask.png"]
    assert folder.labelled.label(0).tolist() == [[0, 1], [2, 255]]
    assert folder.images.label_paths is None
    assert folder.classes.names == ("water", "boat", "quay")


def test_images_without_a_label_are_named_and_left_out_of_the_labelled_ones(tmp_path):
    path = write_folder(tmp_path, PAIRED + 'classes = ["water", "boat", "quay"]')
    (tmp_path / "masks/a/2_mask.png").unlink()
    folder = read_folder(path)
    assert (len(folder.images), len(folder.labelled)) == (3, 2)
    assert folder.unlabelled == (str(tmp_path / "photos/a/2.png"),)


def test_a_target_needs_nothing_but_images(tmp_path):
    folder = read_folder(write_folder(tmp_path, 'images = "photos/a/*.png"'))
    assert (len(folder.images), folder.labelled, folder.classes) == (2, None, None)


def test_a_double_star_also_stands_for_no_folder_at_all(tmp_path):
    write_image(tmp_path / "photos" / "top.png")
    assert "photos/top.png" in read_folder(write_folder(tmp_path, 'images = "photos/**/*.png"')).images.image_ids


def test_several_ids_may_mean_one_class_and_ignored_ones_mean_none(tmp_path):
    text = (
        PAIRED
        + """
ignore = [255, 9]
[[classes]]
name = "land"
ids = [7, 8]
colour = "#ff0000"
[[classes]]
name = "sea"
ids = 300
"""
    )
    path = write_folder(tmp_path, text, ids=np.array([[7, 8], [9, 5]]))
    Image.fromarray(np.array([[300, 7]], np.uint16)).save(tmp_path / "masks/a/0_mask.png")
    folder = read_folder(path)
    assert folder.labelled.label(0).tolist() == [[1, 0]]
    assert folder.labelled.label(2).tolist() == [[0, 0], [255, 255]]
    assert folder.classes.palette[0] == (255, 0, 0)


def test_label_files_may_be_painted_in_the_classes_colours(tmp_path):
    text = (
        PAIRED
        + """
encoding = "colours"
ignore = [0, 0, 0]
classes = [{name = "land", colour = [10, 20, 30]}, {name = "sea", colour = "#0000ff"}]
"""
    )
    path = write_folder(tmp_path, text)
    painted = np.array([[[10, 20, 30], [0, 0, 255], [0, 0, 0], [10, 20, 31]]], np.uint8)
    Image.fromarray(painted).save(tmp_path / "masks/a/0_mask.png")
    assert read_folder(path).labelled.label(0).tolist() == [[0, 1, 255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_binary_mask_is_read_in_whatever_mode_it_was_saved(tmp_path, mode):
    path = write_folder(tmp_path, PAIRED + 'classes = ["ground", {name = "crop", ids = [1, 255]}]')
    mask = tmp_path / "masks/a/0_mask.png"
    bits = np.array([[0, 255], [255, 0]], np.uint8)
    if mode == "P":
        write_palette(mask, bits)
    elif mode == "I;16":
        Image.fromarray(bits.astype(np.uint16)).save(mask)
    else:
        Image.fromarray(bits).convert(mode).save(mask)
    assert read_folder(path).labelled.label(0).tolist() == [[0, 1], [1, 0]]


def test_a_colour_image_is_no_map_of_ids(tmp_path):
    path = write_folder(tmp_path, PAIRED + 'classes = ["a", "b", "c"]')
    Image.fromarray(np.array([[[1, 2, 3]]], np.uint8)).save(tmp_path / "masks/a/0_mask.png")
    with pytest.raises(UnreadableImage, match='encoding = "colours"'):
        read_folder(path).labelled.label(0)


def test_a_target_may_list_the_classes_of_its_source_in_another_order(tmp_path):
    source = read_folder(write_folder(tmp_path / "s", PAIRED + 'classes = ["water", "boat", "quay"]'))
    target = read_folder(write_folder(tmp_path / "t", PAIRED + 'classes = ["quay", "water", "boat"]'), source=source)
    assert target.classes == source.classes
    assert target.labelled.label(0).tolist() == [[2, 0], [1, 255]]


def test_a_target_that_lists_no_classes_has_labels_like_the_source(tmp_path):
    text = 'classes = [{name = "water", ids = 2}, {name = "boat", ids = [0, 1]}]'
    source = read_folder(write_folder(tmp_path / "s", PAIRED + text))
    target = read_folder(write_folder(tmp_path / "t", PAIRED), source=source)
    assert target.labelled.label(0).tolist() == [[1, 1], [0, 255]]
    assert target.classes.names == ("water", "boat")


def test_colours_are_chosen_where_none_are_given_and_differ(tmp_path):
    assert len(set(default_colours(40))) == 40
    assert len(set(default_colours(MAX_CLASSES))) > 200


def test_255_classes_leave_255_to_ignore(tmp_path):
    names = ", ".join(f'"c{i}"' for i in range(255))
    path = write_folder(tmp_path, PAIRED + f"classes = [{names}]", ids=np.array([[0, 254], [255, 3]]))
    assert read_folder(path).labelled.label(0).tolist() == [[0, 254], [255, 3]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "images is missing"),
        ("images = 3", "give a text"),
        ("images = [", "no TOML file"),
        ('images = "photos/**/*.png"\nlabel = "x"', "unknown key 'label'; known are"),
        ('images = "nowhere/*.png"', "nowhere does not exist"),
        ('images = "photos/**/*.gif"', "no file matches images"),
        ('images = "photos/a"', "names a single file"),
        ('images = "photos/**/*.*"\nlabels = "masks/*.png"\nclasses = ["a", "b"]', "same number"),
        (PAIRED, "names labels but no classes"),
        (PAIRED + "ignore = 3", "there are no classes"),
        (PAIRED + 'classes = ["a"]', "from 2 to 255"),
        (PAIRED + 'classes = ["a", "a"]', "a name of its own"),
        (PAIRED + 'classes = "a"', "list of names"),
        (PAIRED + 'classes = ["a", {name = "b", id = 1}]', "unknown key 'id'"),
        (PAIRED + 'classes = ["a", {name = "b", ids = [0]}]', "id 0 belongs to 'a' and to 'b'"),
        (PAIRED + 'classes = ["a", {name = "b", ids = ["x"]}]', "whole numbers"),
        (PAIRED + 'classes = ["a", {name = "b", ids = [true]}]', "whole numbers"),
        (PAIRED + 'classes = ["a", {name = "b", colour = "red"}]', "#1f77b4"),
        (PAIRED + 'classes = ["a", "b"]\nignore = 1', "belongs to class 'b'"),
        (PAIRED + 'classes = ["a", "b"]\nignore = "x"', "give an id"),
        (PAIRED + 'classes = ["a", "b"]\nencoding = "colours"', "has no colour"),
        (PAIRED + 'classes = ["a", "b"]\nencoding = "rgb"', '"ids" or "colours"'),
        ('images = "*/**/*.png"\nlabels = "*/**/*.png"\nclasses = ["a", "b"]', "matches both"),
        ('images = "photos/**/*.png"\nlabels = "masks/**/*.png"\nclasses = ["a", "b"]', "none of the 3 images has"),
    ],
)
def test_what_cannot_work_is_said_with_the_files_name_and_what_to_write(tmp_path, text, says):
    with pytest.raises(DataError, match=says.replace("(", r"\(")) as caught:
        read_folder(write_folder(tmp_path, text))
    assert "mine.toml" in str(caught.value)


def test_a_target_of_other_classes_is_refused(tmp_path):
    source = read_folder(write_folder(tmp_path / "s", PAIRED + 'classes = ["water", "boat", "quay"]'))
    path = write_folder(tmp_path / "t", PAIRED + 'classes = ["water", "boat"]')
    with pytest.raises(DataError, match="'quay' is only in one"):
        read_folder(path, source=source)


def test_a_missing_file_and_a_folder_are_no_description(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_folder(tmp_path / "gone.toml")
    with pytest.raises(DataError, match="is a folder"):
        read_folder(tmp_path)


SCRAPS = ("images", "labels", "classes", "ids", "=", "[", "]", "[[classes]]", '"', "photos/*", "-1", "{", "\n", "\x00")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sampled_from(SCRAPS), st.text(max_size=4)), max_size=12).map(" ".join))
def test_a_scrambled_file_ends_in_a_sentence(tmp_path, text):
    path = tmp_path / "fuzz.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(DataError, match="fuzz"):
        read_folder(path)


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    write_own_data(tmp_path)
    photos = tmp_path / "target" / "photos"
    (photos / "self").symlink_to(".")
    (photos / "up").symlink_to("..")
    (photos / "elsewhere").symlink_to(tmp_path / "source" / "photos")
    (tmp_path / "target" / "target.toml").write_text('images = "photos/**/*.jpg"\n')
    folder = read_folder(tmp_path / "target" / "target.toml")
    assert len(folder.images) == 16  # its own eight and those of the folder that a link leads to


def test_a_file_name_of_odd_bytes_can_be_read_cached_and_named(tmp_path):
    write_own_data(tmp_path, target_labels=False)
    photos = tmp_path / "target" / "photos"
    (photos / "0.jpg").rename(photos / os.fsdecode(b"caf\xe9.jpg"))
    split = read_folder(tmp_path / "target" / "target.toml").images
    index = split.image_ids.index("photos/caf\\udce9.jpg")
    cache = DecodeCache(tmp_path / "cache")
    assert decode_image(cache, split.image_paths[index], (8, 8)).shape == (8, 8, 3)
    assert cache.problem is None
    (photos / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no photo")
    with pytest.raises(UnreadableImage) as caught:
        split.image(index)
    str(caught.value).encode()
