"""A run that ``kill -9`` ends and that goes on, beside the same run left alone: part of the demo."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from examples.gpt.quiet import quick_trainer, quieten
from lightning_eff.callbacks import AsyncCheckpoint, ExactResume, FaultInjector


def train(
    config: GPTConfig, text: dict[str, Any], steps: int, folder: Path, *others: Callback, resume: Path | None = None
) -> GPTModule:
    """Train on one core, with a checkpoint five times on the way."""
    quieten()
    torch.set_num_threads(1)
    L.seed_everything(text["seed"], verbose=False)
    module = GPTModule(config, lr=3e-3, warmup_steps=min(50, steps))
    saver = ModelCheckpoint(folder, every_n_train_steps=max(1, steps // 5), save_last=True)
    trainer = quick_trainer(
        steps, callbacks=[ExactResume(), AsyncCheckpoint(), saver, *others], enable_checkpointing=True
    )
    trainer.fit(module, datamodule=TextDataModule(**text), ckpt_path=resume)
    return module


def killed_and_resumed(
    config: GPTConfig, text: dict[str, Any], steps: int, folder: Path
) -> tuple[list[tuple[str, str, str]], float]:
    """What came of it, as rows of a table, and the megabytes of a checkpoint."""
    whole = train(config, text, steps, folder / "whole")
    kill = steps * 7 // 10
    arguments = (config, text, steps, folder / "killed", FaultInjector("kill", step=kill))
    process = multiprocessing.get_context("spawn").Process(target=train, args=arguments, daemon=True)
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the run that was to be killed at step {kill} ended with exit code {process.exitcode}")
    last = folder / "killed" / "last.ckpt"
    saved = torch.load(last, weights_only=True, mmap=True)["global_step"] if last.exists() else 0
    resumed = train(config, text, steps, folder / "killed", resume=last if saved else None)
    differ = sum(
        not torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    equal = "equal to the bit" if not differ else f"{differ} tensors differ"
    rows = [
        (f"A run killed by kill -9 behind step {kill}", "gone on from its last checkpoint", f"step {saved}"),
        ("Its weights, beside a run left alone (ExactResume)", "nothing is lost but the time", equal),
    ]
    return rows, (folder / "whole" / "last.ckpt").stat().st_size / 1e6
