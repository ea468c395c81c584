"""The whole state of a running Trainer, for a peer that has to catch up: a checkpoint that never touches a disk.

A replica catches up before a step, as in a resume, or within one: it has failed to commit what the others have, takes
their result and goes on to ``on_train_batch_end`` with them. What a callback has noted since the step's gradients came
is not in its ``state_dict``, and what it does in ``on_train_start`` may be too early then. Such a callback has

    def step_state(self) -> dict: ...                                       # plain values and tensors
    def load_step_state(self, trainer, pl_module, state: dict) -> None: ...  # after `load_state_dict`

the second of which is called in place of ``on_train_start``.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.loop import _Loop

from lightning_eff.strategies.fault_tolerant.writer import adopt_places, places
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.rank_state import rank_state_owners
from lightning_eff.training.trainable import set_trainable

_LEFT_OUT = ("hyper_parameters", "hparams_name", "hparams_type", "datamodule_hyper_parameters")


def live_state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint has, and what one does not need: random state, and where files are written."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for key in _LEFT_OUT:
        checkpoint.pop(key, None)
    return {
        "checkpoint": checkpoint,
        "random": _random_state(trainer),
        "places": places(trainer),
        "ranks": _rank_states(trainer),
        "accumulate": trainer.accumulate_grad_batches,
        "trainable": _trainable(trainer),
        "steps": {
            callback.state_key: callback.step_state()
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if hasattr(callback, "step_state")
        },
    }


def load_live_state(trainer: Trainer, state: dict[str, Any], within_step: bool) -> None:
    """Take a peer's state, as a resume from its checkpoint would.

    Args:
        trainer: which is training.
        state: of a peer, see `live_state`.
        within_step: whether both are within the same step, so that this replica has its place in the loops already.
    """
    connector = trainer._checkpoint_connector
    checkpoint = state["checkpoint"]
    adopt_places(trainer, state["places"])
    trainer.accumulate_grad_batches = state["accumulate"]  # a schedule may have changed it
    connector._loaded_checkpoint = checkpoint
    try:
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.restore_optimizers_and_schedulers()
        for name, owner in rank_state_owners(trainer.strategy).items():
            owner.load(state["ranks"].get(name))
        if not within_step:
            _load_loop(trainer.fit_loop, checkpoint["loops"]["fit_loop"])
    finally:
        connector._loaded_checkpoint = {}
    # Before the parameters are opened and closed: a callback looks for its own among those that it finds open.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            _begin(trainer, callback, state["steps"] if within_step else {})
    if state["trainable"] != _trainable(trainer):
        set_trainable(trainer, state["trainable"])  # DDP's buckets must be the same everywhere
    trainer.lightning_module.zero_grad(set_to_none=True)
    _load_random_state(trainer, state["random"])


def _begin(trainer: Trainer, callback: Any, steps: dict[str, Any]) -> None:
    """Let a callback apply its state, where it does so after a resume or, with ``steps``, within a step."""
    if callback.state_key in steps and hasattr(callback, "load_step_state"):
        callback.load_step_state(trainer, trainer.lightning_module, steps[callback.state_key])
    else:
        callback.on_train_start(trainer, trainer.lightning_module)


def _load_loop(loop: _Loop, state: dict[str, Any]) -> None:
    loop.load_state_dict(state)
    # Not a restart: the loop goes on from there as if it had come there by itself.
    for each in _all_loops(loop):
        each._restarting = each._loaded_from_state_dict = each._resuming_from_checkpoint = False


def _all_loops(loop: _Loop) -> list[_Loop]:
    found = [loop]
    for value in vars(loop).values():
        if isinstance(value, _Loop):
            found += _all_loops(value)
    return found


def layout(trainer: Trainer) -> int:
    """A number that is equal where DDP makes the same buckets of the model."""
    parameters = clean_named_parameters(trainer.lightning_module)
    words = [f"{name} {p.requires_grad} {tuple(p.shape)} {p.dtype}" for name, p in parameters.items()]
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:7], "big")


def _trainable(trainer: Trainer) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in clean_named_parameters(trainer.lightning_module).items()}


def _rank_states(trainer: Trainer) -> dict[str, Any]:
    # Files beside a checkpoint; replicas are equal, so a peer's are this one's.
    return {name: owner.save() for name, owner in rank_state_owners(trainer.strategy).items()}


def _random_state(trainer: Trainer) -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if trainer.strategy.root_device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(trainer.strategy.root_device)
    return state


def _load_random_state(trainer: Trainer, state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and trainer.strategy.root_device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], trainer.strategy.root_device)
