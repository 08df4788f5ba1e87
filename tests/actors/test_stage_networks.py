"""Stages that train a network of their own, or keep the network of the stage before them."""

from functools import partial

import pytest
import torch
from fakes import (
    CLASSES,
    FakeLink,
    FakeStream,
    FakeView,
    NormedNetwork,
    PlainView,
    TinyNetwork,
    TinyObjective,
    label_plan,
    run_plan,
    stage,
)
from torch import nn

from actors.checkpoints import CheckpointStore
from actors.student import InBfloat16, Student

CPU = torch.device("cpu")


class KilledError(Exception):
    pass


class Watching(TinyObjective):
    """Notes what it was given, and learns from the network of the stage before where there is one."""

    def __init__(self, context, begun, seen=None, dies_at=None):
        super().__init__(context, seen)
        self.context, self.dies_at = context, dies_at
        self.start = copied(context.network)
        self.before = None if context.before is None else copied(context.before)
        self.weights = []
        begun.append(self)

    def losses(self, network, batch, info):
        if self.seen is not None and len(self.seen) == self.dies_at:
            raise KilledError
        self.weights.append(self.context.network.conv.weight.detach().clone())
        terms = super().losses(network, batch, info)
        if self.context.before is not None:
            terms["loss/before"] = (network(batch.target) - self.context.before(batch.target)).square().mean()
        return terms


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, msg=name)


def noisy(network):
    """What a file would bring, and numbers that are drawn."""
    nn.init.constant_(network.classifier.bias, 7.0)
    nn.init.normal_(network.classifier.weight, std=2.0)


def student(plan, link=None, rank=0):
    return Student(plan, link or FakeLink(views=dict.fromkeys(range(3), FakeView)), rank, 1, CPU)


BEFORE = {"labels": label_plan("once"), "labelled_by": "before", "keeps_before": True}


def watched(begun, seen=None, **more):
    return partial(Watching, begun=begun, seen=seen, **more)


def three_stages(folder, begun, seen=None, dies_at=None, **more):
    """An average; a network of its own, labelled by that average; and on from there."""
    objective = watched(begun, seen, dies_at=dies_at)
    first = stage(name="first", steps=3, objective=objective, ema_decay=0.9)
    own = {"network": NormedNetwork, "initial": noisy, "starts_from": "teacher", "ema_decay": 0.8}
    second = stage(name="second", steps=3, objective=objective, **own, **BEFORE)
    third = stage(name="third", steps=2, objective=objective, keeps_before=True, starts_from="teacher", ema_decay=0.8)
    return run_plan(folder, (first, second, third), **more)


# A network of its own.


def test_a_stages_own_network_is_trained_by_it_and_by_those_after_it(tmp_path):
    begun = []
    made = student(three_stages(tmp_path, begun))
    made.run()
    assert [type(one.context.network) for one in begun] == [TinyNetwork, NormedNetwork, NormedNetwork]
    assert [type(one.context.teaching) for one in begun] == [TinyNetwork, NormedNetwork, NormedNetwork]
    assert begun[2].context.network is begun[1].context.network is made.network
    assert (begun[1].start["conv.weight"] != begun[1].weights[-1]).any()


def test_it_begins_anew_whatever_was_trained_before(tmp_path):
    """Not even with ``starts_from="teacher"`` does anything of the stage before come along."""
    begun, link = [], FakeLink()
    stages = [
        stage(steps=3, objective=watched(begun), ema_decay=0.5),
        stage(name="own", steps=1, objective=watched(begun), network=TinyNetwork, starts_from="teacher"),
    ]
    student(run_plan(tmp_path, stages), link).run()
    for known in (begun[0].start, copied(begun[0].context.network), copied(begun[0].context.teaching)):
        assert (begun[1].start["conv.weight"] != known["conv.weight"]).all()
    assert not begun[1].start["norm.running_mean"].any()
    same(link.publisher.published[2][2], begun[1].start)


def test_it_is_filled_before_anybody_sees_it_and_published_so(tmp_path):
    begun, link = [], FakeLink()
    stages = [
        stage(steps=3, ema_decay=0.9, objective=watched(begun)),
        stage(name="own", steps=3, network=NormedNetwork, initial=noisy, ema_decay=0.9, objective=watched(begun)),
    ]
    student(run_plan(tmp_path, stages), link).run()
    assert (begun[1].start["classifier.bias"] == 7.0).all()
    version, pin, weights = link.publisher.published[2]
    assert (version, pin) == (3, True)
    same(weights, begun[1].start)


