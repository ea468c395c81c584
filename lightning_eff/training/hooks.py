"""The suite's own hooks: all that its callbacks, strategies and a user's module may answer to beside Lightning's.

A hook is a method that is there or is not; nothing is registered, and a Protocol below is no base class. ``tell`` calls
one on the strategy, on every callback in the Trainer's order, and on the LightningModule. To answer to a hook, write
the method; to see who does, ``isinstance(callback, HearsAlarms)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from lightning_eff.arguments import check_instance, check_trainer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_eff.training.alarms import Alarm
    from lightning_eff.training.trainable import TrainableChange

# --- of callbacks, and where it says so of the module and the strategy ----------------------------------------------


@runtime_checkable
class HearsAlarms(Protocol):
    """Is told of every alarm that a monitor sounds, see ``alarms.sound``; on one rank or on several."""

    def on_alarm(self, trainer: Trainer, pl_module: LightningModule, alarm: Alarm) -> None:
        """Note it. To act on it, agree with the other ranks first."""


@runtime_checkable
class FollowsTrainable(Protocol):
    """Is told which parameters are trained from now on; the strategy and the module too. On all ranks together."""

    def on_trainable_change(self, trainer: Trainer, pl_module: LightningModule, change: TrainableChange) -> None:
        """``requires_grad`` is set and DDP is wrapped anew already."""


@runtime_checkable
class ReadsWeights(Protocol):
    """Reads weights later than it was asked to (an asynchronous save); the strategy and the module too."""

    def before_weights_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are about to be written in place outside of an optimizer step: finish reading them first.

        Whoever writes them tells it, on every rank that does: averages that take the weights' place, a rollback, a
        heal (both by ``run_parts.load_training_state``). The old weights are still there when it is called.
        """


@runtime_checkable
class HearsOfTheEnd(Protocol):
    """Is told when all replicas of ``ddp_ft`` have been asked to leave at once, so that the run would be lost."""

    def on_all_leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, between two steps; on all replicas together, and their processes end behind it."""


@runtime_checkable
class WritesLater(Protocol):
    """Has files that are not on disk yet (an asynchronous save); the strategy and the module too."""

    def before_exit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The process is about to be ended by a callback, on all ranks: finish writing first. Collective."""


