import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from models.networks.bisenet import BiSeNet, BiSeNetConfig
from models.networks.build import SMALL, Build
from models.networks.deeplab import DeepLab, DeepLabConfig
from models.networks.discriminators import (
    MultiScaleDiscriminator,
    PatchDiscriminator,
    PixelDiscriminator,
    SeparableDiscriminator,
)
from models.networks.fada import Fada, FadaConfig
from pipelines.export import export
from pipelines.options import AdaptOptions, write_config
from pipelines.recipes.proda import given_prototypes
from pipelines.results import write_json
from pipelines.setup import resolve
from pipelines.trained import describe, load_trained
from pipelines.weights import load_initial
from tests.models.conftest import GOLDEN
from tests.own_data import write_own_data
from tests.pipelines.test_trained import CPU, finished_run


def save(folder, step, network, objective=None):
    state = {"step": step, "teaching": {"network": network.state_dict()}, "objective": objective or {}}
    assert CheckpointStore(Path(folder) / "checkpoints").save(step, state) is None


@pytest.fixture
def proda(tiny_folder, tmp_path):
    """A run of ProDA that has prototypes, as it leaves its directory, and its network."""

    def made(**more):
        given = {"preset": "tiny", "recipe": "proda", "name": "run", "references": "never", **more}
        setup = resolve(AdaptOptions(runs=str(tmp_path / "runs"), data=str(tiny_folder / "data"), **given))
        write_config(setup.options)
        describe(setup)
        torch.manual_seed(0)
        network = setup.plan.network()
        network.prototypes.normal_()
        save(setup.plan.folder, 5, network)
        return setup, network

    return made


def test_a_flat_state_dict_and_its_options_are_written(tmp_path):
    setup, network = finished_run(tmp_path)
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.weights.name == "GTA5_3.pth"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"GTA5_3.pth", "opts.yaml"}
    state = torch.load(done.weights, weights_only=True)
    torch.testing.assert_close(state, dict(network.state_dict()))
    (options,) = done.beside
    assert options.read_text().splitlines() == [
        "model: DeepLab",
        "norm_style: gn",
        "use_se: true",
        "num_classes: 3",
    ]
    assert done.parameters == sum(p.numel() for p in network.parameters())


def test_discriminators_of_stage_one_are_written_beside_it_in_the_published_layout(tmp_path):
    setup, network = finished_run(tmp_path)
    critics = torch.nn.ModuleDict({head: MultiScaleDiscriminator(19) for head in ("aux", "main")})
    for objective in ({"discriminators": critics.state_dict()}, {"inner": {"discriminators": critics.state_dict()}}):
        save(setup.plan.folder, 4, network, objective)
        done = export(setup.plan.folder, str(tmp_path / "out"))
        assert [path.name for path in done.beside] == ["GTA5_4_D1.pth", "GTA5_4_D2.pth", "opts.yaml"]
        keys = json.loads((GOLDEN / "mrnet_keys.json").read_text())["ms_discriminator"]
        for path, head in zip(done.beside, ("aux", "main"), strict=False):
            written = torch.load(path, weights_only=True)
            assert {name: list(tensor.shape) for name, tensor in written.items()} == keys
            torch.testing.assert_close(written, dict(critics[head].state_dict()))


@pytest.mark.slow
def test_the_published_network_goes_round_at_full_size(tmp_path):
    """93,536,480 parameters; names and shapes are those of the published checkpoints."""
    setup, _ = finished_run(tmp_path)
    description = json.loads((Path(setup.plan.folder) / "network.json").read_text())
    torch.manual_seed(0)
    network = DeepLab(DeepLabConfig())
    published = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(published, tmp_path / "GTA5_25000.pth", _use_new_zipfile_serialization=False)
    other = DeepLab(DeepLabConfig())
    load_initial(str(tmp_path / "GTA5_25000.pth"), other)
    description["configs"] = [vars(DeepLabConfig())]
    (Path(setup.plan.folder) / "network.json").write_text(json.dumps(description))
    save(setup.plan.folder, 25_000, other)
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.parameters == 93_536_480
    written = torch.load(done.weights, weights_only=True)
    keys = json.loads((GOLDEN / "mrnet_keys.json").read_text())["mrnet_gn_se"]
    assert {name: list(tensor.shape) for name, tensor in written.items()} == keys
    for name, tensor in network.state_dict().items():
        assert torch.equal(written[name], tensor), name


