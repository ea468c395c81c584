"""A Mixture-of-Channels network for few tokens in plain torch: what the kernels are held to, and what a CPU runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP, OF_GROUP = 8, 2


def selected_up(x: Tensor, up: Tensor, values: Tensor, channels: Tensor) -> Tensor:
    """silu(v) times the product of the selected rows with the token."""
    rows = up.index_select(0, channels.flatten()).view(*channels.shape, up.shape[1])
    return F.silu(values) * torch.bmm(rows, x[:, :, None]).squeeze(-1)


def selected_down(z: Tensor, channels: Tensor, down: Tensor) -> Tensor:
    """The sum of the selected rows, each times its z."""
    # A bag of K rows with a weight each: nothing but these rows is read, and nothing is copied.
    return F.embedding_bag(channels, down, per_sample_weights=z, mode="sum")


def pairs_up(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """z and channels of the two largest gates of each eight neighbours."""
    values, local = (x @ gate.T).view(len(x), len(gate) // GROUP, GROUP).topk(OF_GROUP, dim=-1)
    channels = local + torch.arange(0, len(gate), GROUP, device=x.device)[:, None]
    return selected_up(x, up, values.flatten(1), channels.flatten(1)), channels.flatten(1)
