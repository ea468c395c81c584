"""One TensorBoard dashboard for whatever callbacks are in the Trainer."""

from lightning_eff.callbacks.tensorboard_layout.callback import TensorBoardLayout

__all__ = ["TensorBoardLayout"]