def test_a_run_of_proda_is_written_in_its_container_with_the_prototypes_apart(proda, tmp_path):
    setup, network = proda()
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.weights.name == "from_synthia_to_cityscapes_on_deeplabv2_5_model.pkl"
    (apart,) = done.beside
    assert apart.name == "prototypes_on_cityscapes_from_deeplabv2"
    found = torch.load(done.weights, weights_only=True)
    assert (set(found), found["iter"], found["best_iou"]) == ({"ResNet101", "iter", "best_iou"}, 5, None)
    assert set(found["ResNet101"]) == {"model_state", "objective_vectors"}
    assert set(found["ResNet101"]["model_state"]) == set(network.state_dict()) - {"prototypes"}
    torch.testing.assert_close(found["ResNet101"]["objective_vectors"], network.prototypes)
    torch.testing.assert_close(given_prototypes(str(apart), network), network.prototypes)


@pytest.mark.parametrize(
    ("bench", "source", "target"), [("gta2city", "gta5", "cityscapes"), ("city2robot", "cityscapes", "robotcar")]
)
def test_files_of_proda_are_named_after_the_published_datasets(proda, tmp_path, bench, source, target):
    setup, _ = proda(benchmark=bench)
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.weights.name == f"from_{source}_to_{target}_on_deeplabv2_5_model.pkl"
    assert done.beside[0].name == f"prototypes_on_{target}_from_deeplabv2"


def test_files_of_proda_are_named_after_the_descriptions_of_ones_own_folders(proda, tmp_path):
    source, target = write_own_data(tmp_path / "own")
    setup, _ = proda(source=source, target=target)
    (tmp_path / "own").rename(tmp_path / "gone")
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.weights.name == "from_source_to_target_on_deeplabv2_5_model.pkl"


def test_a_warm_up_has_a_discriminator_and_no_prototypes_yet(proda, tmp_path):
    setup, network = proda()
    network.prototypes.zero_()
    critic = PatchDiscriminator(19, 4).state_dict()
    for step, objective in ((6, {"discriminator": critic}), (7, {"inner": {"discriminator": critic}})):
        save(setup.plan.folder, step, network, objective)
        done = export(setup.plan.folder, str(tmp_path / str(step)))
        assert done.beside == ()
        found = torch.load(done.weights, weights_only=True)
        torch.testing.assert_close(found["FCDiscriminator"], {"model_state": dict(critic)})
        assert not found["ResNet101"]["objective_vectors"].any()


@pytest.mark.parametrize(("steps", "best"), [(5, 0.305), (9, None)])
def test_the_score_of_the_last_step_goes_along_as_a_share(proda, tmp_path, steps, best):
    setup, _ = proda()
    write_json(Path(setup.plan.folder) / "results.json", {"steps": steps, "scores": {"adapted": {"miou": 30.5}}})
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert torch.load(done.weights, weights_only=True)["best_iou"] == best


