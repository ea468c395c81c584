"""FSDP2 on any LightningModule, saved without a stall."""

from lightning_eff.strategies.fsdp2.strategy import FSDP2Strategy
from lightning_eff.strategies.fsdp2.whole_weights import ShardedWeightsError

__all__ = ["FSDP2Strategy", "ShardedWeightsError"]
