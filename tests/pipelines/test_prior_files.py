import subprocess
import sys

import numpy as np
import pytest
import torch

from actors.errors import RunError
from models.label_shift import log_mean_exp
from models.priors import image_counts
from pipelines.datasets.classes import CITYSCAPES_16, CITYSCAPES_19
from pipelines.priors import Prior, published_names, published_pixel_shares, read_prior, write_prior

NAMES = ("sky", "road", "car")
GOOD = 'classes = ["road", "car", "sky"]\nsource = [90, 9, 1]\ntarget = [60, 25, 15]\n'


def file_of(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def classes_of(name):
    return CITYSCAPES_19 if name.startswith("gta5") else CITYSCAPES_16


def test_the_module_imports_without_torch():
    code = "import sys, pipelines.priors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_four_tables_are_shipped():
    assert published_names() == ("gta5-modified", "gta5-original", "synthia-modified", "synthia-original")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gta5-original",
            "+0.212 -0.426 +0.036 -0.701 -0.224 -0.007 +0.277 +0.851 +0.105 -0.735 "
            "-2.154 +0.334 +2.108 +0.240 -0.812 -0.202 +1.449 +1.768 +3.978",
        ),
        (
            "synthia-original",
            "+0.487 -0.307 +0.054 -0.291 -0.653 +0.117 +1.356 +1.330 "
            "+0.257 -0.569 -1.373 -1.110 +0.193 -0.875 -0.811 +0.655",
        ),
    ],
)
def test_the_offsets_of_the_published_tables_are_the_published_ones(name, expected):
    offset = read_prior(name, classes_of(name).names).offset
    assert " ".join(f"{value:+.3f}" for value in offset) == expected


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("gta5-original", 263_686, 22_163),
        ("gta5-modified", 263_686, 20_942),
        ("synthia-original", 102_858, 18_442),
        ("synthia-modified", 102_858, 18_911),
    ],
)
def test_the_tables_hold_as_many_images_as_were_published(name, source, target):
    prior = read_prior(name, classes_of(name).names)
    for shares, total in ((prior.source, source), (prior.target, target)):
        counts = np.array(shares) * total
        np.testing.assert_allclose(counts, counts.round(), atol=1e-6)
        assert sum(shares) == pytest.approx(1.0)
    assert prior.method == "counts"
    assert "Undoing" in prior.about


@pytest.mark.parametrize(
    ("name", "road", "bicycle"),
    [("gta5-modified", (24353, 2819), (258, 1075)), ("synthia-modified", (9222, 2851), (5440, 1933))],
)
def test_the_modified_tables_begin_and_end_as_published(name, road, bicycle):
    prior = read_prior(name, classes_of(name).names)
    ratios = [np.log(target / source) for source, target in (road, bicycle)]
    assert prior.offset[-1] - prior.offset[0] == pytest.approx(ratios[1] - ratios[0])


def test_pixel_shares_of_the_sources_add_up():
    for name in published_names():
        found = published_pixel_shares(name)
        assert len(found) == len(classes_of(name))
        assert found.sum() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(RunError, match="no published table gta6; there are gta5-modified, gta5-original, synthia"):
        published_pixel_shares("gta6")


@pytest.mark.parametrize(("name", "percent"), [("road", 25.3), ("sky", 9.6)])
def test_a_hard_mask_counts_from_the_published_area_on(name, percent):
    index = CITYSCAPES_19.index(name)
    rho = published_pixel_shares("gta5-original")
    for area, counts in ((percent - 0.1, 0), (percent + 0.1, 1)):
        mask = torch.zeros(1, 19, 100, 100)
        pixels = round(area * 100)
        mask.flatten(2)[0, index, :pixels] = 1
        mask.flatten(2)[0, (index + 1) % 19, pixels:] = 1
        assert image_counts(log_mean_exp(mask).numpy(), rho)[index] == counts, area


def test_counts_become_shares_in_the_order_of_the_run(tmp_path):
    prior = read_prior(file_of(tmp_path, GOOD), NAMES)
    assert prior.classes == NAMES
    np.testing.assert_allclose(prior.source, [0.01, 0.9, 0.09])
    np.testing.assert_allclose(prior.target, [0.15, 0.6, 0.25])
    np.testing.assert_allclose(prior.offset, np.log([15, 60 / 90, 25 / 9]))
    assert (prior.method, prior.about) == ("", "")


def test_what_is_written_can_be_read_again(tmp_path):
    prior = Prior(NAMES, (0.5, 0.25, 0.25), (0.125, 0.625, 0.25), "em", "estimated from 8 images")
    path = tmp_path / "new" / "prior.toml"
    write_prior(path, prior)
    assert read_prior(path, NAMES) == prior
    assert [file.name for file in path.parent.iterdir()] == ["prior.toml"]
    again = Prior(NAMES, prior.source, prior.source)
    write_prior(path, again)
    assert read_prior(str(path), NAMES) == again


def test_a_class_that_neither_side_has_is_left_as_it_is(tmp_path):
    path = file_of(tmp_path, GOOD.replace("9, 1]", "10, 0]").replace("25, 15]", "40, 0]"))
    np.testing.assert_allclose(read_prior(path, NAMES).offset, [0, np.log(60 / 90), np.log(40 / 10)])


def test_a_file_that_does_not_exist_is_refused_with_the_tables(tmp_path):
    with pytest.raises(RunError, match=r"no file nowhere\.toml .* the tables are gta5-modified, gta5-original"):
        read_prior("nowhere.toml", NAMES)
    with pytest.raises(RunError, match="no file"):
        read_prior(tmp_path, NAMES)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("classes = [", "is no TOML file"),
        ("classes = 'road'\x00", "is no TOML file"),
        (GOOD.replace("target", "goal"), "unknown key 'goal'; known are about, classes"),
        (GOOD[: GOOD.index("target")], "the key target is missing"),
        (GOOD.replace('"sky"]', "3]"), "give a list of names"),
        (GOOD.replace('"sky"', '"car"'), "names car twice"),
        (GOOD.replace("9, 1]", "9]"), "source has 2 numbers for 3 classes"),
        (GOOD.replace("9, 1]", 'true, "1"]'), "source is .* give a list of numbers"),
        (GOOD.replace("[90, 9, 1]", "90"), "give a list of numbers"),
        (GOOD.replace("9, 1]", "9, -1]"), "source has no class frequencies: .* not negative"),
        (GOOD.replace("90, 9, 1]", "0, 0, 0]"), "source has no class frequencies: .* zero"),
        (GOOD.replace("9, 1]", "9, nan]"), "source has no class frequencies: .* finite"),
        (GOOD.replace("9, 1]", "9, 0]"), "sky has a share on one side .* give it a small share"),
        (GOOD.replace("25, 15]", "0, 15]"), "car has a share on one side"),
        (GOOD + "about = 3", "about is 3; give a text"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_what_to_write(tmp_path, text, why):
    path = file_of(tmp_path, text)
    with pytest.raises(RunError, match=why) as caught:
        read_prior(path, NAMES)
    assert "mine.toml" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="is no TOML file"):
        read_prior(path, NAMES)


def test_other_classes_than_the_runs_are_refused_and_named(tmp_path):
    path = file_of(tmp_path, GOOD)
    with pytest.raises(
        RunError, match=r"not those of the run: it does not have boat; the run does not have sky\. List"
    ):
        read_prior(path, ("road", "car", "boat"))
    with pytest.raises(RunError, match=r"gta5-original are .*: the run does not have terrain, truck, train\."):
        read_prior("gta5-original", CITYSCAPES_16.names)