@pytest.mark.parametrize("extra_norm", [False, True])
def test_what_was_exported_of_proda_is_a_start_again(proda, tmp_path, extra_norm):
    """With the extra norm that networks behind a SimCLR backbone have: for the stage after that one."""
    setup, network = proda()
    if extra_norm:
        torch.manual_seed(1)
        build = Build(replace(setup.preset.network, extra_norm=True))
        network = build()
        network.prototypes.normal_()
        describe(replace(setup, plan=replace(setup.plan, network=build)))
        save(setup.plan.folder, 6, network)
    done = export(setup.plan.folder, str(tmp_path / "out"))
    more = {"from_stage": 4, "proda": replace(setup.options.proda, extra_norm="on")} if extra_norm else {}
    again = resolve(replace(setup.options, init=str(done.weights), **more))
    found = again.plan.network()
    again.plan.initial(found)
    torch.testing.assert_close(dict(found.state_dict()), dict(network.state_dict()))
    torch.testing.assert_close(
        dict(load_trained(setup.plan.folder, CPU).network.state_dict()), dict(network.state_dict())
    )


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "extra_norm"), [("proda", False), ("proda_bn_clr", True)])
def test_the_file_of_proda_has_the_published_names_and_shapes_at_full_size(proda, tmp_path, layout, extra_norm):
    setup, _ = proda(benchmark="gta2city")
    config = DeepLabConfig(heads="proda", bottleneck_channels=256, pixels="rgb_unit", extra_norm=extra_norm)
    describe(replace(setup, plan=replace(setup.plan, network=Build(config))))
    save(setup.plan.folder, 6, Build(config)())
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.parameters == 65_063_568 + 4_096 * extra_norm
    state = torch.load(done.weights, weights_only=True, mmap=True)["ResNet101"]["model_state"]
    keys = json.loads((GOLDEN / "proda_keys.json").read_text())[layout]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == keys


@pytest.fixture
def bisenet(tmp_path):
    """A run of the published BiSeNet on a ResNet-18, with a checkpoint of two of its epochs, and its network."""
    setup, _ = finished_run(tmp_path)
    build = Build(BiSeNetConfig())
    describe(replace(setup, plan=replace(setup.plan, network=build)))
    torch.manual_seed(0)
    network = build()
    save(setup.plan.folder, 250, network)
    return setup, network


def test_a_run_of_bisenet_is_written_in_the_container_of_the_published_runs(bisenet, tmp_path):
    """All names begin as those of several devices do, and the context path is there twice (methods 8.5)."""
    setup, network = bisenet
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert (done.weights.name, done.beside) == ("bisenet_250.pth", ())
    found = torch.load(done.weights, weights_only=True)
    assert set(found) == {"model_state", "total_epoch_so_far"}
    assert found["total_epoch_so_far"] == 2
    shapes = {name.removeprefix("module."): list(tensor.shape) for name, tensor in found["model_state"].items()}
    assert all(name.startswith("module.") for name in found["model_state"])
    copies = {name: shape for name, shape in shapes.items() if name.startswith("context_path.features.")}
    keys = json.loads((GOLDEN / "bisenet_keys.json").read_text())["bisenet_resnet18"]
    assert {name: shape for name, shape in shapes.items() if name not in copies} == keys
    inner = {name: shape for name, shape in keys.items() if name.startswith("context_path.")}
    aliases = {name.replace("context_path.", "context_path.features.", 1): shape for name, shape in inner.items()}
    fc = {"context_path.features.fc.weight": [1000, 512], "context_path.features.fc.bias": [1000]}
    assert copies == aliases | fc
    other = BiSeNet(BiSeNetConfig())
    load_initial(str(done.weights), other)
    torch.testing.assert_close(dict(other.state_dict()), dict(network.state_dict()))


def test_the_discriminator_of_a_bisenet_goes_along(bisenet, tmp_path):
    setup, network = bisenet
    critic = SeparableDiscriminator(19).state_dict()
    save(setup.plan.folder, 251, network, {"inner": {"discriminator": critic}})
    found = torch.load(export(setup.plan.folder, str(tmp_path / "out")).weights, weights_only=True)
    assert set(found) == {"model_state", "model_d_state", "total_epoch_so_far"}
    keys = json.loads((GOLDEN / "bisenet_keys.json").read_text())["dsc"]
    assert {name: list(tensor.shape) for name, tensor in found["model_d_state"].items()} == {
        f"module.{name}": shape for name, shape in keys.items()
    }


