"""Lightning strategies: by string once ``lightning_eff`` is imported, or by class where the defaults do not fit."""

from lightning_eff.compression import BF16, FP16, ArcTopK, Compressor, Int8, PowerSGD, RandK, TopK
from lightning_eff.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_eff.strategies.fault_tolerant import FaultTolerantDDPStrategy, ShardedLoader
from lightning_eff.strategies.fsdp2 import FSDP2Strategy, ShardedWeightsError

__all__ = [
    "BF16",
    "FP16",
    "ArcTopK",
    "CompressedDDPStrategy",
    "Compressor",
    "FSDP2Strategy",
    "FaultTolerantDDPStrategy",
    "Int8",
    "PowerSGD",
    "RandK",
    "ShardedLoader",
    "ShardedWeightsError",
    "TopK",
]
