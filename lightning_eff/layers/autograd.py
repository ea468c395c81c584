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


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread: a forward pass is then a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def take_weights(new: nn.Linear, linear: nn.Linear) -> None:
    """Make a new subclass of ``nn.Linear`` around the very parameters of a layer, in place of its ``__init__``."""
    nn.Module.__init__(new)
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.weight, new.bias = linear.weight, linear.bias
