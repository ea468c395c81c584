"""Snapshots of nested states, and a factor on learning rates."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.callbacks.training_guard.rate_factor import RateFactor
from lightning_eff.callbacks.training_guard.run_snapshots import RunSnapshots


def _state(value: float):
    tensor = torch.full((3,), value)
    nested = {"list": [tensor, {"rate": value}], "tuple": (torch.tensor(value, dtype=torch.float64), "word"), 5: None}
    return {"flat": {"weight": tensor}, "nested": nested}


@pytest.mark.parametrize("place", ["cpu", "disk", "model"])
def test_a_state_comes_back_as_it_was(place, tmp_path):
    snapshots = RunSnapshots(2, place)
    snapshots.window.folder = str(tmp_path)
    for step in (1, 2, 3):
        state = _state(float(step))
        snapshots.take(step, state)
        state["flat"]["weight"].zero_()
        state["nested"]["list"][1]["rate"] = 0.0
    assert snapshots.steps == [2, 3]
    snapshot = snapshots.read(2)
    assert snapshot.host("flat")["weight"].tolist() == [2.0] * 3
    nested = snapshot.rebuild("nested")
    assert nested["list"][0].tolist() == [2.0] * 3
    assert nested["list"][1] == {"rate": 2.0}
    assert nested["tuple"][0].dtype == torch.float64
    assert nested["tuple"][1:] == ("word",)
    assert nested[5] is None
    nested["list"][0].zero_()  # a tensor of its own
    assert snapshots.read(2).rebuild("nested")["list"][0].tolist() == [2.0] * 3
    snapshots.drop_after(2)
    assert snapshots.steps == [2]


def test_its_size():
    assert RunSnapshots(2).bytes_of(_state(1.0)) == 12 + 12 + 8


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    rates, lr = RateFactor(), torch.tensor(0.5)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=lr)
    rates.attach([optimizer])
    rates.factor = 0.5
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [-0.25] * 2
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5
    rates.detach()


def test_after_an_exception_the_rates_are_the_schedulers():
    rates = RateFactor()
    rates.factor = 0.5
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    rates.attach([optimizer])

    def closure():
        assert optimizer.param_groups[0]["lr"] == 0.25
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    rates.detach()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
