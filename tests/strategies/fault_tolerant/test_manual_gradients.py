"""Which gradients are new, and their sum over shards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.strategies.fault_tolerant.manual import gradients as part_gradients
from lightning_eff.strategies.fault_tolerant.manual.gradients import NewGradients, summed_over_shards


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)]


def test_new_is_what_a_backward_pass_has_added_to(parameters: list[nn.Parameter]) -> None:
    fresh = NewGradients()
    fresh.listen(parameters)
    assert [parameter.requires_grad for parameter in parameters] == [True, False]
    assert not any(map(fresh.has, parameters))
    (parameters[0] * 2).sum().backward()
    assert [fresh.has(parameter) for parameter in parameters] == [True, False]
    fresh.forget(parameters)
    assert not fresh.has(parameters[0])
    parameters[0].grad.mul_(0.5)  # type: ignore[union-attr]
    assert not fresh.has(parameters[0]), "clipping is the same on all replicas"
    (parameters[0] * 2).sum().backward()
    assert fresh.has(parameters[0]), "the same tensor, with more in it"
    parameters[0].grad = None
    assert not fresh.has(parameters[0])
    parameters[1].requires_grad_(True)
    parameters[1].sum().backward()
    assert fresh.has(parameters[1]), "it was opened later"
    fresh.close()
    fresh.forget(parameters)
    parameters[1].sum().backward()
    assert not fresh.has(parameters[1])


def test_new_is_what_the_user_has_set(parameters: list[nn.Parameter]) -> None:
    fresh = NewGradients()
    parameters[0].grad = torch.ones(3)
    fresh.forget(parameters)
    assert not fresh.has(parameters[0])
    parameters[0].grad = None
    parameters[0].grad = torch.ones(3)  # in the same memory, perhaps
    assert fresh.has(parameters[0])


class Sums:
    """Of three replicas with equal gradients."""

    def __init__(self, fails: bool = False) -> None:
        self.failed, self.sizes = fails, []  # type: ignore[var-annotated]
        self.group = SimpleNamespace(size=1)

    def begin(self) -> None:
        pass

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        self.sizes.append(tensor.numel())
        return SimpleNamespace(wait=lambda: tensor.mul_(3))

    def finish(self, works: list[Any]) -> None:
        for work in works:
            work.wait()


def test_the_sum_takes_orphans_and_leaves_gaps_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_gradients, "BUCKET", 24)
    sizes = [(2, 2), (3,), (5,), (1,)]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    parameters[1].grad = None
    others = {id(parameters[0]): torch.full((2, 2), 10.0)}
    sums_of: Any = Sums()
    sums = summed_over_shards(sums_of, parameters, others, 6.0)
    assert sums is not None
    assert [float(total.flatten()[0]) for total in sums] == [5.5, 0.0, 1.5, 2.0, 2.5]
    assert [total.shape for total in sums] == [parameter.shape for parameter in parameters]
    assert sums_of.sizes == [4, 3, 6, 2]
    assert float(parameters[0].grad.sum()) == 4.0, "gradients are only set when all is well"  # type: ignore[union-attr]
    failing: Any = Sums(fails=True)
    assert summed_over_shards(failing, parameters, others, 6.0) is None


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    sums_of: Any = Sums()
    with pytest.raises(RuntimeError, match="sparse=False"):
        summed_over_shards(sums_of, [embedding.weight], {}, 1.0)
