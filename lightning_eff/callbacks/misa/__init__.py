"""MISA: trains a sample of the weight matrices at a time."""

from lightning_eff.callbacks.misa.callback import MISA

__all__ = ["MISA"]
