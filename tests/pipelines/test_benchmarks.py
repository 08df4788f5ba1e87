import shutil

import pytest

from pipelines.benchmarks import BENCHMARKS, benchmark
from pipelines.datasets import DataError
from pipelines.datasets.miniature import write_miniature


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("miniature")


@pytest.fixture
def root(folder, tmp_path):
    """A data root of synthia2city that a test may damage."""
    return shutil.copytree(write_miniature("synthia2city", "tiny", folder), tmp_path / "data")


def test_the_three_benchmarks_exist():
    assert set(BENCHMARKS) == {"gta2city", "synthia2city", "city2robot"}


def test_an_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(DataError, match="gta2city, synthia2city, city2robot"):
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