def test_it_is_the_same_in_every_rank_and_another_with_another_seed(tmp_path):
    starts = []
    for rank, seed in ((0, 3), (1, 3), (0, 4)):
        begun = []
        student(three_stages(tmp_path / f"{rank} {seed}", begun, seed=seed), rank=rank).run()
        starts.append(begun[1].start)
    same(starts[0], starts[1])
    for name in ("conv.weight", "classifier.weight"):
        assert (starts[0][name] != starts[2][name]).all()


def test_what_a_stage_before_drew_does_not_change_it(tmp_path):
    """Or a resumed run would begin its next stage with another network."""
    starts = []
    for dropout in (0.0, 0.5):
        begun = []
        stages = [
            stage(steps=2, dropout=dropout, objective=watched(begun)),
            stage(name="own", steps=1, network=NormedNetwork, initial=noisy, objective=watched(begun)),
        ]
        student(run_plan(tmp_path / str(dropout), stages)).run()
        starts.append(begun[1].start)
    same(*starts)


def test_its_dropout_is_the_stages(tmp_path):
    rates = []

    class Rates(TinyObjective):
        def losses(self, network, batch, info):
            rates.append(network.dropout.p)
            return super().losses(network, batch, info)

    stages = [
        stage(steps=1, dropout=0.9, objective=Rates),
        stage(name="own", steps=1, dropout=0.6, network=NormedNetwork, objective=Rates),
        stage(name="last", steps=1, objective=Rates),
    ]
    student(run_plan(tmp_path, stages)).run()
    assert rates == [0.9, 0.6, 0.3]


def test_a_first_stage_may_have_one_too_and_what_it_finds_is_the_runs(tmp_path):
    begun, link = [], FakeLink(views={0: FakeView})

    def fives(network):
        nn.init.constant_(network.classifier.bias, 5.0)

    only = stage(steps=2, network=NormedNetwork, initial=noisy, objective=watched(begun), **BEFORE)
    student(run_plan(tmp_path, [only], initial=fives), link).run()
    assert type(begun[0].context.before) is TinyNetwork
    assert (begun[0].before["classifier.bias"] == 5.0).all()
    assert (begun[0].start["classifier.bias"] == 7.0).all()
    version, pin, weights = link.publisher.published[0]
    assert (version, pin) == (0, True)
    same(weights, begun[0].before)


def test_a_plan_knows_the_network_of_every_stage(tmp_path):
    def other():
        return NormedNetwork()

    stages = [stage(name=str(n), network=built) for n, built in enumerate((None, NormedNetwork, None, other, None))]
    plan = run_plan(tmp_path, stages)
    built = [plan.network_of(n) for n in range(-1, 5)]
    assert built == [TinyNetwork, TinyNetwork, NormedNetwork, NormedNetwork, other, other]
    assert plan.networks == (TinyNetwork, NormedNetwork, other)
    assert run_plan(tmp_path, [stage()]).networks == (TinyNetwork,)


# The network of the stage before.


def averaged(weights, decay):
    """What a network that began with the first weights and followed the others is."""
    average = weights[0]
    for weight in weights[1:]:
        average = weight if decay is None else decay * average + (1 - decay) * weight
    return average


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("decay", [0.9, None])
def test_it_is_kept_as_it_was_when_that_stage_ended(tmp_path, decay, rank):
    """The stage ends between two publications."""
    begun, link = [], FakeLink(views={1: FakeView})
    stages = [
        stage(steps=3, ema_decay=decay, objective=watched(begun)),
        stage(name="next", steps=3, objective=watched(begun), **BEFORE),
    ]
    student(run_plan(tmp_path, stages), link, rank).run()
    expected = averaged([*begun[0].weights, begun[1].start["conv.weight"]], decay)
    torch.testing.assert_close(begun[1].before["conv.weight"], expected)
    same(begun[1].before, copied(begun[1].context.before))
    if rank == 0:
        pinned = [(version, weights) for version, pin, weights in link.publisher.published if pin]
        assert [version for version, _ in pinned] == [0, 3]
        same(pinned[1][1], begun[1].before)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("decay", [0.9, None])
def test_a_stage_that_starts_from_the_published_weights_starts_from_those_of_the_end(tmp_path, decay, rank):
    """Of every rank, whether it publishes or not."""
    begun = []
    stages = [
        stage(steps=3, ema_decay=decay, objective=watched(begun)),
        stage(name="next", steps=1, starts_from="teacher", objective=watched(begun)),
    ]
    made = student(run_plan(tmp_path, stages), rank=rank)
    ends, load = [], made.network.load_state_dict

    def loads(state):
        ends.append(made.network.conv.weight.detach().clone())
        return load(state)

    made.network.load_state_dict = loads
    made.run()
    torch.testing.assert_close(begun[1].start["conv.weight"], averaged([*begun[0].weights, ends[0]], decay))


