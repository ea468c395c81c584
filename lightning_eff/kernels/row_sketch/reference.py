"""Row sketch in plain torch, and the signs that it shares with the kernel bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_eff.kernels.tables import CACHE_SIZE

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_word(seed: int, counter: Tensor, stream: int | Tensor) -> Tensor:
    """First word of Philox4x32-10, in int64 arithmetic, as a tensor of numbers in [0, 2^32).

    Counter (counter, stream, 0, 0), key (seed mod 2^32, seed div 2^32); the constants and the ten rounds are those of
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Triton's ``tl.philox`` computes the same.

    Args:
        seed: in [0, 2^64).
        counter: int64 tensor (n,) of numbers in [0, 2^32).
        stream: in [0, 2^32), or an int64 tensor (n,) of such numbers.

    Example:
        >>> philox_word(0, torch.tensor([0]), 0).item() == 0x6627E8D5  # from the authors' list of known answers
        True
    """
    # Words 0 and 2, which are multiplied, lie below each other, and words 1 and 3: half as many operations.
    even = counter.new_zeros((2, len(counter)))
    odd = torch.zeros_like(even)
    even[0] = counter
    odd[0] = stream
    multipliers, keys = _constants(seed, counter.device)
    for key in keys:
        # The low 64 bits of a product are right in int64 as well; the shift drags its sign along, and the mask cuts it.
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_and_(MASK).bitwise_xor_(odd).bitwise_xor_(key)
        odd = product.bitwise_and_(MASK)
    return even[0]


def _constants(seed: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    words = (seed & MASK, (seed >> 32) & MASK)
    keys = [[(word + turn * step) & MASK for word, step in zip(words, WEYL, strict=True)] for turn in range(ROUNDS)]
    table = torch.tensor([MULTIPLIERS, *keys], device=device).unsqueeze(-1)
    return table[0], table[1:].unbind()


def signs(columns: int, rank: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """The float32 matrix V of shape (columns, rank); see :func:`lightning_eff.kernels.row_sketch.signs`."""
    return transposed_signs((columns,), rank, seed, (stream,), device).T.contiguous()


def transposed_signs(
    columns: tuple[int, ...], rank: int, seed: int, streams: tuple[int, ...], device: torch.device
) -> Tensor:
    """The transposed V of several matrices beside each other, float32 (rank, total columns)."""
    counters, owners = _counters(columns, streams, device)
    word = philox_word(seed, counters, owners)
    bits = (word >> torch.arange(rank, device=device).unsqueeze(-1)).bitwise_and_(1)
    return bits.to(torch.float32).mul_(-2).add_(1)


@functools.lru_cache(CACHE_SIZE)
def _counters(columns: tuple[int, ...], streams: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    counters = torch.cat([torch.arange(count) for count in columns])
    owners = torch.repeat_interleave(torch.tensor(streams), torch.tensor(columns))
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
