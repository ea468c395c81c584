"""A factor on the learning rates that no scheduler sees."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class RateFactor:
    """Multiplies the learning rates of optimizers, within their steps alone.

    Between two steps ``param_groups`` have the scheduler's own rates, so that it works with every scheduler: those that
    compute the next rate from the present one as well as those that do not, and none at all. With the factor 1 nothing
    is touched.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> rates = RateFactor()
        >>> rates.attach([optimizer])
        >>> rates.factor = 0.5
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (0.75, 0.5)
        >>> rates.detach()
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._own: list[tuple[dict[str, Any], float | Tensor]] = []  # groups with their own rates, within a step

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Act on the steps of these optimizers from now on; nothing is done for those of the last call."""
        if len(optimizers) == len(self._optimizers) and all(map(is_, optimizers, self._optimizers)):
            return
        self.detach()
        self._optimizers = list(optimizers)
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def detach(self) -> None:
        """Act no longer. The rates are the scheduler's, also after an exception within a step."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore()  # the step before has ended with an exception that somebody has caught
        if self.factor == 1.0:
            return
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if rate is None:  # an optimizer that finds its step by itself
                continue
            if isinstance(rate, Tensor):  # compiled and captured optimizers hold on to the tensor itself
                self._own.append((group, rate.clone()))
                rate.mul_(self.factor)
            else:
                self._own.append((group, rate))
                group["lr"] = rate * self.factor

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        while self._own:
            group, rate = self._own.pop()
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

    def __getstate__(self) -> dict[str, Any]:
        return {"factor": self.factor, "_optimizers": [], "_handles": [], "_own": []}
