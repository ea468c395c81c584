"""The selected channels of a Mixture-of-Channels network in plain torch: what the kernels are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(up: Tensor, values: Tensor, channels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, s and z of the selected channels, and z in place."""
    u = up.gather(-1, channels)
    s = F.silu(values)
    z = s * u
    return u, s, z, torch.zeros_like(up).scatter_(-1, channels, z)


def activate_backward(
    grad: Tensor, values: Tensor, channels: Tensor, u: Tensor, s: Tensor, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates and of u in place."""
    channels = channels.to(torch.int64)
    selected = grad.gather(-1, channels)
    d_gate = torch.ops.aten.silu_backward(selected * u, values)
    zeros = torch.zeros_like(grad)
    in_place = zeros.scatter(-1, channels, d_gate) if into is None else into.scatter_(-1, channels, d_gate)
    return in_place, zeros.scatter_(-1, channels, selected * s)
