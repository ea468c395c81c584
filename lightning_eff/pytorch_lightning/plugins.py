"""The suite's plugins for a Trainer of ``pytorch_lightning``."""

from __future__ import annotations

from lightning_fabric.plugins import CheckpointIO

from lightning_eff.plugins.async_checkpoint import AsyncCheckpointIO as _AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO"]


class AsyncCheckpointIO(_AsyncCheckpointIO, CheckpointIO):
    """As :class:`lightning_eff.plugins.AsyncCheckpointIO`; ``AsyncCheckpoint`` is one callback for both names.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(plugins=[AsyncCheckpointIO()], accelerator="cpu", logger=False)
    """
