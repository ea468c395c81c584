"""Around the evaluations that Lightning runs, and a second one beside them whose metrics are handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_eff.training.logged import metrics_apart
from lightning_eff.training.run_parts import group_values, scheduler_states, set_group_values, set_scheduler_states
from lightning_eff.training.trainer import callbacks_of
from lightning_eff.training.wrapping import Wrapper


@contextmanager
def evaluate_beside(trainer: Trainer, loop: _EvaluationLoop) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Evaluations of ``loop`` beside its own, which is to follow within the block, on the same data.

    The data loaders are made once, and all evaluations begin from the same random state, which is afterwards what it
    would have been without those beside.

    Yields:
        A function that runs the evaluation now and returns the metrics that it would have logged. The LightningModule
        sees a whole evaluation with all its hooks, so that metrics and lists which it keeps begin and end with it.
        Callbacks and loggers see nothing of it. Random generators, the loop's progress, Lightning's metrics, those of
        the module, schedulers with their rates, and ``should_stop`` are as before. What else the module does in its
        hooks, in a list of its own or by ``self.logger``, happens once more. Collectives and host syncs: those of a
        validation.
    """
    loop.setup_data()
    once = Wrapper(loop, "setup_data", _ignore)  # outside of `fit` it makes other loaders every time
    try:
        yield lambda: {} if loop.skip else _evaluate(trainer, loop)
    finally:
        once.remove()


def _evaluate(trainer: Trainer, loop: _EvaluationLoop) -> dict[str, Tensor]:
    connector: Any = trainer._logger_connector
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")
    before = {name: getattr(connector, name) for name in names}
    rates, schedulers, should_stop = group_values(trainer), scheduler_states(trainer), trainer.should_stop
    generators = {generator: generator.get_state() for generator in _generators(loop)}
    side = _side_loop(loop)
    try:
        connector.reset_metrics()
        connector._first_loop_iter = None
        connector.log_metrics = _ignore
        _put(trainer, loop, side)
        with isolate_rng(), _deaf(callbacks_of(trainer)), metrics_apart(trainer.lightning_module):
            side.run()
        metrics = connector._callback_metrics
        return {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
    finally:
        _put(trainer, side, loop)
        side._data_fetcher = None  # its teardown would reset the loader, which is the other loop's
        connector.__dict__.pop("log_metrics", None)
        for name, value in before.items():
            setattr(connector, name, value)
        for generator, state in generators.items():
            generator.set_state(state)
        set_scheduler_states(trainer, schedulers)
        set_group_values(trainer, rates)
        trainer.should_stop = should_stop


@contextmanager
def _deaf(callbacks: list[Callback]) -> Iterator[None]:
    """Within the block callbacks hear nothing.

    They stay among the Trainer's: the thread that draws a progress bar looks for it there, a module for its
    ``trainer.checkpoint_callback``, and a checkpoint that it saves for the state of each.
    """
    own = [{name: vars(callback)[name] for name in _HOOKS if name in vars(callback)} for callback in callbacks]
    try:
        for callback in callbacks:
            vars(callback).update(dict.fromkeys(_HOOKS, _ignore))
        yield
    finally:
        for callback, hooks in zip(callbacks, own, strict=True):
            for name in _HOOKS:
                vars(callback).pop(name, None)
            vars(callback).update(hooks)


def _side_loop(beside: _EvaluationLoop) -> _EvaluationLoop:
    """One of the same class, which runs on the data of another."""
    loop = type(beside)(
        beside.trainer, beside._trainer_fn, beside._stage, verbose=False, inference_mode=beside.inference_mode
    )
    loop._data_source = beside._data_source
    loop._combined_loader = beside._combined_loader
    loop._max_batches = beside._max_batches
    loop.setup_data = _ignore  # type: ignore[method-assign]
    return loop


def _generators(loop: _EvaluationLoop) -> set[torch.Generator]:
    """What the loop's loaders draw from beside the global generators."""
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    batch_samplers = [getattr(loader, "batch_sampler", None) for loader in loaders]
    owners = [*loaders, *(getattr(owner, "sampler", None) for owner in (*loaders, *batch_samplers))]
    found = (getattr(owner, "generator", None) for owner in owners)
    return {generator for generator in found if isinstance(generator, torch.Generator)}


_HOOKS = [name for name in vars(Callback) if name.startswith("on_") and not name.endswith("_checkpoint")]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _put(trainer: Trainer, old: _EvaluationLoop, new: _EvaluationLoop) -> None:
    """Make ``new`` the loop that the Trainer finds where it found ``old``."""
    for owner, name in ((trainer.fit_loop.epoch_loop, "val_loop"), (trainer, "validate_loop"), (trainer, "test_loop")):
        if getattr(owner, name) is old:
            setattr(owner, name, new)


class AroundEvaluations:
    """Stands in front of two methods of an evaluation loop.

    Around ``run``, because a hook is not called when an evaluation breaks off, and because a hook at its start comes
    after the iteration over the data has begun. In front of the hooks at its end, where checkpoints are saved: some
    callbacks have theirs before the owner's. Several owners may stand behind each other.

    Args:
        around: called with the loop and what is left of ``run``, to be called in it.
        before_end: called with the loop before any hook at the end of the evaluation.
    """

    def __init__(
        self,
        around: Callable[[_EvaluationLoop, Callable[[], Any]], Any],
        before_end: Callable[[_EvaluationLoop], None],
    ) -> None:
        self.around = around
        self.before_end = before_end
        self._wrappers: list[Wrapper] = []

    def attach(self, trainer: Trainer, stage: str) -> None:
        """Stand in front of the loop of a stage, in place of any other."""
        self.detach()
        loops = {
            "fit": trainer.fit_loop.epoch_loop.val_loop,
            "validate": trainer.validate_loop,
            "test": trainer.test_loop,
        }
        if stage not in loops:
            return
        loop = loops[stage]

        def run(inner: Callable[[], Any]) -> Any:
            return self.around(loop, inner)

        def end(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.before_end(loop)
            return inner(*args, **kwargs)

        self._wrappers = [Wrapper(loop, "run", run), Wrapper(loop, "_on_evaluation_end", end)]

    def detach(self) -> None:
        """Leave the loop as it was."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers = []
