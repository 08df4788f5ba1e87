"""Stand-ins for what the actors receive from outside: label rules, banks, streams, objectives."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import ray
import torch
from torch import nn

from actors.label_rounds import Header
from actors.protocols import Labelled, LabelPlan, RawBatch, RunPlan, StagePlan
from actors.records import RecordLayout
from actors.staleness import StalenessPolicy

CLASSES = 3
SHAPE = (2, 4)


class LostError(ray.exceptions.RayError):
    """What Ray raises for a value that is gone."""


@dataclass(frozen=True)
class FakeRule:
    """Labels an image by its mean brightness and its seed."""

    num_classes: int = CLASSES
    size: tuple[int, int] = (SHAPE[1], SHAPE[0])

    @property
    def layout(self):
        shape = (self.size[1], self.size[0])
        return RecordLayout((("label", shape), ("confidence", shape)), self.num_classes)

    @property
    def view_sizes(self):
        return (self.size,)

    def label(self, network, views, seeds, adjustment=None):
        made = []
        for image, seed in zip(views[0].numpy(), seeds, strict=True):
            rng = np.random.default_rng(seed)
            shape = image.shape[:2]
            label = rng.integers(0, self.num_classes, shape).astype(np.uint8)
            confidence = (image.mean(-1) // 2 + rng.integers(0, 100, shape)).astype(np.uint8)
            histogram = np.zeros((self.num_classes, 256), np.int64)
            np.add.at(histogram, (label, confidence), 1)
            counts = np.bincount(label.reshape(-1), minlength=self.num_classes)
            made.append(Labelled({"label": label, "confidence": confidence}, counts, histogram))
        return made


@dataclass(frozen=True)
class FakeSelection:
    """The same threshold for every class: the mean confidence of all pixels."""

    def thresholds(self, histogram):
        total = max(1, histogram.sum())
        mean = int((histogram.sum(0) * np.arange(256)).sum() // total)
        return np.full(len(histogram), mean, np.uint8)

    def apply(self, record, thresholds):
        kept = record["confidence"] >= thresholds[record["label"]]
        return np.where(kept, record["label"], np.uint8(255))


def label_plan(refresh="continuous", selection=None, **policy):
    return LabelPlan(FakeRule(), StalenessPolicy(refresh=refresh, **policy), selection)


def header(chunk, version, pixels=(4, 4, 4), images=2, confidence=100, seconds=0.0, skipped=(), histogram=None):
    counts = np.array(pixels, np.int64)
    if histogram is None:
        histogram = np.zeros((CLASSES, 256), np.int64)
        histogram[:, confidence] = counts
    return Header(chunk, version, images, seconds, counts, histogram, tuple(skipped))


class Remote:
    """A method of an actor handle: ``handle.method.remote()``, also after ``.options()``."""

    def __init__(self, function):
        self.function = function

    def options(self, **_):
        return self

    def remote(self, *arguments):
        return self.function(*arguments)


async def soon(value=None, error=None, after=0.0):
    await asyncio.sleep(after)
    if error is not None:
        raise error
    return value


class PlainView:
    """No augmentation: uint8 RGB to float, labels as they are."""

    def __call__(self, images, labels, positions):
        return images.permute(0, 3, 1, 2).float() / 255 - 0.5, tuple(labels)


@dataclass
class FakeStream:
    """Every sample is a function of its position alone; remembers what it was asked for."""

    name: str
    labelled: bool
    images: int = 500
    broken: dict = field(default_factory=dict)
    """Position → paths that could not be read there."""
    view: PlainView = field(default_factory=PlainView)
    size: tuple[int, int] = (8, 8)

    def indices(self, positions):
        return np.asarray(positions, np.int64) % self.images

    def batches(self, position, steps, batch, rank, world):
        share = batch // world
        for step in range(steps):
            positions = position + step * batch + rank * share + np.arange(share)
            pixels = [
                np.random.default_rng([len(self.name), int(p)]).integers(0, 256, (*self.size, 3)) for p in positions
            ]
            labels = [np.random.default_rng([9, int(p)]).integers(0, CLASSES, self.size) for p in positions]
            yield RawBatch(
                torch.from_numpy(np.stack(pixels).astype(np.uint8)),
                torch.from_numpy(np.stack(labels).astype(np.uint8)) if self.labelled else None,
                positions,
                self.indices(positions),
                tuple(path for p in positions for path in self.broken.get(int(p), ())),
            )


class TinyNetwork(nn.Module):
    """A convolution, a batch norm, a dropout and a classifier: all that a student minds about a network."""

    def __init__(self, channels=4, dropout=0.3):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, CLASSES, 1)

    def forward(self, images):
        return self.classifier(self.dropout(torch.relu(self.norm(self.conv(images)))))


class NormedNetwork(TinyNetwork):
    """The same with another norm: a stage's own network."""

    def __init__(self):
        super().__init__()
        self.extra = nn.BatchNorm2d(4)

    def forward(self, images):
        return self.classifier(self.dropout(self.extra(torch.relu(self.norm(self.conv(images))))))


