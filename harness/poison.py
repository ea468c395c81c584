"""Uninitialised memory that shows: a kernel that reads what it never wrote gets NaN, not yesterday's right answer."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MAKERS = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.empty_permuted,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}


class PoisonedEmpty(TorchFunctionMode):
    """Fills what `torch.empty` and its relatives return: NaN in floats, the largest value in integers.

    `torch.utils.deterministic.fill_uninitialized_memory` would need deterministic mode, which also swaps algorithms
    and refuses some. This mode sees calls from Python, which is where this package allocates (also a kernel's
    launcher); memory that torch's own C++ operators allocate for themselves is left alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKERS:
            poison(result)
        return result


@torch.no_grad()
def poison(tensor: torch.Tensor) -> None:
    """Overwrite `tensor` with the worst that its memory could hold."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
