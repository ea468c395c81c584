"""Data parallel training that outlives its replicas: ``strategy="ddp_ft"``."""

from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader
from lightning_eff.strategies.fault_tolerant.strategy import FaultTolerantDDPStrategy

__all__ = ["FaultTolerantDDPStrategy", "ShardedLoader"]
