"""Preemption: a signal, a notice or a clock ends a run between two steps, with its state saved."""

from lightning_eff.callbacks.preemption.callback import Preemption

__all__ = ["Preemption"]
