"""Train a small GPT on the standard library's sources, on CPU in a few minutes, with the suite's methods.

A run with the callbacks that go together meets a batch of noise and a bit that flips in its weights, and lives through
both; a short one without a guard does not. Its weights are fine-tuned with MISA, whose checkpoints are smaller; two
ranks exchange compressed gradients; and a run that `kill -9` ends goes on to the bit. At the end a table says what came
of it, and what that means.

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
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

try:
    import tensorboard  # noqa: F401
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    package = str(error.name).split(".")[0]
    raise ImportError(f"{package} cannot be found. It comes with: pip install 'lightning-eff[examples]'") from error

from examples.gpt.accidents import Accidents, unguarded
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
SHORTEST = 200  # steps: in a shorter run there is no time for accidents
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


Row = tuple[str, str, str]
"""What it is, what it means, and the number."""


def main_run(recorder: Recorder, methods: Sequence[Callback], accidents: Accidents) -> list[list[Row]]:
    """The first run, as rows in two sections: what it has learned, and what it has lived through."""
    losses = torch.stack(recorder.train_losses)
    steps, last = len(losses), losses[-LAST_STEPS:].mean()
    learned: list[Row] = [
        ("Training loss, nats a byte", "at the first step, and at the end", f"{losses[0]:.4f} to {last:.4f}"),
        (
            "Validation, bits a byte",
            "8 is a guess; before training, and at the end",
            f"{recorder.val_bpb[0]:.4f} to {recorder.val_bpb[-1]:.4f}",
        ),
    ]
    lived: list[Row] = []
    for method in methods:
        if isinstance(method, EMA):
            words = ("The same of the averaged weights (EMA)", "a mean over the last steps, beside the live ones")
            learned.append((*words, f"{recorder.ema_bpb[-1]:.4f}"))
        elif isinstance(method, ZClip):
            lived.append(
                ("Gradient spikes clipped (ZClip)", "steps that stood out", f"{sum(method.spikes)} of {steps}")
            )
            if accidents.noise_at is not None:
                words = (
                    f"A batch of noise at step {accidents.noise_at}",
                    "its gradient norm, and what ZClip let through",
                )
                lived.append((*words, f"{accidents.norms[0]:.2f}, {accidents.norms[1]:.2f}"))
        elif isinstance(method, TrainingGuard):
            rollbacks = (
                "Rollbacks (TrainingGuard)",
                "to a snapshot in memory; the run went on by itself",
                str(method.rollbacks),
            )
            lived.append(rollbacks)
            if accidents.flip_at is not None:
                words = (
                    f"A bit flipped behind step {accidents.flip_at}",
                    "steps whose loss was not a number; steps undone",
                )
                lived.append((*words, f"{accidents.not_finite}, {method.undone_steps}"))
        elif isinstance(method, SpectralAlignmentMonitor):
            collapsed = f"{len(method.collapsed)} of {len(method.armed)}"
            lived.append(("Layers that collapsed (SpectralAlignmentMonitor)", "of those it watches", collapsed))
        elif isinstance(method, GradES):
            frozen = (
                "Weight matrices frozen (GradES)",
                "had settled: no gradient from then on",
                f"{len(method.frozen)}",
            )
            lived.append(frozen)
    return [learned, lived]


def results(sections: Sequence[Sequence[Row]]) -> Table:
    table = Table(title="What the runs did, and what it means", show_header=False)
    table.add_column(width=52)
    table.add_column(justify="right")
    for rows in sections:
        table.add_section()
        for what, meaning, number in rows:
            table.add_row(Text.assemble((what, "bold"), f"\n  {meaning}"), number)
    return table


def tensorboard_command(logdir: Path) -> str:
    """The line that shows `logdir`, with this environment's TensorBoard whether or not the environment is active."""
    program = Path(sys.executable).with_name("tensorboard")
    if not program.exists():
        return f"tensorboard --logdir {logdir}"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{program} --logdir {logdir}"


