"""Datasets in an object store, held against the same files in a folder."""

import numpy as np
import pytest
from real_encodings import write_gray, write_image, write_palette, write_rgba
from s3_server import CREDENTIALS

from actors import storage
from pipelines.benchmarks import benchmark, own_benchmark
from pipelines.datasets import DataError, UnreadableImage, cityscapes, gta5, robotcar
from pipelines.datasets.folder import read_folder
from pipelines.datasets.miniature.write import write_miniature
from pipelines.decode_cache import DecodeCache
from tests.own_data import write_own_data

IDS = np.arange(256).reshape(16, 16)


def uploaded(store, folder):
    store.upload_folder(folder, "data")
    return store.uri("bucket/data")


def assert_same(remote, near, store):
    assert remote.image_ids == near.image_ids
    assert all(path.endswith(f"?endpoint_override={store.address}&scheme=http") for path in remote.image_paths)
    for index in (0, len(near) - 1):
        np.testing.assert_array_equal(remote.image(index), near.image(index))
        assert remote.labelled == near.labelled
        if near.labelled:
            np.testing.assert_array_equal(remote.label(index), near.label(index))


def test_a_benchmark_in_a_store_has_the_pixels_of_one_in_a_folder(store, tiny_folder):
    root = write_miniature("synthia2city", "tiny", tiny_folder)
    pair = benchmark("synthia2city")
    near, remote = pair.open(root), pair.open(uploaded(store, root))
    files = len(store.files())
    assert store.asked.total() < files / 2, "not a request for every image and label"
    for name in ("source", "target", "target_labelled", "validation"):
        assert_same(getattr(remote, name), getattr(near, name), store)


def test_every_reader_finds_images_and_labels_in_a_store(store, tmp_path):
    for number in range(3):
        write_image(tmp_path / "gta" / "images" / f"{number}.png")
        write_palette(tmp_path / "gta" / "labels" / f"{number}.png", IDS)
    for part, city in (("train", "ulm"), ("train", "aachen"), ("val", "frankfurt")):
        write_image(tmp_path / "city/leftImg8bit" / part / city / f"{city}_0_leftImg8bit.png")
        write_gray(tmp_path / "city/gtFine" / part / city / f"{city}_0_gtFine_labelIds.png", IDS)
    write_image(tmp_path / "robot" / "train" / "2014_01" / "000003.png")
    write_image(tmp_path / "robot" / "val" / "2014_02_000004.png")
    write_rgba(tmp_path / "robot" / "anno" / "2014_01_000003.png", IDS)
    write_rgba(tmp_path / "robot" / "anno" / "2014_02_000004.png", IDS)
    uploaded(store, tmp_path)
    for name, readers in (
        ("gta", (gta5.train,)),
        ("city", (cityscapes.train, cityscapes.train_without_labels, cityscapes.validation)),
        ("robot", (robotcar.train, robotcar.train_without_labels, robotcar.validation)),
    ):
        for read in readers:
            assert_same(read(store.uri(f"bucket/data/{name}")), read(tmp_path / name), store)
    assert cityscapes.has_train_labels(store.uri("bucket/data/city"))
    del store.buckets["bucket"]["data/city/gtFine/train/ulm/ulm_0_gtFine_labelIds.png"]
    with pytest.raises(DataError, match="1 of 2 images have no label file; the first one expected is s3://bucket/data"):
        cityscapes.train(store.uri("bucket/data/city"))
    del store.buckets["bucket"]["data/city/gtFine/train/aachen/aachen_0_gtFine_labelIds.png"]
    assert not cityscapes.has_train_labels(store.uri("bucket/data/city"))


def test_a_data_root_that_cannot_be_read_is_a_sentence(store):
    pair = benchmark("gta2city")
    with pytest.raises(DataError, match="does not exist or is not a folder"):
        pair.open(store.uri("bucket/nothing"))
    with pytest.raises(DataError, match="does not exist or is not a folder"):
        pair.open(store.uri("nowhere/data"))
    store.buckets["bucket"]["data/other/x.png"] = (b"x", 1e9)
    with pytest.raises(DataError, match=r"GTA5 was not found under s3://bucket/data.*found other"):
        pair.open(store.uri("bucket/data"))
    store.refuse = lambda operation, key: (403, "AccessDenied")
    with pytest.raises(DataError, match=r"the data root cannot be read: s3://.*is denied to the credentials") as caught:
        pair.open(store.uri("bucket/data"))
    assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_an_image_that_is_gone_or_refused_is_an_unreadable_one(store, tmp_path):
    write_image(tmp_path / "images" / "1.png")
    write_palette(tmp_path / "labels" / "1.png", IDS)
    split = gta5.train(uploaded(store, tmp_path))
    del store.buckets["bucket"]["data/images/1.png"]
    with pytest.raises(UnreadableImage, match=r"cannot read s3://bucket/data/images/1.png.*there is no such file"):
        split.image(0)
    store.refuse = lambda operation, key: (403, "AccessDenied")
    with pytest.raises(UnreadableImage, match="is denied to the credentials"):
        split.label(0)


