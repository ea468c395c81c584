"""How long the replicas of a fault-tolerant run wait for each other, and how often they try."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lightning_eff.arguments import check_count, check_number

SLOWEST = 10e6
"""Bytes a second: a state that comes more slowly counts as one that does not come."""


@dataclass(frozen=True)
class Limits:
    """Timeouts in seconds, and counts; see `FaultTolerantDDPStrategy`.

    Raises:
        ValueError: a timeout is not a number of seconds above 0, or a count is not an integer.
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
    """For which the others wait while one gets the state of the run, beside the time that its size takes."""
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
            if field.name.endswith("_timeout"):
                check_number(field.name, getattr(self, field.name), above=0, unit="seconds")
        check_number("start_grace", self.start_grace, least=0, unit="seconds")
        check_count("min_replicas", self.min_replicas)
        check_count("quorum_retries", self.quorum_retries, least=0)
        check_count("max_aborts", self.max_aborts, least=0)

    def to_heal(self, size: int) -> float:
        """Seconds for which the others wait for one that gets a state of ``size`` bytes.

        >>> Limits(heal_timeout=60.0).to_heal(5 * 10**9)
        560.0
        """
        return self.heal_timeout + size / SLOWEST

    @property
    def patience(self) -> float:
        """After which a replica that waits asks whether the others went on without it."""
        return max(5.0, self.heartbeat_timeout)
