"""What a step has logged, so that a step which is repeated is logged once."""

from __future__ import annotations

from copy import deepcopy

from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import nn

from lightning_eff.training.logged import logged_values, set_logged_values


class LoggedValues:
    """The state of what ``self.log`` accumulates, and of the module's own metrics, of which copies are kept.

    Args:
        results: of the running loop.
        module: whose metrics are kept.
    """

    def __init__(self, results: _ResultCollection, module: nn.Module) -> None:
        self._results, self._module = results, module
        values = logged_values(results, module)
        self._values = {**values, "metrics": deepcopy(values["metrics"])}

    def restore(self) -> None:
        """As it was when this was made, as often as one likes."""
        metrics = deepcopy(self._values["metrics"])  # they write into their tensors
        set_logged_values(self._results, self._module, {**self._values, "metrics": metrics})