@runtime_checkable
class HasRunState(Protocol):
    """Has more, or other, state in the middle of a run than ``state_dict`` gives a checkpoint; all three may.

    For a rollback, which goes back to it between two steps, and for a replica of ``ddp_ft`` that takes a peer's,
    between two steps or within one. Without these hooks a callback's ``state_dict`` and ``load_state_dict`` are used;
    after a heal it also gets ``on_train_start``, as in a resume. What a callback keeps in files beside a checkpoint
    (``RankState``) or adds in ``on_save_checkpoint`` belongs to its ``run_state``: the two go no other way.
    """

    def run_state(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors and plain values, by reference: the caller copies before the next step.

        Nothing waits for the device: a tensor is given where it is, and no number is read.
        """

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from it; its tensors are for the taking, and may be on another device.

        The weights, the optimizers and ``global_step`` are those of the state already, and the same parameters are
        trained. ``within_step``: in the midst of a step, in place of a peer that had made it, whose end
        (``on_train_batch_end``) is still to come.
        """


@runtime_checkable
class CountsSpikes(Protocol):
    """Counts gradient norms that are outliers (ZClip), for the rule ``GradientSpikes``."""

    def spike_count(self) -> Tensor:
        """So far; 0-d, on the device."""


@runtime_checkable
class HasCharts(Protocol):
    """Has charts for ``TensorBoardLayout``."""

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Title -> ``["Multiline", [tag, ...]]``, ``["Colours", {run: [tag, ...]}]`` or ``["Margin", [tag] * 3]``."""


class Order(IntEnum):
    """A callback's class attribute ``order``: where it stands among the others, whatever order they were given in.

    Callbacks without one are ``USUAL`` and keep the order of the list. Lightning's checkpoint callbacks come last.
    """

    FIRST = 0
    """Sees a step before every other callback."""
    USUAL = 1
    """Observes gradients before they are changed, or does not care."""
    CHANGES_GRADIENTS = 2
    """Clips or replaces gradients: all that observe them come before it."""
    LAST = 3
    """Keeps or puts back what the others have done in a hook."""


# Flags, class attributes of a callback that default to False:
#   changes_trainable   decides which parameters are trained; two of them in a Trainer would contradict each other.
#   rolls_back          goes back to an earlier state of the run on an alarm.


# --- of strategies --------------------------------------------------------------------------------------------------


@runtime_checkable
class EqualReplicas(Protocol):
    """Each replica is a world of its own (``world_size`` is its own), all are equal, and one of them writes for all."""

    replicas_are_equal: bool
    within_step: bool
    """Whether a step has begun that the replicas have not all committed."""

    def is_written(self, here: bool) -> bool:
        """Whether any living replica has written something; if not, who should have died over it. Collective."""

    def leave(self, status: int = 0) -> None:
        """Take this replica out of the run: some steps later its process ends with this status, and others go on."""


@runtime_checkable
class CompressesGradients(Protocol):
    """Sends less than the gradients, and counts it."""

    @property
    def traffic(self) -> Any:
        """What was sent, see ``compression.comm_hook.Traffic``."""

    def measure(self) -> None:
        """Let the next step also measure what it leaves out."""

    def relative_error(self) -> Tensor | None:
        """Of the last step that was measured. Collective."""


# A flag of a strategy, an attribute that defaults to False:
#   saves_later         a checkpoint may be written after `save_checkpoint` has returned, by its `sharded_saves`.

# Reasons of a strategy to refuse, attributes that default to None:
#   trainable_change_refused   why the set of trained parameters cannot change during a run.
#   rollback_refused           why a run cannot go back to an earlier state.


# --- calling them ---------------------------------------------------------------------------------------------------

_Hook = TypeVar("_Hook")


def all_with(trainer: Trainer, hook: type[_Hook]) -> Iterator[_Hook]:
    """The strategy, the callbacks in their order and the module, those of them that answer to a hook.

    Args:
        trainer: one that is set up.
        hook: a Protocol of this page.

    Returns:
        They, one by one.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> list(all_with(trainer, HearsAlarms))
        []
    """
    check_trainer(trainer)
    check_instance("hook", hook, type, "a class of lightning_eff.training, such as HearsAlarms")
    # `lightning_module` and not the property of the Trainer: a strategy may have none yet.
    listeners = (trainer.strategy, *trainer.callbacks, trainer.strategy.lightning_module)  # type: ignore[attr-defined]
    return (listener for listener in listeners if isinstance(listener, hook))


def tell(trainer: Trainer, hook: type[Any], *args: Any) -> int:
    """Call a hook of one method on all that answer to it, with the Trainer, its module and ``args``.

    Args:
        trainer: one that is set up.
        hook: a Protocol of this page with one method, ``on_...`` or ``before_...``.
        args: what its method takes behind the Trainer and the module.

    Returns:
        How many there are.

    Example:
        >>> import lightning as L
        >>> class Listener(L.Callback):
        ...     def on_alarm(self, trainer, pl_module, alarm):
        ...         print("heard:", alarm)
        >>> trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[Listener()])
        >>> tell(trainer, HearsAlarms, "too hot")
        heard: too hot
        1
    """
    check_instance("hook", hook, type, "a class of lightning_eff.training, such as HearsAlarms")
    (name,) = (name for name in vars(hook) if name.startswith(("on_", "before_")))
    listeners = list(all_with(trainer, hook))
    for listener in listeners:
        getattr(listener, name)(trainer, trainer.lightning_module, *args)
    return len(listeners)
