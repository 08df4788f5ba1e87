import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from models.networks.build import Build
from models.networks.layouts import with_published_copies
from pipelines import rescore as rescoring
from pipelines.datasets import Split
from pipelines.datasets.classes import ClassSet
from pipelines.datasets.miniature.write import write_miniature
from pipelines.options import AdaptOptions, read_config, write_config
from pipelines.recipes.proda import ProdaOptions
from pipelines.rescore import PerImage, label_lines, rescore, score_file
from pipelines.results import read_confusion, score_lines, write_json
from pipelines.setup import resolve
from pipelines.trained import describe
from pipelines.views import input_of

CPU = torch.device("cpu")


@pytest.fixture
def options(tiny_folder, tmp_path):
    data = str(tiny_folder / "data")
    return AdaptOptions(preset="tiny", name="run", runs=str(tmp_path), data=data, references="never")


def save(options, network):
    state = {"step": 7, "teaching": {"network": network.state_dict()}}
    assert CheckpointStore(options.folder() / "checkpoints").save(7, state) is None


def test_a_run_without_a_checkpoint_says_how_to_go_on(options):
    with pytest.raises(RunError, match=r"has no checkpoint yet; .*--resume"):
        rescore(options)


def test_a_checkpoint_of_another_network_is_refused(options):
    save(options, torch.nn.Linear(2, 2))
    with pytest.raises(RunError, match="of another network than the one described"):
        rescore(options)


def test_classes_in_another_order_than_those_trained_on_are_refused(options):
    setup = resolve(options)
    describe(setup)
    save(options, setup.plan.network())
    path = options.folder() / "network.json"
    plain = json.loads(path.read_text())
    plain["classes"]["names"][:2] = reversed(plain["classes"]["names"][:2])
    path.write_text(json.dumps(plain))
    with pytest.raises(
        RunError, match=r"was trained on the classes sidewalk, road, .* but its data now have road, side"
    ):
        rescore(options)


@pytest.fixture
def snapshot(options, tmp_path):
    """A whole network as MRNet trained it on two devices, and the network."""
    torch.manual_seed(0)
    network = resolve(options).plan.network()
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "GTA5_7.pth")
    return str(tmp_path / "GTA5_7.pth"), network


def test_a_published_snapshot_is_scored_as_the_same_weights_of_a_run_are(options, snapshot, tmp_path):
    path, network = snapshot
    data = {"preset": "tiny", "data": options.data}
    found = score_file(path, data, str(tmp_path / "out"))
    describe(resolve(options))
    save(options, network)
    expected = rescore(options)
    assert found["scores"]["adapted"] == expected["scores"]["adapted"]
    assert {item.name for item in (tmp_path / "out").iterdir()} == {"per_image.csv", "confusion.csv", "worst"}
    (first, *_) = score_lines(found)
    assert first.endswith("(GTA5_7.pth, 128×64, label size 128×64)")


@pytest.mark.parametrize("line", ["norm_style: bn", "use_se: False", "norm_style: 'instance'"])
def test_a_snapshot_of_another_norm_is_refused_though_its_names_fit(options, snapshot, tmp_path, line):
    path, _ = snapshot
    (tmp_path / "opts.yaml").write_text("model: DeepLab\nnorm_style: gn\nuse_se: true\n" + line + "\n")
    with pytest.raises(RunError, match=rf"opts.yaml says {line.partition(':')[0]}: .* do not belong together"):
        score_file(path, {"preset": "tiny", "data": options.data}, str(tmp_path / "out"))


def test_a_backbone_alone_and_another_network_are_no_scores(options, snapshot, tmp_path):
    path, network = snapshot
    backbone = {name: t for name, t in network.state_dict().items() if not name.startswith(("layer5", "layer6"))}
    torch.save(backbone, path)
    with pytest.raises(RunError, match="is a backbone alone, which cannot be scored"):
        score_file(path, {"preset": "tiny", "data": options.data}, str(tmp_path / "out"))
    torch.save({**network.state_dict(), "layer7.weight": torch.zeros(1)}, path)
    with pytest.raises(RunError, match=r"GTA5_7\.pth: the checkpoint belongs to another network: 1 unexpected"):
        score_file(path, {"preset": "tiny", "data": options.data}, str(tmp_path / "out"))


