"""The communication hook in one process: what it holds, what it writes when, and what it takes for a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.local_hook import LocalHook, copies_of_the_gradients, equal_ranks
from lightning_eff.compression import BF16, ArcTopK, Int8, PowerSGD, RandK, TopK


@pytest.mark.parametrize(
    ("compressor", "most"),
    [
        (BF16(), 0.7),
        (Int8(), 1.3),
        (PowerSGD(), 1.3),  # 1 is its error memory
        (TopK(), 2.3),  # 1 is its error memory, and 0.4 are what two ranks send
        (RandK(), 0.7),
        (ArcTopK(), 0.7),
        (ArcTopK(error_feedback="ef14"), 1.7),
    ],
    ids=repr,
)
def test_peak_memory(compressor, most):
    # Nothing has arrived before it is waited for, as on a slow link.
    assert 0.2 < copies_of_the_gradients(compressor) <= most


@pytest.mark.parametrize("compressor", [BF16(), Int8(), TopK(error_feedback="none")], ids=repr)
def test_a_bucket_that_has_arrived_gives_its_memory_back(compressor):
    assert copies_of_the_gradients(compressor, at_once=True) < 0.7 * copies_of_the_gradients(compressor)


@pytest.mark.parametrize(("compressor", "early"), [(BF16(), 2), (Int8(), 2), (RandK(), 0), (PowerSGD(), 0)], ids=repr)
def test_a_bucket_is_written_as_soon_as_it_has_arrived(compressor, early):
    """In the call of a later bucket; where the step is judged as a whole, at its end."""
    with equal_ranks(2):
        local = LocalHook(compressor, *([nn.Parameter(torch.zeros(64, 64))] for _ in range(3)))
        futures = [local.reduction.reduce(bucket) for bucket in local.buckets[:2]]
        local.buckets[2]._last = False
        futures.append(local.reduction.reduce(local.buckets[2]))
        assert [future.done() for future in futures] == [True] * early + [False] * (3 - early)


def test_rows_are_those_in_memory():
    # 16 x 1000 in memory: a sketch of rank 16 is small beside it, and would be as large as 1000 x 16.
    wide = nn.Parameter(torch.zeros(16, 1000).T)
    position = nn.Parameter(torch.zeros(1, 512, 64))
    with equal_ranks(2):
        local = LocalHook(ArcTopK(rank=16), [wide, position])
        compressed, dense = local.reduction._plan(local.buckets[0], local.buckets[0].buffer(), 2)
    assert [(slot.rows, slot.columns) for slot in compressed] == [(16, 1000), (512, 64)]
    assert dense == []


def test_two_backward_passes_in_a_step_draw_other_places():
    """As manual optimization may have them: the second one reduces the first one's average and its own gradient."""
    with equal_ranks(2):
        local = LocalHook(RandK(ratio=0.1, min_numel=1), [nn.Parameter(torch.zeros(40, 30))])
        gradient, total, steps = local.buckets[0].buffer(), torch.zeros(1200), 400
        for local.step in range(steps):
            gradient.fill_(1)
            local.run()
            gradient.add_(1)
            local.run()
            total += gradient
        assert total.mean().item() / steps == pytest.approx(2, rel=0.05)  # was 11 with the same places in both


def test_the_places_of_a_step_do_not_depend_on_the_steps_before():
    """A resume draws them again."""
    drawn = []
    with equal_ranks(2):
        for first in (0, 5):
            local = LocalHook(RandK(ratio=0.1, min_numel=1), [nn.Parameter(torch.zeros(40, 30))])
            for local.step in range(first, 8):
                local.buckets[0].buffer().fill_(1)
                local.run()
            drawn.append(local.buckets[0].buffer().nonzero())
    assert torch.equal(*drawn)
