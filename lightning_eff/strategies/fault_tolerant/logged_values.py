"""What a step has logged, so that a step which is repeated is logged once."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import nn
from torchmetrics import Metric

_OF_RESULT = ("value", "cumulated_batch_size", "_forward_cache", "_computed", "_update_count", "has_reset")


class LoggedValues:
    """The state of what ``self.log`` accumulates, and of the module's own metrics.

    Lightning's accumulators are replaced and not changed by an update, so keeping references is enough. A module's
    ``torchmetrics.Metric`` is copied.

    Args:
        results: of the running loop.
        module: whose metrics are kept.
    """

    def __init__(self, results: _ResultCollection, module: nn.Module) -> None:
        self._results = results
        self._logged = {
            key: {name: getattr(result, name) for name in _OF_RESULT if hasattr(result, name)}
            for key, result in results.items()
            if isinstance(result, _ResultMetric)
        }
        self._metrics: list[tuple[Metric, dict[str, Any], int, Any, Any]] = [
            (metric, metric._copy_state_dict(), metric._update_count, metric._computed, metric._forward_cache)
            for metric in module.modules()
            if isinstance(metric, Metric)
        ]

    def restore(self) -> None:
        """As it was when this was made."""
        for key in list(self._results):
            if key not in self._logged:
                del self._results[key]
                continue
            for name, value in self._logged[key].items():
                setattr(self._results[key], name, value)
        for metric, state, count, computed, cache in self._metrics:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed, metric._forward_cache = count, computed, cache