def fada_run(tmp_path, config, step=6):
    """A run with a checkpoint of a network of FADA, and the network."""
    setup, _ = finished_run(tmp_path)
    build = Build(config)
    describe(replace(setup, plan=replace(setup.plan, network=build)))
    torch.manual_seed(0)
    network = build()
    save(setup.plan.folder, step, network)
    return setup, network


def without_prefix(state):
    assert all(name.startswith("module.") for name in state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["fada101", "fada101-modified", "fada-vgg16"])
@pytest.mark.parametrize("norms", ["frozen", "batch"])
def test_a_run_of_fada_is_written_in_its_container_and_is_a_start_again(tmp_path, name, norms):
    config = replace(SMALL[name], num_classes=3, norms=norms)
    setup, network = fada_run(tmp_path, config)
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert (done.weights.name, done.beside) == ("fada_6.pth", ())
    assert done.parameters == sum(p.numel() for p in network.parameters())
    found = torch.load(done.weights, weights_only=True)
    assert (set(found), found["iteration"]) == ({"iteration", "feature_extractor", "classifier"}, 6)
    for part in ("feature_extractor", "classifier"):
        torch.testing.assert_close(without_prefix(found[part]), dict(getattr(network, part).state_dict()))
    torch.manual_seed(1)
    other = Fada(config)
    load_initial(str(done.weights), other)
    torch.testing.assert_close(dict(other.state_dict()), dict(network.state_dict()))


def test_the_discriminator_of_a_run_of_fada_goes_along(tmp_path):
    setup, network = fada_run(tmp_path, FadaConfig.small(3))
    critic = PixelDiscriminator(3, network.config.feature_channels, width=4).state_dict()
    for step, objective in ((7, {"discriminator": critic}), (8, {"inner": {"discriminator": critic}})):
        save(setup.plan.folder, step, network, objective)
        found = torch.load(export(setup.plan.folder, str(tmp_path / "out")).weights, weights_only=True)
        torch.testing.assert_close(without_prefix(found["model_D"]), dict(critic))
        assert set(without_prefix(found["model_D"])) == set(
            json.loads((GOLDEN / "fada_keys.json").read_text())["fada_discriminator"]
        )


@pytest.mark.slow
def test_the_file_of_fada_has_the_published_names_and_shapes_at_full_size(tmp_path):
    setup, _ = fada_run(tmp_path, FadaConfig(norms="batch"))
    done = export(setup.plan.folder, str(tmp_path / "out"))
    assert done.parameters == 42_500_160 + 1_400_908
    found = torch.load(done.weights, weights_only=True, mmap=True)
    keys = json.loads((GOLDEN / "fada_keys.json").read_text())
    for part in ("feature_extractor", "classifier"):
        written = without_prefix(found[part])
        assert {name: list(tensor.shape) for name, tensor in written.items()} == keys[f"fada_{part}"]


def test_a_layout_of_another_system_is_refused_with_the_one_that_fits(proda, tmp_path):
    setup, _ = proda()
    with pytest.raises(RunError, match=r"heads of proda, which the layout mrnet cannot hold; .* --layout proda"):
        export(setup.plan.folder, str(tmp_path / "out"), "mrnet")
    other, _ = finished_run(tmp_path / "other")
    with pytest.raises(RunError, match=r"heads of mrnet, which the layout proda cannot hold; .* --layout mrnet"):
        export(other.plan.folder, str(tmp_path / "out"), "proda")
    for layout in ("bisenet", "fada"):
        with pytest.raises(RunError, match=rf"mrnet, which the layout {layout} cannot hold; .* --layout mrnet"):
            export(other.plan.folder, str(tmp_path / "out"), layout)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_and_a_full_disk_are_sentences(tmp_path, monkeypatch):
    setup, _ = finished_run(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"the weights cannot be written to .*out: .*No space left"):
        export(setup.plan.folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="is no run directory"):
        export(str(tmp_path), str(tmp_path / "out"))
