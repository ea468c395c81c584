"""Exchanging a model's weights with others in place, so that nothing is lost whenever it is interrupted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class _Exchange:
    """One weight and the tensor that it is exchanged with.

    While ``exchanged`` is False, ``values`` are what the two have to hold in the end: writing them may be interrupted
    and repeated at any point.
    """

    weight: Tensor
    other: Tensor
    values: tuple[Tensor, Tensor | None] | None
    exchanged: bool = False

    def undo(self) -> None:
        """Give both their own values again."""
        if self.exchanged:
            self.values = (self.other.clone(), self.weight.clone())
            self.exchanged = False
        assert self.values is not None
        live, average = self.values
        self.weight.copy_(live)
        if average is not None:
            self.other.copy_(average)


class WeightSwap:
    """Puts other values into a model's weights and takes them out again.

    Contents are exchanged, tensor by tensor: storage, views, tied weights, compiled graphs, the optimizer and FSDP's
    shards stay what they are, and no second model is held, for the live weights lie in the other tensors meanwhile.
    A pair of two dtypes (a bfloat16 weight and its float32 average) is not exchanged, because the average would be
    rounded: the live weight is kept beside it.

    Example:
        >>> weight, average = torch.ones(2), torch.zeros(2)
        >>> swap = WeightSwap()
        >>> swap.put_in([(weight, average)])
        >>> weight, average
        (tensor([0., 0.]), tensor([1., 1.]))
        >>> swap.take_out()
        >>> weight, average
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    def __init__(self) -> None:
        self._exchanges: list[_Exchange] = []

    @property
    def active(self) -> bool:
        """Whether some weight may hold another value than its own."""
        return bool(self._exchanges)

    def put_in(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Exchange each weight with its other tensor. On any exception, a KeyboardInterrupt too, nothing is changed."""
        if self.active:
            raise RuntimeError("the weights are exchanged already: take them out first")
        try:
            with torch.inference_mode(False), torch.no_grad():
                for weight, other in pairs:
                    self._put_in(weight, other)
        except BaseException:
            self.take_out()
            raise

    def _put_in(self, weight: Tensor, other: Tensor) -> None:
        exact = weight.dtype == other.dtype
        live = weight.clone() if exact else weight.to(other.device, copy=True)
        average = other.clone() if exact else None
        exchange = _Exchange(weight, other, (live, average))
        self._exchanges.append(exchange)  # from here on `take_out` can undo it
        weight.copy_(other)
        if exact:
            other.copy_(live)
            exchange.exchanged = True
            exchange.values = None  # two tensors at a time are held twice, not two models

    def take_out(self) -> None:
        """Put every weight back, the last one first, since two may share memory. Doing it again is harmless.

        One that fails holds up no other: its error is raised behind them, and the next call tries it again.
        """
        with torch.inference_mode(False), torch.no_grad():
            failures = [self._take_out(index) for index in reversed(range(len(self._exchanges)))]
        for error in filter(None, failures):
            raise error

    def _take_out(self, index: int) -> Exception | None:
        try:
            self._exchanges[index].undo()
        except Exception as error:
            return error
        del self._exchanges[index]
        return None
