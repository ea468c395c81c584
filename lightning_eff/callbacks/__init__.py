"""What a user adds to the Trainer, and what its arguments take."""

from lightning_eff.callbacks.async_checkpoint import AsyncCheckpoint
from lightning_eff.callbacks.averaging import EMA, CheckpointAveraging
from lightning_eff.callbacks.compression_monitor import CompressionMonitor
from lightning_eff.callbacks.exact_resume import ExactResume
from lightning_eff.callbacks.fault_injector import FaultInjector, InjectedError
from lightning_eff.callbacks.grades import GradES
from lightning_eff.callbacks.gradient_stats import GradientStats
from lightning_eff.callbacks.misa import MISA
from lightning_eff.callbacks.model_surgery import ModelSurgery
from lightning_eff.callbacks.preemption import Preemption
from lightning_eff.callbacks.run_health import RunHealth
from lightning_eff.callbacks.spectral_alignment import SpectralAlignmentMonitor
from lightning_eff.callbacks.tensorboard_layout import TensorBoardLayout
from lightning_eff.callbacks.training_guard import (
    AlarmRule,
    AttentionLogits,
    ExplodingLoss,
    GradientSpikes,
    NonFiniteLoss,
    TrainingDivergedError,
    TrainingGuard,
    WeightGrowth,
)
from lightning_eff.callbacks.zclip import ZClip
from lightning_eff.training.alarms import Alarm, sound

__all__ = [
    "EMA",
    "MISA",
    "Alarm",
    "AlarmRule",
    "AsyncCheckpoint",
    "AttentionLogits",
    "CheckpointAveraging",
    "CompressionMonitor",
    "ExactResume",
    "ExplodingLoss",
    "FaultInjector",
    "GradES",
    "GradientSpikes",
    "GradientStats",
    "InjectedError",
    "ModelSurgery",
    "NonFiniteLoss",
    "Preemption",
    "RunHealth",
    "SpectralAlignmentMonitor",
    "TensorBoardLayout",
    "TrainingDivergedError",
    "TrainingGuard",
    "WeightGrowth",
    "ZClip",
    "sound",
]