def published(options, folder, *, extra_norm=False, prototypes=True):
    """A file of ProDA for these options, its network, and the setup."""
    setup = resolve(replace(options, recipe="proda"))
    build = Build(replace(setup.preset.network, extra_norm=extra_norm))
    setup = replace(setup, plan=replace(setup.plan, network=build))
    torch.manual_seed(0)
    state = dict((network := build()).state_dict())
    vectors = state.pop("prototypes")
    inner = {"model_state": state, **({"objective_vectors": vectors} if prototypes else {})}
    torch.save({"ResNet101": inner, "iter": 7, "best_iou": None}, folder / "best_model.pkl")
    return str(folder / "best_model.pkl"), network, setup


@pytest.mark.parametrize("classes", [None, 16, 13])
@pytest.mark.parametrize("extra_norm", [False, True])
def test_a_file_of_proda_is_scored_as_its_run_is_whatever_it_was_asked_for(options, tmp_path, classes, extra_norm):
    """One head and the number of its outputs are seen in the file; images are RGB in [0, 1], whole, in one view."""
    options = replace(options, classes=classes)
    path, network, setup = published(options, tmp_path, extra_norm=extra_norm, prototypes=not extra_norm)
    found = score_file(path, {"preset": "tiny", "data": options.data}, str(tmp_path / "out"))
    assert setup.preset.network.pixels == "rgb_unit"
    expected = setup.make_scorer()(CPU).score({name: t.numpy() for name, t in network.state_dict().items()})
    del expected["confusion"]
    assert found["scores"]["adapted"] == expected
    assert found["class_names"] == list(setup.benchmark.classes.names)
    assert found["protocol"]["outputs"] == (classes or 19)
    assert found["protocol"]["views"] == [[128, 64, False]]
    assert found["protocol"]["network"] == "best_model.pkl"


def test_a_file_of_mrnet_with_fewer_outputs_is_scored_with_them(options, tmp_path):
    network = resolve(replace(options, classes=16)).plan.network()
    torch.save(network.state_dict(), tmp_path / "GTA5_7.pth")
    found = score_file(str(tmp_path / "GTA5_7.pth"), {"preset": "tiny", "data": options.data}, str(tmp_path / "out"))
    assert (found["protocol"]["classes"], found["protocol"]["outputs"]) == (16, 16)


def test_a_number_of_outputs_that_the_benchmark_does_not_have_is_refused(options, tmp_path):
    path, _, _ = published(replace(options, benchmark="city2robot"), tmp_path)
    with pytest.raises(
        RunError, match=r"a classifier of 9 outputs, and synthia2city has 19 or 16 or 13 classes; give the --benchmark"
    ):
        score_file(path, {"preset": "tiny", "data": options.data}, str(tmp_path / "out"))
    data = {"benchmark": "city2robot", "preset": "tiny", "data": options.data}
    assert score_file(path, data, str(tmp_path / "out"))["protocol"]["classes"] == 9


def bisenet(options, pixels="rgb_imagenet"):
    """A network of BiSeNet's recipe that says several classes, and its setup; statistics are of no matter."""
    setup = resolve(replace(options, recipe="meta_pseudo_labels"))
    torch.manual_seed(1)
    network = Build(replace(setup.preset.network, pixels=pixels))()
    torch.nn.init.normal_(network.conv.bias)
    return network, setup


def as_published(network):
    """The container of an adversarial run, on several devices."""
    state = with_published_copies(network.state_dict())
    torch.nn.init.normal_(state["context_path.features.fc.weight"])
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    return {"model_state": parallel, "model_d_state": {}, "optimizer_state": {}, "total_epoch_so_far": 50}


