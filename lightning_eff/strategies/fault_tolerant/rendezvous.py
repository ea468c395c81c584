"""Where a replica stands in the run when it meets the others, and when it cannot."""

from __future__ import annotations

from dataclasses import dataclass

# Where a replica stands when it meets the others.
RETRY = 0  # within an optimizer step that failed
AGREEING = 1  # between steps, in an operation that all take part in
START = 2  # before a step


class LeftBehindError(RuntimeError):
    """The others went on without this replica, and it cannot catch up where it stands: it has to start anew."""


class NoQuorumError(RuntimeError):
    """Too few replicas, or no lighthouse."""


@dataclass(frozen=True)
class Place:
    """What one replica tells the others after each change of membership."""

    index: int
    step: int
    agreed: int
    where: int
    veteran: bool
    writer: bool
    waits: bool
    seed: int
    layout: int

    def row(self) -> list[int]:
        """As integers."""
        return [int(value) for value in vars(self).values()]

    @staticmethod
    def of(row: list[int]) -> Place:
        """From integers."""
        index, step, agreed, where, veteran, writer, waits, seed, layout = row
        return Place(index, step, agreed, where, bool(veteran), bool(writer), bool(waits), seed, layout)
