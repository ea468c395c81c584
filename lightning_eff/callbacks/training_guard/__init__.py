"""TrainingGuard: hears alarms, and goes back to an earlier state of the run when it must."""

from lightning_eff.callbacks.training_guard.callback import TrainingDivergedError, TrainingGuard
from lightning_eff.callbacks.training_guard.growth import AttentionLogits, WeightGrowth
from lightning_eff.callbacks.training_guard.rules import AlarmRule, ExplodingLoss, GradientSpikes, NonFiniteLoss

__all__ = [
    "AlarmRule",
    "AttentionLogits",
    "ExplodingLoss",
    "GradientSpikes",
    "NonFiniteLoss",
    "TrainingDivergedError",
    "TrainingGuard",
    "WeightGrowth",
]
