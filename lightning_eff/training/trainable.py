"""Freezing and unfreezing parameters during a run, as one event for everyone who has to know.

`set_trainable` toggles ``requires_grad``, so that autograd computes no gradient for a frozen parameter, and lets the
strategy follow: DDP is wrapped anew, since it would wait for the gradients of frozen parameters, or reduce them as
zeros. Afterwards whoever has the hook ``on_trainable_change`` (``hooks.FollowsTrainable``) is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eff.arguments import check, check_trainer
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.hooks import FollowsTrainable, tell
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.trainer import callbacks_of, ranks_agree

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


@dataclass(frozen=True)
class TrainableChange:
    """What an event has changed: parameters by clean name, in the order of the model.

    Attributes:
        unfrozen: those that are trained from now on.
        frozen: those that no longer are; their ``grad`` is None.
    """

    unfrozen: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]

    def __bool__(self) -> bool:
        return bool(self.unfrozen or self.frozen)


def check_trainable_support(trainer: Trainer) -> None:
    """Say in ``setup`` already whether `set_trainable` can work; it checks again itself.

    Args:
        trainer: one whose strategy is there.

    Raises:
        MisconfigurationException: for a strategy whose set of trainable parameters is fixed, with the reason.

    Example:
        >>> import lightning as L
        >>> check_trainable_support(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1))
    """
    check_trainer(trainer)
    strategy = trainer.strategy
    # DeepSpeedStrategy is a DDPStrategy only by inheritance.
    if not is_a(strategy, *_SUPPORTED) or is_a(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} does not support freezing and unfreezing parameters during a run, because it "
            "flattens or partitions them: use a single device, DDP or ModelParallelStrategy (FSDP2)"
        )
    reason = getattr(strategy, "trainable_change_refused", None)
    if reason is not None:
        raise MisconfigurationException(
            f"{type(strategy).__name__} does not support freezing and unfreezing parameters during a run: {reason}"
        )
    if is_a(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        raise MisconfigurationException(
            "DDPStrategy(static_graph=True) promises that the set of trained parameters never changes, and freezing "
            "and unfreezing parameters changes it: remove static_graph"
        )


def set_trainable(trainer: Trainer, trainable: Mapping[str, bool]) -> TrainableChange:
    """Unfreeze (True) and freeze (False) parameters; those not named stay as they are.

    Call it on all ranks together, between two steps: in ``on_train_start``, ``on_train_batch_end`` or at the end of an
    epoch or a validation. Where nothing changes, nothing is done. The optimizer keeps its groups and its state: it
    passes over a parameter without gradient.

    Under DDP the model is wrapped anew, once, with the strategy's arguments and its communication hooks but without
    the broadcast of the model: from then on only the gradients of trained parameters are reduced. A hook that keeps
    state for each bucket (PyTorch's PowerSGD) has to begin anew on ``on_trainable_change``, as buckets differ then.
    FSDP2 follows ``requires_grad`` by itself. Under ``ddp_ft`` "all ranks" are the living replicas, and one that comes
    in later heals to the same set.

    Collectives: one reduction of 16 bytes, to see whether all ranks ask for the same; DDP's own when it rebuilds its
    buckets in the next step. Host syncs: one.

    Args:
        trainer: one whose ``fit`` is running.
        trainable: clean name of a parameter (see ``clean_named_parameters``) -> whether it is trained from now on.

    Returns:
        What has changed.

    Raises:
        ValueError: an unknown name, a parameter that cannot have a gradient, or no parameter would remain: stop the
            training in that case, with ``trainer.should_stop``. Nothing has been changed.
        MisconfigurationException: see ``check_trainable_support``.
        RuntimeError: on all ranks, if they do not agree; under ``ddp_ft``, in the midst of a step. Nothing has been
            changed.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class FreezeBias(L.Callback):
        ...     def on_train_batch_end(self, trainer, pl_module, *args):
        ...         if trainer.global_step == 1:
        ...             change = set_trainable(trainer, {"layer.bias": False})
        ...             print("frozen:", *change.frozen)
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[FreezeBias()], accelerator="cpu", logger=False, limit_val_batches=0,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        frozen: layer.bias
    """
    check_trainable_support(trainer)
    ok = isinstance(trainable, Mapping) and all(isinstance(trained, bool) for trained in trainable.values())
    check("trainable", trainable, ok, "a dictionary of names of parameters, and True or False for each")
    strategy, module = trainer.strategy, trainer.lightning_module
    reshard(module)  # after a validation FSDP2 may show its gathered parameters, where a change would be lost
    parameters = clean_named_parameters(module)
    _check_names(parameters, trainable)
    wanted = {name: trainable.get(name, parameter.requires_grad) for name, parameter in parameters.items()}
    _check_agreement(trainer, wanted)
    if not any(wanted.values()):
        raise ValueError("no parameter would remain trainable: stop the training instead (trainer.should_stop = True)")

    changed = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad != wanted[name]}
    change = TrainableChange(
        unfrozen={name: parameter for name, parameter in changed.items() if wanted[name]},
        frozen={name: parameter for name, parameter in changed.items() if not wanted[name]},
    )
    if not change:
        return change
    for name, parameter in changed.items():
        parameter.requires_grad_(wanted[name])
    for parameter in change.frozen.values():
        parameter.grad = None
    _show_to_compiled(module, changed)
    if is_a(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        _wrap_anew(strategy)
    tell(trainer, FollowsTrainable, change)
    return change


def trainable_by_name(module: nn.Module, trainable: Mapping[nn.Parameter, bool]) -> dict[str, bool]:
    """What ``set_trainable`` takes, for parameters whose names may have changed; those that are gone are left out.

    Pruning and other re-parametrizations in the midst of a run rename a parameter (``weight`` to ``weight_orig``).
    """
    reshard(module)  # what FSDP2 shows while it is gathered is another object
    named = clean_named_parameters(module)
    return {name: trainable[parameter] for name, parameter in named.items() if parameter in trainable}


def refuse_other_deciders(trainer: Trainer, callback: Callback) -> None:
    """Refuse in ``setup`` a second callback that decides which parameters are trained.

    Raises:
        MisconfigurationException: it has ``changes_trainable``, or is Lightning's BaseFinetuning.
    """
    for other in callbacks_of(trainer):
        decides = getattr(other, "changes_trainable", False) or is_a(other, BaseFinetuning)
        if decides and other is not callback:
            raise MisconfigurationException(
                f"{type(callback).__name__} and {type(other).__name__} would both decide which parameters are trained: "
                "keep one of them"
            )


def _check_names(parameters: Mapping[str, nn.Parameter], trainable: Mapping[str, bool]) -> None:
    for name, trained in trainable.items():
        if name not in parameters:
            close = ", ".join(get_close_matches(name, parameters)) or "; ".join(list(parameters)[:10])
            raise ValueError(
                f"trainable: there is no parameter {name!r} (a tied one goes by its first name). Did you mean: {close}"
            )
        if trained and not (parameters[name].is_floating_point() or parameters[name].is_complex()):
            raise ValueError(f"parameter {name!r} of dtype {parameters[name].dtype} cannot have a gradient")


def _check_agreement(trainer: Trainer, wanted: Mapping[str, bool]) -> None:
    """Compare one number in place of all names: without it, ranks that differ would hang in the next step."""
    if getattr(trainer.strategy, "within_step", False):
        raise RuntimeError(
            "parameters are frozen and unfrozen between two optimizer steps, and this is in the midst of one: it might "
            "be repeated, with other parameters than before"
        )
    digest = hashlib.sha256(repr(sorted(wanted.items())).encode()).digest()
    if not ranks_agree(trainer.strategy, int.from_bytes(digest[:7], "big")):
        raise RuntimeError("the ranks do not agree on which parameters to train: decide from values equal on all ranks")


def _show_to_compiled(module: nn.Module, changed: Mapping[str, nn.Parameter]) -> None:
    """Let compiled modules look at ``requires_grad`` again.

    They take the tensors of a dictionary that nobody has written to for the same as before; in torch 2.8 and 2.11 their
    ``requires_grad`` too, so that what was frozen when they were compiled had no gradient. The entries are set anew.
    """
    parameters = set(changed.values())
    for owner in module.modules():
        if not parameters.isdisjoint(owner._parameters.values()):
            entries = dict(owner._parameters)
            owner._parameters.clear()
            owner._parameters.update(entries)


def _wrap_anew(strategy: DDPStrategy) -> None:
    old = strategy.model
    assert isinstance(old, DistributedDataParallel)
    hooks, training, syncing = list(old._comm_hooks), old.training, old.require_backward_grad_sync
    # Until it is collected, the old wrapper would answer to every gradient as well.
    old.reducer._remove_autograd_hooks()
    strategy.model = old.module
    del old  # its buckets are freed before the new ones are made
    kwargs = strategy._ddp_kwargs
    strategy._ddp_kwargs = {**kwargs, "init_sync": False}  # the ranks are equal: no broadcast of the whole model
    try:
        new = strategy._setup_model(strategy.model)
    finally:
        strategy._ddp_kwargs = kwargs
    strategy.model = new
    new.training = training  # not by `train()`, which would switch every module inside as well
    new.require_backward_grad_sync = syncing
    strategy._register_ddp_hooks()
    if not new._comm_hooks:  # else the strategy has registered its own
        for hook, state in hooks:
            new.register_comm_hook(state, hook)