def seen_as(setup, network, pixels):
    """What a network that reads such pixels scores, without what is of no class."""
    other = Build(replace(network.config, pixels=pixels))()
    other.load_state_dict(network.state_dict())
    scorer = replace(setup, plan=replace(setup.plan, network=Build(other.config))).make_scorer()(CPU)
    found = scorer.score({name: tensor.numpy() for name, tensor in other.state_dict().items()})
    found.pop("confusion")
    return found


def scored(path, options, tmp_path, **more):
    return score_file(str(path), {"preset": "tiny", "data": options.data}, str(tmp_path / "out"), **more)


def test_a_published_bisenet_reads_published_pixels_and_is_scored_as_its_system_scores(options, tmp_path):
    network, setup = bisenet(options)
    torch.save(as_published(network), tmp_path / "dsc_best_model_.pth")
    found = scored(tmp_path / "dsc_best_model_.pth", options, tmp_path)
    assert found["scores"]["adapted"] == seen_as(setup, network, "bgr_city")
    assert found["protocol"]["views"] == [[*setup.preset.score_views[0], False]]
    assert found["protocol"]["pixels"] == "bgr_city"
    assert "the network read bgr_city pixels; --pixels changes that" in label_lines(found)
    other = scored(tmp_path / "dsc_best_model_.pth", options, tmp_path, pixels="rgb_imagenet")
    assert other["scores"]["adapted"] == seen_as(setup, network, "rgb_imagenet") != found["scores"]["adapted"]


def test_an_export_of_ours_in_that_layout_and_a_file_of_tensors_read_what_a_run_reads(options, tmp_path):
    network, setup = bisenet(options)
    expected = seen_as(setup, network, "rgb_imagenet")
    for name, state in (("a.pth", with_published_copies(network.state_dict())), ("b.pth", network.state_dict())):
        torch.save(state, tmp_path / name)
        assert scored(tmp_path / name, options, tmp_path)["scores"]["adapted"] == expected


@pytest.mark.parametrize("norms", ["frozen", "batch"])
@pytest.mark.parametrize("aspp", ["original", "modified"])
def test_a_file_of_fada_is_scored_as_its_run_is_whatever_its_norms_and_classifier(options, tmp_path, norms, aspp):
    """Its parts lie apart, and their names begin as those of several devices do."""
    setup = resolve(replace(options, recipe="label_shift"))
    build = Build(replace(setup.preset.network, norms=norms, aspp=aspp))
    setup = replace(setup, plan=replace(setup.plan, network=build))
    torch.manual_seed(0)
    network = build()
    torch.nn.init.normal_(next(reversed(network.classifier_parameters())))
    parts = {
        part: {f"module.{name}": tensor for name, tensor in getattr(network, part).state_dict().items()}
        for part in ("feature_extractor", "classifier")
    }
    torch.save({"iteration": 40_000, **parts, "optimizer_fea": {}}, tmp_path / "g2c_adv.pth")
    found = scored(tmp_path / "g2c_adv.pth", options, tmp_path)
    expected = setup.make_scorer()(CPU).score({name: t.numpy() for name, t in network.state_dict().items()})
    del expected["confusion"]
    assert found["scores"]["adapted"] == expected
    assert found["protocol"]["pixels"] == "rgb_imagenet"
    assert found["protocol"]["outputs"] == 19


def test_a_file_in_stages_of_a_run_reads_what_the_run_says(options, tmp_path):
    options = replace(options, recipe="meta_pseudo_labels", faithful=True)
    network, setup = bisenet(options, "bgr_city")
    assert setup.preset.network.pixels == "bgr_city"
    describe(setup)
    (options.folder() / "stages").mkdir()
    path = options.folder() / "stages" / "step_00000007-adversarial.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    found = scored(path, options, tmp_path)
    assert found["protocol"]["pixels"] == "bgr_city"
    assert found["scores"]["adapted"] == seen_as(setup, network, "bgr_city")


