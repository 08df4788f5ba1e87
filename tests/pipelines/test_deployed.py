import importlib.util
import json
import shutil
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import run
from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from models.networks import deployed as deployed_network
from models.networks.bisenet import BiSeNetConfig
from models.networks.build import Build
from models.networks.fada import FadaConfig
from models.networks.segmenter import upsample
from pipelines import deployed
from pipelines.deployed import Agreement, card_of, compared, open_model, random_pictures, read_card
from pipelines.export import Exported, export
from pipelines.predict import ModelPredictor, Predictor
from pipelines.results import write_json
from pipelines.trained import describe, load_trained
from pipelines.views import network_input, normalised, rgb
from tests.pipelines.test_trained import CPU, finished_run

pytestmark = pytest.mark.slow
SIZE = (96, 64)
MADE = {
    "deeplab.onnx, any size": ("deeplab", "onnx", True),
    "bisenet.onnx": ("bisenet", "onnx", False),
    "deeplab.pt2": ("deeplab", "torch", False),
    "bisenet.pt2, any size": ("bisenet", "torch", True),
    "fada.onnx, any size": ("fada", "onnx", True),
    "vgg.pt2, any size": ("vgg", "torch", True),
}


@dataclass(frozen=True)
class Model:
    folder: str
    layout: str
    dynamic: bool
    done: Exported

    @property
    def path(self):
        return self.done.weights

    def opened(self):
        return open_model(self.path, self.layout, 1)

    def trained(self):
        return load_trained(self.folder, CPU)


TINY = {
    "bisenet": BiSeNetConfig(3, (1, 1, 1, 1), width=8, spatial_width=8),
    "fada": FadaConfig(3, layers=(1, 1, 1, 2), width=4, norms="frozen", dilations=(2, 20)),
    "vgg": FadaConfig(3, "vgg16", width=4, dilations=(2, 20), pixels="bgr_vgg"),
}


def finished(root, name):
    """A run of a tiny network, as it leaves its directory."""
    setup, _ = finished_run(root, name, step=3)
    build = Build(TINY[name])
    describe(replace(setup, plan=replace(setup.plan, network=build)))
    torch.manual_seed(0)
    state = {"step": 4, "teaching": {"network": build().state_dict()}}
    assert CheckpointStore(setup.options.folder() / "checkpoints").save(4, state) is None
    return setup.plan.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of every family."""
    root = tmp_path_factory.mktemp("runs")
    own = {name: finished(root, name) for name in TINY}
    return {"deeplab": finished_run(root, "deeplab")[0].plan.folder, **own}


@pytest.fixture(scope="module")
def models(runs, tmp_path_factory):
    """Every family in both formats, of one size and of any, each made once."""
    out = tmp_path_factory.mktemp("models")
    return {
        name: Model(runs[family], layout, dynamic, export(runs[family], str(out), layout, size=SIZE, dynamic=dynamic))
        for name, (family, layout, dynamic) in MADE.items()
    }


@pytest.fixture(params=MADE)
def model(request, models):
    return models[request.param]


@pytest.fixture
def copy(models, tmp_path):
    """A model and its card, to be damaged."""
    path = tmp_path / "copy.onnx"
    shutil.copy(models["bisenet.onnx"].path, path)
    shutil.copy(card_of(models["bisenet.onnx"].path), card_of(path))
    return path


def eager(network, images):
    """Class scores at the images' size as the rest of the house gets them."""
    with torch.no_grad():
        return upsample(network(normalised(images, network.config.pixels)).fused(), tuple(images.shape[-2:]))


def test_a_file_gives_the_class_scores_of_the_network(model):
    opened, trained = model.opened(), model.trained()
    shapes = [(1, 64, 96), *([(3, 64, 64), (2, 131, 77)] if model.dynamic else [])]
    for count, height, width in shapes:
        images = torch.rand(count, 3, height, width) * 255
        expected = eager(trained.network, images)
        found = torch.from_numpy(opened(images.numpy()))
        assert found.shape == expected.shape == (count, 3, height, width)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max() - expected.min()))


