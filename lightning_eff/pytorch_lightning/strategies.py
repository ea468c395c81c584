"""The suite's strategies for a Trainer of ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy

from lightning_eff.strategies.compressed_ddp import CompressedDDP
from lightning_eff.strategies.fault_tolerant.strategy import FaultTolerantDDP

__all__ = ["CompressedDDPStrategy", "FaultTolerantDDPStrategy"]


class CompressedDDPStrategy(CompressedDDP, DDPStrategy):  # type: ignore[misc]  # two classes of one name to mypy
    """As :class:`lightning_eff.strategies.CompressedDDPStrategy`.

    Example:
        >>> import pytorch_lightning as pl
        >>> from lightning_eff.strategies import ArcTopK
        >>> trainer = pl.Trainer(strategy=CompressedDDPStrategy(ArcTopK(ratio=0.1)), accelerator="cpu", logger=False)
    """


class FaultTolerantDDPStrategy(FaultTolerantDDP, DDPStrategy):  # type: ignore[misc]
    """As :class:`lightning_eff.strategies.FaultTolerantDDPStrategy`.

    Example:
        >>> strategy = FaultTolerantDDPStrategy(max_replicas=3, replica=0, lighthouse="http://127.0.0.1:29510")
    """
