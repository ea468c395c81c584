"""A training state in parts that go over a wire one after the other: it is never there a second time as a whole."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 12  # bytes; smaller tensors stay where they are


@dataclass(frozen=True)
class StateParts:
    """Nested dicts, lists and tuples, and the large tensors in them.

    Example:
        >>> parts = StateParts.of({"weight": torch.ones(2000), "step": 3})
        >>> len(parts.header) < 4000, len(parts.tensors)
        (True, 1)
        >>> state = StateParts.read(parts.header, lambda content: content.copy_(bytes_of(parts.tensors[0])))
        >>> state["step"], float(state["weight"].sum())
        (3, 2000.0)
    """

    header: bytes
    """All but the large tensors, with a tensor without content in the place of each: what ``torch.load`` reads."""
    tensors: list[Tensor]
    """Those, each once, and no copies: they must not change until they are sent."""

    @staticmethod
    def of(state: Any) -> StateParts:
        """Take a state apart."""
        tensors: list[Tensor] = []
        places: dict[Any, int] = {}
        order: list[int] = []

        def place_for(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.nbytes < SMALL:
                return tensor
            same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())  # a tied weight
            if same not in places:
                places[same] = len(tensors)
                tensors.append(tensor.detach())
            order.append(places[same])
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        buffer = io.BytesIO()
        torch.save({"tree": _with_tensors(state, place_for), "order": order}, buffer)
        return StateParts(buffer.getvalue(), tensors)

    @staticmethod
    def read(header: bytes, fill: Callable[[Tensor], Any]) -> Any:
        """Put a state together, on the CPU.

        Args:
            header: as it came.
            fill: called with the bytes of each large tensor, in order, to be filled.

        Raises:
            pickle.UnpicklingError: it holds something other than tensors and plain Python values.
        """
        found = torch.load(io.BytesIO(header), map_location="cpu", weights_only=True)
        tensors: list[Tensor] = []
        order: Iterator[int] = iter(found["order"])

        def content_of(place: Tensor) -> Tensor:
            if place.device.type != "meta":
                return place
            index = next(order)
            if index == len(tensors):
                tensors.append(torch.empty(place.shape, dtype=place.dtype))
                fill(bytes_of(tensors[-1]))
            return tensors[index]

        return _with_tensors(found["tree"], content_of)


def bytes_of(tensor: Tensor) -> Tensor:
    """Of a tensor on the CPU; they are its memory where that is contiguous, and a copy elsewhere."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def _with_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _with_tensors(value, change) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_with_tensors(value, change) for value in tree)
    return tree
