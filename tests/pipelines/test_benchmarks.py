import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.benchmarks import BENCHMARKS, benchmark, own_benchmark
from pipelines.datasets import DataError
from pipelines.datasets.classes import CITYSCAPES_13, CITYSCAPES_16
from pipelines.datasets.miniature import write_miniature
from tests.own_data import write_own_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("miniature")


@pytest.fixture
def root(folder, tmp_path):
    """A data root of synthia2city that a test may damage."""
    return shutil.copytree(write_miniature("synthia2city", "tiny", folder), tmp_path / "data")


def test_the_four_benchmarks_exist():
    assert set(BENCHMARKS) == {"gta2city", "synthia2city", "city2robot", "shift_only"}


def test_an_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(DataError, match="gta2city, synthia2city, city2robot, shift_only"):
        benchmark("gta2moon")


def test_synthia_scores_16_classes_first_and_13_beside_with_19_outputs():
    bench = benchmark("synthia2city")
    assert list(bench.protocols) == ["16", "13"]
    assert bench.primary_protocol == "16"
    assert len(bench.classes) == 19


def test_a_data_root_opens_with_the_same_readers(root):
    domains = benchmark("synthia2city").open(root)
    assert domains.source.labelled
    assert not domains.target.labelled
    assert domains.target_labelled.image_ids == domains.target.image_ids


@pytest.mark.parametrize("name", ["RAND_CITYSCAPES", "synthia", "SYNTHIA/RAND_CITYSCAPES"])
def test_synthia_is_found_under_its_usual_names(root, name):
    moved = root / "elsewhere"
    (root / "SYNTHIA").rename(moved)
    (root / name).parent.mkdir(exist_ok=True)
    moved.rename(root / name)
    assert len(benchmark("synthia2city").open(root).source) == 24


def test_a_target_without_any_labels_has_no_oracle(root):
    shutil.rmtree(root / "Cityscapes" / "gtFine" / "train")
    domains = benchmark("synthia2city").open(root)
    assert domains.target_labelled is None
    assert len(domains.target) == 24


def test_a_target_with_some_labels_missing_is_refused(root):
    next((root / "Cityscapes" / "gtFine" / "train").rglob("*.png")).unlink()
    with pytest.raises(DataError, match="1 of 24 images have no label file"):
        benchmark("synthia2city").open(root)


def test_two_cities_that_differ_in_class_frequencies_alone_lie_in_two_folders(folder):
    domains = benchmark("shift_only").miniature("tiny", folder)
    assert "/Cityscapes/gtFine/train/" in domains.source.label_paths[0]
    assert all("/Cityscapes-shifted/" in path for path in (domains.target.image_paths + domains.validation.image_paths))
    assert domains.target_labelled.image_paths == domains.target.image_paths
    assert set(domains.source.label_encoding.train_ids) == set(range(19))


def test_the_two_cities_are_shrunk_alike():
    source, target = benchmark("shift_only").shapes.small(240)
    assert source == target == (240, 120)


@pytest.mark.parametrize("classes", [19, 16])
def test_a_benchmark_that_is_only_rendered_takes_no_data_root(folder, classes):
    pair = benchmark("shift_only").narrowed(classes)
    rendered = write_miniature("shift_only", "tiny", folder)
    for root in (rendered, rendered / "nowhere"):
        with pytest.raises(DataError, match=r"shift_only exists only as a miniature: .* Leave the data root out"):
            pair.open(root)


def test_a_missing_data_root_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        benchmark("synthia2city").open(tmp_path / "nowhere")


def test_a_data_root_without_the_dataset_says_what_is_expected_and_what_was_found(tmp_path):
    (tmp_path / "KITTI").mkdir()
    with pytest.raises(DataError) as error:
        benchmark("gta2city").open(tmp_path)
    assert "GTA5/images" in str(error.value)
    assert "found KITTI" in str(error.value)


