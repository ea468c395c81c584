"""What the ranks tell each other every n steps: one all-gather that nobody waits for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Numbers = npt.NDArray[np.float64]
"""On the host: what is judged of them has nothing to do with a device."""


class Exchange:
    """Gathers a vector of every rank, some steps late.

    It goes over a gloo group of its own: no device is synchronised, and nothing comes between the collectives of the
    training. Where the ranks' hosts end each step together, what was sent is there one step later.

    With one rank there is no group, and nothing is sent.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.sent = 0
        self._pending: tuple[dist.Work, Numbers] | None = None
        self._own: Numbers | None = None  # of one rank alone

    def attach(self) -> None:
        """Make the group; collective. Call it once the default process group is there."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")

    def send(self, vector: Numbers) -> None:
        """Send numbers to all ranks, once those that were sent before have been read."""
        if self.group is None:
            self._own = vector
            return
        gathered = np.empty((dist.get_world_size(self.group), len(vector)))
        into = list(torch.from_numpy(gathered).unbind())  # the same memory
        work = dist.all_gather(into, torch.from_numpy(vector), group=self.group, async_op=True)
        assert work is not None
        self._pending, self.sent = (work, gathered), self.sent + 1

    def read(self) -> Numbers | None:
        """What all ranks sent the last time, (ranks, numbers); None if nothing is under way."""
        if self._own is not None:
            own, self._own = self._own, None
            return own[None]
        if self._pending is None:
            return None
        (work, gathered), self._pending = self._pending, None
        work.wait()
        return gathered

    def detach(self) -> None:
        """The group ends; not collective, and nobody is waited for."""
        pending, self._pending, self._own = self._pending, None, None
        if self.group is not None:
            # A gather that the others have left alone stays with its group until the process ends: gloo does not
            # survive that its group goes first.
            if dist.is_initialized() and (pending is None or pending[0].is_completed()):
                dist.destroy_process_group(self.group)
            self.group = None
