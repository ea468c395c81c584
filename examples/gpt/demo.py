"""Train a small GPT on the standard library's sources, on CPU in a few minutes, with the suite's callbacks.

Usage:
    python -m examples.gpt.demo [--steps 1000] [--seed 0] [--val-windows 256] [--logdir logs/demo]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from lightning_eff.callbacks import EMA, TensorBoardLayout, ZClip

BATCH_SIZE = 8  # small batches: on a CPU a byte costs the same in any batch, and more steps learn more
LAST_STEPS = 50  # the loss of one batch of 8 is noisy; the loss at the end is a mean over these


class Recorder(Callback):
    """Keeps what the table at the end shows."""

    def __init__(self) -> None:
        self.train_losses: list[Tensor] = []
        self.val_bpb: list[float] = []  # before the first step, and after each validation
        self.ema_bpb: list[float] = []  # of the averaged weights, after each validation
        self.step_seconds = 0.0  # training steps alone, without validation
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, index: int) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], batch: Tensor, index: int
    ) -> None:
        self.step_seconds += time.perf_counter() - self._started
        self.train_losses.append(outputs["loss"].detach())

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.val_bpb.append(trainer.callback_metrics["val_bpb"].item())
        if not trainer.sanity_checking:
            self.ema_bpb.append(trainer.callback_metrics["ema/val_bpb"].item())


class ProgressBar(RichProgressBar):
    """Lightning's bar without the number of the log directory."""

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def results(recorder: Recorder, methods: Sequence[Callback], bytes_per_step: int, wall_seconds: float) -> Table:
    losses = torch.stack(recorder.train_losses)
    steps, last = len(losses), losses[-LAST_STEPS:]
    table = Table(title="What the run did", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("Training loss, first step", f"{losses[0]:.4f} nats a byte")
    table.add_row(f"Training loss, mean of last {len(last)} steps", f"{last.mean():.4f} nats a byte")
    table.add_row("Validation, before training", f"{recorder.val_bpb[0]:.4f} bits a byte")
    table.add_row("Validation, at the end", f"{recorder.val_bpb[-1]:.4f} bits a byte", end_section=True)
    for method in methods:
        if isinstance(method, ZClip):
            table.add_row("Gradient spikes clipped (ZClip)", f"{sum(method.spikes)} of {steps} steps")
        elif isinstance(method, EMA):
            table.add_row("Validation of the averaged weights (EMA)", f"{recorder.ema_bpb[-1]:.4f} bits a byte")
    table.add_section()
    table.add_row("Steps", f"{steps:,}")
    table.add_row("Tokens (bytes) a second, in steps", f"{steps * bytes_per_step / recorder.step_seconds:,.0f}")
    table.add_row("Wall-clock, all in all", f"{wall_seconds:.0f} s")
    return table


def tensorboard_command(logdir: Path) -> str:
    """The line that shows `logdir`, with this environment's TensorBoard whether or not the environment is active."""
    program = Path(sys.executable).with_name("tensorboard")
    if not program.exists():
        return f"tensorboard --logdir {logdir}"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{program} --logdir {logdir}"


def quieten() -> None:
    """Leave out what says nothing about the run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which accelerators there are, and a tip
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # the seed
    # The text is in memory: a process that loads it would only take a core from the training.
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    # Lightning's own use of a function that PyTorch has deprecated.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated")


def main(argv: Sequence[str] | None = None) -> Recorder:
    parser = argparse.ArgumentParser(prog="python -m examples.gpt.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same losses (default: %(default)s)")
    parser.add_argument("--val-windows", type=int, default=256, help="windows to validate on (default: %(default)s)")
    parser.add_argument("--logdir", type=Path, default=Path("logs/demo"), help="for TensorBoard (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")

    started = time.perf_counter()
    quieten()
    # One core: these matrices are too small to gain much from more; threads that wait for each other at every layer
    # stall where other programs run (seen 20 times slower); and the losses do not depend on the number of cores.
    torch.set_num_threads(1)
    L.seed_everything(args.seed)
    data = TextDataModule(
        block_size=128,
        batch_size=BATCH_SIZE,
        crops_per_epoch=args.steps * BATCH_SIZE,
        val_windows=args.val_windows,
        seed=args.seed,
    )
    module = GPTModule(
        GPTConfig(block_size=128, n_layer=5, n_head=4, n_embd=128),
        lr=3e-3,
        warmup_steps=min(50, args.steps),
        fused=True,
    )
    # The methods of the suite. What each did is in the table at the end and in TensorBoard.
    methods = [
        ZClip(max_grad_norm=None),  # no cap: norms fall from 4 to 0.7, and a cap of 1 would clip every early step
        EMA(half_life=20, save="none"),
    ]
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=max(1, args.steps // 4),
        num_sanity_val_steps=-1,  # the whole validation before the first step: where the bits per byte start
        log_every_n_steps=min(10, args.steps),
        logger=TensorBoardLogger(args.logdir, name=None, default_hp_metric=False),
        callbacks=[*methods, TensorBoardLayout(), LearningRateMonitor(), recorder, ProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )

    console = Console()
    data.setup()
    train_files, val_files = data.split_files()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    console.print(
        f"A GPT of {parameters / 1e6:.2f} million parameters learns Python, byte by byte, from {len(train_files)} files"
        f" under {data.root}; {len(val_files)} others are for validation."
    )
    trainer.fit(module, datamodule=data)
    console.print(results(recorder, methods, BATCH_SIZE * data.block_size, time.perf_counter() - started))
    console.print("See the curves at http://localhost:6006/#custom_scalars:", highlight=False)
    console.print(f"  {tensorboard_command(args.logdir)}", highlight=False, soft_wrap=True)
    return recorder


if __name__ == "__main__":
    main()
