"""The parts of a running Trainer's state: each is read here and put back here (``logged.py`` for logs), nowhere else.

Who needs an earlier or another state picks parts: a rollback (``TrainingGuard``), a heal and a step that is run again
(``ddp_ft``). `training_state` has those that a rollback and a heal share, and `load_training_state` puts them back in
the one order that works. Everything is given by reference, to be copied or sent before the next step.

What callbacks, the strategy and the module keep is asked of them: ``hooks.HasRunState``, or else ``state_dict``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from torch import Tensor, nn

from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.dtensor import local, reshard
from lightning_eff.training.hooks import HasRunState, ReadsWeights, tell
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.random_state import random_state, set_random_state
from lightning_eff.training.trainable import set_trainable
from lightning_eff.training.trainer import callbacks_of, gradient_scaler

# --- all that a rollback and a heal share ---------------------------------------------------------------------------


def training_state(trainer: Trainer, on_their_own: tuple[type, ...] = ()) -> dict[str, Any]:
    """The state of the training after a step, by reference; a rank's own part of what is sharded.

    Args:
        trainer: whose ``fit`` is running.
        on_their_own: kinds of callbacks that are left out.
    """
    module = trainer.lightning_module
    reshard(module)
    return {
        "model": model_tensors(module),
        "extra": {name: part.get_extra_state() for name, part in _with_extra_state(module)},
        "trainable": trainable(module),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": scheduler_states(trainer),
        "precision": _precision_state(trainer),
        "progress": _progress(trainer),
        "listeners": {name: _state_of(listener) for name, listener in _listeners(trainer, on_their_own)},
        "random": random_state(trainer.strategy.root_device),
    }


def load_training_state(
    trainer: Trainer,
    part: Callable[[str], Any],
    *,
    within_step: bool,
    begin: bool = False,
    on_their_own: tuple[type, ...] = (),
) -> None:
    """Go on from a state, on all ranks together. Gradients are dropped.

    Args:
        trainer: whose ``fit`` is running.
        part: a part of `training_state` by its name, with tensors of its own, on any device.
        within_step: in the midst of a step: the counters of steps are right already.
        begin: as after a resume, callbacks that have no ``run_state`` get ``on_train_start`` behind their state.
        on_their_own: kinds of callbacks that are left alone.

    Raises:
        RuntimeError: the model or an optimizer is not the one that the state is of, which is named.
    """
    module = trainer.lightning_module
    tell(trainer, ReadsWeights)
    now, wanted = trainable(module), part("trainable")
    if changes := {name: wanted[name] for name, trained in now.items() if wanted.get(name, trained) != trained}:
        set_trainable(trainer, changes)  # before the callbacks get their state: they are told of it
    set_model_tensors(module, part("model"))
    extra = part("extra")
    for name, owner in _with_extra_state(module):
        owner.set_extra_state(extra[name])
    for optimizer in trainer.optimizers:
        optimizer.state.clear()  # so that the device does not hold two states at a time
    set_optimizer_states(trainer, part("optimizers"))
    set_scheduler_states(trainer, part("schedulers"))
    _set_precision(trainer, part("precision"))
    if not within_step:
        _set_progress(trainer, part("progress"))
    states = part("listeners")
    for name, listener in _listeners(trainer, on_their_own):
        _put_back(trainer, listener, states.get(name), within_step, begin)
    set_random_state(part("random"), trainer.strategy.root_device)


# --- the model ------------------------------------------------------------------------------------------------------


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by clean names and all buffers, this rank's part; frozen parameters too, which may be changed."""
    return {name: local(tensor) for name, tensor in _tensors(module)}