def test_a_toml_file_in_a_store_names_images_beside_it(store, tmp_path):
    source, target = write_own_data(tmp_path)
    uploaded(store, tmp_path)
    remote = [store.uri(f"bucket/data/{name}/{name}.toml") for name in ("source", "target")]
    (near, near_domains), (far, far_domains) = own_benchmark(source, target), own_benchmark(*remote)
    assert (near.name, near.classes, near.shapes) == (far.name, far.classes, far.shapes)
    for name in ("source", "target", "validation"):
        assert_same(getattr(far_domains, name), getattr(near_domains, name), store)


def test_a_toml_file_of_this_machine_names_images_in_a_store(store, tmp_path):
    write_own_data(tmp_path / "up")
    address = uploaded(store, tmp_path / "up")
    base, _, settings = address.partition("?")
    (tmp_path / "mine.toml").write_text(
        f'images = "{base}/source/photos/*.jpg?{settings}"\nlabels = "{base}/**/source/masks/*.png?{settings}"\n'
        'classes = ["a", "b", "c"]\n'
    )
    with pytest.raises(DataError, match="has 1 stars and labels"):
        read_folder(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text(
        f'images = "{base}/**/photos/*.jpg?{settings}"\nlabels = "{base}/**/masks/*.png?{settings}"\n'
        'classes = ["a", "b", "c"]\n'
    )
    found = read_folder(tmp_path / "mine.toml")
    assert found.images.image_ids[0] == "bucket/data/source/photos/0.jpg"
    assert len(found.labelled) == 16
    near = read_folder(tmp_path / "up" / "source" / "source.toml")
    np.testing.assert_array_equal(found.labelled.label(7), near.labelled.label(7))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("s3://bucket/none/*.jpg{}", "there is nothing in s3://bucket/none"),
        ("s3://*/none/*.jpg{}", "has a star for its bucket"),
        ("s3://me:secret@bucket/*.jpg", "holds credentials"),
        ("s3://bucket/data/1.jpg{}", "names a single file"),
    ],
)
def test_images_in_a_store_that_cannot_be_found_are_a_sentence(store, tmp_path, images, said):
    settings = store.uri("")[len("s3://") :]
    (tmp_path / "mine.toml").write_text(f'images = "{images.format(settings)}"')
    with pytest.raises(DataError, match=said):
        read_folder(tmp_path / "mine.toml")


def test_target_labels_are_named_by_the_end_of_an_address(store, tmp_path):
    write_own_data(tmp_path)
    uploaded(store, tmp_path)
    _, domains = own_benchmark(*(store.uri(f"bucket/data/{name}/{name}.toml") for name in ("source", "target")))
    (tmp_path / "few.txt").write_text("1.jpg\nphotos/6.jpg\n")
    chosen = domains.with_target_labels(str(tmp_path / "few.txt"))
    assert chosen.few.image_ids == ("photos/1.jpg", "photos/6.jpg")


def test_decoded_images_cost_a_listing_and_then_no_request(store, tmp_path, monkeypatch):
    for number in range(6):
        write_image(tmp_path / "images" / f"{number}.png")
    uploaded(store, tmp_path)
    monkeypatch.setattr("pipelines.decode_cache.status_of", storage.Statuses().of)
    cache = DecodeCache(tmp_path / "cache")
    paths = [store.uri(f"bucket/data/images/{number}.png") for number in range(6)]

    def epoch():
        return [cache.get(path, (4, 4), "image", lambda: np.full(3, 7, np.uint8)).tolist() for path in paths]

    assert epoch() == epoch() == [[7] * 3] * 6
    assert dict(store.asked) == {"list": 1}
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 6
    store.buckets["bucket"]["data/images/0.png"] = (b"another picture", 2e9)
    monkeypatch.setattr("pipelines.decode_cache.status_of", storage.Statuses().of)  # as in a new process
    assert cache.get(paths[0], (4, 4), "image", lambda: np.full(3, 9, np.uint8)).tolist() == [9] * 3
