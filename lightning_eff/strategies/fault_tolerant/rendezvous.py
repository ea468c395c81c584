"""Where a replica stands in the run at a rendezvous with the others, who does what after it, and who must leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a replica is doing when it comes to a rendezvous.
RETRY = 0  # within an optimizer step that failed
AGREEING = 1  # between steps, in an operation that all take part in
START = 2  # before a step


class LeftBehindError(RuntimeError):
    """The others went on without this replica, and it cannot catch up where it stands: it has to start anew."""


class NoQuorumError(RuntimeError):
    """Too few replicas, or no lighthouse."""


class StrangerError(RuntimeError):
    """This replica does not belong to the run that it has come into: its index is taken, or it is of another run."""


@dataclass(frozen=True)
class Position:
    """What one replica tells the others at a rendezvous."""

    index: int
    step: int
    agreed: int
    where: int
    veteran: bool
    """Whether it has made steps with the others, and has missed none."""
    writer: bool
    waits: bool
    seed: int
    layout: int
    run: int
    """A digest of the run's id."""
    stays: int
    """Steps that it still takes part in before it leaves, -1 if it does not know yet how many; 0 if it stays."""

    def row(self) -> list[int]:
        """As integers."""
        return [int(value) for value in vars(self).values()]

    @staticmethod
    def of(row: Sequence[int]) -> Position:
        """From integers."""
        index, step, agreed, where, veteran, writer, waits, seed, layout, run, stays = row
        return Position(index, step, agreed, where, bool(veteran), bool(writer), bool(waits), seed, layout, run, stays)


def strangers(positions: Sequence[Position], count: int) -> dict[int, str]:
    """Those that have to leave, by rank, and why; the same for everybody who sees these positions.

    Who has made steps in the run stays. Where nobody has, the first one's run, model and index count.

    Args:
        positions: of all in a quorum, by rank.
        count: the largest number of replicas.

    Example:
        >>> old, new = [Position(1, 7, 0, START, veteran, False, False, 0, 0, 0, 0) for veteran in (True, False)]
        >>> list(strangers([new, old], count=3))
        [0]
    """
    first = next((position for position in positions if position.veteran), positions[0])
    found: dict[int, str] = {}
    taken = {position.index for position in positions if position.veteran}
    for rank, position in enumerate(positions):
        if position.veteran:
            continue
        if position.run != first.run:
            found[rank] = "it belongs to another run than the replicas that it has met: give each run a lighthouse"
        elif position.index >= count:
            found[rank] = f"its index {position.index} is too high for max_replicas={count}"
        elif position.index in taken:
            found[rank] = (
                f"a replica with its index {position.index} is in the run already. Is REPLICA_GROUP_ID set for each, "
                "and does another run use the same lighthouse?"
            )
        elif position.layout != first.layout:
            found[rank] = (
                "its model has other parameters in training, or of other shapes, than the run that it comes into, also "
                "after it has taken that run's state: is it the same script with the same arguments?"
            )
        else:
            taken.add(position.index)
    return found


def writer_of(positions: Sequence[Position]) -> Position:
    """Who writes files, and whose seed holds: whoever did so far, since files change hands as rarely as possible."""
    veterans = [position for position in positions if position.veteran]
    return next((position for position in positions if position.writer), (veterans or positions)[0])
