import copy
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fakes import (
    CLASSES,
    SHAPE,
    FakeLink,
    FakeStream,
    FakeView,
    PlainView,
    TinyNetwork,
    TinyObjective,
    label_plan,
    rate,
    run_plan,
    sgd,
    stage,
)
from test_label_view import Bank, view_of
from torch import nn

from actors.checkpoints import CheckpointStore
from actors.errors import RunError
from actors.student import InBfloat16, InChunks, Student
from models.networks.deeplab import DeepLab, DeepLabConfig

CPU = torch.device("cpu")


def student(plan, link=None, rank=0, world=1):
    return Student(plan, link or FakeLink(), rank, world, CPU)


def losses(seen):
    return [terms for terms, *_ in seen]


def two_stages(seen, folder, **more):
    first = stage(seen, "first", steps=5, ema_decay=0.9, statistics="target")
    second = stage(
        seen,
        "second",
        steps=4,
        labels=label_plan(),
        ema_decay=0.5,
        starts_from="teacher",
        dropout=0.1,
        statistics="target",
    )
    return run_plan(folder, (first, second), **more)


def stop_when(seen, steps):
    return lambda: len(seen) >= steps


def link_for(stop_after=None):
    return FakeLink(stop_after, views={1: FakeView})


def always_look(monkeypatch):
    monkeypatch.setattr("actors.student.STOP_CHECK_SECONDS", 0.0)


def test_the_terms_are_summed_and_every_group_gets_its_own_rate(tmp_path):
    """Two steps of SGD with momentum, by hand."""
    seen = []
    plan = run_plan(tmp_path, [stage(seen, steps=2, target=False)])
    made = student(plan)
    torch.manual_seed(plan.seed)
    reference = TinyNetwork()
    optimiser = torch.optim.SGD(
        [
            {"params": list(reference.conv.parameters())},
            {"params": [*reference.norm.parameters(), *reference.classifier.parameters()]},
        ],
        lr=1.0,
        momentum=0.9,
    )
    made.run()
    for step, (_, info, batch, _) in enumerate(seen):
        torch.manual_seed(info.seed)
        reference.train()
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(reference(batch.source), batch.source_label).backward()
        optimiser.param_groups[0]["lr"] = rate(step)
        optimiser.param_groups[1]["lr"] = 10 * rate(step)
        optimiser.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(made.network.state_dict()[name], tensor)


def test_several_terms_are_minimised_as_their_sum(tmp_path):
    class Terms:
        def losses(self, network, batch, info):
            weight = network.conv.weight
            return {"loss/a": weight.sum(), "loss/b": 2 * weight.sum(), "loss/c": -0.5 * weight.sum()}

        def learn(self, info):
            return {}

        def state_dict(self):
            return {}

    made = student(run_plan(tmp_path, [stage(steps=1, target=False, objective=lambda context: Terms())]))
    before = made.network.conv.weight.detach().clone()
    made.run()
    torch.testing.assert_close(made.network.conv.weight.detach(), before - rate(0) * 2.5)


def test_every_step_sees_the_next_samples(tmp_path):
    seen = []
    student(run_plan(tmp_path, [stage(seen, steps=3), stage(seen, "next", steps=2)])).run()
    stream = FakeStream("source", labelled=True)
    expected = torch.cat([b.images for b in stream.batches(0, 5, 4, 0, 1)]).permute(0, 3, 1, 2) / 255 - 0.5
    torch.testing.assert_close(torch.cat([batch.source for _, _, batch, _ in seen]), expected)
    assert [info.stage_step for _, info, *_ in seen] == [0, 1, 2, 0, 1]
    assert len({info.seed for _, info, *_ in seen}) == 5


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_stopped_and_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, stop):
    always_look(monkeypatch)
    whole, parts = [], []
    reference = student(two_stages(whole, tmp_path / "whole"), link_for())
    reference.run()
    first = student(two_stages(parts, tmp_path / "parts"), link_for(stop_when(parts, stop))).run()
    assert (first["stopped"], first["step"]) == (True, stop)
    assert len(parts) == stop
    torch.manual_seed(99)
    second = student(two_stages(parts, tmp_path / "parts"), link_for())
    assert second.run()["step"] == 9
    assert losses(parts) == losses(whole)
    for name, tensor in reference.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[name], tensor, rtol=0, atol=0)
    taught = [
        CheckpointStore(tmp_path / name / "checkpoints").newest()["teaching"]["network"] for name in ("whole", "parts")
    ]
    for name, tensor in taught[0].items():
        torch.testing.assert_close(taught[1][name], tensor, rtol=0, atol=0)


