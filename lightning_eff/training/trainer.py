"""What the suite knows of Lightning's Trainer that is not public, or that it would say at many places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_eff.functional.gradients import sparse_gradients
from lightning_eff.training.hooks import Order, WritesLater, tell
from lightning_eff.training.namespaces import MisconfigurationException, is_a

# --- callbacks ------------------------------------------------------------------------------------------------------


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """In the order in which Lightning calls them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of Lightning sets it
    return callbacks


def sort_callbacks(trainer: Trainer) -> None:
    """Sort the callbacks by their ``order`` (see ``hooks.Order``); in ``setup``, as often as one likes."""

    def key(callback: Callback) -> tuple[bool, int]:
        return is_a(callback, Checkpoint), getattr(callback, "order", Order.USUAL)

    # A new list: the Trainer is iterating over the old one.
    trainer.callbacks = sorted(callbacks_of(trainer), key=key)  # type: ignore[attr-defined]


def accumulates(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether an optimizer step may be one of several batches, so that a checkpoint may come between them."""
    several = any(is_a(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))
    return several or trainer.accumulate_grad_batches != 1 or not pl_module.automatic_optimization


def save_surely(trainer: Trainer, path: str, weights_only: bool = False) -> None:
    """Save a checkpoint that is not to be left out because earlier ones are still being written. Collective.

    Nor because one of them could not be: that is raised behind it.
    """
    try:
        tell(trainer, WritesLater)
    except Exception:  # on all ranks
        trainer.save_checkpoint(path, weights_only)
        raise
    trainer.save_checkpoint(path, weights_only)


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """What a run is restored from while it is, and where that fails; empty where there is nothing."""
    return trainer._checkpoint_connector._loaded_checkpoint


# --- logging --------------------------------------------------------------------------------------------------------


def logs_now(trainer: Trainer) -> bool:
    """Whether the step of training in hand is one that Lightning logs (``log_every_n_steps``)."""
    # As its ``should_update_logs``, which asks through several properties whether this is training.
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and ((logger_step(trainer) + 1) % every == 0 or trainer.should_stop)


def logger_step(trainer: Trainer) -> int:
    """The step under which Lightning writes to its loggers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_values(pl_module: LightningModule, method: str, values: Mapping[str, Tensor | float]) -> None:
    """Log numbers of a step as ``<method>/<name>``, without waiting for the device."""
    for name, value in values.items():
        # A copy: the state of a method may be written in place before the logger reads the value. What is known on the
        # host stays there: Lightning would send a float to the device, and wait for it twice.
        if isinstance(value, Tensor):
            number = value.detach().float().clone()
        else:
            number = torch.tensor(float(value), device="cpu")
        pl_module.log(f"{method}/{name}", number, on_step=True, on_epoch=False, batch_size=1)


def tensorboards(trainer: Trainer) -> Iterator[Any]:
    """The ``SummaryWriter`` of each TensorBoard logger, on the rank that writes."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if is_a(logger, TensorBoardLogger):
                yield logger.experiment


# --- steps ----------------------------------------------------------------------------------------------------------


def optimizer_index(trainer: Trainer, optimizer: Optimizer) -> int:
    """Which of ``trainer.optimizers`` it is."""
    return next(index for index, candidate in enumerate(trainer.optimizers) if candidate is optimizer)


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in what ``training_step`` has returned, as ``on_train_batch_end`` gets it; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, Tensor) else None


# --- precision ------------------------------------------------------------------------------------------------------


def gradient_scaler(strategy: Strategy) -> Any:
    """The precision plugin's GradScaler, or None."""
    return getattr(strategy.precision_plugin, "scaler", None)


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's fused kernel takes ``grad_scale`` and ``found_inf``, and Lightning leaves it to that."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def applied_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by in ``on_before_optimizer_step``, a 0-d tensor; None for nothing."""
    scaler = gradient_scaler(trainer.strategy)
    if scaler is None or not unscales_itself(optimizer):
        return None
    scale: Tensor = scaler._get_scale_async()  # get_scale() would wait for the device
    return scale


# --- strategies and ranks -------------------------------------------------------------------------------------------


def refuse_flattened(trainer: Trainer, who: str, why: str) -> None:
    """Refuse the strategies that hide tensors from a callback: FSDP1 and DeepSpeed.

    Args:
        trainer: in ``setup``.
        who: the callback's name.
        why: what follows from flattened or partitioned tensors, to end the sentence "..., which ".

    Raises:
        MisconfigurationException: with the mend.
    """
    if is_a(trainer.strategy, FSDPStrategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{who} does not support {type(trainer.strategy).__name__}, which {why}: use ModelParallelStrategy (FSDP2) "
            "in its place"
        )


def refuse_sparse_gradients(module: LightningModule, parameters: Iterable[Tensor], who: str) -> None:
    """Refuse those of these parameters that an embedding gives sparse gradients, before the first step.

    Raises:
        MisconfigurationException: with the parameter's name and the mend.
    """
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    for name, parameter in sparse_gradients(module).items():
        if id(parameter) in wanted:
            raise MisconfigurationException(
                f"{who} does not support sparse gradients, and {name} has sparse ones: build its layer "
                "with sparse=False"
            )


def refuse_lazy(module: LightningModule, who: str) -> None:
    """Refuse parameters that have no shape before their first forward pass, in ``on_train_start`` at the latest.

    Raises:
        MisconfigurationException: with the parameter's name and the mend.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise MisconfigurationException(
                f"{who} needs the shapes of all parameters before the first step, and {name} of a lazy module has none "
                "yet: call the model once on an example batch, in configure_model or setup"
            )


def replicas_are_equal(strategy: Strategy) -> bool:
    """Whether each replica is a world of its own, and they are equal; see ``hooks.EqualReplicas``."""
    return bool(getattr(strategy, "replicas_are_equal", False))


def is_alone(strategy: Strategy) -> bool:
    """Whether there is no other process to agree with."""
    return int(getattr(strategy, "world_size", 1)) == 1 and not replicas_are_equal(strategy)


def ranks_agree(strategy: Strategy, number: int) -> bool:
    """Whether all ranks hold the same integer of up to 62 bits. One reduction of 16 bytes and one host sync."""
    if is_alone(strategy):
        return True
    bounds = torch.tensor([number, -number], device=strategy.root_device)
    if replicas_are_equal(strategy):
        bounds = strategy.reduce(bounds, reduce_op="max")  # type: ignore[assignment]
    else:
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    highest, negative_lowest = bounds.tolist()
    return bool(highest == -negative_lowest)
