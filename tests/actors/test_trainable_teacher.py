"""A teacher that learns beside its student, and the student's side of it."""

import threading
from functools import partial

import numpy as np
import pytest
import ray
import torch
from fakes import (
    FakeLink,
    FakeStream,
    FakeView,
    NormedNetwork,
    Remote,
    TinyNetwork,
    TinyObjective,
    label_plan,
    run_plan,
    stage,
)

from actors import trainable_teacher
from actors.checkpoints import CheckpointStore
from actors.protocols import Reward
from actors.reward_board import RewardBoard, Standing
from actors.student import Student
from actors.trainable_teacher import News, PacedStream, TeacherLink, TeachersPublisher, TrainableTeacher, teachers_plan
from actors.weight_board import WeightBoard

CPU = torch.device("cpu")


def taught(folder, objective=None, steps=6, teacher_steps=6, **more):
    """A stage that makes a network, and one that is labelled by it while it goes on learning."""
    teacher = stage(name="teacher", steps=teacher_steps, objective=objective or TinyObjective)
    own = {"labelled_by": "teacher", "keeps_before": True, "teacher": teacher, "reward": ("loss/source", "loss/pseudo")}
    first = stage(name="first", steps=4)
    second = stage(name="second", steps=steps, labels=label_plan(), network=NormedNetwork, **own)
    return run_plan(folder, (first, second), **more)


# The student's side.


def test_the_network_before_labels_and_the_student_is_only_shown(tmp_path):
    link = FakeLink(views={1: FakeView})
    Student(taught(tmp_path), link, 0, 1, CPU).run()
    found = list(zip(link.publisher.published, link.publisher.boards, strict=True))
    of_teaching = [(version, pin, boards) for (version, pin, _), boards in found if version >= 4]
    assert of_teaching == [
        (4, True, (False, True)),  # the network of the stage before, kept where labels are made from
        (4, True, (True, False)),
        (6, False, (True, False)),
        (8, False, (True, False)),
        (10, False, (True, False)),
    ]
    before, own = (weights for version, _, weights in link.publisher.published if version == 4)
    assert "extra.weight" not in before
    assert "extra.weight" in own
    assert link.publisher.boards[0] == (True, True), "in an ordinary stage they are one and the same"


def test_a_reward_has_the_means_of_the_terms_and_the_version_of_the_labels(tmp_path):
    seen, link = [], FakeLink(views={1: FakeView})
    plan = taught(tmp_path)
    first, second = plan.stages
    watched = stage(
        name="second",
        steps=6,
        labels=label_plan(),
        labelled_by="teacher",
        keeps_before=True,
        teacher=second.teacher,
        reward=second.reward,
        objective=lambda context: TinyObjective(context, seen),
    )
    Student(run_plan(tmp_path, (first, watched)), link, 0, 1, CPU).run()
    assert link.begun == [(1, 4, 4)]
    assert [(told.stage, told.first_step, told.step) for told in link.sent] == [(1, 4, 6), (1, 4, 8), (1, 4, 10)]
    rewards = [told.reward for told in link.sent]
    assert [(reward.step, reward.stage_step) for reward in rewards] == [(6, 2), (8, 4), (10, 6)]
    assert all(reward.version == reward.step - 1 for reward in rewards), "the labels of the fake view are a step old"
    for name in ("loss/source", "loss/pseudo"):
        expected = np.mean([terms[name] for terms, *_ in seen[2:4]])
        assert rewards[1].terms[name] == pytest.approx(expected, rel=1e-6)