def test_pixels_that_do_not_exist_are_refused(options, tmp_path):
    network, _ = bisenet(options)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        RunError, match="--pixels is bgr; choose one of bgr_mean, rgb_unit, rgb_imagenet, bgr_vgg, bgr_c"
    ):
        scored(tmp_path / "a.pth", options, tmp_path, pixels="bgr")


def test_labels_are_scored_at_the_systems_size_and_as_they_are(options, tmp_path, monkeypatch):
    """BiSeNet's protocol (methods 2.3), and beside it that of the others, against NumPy and Pillow."""
    network, setup = bisenet(options)
    size = (64, 32)
    torch.save(as_published(network), tmp_path / "a.pth")

    def smaller(*given, **more):
        found = resolve(*given, **more)
        return replace(found, preset=replace(found.preset, score_labels=size, score_views=(size,)))

    monkeypatch.setattr(rescoring, "resolve", smaller)
    found = scored(tmp_path / "a.pth", options, tmp_path)
    own = found["also"][0]
    assert len(found["also"]) == 1
    assert own["label_size"] == [128, 64]
    reads = Build(replace(network.config, pixels="bgr_city"))().eval()
    reads.load_state_dict(network.state_dict())
    split = setup.domains.validation
    predictions, labels = [], []
    for index in range(len(split)):
        with torch.no_grad():
            x = input_of(torch.from_numpy(np.array(split.image(index, size)))[None], reads)
            predictions.append(reads(x).fused()[0].argmax(0).numpy())
        labels.append(np.asarray(Image.fromarray(split.label(index)).resize(size, Image.Resampling.NEAREST)))
    p, y = np.stack(predictions), np.stack(labels)
    assert len(np.unique(p)) > 2
    both = np.array([((p == c) & (y == c)).sum() for c in range(19)])
    either = np.array([(((p == c) | (y == c)) & (y != 255)).sum() for c in range(19)])
    score, sixteen = found["scores"]["adapted"], list(setup.benchmark.protocols["16"])
    assert score["images"] == own["images"] == len(split)
    assert score["accuracy"] == pytest.approx(100 * (p == y).sum() / (y != 255).sum())
    assert score["accuracy_ignored_wrong"] == pytest.approx(
        100 * np.mean([(a == b).mean() for a, b in zip(p, y, strict=True)])
    )
    assert score["absent_as_zero"]["16"] == pytest.approx(100 * np.mean((both / (either + 1e-5))[sixteen]))
    present = [c for c in sixteen if either[c]]
    assert score["protocols"]["16"] == pytest.approx(100 * np.mean(both[present] / either[present]))
    assert own["accuracy"] != score["accuracy"]
    first, second, *_ = label_lines(found)
    assert second.startswith(f"labels 128×64, {len(split)} images: mIoU16 {own['protocols']['16']:.1f} (")
    assert first.endswith(
        f"pixel accuracy {score['accuracy']:.1f} ({score['accuracy_ignored_wrong']:.1f} with ignored pixels as errors)"
    )


def test_a_run_that_ended_with_a_network_of_a_stages_own_is_scored(options, tmp_path):
    """Behind a SimCLR backbone ProDA's networks have another norm than those of the stages before."""
    backbone = resolve(replace(options, recipe="proda")).plan.network().state_dict()
    torch.save({name: tensor for name, tensor in backbone.items() if "layer5" not in name}, tmp_path / "simclr.pth")
    options = replace(options, recipe="proda", proda=ProdaOptions(simclr=str(tmp_path / "simclr.pth")))
    setup = resolve(options)
    describe(setup)
    last = setup.plan.networks[-1]()
    assert last.state_dict().keys() != setup.plan.network().state_dict().keys()
    save(options, last)
    assert rescore(options)["scores"]["adapted"]["images"] == len(setup.domains.validation)