def test_it_is_named_after_run_and_step_and_says_how_near_it_is(model):
    done = model.done
    family, step = Path(model.folder).name, model.trained().step
    assert done.weights.name == f"{family}_{step}{ {'onnx': '.onnx', 'torch': '.pt2'}[model.layout] }"
    assert done.beside == (card_of(done.weights),)
    assert done.step == step
    assert done.agreement
    assert 0 <= done.agreement.share < 1e-5
    assert len(done.agreement.sizes) == 1 + model.dynamic
    assert done.agreement.sizes[0] == SIZE


def test_the_card_says_what_is_read_and_what_is_answered(model):
    plain = json.loads(card_of(model.path).read_text())
    trained = model.trained()
    batch, height, width = ("batch", "height", "width") if model.dynamic else (1, 64, 96)
    assert plain["model"] == model.path.name
    assert plain["input"]["shape"] == [batch, 3, height, width]
    assert (plain["input"]["colours"], plain["input"]["range"]) == ("RGB", [0, 255])
    assert plain["output"]["shape"] == [batch, 3, height, width]
    assert plain["size"] == ("dynamic" if model.dynamic else [96, 64])
    assert plain["classes"]["names"] == list(trained.description.classes.names)
    assert plain["checked"]["largest_difference"] == model.done.agreement.difference
    assert plain["versions"]["torch"] == torch.__version__
    assert ("onnxruntime" in plain["versions"]) == (model.layout == "onnx")
    assert plain["run_versions"] is None
    card = read_card(model.path)
    assert (card.classes, card.step, card.pixels) == (trained.description.classes, trained.step, 96 * 64)


def test_the_names_and_shapes_in_an_onnx_file_are_those_of_its_card(models):
    import onnx

    for model in models.values():
        if model.layout == "onnx":
            graph = onnx.load(model.path).graph
            plain = json.loads(card_of(model.path).read_text())
            for (value,), said in ((graph.input, plain["input"]), (graph.output, plain["output"])):
                assert value.name == said["name"]
                shape = [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
                assert shape == said["shape"]


def test_a_file_names_no_folder_of_the_machine(model):
    for path in (model.path, *model.done.beside):
        content = path.read_bytes()
        assert str(Path(run.__file__).parent).encode() not in content
        assert str(model.path.parent).encode() not in content


def test_a_vgg_reads_the_colours_of_its_caffe_conversion():
    """Blue, green, red, of 0 to 255, minus their means (methods 2.4)."""
    images = torch.tensor([[[[10, 20, 30]]]], dtype=torch.uint8)
    found = network_input(images, "bgr_vgg")
    assert found.flatten().tolist() == pytest.approx([30 - 103.939, 20 - 116.779, 10 - 123.68])
    assert rgb(found, "bgr_vgg").flatten().tolist() == pytest.approx([10, 20, 30])


@pytest.mark.parametrize("size", [(300, 200), (40, 90), (2, 1)])
def test_a_picture_is_predicted_as_the_network_itself_does(model, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 2 + 1, size[0] // 2 + 1, 3), np.uint8)
    image = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    width, height = SIZE
    if model.dynamic:
        factor = (96 * 64 / (size[0] * size[1])) ** 0.5
        width, height = max(64, round(size[0] * factor)), max(64, round(size[1] * factor))
    shown = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    scores = eager(model.trained().network, torch.tensor(shown).permute(2, 0, 1)[None].float())
    expected = F.interpolate(scores.softmax(1), (size[1], size[0]), mode="bilinear", align_corners=True)[0]
    found = ModelPredictor(model.path, 1)(image)
    assert found.mask.dtype == np.uint8
    assert found.uncertainty is None
    np.testing.assert_allclose(found.confidence, expected.max(0).values.numpy(), atol=1e-5)
    assert (found.mask != expected.argmax(0).numpy()).mean() < 0.001


def test_it_says_what_the_run_says_where_the_run_looks_once_and_at_that_size(models):
    model = models["bisenet.onnx"]
    trained = model.trained()
    once = replace(trained, description=replace(trained.description, views=(SIZE,), mirrored=False))
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    expected, found = Predictor(once, CPU)(image), ModelPredictor(model.path, 1)(image)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)


def test_the_command_writes_the_same_files_as_with_a_run(models, tmp_path, capsys):
    model = models["bisenet.pt2, any size"]
    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "x.png")
    for given in (["--model", str(model.path)], ["--run", model.folder]):
        assert run.main(["predict", str(tmp_path / "x.png"), *given, "--out", str(tmp_path / given[0])]) == 0
        assert "1 pictures predicted with step 4 of" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "--model").iterdir()} == {
        path.name for path in (tmp_path / "--run").iterdir()
    }


