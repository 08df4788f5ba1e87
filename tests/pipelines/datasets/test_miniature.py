import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines.benchmarks import BENCHMARKS, benchmark
from pipelines.datasets.miniature import SIZES, miniature_folder, write_miniature
from pipelines.datasets.miniature.domains import DOMAINS
from pipelines.datasets.miniature.scene import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("miniature")


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def classes_in(split):
    return set().union(*(np.unique(split.label(i)).tolist() for i in range(len(split))))


def draw(style, index, size=(96, 48)):
    return render(style, size, np.random.default_rng([0, style.seed, 0, index]))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_classes_of_the_protocol_occur_in_source_target_and_validation(name, folder):
    domains = benchmark(name).miniature("tiny", folder)
    wanted = set(benchmark(name).protocols[benchmark(name).primary_protocol])
    for split in (domains.source, domains.target_labelled, domains.validation):
        assert classes_in(split) - {255} == wanted, split.name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_counts_and_picture_sizes_are_those_of_the_size(name, folder):
    domains, size = benchmark(name).miniature("tiny", folder), SIZES["tiny"]
    counts = (len(domains.source), len(domains.target), len(domains.validation))
    assert counts == (size.source, size.train, size.validation)
    for split in (domains.source, domains.target, domains.validation):
        width, height = size.pictures[split.name.split("/")[0]]
        assert split.image(0).shape == (height, width, 3)
        assert split.without_labels().label_paths is None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_target_has_no_label_path(name, folder):
    assert benchmark(name).miniature("tiny", folder).target.label_paths is None


def test_synthia_lane_markings_are_ignored_and_cityscapes_ones_are_road(folder):
    domains = benchmark("synthia2city").miniature("tiny", folder)
    assert 255 in classes_in(domains.source)
    hood_and_road = domains.validation.label(0)[-12:]
    assert set(np.unique(hood_and_road[:6]).tolist()) & {0}


def test_the_same_seed_gives_the_same_bytes(tmp_path, folder):
    first = write_miniature("synthia2city", "tiny", folder, seed=0)
    second = write_miniature("synthia2city", "tiny", tmp_path, seed=0)
    assert contents(first) == contents(second)


def test_another_seed_gives_other_pictures(tmp_path, folder):
    first = benchmark("synthia2city").miniature("tiny", folder, seed=0)
    second = benchmark("synthia2city").miniature("tiny", tmp_path, seed=1)
    assert not np.array_equal(first.source.image(0), second.source.image(0))


@pytest.mark.parametrize("style", DOMAINS.values(), ids=lambda style: style.name)
def test_a_picture_depends_on_its_own_index_only(style):
    alone = draw(style, 3)
    for index in range(3):
        draw(style, index)
    for a, b in zip(alone, draw(style, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_absent_classes_never_occur():
    style = DOMAINS["cityscapes"]
    for index in range(8):
        rng = np.random.default_rng(index)
        absent = frozenset({"terrain", "truck", "train"})
        _, ids = render(style, (96, 48), rng, absent=absent, wanted=frozenset({"terrain", "truck", "train"}))
        assert not {22, 27, 31} & set(np.unique(ids).tolist())


def test_a_tiny_pair_renders_in_a_few_seconds(tmp_path):
    started = time.perf_counter()
    write_miniature("gta2city", "tiny", tmp_path)
    assert time.perf_counter() - started < 15


def test_two_at_once_leave_one_complete_miniature_and_no_debris(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(lambda _: write_miniature("city2robot", "tiny", tmp_path), range(2)))
    assert roots[0] == roots[1] == miniature_folder("city2robot", "tiny", tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == [roots[0].name]


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.datasets.miniature.write.render_share", stop)
    with pytest.raises(KeyboardInterrupt):
        write_miniature("city2robot", "tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
