"""What the logger is told of losses and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.membership import Membership


class ReplicaLog(Callback):
    """Scalars ``ft/*`` when the logger is due, and a text event for each loss and return.

    Args:
        replicas: of the strategy, which adds this callback.
        shrinks: whether the shards of dead replicas are left out, so that nobody takes them over.
    """

    observes_gradients = False

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
        if trainer._logger_connector.should_update_logs:
            alive = len(replicas.members)
            values = {
                "ft/participants": alive,
                "ft/committed": trainer.global_step,
                "ft/aborted_steps": self._aborts + replicas.aborts,
                "ft/takeover_shards": 0 if self.shrinks else replicas.count - alive,
            }
            pl_module.log_dict({name: float(value) for name, value in values.items()}, batch_size=1)
        # Not at the next multiple of log_every_n_steps: an event has its own step.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if replicas.waited > 0.0:
            for logger in trainer.loggers:
                logger.log_metrics({"ft/recovery_seconds": replicas.waited}, step=step)
            replicas.waited = 0.0
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
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("ft/events", text, step)

    # Not `state_dict`: a resume restores callbacks before the strategy can add this one, and would warn of it.

    def held(self) -> dict[str, Any]:
        """For a replica that comes in."""
        return {"aborts": self._aborts + self.replicas.aborts, "members": list(self.replicas.members)}

    def take(self, held: dict[str, Any]) -> None:
        """Go on from what a peer has `held`."""
        self._aborts = held["aborts"] - self.replicas.aborts
        self._members = list(held["members"])
