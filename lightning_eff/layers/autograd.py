"""What several of the layers ask of torch."""

from __future__ import annotations

import torch
from torch import nn


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread: a forward pass is then a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def take_weights(new: nn.Linear, linear: nn.Linear) -> None:
    """Make a new subclass of ``nn.Linear`` around the very parameters of a layer, in place of its ``__init__``."""
    nn.Module.__init__(new)
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.weight, new.bias = linear.weight, linear.bias
