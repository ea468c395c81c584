"""Gradients of a part of ``training_step``, summed over all shards; and which of them are new since the last sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.replica_group import GradientSums

BUCKET = 2**25  # bytes that are sent in one operation


class NewGradients:
    """Knows which parameters have a gradient of this replica's own, which the others do not have.

    A backward pass, of Lightning or called directly, tells it by a hook. A gradient that the user has set himself is
    recognised by being another tensor than the one that was there.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._hooked: set[int] = set()
        self._fired: set[int] = set()
        self._known: dict[int, TensorWeakRef] = {}

    def listen(self, parameters: Iterable[nn.Parameter]) -> None:
        """To these, which may be unfrozen later."""
        for parameter in parameters:
            if id(parameter) in self._hooked or not (parameter.is_floating_point() or parameter.is_complex()):
                continue
            self._hooked.add(id(parameter))
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # else there can be no hook
            register: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(register(self._tell))
            parameter.requires_grad_(trained)

    def _tell(self, parameter: Any) -> None:
        self._fired.add(id(parameter))

    def close(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooked = [], set()

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """All replicas have the gradients that these have now."""
        for parameter in parameters:
            self._fired.discard(id(parameter))
            if parameter.grad is None:
                self._known.pop(id(parameter), None)
            else:
                self._known[id(parameter)] = TensorWeakRef(parameter.grad)

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether this one's gradient is new."""
        if parameter.grad is None:
            return False
        known = self._known.get(id(parameter))
        return id(parameter) in self._fired or known is None or known() is not parameter.grad

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """Around other passes, which begin without knowing of any."""
        held = self._fired, self._known
        self._fired, self._known = set(), {}
        try:
            yield
        finally:
            self._fired, self._known = held


def summed_over_shards(
    sums: GradientSums,
    parameters: list[nn.Parameter],
    others: dict[int, Tensor],
    divisor: float,
) -> list[Tensor] | None:
    """Gradients of all shards, divided: of this replica's own pass and of its ``others``, by ``id`` of the parameter.

    Returns:
        One for each parameter; None if it failed.
    """
    sums.begin()
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, parameter in enumerate(parameters):
        kinds.setdefault((parameter.dtype, parameter.device), []).append(index)
    found: dict[int, Tensor] = {}
    works: list[Any] = []
    buckets = []
    for (dtype, _), indices in kinds.items():
        for chosen in _cut(indices, [parameters[i].numel() * dtype.itemsize for i in indices]):
            flat = torch.cat([_sum(parameters[i], others).flatten() for i in chosen]).div_(divisor * sums.group.size)
            works.append(sums.all_reduce(flat))
            buckets.append((chosen, flat))
    sums.finish(works)
    if sums.failed:
        return None
    for chosen, flat in buckets:
        pieces = torch.split(flat, [parameters[i].numel() for i in chosen])
        found.update((i, piece.view_as(parameters[i])) for i, piece in zip(chosen, pieces, strict=True))
    return [found[index] for index in range(len(parameters))]


def _sum(parameter: nn.Parameter, others: dict[int, Tensor]) -> Tensor:
    own, other = parameter.grad, others.get(id(parameter))
    if own is None:
        return torch.zeros_like(parameter, requires_grad=False) if other is None else other
    if own.is_sparse:
        raise RuntimeError("ddp_ft does not sum sparse gradients in manual optimization: use Embedding(sparse=False)")
    return own.detach() if other is None else own.detach() + other


def _cut(indices: list[int], sizes: list[int]) -> Iterable[list[int]]:
    bucket: list[int] = []
    total = 0
    for index, size in zip(indices, sizes, strict=True):
        if bucket and total + size > BUCKET:
            yield bucket
            bucket, total = [], 0
        bucket.append(index)
        total += size
    if bucket:
        yield bucket
