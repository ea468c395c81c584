"""How many updates each optimizer has really made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class UpdateCount:
    """Counts the steps of each optimizer that changed something; ``trainer.global_step`` counts attempts.

    A step that a GradScaler skips does not count, nor one without any gradient, nor one that a fused optimizer's
    kernel skips because of ``optimizer.found_inf`` (set by a GradScaler or by a callback). What only the device knows
    is summed there, so that counting never waits; reading the exact count does, where it has to.

    The owner, a callback or a strategy, attaches it in ``on_fit_start``, when the optimizers exist, and detaches it
    in ``teardown``. Whoever removes ``optimizer.found_inf`` in a post-hook of the step registers that later.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
        >>> updates = UpdateCount()
        >>> updates.attach([optimizer])
        >>> optimizer.step()  # there is no gradient yet
        >>> parameter.sum().backward()
        >>> optimizer.step()
        >>> updates.exact()
        1
        >>> updates.detach()
    """

    def __init__(self) -> None:
        self._steps: list[int] = []  # with a gradient, as the host sees it
        self._skipped: list[Tensor | None] = []  # of those, skipped on the device; int64, 0-d
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Count the steps of these optimizers from now on, ``trainer.optimizers`` for instance.

        The counts go on from where they stand (after ``load_state_dict``, or in a second ``fit``); with another
        number of optimizers than before they start at zero. Attaching again replaces the first attachment.
        """
        self.detach()
        if len(self._steps) != len(optimizers):
            self._steps = [0] * len(optimizers)
            self._skipped = [None] * len(optimizers)
        for index, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_post_hook(_Counter(self, index)))

    def counts(self, optimizer: Optimizer) -> bool:
        """Whether the steps of this optimizer are counted; not of one that is made anew in the midst of a fit."""
        hooks = optimizer._optimizer_step_post_hooks.values()
        return any(isinstance(hook, _Counter) and hook.updates is self for hook in hooks)

    def detach(self) -> None:
        """Stop counting; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def at_most(self, optimizer: int = 0) -> int:
        """An upper bound that needs no waiting: exact unless a fused optimizer has skipped steps on the device.

        A method that acts every n updates asks for ``exact`` only once ``at_most`` has reached the next one.
        """
        return self._steps[optimizer] if self._steps else 0

    def exact(self, optimizer: int = 0) -> int:
        """The number of updates of one optimizer. Waits for the device if some may have been skipped there."""
        if not self._steps:
            return 0
        skipped = self._skipped[optimizer]
        return self._steps[optimizer] - (0 if skipped is None else int(skipped))

    def total(self) -> int:
        """The updates of all optimizers together. Waits as ``exact`` does."""
        return sum(self.exact(index) for index in range(len(self._steps)))

    def state_dict(self) -> dict[str, Any]:
        """The counts as plain integers. Waits as ``exact`` does."""
        return {"updates": [self.exact(index) for index in range(len(self._steps))]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved counts; before or after ``attach``."""
        self._steps = list(state["updates"])
        self._skipped = [None] * len(self._steps)

    def _count(self, index: int, optimizer: Optimizer) -> None:
        # An optimizer passes over a parameter without gradient, so without any it changes nothing.
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return
        self._steps[index] += 1
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            skip = (found_inf.detach() != 0).to(torch.int64).reshape(())
            skipped = self._skipped[index]
            self._skipped[index] = skip if skipped is None else skipped.to(skip.device).add_(skip)


class _Counter:
    """A hook that can be pickled and copied, which a closure cannot."""

    def __init__(self, updates: UpdateCount, index: int) -> None:
        self.updates = updates
        self.index = index

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.updates._count(self.index, optimizer)
