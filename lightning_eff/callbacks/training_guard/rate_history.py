"""Tells from the learning rates of a run when its past says nothing of what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def highest_rate(optimizers: Sequence[Optimizer]) -> Tensor | float | None:
    """The highest rate of all parameter groups, without waiting for those that are tensors; None: there are none.

    A group without one, or with None, is of an optimizer that finds its step by itself.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [rate for group in groups if (rate := group.get("lr")) is not None]
    tensors = [rate.detach().reshape(()) for rate in rates if isinstance(rate, Tensor)]
    numbers = [float(rate) for rate in rates if not isinstance(rate, Tensor)]
    if not tensors:
        return max(numbers, default=None)
    return torch.stack(tensors).max().clamp(min=max(numbers, default=-inf))


class RateHistory:
    """Whether the rate is warmed again: it rises by a fifth, and not beyond what the run has lived with before.

    A rate that rises further than ever is no such time: a first warm-up has no past to forget, and a schedule with a
    mistake must not silence whoever watches for what it does.

    Example:
        >>> history = RateHistory()
        >>> [history.warms_again(rate) for rate in (0.1, 0.2, 0.05, 0.055, 0.1, 0.11, 0.3)]
        [False, False, False, False, True, False, False]
    """

    def __init__(self) -> None:
        self._highest = 0.0
        self._lowest = inf  # since the highest, or since the rate was last warmed again

    def warms_again(self, rate: float | None) -> bool:
        """Take the rate of a step, in the order of the steps."""
        if rate is None:
            return False
        if rate > self._highest:
            self._highest = self._lowest = rate
            return False
        again = rate > 1.2 * self._lowest
        self._lowest = rate if again else min(self._lowest, rate)
        return again

    def state_dict(self) -> dict[str, Any]:
        """Two numbers."""
        return {"highest": self._highest, "lowest": self._lowest}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take them back; None: there are none, and the history begins."""
        self._highest, self._lowest = (state["highest"], state["lowest"]) if state else (0.0, inf)
