"""Bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """Of all storages that autograd saves while ``forward`` runs, each once, but those of ``without``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found: dict[int, int] = {}
    alive = []  # an address is not given out again while its tensor lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(found.values())