def test_a_killed_run_resumes_from_its_newest_checkpoint(tmp_path):
    whole, parts = [], []
    student(two_stages(whole, tmp_path / "whole", checkpoint_every=2), link_for()).run()

    class KilledError(Exception):
        pass

    class Dying(TinyObjective):
        def losses(self, network, batch, info):
            if len(parts) == 8:
                raise KilledError
            return super().losses(network, batch, info)

    plan = two_stages(parts, tmp_path / "parts", checkpoint_every=2)
    for item in plan.stages:
        object.__setattr__(item, "objective", partial(Dying, seen=parts))
    killed = student(plan, link_for())
    with pytest.raises(KilledError):
        killed.run()
    killed.store.wait()
    store = CheckpointStore(tmp_path / "parts" / "checkpoints")
    step = store.steps()[-1]
    assert step == 8
    again = []
    student(two_stages(again, tmp_path / "parts"), link_for()).run()
    assert losses(again) == losses(whole)[step:]


def test_a_finished_run_does_nothing_more(tmp_path):
    seen = []
    student(two_stages(seen, tmp_path), link_for()).run()
    count, link = len(seen), link_for()
    assert student(two_stages(seen, tmp_path), link).run()["step"] == 9
    assert len(seen) == count
    assert link.publisher.published == []


def test_the_tally_goes_on_after_a_resume(tmp_path, monkeypatch):
    always_look(monkeypatch)
    seen = []
    student(two_stages(seen, tmp_path), link_for(stop_when(seen, 7))).run()
    made = student(two_stages(seen, tmp_path), link_for())
    summary = made.run()
    assert made.tally.samples == 9 * 2 * 4
    assert summary["labels_read"] == 4 * 4


def test_a_stage_without_a_dropout_rate_has_the_networks_own(tmp_path, monkeypatch):
    """Whatever ran before it: a resumed run knows only its own stage."""
    always_look(monkeypatch)
    rates = []

    class Watching(TinyObjective):
        def losses(self, network, batch, info):
            rates.append(network.dropout.p)
            return super().losses(network, batch, info)

    stages = [stage(name=n, steps=2, dropout=d, objective=Watching) for n, d in (("one", 0.9), ("two", None))]
    student(run_plan(tmp_path, stages)).run()
    assert rates == [0.9, 0.9, 0.3, 0.3]


