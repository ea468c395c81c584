"""Row sketch in plain torch, and the signs that it shares with the kernel bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_eff.kernels.philox import philox
from lightning_eff.kernels.tables import CACHE_SIZE


def signs(columns: int, rank: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """The float32 matrix V of shape (columns, rank); see :func:`lightning_eff.kernels.row_sketch.signs`."""
    return transposed_signs((columns,), rank, seed, (stream,), device).T.contiguous()


def transposed_signs(
    columns: tuple[int, ...], rank: int, seed: int, streams: tuple[int, ...], device: torch.device
) -> Tensor:
    """The transposed V of several matrices beside each other, float32 (rank, total columns)."""
    counters, owners = _counters(columns, streams, device)
    word, _, _, _ = philox(seed, counters, owners)
    bits = (word >> torch.arange(rank, device=device).unsqueeze(-1)).bitwise_and_(1)
    return bits.to(torch.float32).mul_(-2).add_(1)


@functools.lru_cache(CACHE_SIZE)
def _counters(columns: tuple[int, ...], streams: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    counters = torch.cat([torch.arange(count) for count in columns])
    owners = torch.repeat_interleave(torch.tensor(streams), torch.tensor(columns), output_size=sum(columns))
    return counters.to(device), owners.to(device)


@torch.no_grad()
def row_sketch(
    matrices: Sequence[Tensor], errors: Sequence[Tensor] | None, rank: int, seed: int, streams: Sequence[int]
) -> Tensor:
    """The sketches of all matrices below each other, float32 of shape (total rows, rank)."""
    columns = tuple(matrix.shape[1] for matrix in matrices)
    transposed = transposed_signs(columns, rank, seed, tuple(streams), matrices[0].device)
    sketches = []
    for index, V in enumerate(torch.split(transposed, list(columns), dim=1)):
        values = matrices[index].to(torch.float32)
        if errors is not None:
            values = values + errors[index].to(torch.float32)
        sketches.append(linear(values, V))
    return torch.cat(sketches)