def test_the_command_exports_and_says_how_near_the_file_is(runs, tmp_path, capsys):
    folder = tmp_path / "runs/deeplab"
    shutil.copytree(runs["deeplab"], folder)
    write_json(folder / "results.json", {"versions": {"torch": "of then"}})
    given = ["export", str(folder), "--out", str(tmp_path / "out"), "--layout", "torch"]
    assert run.main(given) == 0
    said = capsys.readouterr().out
    assert "class scores differ by at most" in said
    assert "of the pixels change class" in said
    card = json.loads((tmp_path / "out/deeplab_3.pt2.json").read_text())
    assert card["size"] == [64, 48], "the size that the run is scored at"
    assert card["run_versions"] == {"torch": "of then"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"deeplab_3.pt2", "deeplab_3.pt2.json"}


def other_corners(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def other_colours(*args, bgr, **more):
    return deployed_network.Deployed(*args, bgr=not bgr, **more)


@pytest.mark.parametrize("mistake", ["corners", "colours"])
def test_a_file_that_computes_something_else_is_refused_and_not_kept(mistake, runs, tmp_path, monkeypatch):
    if mistake == "corners":
        monkeypatch.setattr(deployed_network, "upsample", other_corners)
    else:
        monkeypatch.setattr(deployed, "Deployed", other_colours)
    with pytest.raises(RunError, match=r"does not compute what the network does: .* so nothing was written"):
        export(runs["deeplab"], str(tmp_path / "out"), "torch", size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_do_not_agree(runs):
    network = load_trained(runs["deeplab"], CPU).network

    def broken(images):
        return np.full((len(images), 3, *images.shape[-2:]), np.nan, np.float32)

    assert not compared(broken, network, (SIZE,))
    assert not Agreement((SIZE,), 1.0, 0.01, 0.0)
    assert not Agreement((SIZE,), 1e-6, 1e-6, 0.5)


def test_where_the_network_itself_rounds_worse_a_file_may_too(runs):
    network = load_trained(runs["bisenet"], CPU).network
    images = random_pictures(1, SIZE)
    exact = eager(deepcopy(network).double(), images.double())
    own = float((eager(network, images) - exact).abs().max() / (exact.max() - exact.min()))
    assert compared(lambda values: eager(network, torch.from_numpy(values)).numpy(), network, (SIZE,)).rounding == 0

    def off(values):
        scores = eager(network, torch.from_numpy(values))
        return (scores + 0.01 * (scores.max() - scores.min())).numpy()

    found = compared(off, network, (SIZE,))
    assert not found
    assert found.changed == 0
    assert found.share == pytest.approx(0.01, rel=1e-3)
    assert found.rounding == pytest.approx(own, rel=1e-3)
    assert Agreement((SIZE,), 1.0, 0.001, 0.0, rounding=0.0005)
    assert not Agreement((SIZE,), 1.0, 0.001, 0.0, rounding=0.0001)


def test_the_pictures_of_the_comparison_are_the_same_every_time_and_show_patches():
    pictures = random_pictures(2, (70, 50))
    assert torch.equal(pictures, random_pictures(2, (70, 50)))
    assert torch.equal(pictures, pictures.round())
    assert 0 <= pictures.min() < 60
    assert 195 < pictures.max() <= 255
    beside = (pictures[..., 1:] - pictures[..., :-1]).abs().mean()
    assert beside < (pictures[..., 40:] - pictures[..., :-40]).abs().mean()


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2"])
def test_a_file_that_is_no_model_is_refused(name, copy, tmp_path):
    (tmp_path / name).write_bytes(b"no model")
    shutil.copy(card_of(copy), card_of(tmp_path / name))
    with pytest.raises(RunError, match=rf"{name} cannot be opened as a model"):
        ModelPredictor(tmp_path / name, 1)


def test_a_file_that_is_not_there_or_has_another_ending_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is no file; give the \.onnx or \.pt2 file"):
        ModelPredictor(tmp_path / "x.onnx", 1)
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(RunError, match=r"is no exported model, whose name ends in \.onnx or \.pt2"):
        ModelPredictor(tmp_path / "x.pth", 1)


def test_a_model_without_its_card_is_refused(copy):
    card_of(copy).unlink()
    with pytest.raises(RunError, match=r"copy\.onnx\.json is missing.* keep the two files"):
        ModelPredictor(copy, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 1},
        {"size": [96]},
        {"size": "large"},
        {"size": [0, 64]},
        {"pixels": None},
        {"size": "dynamic", "pixels": 0},
        {"step": "last"},
        None,
    ],
)
def test_a_damaged_card_is_refused(copy, change):
    card = card_of(copy)
    card.write_text("{" if change is None else json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(RunError, match=r"json cannot be read as what export writes"):
        ModelPredictor(copy, 1)


def test_the_card_of_another_model_is_refused(copy):
    card, image = card_of(copy), np.zeros((64, 96, 3), np.uint8)
    plain = json.loads(card.read_text())
    card.write_text(json.dumps(plain | {"size": [128, 64]}))
    with pytest.raises(RunError, match="cannot read an image of 128×64 pixels, which its card says it does"):
        ModelPredictor(copy, 1)(image)
    fewer = {**plain["classes"], "names": plain["classes"]["names"][:2], "palette": plain["classes"]["palette"][:2]}
    card.write_text(json.dumps(plain | {"classes": fewer}))
    with pytest.raises(RunError, match=r"answers \(1, 3, 64, 96\) where its card promises \(1, 2, 64, 96\)"):
        ModelPredictor(copy, 1)(image)


def test_without_the_packages_of_the_extra_it_says_what_to_install(copy, runs, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else found(name, *more)
    )
    sentence = r"ONNX needs onnxruntime, not installed here: pip install 'tutelage\[export\]'"
    with pytest.raises(RunError, match=sentence):
        ModelPredictor(copy, 1)
    with pytest.raises(RunError, match=sentence):
        export(runs["deeplab"], str(tmp_path / "out"), "onnx")
    assert not (tmp_path / "out").exists()
    export(runs["deeplab"], str(tmp_path / "out"), "torch")


def test_options_that_do_not_belong_together_are_refused(runs, tmp_path, capsys):
    refused = partial(export, runs["deeplab"], str(tmp_path / "out"))
    with pytest.raises(RunError, match="--size and --dynamic belong to --layout onnx and torch"):
        refused(size=SIZE)
    with pytest.raises(RunError, match="--size and --dynamic belong to --layout onnx and torch"):
        refused("mrnet", dynamic=True)
    with pytest.raises(RunError, match="--size 16 64 is too small"):
        refused("torch", size=(16, 64))
    assert not (tmp_path / "out").exists()
    for given, named in (
        (["--passes", "4"], "--passes"),
        (["--run", "r"], "--run"),
        (["--weights", "recommended"], "--weights"),
        (["--run", "r", "--passes", "2"], "--run and --passes"),
    ):
        assert run.main(["predict", "x.png", "--model", "x.onnx", *given]) == 2
        assert f"error: {named} cannot go with --model" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence_and_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deployed.torch.export, "save", full)
    with pytest.raises(RunError, match=r"the weights cannot be written to .*out: .*No space left"):
        export(runs["deeplab"], str(tmp_path / "out"), "torch")
    assert list(tmp_path.iterdir()) == []
