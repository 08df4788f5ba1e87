import os
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from fakes import SHAPE, FakeRule, NormedNetwork, TinyNetwork, label_plan

from actors import labeller as module
from actors.errors import UnreadableImage
from actors.evaluator import Evaluator
from actors.labeller import YIELDING, Labeller, Networks, label_seed, load_weights
from actors.prior_estimate import Adjustment, Evidence, Part, PriorPlan
from actors.records import decode
from actors.teacher import Teacher

CPU = torch.device("cpu")


def arrays(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


class Reader:
    def __init__(self, images=10, broken=()):
        self.image_ids = [f"city/{i}" for i in range(images)]
        self.broken = broken

    def __len__(self):
        return len(self.image_ids)

    def read(self, index, size):
        if index in self.broken:
            raise UnreadableImage(f"/data/{index}.png", "broken")
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3))
        return pixels.astype(np.uint8)


def labeller(version=5, seed=0, batch=4, **reader):
    made = Labeller(TinyNetwork, Reader(**reader), {1: label_plan()}, seed, torch.device("cpu"), batch)
    made.version = version
    return made


def rows(made, start, stop):
    table = made.label(1, 0, start, stop, step=9)[1]
    return {start + row: decode(table, row) for row in range(stop - start)}


def test_a_seed_is_a_function_of_run_image_and_version():
    seeds = {label_seed(*a) for a in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2)]}
    assert len(seeds) == 4
    assert label_seed(0, "a", 1) == label_seed(0, "a", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_labels_do_not_depend_on_the_chunk_the_batch_or_the_teacher():
    whole = rows(labeller(batch=4), 0, 10)
    for other in (rows(labeller(batch=1), 0, 10), {**rows(labeller(batch=3), 0, 3), **rows(labeller(batch=7), 3, 10)}):
        for index in range(10):
            np.testing.assert_array_equal(other[index]["label"], whole[index]["label"])
            np.testing.assert_array_equal(other[index]["confidence"], whole[index]["confidence"])


def test_another_version_or_seed_gives_other_labels():
    base = rows(labeller(), 0, 10)
    for other in (rows(labeller(version=6), 0, 10), rows(labeller(seed=1), 0, 10)):
        assert any((other[i]["label"] != base[i]["label"]).any() for i in range(10))


def test_the_header_sums_up_the_block():
    header, table = labeller().label(1, 3, 4, 10, step=9)
    assert (header.chunk, header.version, header.images, header.skipped) == (3, 5, 6, ())
    assert table.column("image_id").to_pylist() == [f"city/{i}" for i in range(4, 10)]
    np.testing.assert_array_equal(header.class_pixels, np.sum(table.column("class_pixels").to_pylist(), 0))
    expected = np.zeros((3, 256), np.int64)
    for row in range(6):
        record = decode(table, row)
        np.add.at(expected, (record["label"], record["confidence"]), 1)
    np.testing.assert_array_equal(header.histogram, expected)
    assert set(table.column("weights_version").to_pylist()) == {5}
    assert set(table.column("made_at_step").to_pylist()) == {9}


def test_memory_is_that_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000 + device.index)
    assert module.gpu_memory(torch.device("cpu")) == {}
    assert module.gpu_memory(torch.device("cuda:1")) == {"gpu_memory_bytes": 5_001}


def test_the_header_tells_the_gpu_memory_that_the_process_holds(monkeypatch):
    made = labeller()
    assert made.label(1, 0, 0, 2, step=9)[0].gpu_bytes == 0
    monkeypatch.setattr(module, "gpu_memory", lambda device: {"gpu_memory_bytes": 7 * (device == made.device)})
    assert made.label(1, 0, 0, 2, step=9)[0].gpu_bytes == 7


def test_an_unreadable_image_is_withheld_named_and_left_out_of_the_statistics():
    clean, broken = labeller(), labeller(broken=(2,))
    header, table = broken.label(1, 0, 0, 6, step=9)
    assert header.skipped == ("/data/2.png",)
    assert (decode(table, 2)["label"] == 255).all()
    assert table.column("class_pixels").to_pylist()[2] == [0, 0, 0]
    assert header.histogram.sum() == 5 * SHAPE[0] * SHAPE[1]
    for row in (0, 1, 3, 4, 5):
        np.testing.assert_array_equal(decode(table, row)["label"], rows(clean, 0, 6)[row]["label"])


def test_a_teacher_without_weights_does_not_label():
    with pytest.raises(RuntimeError, match="before it had weights"):
        labeller(version=None).label(1, 0, 0, 1, 0)


def test_loaded_weights_are_copies():
    network, other = TinyNetwork(), TinyNetwork()
    weights = {name: tensor.numpy().copy() for name, tensor in other.state_dict().items()}
    for array in weights.values():
        array.flags.writeable = False
    load_weights(network, weights)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor)
    with torch.no_grad():
        network.conv.weight.add_(1)
    torch.testing.assert_close(other.conv.weight, torch.from_numpy(weights["conv.weight"].copy()))