def test_modules_of_a_later_stages_objective_start_equal_on_every_rank(tmp_path):
    """Only their gradients are averaged, so students that start apart stay apart."""
    begun = []
    for rank in (0, 1):
        seen = []
        stages = [stage(seen, steps=2), stage(seen, "next", steps=1)]
        student(run_plan(tmp_path / str(rank), stages), rank=rank).run()
        begun.append(seen[-1][3].first)
    for mine, theirs in zip(*begun, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_later_stage_can_start_from_the_published_weights(tmp_path):
    starts = {}

    class Watching(TinyObjective):
        def losses(self, network, batch, info):
            starts.setdefault(len(starts), network.conv.weight.detach().clone())
            return super().losses(network, batch, info)

    first = stage(name="one", steps=3, ema_decay=0.9)
    second = stage(name="two", steps=1, starts_from="teacher", objective=Watching)
    link = FakeLink()
    student(run_plan(tmp_path, [first, second]), link).run()
    published = next(weights for version, _, weights in link.publisher.published if version == 3)
    torch.testing.assert_close(starts[0], published["conv.weight"])


def test_weights_are_published_at_the_start_in_between_and_at_the_end(tmp_path):
    link = FakeLink()
    plan = run_plan(tmp_path, [stage(steps=5), stage(name="next", steps=2)], publish_every=2)
    student(plan, link).run()
    assert [(version, pin) for version, pin, *_ in link.publisher.published] == [
        (0, True),
        (2, False),
        (4, False),
        (5, True),
        (6, False),
        (7, False),
    ]


class Dark:
    """An augmentation that nobody could overlook."""

    def __call__(self, images, labels, positions):
        return -10 - images.permute(0, 3, 1, 2).float() / 255, tuple(labels)


def test_target_statistics_are_those_of_images_as_a_teacher_sees_them(tmp_path):
    """A teacher labels whole images without augmentation."""
    link, plain = FakeLink(), PlainView()
    streams = {"target": FakeStream("target", labelled=False, view=Dark())}
    plan = run_plan(tmp_path, [stage(steps=2, streams=streams, statistics="target", plain_view=plain)])
    made = student(plan, link)
    made.run()
    batches = streams["target"].batches(0, 2, 4, 0, 1)
    maps = [made.network.conv(plain(batch.images, (), None)[0]).mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(link.publisher.published[-1][2]["norm.running_mean"], torch.stack(maps).mean(0))


def test_an_average_goes_on_over_stages(tmp_path):
    link = FakeLink()
    stages = [stage(steps=3, ema_decay=0.9), stage(name="next", steps=1, ema_decay=0.9)]
    made = student(run_plan(tmp_path, stages), link)
    first = made.network.conv.weight.detach().clone()
    made.run()
    published = {version: weights["conv.weight"] for version, _, weights in link.publisher.published}
    expected = 0.9 * published[3] + 0.1 * made.network.conv.weight.detach()
    torch.testing.assert_close(published[4], expected)
    assert (published[3] - first).norm() < (made.network.conv.weight - first).norm()


def test_a_student_tells_where_it_stands_before_it_publishes(tmp_path, monkeypatch):
    always_look(monkeypatch)
    seen = []
    student(two_stages(seen, tmp_path), link_for(stop_when(seen, 3))).run()
    link = link_for()
    student(two_stages(seen, tmp_path), link).run()
    assert link.publisher.rewound == [3]
    assert link.publisher.published[0][:2] == (3, False)


def test_a_run_may_begin_with_given_weights_and_a_resumed_one_does_not_begin_again(tmp_path, monkeypatch):
    always_look(monkeypatch)
    filled = []

    def fill(network):
        filled.append(network)
        nn.init.constant_(network.classifier.bias, 7.0)

    seen, link = [], FakeLink()
    plan = run_plan(tmp_path, [stage(seen, steps=4)], checkpoint_every=2, initial=fill)
    made = student(plan, link)
    made.run()
    assert len(filled) == 1
    assert (link.publisher.published[0][-1]["classifier.bias"] == 7.0).all()
    student(plan).run()
    assert len(filled) == 1


def test_only_the_first_rank_writes_and_publishes(tmp_path):
    link = FakeLink()
    link.publisher = None
    student(run_plan(tmp_path, [stage(steps=2)]), link, rank=1).run()
    assert link.lines == []
    assert not (tmp_path / "checkpoints").exists()


def test_the_bank_is_asked_for_the_samples_of_the_coming_batches(tmp_path):
    views = []

    def view(*arguments):
        views.append(FakeView(*arguments))
        return views[-1]

    stages = [stage(steps=3), stage(name="next", steps=2, labels=label_plan())]
    student(run_plan(tmp_path, stages), FakeLink(views={1: view})).run()
    assert views[0].polls == [(step, list(range(4 * step, 4 * step + 8 * 4))) for step in (3, 4)]


def test_pseudo_labels_reach_the_objective_with_their_weights(tmp_path):
    seen = []
    student(run_plan(tmp_path, [stage(seen, steps=1, labels=label_plan())]), FakeLink(views={0: FakeView})).run()
    batch = seen[0][2]
    expected = np.stack([FakeView(0, 0).get(i, 0)[0] for i in range(4)])
    np.testing.assert_array_equal(batch.pseudo_label.numpy(), expected)
    assert batch.pseudo_label.dtype == torch.int64
    assert batch.pseudo_weight.tolist() == [0.5] * 4


def test_a_labelled_target_stream_is_its_own_label(tmp_path):
    seen = []
    streams = {"target": FakeStream("oracle", labelled=True)}
    student(run_plan(tmp_path, [stage(seen, steps=1, streams=streams)])).run()
    batch = seen[0][2]
    assert batch.source is None
    assert batch.pseudo_weight.tolist() == [1.0] * 4
    assert set(batch.pseudo_label.unique().tolist()) <= set(range(CLASSES))


class Mirror:
    """A view that moves everything it is given."""

    def __call__(self, images, labels, positions):
        seen = images.permute(0, 3, 1, 2).float() / 255 - 0.5
        return seen.flip(-1), tuple(label.flip(-1) for label in labels)


def test_an_extra_column_takes_part_in_the_views_geometry(tmp_path):
    class WithExtra(FakeView):
        def column(self, name, index, step):
            return np.stack([self.get(index, step)[0]] * 3) + np.arange(3, dtype=np.uint8)[:, None, None]

    seen = []
    plan = replace(label_plan(), extra_column="confidence")
    streams = {"target": FakeStream("target", labelled=False, view=Mirror())}
    student(
        run_plan(tmp_path, [stage(seen, steps=1, streams=streams, labels=plan)]), FakeLink(views={0: WithExtra})
    ).run()
    batch = seen[0][2]
    assert batch.extra.dtype == torch.uint8
    for plane in range(3):
        assert torch.equal(batch.extra[:, plane].long(), batch.pseudo_label + plane)


def test_an_objective_sees_the_images_whole_and_knows_the_positions_of_every_stream(tmp_path):
    seen = []
    streams = {name: FakeStream(name, labelled=name != "target") for name in ("source", "target", "labelled")}
    streams["target"].view = Mirror()
    student(run_plan(tmp_path, [stage(seen, steps=1), stage(seen, "next", steps=2, streams=streams)])).run()
    batch, (raw,) = seen[2][2], streams["target"].batches(8, 1, 4, 0, 1)
    assert torch.equal(batch.whole, raw.images)
    torch.testing.assert_close(batch.target.flip(-1), raw.images.permute(0, 3, 1, 2) / 255 - 0.5)
    assert {name: positions.tolist() for name, positions in batch.positions.items()} == {
        name: [8, 9, 10, 11] for name in streams
    }


def test_every_rank_knows_the_positions_of_its_own_samples(tmp_path):
    made = Student(run_plan(tmp_path, [stage(steps=2)]), FakeLink(), 1, 2, CPU)
    streams = made._open_streams(0, 0)
    assert [next(streams["target"]).positions.tolist() for _ in range(2)] == [[2, 3], [6, 7]]


def test_without_target_images_there_is_nothing_whole(tmp_path):
    seen = []
    student(run_plan(tmp_path, [stage(seen, steps=1, target=False)])).run()
    batch = seen[0][2]
    assert batch.whole is None
    assert batch.records == {}
    assert list(batch.positions) == ["source"]


def test_raw_columns_reach_the_objective_as_they_were_recorded(tmp_path):
    """Whatever the view does to the image, and zeros where there is no record."""
    seen, bank = [], Bank()
    bank.make(0, 3, value=1, deliver=True, confidence=77)
    bank.stage = 0
    view = view_of(bank)
    view.stage = 0

    class Noting:
        def losses(self, network, batch, info):
            seen.append(batch)
            return {"loss/any": network(batch.target).square().mean()}

        def learn(self, info):
            return {}

        def state_dict(self):
            return {}

    streams = {"target": FakeStream("target", labelled=False, images=4, view=Mirror())}
    plan = replace(label_plan(), raw_columns=("confidence", "label"))
    stages = [stage(steps=4, streams=streams, labels=plan, objective=lambda context: Noting())]
    student(run_plan(tmp_path, stages), FakeLink(views={0: lambda *_: view})).run()
    assert list(seen[0].records) == ["confidence", "label"]
    for records, written in ((seen[0].records, 0), (seen[-1].records, 2)):
        for name, value in (("confidence", 77), ("label", 1)):
            expected = torch.zeros(4, *SHAPE, dtype=torch.uint8)
            expected[:written] = value
            assert records[name].dtype == torch.uint8
            assert torch.equal(records[name], expected)
    assert seen[-1].pseudo_weight.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_stage_without_raw_columns_reads_none(tmp_path):
    seen = []
    student(run_plan(tmp_path, [stage(seen, steps=1, labels=label_plan())]), FakeLink(views={0: FakeView})).run()
    assert seen[0][2].records == {}


def test_labelled_target_images_reach_the_objective_beside_the_others(tmp_path):
    seen, streams = [], {name: FakeStream(name, labelled=name != "target") for name in ("source", "target", "labelled")}
    tally = student(run_plan(tmp_path, [stage(seen, steps=2, streams=streams)])).run()
    batch = seen[1][2]
    (raw,) = streams["labelled"].batches(4, 1, 4, 0, 1)
    expected, (label,) = streams["labelled"].view(raw.images, (raw.labels,), raw.positions)
    torch.testing.assert_close(batch.labelled, expected)
    assert batch.labelled_label.tolist() == label.tolist()
    assert batch.labelled_label.dtype == torch.int64
    assert tally["images_per_s"] > 0


def test_one_broken_image_among_a_few_labelled_ones_does_not_end_the_run(tmp_path):
    streams = {
        "source": FakeStream("source", labelled=True, images=500),
        "labelled": FakeStream("labelled", labelled=True, images=3, broken={1: ("/data/bad.png",)}),
    }
    assert student(run_plan(tmp_path, [stage(steps=3, streams=streams)])).run()["skipped"] == ["/data/bad.png"]


def test_a_batch_that_the_students_cannot_share_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"stage first has batches of 4, which 3 students .* divides 4"):
        student(run_plan(tmp_path, [stage()]), world=3)


def test_unreadable_images_are_named_once_and_counted(tmp_path):
    streams = {"source": FakeStream("source", labelled=True, broken={1: ("/data/bad.png",), 9: ("/data/bad.png",)})}
    link = FakeLink()
    summary = student(run_plan(tmp_path, [stage(steps=3, streams=streams)]), link).run()
    assert summary["skipped"] == ["/data/bad.png"]
    assert link.said == ["skipped an unreadable image: /data/bad.png"]


def test_more_than_one_percent_of_unreadable_images_ends_the_run(tmp_path):
    broken = {position: (f"/data/{position}.png",) for position in range(0, 12, 2)}
    streams = {"source": FakeStream("source", labelled=True, images=500, broken=broken)}
    with pytest.raises(RunError, match=r"6 of 500 images cannot be read, more than 1%: /data/0\.png, /data/2\.png"):
        student(run_plan(tmp_path, [stage(steps=3, streams=streams)])).run()


def test_exactly_one_percent_is_still_borne(tmp_path):
    broken = {position: (f"/data/{position}.png",) for position in range(5)}
    streams = {"source": FakeStream("source", labelled=True, images=500, broken=broken)}
    assert len(student(run_plan(tmp_path, [stage(steps=3, streams=streams)])).run()["skipped"]) == 5


class Breaking(TinyObjective):
    """Its loss is no number at some steps."""

    def __init__(self, context, at):
        super().__init__(context)
        self.at = at

    def losses(self, network, batch, info):
        self.scale = float("nan") if info.stage_step in self.at else 1.0
        return super().losses(network, batch, info)


@pytest.mark.parametrize(("broken", "noticed", "back"), [(0, 1, 0), (1, 2, 0), (2, 4, 0), (5, 6, 4), (9, 10, 8)])
def test_a_loss_that_is_no_number_sends_the_student_back_to_its_last_good_weights(tmp_path, broken, noticed, back):
    """At the next line of metrics: only there the loss is looked at."""
    link = FakeLink()
    objective = partial(Breaking, at={broken})
    made = student(run_plan(tmp_path, [stage(steps=12, objective=objective)], checkpoint_every=4), link)
    assert made.run()["step"] == 12
    (said,) = (text for text in link.said if "no finite number" in text)
    assert f"at step {noticed} " in said
    assert f"go back to their weights of step {back} " in said
    assert all(tensor.isfinite().all() for tensor in made.network.state_dict().values())
    assert all(w.isfinite().all() for *_, weights in link.publisher.published for w in weights.values())
    assert {numbers["recoveries"] for kind, step, numbers in link.lines if kind == "train" and step > noticed} == {1}
    assert CheckpointStore(tmp_path / "checkpoints").newest()["step"] == 12


class SteepAtZero(TinyObjective):
    """At one step its loss is finite and its gradient is not: the weights break after the loss was looked at."""

    def __init__(self, context, at):
        super().__init__(context)
        self.at = at

    def losses(self, network, batch, info):
        terms = super().losses(network, batch, info)
        if info.stage_step == self.at:
            terms["loss/steep"] = (0.0 * next(network.parameters())).sum().sqrt()
        return terms


def test_weights_that_break_at_the_end_of_a_stage_are_mended_while_it_lasts(tmp_path):
    """The next stage's optimiser and objective are others; the state of this one does not fit them."""
    seen, link = [], FakeLink()
    first = stage(seen, "first", steps=4, objective=partial(SteepAtZero, at=3))
    second = stage(seen, "second", steps=4, ema_decay=0.5)
    made = student(run_plan(tmp_path, [first, second], checkpoint_every=2), link)
    assert made.run()["step"] == 8
    (said,) = (text for text in link.said if "no finite number" in text)
    assert "at step 4: student and teacher go back to their weights of step 2 " in said
    assert all(tensor.isfinite().all() for tensor in made.network.state_dict().values())


@pytest.mark.parametrize("at", [3, 11])
def test_weights_that_are_no_numbers_are_never_saved_though_their_loss_was_one(tmp_path, at):
    link = FakeLink()
    plan = run_plan(tmp_path, [stage(steps=12, objective=partial(SteepAtZero, at=at))], checkpoint_every=4)
    made = student(plan, link)
    assert made.run()["step"] == 12
    (said,) = (text for text in link.said if "no finite number" in text)
    assert f"the weights are no finite numbers any more at step {at + 1}: student and teacher go back" in said
    for state in (CheckpointStore(tmp_path / "checkpoints").newest(), {"student": made.network.state_dict()}):
        assert all(tensor.isfinite().all() for tensor in state["student"].values())


def test_going_back_leaves_the_good_weights_as_they_were(tmp_path):
    """The optimiser works on in what it is given; twice back must be twice the same."""
    seen = []

    class Watched(Breaking):
        def losses(self, network, batch, info):
            seen.append((info.stage_step, network.state_dict()["conv.weight"].clone()))
            return super().losses(network, batch, info)

    objective = partial(Watched, at={3, 7})
    student(run_plan(tmp_path, [stage(steps=10, objective=objective)])).run()
    at = dict(seen)
    torch.testing.assert_close(at[4], at[0])
    torch.testing.assert_close(at[8], at[0])


def test_a_loss_that_is_never_a_number_ends_the_run(tmp_path):
    objective = partial(Breaking, at=set(range(100)))
    with pytest.raises(RunError, match=r"no finite number any more at step 6 .*loss/source.*another --seed"):
        student(run_plan(tmp_path, [stage(steps=20, objective=objective)])).run()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    student(run_plan(tmp_path, [stage(steps=1)])).run()
    other = run_plan(tmp_path, [stage(steps=2)], network=lambda: TinyNetwork(channels=6))
    with pytest.raises(RunError, match=r"is of another network \(for example .* differs\)"):
        student(other).run()


def test_a_full_disk_is_told_and_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    link = FakeLink()
    assert student(run_plan(tmp_path, [stage(steps=2)]), link).run()["step"] == 2
    assert "could not be written" in link.said[0]


def test_a_stop_while_waiting_for_the_round_returns(tmp_path):
    view = partial(FakeView, complete=False)
    plan = run_plan(tmp_path, [stage(steps=2, labels=label_plan(refresh="once"))])
    made = student(plan, FakeLink(stop_after=lambda: True, views={0: view}))
    assert made.run()["stopped"]
    assert made.step == 0


def test_metrics_are_means_since_the_last_line(tmp_path):
    seen, link = [], FakeLink()
    student(run_plan(tmp_path, [stage(seen, steps=5)], log_every=2), link).run()
    lines = [(step, numbers) for kind, step, numbers in link.lines if kind == "train"]
    assert [step for step, _ in lines] == [1, 2, 4, 5]
    for (step, numbers), part in zip(lines, (seen[:1], seen[1:2], seen[2:4], seen[4:]), strict=True):
        for name in ("loss/source", "loss/critic"):
            assert numbers[name] == pytest.approx(np.mean([terms[name] for terms in losses(part)]), rel=1e-5)
        assert numbers["loss"] == pytest.approx(numbers["loss/source"] + numbers["loss/critic"], rel=1e-5)
        assert numbers["learning_rate"] == pytest.approx(rate(step - 1))
        assert numbers["step_seconds"] * numbers["steps_per_s"] == pytest.approx(1.0)
        assert numbers["recoveries"] == 0
        assert "gpu_memory_bytes" not in numbers, "on a CPU"


def test_a_line_tells_the_version_of_the_weights_that_were_published_last(tmp_path):
    link = FakeLink()
    student(run_plan(tmp_path, [stage(steps=7)], log_every=1, publish_every=3), link).run()
    told = [numbers["weights_version"] for kind, _, numbers in link.lines if kind == "train"]
    assert told == [0, 0, 0, 3, 3, 3, 6], "a line is written before the weights of its step are published"


def test_a_line_tells_the_gpu_memory_that_the_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("actors.student.gpu_memory", lambda device: {"gpu_memory_bytes": 7 * (device.type == "cpu")})
    link = FakeLink()
    student(run_plan(tmp_path, [stage(steps=1)]), link).run()
    assert [numbers["gpu_memory_bytes"] for kind, _, numbers in link.lines if kind == "train"] == [7]


def test_every_rank_reports_where_a_stage_ends_and_not_at_every_checkpoint(tmp_path, monkeypatch):
    """A report is a barrier."""
    saved, reports = [], []
    monkeypatch.setattr(CheckpointStore, "save_later", lambda store, step, *_: saved.append(step))
    for rank in (0, 1):
        link = FakeLink()
        student(
            run_plan(tmp_path / str(rank), [stage(steps=4), stage(name="b", steps=2)], checkpoint_every=2), link, rank
        ).run()
        reports.append([(r["step"], r["stage"]) for r in link.reports])
    assert reports[0] == reports[1] == [(4, 1), (6, 1)]
    assert saved == [2, 4, 6]


def test_a_stopped_student_reports(tmp_path, monkeypatch):
    always_look(monkeypatch)
    seen, link = [], FakeLink()
    link.stop_after = stop_when(seen, 3)
    student(run_plan(tmp_path, [stage(seen, steps=6)]), link).run()
    assert [r["step"] for r in link.reports] == [3]


def test_the_optimiser_is_built_anew_for_every_stage(tmp_path):
    built = []

    def optimiser(network):
        built.append(sgd(network))
        return built[-1]

    student(
        run_plan(tmp_path, [stage(steps=1, optimiser=optimiser), stage(name="b", steps=1, optimiser=optimiser)])
    ).run()
    assert len(built) == 2


def test_a_bound_on_the_gradient_bounds_the_step(tmp_path):
    moved = {}
    for bound in (None, 1e-3):
        learner = student(run_plan(tmp_path / str(bound), [stage(steps=1, clip_norm=bound)]))
        before = [p.detach().clone() for p in learner.network.parameters()]
        learner.run()
        steps = [p.detach() - q for p, q in zip(learner.network.parameters(), before, strict=True)]
        moved[bound] = float(torch.cat([step.flatten() for step in steps]).norm())
    # Nesterov momentum makes 1.9 of a first gradient, and the fastest group multiplies its rate by ten.
    assert moved[1e-3] < 1e-3 * 1.9 * 10 * rate(0) < moved[None]


def test_standing_still_for_a_later_round_is_counted_as_waiting(tmp_path):
    class Slow(FakeView):
        def wait_for_round(self, step, tick, poll_seconds=0.0):
            time.sleep(0.05 if step else 0.5)
            return True

    rounds = [stage([], name, steps=2, labels=label_plan("once")) for name in ("first", "second", "third")]
    learner = student(run_plan(tmp_path, rounds), FakeLink(views=dict.fromkeys(range(3), Slow)))
    done = learner.run()
    assert 0.1 <= learner.tally.label_wait < 0.5, "before the first round there is nothing to learn from"
    assert 0 < done["wait_share"] <= 1


@pytest.mark.parametrize(("precision", "half"), [("bfloat16", True), ("float32", False), ("auto", False)])
def test_half_precision_is_the_networks_own_business(tmp_path, precision, half):
    """Objectives see float32, weights stay float32; on a CPU it is done only where it is asked for."""
    seen, inside = [], []

    class Watched(TinyNetwork):
        def forward(self, images):
            found = super().forward(images)
            inside.append(found.dtype)
            return found

    class Objective(TinyObjective):
        def losses(self, network, batch, info):
            seen.append(network(batch.source).dtype)
            return super().losses(network, batch, info)

    plan = run_plan(tmp_path, (replace(stage([], steps=2), objective=Objective),), precision=precision)
    one = student(replace(plan, network=Watched))
    one.run()
    assert set(seen) == {torch.float32}
    assert set(inside) == {torch.bfloat16 if half else torch.float32}
    assert {tensor.dtype for tensor in one.network.state_dict().values()} <= {torch.float32, torch.int64}


def test_chunks_are_normalised_by_themselves_and_the_first_alone_is_remembered():
    """Against one pass a chunk, as on devices of their own."""
    torch.manual_seed(0)
    whole = DeepLab(DeepLabConfig.small(5)).train()
    for module in whole.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    alone, images = copy.deepcopy(whole), torch.randn(5, 3, 48, 64) * 50
    found = InChunks(whole, 2).train()(images)
    with torch.no_grad():
        expected = [copy.deepcopy(alone)(chunk) for chunk in images.split(2)]
        alone(images[:2])
    for name in ("aux", "main"):
        torch.testing.assert_close(getattr(found, name), torch.cat([getattr(part, name) for part in expected]))
    torch.testing.assert_close(dict(whole.named_buffers()), dict(alone.named_buffers()))


def test_chunks_change_nothing_in_evaluation():
    network, images = TinyNetwork().eval(), torch.randn(3, 3, 8, 8)
    assert torch.equal(InChunks(network, 1).eval()(images), network(images))


def test_a_stage_says_how_many_images_are_normalised_together(tmp_path):
    seen = []

    class Watched(TinyNetwork):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    plan = run_plan(tmp_path, (stage([], steps=1, norm_images=1),))
    student(replace(plan, network=Watched)).run()
    assert set(seen) == {1}


def test_a_network_with_several_outputs_keeps_their_names_in_half_precision():
    network = DeepLab(DeepLabConfig.small(5)).eval()
    images = torch.randn(1, 3, 48, 64) * 50
    with torch.no_grad():
        exact, found = network(images), InBfloat16(network, "cpu")(images)
    for name in ("aux", "main"):
        one, two = getattr(exact, name), getattr(found, name)
        assert two.dtype == torch.float32
        assert 0 < (one - two).norm() / one.norm() < 2e-2
