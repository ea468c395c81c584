"""Which weights are evaluated: the average in place of the live ones, or beside them, by its own metrics."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_eff.callbacks.averaging.side_evaluation import AroundEvaluations, evaluate_beside
from lightning_eff.callbacks.averaging.stand_in import StandIn
from lightning_eff.training.trainer import is_alone
from lightning_eff.training.wrapping import Wrapper

ValidateWith = Literal["average", "current", "both"]


class Evaluations:
    """Evaluates averages around the evaluations that Lightning runs.

    Args:
        who: the callback, for messages.
        name: of the average, which begins its metrics' names.
        validate_with: which weights have the metrics' own names.
        stand_in: puts an average in the place of the weights.
        empty: called where there is no average yet.
    """

    def __init__(
        self, who: str, name: str, validate_with: ValidateWith, stand_in: StandIn, empty: Callable[[], None]
    ) -> None:
        self.who = who
        self.name = name
        self.validate_with: ValidateWith = validate_with
        self.stand_in = stand_in
        self.empty = empty
        self._around = AroundEvaluations(self._evaluate, self._before_end)
        self._saves: Wrapper | None = None
        self._replacing = False  # an evaluation is on its way that is one of the average
        self._beside: dict[str, Tensor] = {}
        self._module: weakref.ref[LightningModule] | None = None

    def attach(self, trainer: Trainer, stage: str) -> None:
        """Stand around the evaluations of a stage."""
        self.detach()
        self._around.attach(trainer, stage)

        def save(inner: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            # A module may save in a hook of its validation. The live weights have to be back before Lightning reads
            # them: it may get copies. Afterwards the evaluation goes on as it was.
            paused = self.stand_in.inside
            self.stand_in.take_out(trainer)
            try:
                inner(*args, **kwargs)
            finally:
                if paused is not None:
                    self.put_in(trainer, paused)

        self._saves = Wrapper(trainer, "save_checkpoint", save)

    def detach(self) -> None:
        """Leave them as they were."""
        self._around.detach()
        if self._saves is not None:
            self._saves.remove()
            self._saves = None

    def begin(self, module: LightningModule) -> None:
        """A run begins: it is the average of this module."""
        self._module = weakref.ref(module)

    @property
    def module(self) -> LightningModule | None:
        """Whose average it is, if it is anybody's."""
        return None if self._module is None else self._module()

    def put_in(self, trainer: Trainer, label: str) -> None:
        """Put an average in the place of the weights; without one they stay, with a message."""
        if self.stand_in.average.collected:
            self.stand_in.put_in(trainer, label)
        else:
            self.empty()

    def replace(self, trainer: Trainer) -> None:
        """At the start of an evaluation, behind all that others evaluate beside it: one average at a time."""
        if self._replacing:
            self.put_in(trainer, "")

    def log_beside(self, trainer: Trainer, module: LightningModule) -> None:
        """At the end of an evaluation: log what was evaluated beside it."""
        beside, self._beside = self._beside, {}
        several = not is_alone(trainer.strategy)
        if not trainer.sanity_checking:
            for key, value in beside.items():
                module.log(
                    key,
                    value,
                    on_step=False,
                    on_epoch=True,
                    sync_dist=several,
                    batch_size=1,
                    add_dataloader_idx=False,  # of several loaders it is in the name already
                )

    def _evaluate(self, loop: _EvaluationLoop, run: Callable[[], Any]) -> Any:
        trainer = loop.trainer
        if trainer.sanity_checking or not self._is_average_of(trainer):  # a check of the code, not of weights
            return run()
        try:
            self._beside = {}
            labels = [label for label in self.stand_in.average.labels if label != "" or self.validate_with == "both"]
            with evaluate_beside(trainer, loop) as evaluate:
                for label in labels:
                    self.put_in(trainer, label)
                    metrics = evaluate()
                    self.stand_in.take_out(trainer)
                    prefix = f"{self.name}/{label}" if label else self.name
                    self._beside |= {f"{prefix}/{key}": value for key, value in metrics.items()}
                self._replacing = self.validate_with == "average"
                return run()
        finally:
            self._replacing = False
            self.stand_in.take_out(trainer)

    def _before_end(self, loop: _EvaluationLoop) -> None:
        self.stand_in.take_out(loop.trainer)

    def _is_average_of(self, trainer: Trainer) -> bool:
        """False, with a message, where other weights than those of the run are evaluated."""
        if trainer.state.fn == TrainerFn.FITTING:
            return True
        if trainer.ckpt_path is None and (self._module is None or self.module is trainer.lightning_module):
            return True
        rank_zero_info(
            f"{self.who}({self.name!r}) is no average of the weights that are evaluated now, and leaves "
            "them as they are; that of a checkpoint lies beside it"
        )
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None, "_around": None, "_saves": None, "_beside": {}, "_replacing": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _around=AroundEvaluations(self._evaluate, self._before_end))
