"""Runs that say nothing but what the demo says."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L


def quick_trainer(steps: int, **kwargs: Any) -> L.Trainer:
    """A Trainer for so many steps on the CPU, without validation, files and bars unless they are asked for."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_steps": steps,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return L.Trainer(**{**settings, **kwargs})


def quieten() -> None:
    """Leave out what says nothing about the run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which accelerators there are, and a tip
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # the seed
    # The text is in memory: a process that loads it would only take a core from the training.
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    # A run of a few steps, as in the test of this demo, is over before the monitor has seen enough of any layer.
    warnings.filterwarnings("ignore", "SpectralAlignmentMonitor: of .* layers none was ever armed")
    # The run that was killed has left its checkpoints there.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    # Lightning's own use of a function that PyTorch has deprecated.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated")
