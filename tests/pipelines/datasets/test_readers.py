"""Every reader on files in the published layout and encoding; id tables typed from the papers."""

import pickle

import numpy as np
import pytest
from real_encodings import write_gray, write_image, write_palette, write_rgb16, write_rgba

from pipelines.datasets import DataError, cityscapes, gta5, robotcar, synthia

# labelId: train id of 19. Ids that are not listed are ignored.
LABEL_IDS_TO_19 = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
LABEL_IDS_TO_9 = {23: 0, 24: 1, 25: 1, 32: 2, 33: 2, 26: 3, 27: 3, 28: 3, 20: 4, 19: 5, 11: 6, 8: 7, 7: 8}
SYNTHIA_TO_19 = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14,
    19: 15, 20: 16, 12: 17, 11: 18,
}  # fmt: skip
ROBOTCAR_TO_9 = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 10: 7, 11: 8, 12: 8, 13: 8, 14: 8, 17: 8}

EVERY_ID = np.arange(256).reshape(16, 16)


def expected(mapping):
    return np.array([[mapping.get(int(i), 255) for i in row] for row in EVERY_ID])


@pytest.fixture
def gta5_root(tmp_path):
    for name in ("00002.png", "00001.png"):
        write_image(tmp_path / "images" / name)
        write_palette(tmp_path / "labels" / name, EVERY_ID)
    return tmp_path


@pytest.fixture
def synthia_root(tmp_path):
    ids = np.zeros((16, 16, 3), np.uint16)
    ids[:, :, 0] = EVERY_ID
    ids[:, :, 1] = 4711  # instance ids: more than 8 bits, and nobody's business
    write_image(tmp_path / "RGB" / "0000000.png")
    write_rgb16(tmp_path / "GT" / "LABELS" / "0000000.png", ids, (1, 4))
    return tmp_path


@pytest.fixture
def cityscapes_root(tmp_path):
    for part, city in (("train", "ulm"), ("train", "aachen"), ("val", "frankfurt")):
        stem = f"{city}_000000_000019"
        write_image(tmp_path / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
        write_gray(tmp_path / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png", EVERY_ID)
    return tmp_path


@pytest.fixture
def robotcar_root(tmp_path):
    write_image(tmp_path / "train" / "2014-12-05-11-09-10_01" / "000003.png")
    write_image(tmp_path / "val" / "2014-11-25-09-18-32_01_000004.png")
    write_rgba(tmp_path / "anno" / "2014-12-05-11-09-10_01_000003.png", EVERY_ID)
    write_rgba(tmp_path / "anno" / "2014-11-25-09-18-32_01_000004.png", EVERY_ID)
    return tmp_path


def test_gta5_reads_the_palette_index_and_not_the_colour(gta5_root):
    np.testing.assert_array_equal(gta5.train(gta5_root).label(0), expected(LABEL_IDS_TO_19))


def test_gta5_samples_are_sorted_and_named_by_stem(gta5_root):
    assert gta5.train(gta5_root).image_ids == ("00001", "00002")


def test_synthia_reads_the_first_16_bit_channel(synthia_root):
    np.testing.assert_array_equal(synthia.train(synthia_root).label(0), expected(SYNTHIA_TO_19))


def test_synthia_keeps_building_road_and_sidewalk_where_a_lost_low_byte_leaves_only_zeros(synthia_root):
    label = synthia.train(synthia_root).label(0)
    assert {0, 1, 2} <= set(np.unique(label).tolist())


def test_synthia_lane_marking_is_ignored(synthia_root):
    assert synthia.train(synthia_root).label(0)[EVERY_ID == 22] == 255


def test_synthia_ids_beyond_eight_bits_are_ignored(tmp_path):
    ids = np.full((2, 2, 3), 259, np.uint16)  # 259 & 255 = 3 would be road
    write_image(tmp_path / "RGB" / "0000000.png")
    write_rgb16(tmp_path / "GT" / "LABELS" / "0000000.png", ids)
    assert synthia.train(tmp_path).label(0).min() == 255


def test_cityscapes_label_ids_become_the_19_train_ids(cityscapes_root):
    np.testing.assert_array_equal(cityscapes.train(cityscapes_root).label(0), expected(LABEL_IDS_TO_19))


def test_cityscapes_as_a_source_of_robotcar_has_nine_classes(cityscapes_root):
    split = cityscapes.train(cityscapes_root, cityscapes.ENCODING_9)
    np.testing.assert_array_equal(split.label(0), expected(LABEL_IDS_TO_9))


def test_cityscapes_ids_are_city_and_stem(cityscapes_root):
    ids = cityscapes.train(cityscapes_root).image_ids
    assert ids == ("aachen/aachen_000000_000019", "ulm/ulm_000000_000019")


def test_cityscapes_train_and_val_are_kept_apart(cityscapes_root):
    assert cityscapes.validation(cityscapes_root).image_ids == ("frankfurt/frankfurt_000000_000019",)


def test_cityscapes_target_needs_no_label_files(tmp_path):
    write_image(tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    split = cityscapes.train_without_labels(tmp_path)
    assert len(split) == 1
    assert split.label_paths is None


def test_robotcar_reads_the_first_channel_of_rgba(robotcar_root):
    np.testing.assert_array_equal(robotcar.train(robotcar_root).label(0), expected(ROBOTCAR_TO_9))


def test_robotcar_ids_are_sequence_and_frame_in_both_parts(robotcar_root):
    assert robotcar.train(robotcar_root).image_ids == ("2014-12-05-11-09-10_01/000003",)
    assert robotcar.validation(robotcar_root).image_ids == ("2014-11-25-09-18-32_01/000004",)


def test_robotcar_validation_finds_its_annotation(robotcar_root):
    np.testing.assert_array_equal(robotcar.validation(robotcar_root).label(0), expected(ROBOTCAR_TO_9))


@pytest.mark.parametrize(
    ("open_split", "missing"),
    [
        (gta5.train, "images"),
        (synthia.train, "RGB"),
        (cityscapes.train_without_labels, "leftImg8bit/train"),
        (cityscapes.validation, "gtFine/val"),
        (robotcar.train, "train"),
        (robotcar.validation, "val"),
    ],
)
def test_a_wrong_root_is_refused_naming_the_missing_folder_and_the_layout(tmp_path, open_split, missing):
    with pytest.raises(DataError) as error:
        open_split(tmp_path)
    message = str(error.value)
    assert str(tmp_path / missing) in message
    assert "is expected to hold" in message
    assert "Give the folder" in message


def test_an_image_without_a_label_file_is_named_and_counted(gta5_root):
    (gta5_root / "labels" / "00002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images .*00002\.png"):
        gta5.train(gta5_root)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match="no images found"):
        gta5.train(tmp_path)


def test_splits_pickle(synthia_root):
    split = synthia.train(synthia_root)
    assert pickle.loads(pickle.dumps(split)) == split
