"""Exchanging weights in place: whatever happens, nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_eff.callbacks.averaging.weight_swap import WeightSwap


class _Interrupt(TorchDispatchMode):
    """Raises before the n-th operator, as Ctrl+C might between any two."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def _pairs(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((2,), float(i), dtype=dtype), torch.full((2,), 10.1 + i)) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interruption_anywhere_loses_nothing(dtype):
    interrupted = 0
    for n in range(60):
        pairs, wanted = _pairs(dtype), _pairs(dtype)
        swap = WeightSwap()
        try:
            with _Interrupt(n):
                swap.put_in(pairs)
                assert swap.active
                swap.take_out()
        except KeyboardInterrupt:
            interrupted += 1
            swap.take_out()  # as `on_exception` does
        assert not swap.active
        for (weight, other), (live, average) in zip(pairs, wanted, strict=True):
            assert torch.equal(weight, live), f"after {n} operators"
            assert torch.equal(other, average), f"after {n} operators"
    assert 8 < interrupted < 60


def test_two_views_of_one_memory_come_back():
    memory = torch.arange(4.0)
    swap = WeightSwap()
    swap.put_in([(memory, torch.zeros(4)), (memory[:2], torch.ones(2))])
    assert memory.tolist() == [1, 1, 0, 0]
    swap.take_out()
    assert memory.tolist() == [0, 1, 2, 3]


def test_a_pair_that_fails_holds_up_no_other():
    pairs = _pairs()
    swap = WeightSwap()
    swap.put_in(pairs)
    weight = pairs[1][0]
    swap._exchanges[1].weight = weight[:1].expand(2)  # into which torch writes nothing
    with pytest.raises(RuntimeError, match="single memory location"):
        swap.take_out()
    assert pairs[0][0].tolist() == [0, 0]
    assert pairs[2][0].tolist() == [2, 2]
    assert swap.active
    swap._exchanges[0].weight = weight
    swap.take_out()  # tries it again
    assert weight.tolist() == [1, 1]


def test_a_second_swap_waits_for_the_first():
    swap = WeightSwap()
    swap.put_in(_pairs())
    with pytest.raises(RuntimeError, match="take them out first"):
        swap.put_in(_pairs())


def test_tensors_of_inference_mode_are_exchanged_as_well():
    ((weight, other), *_) = _pairs()
    swap = WeightSwap()
    with torch.inference_mode():
        swap.put_in([(weight, other)])
    swap.take_out()
    assert weight.tolist() == [0, 0]
    weight += 1  # which a tensor made in inference mode does not allow
