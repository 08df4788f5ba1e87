import numpy as np

from pipelines.datasets import CITYSCAPES_19, IGNORE, PROTOCOLS, ROBOTCAR_9
from pipelines.datasets.classes import CITYSCAPES_13, CITYSCAPES_16


def names(protocol):
    return [CITYSCAPES_19.names[i] for i in PROTOCOLS[protocol]]


def test_the_16_classes_of_synthia_lack_terrain_truck_and_train():
    assert len(names("16")) == 16
    assert not {"terrain", "truck", "train"} & set(names("16"))


def test_the_13_classes_also_lack_wall_fence_and_pole():
    assert set(names("16")) - set(names("13")) == {"wall", "fence", "pole"}


def test_the_order_is_the_papers():
    assert PROTOCOLS["16"] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
    assert PROTOCOLS["13"] == (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
    assert PROTOCOLS["19"] == tuple(range(19))
    assert PROTOCOLS["9"] == tuple(range(9))


def test_colours_are_the_papers():
    assert CITYSCAPES_19.palette[CITYSCAPES_19.index("sky")] == (70, 130, 180)
    assert CITYSCAPES_19.palette[CITYSCAPES_19.index("train")] == (0, 80, 100)
    assert ROBOTCAR_9.palette[ROBOTCAR_9.index("automobile")] == (0, 0, 142)


def test_16_and_13_classes_are_numbered_without_gaps_as_in_proda_and_fada():
    assert CITYSCAPES_16.names == (
        *("road", "sidewalk", "building", "wall", "fence", "pole", "light", "sign", "vegetation", "sky", "person"),
        *("rider", "car", "bus", "motorcycle", "bicycle"),
    )
    assert CITYSCAPES_13.names == (
        *("road", "sidewalk", "building", "light", "sign", "vegetation", "sky", "person", "rider", "car", "bus"),
        *("motorcycle", "bicycle"),
    )


def test_16_and_13_classes_keep_their_colours():
    for classes, sky, bicycle in ((CITYSCAPES_16, 9, 15), (CITYSCAPES_13, 6, 12)):
        assert classes.palette[sky] == (70, 130, 180)
        assert classes.palette[bicycle] == (119, 11, 32)


def test_ignored_pixels_are_painted_black():
    assert CITYSCAPES_19.colourise(np.array([[0, IGNORE]], np.uint8)).tolist() == [[[128, 64, 128], [0, 0, 0]]]
