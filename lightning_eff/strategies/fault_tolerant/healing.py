"""The whole state of a running Trainer, for a peer that has to catch up: a checkpoint that never touches a disk.

A replica catches up before a step, as in a resume, or within one: it has failed to commit what the others have, takes
their result and goes on to ``on_train_batch_end`` with them. The parts are those of ``training/run_parts.py``; beside
them go the place in the data, what ``on_save_checkpoint`` of the module and of foreign callbacks adds to a checkpoint,
the data module's state, and where files are written.
"""

from __future__ import annotations

import hashlib
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_eff.strategies.fault_tolerant.writer import adopt_places, places
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.hooks import HasRunState
from lightning_eff.training.namespaces import overrides
from lightning_eff.training.run_parts import (
    load_training_state,
    place_in_data,
    set_place_in_data,
    trainable,
    training_state,
)
from lightning_eff.training.snapshots import HeldWindow
from lightning_eff.training.trainer import callbacks_of


def live_state(trainer: Trainer) -> dict[str, Any]:
    """All that a peer needs, as tensors and plain values."""
    state: dict[str, Any] = _plain(training_state(trainer))
    data_module = trainer.datamodule  # type: ignore[attr-defined]
    return {
        **state,
        "data": place_in_data(trainer),
        "data_module": {} if data_module is None else data_module.state_dict(),
        "added": _added_to_checkpoints(trainer, state),
        "places": places(trainer),
        "accumulate": trainer.accumulate_grad_batches,
    }


def load_live_state(trainer: Trainer, state: dict[str, Any], within_step: bool) -> None:
    """Take a peer's state, as a resume from its checkpoint would.

    Args:
        trainer: which is training.
        state: of a peer, see `live_state`.
        within_step: whether both are within the same step, so that this replica has its place in the loops already.
    """
    adopt_places(trainer, state["places"])
    trainer.accumulate_grad_batches = state["accumulate"]  # a schedule may have changed it
    if state["data_module"]:
        trainer.datamodule.load_state_dict(state["data_module"])  # type: ignore[attr-defined]
    _load_added(trainer, state)
    load_training_state(trainer, state.__getitem__, within_step=within_step, begin=True)
    if not within_step:
        set_place_in_data(trainer, state["data"])


def _plain(tree: Any) -> Any:
    """With what lies in windows of snapshots as tensors."""
    if isinstance(tree, HeldWindow):
        return tree.state_dict()
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_plain, tree))
    return tree


def _added_to_checkpoints(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """What the hooks ``on_save_checkpoint`` add to a checkpoint."""
    module, whole = trainer.lightning_module, _checkpoint(trainer, state)
    before = set(whole)
    for callback in _with_hooks(trainer):
        callback.on_save_checkpoint(trainer, module, whole)
    module.on_save_checkpoint(whole)
    return {key: value for key, value in whole.items() if key not in before}


def _load_added(trainer: Trainer, state: dict[str, Any]) -> None:
    """Show it to the hooks ``on_load_checkpoint``, before the weights are set, as in a resume."""
    module, whole = trainer.lightning_module, {**_checkpoint(trainer, state), **state["added"]}
    module.on_load_checkpoint(whole)
    for callback in _with_hooks(trainer):
        callback.on_load_checkpoint(trainer, module, whole)


def _with_hooks(trainer: Trainer) -> list[Callback]:
    names = ("on_save_checkpoint", "on_load_checkpoint")
    callbacks = [callback for callback in callbacks_of(trainer) if not isinstance(callback, HasRunState)]
    return [c for c in callbacks if any(overrides(c, name) for name in names)]


def _checkpoint(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """What such hooks find in a checkpoint."""
    weights = {name.removeprefix("buffer "): tensor for name, tensor in state["model"].items()}
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "state_dict": {**trainer.lightning_module.state_dict(), **weights},
        "optimizer_states": state["optimizers"],
        "lr_schedulers": state["schedulers"],
        "loops": {"fit_loop": place_in_data(trainer)},
        "callbacks": {},
    }


def layout(trainer: Trainer) -> int:
    """A number that is equal where DDP makes the same buckets of the model."""
    module = trainer.lightning_module
    trained, parameters = trainable(module), clean_named_parameters(module)
    words = [f"{name} {trained[name]} {tuple(p.shape)} {p.dtype}" for name, p in parameters.items()]
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:7], "big")


def size(trainer: Trainer) -> int:
    """Bytes of weights, buffers and optimizer state: about what a peer's state has."""
    module = trainer.lightning_module
    states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
    held = (value for state in states for value in state.values() if isinstance(value, Tensor))
    tensors = (*module.parameters(), *module.buffers(), *held)
    return sum(tensor.nbytes for tensor in tensors)