def test_a_new_version_replaces_the_weights():
    made, other = labeller(version=None), TinyNetwork()
    made.load(8, {name: tensor.numpy() for name, tensor in other.state_dict().items()})
    assert made.version == 8
    torch.testing.assert_close(made.network.conv.weight, other.conv.weight, check_stride=False)
    assert FakeRule().layout == made.plans[1].rule.layout


def test_the_networks_of_a_run_are_told_apart_by_their_weights():
    networks = Networks((TinyNetwork, lambda: TinyNetwork(channels=6), NormedNetwork), CPU)
    for given in (NormedNetwork(), TinyNetwork(channels=6), TinyNetwork(), NormedNetwork()):
        found = networks.load(arrays(given))
        assert type(found) is type(given)
        for name, tensor in given.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor)
        assert not any(module.training for module in found.modules())
        assert not any(parameter.requires_grad for parameter in found.parameters())


def test_a_network_is_built_once_and_not_before_it_is_needed():
    built = []

    def build(kind):
        built.append(kind)
        return kind()

    networks = Networks([lambda: build(TinyNetwork), lambda: build(NormedNetwork)], CPU)
    assert built == []
    first = networks.first
    assert networks.load(arrays(TinyNetwork())) is first
    assert built == [TinyNetwork]
    second = networks.load(arrays(NormedNetwork()))
    assert networks.load(arrays(TinyNetwork())) is first is networks.first
    assert networks.load(arrays(NormedNetwork())) is second
    assert built == [TinyNetwork, NormedNetwork]


def test_one_builder_is_a_run_with_one_network():
    networks = Networks(TinyNetwork, CPU)
    assert networks.load(arrays(TinyNetwork())) is networks.first


@pytest.mark.parametrize("other", [NormedNetwork(), TinyNetwork(channels=5)])
def test_weights_that_belong_to_no_network_are_refused_and_change_nothing(other):
    networks = Networks((TinyNetwork,), CPU)
    before = {name: tensor.clone() for name, tensor in networks.first.state_dict().items()}
    count = len(other.state_dict())
    with pytest.raises(ValueError, match=f"weights of {count} tensors belong to none of the run's networks"):
        networks.load(arrays(other))
    for name, tensor in before.items():
        assert torch.equal(networks.first.state_dict()[name], tensor)


def test_a_teacher_labels_with_the_network_that_its_newest_weights_belong_to():
    used = []

    class Rule(FakeRule):
        def label(self, network, views, seeds, adjustment=None):
            used.append((type(network), network.conv.weight.clone()))
            return super().label(network, views, seeds, adjustment)

    plan = replace(label_plan(), rule=Rule())
    made = Labeller((TinyNetwork, NormedNetwork), Reader(), {1: plan}, 0, CPU)
    given = [TinyNetwork(), NormedNetwork(), TinyNetwork()]
    for version, network in enumerate(given):
        made.load(version, arrays(network))
        made.label(1, 0, 0, 2, step=9)
    assert [kind for kind, _ in used] == [TinyNetwork, NormedNetwork, TinyNetwork]
    for (_, weight), network in zip(used, given, strict=True):
        torch.testing.assert_close(weight, network.conv.weight, check_stride=False)
    with pytest.raises(ValueError, match="none of the run's networks"):
        made.load(3, arrays(TinyNetwork(channels=5)))
    assert made.version == 2, "it goes on with what it has"


def hire_teacher():
    Teacher(TinyNetwork, Reader(), {1: label_plan()}, 0, board=None)


def hire_evaluator():
    Evaluator(None, lambda device: device, None, target=None, board=None, run_log=None, folder="nowhere")


@pytest.mark.parametrize("hire", [hire_teacher, hire_evaluator])
@pytest.mark.parametrize(
    ("cuda", "granted", "nice"),
    [(False, [], [YIELDING]), (True, [], [YIELDING]), (True, [0], [])],
    ids=["no GPU", "a GPU of others", "a GPU"],
)
def test_only_those_who_share_cores_with_a_student_yield_to_it(monkeypatch, hire, cuda, granted, nice):
    niced = []
    monkeypatch.setattr(os, "nice", niced.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: granted)
    module._yield_cores.cache_clear()
    monkeypatch.setattr(module, "Labeller", lambda *arguments: arguments)  # nothing moves to a GPU
    hire()
    assert niced == nice
    assert YIELDING > 0


class Witness(FakeRule):
    """Tells an image's seed of every image, where it is asked."""

    def label(self, network, views, seeds, adjustment=None):
        made = super().label(network, views, seeds)
        if adjustment is not None and adjustment.witness:
            for one, seed in zip(made, seeds, strict=True):
                told = np.full((1, 3), seed % 1000, np.float32)
                one.evidence = Evidence(told, np.full((1, 2, 3), seed % 251, np.uint8), told / 1000)
        return made


class Source:
    """Nine source images; remembers which were looked at."""

    def __init__(self):
        self.looks = []

    def __len__(self):
        return 9

    def look(self, network, indices, temperature):
        assert type(network) is TinyNetwork
        self.looks.append((list(indices), temperature))
        return len(indices) * np.eye(3)


