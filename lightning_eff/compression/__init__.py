"""Gradient compression for data-parallel training: one interface, and the compressors."""

from lightning_eff.compression.comm_hook import CompressedReduction
from lightning_eff.compression.compressors.arc_topk import ArcTopK
from lightning_eff.compression.compressors.half import BF16, FP16
from lightning_eff.compression.compressors.int8 import Int8
from lightning_eff.compression.compressors.powersgd import PowerSGD
from lightning_eff.compression.compressors.randk import RandK
from lightning_eff.compression.compressors.topk import TopK
from lightning_eff.compression.interface import (
    AllGather,
    AllReduce,
    AllToAll,
    Bucket,
    Collective,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
)
from lightning_eff.compression.plan import Prediction, predict

__all__ = [
    "BF16",
    "FP16",
    "AllGather",
    "AllReduce",
    "AllToAll",
    "ArcTopK",
    "Bucket",
    "Collective",
    "CompressedReduction",
    "Compressor",
    "ErrorFeedback",
    "Exchange",
    "Int8",
    "PowerSGD",
    "Prediction",
    "RandK",
    "TopK",
    "all_compressors",
    "all_gather_bytes",
    "all_reduce_bytes",
    "all_to_all_bytes",
    "predict",
]


def all_compressors() -> dict[str, Compressor]:
    """Each compressor with its defaults, by its name in a strategy string ("arc_topk" in "ddp_arc_topk").

    Example:
        >>> sorted(all_compressors())
        ['arc_topk', 'bf16', 'fp16', 'int8', 'powersgd', 'randk', 'topk']
    """
    return {
        "arc_topk": ArcTopK(),
        "topk": TopK(),
        "randk": RandK(),
        "powersgd": PowerSGD(),
        "fp16": FP16(),
        "bf16": BF16(),
        "int8": Int8(),
    }
