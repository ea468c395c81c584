"""What a loop has logged so far, read and put back: a part of a running Trainer's state, see ``run_parts.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_eff.training.run_parts import is_last_batch


def accumulators(trainer: Trainer) -> _ResultCollection:
    """In which the loop of training adds up what ``self.log`` gets."""
    return trainer.fit_loop.epoch_loop._results


def set_accumulators(trainer: Trainer, results: _ResultCollection | None) -> None:
    """Let it add up in these; None for new ones."""
    loop = trainer.fit_loop.epoch_loop
    loop._results = type(loop._results)(training=True) if results is None else results


@contextmanager
def nothing_logged(trainer: Trainer) -> Iterator[None]:
    """Around what is not to be logged."""
    results = accumulators(trainer)
    set_accumulators(trainer, None)
    try:
        yield
    finally:
        set_accumulators(trainer, results)


def logged_values(results: _ResultCollection, module: nn.Module) -> dict[str, Any]:
    """What ``self.log`` has accumulated in a loop, and the state of the module's own metrics.

    Lightning replaces its accumulators, so that references to them last. A metric may write into its own.
    """
    return {
        "results": {key: _fields(result, _OF_RESULT) for key, result in _numbers(results)},
        "metrics": {name: {**metric.metric_state, **_fields(metric, _OF_METRIC)} for name, metric in _metrics(module)},
    }


def set_logged_values(results: _ResultCollection, module: nn.Module, saved: dict[str, Any]) -> None:
    """Set what `logged_values` gave; what was logged for the first time since then is forgotten."""
    for key, result in list(results.items()):
        if key not in saved["results"] and result.is_tensor:
            del results[key]
    for key, result in _numbers(results):
        _set_fields(result, saved["results"][key])
    for name, metric in _metrics(module):
        if name in saved["metrics"]:
            _set_fields(metric, saved["metrics"][name])


@contextmanager
def metrics_apart(module: nn.Module) -> Iterator[None]:
    """Within the block the module's own metrics go on in copies of their states, and behind it from where they were."""
    before = [(metric, dict(vars(metric))) for _, metric in _metrics(module)]
    try:
        for metric, _ in before:
            for name, state in metric.metric_state.items():  # of a list the entries are never written into
                vars(metric)[name] = state.clone() if isinstance(state, Tensor) else list(state)
        yield
    finally:
        for metric, attributes in before:
            vars(metric).update(attributes)


def hook_in_hand(trainer: Trainer) -> str | None:
    """The name of the hook that ``self.log`` logs for."""
    return trainer._logger_connector._current_fx


def set_hook_in_hand(trainer: Trainer, name: str | None) -> None:
    """Set it."""
    trainer._logger_connector._current_fx = name


def epoch_means(trainer: Trainer) -> dict[str, Any]:
    """Of what the present epoch has logged, for `set_epoch_means`."""
    values = logged_values(accumulators(trainer), trainer.lightning_module)
    return {"epoch": trainer.current_epoch, **values}


def set_epoch_means(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Take the steps that were undone out of the means of the present epoch; of another epoch's, nothing is left.

    What the step in hand has shown stays, since loggers do not go back.
    """
    same_epoch = saved["epoch"] == trainer.current_epoch
    for key, result in _numbers(accumulators(trainer)):
        if not result.meta.on_epoch:
            continue
        shown = result._forward_cache
        if same_epoch and key in saved["results"]:
            _set_fields(result, saved["results"][key])
            result._computed = None
        else:
            result.reset()
            result.has_reset = is_last_batch(trainer)  # then there is nothing to take a mean of
        result._forward_cache = shown
    for name, metric in _metrics(trainer.lightning_module):
        if same_epoch and name in saved["metrics"]:
            _set_fields(metric, saved["metrics"][name])
        else:
            metric.reset()


_OF_RESULT = ("value", "cumulated_batch_size", "_forward_cache", "_computed", "_update_count", "has_reset")
_OF_METRIC = ("_update_count", "_computed", "_forward_cache")


def _numbers(results: _ResultCollection) -> list[tuple[str, _ResultMetric]]:
    """Without those that only refer to a metric of the module."""
    return [(key, result) for key, result in results.items() if result.is_tensor]


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    for name, part in module.named_modules():
        if isinstance(part, Metric):
            yield name, part


def _fields(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def _set_fields(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)