PRIOR = PriorPlan((0.5, 0.3, 0.2))
WITNESS = Adjustment(np.array([0.5, 0.0, -0.5], np.float32), witness=True)


def witness(source=None, **reader):
    plan = replace(label_plan(), rule=Witness(), prior=PRIOR, source=source)
    made = Labeller(TinyNetwork, Reader(**reader), {1: plan}, 0, CPU, batch=4)
    made.version = 5
    return made


@pytest.mark.parametrize("adjustment", [None, replace(WITNESS, witness=False), WITNESS])
def test_what_images_tell_of_class_frequencies_stands_in_the_header_where_it_was_asked_for(adjustment):
    found = witness().label(1, 0, 1, 7, 9, adjustment)[0].evidence
    if adjustment is not WITNESS:
        assert found is None
        return
    seeds = [label_seed(0, f"city/{index}", 5) for index in range(1, 7)]
    assert found.log_means[:, 0].tolist() == [seed % 1000 for seed in seeds]
    assert found.posteriors[:, 0, 0].tolist() == [seed % 251 for seed in seeds]
    assert found.posteriors.shape == (6, 2, 3)
    assert found.means[:, 0].tolist() == pytest.approx([seed % 1000 / 1000 for seed in seeds])
    assert found.source is None


def test_images_that_cannot_be_read_tell_nothing():
    found = witness(broken=(2,)).label(1, 0, 1, 7, 9, WITNESS)[0].evidence
    whole = witness().label(1, 0, 1, 7, 9, WITNESS)[0].evidence
    np.testing.assert_array_equal(found.log_means, np.delete(whole.log_means, 1, axis=0))
    np.testing.assert_array_equal(found.posteriors, np.delete(whole.posteriors, 1, axis=0))
    assert witness(broken=(4, 5)).label(1, 0, 4, 6, 9, WITNESS)[0].evidence is None


def test_source_images_are_looked_at_beside_target_images_whoever_labels_them():
    source, seeds = Source(), [label_seed(0, f"city/{index}", 5) for index in range(10)]
    asked = replace(WITNESS, source_every=2, temperature=1.8)
    whole = witness(source).label(1, 0, 0, 10, 9, asked)[0].evidence.source
    looks = [(seed // 2) % 9 for seed in seeds if seed % 2 == 0]
    assert source.looks == [(looks, 1.8)]
    assert 0 < len(looks) < 10
    parts = [witness(source).label(1, 0, *part, 9, asked)[0].evidence.source for part in ((0, 3), (3, 10))]
    np.testing.assert_array_equal(whole, sum(parts))
    assert whole.trace() == 3 * len(looks)


def test_source_images_are_not_looked_at_where_nobody_asks():
    source = Source()
    for adjustment in (None, replace(WITNESS, witness=False)):
        witness(source).label(1, 0, 0, 10, 9, adjustment)
    assert source.looks == []
    assert witness(source).plans[1].for_bank().source is None, "the bank has no use for images"


@pytest.mark.parametrize("source", [None, Source()])
def test_a_teacher_sums_what_it_sees_for_an_estimate_that_moves(source):
    """It tells the bank one small array."""
    target = np.array([0.2, 0.3, 0.5])
    whole = witness(source).label(1, 0, 0, 10, 9, replace(WITNESS, source_every=2))[0].evidence
    summed = witness(source).label(1, 0, 0, 10, 9, replace(WITNESS, source_every=2, target=target))[0].evidence
    assert isinstance(whole, Evidence)
    assert isinstance(summed, Part)
    np.testing.assert_array_equal(summed.sums, PRIOR.part(whole, target).sums)
    assert summed.sums.shape == ((2, 3) if source is None else (5, 3))
    assert witness(source, broken=range(10)).label(1, 0, 0, 10, 9, replace(WITNESS, target=target))[0].evidence is None


def test_every_call_of_the_rule_hears_the_adjustment():
    heard = []

    class Rule(FakeRule):
        def label(self, network, views, seeds, adjustment=None):
            heard.append(adjustment)
            return super().label(network, views, seeds)

    made = Labeller(TinyNetwork, Reader(), {1: replace(label_plan(), rule=Rule())}, 0, CPU, batch=4)
    made.version = 5
    made.label(1, 0, 0, 6, 9)
    made.label(1, 0, 0, 6, 9, WITNESS)
    assert heard == [None, None, WITNESS, WITNESS]


def test_a_teacher_hands_the_adjustment_on(monkeypatch):
    monkeypatch.setattr(module, "_yield_cores", lambda: None)
    plan = replace(label_plan(), rule=Witness(), prior=PRIOR)
    teacher = Teacher(TinyNetwork, Reader(), {1: plan}, 0, board=None)
    teacher.labeller.version = 5
    assert teacher.label(1, 0, 0, 2, 5, 9)[0].evidence is None
    assert len(teacher.label(1, 0, 0, 2, 5, 9, WITNESS)[0].evidence.log_means) == 2
