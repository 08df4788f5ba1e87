import pytest
import torch

from models.schedule import poly, set_rate, warmup_poly


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 2.0e-5), (5_000, 1.90977e-4), (25_000, 1.54378e-4), (50_000, 1.07177e-4)]
)
def test_the_published_rates_come_out(step, rate):
    assert 2e-4 * warmup_poly(step, warmup=5_000, horizon=100_000) == pytest.approx(rate, rel=1e-5)


def test_the_rate_drops_a_little_where_the_warm_up_ends():
    before, after = (warmup_poly(step, warmup=5_000, horizon=100_000) for step in (4_999, 5_000))
    assert before > 0.999 > 0.956 > after


def test_without_a_warm_up_the_schedule_is_poly_from_the_start():
    assert warmup_poly(0, warmup=0, horizon=10) == poly(0, horizon=10) == 1.0
    assert poly(50, horizon=100) == pytest.approx(0.5**0.9)


def test_beyond_the_horizon_the_rate_is_zero():
    assert poly(100, horizon=100) == poly(101, horizon=100) == 0.0


@pytest.mark.parametrize(("step", "horizon"), [(-1, 10), (0, 0)])
def test_an_impossible_schedule_is_refused(step, horizon):
    with pytest.raises(ValueError, match="horizon"):
        warmup_poly(step, warmup=0, horizon=horizon)


def test_every_group_keeps_its_multiple_of_the_rate():
    one, ten = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [ten], "lr_scale": 10.0}], lr=1.0)
    set_rate(optimizer, 2e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-4, 2e-3])
