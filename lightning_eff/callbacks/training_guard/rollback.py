"""The state of a run between two steps: what has to be put back so that training goes on from an earlier step.

Three clocks run in a fit, and a rollback turns back one of them:

- that of the training goes back: ``global_step``, the optimizers, their schedulers, the GradScaler, random numbers,
  callbacks. ``max_steps`` counts the steps that have not been undone.
- that of the data goes on: ``batch_idx``, epochs, the data loaders, validation every so many batches.
- that of the loggers goes on: no step is written twice, so a curve shows what was undone and what came after it.

Callbacks, the LightningModule and the strategy are asked for their part. One that keeps more than its ``state_dict``
has, or whose ``load_state_dict`` is not enough in the middle of a fit, has two methods:

    def rollback_state(self) -> dict: ...  # nested dicts and lists of tensors, which are copied, and of plain values
    def roll_back(self, trainer, pl_module, state) -> None: ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging, Timer, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_eff.callbacks.training_guard.checkpoint_files import ranked_checkpoints
from lightning_eff.callbacks.training_guard.run_snapshots import RunSnapshot
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.dtensor import local, reshard
from lightning_eff.training.trainable import set_trainable

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)

# Files on disk and the time of day do not go back; see `checkpoint_files` for the former.
_ON_THEIR_OWN = (Checkpoint, Timer)


def check_rollback_support(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say in ``setup`` already what cannot be put back.

    Raises:
        MisconfigurationException: for a strategy or a callback whose state is out of sight, with the mend.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, _SUPPORTED) or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} does not support a rollback, because it flattens, partitions or shares the "
            "training state out of a callback's sight: use a single device, DDP or ModelParallelStrategy (FSDP2), or "
            "action='stop'"
        )
    reason = getattr(strategy, "rollback_refused", None)
    if reason is not None:
        raise MisconfigurationException(
            f"{type(strategy).__name__} does not support a rollback: {reason}. Use action='stop'"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} keeps an average that cannot be put back in the middle of a fit: use "
                "lightning_eff's EMA or CheckpointAveraging in its place, or action='stop'"
            )
    if is_overridden("on_save_checkpoint", pl_module) and not hasattr(pl_module, "roll_back"):
        rank_zero_warn(
            f"what {type(pl_module).__name__}.on_save_checkpoint saves is not put back in a rollback: give the module "
            "the methods rollback_state() and roll_back(trainer, pl_module, state)"
        )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers whose state is divided over the ranks; in ``on_train_start``, where there are some.

    Raises:
        MisconfigurationException: for ZeroRedundancyOptimizer.
    """
    if any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "ZeroRedundancyOptimizer divides its state over the ranks, which a rollback cannot put back: use "
            "ModelParallelStrategy (FSDP2), or action='stop'"
        )


def capture(trainer: Trainer) -> dict[str, Any]:
    """The state of a run after a step, by reference: to be copied before the next one."""
    module = trainer.lightning_module
    reshard(module)
    loop = trainer.fit_loop.epoch_loop
    return {
        "model": {name: local(tensor) for name, tensor in _tensors(module)},
        "extra": {name: part.get_extra_state() for name, part in _with_extra_state(module)},
        "trainable": {name: p.requires_grad for name, p in clean_named_parameters(module).items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": _precision_state(trainer),
        "progress": [
            loop.automatic_optimization.optim_progress.state_dict(),
            loop.manual_optimization.optim_step_progress.state_dict(),
            loop.scheduler_progress.state_dict(),
        ],
        "listeners": {name: _state_of(listener) for name, listener in _listeners(trainer)},
        "files": ranked_checkpoints(trainer),
        "random": _collect_rng_states(),
    }


def restore(trainer: Trainer, snapshot: RunSnapshot) -> None:
    """Put a state back, between two steps, on all ranks together. Gradients are dropped.

    Raises:
        RuntimeError: the model or an optimizer is not the one that the state is of, which is named.
    """
    module = trainer.lightning_module
    trainable: dict[str, bool] = snapshot.tree["trainable"]
    if trainable != {name: p.requires_grad for name, p in clean_named_parameters(module).items()}:
        set_trainable(trainer, trainable)
    _restore_tensors(module, snapshot.host("model"))
    extra = snapshot.rebuild("extra")
    for name, part in _with_extra_state(module):
        part.set_extra_state(extra[name])
    _restore_optimizers(trainer, snapshot.rebuild("optimizers"))
    for config, state in zip(trainer.lr_scheduler_configs, snapshot.rebuild("schedulers"), strict=True):
        config.scheduler.load_state_dict(state)
    _restore_precision(trainer, snapshot.rebuild("precision"))
    loop = trainer.fit_loop.epoch_loop
    automatic, manual, schedulers = snapshot.rebuild("progress")
    loop.automatic_optimization.optim_progress.load_state_dict(automatic)
    loop.manual_optimization.optim_step_progress.load_state_dict(manual)
    loop.scheduler_progress.load_state_dict(schedulers)
    states = snapshot.rebuild("listeners")
    for name, listener in _listeners(trainer):
        _put_back(trainer, listener, states.get(name))
    _set_rng_states(snapshot.rebuild("random"))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers; a frozen parameter as well, which a callback or the module may change."""
    yield from clean_named_parameters(module).items()
    for name, buffer in module.named_buffers():
        yield f"buffer {name}", buffer


def _restore_tensors(module: nn.Module, saved: dict[str, Tensor]) -> None:
    reshard(module)
    present = dict(_tensors(module))
    changed = sorted(
        name
        for name in present.keys() | saved.keys()
        if name not in present or name not in saved or local(present[name]).shape != saved[name].shape
    )
    if changed:
        raise RuntimeError(f"the model has changed since the snapshot, which cannot be put back: {', '.join(changed)}")
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in present.items():
            local(tensor).copy_(saved[name])
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None


def _restore_optimizers(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    for index, (optimizer, state) in enumerate(zip(trainer.optimizers, states, strict=True)):
        sizes = [
            [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
        ]
        if sizes[0] != sizes[1]:
            raise RuntimeError(
                f"the parameter groups of optimizer {index} have changed since the snapshot (sizes {sizes[1]}, now "
                f"{sizes[0]}), which cannot be put back"
            )
        optimizer.state.clear()  # so that the device does not hold two states at a time
        optimizer.load_state_dict(state)


def _precision_state(trainer: Trainer) -> dict[str, Any]:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return trainer.precision_plugin.state_dict()
    # Its state_dict() would wait for the device.
    return {"scale": scaler._scale, "growth_tracker": scaler._growth_tracker}


def _restore_precision(trainer: Trainer, state: dict[str, Any]) -> None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        scaler._scale, scaler._growth_tracker = state["scale"], state["growth_tracker"]
    elif state:
        trainer.precision_plugin.load_state_dict(state)


def _with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield name, part


def _listeners(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    for index, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if not isinstance(callback, _ON_THEIR_OWN):
            yield f"{index} {callback.state_key}", callback
    for name, listener in (("strategy", trainer.strategy), ("module", trainer.lightning_module)):
        if hasattr(listener, "roll_back"):
            yield name, listener


def _state_of(listener: Any) -> dict[str, Any]:
    state: dict[str, Any] = listener.rollback_state() if hasattr(listener, "roll_back") else listener.state_dict()
    return state


def _put_back(trainer: Trainer, listener: Any, state: dict[str, Any] | None) -> None:
    if hasattr(listener, "roll_back"):
        listener.roll_back(trainer, trainer.lightning_module, state or {})
    elif state and isinstance(listener, Callback):
        listener.load_state_dict(state)
