"""How long the replicas of a fault-tolerant run wait for each other, and how often they try."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lightning_eff.arguments import check, is_count


@dataclass(frozen=True)
class Limits:
    """Timeouts in seconds, and counts; see `FaultTolerantDDPStrategy`.

    Raises:
        ValueError: a timeout is not positive, or a count is no count.
    """

    heartbeat_timeout: float = 5.0
    """After which the lighthouse takes a silent replica for dead."""
    collective_timeout: float = 60.0
    """For one collective: how long a peer may be silent within a step."""
    connect_timeout: float = 10.0
    """To connect to the lighthouse, and to the peers after a change."""
    quorum_timeout: float = 600.0
    """For which a replica waits for the others before a step."""
    heal_timeout: float = 300.0
    """For which the others wait while one gets the state of the run."""
    start_grace: float = 60.0
    """For which the first step waits for all replicas."""
    quorum_retries: int = 20
    """How often a lighthouse that does not answer is asked again."""
    max_aborts: int = 10
    """How often one step may fail in a row."""
    min_replicas: int = 1
    """Fewer than these do not train."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_timeout"):
                check(field.name, value, value > 0, "seconds, above 0")
        check("start_grace", self.start_grace, self.start_grace >= 0, "seconds, at least 0")
        check("min_replicas", self.min_replicas, is_count(self.min_replicas), "an integer, at least 1")
        for name in ("quorum_retries", "max_aborts"):
            value = getattr(self, name)
            check(name, value, value == 0 or is_count(value), "an integer, at least 0")

    @property
    def patience(self) -> float:
        """After which a replica that waits asks whether the others went on without it."""
        return max(5.0, self.heartbeat_timeout)
