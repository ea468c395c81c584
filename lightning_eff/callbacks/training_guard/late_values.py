"""Numbers of each step, averaged over the ranks and read some steps later, so that no step waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.training.host_copy import HostCopy

Row = tuple[int, list[float | None]]


class LateValues:
    """Collects a few numbers a step on the device, and hands them to the host a block at a time.

    A block of ``every`` steps is copied to the host behind its last step, without waiting, and read in the step after
    that: a number is read between 1 and ``every`` steps after its own. The means over the ranks are equal on all ranks.

    Collectives: one all-reduce of 2 ``columns`` numbers a step, asynchronous; all ranks record the same steps.

    Args:
        columns: numbers a step.
        every: steps of a block, >= 1.

    Example:
        >>> values = LateValues(columns=2, every=2)
        >>> device = torch.device("cpu")
        >>> [values.record(step, [torch.tensor(step * 0.5), None], device) for step in (1, 2, 3)]
        [[], [], [(1, [0.5, None]), (2, [1.0, None])]]
    """

    def __init__(self, columns: int, every: int) -> None:
        self.columns = columns
        self.every = every
        self._steps: list[int] = []  # of the block that is being filled
        self._block = torch.zeros(0)  # float32, (every, 2 columns): sums over the ranks, and how many ranks had one
        self._reductions: list[Any] = []
        self._landing: _Landing | None = None

    def record(self, step: int, values: Sequence[Tensor | float | None], device: torch.device) -> list[Row]:
        """Take the numbers of a step, None for one that is not there; returns those of earlier steps that are read now.

        The mean of a number is over the ranks that have it, None if no rank has.
        """
        rows = self._land()
        if self._block.shape != (self.every, 2 * self.columns) or self._block.device != device:
            before, self._block = self._block, torch.zeros(self.every, 2 * self.columns, device=device)
            if self._steps:  # restored from a checkpoint
                self._block[: len(self._steps)] = before[: len(self._steps)].to(device)
        row = self._block[len(self._steps)]
        here = [value.detach().float().to(device) if isinstance(value, Tensor) else value for value in values]
        there = [0.0 if value is None else 1.0 for value in here]
        numbers = [0.0 if value is None else value for value in here]
        filled = [x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in (*numbers, *there)]
        torch.stack([number.reshape(()) for number in filled], out=row)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._reductions.append(dist.all_reduce(row, async_op=True))
        self._steps.append(step)
        if len(self._steps) == self.every:
            self._launch()
        return rows

    def flush(self) -> list[Row]:
        """Read everything now; waits for the device. On all ranks together, or on none."""
        rows = self._land()
        if self._steps:
            self._launch()
        return rows + self._land()

    def _settle(self) -> None:
        for reduction in self._reductions:
            reduction.wait()  # of the device's queue, with NCCL; the reductions were begun steps ago
        self._reductions = []

    def _launch(self) -> None:
        self._settle()
        block = self._block[: len(self._steps)]
        sent = block.clone()  # the next block is written over this one
        self._landing = _Landing(self._steps, HostCopy(sent))
        self._steps = []

    def _land(self) -> list[Row]:
        landing, self._landing = self._landing, None
        if landing is None:
            return []
        rows: list[Row] = []
        for step, row in zip(landing.steps, landing.copy.read().tolist(), strict=True):
            sums, counts = row[: self.columns], row[self.columns :]
            rows.append((step, [s / n if n else None for s, n in zip(sums, counts, strict=True)]))
        return rows

    def clear(self) -> None:
        """Forget what has not been read."""
        self._settle()
        self._steps, self._landing = [], None

    def state_dict(self) -> dict[str, Any]:
        """What has not been read, equal on all ranks: tensors of its own, on the device. Does not wait for it."""
        self._settle()
        landing = self._landing
        return {
            "steps": list(self._steps),
            "block": self._block[: len(self._steps)].clone() if self._steps else torch.zeros(0),
            "landing_steps": [] if landing is None else list(landing.steps),
            "landing": torch.zeros(0) if landing is None else landing.copy.source.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; what is of another number of columns, or of a longer block, is forgotten."""
        self.clear()
        block, landing = state["block"], state["landing"]
        width = 2 * self.columns
        if state["steps"] and block.shape[1] == width and len(block) < self.every:
            self._block = torch.zeros(self.every, width, device=block.device)
            self._block[: len(block)] = block
            self._steps = list(state["steps"])
        if state["landing_steps"] and landing.shape[1] == width:
            self._landing = _Landing(list(state["landing_steps"]), HostCopy(landing.clone()))

    def __getstate__(self) -> dict[str, Any]:
        state = self.state_dict()
        return {"columns": self.columns, "every": self.every, "state": state}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        LateValues.__init__(self, saved["columns"], saved["every"])
        self.load_state_dict(saved["state"])


@dataclass
class _Landing:
    """A block on its way to the host."""

    steps: list[int]
    copy: HostCopy
