import math

import numpy as np
import pytest
import torch

from models.label_free import SCORES, TargetSignals, label_free_score
from models.networks.deeplab import Logits
from models.networks.proda import ProdaOutputs


def logits(seed, n=2, c=5, h=3, w=4):
    generator = torch.Generator().manual_seed(seed)
    return Logits(*(2 * torch.randn(n, c, h, w, generator=generator) for _ in range(2)))


def test_signals_are_those_of_all_cells_at_once():
    batches, student = [logits(0), logits(1, n=1)], [torch.zeros(2, 3, 4).long(), torch.ones(1, 3, 4).long()]
    counted = TargetSignals(5)
    winners = [counted.update(z, {"agreement": s}) for z, s in zip(batches, student, strict=True)]
    aux, main = (
        np.concatenate([np.moveaxis(z[k].double().numpy(), 1, -1).reshape(-1, 5) for z in batches]) for k in (0, 1)
    )
    e = np.exp(aux / 2 + main)
    p = e / e.sum(1, keepdims=True)
    found = counted.values()
    assert found["entropy"] == pytest.approx(np.mean(-(p * np.log(p)).sum(1)) / np.log(5), rel=1e-5)
    mean = p.mean(0)
    assert found["diversity"] == pytest.approx(-(mean * np.log(mean)).sum() / np.log(5), rel=1e-5)
    assert found["disagreement"] == pytest.approx(np.mean(aux.argmax(1) != main.argmax(1)))
    same = np.concatenate([(w.numpy() == s.numpy()).reshape(-1) for w, s in zip(winners, student, strict=True)])
    assert found["agreement"] == pytest.approx(same.mean())
    np.testing.assert_allclose(counted.class_shares(), np.bincount(p.argmax(1), minlength=5) / len(p))
    assert found["label_free_score"] == pytest.approx(found["diversity"] - found["entropy"] - found["disagreement"])


def test_where_there_is_one_head_nothing_disagrees_with_it():
    """The other signals are those of its own scores."""
    batches = [ProdaOutputs(logits(seed, n=n).main, torch.randn(n, 8, 3, 4)) for seed, n in ((0, 2), (1, 1))]
    counted = TargetSignals(5)
    for outputs in batches:
        counted.update(outputs, {"consistency": torch.zeros(outputs.main.shape[0], 3, 4).long()})
    e = np.exp(np.concatenate([np.moveaxis(z.main.double().numpy(), 1, -1).reshape(-1, 5) for z in batches]))
    p = e / e.sum(1, keepdims=True)
    found = counted.values()
    assert set(found) == {"entropy", "diversity", "consistency", "label_free_score"}
    assert found["entropy"] == pytest.approx(np.mean(-(p * np.log(p)).sum(1)) / np.log(5), rel=1e-5)
    assert found["consistency"] == pytest.approx(np.mean(p.argmax(1) == 0))
    assert found["label_free_score"] == pytest.approx(found["diversity"] - found["entropy"])
    with pytest.raises(KeyError):
        SCORES["disagreement"][1](found)


def test_a_network_that_is_sure_of_one_class_everywhere_looks_worse_than_one_that_is_sure_of_many():
    def score(classes):
        z = 50 * torch.nn.functional.one_hot(classes, 4).permute(0, 3, 1, 2).float()
        counted = TargetSignals(4)
        counted.update(Logits(z, z))
        return counted.values()["label_free_score"]

    assert score(torch.arange(8).view(1, 2, 4) % 4) == pytest.approx(1.0)
    assert score(torch.zeros(1, 2, 4).long()) == pytest.approx(0.0, abs=1e-6)


def test_nothing_seen_is_no_signal():
    assert TargetSignals(3).values() == {}
    assert TargetSignals(3).class_shares() == [0.0] * 3


def test_the_score_falls_with_entropy_and_disagreement():
    base = {"diversity": 0.7, "entropy": 0.2, "disagreement": 0.1}
    assert label_free_score(base) == pytest.approx(0.4)
    for name in ("entropy", "disagreement"):
        assert label_free_score({**base, name: 0.3}) < label_free_score(base)
    assert not math.isnan(label_free_score(base))


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_higher_for_the_network_that_looks_better(name):
    good = {"diversity": 0.7, "entropy": 0.1, "disagreement": 0.05}
    good |= {"agreement": 0.9, "consistency": 0.9, "stability": 0.9, "source_miou": 0.5}
    bad = {"diversity": 0.5, "entropy": 0.3, "disagreement": 0.2}
    bad |= {"agreement": 0.5, "consistency": 0.5, "stability": 0.5, "source_miou": 0.2}
    said, score = SCORES[name]
    assert score(good) > score(bad)
    assert said
    with pytest.raises(KeyError):
        score({})
