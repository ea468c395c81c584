"""What a ``training_step`` that makes its own optimizer steps may change, kept so that it can be run again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.hooks import ReadsWeights, tell
from lightning_eff.training.logged import hook_in_hand, set_hook_in_hand
from lightning_eff.training.random_state import host_random_state, set_host_random_state
from lightning_eff.training.run_parts import (
    group_values,
    manual_steps,
    scheduler_states,
    set_group_values,
    set_manual_steps,
    set_scheduler_states,
)


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
        self._schedulers = copy.deepcopy(scheduler_states(trainer))
        self._groups = group_values(trainer)
        self._steps = copy.deepcopy(manual_steps(trainer))
        self._random = host_random_state()
        self._logs_of = hook_in_hand(trainer)

    def restore(self) -> None:
        """As it was when this was made."""
        for part, attributes in self._attributes:
            vars(part).clear()
            vars(part).update(attributes)
        for part, buffers in self._buffers:
            part._buffers.clear()
            part._buffers.update(buffers)
        if self._contents:
            tell(self.trainer, ReadsWeights)
        for tensor, content in self._contents:
            tensor.data.copy_(content)
        for parameter, trained, gradient in self._parameters:
            parameter.requires_grad_(trained)
            parameter.grad = _copy(gradient) if self.again else gradient
        set_scheduler_states(self.trainer, copy.deepcopy(self._schedulers))
        set_group_values(self.trainer, self._groups)
        set_manual_steps(self.trainer, copy.deepcopy(self._steps))
        set_host_random_state(self._random)
        set_hook_in_hand(self.trainer, self._logs_of)

    def set_trained(self) -> None:
        """Only which parameters are trained: others may be in the midst of ``toggle_optimizer``."""
        for parameter, trained, _ in self._parameters:
            parameter.requires_grad_(trained)

    def trained(self) -> dict[str, bool]:
        """Which parameters were trained, by clean name."""
        trained = {id(parameter): was for parameter, was, _ in self._parameters}
        return {name: trained[id(p)] for name, p in clean_named_parameters(self.trainer.lightning_module).items()}


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
