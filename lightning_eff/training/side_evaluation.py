"""A second validation or test beside the one that Lightning runs, whose metrics are handed over instead of logged."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override


class _SideLoop(_EvaluationLoop):
    """Runs on the data of another loop."""

    def __init__(self, beside: _EvaluationLoop) -> None:
        super().__init__(
            beside.trainer, beside._trainer_fn, beside._stage, verbose=False, inference_mode=beside.inference_mode
        )
        self._data_source = beside._data_source
        self._combined_loader = beside._combined_loader
        self._max_batches = beside._max_batches

    @override
    def setup_data(self) -> None:
        pass


def evaluate_beside(trainer: Trainer, loop: _EvaluationLoop) -> dict[str, Tensor]:
    """Run the evaluation of ``loop`` now, before its own, and return the metrics that it would have logged.

    The LightningModule sees a whole evaluation with all its hooks, so that metrics and lists which it keeps begin and
    end with it. Callbacks and loggers see nothing of it. Random generators, the loop's progress and Lightning's
    metrics are as before. Only the module's own calls to ``self.logger`` happen once more.

    Collectives and host syncs: those of a validation.
    """
    loop.setup_data()
    if loop.skip:
        return {}
    connector: Any = trainer._logger_connector
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")
    before = {name: getattr(connector, name) for name in names}
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    side = _SideLoop(loop)
    try:
        connector.reset_metrics()
        connector._first_loop_iter = None
        connector.log_metrics = _ignore
        trainer.callbacks = []  # type: ignore[attr-defined]
        _put(trainer, loop, side)
        with isolate_rng():
            side.run()
        metrics = connector._callback_metrics
        return {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
    finally:
        _put(trainer, side, loop)
        side._data_fetcher = None  # its teardown would reset the loader, which is the other loop's
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        connector.__dict__.pop("log_metrics", None)
        for name, value in before.items():
            setattr(connector, name, value)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _put(trainer: Trainer, old: _EvaluationLoop, new: _EvaluationLoop) -> None:
    """Make ``new`` the loop that the Trainer finds where it found ``old``."""
    for owner, name in ((trainer.fit_loop.epoch_loop, "val_loop"), (trainer, "validate_loop"), (trainer, "test_loop")):
        if getattr(owner, name) is old:
            setattr(owner, name, new)