def test_without_labels_there_is_no_reward_but_the_teacher_hears_the_step(tmp_path):
    """Or it would wait for a step that its own labels must bring."""

    class Empty(FakeView):
        def get(self, index, step):
            return np.full((8, 8), 255, np.uint8), 0.0

    link = FakeLink(views={1: Empty})
    Student(taught(tmp_path), link, 0, 1, CPU).run()
    assert [(told.step, told.reward) for told in link.sent] == [(6, None), (8, None), (10, None)]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"labelled_by": "teacher", "labels": label_plan(), "keeps_before": True}, "if, and only if, it has one"),
        ({"teacher": stage(), "labels": label_plan(), "keeps_before": True}, "if, and only if, it has one"),
        ({"teacher": stage(), "labelled_by": "teacher", "keeps_before": True}, "makes labels"),
        ({"teacher": stage(), "labelled_by": "teacher", "labels": label_plan()}, "begins as the network before"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        stage(**more)


# News and pace.


def test_news_are_the_last_answer_and_are_asked_for_now_and_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(trainable_teacher.time, "monotonic", lambda: clock[0])
    asked, arrived = [], set()
    news = News(lambda: asked.append(len(asked)) or len(asked) - 1, arrived.__contains__, lambda n: Standing(n, 0, n))
    assert news.newest() == Standing()
    assert asked == [0]
    assert news.newest() == Standing(), "it has not answered yet, and nobody waits"
    arrived.add(0)
    assert news.newest().step == 0
    assert asked == [0], "too early to ask again"
    clock[0] += 1.0
    news.newest()
    arrived.add(1)
    assert news.newest().step == 1


def test_a_paced_stream_gives_the_same_batches_when_their_turn_has_come():
    allowed, waited = [2], []
    stream = FakeStream("target", labelled=False)

    def may_step(step):
        if step < allowed[0]:
            return True
        waited.append(step)
        allowed[0] += 1
        return False

    paced = PacedStream(stream, may_step)
    found = [batch.positions.tolist() for batch in paced.batches(4, 4, 4, 0, 1)]
    assert found == [batch.positions.tolist() for batch in stream.batches(4, 4, 4, 0, 1)]
    assert waited == [2, 3, 4], "the first batch is that of step 1"
    assert (paced.images, paced.indices(np.array([501])).tolist()) == (500, [1])


# The teacher.


def boards(monkeypatch, step=0):
    """Boards without Ray, and a student that stands at a step of stage 1, which began at step 4."""
    monkeypatch.setattr(trainable_teacher.ray, "get", lambda value: value)
    monkeypatch.setattr("actors.publisher.ray.get", lambda value: value)
    monkeypatch.setattr("actors.publisher.ray.put", lambda value: value)
    monkeypatch.setattr(trainable_teacher, "helper_device", lambda threads: CPU)
    monkeypatch.setattr(trainable_teacher, "WAIT_SECONDS", 0.001)
    monkeypatch.setattr(trainable_teacher, "LOOK_SECONDS", 0.0)
    weights, rewards = WeightBoard(), RewardBoard()
    rewards.begin(1, 4, 4)
    reward = Reward(4 + step, step, 4 + step - 1, {"loss/source": 1.0, "loss/pseudo": 0.5})
    rewards.post(Standing(1, 4, 4 + step, reward))
    start = {name: tensor.numpy().copy() for name, tensor in TinyNetwork().state_dict().items()}
    weights.publish(4, [start], pin=True)
    return weights, rewards, start


class Handle:
    """An object as Ray would hand it out."""

    def __init__(self, thing):
        self.thing = thing

    def __getattr__(self, name):
        return Remote(getattr(self.thing, name))


class Log:
    def __init__(self):
        self.lines, self.said = [], []

    def write(self, kind, step, numbers):
        self.lines.append((kind, step, numbers))

    def say(self, message, step):
        self.said.append(message)


def a_teacher(plan, weights, rewards, log):
    made = TrainableTeacher(plan, Handle(weights), Handle(rewards), Handle(log))
    made.news = News(rewards.look, lambda _: True, lambda value: value)
    return made


class Watching(TinyObjective):
    """Notes with which weights it began and what it heard, and may be killed at a step."""

    def __init__(self, context, begun, dies_at=None):
        super().__init__(context)
        self.context, self.dies_at, self.heard, self.steps = context, dies_at, [], []
        self.start = {name: tensor.clone() for name, tensor in context.network.state_dict().items()}
        begun.append(self)

    def losses(self, network, batch, info):
        if info.stage_step == self.dies_at:
            raise KeyboardInterrupt
        self.heard.append(self.context.reward())
        self.steps.append(info.stage_step)
        return super().losses(network, batch, info)


def test_it_begins_as_the_network_before_and_takes_as_many_steps_as_its_student(tmp_path, monkeypatch):
    weights, rewards, start = boards(monkeypatch, step=6)
    begun, log = [], Log()
    made = a_teacher(taught(tmp_path, partial(Watching, begun=begun)), weights, rewards, log)
    assert made.run() == {"steps": 6}
    (objective,) = begun
    assert all(np.array_equal(objective.start[name].numpy(), array) for name, array in start.items())
    assert {reward.terms["loss/pseudo"] for reward in objective.heard} == {0.5}
    assert weights.newest_version() == 10, "versions are counted in the student's steps"
    newest = weights.take(10)[0]
    assert not np.array_equal(newest["conv.weight"], start["conv.weight"])
    assert np.array_equal(weights.take(4)[0]["conv.weight"], start["conv.weight"]), "the pinned first one stays"
    kinds, steps, numbers = zip(*log.lines, strict=True)
    assert set(kinds) == {"trainable_teacher"}
    assert set(steps) == {10}
    assert numbers[-1]["steps"] == 6
    assert numbers[-1]["reward_age_steps"] == 1


def test_a_killed_one_goes_on_from_its_own_checkpoint(tmp_path, monkeypatch):
    weights, rewards, _ = boards(monkeypatch, step=6)
    begun = []
    plan = taught(tmp_path, partial(Watching, begun=begun, dies_at=4), checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        a_teacher(plan, weights, rewards, Log()).run()
    assert CheckpointStore(tmp_path / "teacher" / "2" / "checkpoints").steps()[-1] in (2, 4)
    again = taught(tmp_path, partial(Watching, begun=begun), checkpoint_every=2)
    assert a_teacher(again, weights, rewards, Log()).run() == {"steps": 6}
    assert begun[0].steps == [0, 1, 2, 3]
    assert begun[1].steps in ([2, 3, 4, 5], [4, 5])
    whole = []
    weights, rewards, _ = boards(monkeypatch, step=6)
    weights.publish(4, [{name: tensor.numpy() for name, tensor in begun[0].start.items()}], pin=True)
    a_teacher(taught(tmp_path / "whole", partial(Watching, begun=whole)), weights, rewards, Log()).run()
    for name, tensor in whole[0].context.network.state_dict().items():
        torch.testing.assert_close(begun[1].context.network.state_dict()[name], tensor, rtol=0, atol=0)


def test_it_saves_itself_and_returns_when_it_is_stopped(tmp_path, monkeypatch):
    weights, rewards, _ = boards(monkeypatch, step=2)  # so the third step waits for ever
    made = a_teacher(taught(tmp_path), weights, rewards, Log())
    box = []
    thread = threading.Thread(target=lambda: box.append(made.run()))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "it may not overtake its student"
    made.stop()
    thread.join(20)
    assert not thread.is_alive()
    store = CheckpointStore(tmp_path / "teacher" / "2" / "checkpoints")
    assert box[0]["steps"] == store.steps()[-1] >= 2


def test_it_waits_for_its_stage_until_it_is_stopped(tmp_path, monkeypatch):
    weights, rewards, _ = boards(monkeypatch)
    rewards.begin(0, 0, 0)
    made = a_teacher(taught(tmp_path), weights, rewards, Log())
    made.stop()
    assert made.run() == {"steps": 0}


def test_one_that_is_stopped_before_it_has_weights_saves_nothing(tmp_path, monkeypatch):
    """Or a resume would take up a teacher with random ones."""
    _, rewards, _ = boards(monkeypatch, step=6)
    made = a_teacher(taught(tmp_path), WeightBoard(), rewards, Log())
    threading.Timer(0.2, made.stop).start()
    assert made.run() == {"steps": 0}
    assert CheckpointStore(tmp_path / "teacher" / "2" / "checkpoints").steps() == []


def test_a_board_that_is_just_restarting_is_asked_again_for_the_first_weights(tmp_path, monkeypatch):
    weights, rewards, start = boards(monkeypatch, step=6)
    answers = [None, ray.exceptions.RayActorError(), 4]

    class Restarting(WeightBoard):
        def newest_version(self):
            answer = answers.pop(0) if answers else weights.newest_version()
            if isinstance(answer, Exception):
                raise answer
            return answer

    board = Restarting()
    board._alive, board._pinned = weights._alive, 4
    begun = []
    assert a_teacher(taught(tmp_path, partial(Watching, begun=begun)), board, rewards, Log()).run() == {"steps": 6}
    assert answers == []
    assert np.array_equal(begun[0].start["conv.weight"].numpy(), start["conv.weight"])


def test_a_student_that_comes_back_leaves_the_teachers_weights_where_they_hang(tmp_path):
    plan, link = taught(tmp_path, checkpoint_every=1), FakeLink(views={1: FakeView})
    Student(plan, link, 0, 1, CPU).run()
    assert link.publisher.rewound_labels, "it began with an ordinary stage"
    again = FakeLink(views={1: FakeView})
    Student(plan, again, 0, 1, CPU).run()
    assert not again.publisher.rewound_labels


def test_its_plan_is_one_stage_in_a_folder_of_its_own(tmp_path):
    plan = taught(tmp_path)
    made = teachers_plan(plan, 1, lambda step: True, lambda network: None)
    assert made.network is TinyNetwork
    assert [stage.name for stage in made.stages] == ["teacher"]
    assert made.folder == f"{tmp_path}/teacher/2"
    assert all(isinstance(stream, PacedStream) for stream in made.stages[0].streams.values())


def test_a_publication_pins_nothing_and_no_resume_takes_its_labels_back(monkeypatch):
    weights, _, _ = boards(monkeypatch)
    publisher = TeachersPublisher(Handle(weights), lambda: 17)
    publisher.publish(3, TinyNetwork(), pin=True)
    publisher.flush()
    assert weights.newest_version() == 17
    assert weights._pinned == 4
    publisher.rewind(0)
    assert weights.newest_version() == 17


def test_newer_weights_hang_above_those_from_before_the_student_came_back(monkeypatch):
    weights, _, _ = boards(monkeypatch)
    steps = [600, 510, 620]
    publisher = TeachersPublisher(Handle(weights), lambda: steps.pop(0))
    found = []
    for _ in range(3):
        publisher.publish(0, TinyNetwork(), pin=False)
        publisher.flush()
        found.append(weights.newest_version())
    assert found == [600, 601, 620]


def test_its_link_has_no_labels_no_teacher_and_no_bank():
    news = News(lambda: None, lambda _: False, lambda _: None)
    log = Log()
    link = TeacherLink(news, None, Handle(log), threading.Event())
    with pytest.raises(NotImplementedError):
        link.view(0, 0)
    assert link.bank_index() == {}
    link.report({})
    link.begin_teaching(0, 0, 0)
    link.tell(None)
    link.say("broken", 3)
    assert log.said == ["the teacher that learns: broken"]
