"""The state of a run between two steps: what has to be put back so that training goes on from an earlier step.

Three clocks run in a fit, and a rollback turns back one of them:

- that of the training goes back: ``global_step``, the optimizers, their schedulers, the GradScaler, callbacks, what
  the present epoch's means are of. ``max_steps`` counts the steps that have not been undone.
- that of the data goes on: ``batch_idx``, epochs and the schedulers that count them, the data loaders, validation every
  so many batches, what BaseFinetuning has unfrozen.
- that of the loggers goes on: no step is written twice, so a curve shows what was undone and what came after it.

Random numbers are drawn anew, from the restored state and the number of rollbacks: what broke the run may have been
drawn.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Checkpoint, StochasticWeightAveraging, Timer, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_eff.arguments import readable_size
from lightning_eff.callbacks.training_guard.checkpoint_files import ranked_checkpoints
from lightning_eff.callbacks.training_guard.run_snapshots import RunSnapshot, RunSnapshots
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.hooks import HasRunState
from lightning_eff.training.logged import epoch_means, set_epoch_means
from lightning_eff.training.namespaces import MisconfigurationException, is_a, overrides
from lightning_eff.training.random_state import draw_anew
from lightning_eff.training.run_parts import (
    catch_up_with_epochs,
    epochs_ended,
    load_training_state,
    training_state,
)
from lightning_eff.training.trainer import callbacks_of, refuse_lazy

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)

# Files on disk, the time of day and what is done epoch by epoch do not go back; see `checkpoint_files` for the first.
_ON_THEIR_OWN = (Checkpoint, Timer, BaseFinetuning)


def check_rollback_support(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say in ``setup`` already what cannot be put back.

    Raises:
        MisconfigurationException: for a strategy or a callback whose state is out of sight, with the mend.
    """
    strategy = trainer.strategy
    if not is_a(strategy, *_SUPPORTED) or is_a(strategy, DeepSpeedStrategy):
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
    for callback in callbacks_of(trainer):
        if is_a(callback, WeightAveraging, StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} keeps an average that cannot be put back in the middle of a fit: use "
                "lightning_eff's EMA or CheckpointAveraging in its place, or action='stop'"
            )
    if overrides(pl_module, "on_save_checkpoint") and not isinstance(pl_module, HasRunState):
        rank_zero_warn(
            f"what {type(pl_module).__name__}.on_save_checkpoint saves is not put back in a rollback: give the module "
            "the methods run_state() and load_run_state(trainer, pl_module, state, *, within_step)"
        )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers whose state is divided over the ranks; in ``on_train_start``, where there are some.

    Raises:
        MisconfigurationException: for ZeroRedundancyOptimizer, and for parameters that have no shape yet.
    """
    refuse_lazy(trainer.lightning_module, "TrainingGuard")
    if any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "ZeroRedundancyOptimizer divides its state over the ranks, which a rollback cannot put back: use "
            "ModelParallelStrategy (FSDP2), or action='stop'"
        )


def check_memory(trainer: Trainer, snapshots: RunSnapshots, state: Any) -> None:
    """Say what a window of such states takes, and refuse what does not fit, on all ranks together.

    Raises:
        MisconfigurationException: there is less memory than that.
    """
    window, size = snapshots.window, snapshots.bytes_of(state)
    sharing = 1 if window.place == "model" else max(1, trainer.num_devices)  # ranks of this machine
    free = window.free_bytes(trainer.strategy.root_device)
    where = {"cpu": "host memory", "disk": f"files under {window.folder}", "model": "the model's device"}
    needed = f"{window.length} x {readable_size(size)} on each rank in {where[window.place]}"
    fits = free is None or (window.length - len(snapshots.steps)) * size * sharing <= free
    if not trainer.strategy.reduce_boolean_decision(fits, all=True):
        raise MisconfigurationException(
            f"TrainingGuard(keep={window.length}) keeps {needed}, and {readable_size(free or 0)} are free here: "
            "take a smaller keep= or another storage= ('cpu', 'disk', 'model')"
        )
    rank_zero_info(f"TrainingGuard keeps {needed}")


def capture(trainer: Trainer) -> dict[str, Any]:
    """The state of a run after a step, by reference: to be copied before the next one."""
    return {
        **training_state(trainer, _ON_THEIR_OWN),
        "groups": [len(optimizer.param_groups) for optimizer in trainer.optimizers],
        "epochs": epochs_ended(trainer),
        "means": epoch_means(trainer),
        "files": ranked_checkpoints(trainer),
    }


def restore(trainer: Trainer, snapshot: RunSnapshot, *, number: int | None) -> None:
    """Put a state back, between two steps, on all ranks together. Gradients are dropped.

    Args:
        trainer: whose ``fit`` is running.
        snapshot: of what `capture` gave.
        number: of this rollback, from which the random numbers follow; None: those of the snapshot come again.

    Raises:
        RuntimeError: the model or an optimizer is not the one that the state is of, which is named.
    """

    def part(name: str) -> Any:
        if name == "trainable":
            return _wanted(trainer, snapshot)
        return snapshot.host(name) if name == "model" else snapshot.rebuild(name)

    load_training_state(trainer, part, within_step=False, on_their_own=_ON_THEIR_OWN)
    catch_up_with_epochs(trainer, snapshot.tree["epochs"])
    set_epoch_means(trainer, snapshot.rebuild("means"))
    if number is not None:
        draw_anew(snapshot.rebuild("random"), number, trainer.strategy.root_device)


def _wanted(trainer: Trainer, snapshot: RunSnapshot) -> dict[str, bool]:
    """Which parameters are to be trained; none is named that is unfrozen epoch by epoch, for epochs do not go back."""
    if any(is_a(callback, BaseFinetuning) for callback in callbacks_of(trainer)):
        return {}
    counts = zip(trainer.optimizers, snapshot.tree["groups"], strict=True)
    added = {id(p) for optimizer, count in counts for group in optimizer.param_groups[count:] for p in group["params"]}
    parameters = clean_named_parameters(trainer.lightning_module)
    saved: dict[str, bool] = snapshot.tree["trainable"]
    return {name: trained for name, trained in saved.items() if id(parameters.get(name)) not in added}
