"""What compressed all-reduce sends, and what it leaves out, as numbers in the log."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.strategies.compressed_ddp import CompressedDDPStrategy


class CompressionMonitor(Callback):
    """Logs what :class:`~lightning_eff.strategies.CompressedDDPStrategy` sends. With any other strategy it is idle.

    Logs, at the Trainer's ``log_every_n_steps``: ``comm/bytes_per_step``, what each rank sent in the last step, counted
    as the ring algorithms send it; ``comm/compression_ratio``, how many times more plain DDP would have sent; and
    ``comm/relative_error``, the norm of what the ranks did not send in the logged step, divided by that of what they
    had to send (gradients and error memories of the compressed tensors).

    Runs in: ``on_train_batch_start``, ``on_train_batch_end``.
    Reads: the strategy's counters, and on a step that is logged its gradients.
    Changes: nothing.
    Collectives: one all-reduce of two numbers on a step that is logged; none with ``relative_error=False``.
    Host syncs: none.
    Strategies: all; it logs with CompressedDDPStrategy.

    Args:
        relative_error: also measure what is left out. On a step that is logged that takes a float32 copy of the
            compressed gradients where there is no error feedback, and two passes over them.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="ddp_arc_topk", accelerator="cpu", callbacks=[CompressionMonitor()],
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(self, relative_error: bool = True) -> None:
        self.relative_error = relative_error

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, CompressedDDPStrategy):
            rank_zero_info(f"CompressionMonitor is idle: {type(trainer.strategy).__name__} compresses nothing")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        if self.relative_error and isinstance(strategy, CompressedDDPStrategy) and _is_logged(trainer):
            strategy.measure()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, CompressedDDPStrategy) or not _is_logged(trainer):
            return
        traffic = strategy.traffic
        values: dict[str, Any] = {
            "bytes_per_step": float(traffic.last_bytes),
            "compression_ratio": traffic.last_dense_bytes / traffic.last_bytes if traffic.last_bytes else 1.0,
        }
        error = strategy.relative_error() if self.relative_error else None
        if error is not None:
            values["relative_error"] = error
        for name, value in values.items():
            pl_module.log(f"comm/{name}", value, on_step=True, on_epoch=False, batch_size=1)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        if not isinstance(trainer.strategy, CompressedDDPStrategy):
            return {}
        return {
            "bytes sent in a step": ["Multiline", ["comm/bytes_per_step"]],
            "what was not sent (relative norm)": ["Multiline", ["comm/relative_error"]],
        }


def _is_logged(trainer: Trainer) -> bool:
    """Whether the current step is one that Lightning logs: from counts alone, so alike on all ranks."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
