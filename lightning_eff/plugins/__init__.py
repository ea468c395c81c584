"""What a user passes as ``Trainer(plugins=[...])``."""

from lightning_eff.plugins.async_checkpoint import AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO"]
