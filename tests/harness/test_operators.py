import numpy as np
import pytest
import torch
from torch import nn

from harness.operators import OperatorCounter

WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "format": lambda x: f"{x.sum():.2f}",
    "equal": lambda x: torch.equal(x, x.clone()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "to the device": lambda x: x.to("meta"),
    "copied to the device": lambda x: torch.empty(3, device="meta").copy_(x),
    "made on the host": lambda x: torch.tensor([1.0], device="meta"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "clip to a tensor": lambda x: nn.utils.clip_grads_with_norm_([_with_gradient()], x.max(), x.sum()),
}
QUIET = {
    "where": lambda x: torch.where(x > 0, x, -x),
    "index": lambda x: x[torch.tensor([0, 2])],
    "foreach": lambda x: torch._foreach_mul([x, x], x.sum()),
    "shape": lambda x: int(x.shape[0]) + x.numel(),
    "to the device without waiting": lambda x: x.to("meta", non_blocking=True),
    "copied without waiting": lambda x: torch.empty(3, device="meta").copy_(x, non_blocking=True),
    "on the device": lambda x: torch.zeros(3, device="meta").to(torch.float16).copy_(torch.ones(3, device="meta")),
    "another dtype": lambda x: x.to(torch.float64),
    "detach": lambda x: x.detach().clone(),
}


def _with_gradient():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return parameter


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_counted(name):
    x = torch.arange(3.0) + 1
    with OperatorCounter() as counter:
        WAITING[name](x)
    assert counter.host_syncs >= 1, counter.operators


@pytest.mark.parametrize("name", QUIET)
def test_work_without_a_wait_is_not(name):
    x = torch.arange(3.0) + 1
    with OperatorCounter() as counter:
        QUIET[name](x)
    assert counter.host_syncs == 0, counter.waits
    assert name == "shape" or counter.calls >= 1


def test_operators_are_counted_in_the_backward_pass_too(operators):
    weight = torch.ones(2, 2, requires_grad=True)
    (weight @ weight).sum().backward()

    assert operators.operators["aten::mm"] == 3  # one forward, two backward
