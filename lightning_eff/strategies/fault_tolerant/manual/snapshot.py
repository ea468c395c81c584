"""What a ``training_step`` that makes its own optimizer steps may change, kept so that it can be run again."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_eff.structure import clean_named_parameters


class StepSnapshot:
    """Parameters, gradients, buffers, learning rates, counters and attributes at one moment.

    Contents are copied and set by ``.data``, which leaves the versions alone that autograd looks at: a graph may be
    open over them, and find them as they were. The state of the optimizers is left out: nothing changes it but a step
    that counts. All parameters are kept, also those without an optimizer: ``training_step`` may average into them, and
    what it changes through ``.data`` leaves no trace.

    Args:
        trainer: which is fitting.
        again: whether it is for passes that accumulate on the gradients, so that these are copied. Else they are put
            back as the tensors that they were.
    """

    def __init__(self, trainer: Trainer, again: bool) -> None:
        self.trainer, self.again = trainer, again
        module = trainer.lightning_module
        self._contents = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
        self._parameters = [
            (parameter, parameter.requires_grad, _copy(parameter.grad) if again else parameter.grad)
            for parameter in module.parameters()
        ]
        parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        self._buffers = [(part, dict(part._buffers)) for part in parts if part._buffers]
        # Metrics change their tensors in place: `LoggedValues` copies those.
        self._attributes = [(part, dict(vars(part))) for part in parts if not isinstance(part, Metric)]
        self._schedulers = [
            (config.scheduler, copy.deepcopy(config.scheduler.state_dict())) for config in trainer.lr_scheduler_configs
        ]
        self._groups = groups(trainer)
        self._progress = copy.deepcopy(self._counter.state_dict())
        self._random = random.getstate(), np.random.get_state()
        self._logs_of = trainer._logger_connector._current_fx

    @property
    def _counter(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress

    def restore(self) -> None:
        """As it was when this was made."""
        for part, attributes in self._attributes:
            vars(part).clear()
            vars(part).update(attributes)
        for part, buffers in self._buffers:
            part._buffers.clear()
            part._buffers.update(buffers)
        for tensor, content in self._contents:
            tensor.data.copy_(content)
        for parameter, open_, gradient in self._parameters:
            parameter.requires_grad_(open_)
            parameter.grad = _copy(gradient) if self.again else gradient
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))
        set_groups(self.trainer, self._groups)
        self._counter.load_state_dict(copy.deepcopy(self._progress))
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        self.trainer._logger_connector._current_fx = self._logs_of

    def open(self) -> None:
        """Only which parameters are trained: others may be in the midst of ``toggle_optimizer``."""
        for parameter, open_, _ in self._parameters:
            parameter.requires_grad_(open_)

    def trained(self) -> dict[str, bool]:
        """Which parameters were trained, by clean name."""
        opened = {id(parameter): open_ for parameter, open_, _ in self._parameters}
        return {name: opened[id(p)] for name, p in clean_named_parameters(self.trainer.lightning_module).items()}


def groups(trainer: Trainer) -> list[list[dict[str, Any]]]:
    """Learning rates and the like, of each optimizer."""
    return [
        [{name: _copy(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]


def set_groups(trainer: Trainer, saved: list[list[dict[str, Any]]]) -> None:
    """Set what `groups` gave."""
    for optimizer, of_optimizer in zip(trainer.optimizers, saved, strict=True):
        for group, values in zip(optimizer.param_groups, of_optimizer, strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor) and isinstance(group[name], Tensor):
                    group[name].copy_(value)  # a compiled or captured step refers to it
                else:
                    group[name] = value


def with_buffers_of_its_own(module: nn.Module) -> None:
    """Give the module copies of its buffers, until `StepSnapshot.restore`: a pass may change them, whatever refers to
    the others.
    """
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule | Metric):
            continue
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
