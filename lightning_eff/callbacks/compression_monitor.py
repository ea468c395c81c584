"""What compressed all-reduce sends, and what it leaves out, as numbers in the log."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.arguments import check_flag
from lightning_eff.training.hooks import CompressesGradients
from lightning_eff.training.trainer import log_values, logger_step


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

    Raises:
        ValueError: ``relative_error`` is neither True nor False.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="ddp_arc_topk", accelerator="cpu", callbacks=[CompressionMonitor()],
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(self, relative_error: bool = True) -> None:
        check_flag("relative_error", relative_error)
        self.relative_error = relative_error

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, CompressesGradients):
            rank_zero_info(f"CompressionMonitor is idle: {type(trainer.strategy).__name__} compresses nothing")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        if self.relative_error and isinstance(strategy, CompressesGradients) and _is_logged(trainer):
            strategy.measure()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, CompressesGradients) or not _is_logged(trainer):
            return
        traffic = strategy.traffic
        values: dict[str, Any] = {
            "bytes_per_step": float(traffic.last_bytes),
            "compression_ratio": traffic.last_dense_bytes / traffic.last_bytes if traffic.last_bytes else 1.0,
        }
        error = strategy.relative_error() if self.relative_error else None
        if error is not None:
            values["relative_error"] = error
        log_values(pl_module, "comm", values)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        if not isinstance(trainer.strategy, CompressesGradients):
            return {}
        return {
            "bytes sent in a step": ["Multiline", ["comm/bytes_per_step"]],
            "times less than plain DDP": ["Multiline", ["comm/compression_ratio"]],
            "what was not sent (relative norm)": ["Multiline", ["comm/relative_error"]],
        }


def _is_logged(trainer: Trainer) -> bool:
    """Whether the current step is one that Lightning logs: from counts alone, so alike on all ranks."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (logger_step(trainer) + 1) % every == 0
