"""The methods as Lightning callbacks."""

from lightning_eff.callbacks.tensorboard_layout import TensorBoardLayout
from lightning_eff.callbacks.zclip import ZClip

__all__ = ["TensorBoardLayout", "ZClip"]
