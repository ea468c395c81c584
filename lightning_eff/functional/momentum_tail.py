"""The steps that an optimizer's momentum would still make without any further gradient, made at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


def has_momentum_tail(optimizer: Optimizer) -> bool:
    """Whether ``momentum_tail_`` knows the optimizer: Adam, AdamW and SGD, and what is derived from them.

    Args:
        optimizer: any.

    Example:
        >>> has_momentum_tail(AdamW([torch.zeros(2)])), has_momentum_tail(torch.optim.Adagrad([torch.zeros(2)]))
        (True, False)
    """
    return isinstance(optimizer, Adam | AdamW | SGD)


@torch.no_grad()
def momentum_tail_(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """The additional momentum step of MISA's algorithm, in place; call it before the optimizer state is released.

    A gradient lives on in the momentum and moves the weights in the steps that follow it. Where the state is released
    these steps are lost, so their sum is made at once: ``theta -= lr * b / (1 - b) * u``, where ``u`` is the direction
    of the optimizer's own last step: for Adam and AdamW ``m / (sqrt(v) + eps)`` with the optimizer's corrections of
    bias (and the largest ``v`` with ``amsgrad``) and ``b`` its first beta; for SGD the momentum buffer and ``b`` its
    momentum (once more times ``b`` with ``nesterov``). Weight decay is no part of it. A parameter without state, or an
    SGD without momentum, stays as it is.

    The paper's inner steps correct no bias, neither does its momentum step; ours does what the optimizer does, since
    after 50 steps ``v`` without its correction is 20 times too small.

    Args:
        optimizer: one that ``has_momentum_tail`` knows.
        parameters: those of the optimizer's parameters to move; plain tensors or DTensors.

    Raises:
        TypeError: for another optimizer.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = SGD([parameter], lr=0.1, momentum=0.9)
        >>> parameter.grad = torch.ones(1)
        >>> optimizer.step()  # by -0.1; of this gradient alone the steps to come add up to 9 times as much
        >>> momentum_tail_(optimizer, [parameter])
        >>> print(f"{parameter.item():.4f}")
        -1.0000

    Source: arXiv 2511.00056, the last line of the outer loop.
    """
    if not has_momentum_tail(optimizer):
        raise TypeError(f"the momentum of {type(optimizer).__name__} is not known: Adam, AdamW and SGD are")
    wanted = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if id(p) in wanted and optimizer.state.get(p)]
        if members:
            tail = _sgd if isinstance(optimizer, SGD) else _adam
            tail(members, [optimizer.state[p] for p in members], group)


def _adam(parameters: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    # With `maximize` the moments are those of the negated gradients already.
    beta1, beta2 = group["betas"]
    squares = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    for parameter, state in zip(parameters, states, strict=True):
        # Tensors, because a step on the device is not read; `capturable` and fused optimizers keep it there.
        correction1 = 1 - beta1 ** state["step"]
        correction2 = 1 - beta2 ** state["step"]
        # In at least 32 bits: a GPU rounds a 0-d tensor to the 16 bits of what it multiplies.
        wide = torch.promote_types(parameter.dtype, torch.float32)
        denominator = (state[squares].to(wide) / correction2.to(parameter.device)).sqrt_().add_(group["eps"])
        scale = group["lr"] * beta1 / (1 - beta1) / correction1
        parameter.sub_((state["exp_avg"].to(wide) * scale.to(parameter.device)).div_(denominator))


def _sgd(parameters: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    beta = group["momentum"]
    scale = group["lr"] * beta / (1 - beta) * (beta if group["nesterov"] else 1)
    for parameter, state in zip(parameters, states, strict=True):
        if state.get("momentum_buffer") is not None:
            parameter.sub_(state["momentum_buffer"] * scale)
