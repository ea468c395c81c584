"""SignDiversity against the same numbers at once, over batches, ranks and resets."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed as dist

from lightning_eff.functional.spectral_alignment import majority_fraction, sign_diversity
from lightning_eff.metrics import SignDiversity


def _values(seed: int = 0, number: int = 1000) -> torch.Tensor:
    return torch.rand(number, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.5


def _expected(values: torch.Tensor, bins: int) -> dict[str, torch.Tensor]:
    majority = majority_fraction((values > 0).sum(), (values < 0).sum())
    histogram = torch.histc(values.double(), bins, -1, 1).long()
    return {"majority": majority, "sign_diversity": sign_diversity(majority), "histogram": histogram}


@pytest.mark.parametrize("bins", [2, 7, 32, 252])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batches_add_up(bins, dtype):
    values = _values().to(dtype)
    metric = SignDiversity(bins=bins)
    for batch in values.view(10, 4, 25).unbind():
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), _expected(values.float(), bins), rtol=0, atol=1e-6)
    metric.reset()
    metric.update(values[:3])
    assert metric.compute()["histogram"].sum() == 3


def test_zeros_and_what_is_not_finite_have_no_sign():
    metric = SignDiversity(bins=2)
    metric.update(torch.tensor([0.0, 0.5, torch.nan, torch.inf, -0.5, 0.5, 0.5]))
    result = metric.compute()
    assert result["majority"] == 0.75
    assert result["histogram"].tolist() == [1, 4]


def test_both_ends_count():
    metric = SignDiversity(bins=4)
    metric.update(torch.tensor([-1.0, 1.0, 1.0000001, -1.0000001]))
    assert metric.compute()["histogram"].tolist() == [2, 0, 0, 2]


def test_nothing_seen():
    metric = SignDiversity()
    metric.update(torch.empty(0))
    assert metric.compute()["majority"].isnan()


def test_it_can_be_pickled_and_logged_in_the_middle():
    metric = SignDiversity(bins=8)
    metric.update(_values(1))
    other = pickle.loads(pickle.dumps(metric))
    other.update(_values(2))
    metric.update(_values(2))
    torch.testing.assert_close(other.compute(), metric.compute())


def _on_each_rank() -> dict[str, torch.Tensor]:
    metric = SignDiversity()
    metric.update(_values(dist.get_rank(), 100 * (1 + dist.get_rank())))
    return metric.compute()


def test_ranks_add_up(pool):
    expected = _expected(torch.cat([_values(0, 100), _values(1, 200)]), 32)
    for result in pool.run(_on_each_rank):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bins", [1, 253, 2.5])
def test_bad_bins(bins):
    with pytest.raises(ValueError, match=f"bins={bins} is not allowed"):
        SignDiversity(bins=bins)
