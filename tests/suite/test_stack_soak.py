"""Thousands of steps: memory does not grow, and nothing that a callback keeps becomes infinite."""

from __future__ import annotations

import gc
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from harness.memory import resident
from lightning_eff.callbacks import EMA, MISA, SpectralAlignmentMonitor, ZClip
from tests.suite.runs import fit, full

STEPS = 2_500


class _Memory(L.Callback):
    """Resident bytes by step, after what waits to be collected is gone."""

    def __init__(self) -> None:
        self.bytes: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 500 == 0:
            gc.collect()
            self.bytes[trainer.global_step] = resident()


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for entry in value for number in _numbers(entry)]
    if isinstance(value, Tensor) and value.is_floating_point():
        return [float(value.detach().sum())]
    return [value] if isinstance(value, float) else []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", [SpectralAlignmentMonitor, MISA])
def test_memory_is_flat(method, tmp_path):
    memory = _Memory()
    arguments = {"budget": 0.5} if method is MISA else {}
    callbacks = [method(**arguments), ZClip(max_grad_norm=None), EMA(decay=0.99)]
    run = fit(None, tmp_path, around=[*callbacks, memory], steps=STEPS, val_check_interval=5, log_every_n_steps=50)
    assert run.trainer.global_step == STEPS
    assert all(bool(torch.isfinite(weight).all()) for weight in run.parameters().values())
    for callback in callbacks:
        assert all(math.isfinite(number) for number in _numbers(full(callback.state_dict())))
    grown = memory.bytes[STEPS] - memory.bytes[1_000]
    assert grown < 4e6, memory.bytes
