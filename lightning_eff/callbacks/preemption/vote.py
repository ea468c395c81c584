"""How the ranks agree on the step at which to stop, without a step that waits for the others."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class Vote:
    """A question that all ranks are asked at every tick, and answer together some ticks later.

    Every ``every`` ticks the answers since then are reduced by an all-reduce of three integers that nobody waits for
    until the next one is due. It goes over a gloo group of its own: no device is synchronised, and nothing comes
    between the collectives of the training. The ticks go into it, so that ranks which have drifted apart notice.

    With one rank there is no group, and an answer is known at once.

    Args:
        every: ticks between two reductions, >= 1. A yes is known to all after at most ``2 * every`` ticks.
        timeout: seconds until a rank that does not answer is an error.
    """

    def __init__(self, every: int, timeout: float) -> None:
        self.every = every
        self.timeout = timedelta(seconds=timeout)
        self.reductions = 0
        self._group: dist.ProcessGroup | None = None
        self._ticks = 0
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def attach(self) -> None:
        """Make the group; collective. Call it once the default process group is there."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)

    def tick(self, yes: bool) -> bool:
        """Say yes or no, on all ranks equally often; whether some rank has said yes, the same on all ranks.

        Raises:
            RuntimeError: the ranks are not at the same tick, or one does not answer.
        """
        self._ticks += 1
        if self._group is None:
            return yes
        if self._ticks % self.every:
            return False
        agreed = self._read()
        answer = torch.tensor([int(yes), self._ticks, -self._ticks])
        work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending, self.reductions = (work, answer), self.reductions + 1
        return agreed

    def _read(self) -> bool:
        if self._pending is None:
            return False
        (work, answer), self._pending = self._pending, None
        work.wait()
        yes, latest, earliest = answer.tolist()
        if latest != -earliest:
            raise RuntimeError(
                f"Preemption: a rank has seen {latest} batches and another {-earliest}, so they cannot agree on a step "
                "to stop at: give all ranks equally many batches"
            )
        return bool(yes)

    def detach(self) -> None:
        """The group ends; not collective, and nobody is waited for."""
        self._pending = None
        if self._group is not None:
            if dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_group": None, "_pending": None}
