"""How far a run has come."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import lr_scheduler

from lightning_eff.functional.wsd import WSD


def fraction_done(trainer: Trainer, steps: int) -> float | None:
    """Which fraction of the run is behind it, by the limit that ends it first; None where there is no limit.

    Limits are ``max_steps``, and ``max_epochs`` of an epoch with a known number of batches; not ``max_time``, which is
    another fraction on every rank.

    Args:
        trainer: one whose ``fit`` is running, with its data loaded (``on_train_start`` and later).
        steps: what to take for ``trainer.global_step``: plus 1 where the current step has not been made yet.
    """
    fractions = []
    if trainer.max_steps > 0:
        fractions.append(steps / trainer.max_steps)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs > 0 and math.isfinite(batches) and batches > 0:
        fractions.append((trainer.fit_loop.epoch_loop.total_batch_idx + 1) / (epochs * batches))
    return max(fractions) if fractions else None


def passed_slots(done: float, start: float, count: int) -> int:
    """How many of ``count`` evenly spaced times between ``start`` and the end of a run have passed.

    Example:
        >>> [passed_slots(done, 0.5, 4) for done in (0.2, 0.55, 0.6, 0.95, 1.0)]
        [0, 0, 1, 4, 4]
    """
    return max(0, min(count, int((done - start) / (1 - start) * (count + 1) + 1e-9)))


def next_slot(done: float, start: float, count: int) -> float:
    """The first of these times that is not before ``done``; infinity behind the last.

    Example:
        >>> [next_slot(done, 0.5, 4) for done in (0.2, 0.6, 0.65, 0.95)]
        [0.6, 0.6, 0.7, inf]
    """
    number = max(1, math.ceil((done - start) / (1 - start) * (count + 1) - 1e-9))
    return start + number * (1 - start) / (count + 1) if number <= count else math.inf


def rising_again(trainer: Trainer) -> str | None:
    """The name of a scheduler that is made to raise the rate after it has let it fall; None: there is none known."""
    found: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    while found:
        scheduler = found.pop()
        if isinstance(scheduler, lr_scheduler.CosineAnnealingWarmRestarts | lr_scheduler.CyclicLR):
            return type(scheduler).__name__
        if isinstance(scheduler, WSD) and len(scheduler.ends) > 1:
            return "WSD with several ends"
        found.extend(getattr(scheduler, "_schedulers", ()))  # of SequentialLR and ChainedScheduler
    return None


def may_stop(trainer: Trainer) -> bool:
    """Whether Lightning ends the training for ``trainer.should_stop``: ``min_steps`` and ``min_epochs`` are reached."""
    return trainer.fit_loop._can_stop_early
