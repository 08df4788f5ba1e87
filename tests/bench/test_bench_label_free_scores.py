import numpy as np
import pytest

from bench.label_free_scores import arrays, chosen_elsewhere, correlations, points_of, ranking, share_of_gain
from models.label_free import SCORES
from pipelines.options import AdaptOptions
from tune_spaces.space import read_space, shipped


def entry(benchmark, trial, miou):
    """A trial whose source mIoU ranks as target mIoU does, and whose entropy ranks the other way round."""
    signals = dict.fromkeys(("diversity", "disagreement", "agreement", "consistency", "stability"), 0.5)
    last = {**signals, "entropy": miou / 100, "source_miou": miou / 50}
    return {"benchmark": benchmark, "trial": trial, "score": {"miou": miou}, "looks": [{}, last]}


@pytest.fixture
def entries():
    rng = np.random.default_rng(2)
    return [entry(name, k, float(m)) for name in ("a", "b") for k, m in enumerate(rng.permutation(20) + 10.0)]


def test_correlation_is_that_of_the_ranks_and_its_spread_holds_it():
    rng = np.random.default_rng(1)
    miou = rng.normal(size=18)
    assert correlations(np.exp(miou), miou)[0] == pytest.approx(1.0)
    assert correlations(-miou, miou)[0] == pytest.approx(-1.0)
    noisy = miou + rng.normal(size=18)
    rho, low, high = correlations(noisy, miou)
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (noisy, miou)]
    assert rho == pytest.approx(1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (18 * (18**2 - 1)))
    assert low < rho < high


def test_a_share_of_the_gain_is_all_for_the_best_pick_and_negative_below_what_it_replaces():
    miou = np.array([10.0, 20.0, 30.0])
    assert share_of_gain(np.array([0, 0, 1]), miou, 20.0) == 1.0
    assert share_of_gain(np.array([0, 1, 0]), miou, 20.0) == 0.0
    assert share_of_gain(np.array([1, 0, 0]), miou, 20.0) == -1.0


def test_the_table_has_every_score_the_best_first(entries):
    scores, miou = arrays(list(reversed(entries)), "a")
    assert len(miou) == 20
    assert correlations(scores["source_miou"], miou)[0] == pytest.approx(1.0)
    rows = [line for line in ranking(entries, ["a", "b"]).splitlines() if line.startswith("| `")]
    assert len(rows) == len(SCORES) + 1
    assert rows[0].split("`")[1] in ("source_miou", "combined")
    assert any(row.startswith("| `entropy` | −1.00") for row in rows)


def test_a_score_that_was_chosen_on_one_benchmark_is_shown_on_the_other(entries):
    said = chosen_elsewhere({name: arrays(entries, name) for name in ("a", "b")})[1]
    assert "Best on a is" in said
    assert "on b it has 1.00" in said


def test_the_points_are_the_same_every_time_and_begin_with_the_first_ones():
    space, options = read_space(shipped("eplc")), AdaptOptions()
    points = points_of(space, options, 6)
    assert points[:2] == space.first_points(options)
    assert points == points_of(space, options, 6)
    assert len({str(point) for point in points}) == 6
