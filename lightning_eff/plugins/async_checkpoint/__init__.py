"""Checkpoints that are copied while training waits, and written while it goes on."""

from lightning_eff.plugins.async_checkpoint.io import AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO"]
