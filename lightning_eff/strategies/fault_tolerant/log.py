"""What the logger is told of losses and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.training.hooks import Order
from lightning_eff.training.trainer import log_values, logger_step, logs_now, tensorboards

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.membership import Membership


class ReplicaLog(Callback):
    """Scalars ``ft/*`` when the logger is due, and a text event for each loss and return.

    Args:
        replicas: of the strategy, which adds this callback.
        shrinks: whether the shards of dead replicas are left out, so that nobody takes them over.
    """

    order = Order.FIRST

    def __init__(self, replicas: Membership, shrinks: bool) -> None:
        self.replicas = replicas
        self.shrinks = shrinks
        self._members: list[int] = []
        self._aborts = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        replicas = self.replicas
        if replicas.in_attempt:
            return  # the step goes on with the next micro-batch
        if logs_now(trainer):
            alive = len(replicas.members)
            values = {
                "participants": alive,
                "committed": trainer.global_step,
                "aborted_steps": self._aborts + replicas.aborts,
                "takeover_shards": 0 if self.shrinks else replicas.count - alive,
            }
            log_values(pl_module, "ft", values)
        # Not at the next multiple of log_every_n_steps: an event has its own step.
        step = logger_step(trainer)
        if waited := replicas.take_waited():
            for logger in trainer.loggers:
                logger.log_metrics({"ft/recovery_seconds": waited}, step=step)
        if self._members and replicas.members != self._members:
            self._tell(trainer, step)
        self._members = replicas.members

    def _tell(self, trainer: Trainer, step: int) -> None:
        lost = [index for index in self._members if index not in self.replicas.members]
        back = [index for index in self.replicas.members if index not in self._members]
        words = [f"replica {index} is lost" for index in lost] + [f"replica {index} has come in" for index in back]
        text = f"after {trainer.global_step} steps: {', '.join(words)}; {self.replicas.members} take part, "
        text += f"{self.replicas.writer} writes"
        rank_zero_info(f"ddp_ft: {text}")
        for writer in tensorboards(trainer):
            writer.add_text("ft/events", text, step)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        words = {
            "replicas that take part": "participants",
            "steps that were made again": "aborted_steps",
            "shards that are taken over": "takeover_shards",
            "from a loss to the next step (seconds)": "recovery_seconds",
        }
        return {title: ["Multiline", [f"ft/{name}"]] for title, name in words.items()}

    # Not `state_dict`: a resume restores callbacks before the strategy can add this one, and would warn of it.

    def held(self) -> dict[str, Any]:
        """For a replica that comes in."""
        return {"aborts": self._aborts + self.replicas.aborts, "members": list(self.replicas.members)}

    def take(self, held: dict[str, Any]) -> None:
        """Go on from what a peer has `held`."""
        self._aborts = held["aborts"] - self.replicas.aborts
        self._members = list(held["members"])
