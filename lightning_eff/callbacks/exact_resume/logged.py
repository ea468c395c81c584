"""What a loop has logged so far, as a checkpoint may hold it, and made anew in the run that resumes."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from lightning.pytorch.utilities import rank_zero_warn

from lightning_eff.training.logged import logged_values, set_logged_values

_PLAIN = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx"),
    *("dataloader_idx", "metric_attribute"),
)
_SHOWN = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")


def logged(trainer: Trainer) -> dict[str, Any]:
    """The training epoch's accumulators, the module's metrics, and what callbacks and schedulers last saw of them."""
    results = trainer.fit_loop.epoch_loop._results
    connector = trainer._logger_connector
    return {
        **logged_values(results, trainer.lightning_module),
        "made": {key: _made(result) for key, result in results.items() if result.meta.sync.group is None},
        "shown": {name: dict(getattr(connector, name)) for name in _SHOWN},
    }


def set_logged(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Go on from it."""
    results, module = trainer.fit_loop.epoch_loop._results, trainer.lightning_module
    saved = move_data_to_device(saved, module.device)
    for key, made in saved["made"].items():
        if key not in results and (made["metric_attribute"] is None or _metric(module, made) is not None):
            results[key] = _make(trainer, made)
    if lost := saved["results"].keys() - saved["made"].keys():
        rank_zero_warn(f"ExactResume: logged with a process group of its own, and not restored: {', '.join(lost)}")
    set_logged_values(results, module, {**saved, "results": {key: saved["results"].get(key, {}) for key in results}})
    for name, values in saved["shown"].items():
        getattr(trainer._logger_connector, name).update(values)


def _made(result: _ResultMetric) -> dict[str, Any]:
    meta = result.meta
    name = meta.reduce_fx.__name__
    return {
        **{field: getattr(meta, field) for field in _PLAIN},
        "reduce_fx": name,
        "of_torch": meta.reduce_fx is getattr(torch, name),
        "sync": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
        "has_reset": result.has_reset,
    }


def _make(trainer: Trainer, made: dict[str, Any]) -> _ResultMetric:
    reduce_fx = getattr(torch if made["of_torch"] else builtins, made["reduce_fx"])
    # The classes of the name under which this Trainer goes: what is logged next is compared with them.
    classes = sys.modules[type(trainer.fit_loop.epoch_loop._results).__module__]
    meta = classes._Metadata(**{field: made[field] for field in _PLAIN}, reduce_fx=reduce_fx)
    sync = {"_should": made["sync"], "rank_zero_only": made["rank_zero_only"]}
    meta.sync = classes._Sync(fn=trainer.strategy.reduce, **sync)
    result: Any = classes._ResultMetric(meta, is_tensor=made["metric_attribute"] is None)
    result.has_reset = made["has_reset"]
    if made["metric_attribute"] is not None:
        result.value = _metric(trainer.lightning_module, made)
    made_here: _ResultMetric = result.to(trainer.lightning_module.device)
    return made_here


def _metric(module: torch.nn.Module, made: dict[str, Any]) -> Any:
    return dict(module.named_modules()).get(made["metric_attribute"])