@pytest.mark.parametrize("decay", [0.9, None])
def test_its_statistics_are_those_that_it_is_published_with(tmp_path, decay):
    """Of the target images, where that stage says so."""
    begun, plain = [], PlainView()
    stages = [
        stage(steps=3, ema_decay=decay, statistics="target", plain_view=plain, objective=watched(begun)),
        stage(name="next", steps=1, starts_from="teacher", objective=watched(begun), **BEFORE),
    ]
    student(run_plan(tmp_path, stages)).run()
    weight, bias = begun[1].before["conv.weight"], begun[1].before["conv.bias"]
    batches = FakeStream("target", labelled=False).batches(0, 3, 4, 0, 1)
    inputs = (plain(batch.images, (), None)[0] for batch in batches)
    means = [nn.functional.conv2d(x, weight, bias, padding=1).mean((0, 2, 3)) for x in inputs]
    for found in (begun[1].before, begun[1].start):
        torch.testing.assert_close(found["norm.running_mean"], torch.stack(means).mean(0))


def test_it_is_frozen_and_only_stages_that_keep_it_see_it(tmp_path):
    begun = []
    student(three_stages(tmp_path, begun)).run()
    assert begun[0].context.before is None
    for one in begun[1:]:
        assert not any(module.training for module in one.context.before.modules())
        assert not any(parameter.requires_grad for parameter in one.context.before.parameters())
        same(one.before, copied(one.context.before))
    assert [type(one.context.before) for one in begun[1:]] == [TinyNetwork, NormedNetwork]


def test_it_labels_and_the_stages_own_follows_between_two_publications(tmp_path):
    begun, link = [], FakeLink(views={1: FakeView})
    student(three_stages(tmp_path, begun), link).run()
    published = [(version, pin, "extra.weight" in weights) for version, pin, weights in link.publisher.published]
    assert published == [
        (0, True, False),
        (2, False, False),
        (3, True, False),
        (4, False, True),
        (6, True, True),
        (8, False, True),
    ]


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_goes_on_with_it_as_if_nothing_had_happened(tmp_path, monkeypatch, stop):
    monkeypatch.setattr("actors.student.STOP_CHECK_SECONDS", 0.0)
    whole, parts, begun, links = [], [], [], [FakeLink(views={1: FakeView}) for _ in range(3)]
    links[1].stop_after = lambda: len(parts) >= stop
    reference = student(three_stages(tmp_path / "whole", [], whole), links[0])
    reference.run()
    assert student(three_stages(tmp_path / "parts", [], parts), links[1]).run()["step"] == stop
    torch.manual_seed(99)
    again = student(three_stages(tmp_path / "parts", begun, parts), links[2])
    assert again.run()["step"] == 8
    assert [terms for terms, *_ in parts] == [terms for terms, *_ in whole]
    same(copied(reference.network), copied(again.network))
    expected = {version: weights for version, _, weights in links[0].publisher.published}
    for version, _, weights in links[2].publisher.published:
        if version in expected:
            same(expected[version], weights)
    assert [version for version, pin, _ in links[2].publisher.published if pin] == ([3, 6] if stop < 7 else [])
    assert next(version for version, pin, _ in links[2].publisher.published if not pin) == stop
    assert [one.context.fresh for one in begun] == [False] + [True] * (len(begun) - 1)


@pytest.mark.parametrize(("dies_at", "kept"), [(3, TinyNetwork), (6, NormedNetwork)])
def test_a_run_that_was_killed_at_a_stages_first_step_hangs_out_again_what_hung_there(tmp_path, dies_at, kept):
    seen, begun, link = [], [], FakeLink(views={1: FakeView})
    killed = student(three_stages(tmp_path, begun, seen, dies_at), link)
    with pytest.raises(KilledError):
        killed.run()
    killed.store.wait()
    saved = CheckpointStore(tmp_path / "checkpoints").newest()
    assert saved["step"] == dies_at
    same(saved["before"], begun[-1].before)
    again, later = FakeLink(views={1: FakeView}), []
    student(three_stages(tmp_path, later), again).run()
    version, pin, weights = again.publisher.published[0]
    assert (version, pin) == (dies_at, True)
    same(weights, link.publisher.published[-1][2])
    assert [item[0] for item in again.publisher.published].count(dies_at) == 1
    same(later[0].before, begun[-1].before)
    same(later[0].start, begun[-1].start)
    assert type(later[0].context.before) is kept


