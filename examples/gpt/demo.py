"""Train a small GPT on the standard library's sources, on CPU in a few minutes, with the suite's methods.

Four runs: training with the callbacks that go together, fine-tuning of its weights with MISA, training on two ranks
whose gradients are compressed, and training that is killed in the midst and goes on.

Usage:
    python -m examples.gpt.demo [--steps 1000] [--seed 0] [--val-windows 256] [--logdir logs/demo]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

try:
    import tensorboard  # noqa: F401
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    package = str(error.name).split(".")[0]
    raise ImportError(f"{package} cannot be found. It comes with: pip install 'lightning-eff[examples]'") from error

from examples.gpt.data import TextDataModule
from examples.gpt.killed import killed_and_resumed
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from examples.gpt.quiet import quick_trainer, quieten
from lightning_eff.callbacks import (
    EMA,
    MISA,
    CompressionMonitor,
    GradES,
    RunHealth,
    SpectralAlignmentMonitor,
    TensorBoardLayout,
    TrainingGuard,
    ZClip,
)

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


def results(
    recorder: Recorder,
    methods: Sequence[Callback],
    other_runs: Sequence[Sequence[tuple[str, str]]],
    bytes_per_step: int,
    wall_seconds: float,
) -> Table:
    losses = torch.stack(recorder.train_losses)
    steps, last = len(losses), losses[-LAST_STEPS:]
    table = Table(title="What the runs did", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("Training loss, first step", f"{losses[0]:.4f} nats a byte")
    table.add_row(f"Training loss, mean of last {len(last)} steps", f"{last.mean():.4f} nats a byte")
    table.add_row("Validation, before training", f"{recorder.val_bpb[0]:.4f} bits a byte")
    table.add_row("Validation, at the end", f"{recorder.val_bpb[-1]:.4f} bits a byte", end_section=True)
    for method in methods:
        if isinstance(method, ZClip):
            table.add_row("Gradient spikes clipped (ZClip)", f"{sum(method.spikes)} of {steps} steps")
        elif isinstance(method, TrainingGuard):
            table.add_row("Alarms and rollbacks (TrainingGuard)", f"{method.alarms} and {method.rollbacks}")
        elif isinstance(method, SpectralAlignmentMonitor):
            collapsed = f"{len(method.collapsed)} of {len(method.armed)} layers"
            table.add_row("Collapsed at the end (SpectralAlignmentMonitor)", collapsed)
        elif isinstance(method, GradES):
            table.add_row("Weight matrices frozen (GradES)", f"{len(method.frozen)}")
        elif isinstance(method, EMA):
            table.add_row("Validation of the averaged weights (EMA)", f"{recorder.ema_bpb[-1]:.4f} bits a byte")
    for rows in other_runs:
        table.add_section()
        for row in rows:
            table.add_row(*row)
    table.add_section()
    table.add_row("Steps of the first run", f"{steps:,}")
    table.add_row("Tokens (bytes) a second, in its steps", f"{steps * bytes_per_step / recorder.step_seconds:,.0f}")
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


def fine_tune(module: GPTModule, data: TextDataModule, steps: int) -> list[tuple[str, str]]:
    """Go on with a tenth of the weights at a time: what that takes."""
    misa = MISA(budget=0.1, every_n_steps=max(1, steps // 10))
    trainer = quick_trainer(steps, callbacks=[misa])
    trainer.fit(module, datamodule=data)
    weights = sum(parameter.numel() for parameter in module.parameters())
    kept = trainer.callback_metrics["misa/optimizer_bytes"].item()
    return [
        (
            f"Optimizer's memory in {steps} steps of fine-tuning (MISA)",
            f"{kept / 1e6:.2f} of {8 * weights / 1e6:.2f} MB",
        ),
        ("Matrices at a time (MISA)", f"{len(misa.active)} of {len(misa.importance)}"),
    ]


def two_ranks(config: GPTConfig, data: TextDataModule, steps: int, logger: TensorBoardLogger) -> list[tuple[str, str]]:
    """Train on two ranks that exchange a fifth of the rows of each gradient: what was sent."""
    trainer = quick_trainer(
        steps,
        strategy="ddp_fork_arc_topk",
        devices=2,
        callbacks=[CompressionMonitor(), RunHealth(every_n_steps=max(1, steps // 5))],
        logger=logger,
    )
    module = GPTModule(config, lr=3e-3, warmup_steps=min(50, steps))
    trainer.fit(module, datamodule=data)
    sent, ratio = (trainer.callback_metrics[f"comm/{name}"].item() for name in ("bytes_per_step", "compression_ratio"))
    loss = trainer.callback_metrics["train_loss"].item()
    waiting = trainer.callback_metrics.get("run_health/waiting")  # None in a run of a few steps, as the demo's test
    return [
        ("Sent by each of two ranks in a step (ddp_arc_topk)", f"{sent / 1e6:.2f} of {sent * ratio / 1e6:.2f} MB"),
        (
            "Their waiting for each other, of a step (RunHealth)",
            "too short" if waiting is None else f"{waiting:.0%}",
        ),
        (f"Their training loss after {steps} steps", f"{loss:.4f} nats a byte"),
    ]


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
    text = {
        "block_size": 128,
        "batch_size": BATCH_SIZE,
        "crops_per_epoch": args.steps * BATCH_SIZE,
        "val_windows": args.val_windows,
        "seed": args.seed,
    }
    data = TextDataModule(**text)
    config = GPTConfig(block_size=128, n_layer=5, n_head=4, n_embd=128)
    module = GPTModule(
        config,
        lr=3e-3,
        warmup_steps=min(50, args.steps),
        fused=True,
    )
    # The methods of the suite. What each did is in the table at the end and in TensorBoard.
    methods = [
        TrainingGuard(),
        SpectralAlignmentMonitor(),
        # Of a matrix's own level: 1 would be as soon as its gradient gets no noisier. The default waits for what has
        # little left to gain, and here all goes on learning.
        GradES(metric="grad_change", tau_mode="relative", tau=0.9),
        ZClip(),
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
    few = max(2, args.steps // 20)
    console.print(
        f"{few} steps each: fine-tuning with MISA, two ranks with compressed gradients, and a run that is killed ..."
    )
    tuned = fine_tune(module, data, few)
    exchanged = two_ranks(config, data, few, TensorBoardLogger(args.logdir, name="two_ranks"))
    with tempfile.TemporaryDirectory() as folder:
        killed = killed_and_resumed(config, text, few, Path(folder))
    seconds = time.perf_counter() - started
    console.print(results(recorder, methods, [tuned, exchanged, killed], BATCH_SIZE * data.block_size, seconds))
    console.print("See the curves at http://localhost:6006/#custom_scalars:", highlight=False)
    console.print(f"  {tensorboard_command(args.logdir)}", highlight=False, soft_wrap=True)
    return recorder


if __name__ == "__main__":
    main()
