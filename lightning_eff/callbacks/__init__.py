"""The methods as Lightning callbacks."""

from lightning_eff.callbacks.tensorboard_layout import TensorBoardLayout

__all__ = ["TensorBoardLayout"]
