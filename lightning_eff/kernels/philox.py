"""Philox4x32-10 in plain torch: random words from counters, the same bits on every device, rank and run.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Triton's ``tl.philox`` computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: int, counter: Tensor, stream: int | Tensor, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter, in int64 arithmetic, as tensors of numbers in [0, 2^32).

    Counter (counter, stream, sequence, 0), key (seed mod 2^32, seed div 2^32). The constants are Python numbers: none
    has to be copied to the device.

    Args:
        seed: in [0, 2^64).
        counter: int64 tensor (n,) of numbers in [0, 2^32).
        stream: in [0, 2^32), or an int64 tensor (n,) of such numbers.
        sequence: an int64 tensor (n,) of such numbers; None: zeros. CUDA's generator counts its threads there.

    Example:
        >>> words = philox(0, torch.tensor([0]), 0)
        >>> [hex(word.item()) for word in words]  # from the authors' list of known answers
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    keys = seed & MASK, (seed >> 32) & MASK
    word_0, word_1 = counter, torch.full_like(counter, stream) if isinstance(stream, int) else stream
    word_3 = torch.zeros_like(counter)
    word_2 = word_3 if sequence is None else sequence
    for _ in range(ROUNDS):
        # The low 64 bits of a product are right in int64 as well. The shift drags its sign along, and words 1 and 3
        # have more than 32 bits: the mask cuts both.
        product_0, product_2 = word_0 * MULTIPLIERS[0], word_2 * MULTIPLIERS[1]
        word_0 = (product_2 >> 32).bitwise_xor_(word_1).bitwise_xor_(keys[0]).bitwise_and_(MASK)
        word_2 = (product_0 >> 32).bitwise_xor_(word_3).bitwise_xor_(keys[1]).bitwise_and_(MASK)
        word_1, word_3 = product_2, product_0
        keys = (keys[0] + WEYL[0]) & MASK, (keys[1] + WEYL[1]) & MASK
    return word_0, word_1 & MASK, word_2, word_3 & MASK


def philox_words(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """int64 (count,): random numbers in [0, 2^32), four of each counter from 0 on.

    Args:
        seed: in [0, 2^64).
        stream: in [0, 2^32).
        count: below 2^34.
        device: where they are made.

    Example:
        >>> [hex(word) for word in philox_words(0, 0, 5, torch.device("cpu")).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8', '0xf8e4cca4']
    """
    counters = -(-count // 4)
    words = torch.empty((counters, 4), dtype=torch.int64, device=device)
    # In pieces that stay in a CPU's cache, or that leave a GPU's memory alone.
    piece = 2**14 if device.type == "cpu" else 2**22
    for start in range(0, counters, piece):
        counter = torch.arange(start, min(start + piece, counters), device=device)
        torch.stack(philox(seed, counter, stream), dim=1, out=words[start : start + piece])
    return words.view(-1)[:count]
