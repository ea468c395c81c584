"""Averages of the weights along a run: snapshots (CheckpointAveraging) and exponential ones (EMA)."""

from lightning_eff.callbacks.averaging.checkpoint_averaging import CheckpointAveraging
from lightning_eff.callbacks.averaging.ema import EMA

__all__ = ["EMA", "CheckpointAveraging"]
