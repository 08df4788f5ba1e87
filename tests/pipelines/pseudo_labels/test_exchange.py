import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from actors.labeller import Labeller, label_seed
from actors.prior_estimate import Adjustment, estimated
from actors.records import decode
from models.uncertainty import draw_masks, mean_probabilities, negative_labels, trunk_views
from pipelines.options import DataOptions, PriorOptions, write_config
from pipelines.pictures import shrunk
from pipelines.priors import Prior, write_prior
from pipelines.pseudo_labels.exchange import export_labels, import_labels
from pipelines.pseudo_labels.layouts import LAYOUTS
from pipelines.pseudo_labels.table import Table
from pipelines.setup import resolve
from pipelines.views import network_input
from tests.pipelines.test_trained import finished_run

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    """A run of a random network that is sure of some pixels and not of others."""
    setup, network = finished_run(tmp_path)
    for head in network.heads():
        torch.nn.init.normal_(head.classifier.weight, std=1.0)
    state = {"step": 3, "teaching": {"network": network.state_dict()}}
    assert CheckpointStore(setup.options.folder() / "checkpoints").save(3, state) is None
    write_config(setup.options)
    return setup, network


def quiet(made, total):
    assert 0 < made <= total == 8


def own(setup):
    return DataOptions(source=setup.options.source, target=setup.options.target)


def expected_labels(setup, network, adjustment=None):
    """All images labelled in one block by the teacher's own code, thresholds from all of them."""
    ((stage, plan),) = setup.labels.items()
    labeller = Labeller(setup.plan.network, setup.target_reader, setup.labels, setup.options.seed, CPU)
    labeller.load(3, {name: tensor.numpy() for name, tensor in network.state_dict().items()})
    header, block = labeller.label(stage, 0, 0, 8, 3, adjustment)
    thresholds = plan.selection.thresholds(header.histogram)
    records = [decode(block, row) for row in range(8)]
    return [plan.selection.apply(record, thresholds) for record in records], [r["confidence"] for r in records]


def test_exported_labels_are_those_that_the_teachers_would_make(run, tmp_path):
    setup, network = run
    done = export_labels(setup.plan.folder, str(tmp_path / "x.parquet"), "parquet", quiet, threads=1)
    table, (labels, confidences) = Table(tmp_path / "x.parquet"), expected_labels(setup, network)
    assert table.image_ids == setup.domains.target.image_ids
    assert table.classes == setup.benchmark.classes.names
    for image_id, label, confidence in zip(table.image_ids, labels, confidences, strict=True):
        np.testing.assert_array_equal(table.get(image_id).label, label)
        np.testing.assert_array_equal(table.get(image_id).confidence, confidence)
    assert (done.images, done.skipped, done.step) == (8, [], 3)
    assert done.kept == pytest.approx(np.mean([(label != 255).mean() for label in labels]))
    assert 0 < done.kept < 1


SKEWED = Prior(("class 0", "class 1", "class 2"), (0.5, 0.3, 0.2), (0.05, 0.15, 0.8))


def adjusting(run, tmp_path, wanted, **more):
    """The run with adjusted labels, its network, and to what they are adjusted."""
    setup, network = run
    write_prior(tmp_path / "mine.toml", SKEWED)
    path = str(tmp_path / "mine.toml") if wanted == "file" else wanted
    write_config(replace(setup.options, adjust_prior=path, prior=PriorOptions(temperature=1.8, **more)))
    setup = resolve(replace(setup.options, adjust_prior=path, prior=PriorOptions(temperature=1.8, **more)))
    (plan,) = (plan.prior for plan in setup.labels.values())
    if wanted == "file":
        return setup, network, (1.8 * np.log([0.1, 0.5, 4.0])).astype(np.float32)
    ((_, labels),) = setup.labels.items()
    survey = setup.survey(labels.rule.ignore_bottom, labels.source)
    assert survey.temperature == 1.8
    return setup, network, plan.offset(estimated(plan, survey(network)))


@pytest.mark.parametrize("wanted", ["file", "estimated"])
def test_labels_of_a_run_that_adjusts_them_are_exported_adjusted(run, tmp_path, wanted):
    setup, network, offset = adjusting(run, tmp_path, wanted)
    export_labels(setup.plan.folder, str(tmp_path / "x.parquet"), "parquet", quiet, threads=1)
    table = Table(tmp_path / "x.parquet")
    labels, confidences = expected_labels(setup, network, Adjustment(offset))
    plain, _ = expected_labels(setup, network)
    assert np.mean([(one != other).mean() for one, other in zip(labels, plain, strict=True)]) > 0.05
    for image_id, label, confidence in zip(table.image_ids, labels, confidences, strict=True):
        np.testing.assert_array_equal(table.get(image_id).label, label)
        np.testing.assert_array_equal(table.get(image_id).confidence, confidence)