def test_an_unknown_miniature_size_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="tiny, mini"):
        benchmark("gta2city").miniature("huge", tmp_path)


def test_two_toml_files_are_a_benchmark(tmp_path):
    pair, domains = own_benchmark(*write_own_data(tmp_path, classes=3))
    assert (pair.name, pair.classes.names) == ("source2target", ("class 0", "class 1", "class 2"))
    assert pair.protocols == {"3": (0, 1, 2)}
    assert (len(domains.source), len(domains.target), len(domains.validation)) == (8, 8, 8)
    assert not domains.target.labelled
    assert domains.target_labelled is None


def test_an_oracle_needs_other_images_to_be_scored_on(tmp_path):
    source, target = write_own_data(tmp_path / "a")
    _, held_out = write_own_data(tmp_path / "b", images=4)
    _, domains = own_benchmark(source, target, held_out)
    assert (len(domains.target_labelled), len(domains.validation)) == (8, 4)


def test_a_target_without_labels_is_not_scored(tmp_path):
    _, domains = own_benchmark(*write_own_data(tmp_path, target_labels=False))
    assert domains.validation is None


def test_own_images_are_seen_in_their_own_proportions_and_never_enlarged(tmp_path):
    pair, _ = own_benchmark(*write_own_data(tmp_path, sizes=((300, 400),)))
    assert pair.shapes.target == pair.shapes.target_again == (300, 400)
    assert pair.shapes.small(240) == ((180, 240), (180, 240))
    large, _ = own_benchmark(*write_own_data(tmp_path / "large", sizes=((2400, 1200),), images=1))
    assert large.shapes.target == (1024, 512)
    assert large.shapes.crops[0] == (round(0.8 * 1024), round(0.8 * 512))


def test_sizes_that_differ_are_resized_to_the_middle_proportions(tmp_path):
    pair, _ = own_benchmark(*write_own_data(tmp_path, sizes=((64, 48), (48, 64), (80, 40)), images=6))
    assert pair.shapes.target == (64, 48)


