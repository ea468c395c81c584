"""The suite's strategies for a Trainer of ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from lightning_eff.strategies.compressed_ddp import CompressedDDP
from lightning_eff.strategies.fault_tolerant.strategy import FaultTolerantDDP
from lightning_eff.strategies.fsdp2.strategy import FSDP2

__all__ = ["CompressedDDPStrategy", "FSDP2Strategy", "FaultTolerantDDPStrategy"]


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


class FSDP2Strategy(FSDP2, ModelParallelStrategy):  # type: ignore[misc]
    """As :class:`lightning_eff.strategies.FSDP2Strategy`.

    Example:
        >>> FSDP2Strategy(forward_methods=["generate"]).forward_methods
        ['generate']
    """