def test_soft_labels_are_adjusted_too(run, tmp_path):
    setup, network, offset = adjusting(run, tmp_path, "file")
    export_labels(setup.plan.folder, str(tmp_path / "out"), "proda-soft", quiet, threads=1)
    (view,), (width, height) = setup.preset.score_views, setup.preset.label_size
    image = network_input(torch.from_numpy(np.array(setup.target_reader.read(0, view)))[None])
    views = trunk_views(network.eval(), [image], mirror=setup.preset.score_mirrored)
    size = height // 4 + 1, width // 4 + 1
    expected = mean_probabilities(network, views, None, size, torch.from_numpy(offset))[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out" / "0.npy"), expected, rtol=1e-4)
    assert np.abs(expected - mean_probabilities(network, views, None, size)[0].numpy()).max() > 0.1


def test_labels_of_a_run_with_refined_classifiers_are_exported_as_they_are(run, tmp_path):
    setup, network = run
    write_config(replace(setup.options, adjust_prior="estimated", prior=PriorOptions(refine_steps=7)))
    export_labels(setup.plan.folder, str(tmp_path / "x.parquet"), "parquet", quiet, threads=1)
    table, (labels, _) = Table(tmp_path / "x.parquet"), expected_labels(setup, network)
    for image_id, label in zip(table.image_ids, labels, strict=True):
        np.testing.assert_array_equal(table.get(image_id).label, label)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "proda-soft"])
def test_what_was_exported_is_imported_again(run, tmp_path, layout):
    setup, network = run
    export_labels(setup.plan.folder, str(tmp_path / "out"), layout, quiet, threads=1)
    done = import_labels(own(setup), str(tmp_path / "out"), layout, str(tmp_path / "x.parquet"), quiet)
    table, (labels, _) = Table(tmp_path / "x.parquet"), expected_labels(setup, network)
    assert (done.images, done.skipped) == (8, [])
    height, width = labels[0].shape
    for image_id, label in zip(setup.domains.target.image_ids, labels, strict=True):
        found = np.asarray(Image.fromarray(table.get(image_id).label).resize((width, height), Image.Resampling.NEAREST))
        assert (found == label).mean() > 0.95  # sizes differ by no whole factor


def test_what_is_known_of_the_probabilities_stands_beside_eplcs_labels(run, tmp_path):
    """prob, min_prob, std and neg, from the full passes that the teachers' masks stand for."""
    setup, network = run
    export_labels(setup.plan.folder, str(tmp_path / "out"), "eplc", quiet, threads=1)
    ((_, plan),) = setup.labels.items()
    rule, image_id, image_path = plan.rule, setup.domains.target.image_ids[0], setup.domains.target.image_paths[0]
    images = [torch.from_numpy(np.array(setup.target_reader.read(0, size)))[None] for size in rule.sizes]
    views = trunk_views(network.eval(), [network_input(image) for image in images])
    generator = torch.Generator().manual_seed(label_seed(setup.options.seed, image_id, 3))
    channels = network.config.bottleneck_channels
    masks = draw_masks([generator], views=4, passes=rule.passes, channels=channels, rate=rule.dropout)
    size = rule.label_size[::-1]
    passes = torch.stack([mean_probabilities(network, views, only(masks, t), size)[0] for t in range(rule.passes)])
    winner = passes.mean(0).argmax(0, keepdim=True)[None].expand(rule.passes, 1, *size)
    of_winner = passes.gather(1, winner)[:, 0].numpy()
    with np.load(LAYOUTS["eplc"].path(tmp_path / "out", image_path, LAYOUTS["eplc"].probability)) as file:
        found = dict(file)

    def at_image_size(plane):
        return shrunk(plane, Image.open(image_path).size)

    assert set(found) == {"prob", "min_prob", "std", "neg"}
    np.testing.assert_allclose(found["prob"], at_image_size(of_winner.mean(0)), atol=0.6 / 255)
    np.testing.assert_allclose(found["min_prob"], at_image_size(passes.amin(0).amax(0).numpy()), atol=0.6 / 255)
    np.testing.assert_allclose(found["std"], at_image_size(of_winner.std(0)), atol=0.6 / 510)
    negative = negative_labels(network, views, masks, size)[0].numpy()
    bits = np.unpackbits(found["neg"], axis=0, bitorder="little")
    for train_id, plane in enumerate(negative):
        np.testing.assert_array_equal(bits[train_id], at_image_size(plane.astype(np.uint8)))