def set_model_tensors(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy `model_tensors` into the model, and drop the gradients.

    A buffer that is not saved in checkpoints may have been made anew with another shape, such as a table of positions:
    that one stays as it is.

    Raises:
        RuntimeError: names or shapes are others.
    """
    reshard(module)
    present = dict(_tensors(module))
    changed = {
        name
        for name in present.keys() | saved.keys()
        if name not in present or name not in saved or local(present[name]).shape != saved[name].shape
    }
    lost = sorted(changed - _passing_buffers(module))
    if lost:
        raise RuntimeError(f"the model has changed since the snapshot, which cannot be put back: {', '.join(lost)}")
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in present.items():
            if name not in changed:
                local(tensor).copy_(saved[name])
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None


def trainable(module: nn.Module) -> dict[str, bool]:
    """Which parameters are trained, by clean names."""
    return {name: parameter.requires_grad for name, parameter in clean_named_parameters(module).items()}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from clean_named_parameters(module).items()
    for name, buffer in module.named_buffers():
        if not is_expanded(buffer):
            yield f"buffer {name}", buffer


def is_expanded(tensor: Tensor) -> bool:
    """Whether several of its elements are one in memory: torch writes nothing into such a tensor, and nor can we."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _passing_buffers(module: nn.Module) -> set[str]:
    """Those that are not saved in checkpoints."""
    return {
        f"buffer {path}.{name}" if path else f"buffer {name}"
        for path, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }


def _with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield name, part


# --- optimizers, schedulers, precision ------------------------------------------------------------------------------


def set_optimizer_states(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Load the optimizers' states. Groups that were added since then stay, and begin with no state.

    Raises:
        RuntimeError: the groups are others.
    """
    for index, (optimizer, state) in enumerate(zip(trainer.optimizers, states, strict=True)):
        then, now = state["param_groups"], optimizer.state_dict()["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (then, now)]
        if sizes[1][: len(then)] != sizes[0]:
            raise RuntimeError(
                f"the parameter groups of optimizer {index} have changed since the snapshot (sizes {sizes[0]}, now "
                f"{sizes[1]}), which cannot be put back"
            )
        optimizer.load_state_dict({**state, "param_groups": [*then, *now[len(then) :]]})


def group_values(trainer: Trainer) -> list[list[dict[str, Any]]]:
    """Learning rates and the like, of each optimizer: copies."""
    return [
        [{name: _copy(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]


def set_group_values(trainer: Trainer, saved: list[list[dict[str, Any]]]) -> None:
    """Set what `group_values` gave."""
    for optimizer, of_optimizer in zip(trainer.optimizers, saved, strict=True):
        for group, values in zip(optimizer.param_groups, of_optimizer, strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor) and isinstance(group[name], Tensor):
                    group[name].copy_(value)  # a compiled or captured step refers to it
                else:
                    group[name] = value


def scheduler_states(trainer: Trainer) -> list[dict[str, Any]]:
    """Of the learning rates' schedulers."""
    return [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]


def set_scheduler_states(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Set what `scheduler_states` gave."""
    for config, state in zip(trainer.lr_scheduler_configs, states, strict=True):
        config.scheduler.load_state_dict(state)


def catch_up_with_epochs(trainer: Trainer, then: int) -> None:
    """Tell the schedulers that count epochs of those which have ended since ``then`` had: epochs do not go back.

    Not of a scheduler that looks at a metric: those of the epochs in between are undone.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:  # the user steps them
        return
    for config in trainer.lr_scheduler_configs:
        if config.interval == "epoch" and not config.reduce_on_plateau:
            for epoch in range(then, epochs_ended(trainer)):
                if (epoch + 1) % config.frequency == 0:
                    module.lr_scheduler_step(config.scheduler, None)


def _precision_state(trainer: Trainer) -> dict[str, Any]:
    scaler = gradient_scaler(trainer.strategy)
    if scaler is None:
        return trainer.precision_plugin.state_dict()
    # Its state_dict() would wait for the device.
    return {"scale": scaler._scale, "growth_tracker": scaler._growth_tracker}


def _set_precision(trainer: Trainer, state: dict[str, Any]) -> None:
    scaler = gradient_scaler(trainer.strategy)
    if scaler is not None:
        scaler._scale, scaler._growth_tracker = state["scale"], state["growth_tracker"]
    elif state:
        trainer.precision_plugin.load_state_dict(state)


# --- the loops ------------------------------------------------------------------------------------------------------


def _progress(trainer: Trainer) -> list[dict[str, Any]]:
    """How many steps were made: ``global_step`` and what is counted with it."""
    loop = trainer.fit_loop.epoch_loop
    return [
        loop.automatic_optimization.optim_progress.state_dict(),
        manual_steps(trainer),
        loop.scheduler_progress.state_dict(),
    ]


def _set_progress(trainer: Trainer, saved: list[dict[str, Any]]) -> None:
    loop = trainer.fit_loop.epoch_loop
    automatic, manual, schedulers = saved
    loop.automatic_optimization.optim_progress.load_state_dict(automatic)
    set_manual_steps(trainer, manual)
    loop.scheduler_progress.load_state_dict(schedulers)


def manual_steps(trainer: Trainer) -> dict[str, Any]:
    """The optimizer steps of manual optimization."""
    return trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.state_dict()


def set_manual_steps(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Set what `manual_steps` gave."""
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.load_state_dict(saved)


def place_in_data(trainer: Trainer) -> dict[str, Any]:
    """Epochs and batches, and the loaders' place where they have one: the state of the loops, as in a checkpoint."""
    return trainer.fit_loop.state_dict()


def set_place_in_data(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Set what `place_in_data` gave: the loops go on from there as if they had come there by themselves."""
    trainer.fit_loop.load_state_dict(saved)
    for loop in _all_loops(trainer.fit_loop):
        loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the epoch has no further batch behind the one in hand."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def epochs_ended(trainer: Trainer) -> int:
    """How many epochs are over for a scheduler that counts them; at the end of the last batch it is told already."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.current_epoch + int(current.processed == current.ready and is_last_batch(trainer))


def _all_loops(loop: _Loop) -> list[_Loop]:
    found = [loop]
    for value in vars(loop).values():
        if is_a(value, _Loop):
            found += _all_loops(value)
    return found


# --- callbacks, strategy, module ------------------------------------------------------------------------------------


def _listeners(trainer: Trainer, on_their_own: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Who keeps something, each under a name: that of its state in a checkpoint, and a number where there are two."""
    seen: Counter[str] = Counter()
    for callback in callbacks_of(trainer):
        key, seen[callback.state_key] = callback.state_key, seen[callback.state_key] + 1
        if not is_a(callback, *on_their_own):
            yield (key if seen[key] == 1 else f"{key} {seen[key]}"), callback
    for name, listener in (("strategy", trainer.strategy), ("module", trainer.lightning_module)):
        if isinstance(listener, HasRunState):
            yield name, listener


def _state_of(listener: Any) -> dict[str, Any]:
    state: dict[str, Any] = listener.run_state() if isinstance(listener, HasRunState) else listener.state_dict()
    return state


def _put_back(trainer: Trainer, listener: Any, state: dict[str, Any] | None, within_step: bool, begin: bool) -> None:
    if not state:
        return
    module = trainer.lightning_module
    if isinstance(listener, HasRunState):
        listener.load_run_state(trainer, module, state, within_step=within_step)
        return
    listener.load_state_dict(state)
    if begin:
        listener.on_train_start(trainer, module)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
