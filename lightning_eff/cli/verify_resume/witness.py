"""A callback that keeps a user's run within a folder and a number of batches, and writes down what it sees."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eff.training.wrapping import Wrapper


class _Witness:
    """Behind each training batch it notes digests of the batch, the random generators, the loss and the weights.

    Args:
        orders: ``role`` ("whole", "broken" or "resumed"), ``folder`` for everything that is written, ``batches`` after
            which the process ends, ``save_at`` and ``kill_at``, batches behind which "broken" saves and is killed.
    """

    def __init__(self, orders: dict[str, Any]) -> None:
        self.role: str = orders["role"]
        self.folder = Path(orders["folder"])
        self.batches: int = orders["batches"]
        self.save_at: int = orders["save_at"]
        self.kill_at: int = orders["kill_at"]
        self.changed: list[str] = []

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "verify.ckpt"

    def redirect(self, trainer: Any) -> None:
        """Redirect what the run writes, and give it the checkpoint.

        Before any ``setup``: Lightning asks loggers for their files before it calls those of callbacks.
        """
        own = self.folder / self.role
        trainer._default_root_dir = str(own)
        package = type(trainer).__module__.partition(".trainer")[0]
        if trainer.loggers:
            self.changed.append(f"{len(trainer.loggers)} logger(s) replaced by one that writes nothing")
            trainer.loggers = [import_module(f"{package}.loggers.logger").DummyLogger()]
        for callback in trainer.callbacks:
            if hasattr(callback, "dirpath"):
                self.changed.append(f"{type(callback).__name__} saves in {own}")
                callback.dirpath = str(own / "checkpoints")
        self.changed.append(f"the run ends after {self.batches} training batches")
        if self.role == "resumed":
            self.changed.append(f"fit resumes from {self._checkpoint}")
            Wrapper(
                trainer._checkpoint_connector,
                "_restore_modules_and_callbacks",
                lambda inner, path=None, weights_only=None: inner(str(self._checkpoint), weights_only),
            )
        self._notes = self.folder / f"{self.role}.rank{trainer.global_rank}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._notes.write_text(json.dumps({"changed": self.changed}) + "\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note it, and save or end where it is time."""
        number = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        with self._notes.open("a") as notes:
            notes.write(json.dumps({"batch": number, "seen": dict(_seen(trainer, pl_module, outputs, batch))}) + "\n")
        if self.role == "broken" and number == self.save_at:
            trainer.save_checkpoint(self._checkpoint)
        if self.role == "broken" and number >= self.kill_at:
            trainer.strategy.barrier()  # all ranks have written
            os.kill(os.getpid(), signal.SIGKILL)
        if number >= self.batches:
            trainer.strategy.barrier()
            os._exit(0)  # what the script does behind `fit` is not asked for


def witness(package: str, orders: str) -> Any:
    """A witness that is a callback of this package; Lightning calls those of checkpoints last."""
    base: Any = import_module(f"{package}.callbacks").Checkpoint
    found = type("ResumeWitness", (_Witness, base), {})(json.loads(orders))

    def set_up(inner: Callable[[Any], None], trainer: Any) -> None:
        if found in trainer.callbacks and trainer.state.fn == "fit":
            found.redirect(trainer)
        inner(trainer)

    Wrapper(import_module(f"{package}.trainer.call"), "_call_setup_hook", set_up)
    return found


def _seen(trainer: Any, module: Any, outputs: Any, batch: Any) -> Iterator[tuple[str, str]]:
    """What must be the same in both runs, the causes before what follows from them."""
    yield from ((f"sample {name}", _digest(value)) for name, value in _leaves(batch))
    yield "random stream torch", _digest(torch.get_rng_state())
    if torch.cuda.is_available():
        yield "random stream cuda", _digest(torch.cuda.get_rng_state(trainer.strategy.root_device))
    yield "random stream python", _digest(repr(random.getstate()))
    yield "random stream numpy", _digest(repr(_numpy_state()))
    yield from ((f"output {name}", _digest(value)) for name, value in _leaves(outputs))
    yield from ((f"parameter {name}", _digest(value)) for name, value in module.named_parameters())
    yield from ((f"buffer {name}", _digest(value)) for name, value in module.named_buffers())
    for index, optimizer in enumerate(trainer.optimizers):
        for number, state in enumerate(optimizer.state.values()):
            yield from ((f"optimizer {index}: {number}.{name}", _digest(value)) for name, value in _leaves(state))
        for number, group in enumerate(optimizer.param_groups):
            values = {name: value for name, value in group.items() if name != "params"}
            yield f"optimizer {index}: group {number}", _digest(repr(values))


def _numpy_state() -> list[Any]:
    """All of it: its place among its numbers tells of a draw, long before they are made anew."""
    name, keys, *rest = np.random.get_state()
    return [name, keys.tolist(), *rest]  # type: ignore[attr-defined, union-attr]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for key, entry in enumerate(value):
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path or "0", value


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.detach()
        local = (value.to_local() if hasattr(value, "to_local") else value).cpu().contiguous()
        content = local.reshape(-1).view(torch.uint8).numpy().tobytes() if local.numel() else b""
        content += str((tuple(value.shape), value.dtype)).encode()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()[:16]
