"""Row sketch in plain torch, and the signs that it shares with the kernel bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10


def philox_word(seed: int, counter: Tensor, stream: int) -> Tensor:
    """First word of Philox4x32-10, in int64 arithmetic, as a tensor of numbers in [0, 2^32).

    Counter (counter, stream, 0, 0), key (seed mod 2^32, seed div 2^32); the constants and the ten rounds are those of
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Triton's ``tl.philox`` computes the same.

    Args:
        seed: in [0, 2^64).
        counter: int64 tensor of numbers in [0, 2^32).
        stream: in [0, 2^32).

    Example:
        >>> philox_word(0, torch.tensor([0]), 0).item() == 0x6627E8D5  # from the authors' list of known answers
        True
    """
    c0, c1 = counter, torch.full_like(counter, stream)
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two 32-bit numbers, which does not fit into int64."""
    low_part = (constant & 0xFFFF) * word
    high_part = (constant >> 16) * word
    total = low_part + ((high_part & 0xFFFF) << 16)
    return (high_part >> 16) + (total >> 32), total & MASK


def signs(columns: int, rank: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """The float32 matrix V of shape (columns, rank); see :func:`lightning_eff.kernels.row_sketch.signs`."""
    word = philox_word(seed, torch.arange(columns, device=device), stream)
    bits = (word[:, None] >> torch.arange(rank, device=device)) & 1
    return (1 - 2 * bits).to(torch.float32)


@torch.no_grad()
def row_sketch(
    matrices: Sequence[Tensor], errors: Sequence[Tensor] | None, rank: int, seed: int, streams: Sequence[int]
) -> Tensor:
    """The sketches of all matrices below each other, float32 of shape (total rows, rank)."""
    sketches = []
    for index, matrix in enumerate(matrices):
        values = matrix.to(torch.float32)
        if errors is not None:
            values = values + errors[index].to(torch.float32)
        sketches.append(values @ signs(matrix.shape[1], rank, seed, streams[index], matrix.device))
    return torch.cat(sketches)