def test_a_stage_without_it_saves_none(tmp_path):
    student(run_plan(tmp_path, [stage(steps=2)])).run()
    assert "before" not in CheckpointStore(tmp_path / "checkpoints").newest()


def test_a_stage_that_does_not_keep_it_cannot_be_labelled_by_it():
    with pytest.raises(ValueError, match=r"stage first is labelled by the network before it, so it must keep that"):
        stage(labels=label_plan("once"), labelled_by="before")


@pytest.mark.parametrize("labels", [None, label_plan("continuous")])
def test_a_network_that_does_not_change_labels_once(labels):
    with pytest.raises(ValueError, match="stage first is labelled by a network that does not change: once"):
        stage(labels=labels, labelled_by="before", keeps_before=True)
    assert stage(labels=label_plan("once"), labelled_by="before", keeps_before=True).labelled_by == "before"


# What an objective may know.


def test_an_objective_knows_the_student_it_works_for(tmp_path):
    begun = []
    made = student(run_plan(tmp_path, [stage(steps=1, ema_decay=0.9, objective=watched(begun))]), rank=1)
    made.run()
    context = begun[0].context
    assert (context.rank, context.world, context.fresh) == (1, 1, True)
    assert context.network is made.network
    assert (context.teaching.conv.weight != made.network.conv.weight).all(), "the average, and not the student"
    assert context.as_student(context.teaching) is context.teaching


def test_a_network_computes_in_the_students_precision_when_asked(tmp_path):
    begun = []
    student(run_plan(tmp_path, [stage(steps=1, objective=watched(begun))], precision="bfloat16")).run()
    wrapped = begun[0].context.as_student(begun[0].context.teaching)
    assert isinstance(wrapped, InBfloat16)
    exact, found = (n(torch.rand(1, 3, 8, 8)).dtype for n in (begun[0].context.teaching, wrapped))
    assert exact == found == torch.float32


def test_one_student_gathers_what_it_gives(tmp_path):
    begun = []
    student(run_plan(tmp_path, [stage(steps=1, objective=watched(begun))])).run()
    given = torch.rand(2, CLASSES)
    assert torch.equal(begun[0].context.gather(given), given)


def test_several_students_gather_one_behind_the_other(tmp_path, monkeypatch):
    def all_gather(parts, value):
        assert value.is_contiguous()
        for rank, part in enumerate(parts):
            part.copy_(value + 10 * rank)

    monkeypatch.setattr("actors.student.dist.all_gather", all_gather)
    one = Student(run_plan(tmp_path, [stage()]), FakeLink(), 0, 2, CPU)
    given = torch.arange(6).view(2, 3).t()
    assert torch.equal(one._gather(given), torch.cat([given, given + 10]))


# Batch norms that do not learn.


def test_frozen_norms_normalise_by_the_statistics_that_they_have_and_leave_them(tmp_path):
    found = []

    class Norms(TinyObjective):
        def losses(self, network, batch, info):
            found.append((network.norm.training, network.norm.running_mean.clone()))
            images, norm = batch.source, network.norm
            inside = network.conv(images).double()
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            expected = (inside - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
            if not norm.training:
                torch.testing.assert_close(norm(network.conv(images)).double(), expected, atol=1e-5, rtol=1e-4)
            assert network.training
            assert network.dropout.training
            return super().losses(network, batch, info)

    def statistics(network):
        nn.init.normal_(network.norm.running_mean)
        nn.init.uniform_(network.norm.running_var, 0.5, 2.0)

    stages = [
        stage(steps=2, frozen_norms=True, objective=Norms),
        stage(name="next", steps=2, objective=Norms),
    ]
    made = student(run_plan(tmp_path, stages, initial=statistics))
    before = copied(made.network)
    made.run()
    assert [training for training, _ in found] == [False, False, True, True]
    means = [mean for _, mean in found]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2]), "the stage left them as they were"
    assert (means[3] != means[2]).all()
    assert made.network.norm.num_batches_tracked == 4, "two passes a step"
    assert (made.network.conv.weight != before["conv.weight"]).any()


def test_frozen_norms_are_frozen_in_chunks_too(tmp_path):
    made = student(run_plan(tmp_path, [stage(steps=2, frozen_norms=True, norm_images=1)]))
    made.run()
    assert not made.network.norm.running_mean.any()
    assert made.network.norm.num_batches_tracked == 0