def test_one_pass_says_nothing_of_deviation(run, tmp_path):
    setup, _ = run
    write_config(replace(setup.options, eplc=replace(setup.options.eplc, passes=1)))
    export_labels(setup.plan.folder, str(tmp_path / "out"), "eplc", quiet, threads=1)
    with np.load(tmp_path / "out" / "photos" / "0.npz") as file:
        assert set(file) == {"prob"}


def only(masks, t):
    return [tuple(factors[t : t + 1] for factors in mask) for mask in masks]


def test_soft_labels_are_the_networks_own_probabilities(run, tmp_path):
    setup, network = run
    export_labels(setup.plan.folder, str(tmp_path / "out"), "proda-soft", quiet, threads=1)
    (view,), (width, height) = setup.preset.score_views, setup.preset.label_size
    image = network_input(torch.from_numpy(np.array(setup.target_reader.read(0, view)))[None])
    size = height // 4 + 1, width // 4 + 1
    views = trunk_views(network.eval(), [image], mirror=setup.preset.score_mirrored)
    expected = mean_probabilities(network, views, None, size)[0]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "0.npy"), expected.numpy(), rtol=1e-4)


def test_an_unreadable_image_gets_no_label_and_is_named(run, tmp_path):
    setup, _ = run
    broken = Path(setup.domains.target.image_paths[2])
    broken.write_bytes(b"no photo")
    done = export_labels(setup.plan.folder, str(tmp_path / "x.parquet"), "parquet", quiet, threads=1)
    assert done.images == 7
    assert done.skipped == [f"cannot read {broken}"]
    assert "photos/2.jpg" not in Table(tmp_path / "x.parquet")


def test_labels_that_are_missing_or_broken_are_left_out_and_named(run, tmp_path):
    setup, _ = run
    export_labels(setup.plan.folder, str(tmp_path / "out"), "mrnet", quiet, threads=1)
    (tmp_path / "out/photos/1.png").unlink()
    (tmp_path / "out/photos/2.png").write_bytes(b"no label")
    done = import_labels(own(setup), str(tmp_path / "out"), "mrnet", str(tmp_path / "x.parquet"), quiet)
    assert done.images == 6
    assert "photos/1.jpg has no label" in done.skipped[0]
    assert "photos/2.png" in done.skipped[1]


def test_a_train_folder_in_between_is_found(run, tmp_path):
    setup, _ = run
    export_labels(setup.plan.folder, str(tmp_path / "out" / "train"), "mrnet", quiet, threads=1)
    assert import_labels(own(setup), str(tmp_path / "out"), "mrnet", str(tmp_path / "x.parquet"), quiet).images == 8


def test_a_folder_of_something_else_says_what_it_looked_for(run, tmp_path):
    setup, _ = run
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", r"holds no label of target in the layout mrnet: .*0\.png"),
        ("no", "is no folder"),
    ):
        with pytest.raises(RunError, match=message):
            import_labels(own(setup), str(tmp_path / folder), "mrnet", str(tmp_path / "x.parquet"), quiet)
    (tmp_path / "empty" / "photos").mkdir()
    (tmp_path / "empty" / "photos" / "0.png").write_bytes(b"")
    with pytest.raises(RunError, match="none of the labels"):
        import_labels(own(setup), str(tmp_path / "empty"), "mrnet", str(tmp_path / "x.parquet"), quiet)
    assert not (tmp_path / "x.parquet").exists()


def test_images_of_one_name_do_not_fit_a_flat_layout(run, tmp_path):
    setup, _ = run
    photos = tmp_path / "own" / "target" / "photos"
    shutil.copytree(photos, photos / "again")
    toml = tmp_path / "own" / "target" / "target.toml"
    toml.write_text('images = "photos/**/*.jpg"\n')
    with pytest.raises(RunError, match="would have one label file in the layout fada; use parquet"):
        export_labels(setup.plan.folder, str(tmp_path / "out"), "fada", lambda *_: None, threads=1)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_pseudo_labels_and_a_full_disk_are_sentences(run, tmp_path, monkeypatch):
    setup, _ = run

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.pseudo_labels.layouts.pictures.save", full)
    with pytest.raises(RunError, match=r"the labels cannot be written to .*out: No space left"):
        export_labels(setup.plan.folder, str(tmp_path / "out"), "mrnet", quiet, threads=1)
    write_config(replace(setup.options, recipe="mrnet"))
    with pytest.raises(RunError, match=r"recipe mrnet of .* makes no pseudo labels"):
        export_labels(setup.plan.folder, str(tmp_path / "out"), "mrnet", quiet, threads=1)
