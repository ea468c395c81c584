"""What freezing will save in a run, said at half time, and what it has saved, said at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_eff.callbacks.grades.progress import next_slot

WORTH_IT = 0.01
"""A part of the run below which a saving is called none: so little is lost among what a machine's times differ by."""


@dataclass(frozen=True)
class Saving:
    """What freezing saves of a run.

    Attributes:
        frozen: how many units are frozen before the end.
        backward: the part of the backward passes' products with weights that is left out, in the steps that are made.
        steps: the part of the steps that is not made, as the training stops.
        end: the part of the run at which it ends.
    """

    frozen: int
    backward: float
    steps: float
    end: float

    @property
    def worth_it(self) -> bool:
        """Whether it is anything to speak of: at least `WORTH_IT`."""
        return self.backward + self.steps >= WORTH_IT

    def words(self) -> str:
        """The two parts."""
        return f"{self.backward:.1%} of the backward passes' products with weights and {self.steps:.1%} of the steps"


def saving(times: Sequence[float], weights: Sequence[float], limit: int, may_end: bool, end: float = 1.0) -> Saving:
    """What is saved where units are frozen at these parts of a run.

    Args:
        times: for each unit the part of the run at which it is frozen; infinity: never.
        weights: the part of a backward pass that freezing each unit leaves out.
        limit: how many units may be frozen; the first are.
        may_end: whether the run ends when so many are.
        end: the part of the run at which it ends otherwise.

    Example:
        >>> saving([0.5, 0.75, math.inf], [0.2, 0.2, 0.2], limit=2, may_end=True)
        Saving(frozen=2, backward=0.06666666666666667, steps=0.25, end=0.75)
    """
    order = sorted(range(len(times)), key=lambda unit: times[unit])[:limit]
    if may_end and times[order[-1]] <= end:
        end = times[order[-1]]
    frozen = [unit for unit in order if times[unit] <= end]
    spared = sum(weights[unit] * (end - times[unit]) for unit in frozen)
    return Saving(len(frozen), spared / end if end else 0.0, 1 - end, end)


def frozen_at(settled: Sequence[float], alpha: float, events: int | None, ends: bool) -> list[float]:
    """When units that settle at these parts of a run are frozen: at the next of so many events, or when the run ends.

    Args:
        settled: infinity: never.
        alpha: the grace period.
        events: how many there are; None: at any time.
        ends: whether the run ends at once when the last has settled.
    """
    if events is None:
        return list(settled)
    last = max(settled)
    slots = [next_slot(each, alpha, events) if math.isfinite(each) else math.inf for each in settled]
    return [min(slot, last) if ends and math.isfinite(last) else slot for slot in slots]


def at_half_time(found: Saving, units: int, step: int, done: float) -> str:
    """The forecast in words to act on.

    Args:
        found: what is to be saved.
        units: how many are watched.
        step: the present one.
        done: the part of the run that is behind it.
    """
    total = round(step / done)
    head = f"GradES, step {step} of {total}: if rate and gradients go on falling as they have"
    if not found.worth_it:
        return (
            f"{head}, {found.frozen} of {units} matrices will be frozen by the end, which saves {found.words()}: next "
            "to nothing. It pays where the learning rate decays to 0, or training goes on for many epochs after the "
            "data are learned; in a run that is still learning leave it out"
        )
    stops = ", where training stops (stop_when_frozen=False: it does not)" if found.steps else ""
    return (
        f"{head}, {found.frozen} of {units} matrices will be frozen by step {round(found.end * total)}{stops}, which "
        f"saves about {found.words()}"
    )
