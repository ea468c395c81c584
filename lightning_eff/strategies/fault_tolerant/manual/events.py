"""What the replicas do together within one ``training_step``, and whether all of them do the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BACKWARD, END, STEP = 0, 1, 2  # the step of optimizer i is STEP + i


class Leave(BaseException):
    """Ends a run of ``training_step`` before its end. No `Exception`: the user's code is not to catch it."""


class OtherPathError(RuntimeError):
    """Two runs of ``training_step`` that should have done the same did not."""


@dataclass
class Event:
    """What came of something that all did together, for a run of ``training_step`` that comes by again."""

    kind: int
    parameters: list[tuple[nn.Parameter, Tensor]]
    """Their values after it."""
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    groups: list[list[dict[str, Any]]] | None
    """Learning rates and the like after it."""
    whole: bool = False
    """Whether it stands for a part that a peer has handed over, with all backward passes in it."""


def name_of(kind: int) -> str:
    """In words.

    >>> name_of(END), name_of(STEP + 1)
    ('its end', 'a step of optimizer 1')
    """
    if kind in (BACKWARD, END):
        return "a backward pass" if kind == BACKWARD else "its end"
    return f"a step of optimizer {kind - STEP}"


@dataclass
class Standing:
    """Where a replica stands, to be compared with the others' by one sum.

    Args:
        kind: of what it is about to do, or has done.
        batch: index of the batch in the run.
        part: of training_step.
        place: in the part.

    Example:
        >>> here, there = Standing(BACKWARD, batch=7, part=0), Standing(STEP, batch=7, part=0)
        >>> here.check(here.words(None, [True]) + here.words(None, [False]), None)
        [1]
        >>> here.check(here.words(None, [True]) + there.words(None, [False]), None)
        Traceback (most recent call last):
        lightning_eff.strategies.fault_tolerant.manual.events.OtherPathError: the optimizer steps ...
    """

    kind: int
    batch: int
    part: int
    place: int = 0

    @property
    def number(self) -> int:
        """The same where all is the same; small, so that sums of its square are exact."""
        return ((self.batch % 1024 * 64 + self.part % 64) * 16 + self.place % 16) * 64 + self.kind % 64

    def words(self, complaint: str | None, flags: list[bool]) -> Tensor:
        """To be summed over the replicas.

        Args:
            complaint: of a neighbour's run, which the others have to know of.
            flags: to be counted as well.
        """
        return torch.tensor([1, self.number, self.number**2, complaint is not None, *flags])

    def check(self, words: Tensor, complaint: str | None) -> list[int]:
        """See to it that all stand here; the sums of the flags are returned.

        Raises:
            OtherPathError: on all replicas, if one stands elsewhere or has a complaint.
        """
        count, total, squares, complaints, *flags = words.tolist()
        # Numbers without variance are equal.
        if complaints or total != count * self.number or squares != count * self.number**2:
            raise OtherPathError(
                "the optimizer steps and backward passes of training_step differ between shards, so that their "
                f"gradients do not belong together: this replica's has come to {name_of(self.kind)} in part "
                f"{self.part}"
                + (f"; {complaint}" if complaint else "")
                + ". Which steps there are, and in which order, must not depend on the batch"
            )
        return flags
