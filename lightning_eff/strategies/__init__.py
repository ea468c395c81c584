"""Lightning strategies: by string once ``lightning_eff`` is imported, or by class where the defaults do not fit."""

from lightning_eff.functional.compression import BF16, FP16, ArcTopK, Compressor
from lightning_eff.strategies.compressed_ddp import CompressedDDPStrategy, compressed_ddp

__all__ = ["BF16", "FP16", "ArcTopK", "CompressedDDPStrategy", "Compressor", "compressed_ddp"]