def fine_tune(module: GPTModule, data: TextDataModule, steps: int, folder: Path) -> tuple[float, float, float]:
    """Go on with a tenth of the weights at a time: MB of the optimizer, of the checkpoint, and of AdamW's states."""
    misa = MISA(budget=0.1, every_n_steps=max(1, steps // 10))
    # Not behind the last step: there the next matrices have their turn, and no states yet.
    saver = ModelCheckpoint(folder, every_n_train_steps=max(1, steps - 1), save_last=True)
    trainer = quick_trainer(steps, callbacks=[misa, saver], enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    weights = sum(parameter.numel() for parameter in module.parameters())
    kept = trainer.callback_metrics["misa/optimizer_bytes"].item()
    return kept / 1e6, (folder / "last.ckpt").stat().st_size / 1e6, 8 * weights / 1e6


def two_ranks(config: GPTConfig, data: TextDataModule, steps: int, logger: TensorBoardLogger) -> list[Row]:
    """Train on two ranks that exchange a fifth of the rows of each gradient: what was sent."""
    trainer = quick_trainer(
        steps,
        strategy="ddp_fork_arc_topk",
        devices=2,
        callbacks=[CompressionMonitor(), RunHealth(every_n_steps=max(1, steps // 5)), TensorBoardLayout()],
        logger=logger,
    )
    module = GPTModule(config, lr=3e-3, warmup_steps=min(50, steps))
    trainer.fit(module, datamodule=data)
    sent, ratio = (trainer.callback_metrics[f"comm/{name}"].item() for name in ("bytes_per_step", "compression_ratio"))
    loss = trainer.callback_metrics["train_loss"].item()
    waiting = trainer.callback_metrics.get("run_health/waiting")  # None in a run of a few steps, as the demo's test
    return [
        (
            "Two ranks: sent by each in a step (ddp_arc_topk)",
            "of what plain DDP sends: for slow links",
            f"{sent / 1e6:.2f} of {sent * ratio / 1e6:.2f} MB",
        ),
        (
            "Two ranks: waiting for each other (RunHealth)",
            "of a step; a rank that is slow would show here",
            "too short" if waiting is None else f"{waiting:.0%}",
        ),
        (f"Two ranks: training loss after {steps} steps", "nats a byte; it learns all the same", f"{loss:.4f}"),
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
    snapshot = max(20, args.steps // 20)
    methods = [
        TrainingGuard(every_n_steps=snapshot, margin=snapshot // 2, lr_steps=snapshot),
        SpectralAlignmentMonitor(),
        # Of a matrix's own level: 1 would be as soon as its gradient gets no noisier. The default waits for what has
        # little left to gain, and here all goes on learning.
        GradES(metric="grad_change", tau_mode="relative", tau=0.9, heat_map=True),
        ZClip(),
        EMA(half_life=20, save="none"),
    ]
    accidents = Accidents()
    if args.steps >= SHORTEST:
        # A batch whose step is logged, so that its gradient norm is known; and a bit when there are snapshots.
        accidents = Accidents(noise_at=args.steps * 3 // 100 * 10 - 1, flip_at=args.steps * 6 // 10)
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=max(1, args.steps // 4),
        num_sanity_val_steps=-1,  # the whole validation before the first step: where the bits per byte start
        log_every_n_steps=min(10, args.steps),
        logger=TensorBoardLogger(args.logdir, name=None, default_hp_metric=False),
        callbacks=[*methods, TensorBoardLayout(), LearningRateMonitor(), accidents, recorder, ProgressBar()],
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
        f"{few} steps each: the same flipped bit without a guard, fine-tuning with MISA, two ranks with compressed "
        "gradients, and a run that is killed ..."
    )
    sections = main_run(recorder, methods, accidents)
    lost = unguarded(config, data, few)
    sections[1].append(
        ("The same bit in a run without a guard", "steps whose loss was not a number, to its end", f"{lost} of {few}")
    )
    with tempfile.TemporaryDirectory() as folder:
        optimizer, checkpoint, states = fine_tune(module, data, few, Path(folder, "misa"))
        exchanged = two_ranks(config, data, few, TensorBoardLogger(args.logdir, name="two_ranks"))
        killed, whole = killed_and_resumed(config, text, few, Path(folder))
    smaller: list[Row] = [
        (
            f"Optimizer's memory in {few} steps of fine-tuning (MISA)",
            "of AdamW's: a tenth of the weights at a time",
            f"{optimizer:.2f} of {states:.2f} MB",
        ),
        (
            "Its checkpoint, beside one with AdamW's states",
            "smaller by them",
            f"{checkpoint:.2f} of {whole:.2f} MB",
        ),
    ]
    seconds = time.perf_counter() - started
    steps = len(recorder.train_losses)
    speed = f"{steps * BATCH_SIZE * data.block_size / recorder.step_seconds:,.0f}"
    costs: list[Row] = [
        ("Tokens (bytes) a second", f"in the first run's {steps:,} steps, with its callbacks", speed),
        ("Wall-clock", "all in all", f"{seconds:.0f} s"),
    ]
    console.print(results([*sections, killed, smaller, exchanged, costs]))
    console.print("See the curves at http://localhost:6006/#custom_scalars:", highlight=False)
    console.print(f"  {tensorboard_command(args.logdir)}", highlight=False, soft_wrap=True)
    return recorder


if __name__ == "__main__":
    main()
