"""What a callback asks of torch in a step does not grow with the number of parameters: one call takes them all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.data import DataLoader

from lightning_eff.callbacks import MISA, GradES, ZClip

# Attributes of a tensor, which are read in a walk over all: each is a fraction of a call to an operator.
_ATTRIBUTES = {"__get__", "numel", "is_complex", "is_contiguous", "is_floating_point", "stride", "data_ptr"}


class Calls(TorchFunctionMode):
    """Counts calls to torch from Python, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _ATTRIBUTES:
            self.made[resolve_name(func) or str(func)] += 1
        return func(*args, **(kwargs or {}))


class Many(L.LightningModule):
    """Blocks of two matrices and a bias."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)) for _ in range(blocks))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            batch = batch + block(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def calls(blocks: int, steps: int, *callbacks: L.Callback) -> Counter[str]:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module, data = Many(blocks), DataLoader(torch.ones(40, 4))
    with Calls() as counted:
        trainer.fit(module, data)
    return counted.made


def calls_of_four_steps(blocks: int, build: Any) -> Counter[str]:
    """What the callback adds to four steps, after all that is made once."""
    four = calls(blocks, 8, build()) - calls(blocks, 4, build())
    return four - (calls(blocks, 8) - calls(blocks, 4))


BUILD = {
    "ZClip": lambda: ZClip(),
    "ZClip, no zeroing": lambda: ZClip(nonfinite="ignore"),
    "GradES": lambda: GradES(tau=1e-9, alpha=0.0, every_n_steps=1, max_events=None),
    "GradES, weights": lambda: GradES(tau=1e-9, alpha=0.0, every_n_steps=1, max_events=None, metric="weight_change"),
    "MISA": lambda: MISA(budget=1.0, every_n_steps=100, momentum_step=False),
    "MISA, layers": lambda: MISA(budget=1.0, every_n_steps=100, momentum_step=False, granularity="layer"),
}


@pytest.mark.parametrize("name", BUILD)
def test_calls_to_torch_do_not_grow_with_the_number_of_parameters(name: str) -> None:
    few, many = (calls_of_four_steps(blocks, BUILD[name]) for blocks in (4, 40))
    assert few.total() > 0
    assert {key: (few[key], count) for key, count in many.items() if count != few[key]} == {}
