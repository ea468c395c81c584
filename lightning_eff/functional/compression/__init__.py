"""Gradient compression for data-parallel training: one interface, and the compressors."""

from lightning_eff.functional.compression.arc_topk import ArcTopK
from lightning_eff.functional.compression.half import BF16, FP16
from lightning_eff.functional.compression.interface import (
    AllGather,
    AllReduce,
    AllToAll,
    Bucket,
    Collective,
    Compressor,
    ErrorFeedback,
    Exchange,
)
from lightning_eff.functional.compression.plan import Prediction, predict

__all__ = [
    "BF16",
    "FP16",
    "AllGather",
    "AllReduce",
    "AllToAll",
    "ArcTopK",
    "Bucket",
    "Collective",
    "Compressor",
    "ErrorFeedback",
    "Exchange",
    "Prediction",
    "predict",
]
