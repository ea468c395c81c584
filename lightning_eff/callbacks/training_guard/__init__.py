"""TrainingGuard: hears alarms, and goes back to an earlier state of the run when it must."""

from lightning_eff.callbacks.training_guard.callback import TrainingGuard

__all__ = ["TrainingGuard"]
