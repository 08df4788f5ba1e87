"""``run.py prior``, and what ``evaluate --adjust-prior`` makes of class frequencies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from actors.prior_estimate import METHODS, PriorPlan, estimated
from pipelines.options import AdaptOptions, PriorOptions, write_config
from pipelines.prior_estimation import SourceImages, Survey, source_prior
from pipelines.priors import Prior, read_prior, write_prior
from pipelines.rescore import label_lines, rescore, score_file
from pipelines.results import read_confusion
from pipelines.run_prior import estimate_of_run, prior_for, temperature_of
from pipelines.setup import resolve
from pipelines.streams import SplitReader
from pipelines.trained import describe
from pipelines.views import input_of
from tests.own_data import write_own_data

NAMES = ("class 0", "class 1", "class 2")
SKEWED = Prior(NAMES, (0.5, 0.3, 0.2), (0.05, 0.15, 0.8), "counts", "by hand")


def finished(root, *, target_labels=True, **more):
    """A run directory of a random network that takes pixels for several classes, and the network."""
    source, target = write_own_data(root / "own", target_labels=target_labels)
    folders = {"runs": str(root / "runs"), "data": str(root / "data")}
    given = AdaptOptions(source=source, target=target, preset="tiny", name="run", **folders, **more)
    setup = resolve(given)
    describe(setup)
    write_config(setup.options)
    torch.manual_seed(0)
    network = setup.plan.network()
    for head in network.heads():
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
    state = {"step": 3, "teaching": {"network": network.state_dict()}}
    assert CheckpointStore(setup.options.folder() / "checkpoints").save(3, state) is None
    return setup, network.eval()


@pytest.fixture
def run(tmp_path):
    return finished(tmp_path)


def estimate_of(folder, method, progress=lambda done, images: None, **more):
    return estimate_of_run(folder, method, progress, threads=1, **more)


def plan_of(setup, method):
    source, presence = source_prior(setup.domains.source, 3, method, None)
    asked = setup.options.prior
    return PriorPlan(
        tuple(source), method=method, presence=tuple(presence), floor=asked.floor, temperature=asked.temperature
    )


def by_hand(setup, network, method):
    """What the plan of a run makes of what its network sees."""
    plan, size = plan_of(setup, method), setup.preset.label_views[-1]
    source = SourceImages(SplitReader(setup.domains.source, setup.cache), setup.preset.stages[-1].source_size)
    bonnet = setup.benchmark.bonnet
    look = Survey(setup.target_reader, size, setup.options.seed, bonnet, plan.temperature, source)
    return estimated(plan, look(network))


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_is_what_the_runs_network_sees_and_lies_in_its_directory(run, method):
    setup, network = run
    told = []
    found = estimate_of(setup.plan.folder, method, lambda *progress: told.append(progress))
    plan = plan_of(setup, method)
    np.testing.assert_allclose(found.prior.target, by_hand(setup, network, method))
    assert np.abs(np.subtract(found.prior.target, plan.source)).max() > 0.02, "the case must have something to say"
    np.testing.assert_allclose(found.prior.source, plan.source)
    np.testing.assert_allclose(found.offset, np.log(np.divide(found.prior.target, plan.source)))
    assert (found.path, found.step) == (setup.options.folder() / "prior.toml", 3)
    assert told == [(4, 8), (8, 8)]
    again = read_prior(found.path, NAMES)
    assert again.target == pytest.approx(found.prior.target)
    assert (again.method, again.about) == (method, f"estimated by {method} from 8 target images")


def test_the_temperature_of_the_run_divides_what_is_seen_and_multiplies_what_is_added(tmp_path):
    setup, network = finished(tmp_path, prior=PriorOptions(temperature=1.8, floor=0.3))
    found = estimate_of(setup.plan.folder, "em")
    plan = plan_of(setup, "em")
    assert (plan.temperature, plan.floor) == (1.8, 0.3)
    np.testing.assert_allclose(found.prior.target, by_hand(setup, network, "em"))
    np.testing.assert_allclose(found.offset, 1.8 * found.prior.offset)
    np.testing.assert_allclose(found.offset, plan.offset(np.array(found.prior.target)), rtol=1e-5)


def shares_of(split):
    counts = sum(np.bincount(split.label(index).reshape(-1), minlength=3) for index in range(len(split)))
    return counts / counts.sum()


def test_the_targets_own_labels_stand_beside_and_take_no_part(tmp_path):
    setup, _ = finished(tmp_path / "with")
    found = estimate_of(setup.plan.folder, "confusion")
    np.testing.assert_allclose(found.truth, shares_of(setup.domains.validation))
    without, _ = finished(tmp_path / "without", target_labels=False)
    blind = estimate_of(without.plan.folder, "confusion")
    assert blind.truth is None
    assert blind.prior.target == found.prior.target


def test_labels_of_the_images_that_are_estimated_from_are_shown_rather_than_those_to_score_on(run, tmp_path):
    setup, _ = run
    folder = tmp_path / "own" / "target"
    for name in ("photos/1.jpg", "masks/1.png"):
        (folder / "scored" / name).parent.mkdir(parents=True)
        (folder / name).rename(folder / "scored" / name)
    lines = (folder / "target.toml").read_text().replace("photos", "scored/photos").replace("masks", "scored/masks")
    (folder / "some.toml").write_text(lines)
    write_config(replace(setup.options, validation=str(folder / "some.toml")))
    found = estimate_of(setup.plan.folder, "confusion")
    np.testing.assert_allclose(found.truth, shares_of(setup.domains.validation.subset([0, *range(2, 8)])))


def test_target_labels_without_a_class_are_no_truth(run):
    setup, _ = run
    for index, path in enumerate(setup.domains.validation.label_paths):
        Image.fromarray(np.full_like(setup.domains.validation.label(index), 255)).save(path)
    assert estimate_of(setup.plan.folder, "confusion").truth is None


def test_an_image_that_cannot_be_read_is_not_counted(run):
    setup, _ = run
    with open(setup.domains.target.image_paths[2], "wb") as file:
        file.write(b"no photo")
    assert estimate_of(setup.plan.folder, "confusion").prior.about == "estimated by confusion from 7 target images"


def test_it_may_be_written_elsewhere_and_be_of_the_recommended_step(run, tmp_path):
    setup, _ = run
    found = estimate_of(setup.plan.folder, "em", out=str(tmp_path / "here" / "mine.toml"))
    assert found.path == tmp_path / "here" / "mine.toml"
    assert read_prior(found.path, NAMES).target == pytest.approx(found.prior.target)
    assert not (setup.options.folder() / "prior.toml").exists()
    with pytest.raises(RunError, match="recommends no step yet"):
        estimate_of(setup.plan.folder, "em", weights="recommended")


def test_what_cannot_be_estimated_is_a_sentence(run, tmp_path):
    setup, _ = run
    with pytest.raises(RunError, match="is no run directory"):
        estimate_of(str(tmp_path / "nowhere"), "em")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match=r"taken cannot be written"):
        estimate_of(setup.plan.folder, "em", out=str(tmp_path / "taken"))
    for item in (setup.options.folder() / "checkpoints").rglob("state.pt"):
        item.unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        estimate_of(setup.plan.folder, "em")


# What --adjust-prior stands for.


def test_none_and_a_file_and_a_table_are_told_apart(tmp_path):
    write_prior(tmp_path / "mine.toml", SKEWED)
    assert prior_for("none", NAMES, None) is None
    assert prior_for(str(tmp_path / "mine.toml"), NAMES, None).target == pytest.approx(SKEWED.target)
    with pytest.raises(RunError, match=r"there is no file .* the tables are gta5-modified"):
        prior_for("gta5", NAMES, None)
    with pytest.raises(
        RunError, match=r"the classes of gta5-original are not those of the run: it does not have class 0"
    ):
        prior_for("gta5-original", NAMES, None)


def test_estimated_is_what_lies_in_the_directory_or_what_is_estimated_now(tmp_path):
    with pytest.raises(RunError, match=r"--adjust-prior estimated needs a run; with --model give a TOML file"):
        prior_for("estimated", NAMES, None)
    with pytest.raises(RunError, match=r"not estimated yet; .*python run\.py prior "):
        prior_for("estimated", NAMES, tmp_path)
    write_prior(tmp_path / "prior.toml", SKEWED)
    assert prior_for("estimated", NAMES, tmp_path).target == pytest.approx(SKEWED.target)
    now = replace(SKEWED, target=(0.2, 0.2, 0.6))
    assert prior_for("estimated", NAMES, tmp_path, lambda: now) is now


def test_the_temperature_of_a_directory_without_options_is_one(tmp_path):
    assert temperature_of(tmp_path) == 1.0
    write_config(AdaptOptions(name="run", runs=str(tmp_path), prior=PriorOptions(temperature=1.8)))
    assert temperature_of(tmp_path / "run") == 1.8


# Scores.


@torch.no_grad()
def confusion_by_hand(setup, network, offset):
    """Of every validation image in every view of the protocol, softmax of the offset scores in float64."""
    split, found = setup.domains.validation, np.zeros((3, 3), int)
    offset = torch.from_numpy(offset)[:, None, None]
    for index in range(len(split)):
        label, total = split.label(index), 0
        for view in setup.preset.score_views:
            x = input_of(torch.from_numpy(np.array(split.image(index, view)))[None], network)
            for flip in (False, True) if setup.preset.score_mirrored else (False,):
                p = (network(x.flip(3) if flip else x).fused().double() + offset).softmax(1)
                p = p.flip(3) if flip else p
                total = total + F.interpolate(p, label.shape, mode="bilinear", align_corners=True)
        for row in range(3):
            found[row] += np.bincount(total[0].argmax(0).numpy()[label == row], minlength=3)
    return found


def scored(setup):
    return read_confusion(setup.options.folder() / "evaluation" / "confusion.csv")


@pytest.mark.parametrize("temperature", [1.0, 1.8])
def test_a_run_is_scored_with_the_class_frequencies_of_a_file(tmp_path, temperature):
    setup, network = finished(tmp_path, prior=PriorOptions(temperature=temperature))
    plain = rescore(setup.options)
    assert plain["prior"] is None
    before = scored(setup)
    write_prior(tmp_path / "mine.toml", SKEWED)
    found = rescore(setup.options, str(tmp_path / "mine.toml"))
    offset = temperature * np.log([0.1, 0.5, 4.0])
    expected = confusion_by_hand(setup, network, offset)
    assert np.abs(scored(setup) - expected).sum() <= 4  # a tie or two
    assert np.abs(before - expected).sum() > 100, "the case must have something to say"
    assert found["prior"]["offset"] == pytest.approx(dict(zip(NAMES, offset, strict=True)))
    assert (found["prior"]["from"], found["prior"]["about"]) == (str(tmp_path / "mine.toml"), "by hand")
    assert found["scores"]["adapted"] != plain["scores"]["adapted"]
    (said,) = [line for line in label_lines(found) if "adjusted" in line]
    assert said.startswith(
        f"class scores are adjusted ({tmp_path / 'mine.toml'}), most of all class 0 {offset[0]:+.2f}"
    )
    assert not [line for line in label_lines(plain) if "adjusted" in line]
    assert not (setup.options.folder() / "evaluation" / "prior.toml").exists()


def test_estimated_is_estimated_with_the_weights_that_are_scored_and_written_beside_the_scores(run):
    setup, network = run
    write_prior(setup.options.folder() / "prior.toml", SKEWED)  # of other weights, perhaps
    found = rescore(setup.options, "estimated")
    target = by_hand(setup, network, "confusion")
    written = read_prior(setup.options.folder() / "evaluation" / "prior.toml", NAMES)
    np.testing.assert_allclose(written.target, target, rtol=1e-6)
    offset = np.log(target / np.array(plan_of(setup, "confusion").source))
    assert found["prior"]["offset"] == pytest.approx(dict(zip(NAMES, offset, strict=True)))
    assert np.abs(scored(setup) - confusion_by_hand(setup, network, offset)).sum() <= 4
    assert read_prior(setup.options.folder() / "prior.toml", NAMES).target == pytest.approx(SKEWED.target)


def test_the_method_of_the_run_estimates(tmp_path):
    setup, network = finished(tmp_path, prior=PriorOptions(method="counts"))
    rescore(setup.options, "estimated")
    written = read_prior(setup.options.folder() / "evaluation" / "prior.toml", NAMES)
    assert written.method == "counts"
    np.testing.assert_allclose(written.target, by_hand(setup, network, "counts"))


def test_class_frequencies_of_other_classes_are_refused(run, tmp_path):
    setup, _ = run
    with pytest.raises(RunError, match="the classes of gta5-original are not those of the run"):
        rescore(setup.options, "gta5-original")
    with pytest.raises(RunError, match=r"there is no file nowhere\.toml with class frequencies"):
        rescore(setup.options, "nowhere.toml")


def test_a_file_of_weights_is_scored_with_them_too(tiny_folder, tmp_path):
    setup = resolve(AdaptOptions(preset="tiny", data=str(tiny_folder / "data"), references="never"))
    torch.manual_seed(0)
    network, names = setup.plan.network(), setup.benchmark.classes.names
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    given = Prior(names, (1 / 19,) * 19, tuple(np.arange(1.0, 20.0) / 190))
    write_prior(tmp_path / "mine.toml", given)
    data, out = {"preset": "tiny", "data": str(tiny_folder / "data")}, tmp_path / "out"
    found = score_file(str(tmp_path / "whole.pth"), data, str(out), adjust_prior=str(tmp_path / "mine.toml"))
    assert found["prior"]["offset"] == pytest.approx(dict(zip(names, given.offset, strict=True)))
    scorer = setup.make_scorer()(torch.device("cpu"))
    scorer.offset = torch.from_numpy(given.offset).float()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    assert read_confusion(out / "confusion.csv").tolist() == scorer.score(weights)["confusion"]
    score_file(str(tmp_path / "whole.pth"), data, str(out), adjust_prior="estimated")
    assert read_prior(out / "prior.toml", names).method == "confusion"