def test_a_photo_that_is_turned_by_its_exif_data_counts_upright(tmp_path):
    source, target = write_own_data(tmp_path, sizes=((64, 48),))
    for path in (tmp_path / "target" / "photos").glob("*.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)
    _, domains = own_benchmark(source, target)
    assert domains.target.image(0).shape == (64, 48, 3)
    assert own_benchmark(source, target)[0].shapes.target == (48, 64)


def test_a_source_without_labels_or_with_some_missing_is_refused(tmp_path):
    source, target = write_own_data(tmp_path, target_labels=False)
    with pytest.raises(DataError, match=r"target\.toml: a source domain needs labels"):
        own_benchmark(target, target)
    (tmp_path / "source" / "masks" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 8 images have no label, the first is .*3\.jpg"):
        own_benchmark(source, target)


def test_validation_images_need_labels(tmp_path):
    source, target = write_own_data(tmp_path, target_labels=False)
    with pytest.raises(DataError, match="images to score on need labels"):
        own_benchmark(source, target, target)


def test_images_of_which_none_can_be_read_are_refused(tmp_path):
    source, target = write_own_data(tmp_path)
    for path in (tmp_path / "target" / "photos").glob("*.jpg"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the images that were tried can be read"):
        own_benchmark(source, target)


def test_an_oracle_never_learns_from_what_it_is_scored_on(tmp_path):
    source, target = write_own_data(tmp_path)
    _, same = own_benchmark(source, target, target)
    assert same.target_labelled is None
    assert len(same.validation) == 8
    part = tmp_path / "target" / "part.toml"
    part.write_text('images = "photos/3*.jpg"\nlabels = "masks/3*.png"\n')
    _, some = own_benchmark(source, target, str(part))
    assert some.validation.image_ids == ("photos/3.jpg",)
    assert len(some.target_labelled) == 7


def test_an_image_to_score_on_without_a_label_is_refused(tmp_path):
    source, target = write_own_data(tmp_path)
    (tmp_path / "target" / "masks" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 8 images to score on have no label, the first is .*3\.jpg"):
        own_benchmark(source, target, target)


def listed(tmp_path, *lines):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    return str(path)


def test_listed_target_images_are_learned_from_by_id_file_name_or_end_of_path(root, tmp_path):
    domains = benchmark("synthia2city").open(root)
    one, two, three = domains.target_labelled.image_paths[:3]
    file, end = two.rsplit("/", 1)[1], three.split("data/", 1)[1]
    lines = listed(tmp_path, "# a few", "", domains.target.image_ids[0], f"{file}  # why", end, one)
    given = domains.with_target_labels(lines)
    assert given.few.image_paths == (one, two, three)
    assert given.few.labelled
    assert given.validation == domains.validation
    assert not given.target.labelled


def test_images_of_ones_own_that_are_learned_from_are_scored_on_no_more(tmp_path):
    _, domains = own_benchmark(*write_own_data(tmp_path))
    given = domains.with_target_labels(listed(tmp_path, "photos/2.jpg", "5.jpg"))
    assert given.few.image_ids == ("photos/2.jpg", "photos/5.jpg")
    assert given.validation.image_ids == tuple(f"photos/{i}.jpg" for i in (0, 1, 3, 4, 6, 7))
    assert len(given.target) == 8


def test_where_every_label_is_learned_from_none_is_left_to_score_on(tmp_path):
    _, domains = own_benchmark(*write_own_data(tmp_path))
    assert domains.with_target_labels(listed(tmp_path, *(f"{i}.jpg" for i in range(8)))).validation is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), r"names no image; write one a line, for example photos/0\.jpg"),
        (("# nothing",), "names no image"),
        (("0.jpg", "9.jpg", "x"), r"2 of 3 lines name no labelled image of target, the first is '9\.jpg'; .*'photos/0"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(tmp_path, lines, message):
    _, domains = own_benchmark(*write_own_data(tmp_path))
    with pytest.raises(DataError, match=message):
        domains.with_target_labels(listed(tmp_path, *lines))


def test_a_name_that_two_images_share_asks_for_more_of_the_path(tmp_path):
    source, target = write_own_data(tmp_path)
    for folder in ("photos", "masks"):
        shutil.copytree(tmp_path / "target" / folder, tmp_path / "target" / folder / "again")
    text = (tmp_path / "target" / "target.toml").read_text().replace("s/*", "s/**/*")
    (tmp_path / "target" / "target.toml").write_text(text)
    _, domains = own_benchmark(source, target)
    with pytest.raises(DataError, match=r"may be .* or .*; write more of its path"):
        domains.with_target_labels(listed(tmp_path, "1.jpg"))
    assert len(domains.with_target_labels(listed(tmp_path, "again/1.jpg")).few) == 1


def test_a_list_that_is_not_there_and_a_target_without_labels_are_refused(tmp_path):
    _, domains = own_benchmark(*write_own_data(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        domains.with_target_labels(str(tmp_path / "none.txt"))
    _, domains = own_benchmark(*write_own_data(tmp_path / "other", target_labels=False))
    with pytest.raises(DataError, match="target has no labels, so none of those"):
        domains.with_target_labels(listed(tmp_path, "0.jpg"))


def test_source_images_that_are_held_out_are_spread_and_learned_from_no_more(root):
    domains = benchmark("synthia2city").open(root)
    given = domains.with_held_out(3)
    images = len(domains.source)
    assert given.held_out.image_ids == tuple(domains.source.image_ids[k * images // 3] for k in range(3))
    assert given.held_out.labelled
    assert set(given.source.image_ids) == set(domains.source.image_ids) - set(given.held_out.image_ids)
    assert len(given.source) == images - 3
    with pytest.raises(DataError, match=f"of {images} source images cannot be held out: .* at most {images // 2}"):
        domains.with_held_out(images // 2 + 1)


@pytest.mark.parametrize("name", ["synthia2city", "gta2city"])
def test_16_and_13_classes_have_protocols_in_their_own_ids(name):
    sixteen, thirteen = benchmark(name).narrowed(16), benchmark(name).narrowed(13)
    assert (sixteen.name, sixteen.classes, sixteen.primary_protocol) == (name, CITYSCAPES_16, "16")
    assert sixteen.protocols == {"16": tuple(range(16)), "13": (0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}
    assert (thirteen.name, thirteen.classes) == (name, CITYSCAPES_13)
    assert thirteen.protocols == {"13": tuple(range(13))}
    assert sixteen.shapes == benchmark(name).shapes


def test_a_description_counts_the_classes_that_are_left():
    assert benchmark("gta2city").narrowed(16).description == "GTA5 to Cityscapes, 16 classes"
    assert benchmark("synthia2city").narrowed(13).description == "SYNTHIA-RAND-CITYSCAPES to Cityscapes, 13 classes"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_as_many_classes_as_there_are_change_nothing(name):
    pair = benchmark(name)
    assert pair.narrowed(len(pair.classes)) is pair


def test_one_s_own_benchmark_has_its_own_classes_only(tmp_path):
    pair, _ = own_benchmark(*write_own_data(tmp_path, classes=3))
    assert pair.narrowed(3) is pair
    with pytest.raises(DataError, match=r"source2target cannot have 2 classes: .* Ask for 3\."):
        pair.narrowed(2)


@pytest.mark.parametrize("count", [0, 9, 18, 20])
def test_a_count_without_known_ids_lists_those_with(count):
    with pytest.raises(DataError, match=f"synthia2city cannot have {count} classes: .* Ask for 19 or 16 or 13"):
        benchmark("synthia2city").narrowed(count)


@pytest.mark.parametrize("count", [19, 16, 13])
def test_robotcar_has_its_nine_classes_only(count):
    with pytest.raises(DataError, match=rf"city2robot cannot have {count} classes: .* Ask for 9\."):
        benchmark("city2robot").narrowed(count)


def classes_in(split):
    return set().union(*(np.unique(split.label(i)).tolist() for i in range(len(split))))


@pytest.mark.parametrize(
    ("name", "count"), [("synthia2city", 16), ("synthia2city", 13), ("gta2city", 16), ("shift_only", 16)]
)
def test_a_miniature_with_fewer_classes_has_labels_of_just_those(folder, name, count):
    domains = benchmark(name).narrowed(count).miniature("tiny", folder)
    for split in (domains.source, domains.target_labelled, domains.validation):
        assert classes_in(split) - {255} == set(range(count)), split.name
    assert not domains.target.labelled


def test_a_data_root_with_fewer_classes_has_the_same_files_and_loses_no_pixel_of_a_class_that_is_left(root):
    whole, part = benchmark("synthia2city").open(root), benchmark("synthia2city").narrowed(16).open(root)
    assert part.target == whole.target
    assert part.validation.label_paths == whole.validation.label_paths
    for before, after in zip(map(whole.validation.label, range(4)), map(part.validation.label, range(4)), strict=True):
        for old, new in ((8, 8), (10, 9), (13, 12), (15, 13), (18, 15)):
            np.testing.assert_array_equal(after == new, before == old)
        assert (after[np.isin(before, (9, 14, 16, 255))] == 255).all()


def test_every_labelled_part_of_the_domains_is_narrowed(root, tmp_path):
    whole = benchmark("synthia2city").open(root)
    lines = listed(tmp_path, *whole.target.image_ids[:2])
    part = whole.with_held_out(2).with_target_labels(lines).narrowed(benchmark("synthia2city").narrowed(13).kept)
    for split in (part.source, part.held_out, part.target_labelled, part.few, part.validation):
        assert classes_in(split) <= {*range(13), 255}, split.name
        assert 12 in split.label_encoding.train_ids
    assert (len(part.held_out), len(part.few)) == (2, 2)