class TinyObjective:
    """Two terms, a module of its own with its own optimiser, and a record of everything it saw."""

    def __init__(self, context, seen=None, scale=1.0):
        self.critic = nn.Linear(CLASSES, 1).to(context.device)
        self.optimiser = torch.optim.Adam(self.critic.parameters(), lr=1e-2)
        self.seen, self.scale = seen, scale
        self.first = [p.detach().clone() for p in self.critic.parameters()]

    def losses(self, network, batch, info):
        terms = {}
        if batch.source is not None:
            terms["loss/source"] = nn.functional.cross_entropy(network(batch.source), batch.source_label)
        if batch.target is not None:
            logits = network(batch.target)
            terms["loss/critic"] = (
                self.critic(logits.mean((2, 3)).detach()).square().mean() * 0 + logits.square().mean()
            )
            self._score = self.critic(logits.detach().mean((2, 3))).square().mean()
            if batch.pseudo_label is not None:
                each = nn.functional.cross_entropy(logits, batch.pseudo_label, ignore_index=255, reduction="none")
                terms["loss/pseudo"] = (each * batch.pseudo_weight[:, None, None]).mean()
        terms = {name: self.scale * value for name, value in terms.items()}
        if self.seen is not None:
            self.seen.append(({n: float(v.detach()) for n, v in terms.items()}, info, batch, self))
        return terms

    def learn(self, info):
        if not hasattr(self, "_score"):
            return {}
        self.optimiser.zero_grad()
        self._score.backward()
        self.optimiser.step()
        return {"critic/score": self._score.detach()}

    def state_dict(self):
        return {"critic": self.critic.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state):
        self.critic.load_state_dict(state["critic"])
        self.optimiser.load_state_dict(state["optimiser"])


def sgd(network):
    groups = [
        {"params": list(network.conv.parameters()), "lr_scale": 1.0},
        {"params": [*network.norm.parameters(), *network.classifier.parameters()], "lr_scale": 10.0},
    ]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def rate(step):
    return 0.01 / (1 + step)


def stage(seen=None, name="first", steps=6, batch=4, labels=None, target=True, source=True, **more):
    streams = {}
    if source:
        streams["source"] = FakeStream("source", labelled=True)
    if target:
        streams["target"] = FakeStream("target", labelled=False)
    return StagePlan(
        name=name,
        steps=steps,
        batch=batch,
        streams=more.pop("streams", streams),
        objective=more.pop("objective", lambda context: TinyObjective(context, seen)),
        optimiser=more.pop("optimiser", sgd),
        learning_rate=rate,
        labels=labels,
        **more,
    )


def run_plan(folder, stages, seed=3, **more):
    defaults = {"publish_every": 2, "checkpoint_every": 0, "log_every": 2}
    return RunPlan(
        network=more.pop("network", TinyNetwork),
        stages=tuple(stages),
        seed=seed,
        folder=str(folder),
        **{**defaults, **more},
    )


class FakePublisher:
    def __init__(self):
        self.version = None
        self.published, self.rewound = [], []
        self.boards = []
        """Of every publication: whether it hangs where the evaluator looks, and where labels are made from."""

    def publish(self, version, network, *, pin, student=None, shown=True, labels=True):
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.version = version
        self.published.append((version, pin, weights))
        self.boards.append((shown, labels))

    def rewind(self, step, *, labels=True):
        self.rewound.append(step)
        self.rewound_labels = labels

    def flush(self):
        pass


class FakeLink:
    """Everything a student says, kept in lists; asks for a stop at a step where told to."""

    def __init__(self, stop_after=None, views=None):
        self.publisher = FakePublisher()
        self.lines, self.said, self.reports = [], [], []
        self.begun, self.sent = [], []
        self.stop_after, self.views = stop_after, views or {}

    def view(self, stage, stage_version):
        return self.views[stage](stage, stage_version)

    def write(self, kind, step, numbers):
        self.lines.append((kind, step, numbers))

    def say(self, message, step):
        self.said.append(message)

    def stop_requested(self):
        return self.stop_after is not None and self.stop_after()

    def bank_index(self):
        return {"stage": 0, "round_file": None}

    def report(self, numbers):
        self.reports.append(numbers)

    def begin_teaching(self, stage, first_step, step):
        self.begun.append((stage, first_step, step))

    def tell(self, standing):
        self.sent.append(standing)

    def reward(self):
        return None


class FakeView:
    """Labels that are a function of the image's index and nothing else."""

    def __init__(self, stage_index, stage_version, complete=True):
        self.hits = self.misses = 0
        self.wait_seconds = 0.0
        self.ages = {}
        self.polls, self.complete = [], complete

    def poll(self, step, upcoming):
        self.polls.append((step, upcoming.tolist()))

    def wait_for_round(self, step, tick, poll_seconds=0.0):
        return self.complete or not tick()

    def get(self, index, step):
        self.hits += 1
        self.ages[1] = self.ages.get(1, 0) + 1
        return np.random.default_rng([5, index]).integers(0, CLASSES, (8, 8)).astype(np.uint8), 0.5
