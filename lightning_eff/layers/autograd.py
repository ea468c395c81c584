"""What several of the layers ask of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MARK = "layers were replaced: add ModelSurgery to the Trainer, or call replace_layers(model, plan)"
"""Name of a tensor that a checkpoint may hold in a replaced layer, for torch to say to whoever loads it without one."""


class Marked(nn.Module):
    """A layer that loads weights with :data:`MARK` among them: it is the layer that the mark asks for."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + MARK, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def mark(model: nn.Module, weights: dict[str, Any]) -> None:
    """Say in a checkpoint's weights that layers were replaced, to whoever loads them into a model as it was.

    Torch's own error lists the names that a model has not, and :data:`MARK` is one. The
    replaced layers pass over it.

    Args:
        model: with replaced layers.
        weights: its state dict as it is saved, to which one tensor of one byte is added.
    """
    for name, module in model.named_modules():  # as its weights are named, and not cleaned as in a plan
        if isinstance(module, Marked) and any(key.startswith(f"{name}.") for key in weights):
            weights[f"{name}.{MARK}"] = torch.zeros(1, dtype=torch.uint8)
            return


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread: a forward pass is then a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def take_weights(new: nn.Linear, linear: nn.Linear) -> None:
    """Make a new subclass of ``nn.Linear`` around the very parameters of a layer, in place of its ``__init__``."""
    nn.Module.__init__(new)
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.weight, new.bias = linear.weight, linear.bias
