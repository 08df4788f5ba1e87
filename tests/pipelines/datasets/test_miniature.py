import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pipelines.benchmarks import BENCHMARKS, benchmark
from pipelines.datasets import CITYSCAPES_19, DataError
from pipelines.datasets.miniature import MINIATURE_VERSION, SIZES, miniature_folder, write_miniature
from pipelines.datasets.miniature.domains import DOMAINS
from pipelines.datasets.miniature.scene import render
from pipelines.datasets.png16 import decode_rgb16


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


def test_synthia_lane_markings_are_written_as_22_and_ignored(folder):
    source = benchmark("synthia2city").miniature("tiny", folder).source
    raw = np.stack([decode_rgb16(path)[:, :, 0] for path in source.label_paths])
    labels = np.stack([source.label(i) for i in range(len(source))])
    assert (raw == 22).any()
    np.testing.assert_array_equal(labels == 255, (raw == 22) | (raw == 0))


def test_in_cityscapes_a_lane_marking_is_road_and_only_the_bonnet_is_ignored(folder):
    validation = benchmark("synthia2city").miniature("tiny", folder).validation
    for i in range(len(validation)):
        rows = np.nonzero((validation.label(i) == 255).any(1))[0]
        assert rows.min() > 0.85 * 64


# Mean red, green and blue, and the share in percent of road, building, vegetation, sky and car.
FROZEN = {
    "synthia": ((115.9, 115.4, 115.7), (37.2, 34.5, 3.6, 4.5, 3.4)),
    "gta5": ((123.9, 117.1, 105.8), (32.8, 32.3, 3.5, 10.3, 11.4)),
    "cityscapes": ((101.7, 102.8, 95.0), (38.2, 22.1, 9.3, 4.3, 7.8)),
    "robotcar": ((110.7, 106.8, 111.0), (29.2, 22.4, 12.9, 11.0, 10.2)),
    "cityscapes-shifted": ((107.9, 104.8, 96.4), (33.7, 25.3, 3.0, 6.1, 3.0)),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_the_calibrated_pictures_are_frozen(name):
    """Whoever changes a picture raises MINIATURE_VERSION, calibrates again and types new numbers here."""
    assert MINIATURE_VERSION == 1
    pictures, ids = zip(*(draw(DOMAINS[name], index) for index in range(4)), strict=True)
    colours, shares = FROZEN[name]
    np.testing.assert_allclose(np.stack(pictures).mean((0, 1, 2)), colours, atol=0.3)
    found = [100 * np.mean(np.stack(ids) == i) for i in (7, 11, 21, 23, 26)]
    np.testing.assert_allclose(found, shares, atol=0.2)


def test_the_shifted_city_differs_in_how_often_things_occur_and_in_nothing_else():
    city, shifted = DOMAINS["cityscapes"], DOMAINS["cityscapes-shifted"]
    assert shifted.seed != city.seed
    assert replace(shifted, name=city.name, seed=city.seed, density=city.density) == city
    assert set(shifted.density) == set(city.density)


@pytest.mark.parametrize(
    ("one", "other"),
    [("parked", "traffic"), ("tree", "hedge"), ("person", "crossing"), ("rider_bicycle", "rider_motorcycle")],
)
def test_what_a_class_shows_in_several_ways_keeps_its_proportions_when_it_is_shifted(one, other):
    city, shifted = DOMAINS["cityscapes"].density, DOMAINS["cityscapes-shifted"].density
    assert shifted[one] / city[one] == pytest.approx(shifted[other] / city[other], rel=0.1)


def test_the_shift_is_strong_in_both_directions(folder):
    domains = benchmark("shift_only").miniature("tiny", folder)

    def shares(split):
        pixels = sum(np.bincount(split.label(i).reshape(-1), minlength=256)[:19] for i in range(len(split)))
        return pixels / pixels.sum()

    offset = np.log(shares(domains.target_labelled) / shares(domains.source))
    ratio = dict(zip(CITYSCAPES_19.names, offset, strict=True))
    assert all(ratio[name] > 0.7 for name in ("person", "rider", "bus", "train", "motorcycle", "bicycle")), ratio
    assert all(ratio[name] < -0.7 for name in ("car", "vegetation")), ratio
    assert all(abs(ratio[name]) < 0.3 for name in ("road", "pole", "terrain", "sky")), ratio


def test_what_is_frequent_is_put_in_sight_more_often_too(folder):
    """Or it would stand further away than where it is rare, and look smaller."""
    domains = benchmark("shift_only").miniature("tiny", folder)
    wanted = {CITYSCAPES_19.index(name) for name in ("person", "rider", "bicycle", "motorcycle", "bus", "train")}

    def whole(split):
        return sum(wanted <= set(np.unique(split.label(i)).tolist()) for i in range(len(split)))

    assert whole(domains.target_labelled) > 12
    assert whole(domains.source) < 4


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot write the miniature"):
        write_miniature("city2robot", "tiny", tmp_path / "file")


def test_a_failing_renderer_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "broken", SIZES["mini"])  # the subprocesses do not know this size
    with pytest.raises(DataError, match="KeyError: 'broken'"):
        write_miniature("city2robot", "broken", tmp_path)
    assert list(tmp_path.iterdir()) == []


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