def test_the_newest_checkpoint_is_scored_and_other_rows_are_those_of_the_run(options):
    setup = resolve(options)
    torch.manual_seed(0)
    network = setup.plan.network()
    save(options, network)
    known = {"miou": 12.0, "per_class": [12.0] * 19, "protocols": {"16": 12.0}}
    write_json(options.folder() / "results.json", {"scores": {"source_only": known, "adapted": known}})
    found = rescore(replace(options))
    scorer = setup.make_scorer()(torch.device("cpu"))
    expected = scorer.score({name: tensor.numpy() for name, tensor in network.state_dict().items()})
    confusion = expected.pop("confusion")
    assert found["scores"]["adapted"] == expected
    assert read_confusion(options.folder() / "evaluation" / "confusion.csv").tolist() == confusion
    assert found["scores"]["source_only"] == known
    assert found["scores"]["oracle"] is None
    assert found["step"] == 7


def test_every_class_in_every_image_is_written_and_adds_up_to_the_score(options):
    setup = resolve(options)
    torch.manual_seed(0)
    save(options, setup.plan.network())
    found = rescore(options)
    with open(options.folder() / "evaluation" / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = setup.benchmark.classes.names
    assert {row["image"] for row in rows} == set(setup.domains.validation.image_ids)
    for index, name in enumerate(names):
        mine = [row for row in rows if row["class"] == name]
        shared, wanted, given = (
            sum(int(row[column]) for row in mine) for column in ("shared_pixels", "label_pixels", "predicted_pixels")
        )
        score = found["scores"]["adapted"]["per_class"][index]
        if score is None:
            assert not mine
        else:
            assert score == pytest.approx(100 * shared / (wanted + given - shared), abs=1e-3)


def test_the_worst_images_are_shown_worst_first():
    classes = ClassSet("two", ("a", "b"), ((0, 0, 0), (255, 0, 0)))
    split = Split("x", tuple(f"f/{i}" for i in range(12)), ("",) * 12)
    images = PerImage(split, classes)
    label = torch.zeros(1, 10, dtype=torch.uint8)
    for index in range(12):
        prediction = torch.zeros(1, 10, dtype=torch.int64)
        prediction[0, : (index * 5) % 12] = 1
        images.see(index, prediction, label)
    images.see(0, torch.zeros(1, 10, dtype=torch.int64), torch.full((1, 10), 255, dtype=torch.uint8))
    worst = [-index for _, index, _ in sorted(images.worst, reverse=True)]
    ious = [max(0, 10 - (index * 5) % 12) / 10 for index in worst]
    assert len(worst) == 10
    assert ious == sorted(ious)
    assert min(10 - (index * 5) % 12 for index in set(range(12)) - set(worst)) >= 9


def test_ten_overlays_are_written_and_those_of_before_are_gone(options):
    setup = resolve(options)
    save(options, setup.plan.network())
    old = options.folder() / "evaluation" / "worst" / "99-old.jpg"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    rescore(options)
    names = sorted(path.name for path in old.parent.iterdir())
    assert len(names) == min(10, len(setup.domains.validation))
    assert names[0].startswith("01-")
    assert not old.exists()


def test_a_run_in_a_store_on_data_in_a_store_is_scored_like_one_in_folders(options, tiny_folder, tmp_path, store):
    root = write_miniature("synthia2city", "tiny", tiny_folder)
    store.upload_folder(root, "data")
    near = replace(options, data_root=str(root))
    far = replace(options, data_root=store.uri("bucket/data"), runs=store.uri("bucket/runs"), data=str(tmp_path / "d"))
    found = []
    for given in (near, far):
        torch.manual_seed(1)
        setup = resolve(given)
        write_config(setup.options)
        describe(setup)
        save(given, setup.plan.network())
        found.append(rescore(read_config(str(given.folder()))))
    assert found[0] == found[1]
    for name in ("per_image.csv", "confusion.csv"):
        written = (far.folder() / "evaluation" / name).read_bytes()
        assert written == (near.folder() / "evaluation" / name).read_bytes()
    pictures = [name for name in store.files() if name.startswith("runs/run/evaluation/worst/")]
    assert len(pictures) == len(list((near.folder() / "evaluation" / "worst").iterdir())) > 0
