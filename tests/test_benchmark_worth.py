"""Models side by side are the models one by one, and the rivals' clips are what their papers' formulas say."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.worth.clips import AGC, AutoClip, Fixed
from benchmarks.worth.stacks import Batches, Stack
from benchmarks.worth.workloads import FAULTS, WORKLOADS


@pytest.mark.parametrize("name", ["autoencoder", "CNN"])
def test_a_stack_is_its_models_one_by_one(name):
    workload, limits, seeds, steps = WORKLOADS[name], (0.05, math.inf), (3, 4), 4
    stack = Stack(workload, seeds, [partial(Fixed, limit) for limit in limits], workload.rate)
    for step in range(steps):
        stack.step(step)
    for place, (seed, limit) in enumerate(zip(seeds, limits, strict=True)):
        torch.manual_seed(seed)
        module = workload.module()
        optimizer = workload.optimizer(module.parameters(), lr=workload.rate)
        batches = Batches(workload, workload.data()[0], seed)
        for step in range(steps):
            optimizer.zero_grad()
            module("", *batches(step)).backward()
            norm = clip_grad_norm_(module.parameters(), limit)
            optimizer.step()
        assert stack.norms[-1][place] == pytest.approx(float(norm), rel=1e-3)
        for parameter, value in module.named_parameters():
            torch.testing.assert_close(stack.parameters[parameter][place], value.detach(), rtol=1e-3, atol=1e-4)


def test_agc_scales_each_row_by_its_own_weights():
    weights = {
        "a.weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "a.bias": torch.ones(1),
        "head.weight": torch.ones(2),
    }
    gradients = {name: torch.full_like(each, 2.0) for name, each in weights.items()}
    assert AGC(factor=0.01, eps=1e-3)(torch.tensor(1.0), weights, gradients) == 1.0
    rows = gradients["a.weight"].norm(dim=1)
    assert rows.tolist() == pytest.approx([0.01 * 5, 0.01 * 1e-3])
    assert gradients["a.bias"].tolist() == pytest.approx([0.01])
    assert gradients["head.weight"].tolist() == [2.0, 2.0]  # the last layer


def test_autoclip_is_a_percentile_of_all_norms_so_far():
    clip = AutoClip(percentile=50)
    found = [float(clip(torch.tensor(norm))) for norm in (4.0, 2.0, 6.0)]
    assert found == pytest.approx([1.0, 1.0, 4 / 6])


@pytest.mark.parametrize("fault", FAULTS)
def test_one_batch_in_a_hundred_is_bad(fault):
    for name, workload in WORKLOADS.items():
        if fault not in workload.faults:
            continue
        data = workload.data()[0]
        healthy, faulty = Batches(workload, data, 0), Batches(workload, data, 0, fault, 200)
        assert len(faulty.bad) == 2, name
        step = min(faulty.bad)
        pairs = list(zip(healthy(step), faulty(step), strict=True))
        assert any(not torch.equal(*pair) for pair in pairs), name
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs), name
        assert all(torch.equal(*pair) for pair in zip(healthy(0), faulty(0), strict=True)), name


def test_lora_of_misa_s_memory_takes_as_much_as_there_is():
    from benchmarks.gpt import GPT_1M
    from benchmarks.misa import OF_THIS_MEMORY, rank_of
    from benchmarks.worth.misa import sizes

    held, rank = {arm: size for arm, (_, size) in sizes(GPT_1M).items()}, rank_of(OF_THIS_MEMORY)
    of_a_rank = (held[OF_THIS_MEMORY] - held["LoRA, rank 8"]) / (rank - 8)
    assert held[OF_THIS_MEMORY] <= held["MISA, 25 %"] < held[OF_THIS_MEMORY] + of_a_rank
