"""Short, quiet Lightning runs, and what such a run begins with."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
"""Arguments of a Trainer that prints nothing and writes nothing."""


def quiet_lightning(*messages: str) -> None:
    """Leave out advice about data workers and devices, and the warnings that begin with one of ``messages``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers", ".*LeafSpec", *messages):
        warnings.filterwarnings("ignore", message=message)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, without the environment variables that `L.seed_everything` leaves."""
    L.seed_everything(seed, workers=False, verbose=False)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


def begin(seed: int, *messages: str) -> None:
    """Begin a run that can be repeated: one thread, everything seeded, nothing said, nor the ``messages`` warned of."""
    torch.set_num_threads(1)
    quiet_lightning(*messages)
    L.seed_everything(seed, verbose=False)


def quiet_trainer(*callbacks: L.Callback, trainer: type[L.Trainer] = L.Trainer, **arguments: Any) -> L.Trainer:
    """A Trainer that prints nothing and writes what its checkpoint callbacks do, unless ``arguments`` say otherwise.

    ``trainer`` is its class, for that of ``pytorch_lightning``.
    """
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    return trainer(callbacks=list(callbacks), **{**QUIET, "enable_checkpointing": saves, **arguments})


def fit(
    module: L.LightningModule, *callbacks: L.Callback, data: Any = None, ckpt_path: Any = None, **arguments: Any
) -> L.Trainer:
    """Train on the CPU and return the Trainer.

    Args:
        module: what is trained.
        callbacks: in the order of the Trainer's.
        data: a loader, a datamodule, or a pair of a loader and one for validation; None: the module's own.
        ckpt_path: of a checkpoint to go on from.
        arguments: of the Trainer; by default there are 8 optimizer steps, and each is logged.
    """
    steps = {} if "max_epochs" in arguments else {"max_steps": 8}
    trainer = quiet_trainer(*callbacks, **{"accelerator": "cpu", "log_every_n_steps": 1, **steps, **arguments})
    trainer.fit(module, *(data if isinstance(data, tuple) else (data,)), ckpt_path=ckpt_path)
    return trainer


def ddp(**arguments: Any) -> DDPStrategy:
    """DDP over gloo."""
    return DDPStrategy(process_group_backend="gloo", **arguments)


def fsdp2(**arguments: Any) -> ModelParallelStrategy:
    """FSDP2 on two ranks, over gloo; the module shards itself in ``configure_model``."""
    return ModelParallelStrategy(2, 1, process_group_backend="gloo", **arguments)
