"""An orderly leave: nobody waits for the heartbeat timeout of a replica that goes on purpose."""

from __future__ import annotations

import math
import time


class Departure:
    """Of this replica or of another one.

    The lighthouse cannot be told that somebody goes, and a request for a quorum counts as a heartbeat. So all agree, at
    a rendezvous, to make some more steps without asking for a quorum. Meanwhile the one that leaves sends no
    heartbeats, and when these steps are over the lighthouse has forgotten it.

    Args:
        seconds: that the lighthouse needs for that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.wanted = False
        """Whether this replica is to leave."""
        self.status = 0
        """The exit status with which it does."""
        self._until: int | None = None  # the step before which nobody asks for a quorum
        self._last_step: float | None = None
        self._step_seconds = 0.0

    @property
    def agreed(self) -> bool:
        """Whether the others know of it."""
        return self._until is not None

    def note_step(self) -> None:
        """A step is over."""
        now = time.monotonic()
        if self._last_step is not None:
            self._step_seconds = now - self._last_step
        self._last_step = now

    def steps_to_stay(self) -> int:
        """As many as the lighthouse needs, and one more; 0 if this replica stays.

        -1 until it has seen how long a step takes: the first one compiles, say. Unless another one leaves as well, it
        says so again before the next step.
        """
        if not self.wanted:
            return 0
        return math.ceil(self.seconds / max(1e-3, self._step_seconds)) + 1 if self._step_seconds else -1

    def agree(self, step: int, stay: int) -> None:
        """At a rendezvous before ``step`` it came out that somebody leaves after ``stay`` more; below 1 for nobody."""
        self._until = step + stay if stay > 0 else None

    def under_way(self, step: int) -> bool:
        """Whether this step is one of those."""
        return self._until is not None and step < self._until

    def end(self) -> None:
        """These steps are over, or one of them has failed: this replica leaves if it wanted to.

        Raises:
            SystemExit: with `status`.
        """
        if self.wanted and self.agreed:
            raise SystemExit(self.status)
        self._until = None
